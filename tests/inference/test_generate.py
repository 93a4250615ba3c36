"""Properties of generation: cached = uncached while latents grow, batched = single, beams, streams, stop strings."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import perceiver
from perceiver.config import UserError
from perceiver.data.tokenizers import load_tokenizer
from perceiver.generation.continuations import Continuation
from perceiver.generation.generate import _draws, beam_search, generate, stream
from perceiver.generation.options import Sampling
from perceiver.generation.texts import pad_left
from perceiver.models import PerceiverARConfig, build_model
from tests.support.trained import write_run

CONFIG = PerceiverARConfig(
    vocab_size=30,
    max_seq_len=20,
    max_latents=8,
    num_channels=16,
    num_heads=2,
    num_self_attention_layers=2,
    init_scale=0.5,
)
CONFIGS = {
    "learned and rotary": CONFIG,
    "rotary only": replace(CONFIG, abs_pos_emb=False, output_norm=True, output_bias=False),
}
# In float64, so that no rounding flips a greedy choice.
MODELS = {name: build_model(config, seed=2).double().eval() for name, config in CONFIGS.items()}
VARIANTS = st.sampled_from(sorted(MODELS))


def prompts(lengths, seed):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 30, n) for n in lengths]


def fitting(longest, share):
    """num_latents in the range that a prompt of this length has, at this share of it."""
    low, high = max(1, longest - (CONFIG.max_seq_len - CONFIG.max_latents)), min(CONFIG.max_latents, longest)
    return low + round(share * (high - low))


LENGTHS = st.lists(st.integers(1, 20), min_size=1, max_size=4)
SHARE = st.floats(0, 1)


@settings(deadline=None, max_examples=30)
@given(VARIANTS, LENGTHS, SHARE, st.integers(0, 99))
def test_a_cache_of_static_shapes_gives_what_a_growing_one_gives(variant, lengths, share, seed):
    model = MODELS[variant]
    ids, pad_mask = pad_left(prompts(lengths, seed), torch.device("cpu"))
    prefix_len = max(lengths) - fitting(max(lengths), share)
    with torch.no_grad():
        caches = [model.make_cache(static=static) for static in (False, True)]
        logits = [model(ids, prefix_len, pad_mask, cache=cache, last_only=True) for cache in caches]
        for _ in range(CONFIG.max_seq_len + 2):  # until each ring has gone round
            torch.testing.assert_close(logits[0], logits[1], rtol=1e-9, atol=1e-9)
            token = logits[0][:, -1].argmax(-1, keepdim=True)
            logits = [model(token, cache=cache, last_only=True) for cache in caches]


def test_one_graph_serves_all_steps_of_a_compiled_generation(monkeypatch):
    model = build_model(CONFIG, seed=2).double().eval()
    ids, pad_mask = pad_left(prompts([9, 12], 0), torch.device("cpu"))
    options = {"max_new_tokens": 40, "num_latents": 3, "pad_mask": pad_mask, "sampling": Sampling(temperature=0)}
    plain = generate(model, ids, **options)
    graphs = []
    whole = torch.compile

    def count(function, **settings):
        def backend(graph, inputs):
            graphs.append(graph)
            return graph.forward

        return whole(function, backend=backend, **settings)

    monkeypatch.setattr(torch, "compile", count)
    for _ in range(2):
        assert generate(model, ids, **options, compile=True).tolist() == plain.tolist()
    assert len(graphs) == 1


@settings(deadline=None, max_examples=30)
@given(VARIANTS, LENGTHS, SHARE, st.integers(0, 99))
def test_cached_equals_uncached_until_the_latents_are_full(variant, lengths, share, seed):
    ids, pad_mask = pad_left(prompts(lengths, seed), torch.device("cpu"))
    num_latents = fitting(max(lengths), share)
    # The step that finds all latents in use still sees the same; the one after it does not.
    steps = CONFIG.max_latents - num_latents + 1
    cached, plain = (
        generate(
            MODELS[variant],
            ids,
            max_new_tokens=steps,
            num_latents=num_latents,
            pad_mask=pad_mask,
            use_cache=c,
            sampling=Sampling(temperature=0),
        )
        for c in (True, False)
    )
    assert cached.tolist() == plain.tolist()


@settings(deadline=None, max_examples=30)
@given(VARIANTS, LENGTHS, SHARE, st.booleans(), st.integers(0, 99))
def test_a_row_of_a_batch_is_what_it_is_alone(variant, lengths, share, use_cache, seed):
    """Also where padding reaches into the latents, and long after the window has begun to slide."""
    rows = prompts(lengths, seed)
    ids, pad_mask = pad_left(rows, torch.device("cpu"))
    num_latents = fitting(max(lengths), share)
    options = {"max_new_tokens": 30, "sampling": Sampling(temperature=0), "use_cache": use_cache}
    batch = generate(MODELS[variant], ids, num_latents=num_latents, pad_mask=pad_mask, **options)
    for row, expected in zip(rows, batch.tolist(), strict=True):
        alone = generate(MODELS[variant], torch.tensor(row)[None], num_latents=min(num_latents, len(row)), **options)
        assert alone[0].tolist() == expected


@settings(deadline=None, max_examples=20)
@given(VARIANTS, LENGTHS, SHARE, st.integers(0, 99))
def test_latents_and_window_never_grow_beyond_the_model(variant, lengths, share, seed):
    ids, pad_mask = pad_left(prompts(lengths, seed), torch.device("cpu"))
    for use_cache in (True, False):
        new = generate(
            MODELS[variant],
            ids,
            max_new_tokens=50,
            num_latents=fitting(max(lengths), share),
            pad_mask=pad_mask,
            use_cache=use_cache,
            sampling=Sampling(seed=seed, temperature=1.5, top_k=10, top_p=0.9),
        )
        assert new.shape == (len(lengths), 50) and bool(((new >= 0) & (new < 30)).all())


def test_a_stream_is_the_whole_in_pieces():
    model, ids = MODELS["rotary only"], torch.tensor([[1, 2, 3], [4, 5, 6]])
    options = {"max_new_tokens": 12, "num_latents": 2}
    whole = generate(model, ids, **options, sampling=Sampling(temperature=0.8, seed=5))
    assert torch.equal(torch.cat(list(stream(model, ids, sampling=Sampling(temperature=0.8, seed=5), **options)), 1), whole)


@settings(deadline=None, max_examples=15)
@given(VARIANTS, LENGTHS, SHARE, st.integers(0, 2**63 - 1), st.floats(0.1, 3))
def test_what_is_drawn_for_a_row_depends_on_the_seed_and_its_id_alone(variant, lengths, share, seed, temperature):
    """Not on the other rows, nor on the cache as long as that changes nothing."""
    rows = prompts(lengths, seed % 1000)
    ids, pad_mask = pad_left(rows, torch.device("cpu"))
    num_latents = fitting(max(lengths), share)
    steps = CONFIG.max_latents - num_latents + 1
    names = [f"file:{i}" for i in range(len(rows))]
    options = {"max_new_tokens": steps, "sampling": Sampling(temperature=temperature, top_p=0.95, seed=seed)}
    batch = generate(MODELS[variant], ids, num_latents=num_latents, pad_mask=pad_mask, row_ids=names, **options).tolist()
    for row, name, expected in zip(rows, names, batch, strict=True):
        for use_cache in (True, False):
            options |= {"num_latents": min(num_latents, len(row)), "use_cache": use_cache}
            assert generate(MODELS[variant], torch.tensor(row)[None], row_ids=[name], **options)[0].tolist() == expected


@pytest.mark.parametrize("narrow", [{}, {"top_k": 5}, {"top_p": 0.7}, {"temperature": 3.0}])
def test_tokens_are_drawn_with_the_probabilities_of_the_model(narrow):
    model, prompt, count = MODELS["rotary only"], torch.tensor([[1, 2, 3]]), 8000
    narrow = {"temperature": 6.0} | narrow
    logits = model(prompt, 0)[0, -1].detach() / narrow["temperature"]
    expected = logits.softmax(-1)
    if "top_k" in narrow:
        expected = expected.where(expected >= expected.topk(5).values[-1], 0.0)
    if "top_p" in narrow:
        ordered = expected.sort(descending=True).values
        least = ordered[int((ordered.cumsum(-1) < 0.7).sum())]
        expected = expected.where(expected >= least, 0.0)
    expected = expected / expected.sum()
    new = generate(model, prompt.expand(count, -1), max_new_tokens=1, num_latents=3, sampling=Sampling(seed=11, **narrow))
    found = torch.bincount(new[:, 0], minlength=30) / count
    assert bool((found[expected == 0] == 0).all()) and int((expected > 0).sum()) > 1
    assert bool(((found - expected).abs() <= 5 * (expected * (1 - expected) / count).sqrt()).all())


def test_steps_of_a_row_are_drawn_independently():
    """Beyond the steps whose numbers are made together, too."""
    drawn = [float(next(draws)[1]) for draws in [_draws(3, ["a", "b"], torch.device("cpu"))] for _ in range(1000)]
    assert len(set(drawn)) == 1000 and abs(np.mean(drawn) - 0.5) < 0.05
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 0.15
    other = [float(d[0]) for d, _ in zip(_draws(3, ["a", "b"], torch.device("cpu")), range(1000), strict=False)]
    assert abs(np.corrcoef(drawn, other)[0, 1]) < 0.15


def test_the_smallest_temperature_is_greedy_and_no_top_k_is_too_large():
    model, ids = MODELS["rotary only"], torch.tensor([[1, 2, 3], [4, 5, 6]])
    greedy = generate(model, ids, max_new_tokens=8, sampling=Sampling(temperature=0))
    for temperature in (1e-300, 5e-324, 1e-30):
        assert torch.equal(generate(model, ids, max_new_tokens=8, sampling=Sampling(temperature=temperature, seed=1)), greedy)
    whole = generate(model, ids, max_new_tokens=8, sampling=Sampling(seed=2**63 - 1))
    assert torch.equal(generate(model, ids, max_new_tokens=8, sampling=Sampling(seed=2**63 - 1, top_k=10**6)), whole)
    assert bool((generate(model, ids, max_new_tokens=8, sampling=Sampling(temperature=1e300, seed=1)) < 30).all())


def test_generation_leaves_the_model_as_it_was():
    model = MODELS["rotary only"]
    model.train()
    next(stream(model, torch.tensor([[1, 2]]), max_new_tokens=5)).tolist()
    tokens = stream(model, torch.tensor([[1, 2]]), max_new_tokens=5)
    next(tokens)
    tokens.close()
    assert model.training
    model.eval()


def test_a_row_that_ends_is_filled_up_and_does_not_change_the_others():
    model, ids = MODELS["learned and rotary"], torch.tensor([[1, 2, 3], [4, 5, 6], [9, 9, 9]])
    free = generate(model, ids, max_new_tokens=15, sampling=Sampling(temperature=0))
    eos = int(free[0, 3])
    ended = generate(model, ids, max_new_tokens=15, eos_id=eos, sampling=Sampling(temperature=0))
    for row, before in zip(ended.tolist(), free.tolist(), strict=True):
        end = before.index(eos) + 1 if eos in before else len(before)
        assert row == (before[:end] + [eos] * (15 - end))[: len(row)]
    single = generate(model, ids[:1], max_new_tokens=15, eos_id=eos, sampling=Sampling(temperature=0))
    assert single[0].tolist() == free[0, : free[0].tolist().index(eos) + 1].tolist()


# ---------------------------------------------------------------------------------------------------------- beam search


@torch.no_grad()
def log_probability(model, prompt, new, num_latents):
    """Of a continuation, token by token without cache."""
    total, ids, prefix = 0.0, prompt, prompt.shape[1] - num_latents
    for token in new:
        total += float(model(ids, prefix)[0, -1].log_softmax(-1)[token])
        ids = torch.cat([ids, torch.tensor([[token]])], 1)
    return total


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("variant", sorted(MODELS))
def test_one_beam_is_greedy_and_more_beams_are_no_worse(variant, use_cache):
    model = MODELS[variant]
    ids, pad_mask = pad_left(prompts([3, 6, 6], 1), torch.device("cpu"))
    options = {"max_new_tokens": 10, "num_latents": 3, "pad_mask": pad_mask, "use_cache": use_cache}
    greedy = generate(model, ids, **options, sampling=Sampling(temperature=0))
    one, score = beam_search(model, ids, num_beams=1, **options)
    assert torch.equal(one, greedy)
    _, better = beam_search(model, ids, num_beams=6, **options)
    assert bool((better >= score - 1e-9).all())


@pytest.mark.parametrize("use_cache", [True, False])
def test_enough_beams_find_the_best_of_all_continuations(use_cache):
    model, prompt = MODELS["learned and rotary"], torch.tensor([[1, 2, 3, 4]])
    ids, score = beam_search(model, prompt, max_new_tokens=2, num_beams=30, num_latents=2, use_cache=use_cache)
    all_scores = {(a, b): log_probability(model, prompt, (a, b), 2) for a in range(30) for b in range(30)}
    best = max(all_scores, key=all_scores.__getitem__)
    assert tuple(ids[0].tolist()) == best
    assert float(score[0]) == pytest.approx(all_scores[best])


def test_beams_of_a_batch_are_those_of_each_prompt_alone():
    model, rows = MODELS["learned and rotary"], prompts([2, 5, 9], 3)
    ids, pad_mask = pad_left(rows, torch.device("cpu"))
    options = {"max_new_tokens": 12, "num_beams": 4, "eos_id": 7}
    together, scores = beam_search(model, ids, num_latents=2, pad_mask=pad_mask, **options)
    for i, row in enumerate(rows):
        alone, score = beam_search(model, torch.tensor(row)[None], num_latents=2, **options)
        assert together[i].tolist()[: alone.shape[1]] == alone[0].tolist()
        assert float(scores[i]) == pytest.approx(float(score[0]))


def test_a_long_finished_beam_costs_nothing_more():
    """The score of a continuation that ended is that of its tokens up to the end."""
    model, prompt = MODELS["rotary only"], torch.tensor([[1, 2, 3]])
    eos = int(generate(model, prompt, max_new_tokens=3, sampling=Sampling(temperature=0))[0, 1])
    ids, score = beam_search(model, prompt, max_new_tokens=5, num_beams=3, num_latents=1, eos_id=eos)
    new = ids[0].tolist()
    new = new[: new.index(eos) + 1] if eos in new else new
    assert float(score[0]) == pytest.approx(log_probability(model, prompt, new, 1))


# ----------------------------------------------------------------------------------------------------------------- text


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return perceiver.load(write_run(tmp_path_factory.mktemp("runs") / "causal", "causal"), device="cpu")


def test_text_prompts_of_any_length_are_batched_and_streamed_alike(model):
    texts = ["a", "some bytes ü", "", "exactly sixteen!"]
    alone = [model.generate(text, max_new_tokens=30, temperature=0) for text in texts]
    assert model.generate(texts, max_new_tokens=30, temperature=0) == alone
    assert model.generate(texts, max_new_tokens=30, temperature=0, batch_size=3) == alone
    assert ["".join(model.stream(text, max_new_tokens=30, temperature=0)) for text in texts] == alone


@pytest.mark.parametrize("batch_size", [1, 3, 8, 16])
def test_samples_of_one_prompt_are_many_and_do_not_depend_on_the_batch_size(model, batch_size):
    options = {"max_new_tokens": 12, "seed": 4}
    samples = model.generate(["abc"] * 16, batch_size=batch_size, **options)
    assert len(set(samples)) == 16
    assert samples == model.generate(["abc"] * 16, **options)
    assert samples[0] == model.generate("abc", **options) == "".join(model.stream("abc", **options))
    assert samples[5] == "".join(model.stream("abc", row_id=5, **options))
    assert samples[3:5] == model.generate(["abc", "abc"], row_ids=[3, 4], **options)


def test_without_a_seed_the_batch_size_changes_nothing_either(model):
    torch.manual_seed(0)
    samples = model.generate(["abc"] * 6, max_new_tokens=12)
    torch.manual_seed(0)
    assert model.generate(["abc"] * 6, max_new_tokens=12, batch_size=2) == samples
    assert model.generate(["abc"] * 6, max_new_tokens=12) != samples


def test_what_is_refused_of_a_prompt_does_not_depend_on_the_others(model):
    for batch_size in (1, 2):
        with pytest.raises(UserError, match="num_latents is 5 and must be 1 to 3"):
            model.generate(["four and more", "abc"], num_latents=5, batch_size=batch_size)


def test_text_generation_refuses_what_does_not_fit(model):
    for arguments, message in [
        ({"prompt": "seventeen letters"}, "17 tokens and must have 1 to 16"),
        ({"prompt": "four", "num_latents": 9}, "1 to 4"),
        ({"prompt": "x", "temperature": -1}, "temperature is -1"),
        ({"prompt": "x", "temperature": float("nan")}, "temperature is nan"),
        ({"prompt": "x", "temperature": float("inf")}, "temperature is inf"),
        ({"prompt": "x", "top_p": float("nan")}, "top_p is nan"),
        ({"prompt": "x", "seed": 2**64}, "seed is 18446744073709551616"),
        ({"prompt": "x", "seed": -1}, "seed is -1"),
        ({"prompt": "x", "seed": 1.5}, "seed is 1.5"),
        ({"prompt": "x", "max_new_tokens": 1.5}, "max_new_tokens is 1.5"),
        ({"prompt": ["x", "y"], "row_ids": [1]}, "1 ids for 2 prompts"),
        ({"prompt": "x", "top_k": 0}, "top_k is 0"),
        ({"prompt": "x", "top_p": 1.5}, "top_p is 1.5"),
        ({"prompt": "x", "stop": "ab"}, "list of strings"),
        ({"prompt": "x", "num_beams": 0}, "num_beams is 0"),
        ({"prompt": 7}, "must be text"),
        ({"prompt": "\ud800"}, "surrogate"),
        ({"prompt": "x", "max_new_tokens": -1}, "must not be negative"),
    ]:
        with pytest.raises(UserError, match=message):
            model.generate(**arguments)


def test_a_stop_string_ends_the_text_before_it(model):
    free = model.generate("abc", max_new_tokens=60, seed=1, temperature=3.0)
    stop = free[20:22]
    cut = model.generate("abc", max_new_tokens=60, seed=1, temperature=3.0, stop=["never there", stop])
    assert cut == free[: free.index(stop)]
    assert "".join(model.stream("abc", max_new_tokens=60, seed=1, temperature=3.0, stop=[stop])) == cut


@settings(deadline=None, max_examples=60)
@given(st.text(max_size=30), st.lists(st.text(min_size=1, max_size=4), max_size=3), st.text(max_size=8))
def test_pieces_of_a_continuation_are_certain_and_complete(text, stop, prompt):
    """Whatever was given out stays; together it is the text up to the first stop string."""
    tokenizer = load_tokenizer("bytes")
    row = Continuation(tokenizer, tokenizer.encode(prompt), stop, eos_id=2)
    pieces = [row.push(int(token)) for token in tokenizer.encode(text)] + [row.close()]
    places = [place for s in stop if (place := text.find(s)) >= 0]
    assert "".join(pieces) == row.text == text[: min(places, default=len(text))]


def test_bytes_that_are_no_text_come_out_as_replacement_characters():
    tokenizer = load_tokenizer("bytes")
    row = Continuation(tokenizer, tokenizer.encode("a"), (), eos_id=2)
    bad = [0xFF + 6, 0xC3 + 6, ord("x") + 6, 0xE2 + 6]
    text = "".join(row.push(token) for token in bad) + row.push(2)
    assert text == tokenizer.decode(np.array(bad)) and row.finished


def test_sentencepiece_continuations_keep_the_space_before_words(shared):
    (path,) = sorted((shared / "data" / "sentencepiece").glob("*.model"))[:1]
    tokenizer = load_tokenizer(str(path))
    ids = tokenizer.encode("The meaning of life is unknown to all")
    row = Continuation(tokenizer, ids[:3], (), eos_id=None)
    text = "".join(row.push(int(token)) for token in ids[3:]) + row.close()
    assert tokenizer.decode(ids[:3]) + text == "The meaning of life is unknown to all"

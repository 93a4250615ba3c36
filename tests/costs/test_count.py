"""Costs that are counted on the meta device: against hand arithmetic for a model from outside, against the formulas for all presets."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perceiver.config import UserError
from perceiver.costs.activations import Layout, StepSizes
from perceiver.costs.count import CountedStep, count_step
from perceiver.costs.flops import num_kept, training_flops
from perceiver.costs.memory import FormulaStep, has_formulas, most_of_each, step_memory
from perceiver.costs.traffic import step_traffic
from perceiver.models import ImageInput, PerceiverARConfig, TextInput, TextOutput, build_model
from perceiver.presets import PRESETS
from perceiver.tasks import build_task

# ------------------------------------------------------------------------------------------------- a model from outside

VOCAB, WIDTH, HEADS, LENGTH, DEPTH = 50, 16, 2, 12, 3


class Layer(nn.Module):
    """A layer of a plain Transformer without biases."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp_norm = nn.LayerNorm(WIDTH, bias=False), nn.LayerNorm(WIDTH, bias=False)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.widen = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.narrow = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.narrow(F.relu(self.widen(self.mlp_norm(x))))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(Layer() for _ in range(DEPTH))
        self.output = nn.Linear(WIDTH, VOCAB, bias=False)

    def layers(self) -> list[nn.Module]:
        return list(self.blocks)

    def init_weights(self, seed: int) -> None:
        torch.manual_seed(seed)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.02)

    def reset_buffers(self) -> None:
        pass

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.output(x)


def next_token(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    logits = model(batch["ids"])
    return F.cross_entropy(logits.flatten(0, 1).float(), batch["labels"].flatten(), reduction="sum"), {}


def transformer_step() -> CountedStep:
    with torch.device("meta"):
        return CountedStep(Transformer(), next_token, {name: torch.zeros(2, LENGTH, dtype=torch.long) for name in ("ids", "labels")})


def test_flops_of_a_model_from_outside_are_those_worked_out_by_hand():
    weights = 3 * WIDTH * WIDTH + WIDTH * WIDTH + 2 * 4 * WIDTH * WIDTH
    layer = 2 * LENGTH * weights + 2 * 2 * LENGTH * LENGTH * WIDTH
    assert transformer_step().flops_per_example() == 3 * (DEPTH * layer + 2 * LENGTH * WIDTH * VOCAB)


@pytest.mark.parametrize(("precision", "size"), [("fp32", 4), ("bf16", 2)])
def test_activations_of_a_model_from_outside_are_those_worked_out_by_hand(precision, size):
    calls, loss = transformer_step().walk(Layout(micro_batch_size=5, precision=precision))
    position = 5 * LENGTH
    statistics = 2 * position * 2 * 4  # mean and deviation of both norms, in fp32
    # Norms (2), queries, keys, values, attention's output, their sum, and one hidden tensor (relu's input is not kept).
    saved = position * size * WIDTH * (2 + 3 + 1 + 1 + 4) + position * HEADS * 4
    assert [call.unit for call in calls] == [0, 1, 2] and all(call.trained for call in calls)
    assert {call.held for call in calls} == {position * size * WIDTH}
    for call in calls:
        assert call.saved == pytest.approx(saved + statistics, abs=statistics / 2 if precision == "bf16" else 0)
    logits = position * VOCAB
    assert loss.peak >= logits * 2 * 4  # of the logits in fp32 at least their logarithms and gradients


def test_memory_of_a_model_from_outside_is_walked_like_any_other():
    step, layout = transformer_step(), Layout(micro_batch_size=4, shards=2)
    layer, root = WIDTH * WIDTH * 12 + 2 * WIDTH, 2 * VOCAB * WIDTH
    assert [unit.size for unit in step.units(1)] == [layer] * DEPTH + [root]
    most = most_of_each(step, layout)
    assert most.parameters == most.gradients == most.optimizer / 2 == 4 * (DEPTH * layer + root) / 2
    recomputed = most_of_each(step, replace(layout, checkpoint_every=1))
    calls, _ = step.walk(layout)
    # One layer at a time keeps what it needs; of the others their inputs stay.
    assert most.activations - recomputed.activations == pytest.approx((DEPTH - 1) * calls[0].saved, rel=0.01)
    assert step_traffic(step, layout).gathered == 4 * (2 * DEPTH * layer + root) / 2


def test_the_model_that_is_counted_stays_as_it_is():
    with torch.device("meta"):
        model = Transformer().eval()
        batch = {name: torch.zeros(2, LENGTH, dtype=torch.long) for name in ("ids", "labels")}
    count_step(model, next_token, batch, precision="bf16")
    assert not model.training
    assert all(p.dtype == torch.float32 and p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_what_is_kept_is_what_autograd_saves():
    """Counted by the life of storages; here once more by the hooks of saved tensors, a second way to the same number."""
    with torch.device("meta"):
        model, batch = Transformer(), {name: torch.zeros(2, LENGTH, dtype=torch.long) for name in ("ids", "labels")}
    own, saved = {p.untyped_storage() for p in model.parameters()} | {t.untyped_storage() for t in batch.values()}, {}

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict]:
        def pack(tensor: Tensor) -> Tensor:
            saved[tensor.untyped_storage()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            hidden = model.embedding(batch["ids"])
            for block in model.blocks:
                hidden = block(hidden)
        parameters = {p.untyped_storage() for p in model.parameters()}
        loss.kept = sum(size for storage, size in saved.items() if storage not in own | parameters)
        return hidden.sum(), {}

    count = count_step(model, loss, batch)
    assert sum(call.held + call.saved for call in count.calls) == loss.kept


def test_attention_of_pytorchs_own_modules_is_counted_as_a_kernel():
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, dropout=0.1, batch_first=True)

        def layers(self) -> list[nn.Module]:
            return [self.layer]

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    with torch.device("meta"):
        step = CountedStep(Whole(), lambda model, batch: (model(batch["x"]).sum(), {}), {"x": torch.zeros(2, 1000, WIDTH)})
    ((call,), _), position = step.walk(Layout(micro_batch_size=3)), 3 * 1000
    assert call.saved < position * 4 * WIDTH * 20  # weights of attention alone would take a thousand numbers a position and head
    assert step.flops_per_example() == pytest.approx(3 * (2 * 1000 * 12 * WIDTH**2 + 4 * 1000**2 * WIDTH), rel=0.02)


def test_a_step_that_depends_on_values_is_refused_in_one_sentence():
    with torch.device("meta"):
        step = CountedStep(
            Transformer(), lambda model, batch: (model(batch["ids"])[batch["ids"] > 0].sum(), {}), {"ids": torch.zeros(2, 3).long()}
        )
    with pytest.raises(UserError, match="costs of Transformer cannot be counted, as its step needs more of tensors than their shapes"):
        step.flops_per_example()


# ---------------------------------------------------------------------------------------------------------- all presets


def preset_step(name: str, factored: bool = True) -> tuple[CountedStep, dict[str, int]]:
    """The step of a preset's model on its largest examples, with the arguments of its formulas."""
    config = PRESETS[name]().model
    with torch.device("meta"):
        model = build_model(config)
        if isinstance(config, PerceiverARConfig):
            prefix = config.max_seq_len - config.max_latents
            batch = {"x": torch.zeros(2, config.max_seq_len, dtype=torch.long)}
            if config.cross_attention_dropout:
                batch["prefix_keep"] = torch.zeros(2, num_kept(prefix, config.cross_attention_dropout), dtype=torch.long)
            return CountedStep(model, lambda model, batch: (model(prefix_len=prefix, **batch).sum(), {}), batch), {}
        model.encoder.factored = model.encoder.factored and factored
        arguments = {}
        if isinstance(config.input, TextInput):
            batch = {"x": torch.zeros(2, config.input.max_seq_len, dtype=torch.long)}
            if isinstance(config.output, TextOutput):
                arguments = {"num_queries": config.input.max_seq_len // 4}
                batch["positions"] = torch.zeros(2, arguments["num_queries"], dtype=torch.long)
        elif isinstance(config.input, ImageInput):
            batch = {"x": torch.zeros(2, *config.input.image_shape)}
        else:
            batch = {"x": torch.zeros(2, 2, config.input.num_patch_input_channels, *config.input.image_shape)}
        return CountedStep(model, lambda model, batch: (model(**batch).sum(), {}), batch), arguments


OF_THE_DATA = ("tables", "table-heads", "img-clf", "txt-clf", "img-tags", "txt-tags")
"""Presets whose sizes are those of a user's data."""
FORMULAS = [name for name in PRESETS if name not in OF_THE_DATA and has_formulas(PRESETS[name]().model)]


@pytest.mark.parametrize("name", FORMULAS)
def test_costs_of_every_preset_agree_with_its_formulas(name):
    """FLOPs within 2%, kept activations within 4% (of small images 0.25 MiB).

    The formulas leave out that learned queries and latents are projected once for the whole batch, and that the gradient of an
    input that is not learned (frames of optical flow) is not computed. Factored attention to images computes less than the plain
    one, whose FLOPs are reported: it is switched off for them. Of activations the formulas leave out statistics of norms,
    tables of rotation, masks, and the few numbers per pixel that factored attention makes, which only small images show.
    """
    config = PRESETS[name]().model
    step, arguments = preset_step(name, factored=False)
    flops = step.flops_per_example() / training_flops(config, **arguments)
    image = isinstance(getattr(config, "input", None), ImageInput)
    if image:
        step, _ = preset_step(name)
    layout = Layout(micro_batch_size=2)
    kept = [
        sum(call.held + call.saved for call in some.walk(layout)[0] if call.trained)
        for some in (step, FormulaStep(config, StepSizes(**arguments)))
    ]
    print(f"FLOPs {flops - 1:+.3%}, activations {kept[0] / kept[1] - 1:+.2%} of {kept[1] / 2**20:.1f} MiB")
    assert flops == pytest.approx(1, abs=0.02)
    assert kept[0] == pytest.approx(kept[1], rel=0.04, abs=2**18 if image else 0)


def test_a_loss_in_chunks_is_counted_whole():
    experiment = PRESETS["clm-c4-small"]()
    task, config = build_task(experiment), experiment.model
    with torch.device("meta"):
        batch = {
            "ids": torch.zeros(2, config.max_seq_len, dtype=torch.long),
            "labels": torch.zeros(2, config.max_latents, dtype=torch.long),
        }
        step = CountedStep(task.build_model(), task.loss, batch)
    in_chunks = step.count(Layout(micro_batch_size=17))  # 2,176 positions, of which 2,097 have their logits at once
    assert in_chunks.flops / 17 == pytest.approx(training_flops(config), rel=1e-9)
    # All logits at once, in fp32 with their gradient, would take twice as much as a chunk.
    assert in_chunks.loss.peak == pytest.approx(4 * (2**26 + 2 * config.vocab_size * config.num_channels), rel=0.2)
    memory = [step_memory(some, Layout(micro_batch_size=17)).total for some in (step, FormulaStep(config, task.step_sizes()))]
    assert memory[0] == pytest.approx(memory[1], rel=0.05)

"""The loss by chunks of positions, and training windows whose length is drawn for each step."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from perceiver.config import ParallelConfig, UserError
from perceiver.costs.flops import training_flops
from perceiver.tasks import build_task
from perceiver.tasks.base import IGNORE_INDEX
from perceiver.tasks.chunked_loss import chunk_loss, chunk_rows, chunked_cross_entropy
from perceiver.training.batches import read_here
from tests.support import small
from tests.support.small import text_experiment, write_stream

CHANNELS, CLASSES = 24, 50


def inputs(dtype=torch.float32, bias=True, valid=True, seed=0):
    """Hidden states (3, 7, C), matrix, bias and labels, every third label without a target."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(3, 7, CHANNELS, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(CLASSES, CHANNELS, generator=generator).to(dtype).requires_grad_()
    added = torch.randn(CLASSES, generator=generator).to(dtype).requires_grad_() if bias else None
    labels = torch.randint(0, CLASSES, (3, 7), generator=generator)
    labels[torch.arange(21).view(3, 7) % 3 == 0 if valid else torch.ones(3, 7, dtype=torch.bool)] = IGNORE_INDEX
    return hidden, weight, added, labels


def plain(hidden, weight, bias, labels):
    logits = F.linear(hidden, weight, bias).float()
    each = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORE_INDEX)
    return each.sum(), each.detach().view(labels.shape)


def with_gradients(loss, hidden, weight, bias, labels, **settings):
    """The loss, what each label adds to it, and gradients when it is scaled before the backward pass, as in the training loop."""
    value, each = loss(hidden, weight, bias, labels, **settings)
    (value * 0.37).backward()
    return [value.detach(), each, *(t.grad.float() for t in (hidden, weight, bias) if t is not None)]


@pytest.mark.parametrize("elements", [1, CLASSES * 4, CLASSES * 21, 2**26])
@pytest.mark.parametrize("bias", [True, False])
def test_chunked_equals_whole_in_value_and_gradients(elements, bias):
    expected = with_gradients(plain, *inputs(bias=bias))
    found = with_gradients(chunked_cross_entropy, *inputs(bias=bias), chunk_elements=elements)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_gpus_compute_of_a_chunk_is_the_loss_and_its_gradient(dtype):
    """On the CPU, and not compiled."""
    hidden, weight, _, labels = inputs(dtype)
    scores = F.linear(hidden, weight).flatten(0, 1).detach().requires_grad_()
    target = labels.flatten()
    expected = F.cross_entropy(scores.float(), target, reduction="none", ignore_index=IGNORE_INDEX)
    (gradient,) = torch.autograd.grad(expected.sum(), scores)
    each, found = chunk_loss(scores.detach(), target.clamp(min=0)[:, None], target != IGNORE_INDEX)
    torch.testing.assert_close(each, expected)
    assert found.dtype == dtype
    torch.testing.assert_close(found, gradient)


def test_chunked_in_bfloat16_is_as_near_to_fp32_as_the_whole():
    fp32 = [t.detach().float().requires_grad_() for t in inputs(torch.bfloat16)[:3]]
    exact = with_gradients(plain, *fp32, inputs()[3])
    whole = with_gradients(plain, *inputs(torch.bfloat16))
    found = with_gradients(chunked_cross_entropy, *inputs(torch.bfloat16), chunk_elements=CLASSES * 4)
    for a, b, c in zip(found, whole, exact, strict=True):
        assert (a - c).norm() <= 1.2 * (b - c).norm() + 1e-3 * c.norm()


def test_no_valid_label_is_loss_and_gradient_zero():
    for value in with_gradients(chunked_cross_entropy, *inputs(valid=False), chunk_elements=CLASSES * 4):
        assert not value.any()


def test_only_wanted_gradients_are_computed():
    hidden, weight, bias, labels = inputs()
    weight, bias = weight.detach(), bias.detach()
    chunked_cross_entropy(hidden, weight, bias, labels)[0].backward()
    assert hidden.grad is not None and weight.grad is None
    with torch.no_grad():
        assert not chunked_cross_entropy(hidden, weight, bias, labels)[0].requires_grad


class LargestTensor(TorchDispatchMode):
    """Notes the largest tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(t.numel() for t in tree_leaves(result) if isinstance(t, torch.Tensor))])
        return result


def test_all_logits_are_never_in_memory_at_once():
    rows, classes = 4096, 1000
    hidden = torch.randn(rows, 4, requires_grad=True)
    weight = torch.randn(classes, 4, requires_grad=True)
    labels = torch.randint(0, classes, (rows,))
    with LargestTensor() as whole:
        plain(hidden[None], weight, None, labels[None])[0].backward()
    with LargestTensor() as chunked:
        chunked_cross_entropy(hidden, weight, None, labels, chunk_elements=100_000)[0].backward()
    assert whole.elements == rows * classes
    assert chunked.elements == chunk_rows(classes, 100_000) * classes == 100_000


# ----------------------------------------------------------------------------------------------------- windows of any length


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stream")
    ids = np.random.default_rng(0).integers(6, 262, 1001).astype(np.uint16)
    return folder, write_stream(folder, ids, ids[:301]), ids


def random_lengths(shortest=10, dropout=0.0, **training):
    experiment = text_experiment(**training)
    return replace(
        experiment,
        task=replace(experiment.task, min_seq_len=shortest, random_shift=False),
        model=replace(experiment.model, cross_attention_dropout=dropout),
    )


def loader_of(experiment, stream, split="train"):
    folder, manifest, _ = stream
    return small.loader_of(experiment, build_task(experiment), str(folder), manifest.splits[split], train=split == "train")


def steps(experiment, stream, rank=0, world=1, start=0, stop=40):
    return list(loader_of(experiment, stream).steps(read_here, rank, world, start, stop))


def test_all_batches_of_a_step_have_one_length_whatever_the_workers_and_the_start(stream):
    experiment = random_lengths(dropout=0.3)
    halved = replace(experiment, parallel=ParallelConfig(micro_batch_size=2))
    whole = steps(experiment, stream)
    lengths = [batch["ids"].shape[1] for (batch,) in whole]
    assert set(lengths) == set(range(10, 17))
    for rank in range(2):
        for start in (0, 17):
            parts = steps(halved, stream, rank, 2, start)
            assert [{batch["ids"].shape[1] for batch in step} for step in parts] == [{n} for n in lengths[start:]]
            for step, (batch,) in zip(parts, whole[start:], strict=True):
                ids = torch.cat([part["ids"] for part in step])[:3]
                assert torch.equal(ids, batch["ids"][3 * rank : 3 * rank + 3])


def test_a_cut_window_is_the_beginning_of_the_row_and_its_labels_are_the_next_ids(stream):
    experiment = random_lengths()
    order = loader_of(experiment, stream).order
    for step, (batch,) in enumerate(steps(experiment, stream)):
        length = batch["ids"].shape[1]
        for row, ids, labels in zip(order.batch_rows(step), batch["ids"], batch["labels"], strict=False):
            window = stream[2][row * 16 : row * 16 + length + 1]
            if len(window) == length + 1:
                assert ids.tolist() == window[:-1].tolist() and labels.tolist() == window[-8:].tolist()


def test_prefix_dropout_keeps_positions_of_the_cut_prefix(stream):
    for (batch,) in steps(random_lengths(dropout=0.5), stream):
        prefix = batch["ids"].shape[1] - 8
        assert batch["prefix_keep"].shape[1] == prefix - prefix // 2 and batch["prefix_keep"].max() < prefix


def test_validation_windows_are_not_cut(stream):
    loader = loader_of(random_lengths(), stream, "val")
    assert {batch["ids"].shape[1] for step in loader.steps(read_here, 0, 1, 0, 3) for batch in step} == {16}


def test_throughput_and_flops_count_the_mean_length():
    experiment = random_lengths()
    task = build_task(experiment)
    flops = [training_flops(experiment.model, seq_len=n) for n in range(10, 17)]
    assert task.throughput_unit() == ("tokens", 13)
    assert task.flops_per_example() == pytest.approx(sum(flops) / len(flops))


@pytest.mark.parametrize("shortest", [7, 17])
def test_lengths_that_the_model_cannot_take_are_refused(shortest):
    with pytest.raises(UserError, match=f"task.min-seq-len is {shortest} and must be from model.max-latents .8. to"):
        build_task(random_lengths(shortest)).check()

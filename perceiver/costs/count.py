"""What a step of any model costs, counted while it runs on the meta device, where tensors have shapes and no memory.

A model needs no formula of its own for this: what `flops.py` and `activations.py` work out of a configuration is seen here as the step
runs, whatever it computes. FLOPs are counted in the same way (matrix products; what a backward pass computes anew is not counted),
and memory as runs of layers that `memory.py` walks through. tests/costs/test_count.py holds both against the formulas.

On GPUs attention and dropout run as one kernel each. Meta tensors would be given the plain computation, which keeps the weights of
attention; such calls are replaced by ones that keep what the kernels keep.

A model that asks whether its tensors are on a CPU is counted as it runs elsewhere. What cannot be counted is a step that depends on the
values of its tensors (`.item()`, a boolean mask as an index).
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from perceiver.config import UserError
from perceiver.costs.activations import Call, Layout, Loss
from perceiver.costs.kernels import Kernels, without_masks
from perceiver.costs.memory import Unit, units_of

Batch = dict[str, Tensor]
LossFunction = Callable[[nn.Module, Batch], tuple[Tensor, Any]]
"""As `Task.loss`: of model and batch, the loss to be differentiated, and something that is not looked at."""


@dataclass(frozen=True, kw_only=True)
class StepCount:
    """A step's forward and backward pass, of one micro-batch on one device."""

    flops: float
    """Of all examples together."""
    calls: tuple[Call, ...]
    """Runs of layers, in the order of the forward pass."""
    loss: Loss


class CountedStep:
    """A training step whose costs are counted: see `Step` in `memory.py`.

    Args:
        model: on the meta device, with `layers()`. It stays as it is.
        loss: as `Task.loss`.
        batch: tensors of the right shapes on any device, with examples as their first dimension. Values are not looked at.
    """

    def __init__(self, model: nn.Module, loss: LossFunction, batch: Batch) -> None:
        self._model, self._loss, self._batch = model, loss, batch
        self._counts: dict[tuple[int, str, bool], StepCount] = {}

    def flops_per_example(self) -> float:
        """FLOPs of forward and backward pass, each example being as large as those of the batch."""
        size = len(next(iter(self._batch.values())))
        return self.count(Layout(micro_batch_size=size)).flops / size

    def walk(self, layout: Layout) -> tuple[list[Call], Loss]:
        """The runs of layers and the end of the forward pass."""
        count = self.count(layout)
        return list(count.calls), count.loss

    def units(self, shards: int) -> tuple[Unit, ...]:
        """The units of sharding."""
        return units_of(self._model, shards)

    def count(self, layout: Layout) -> StepCount:
        """The count of a micro-batch of `layout.micro_batch_size` examples, in its precision. Counted once, then remembered."""
        key = (layout.micro_batch_size, layout.precision, layout.cuda)
        if key not in self._counts:
            batch = {name: t.new_empty((key[0], *t.shape[1:]), device="meta") for name, t in self._batch.items()}
            self._counts[key] = count_step(self._model, self._loss, batch, precision=layout.precision, cuda=layout.cuda)
        return self._counts[key]


def count_step(model: nn.Module, loss: LossFunction, batch: Batch, *, precision: str = "fp32", cuda: bool = True) -> StepCount:
    """Runs forward and backward pass of a step on the meta device and counts.

    Args:
        model: see `CountedStep`.
        batch: on the meta device.
        precision: "fp32", or "bf16" as FSDP computes in it: parameters and what goes into the model are cast.
        cuda: whether attention and dropout are fused kernels in all cases (GPUs), or attention in those that PyTorch has a CPU kernel for.

    Raises:
        UserError: the step depends on values of tensors.
    """
    model = copy.deepcopy(model).train()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    watch = _Watch(model, batch)
    try:
        with _following(model, dtype, watch), without_masks(cuda), Kernels(cuda, watch), watch:
            total, _ = loss(model, batch)
            watch.end_of_forward()
            total.backward()
    except (NotImplementedError, RuntimeError) as error:
        raise UserError(
            f"the costs of {type(model).__name__} cannot be counted, as its step needs more of tensors than their shapes: {error}"
        ) from error
    return watch.result(dtype.itemsize)


@contextmanager
def _following(model: nn.Module, dtype: torch.dtype, watch: _Watch) -> Iterator[None]:
    """Tells the watch of runs of layers; inputs are cast as FSDP casts them."""

    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    def before(_: nn.Module, args: Any, kwargs: Any) -> Any:
        return tree_map(cast, args), tree_map(cast, kwargs)

    handles = [model.register_forward_pre_hook(before, with_kwargs=True)]
    for number, layer in enumerate(model.layers()):
        handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(layer.register_forward_pre_hook(lambda *_, unit=number: watch.start(unit)))
        handles.append(layer.register_forward_hook(lambda _, args, out: watch.end(out)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class _Run:
    """A run of a layer as it is seen. Bytes."""

    unit: int
    trained: bool = False
    forward_peak: float = 0.0
    """In memory at most from the end of the run before to the end of this one, activations of earlier runs included."""
    backward_peak: float = 0.0
    """The same from the beginning of its backward pass to that of the run before; with gradients of its parameters."""
    made: list[Any] = field(default_factory=list)
    """Storages made inside (weak references, bytes)."""
    before: list[Any] = field(default_factory=list)
    """Storages that were made for it: outputs of the run before, and what was made between the runs."""


class _Watch(TorchDispatchMode):
    """Counts FLOPs, and the memory of all tensors that are made while it is active.

    A storage counts from the operation that makes it until nobody holds it any more; parameters and the batch do not count. Time is
    cut into segments: forward each run of a layer with what comes before it, then the loss, then backward each run with
    what comes before it.
    """

    def __init__(self, model: nn.Module, batch: Batch) -> None:
        super().__init__()
        from torch.utils.flop_counter import flop_registry  # here, as it loads Triton: 70 MiB in each process that imports a preset

        self._formulas = flop_registry
        self.flops = 0.0
        self.live = 0.0
        self.runs: list[_Run] = []
        self.peak = 0.0
        """Of the present segment."""
        self.loss_peak = 0.0
        self.waiting = 0.0
        """Bytes at the start of the backward pass of the last run that are neither activations nor its output's gradient."""
        self._known: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._making: list[Any] = []
        self._between: list[Any] = []
        self._kept: list[tuple[float, float]] = []
        self._backward: int | None = None
        for tensor in [*model.parameters(), *model.buffers(), *batch.values()]:
            self._known[tensor.untyped_storage()] = 0
        layers = [{id(p) for p in layer.parameters()} for layer in model.layers()]
        self._unit_of = {parameter: number for number, own in enumerate(layers) for parameter in model.parameters() if id(parameter) in own}
        self._parameters = list(model.parameters())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = self._formulas.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._note(tensor)
        return out

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        size = storage.nbytes()
        self._known[storage] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, size)
        self._making.append(weakref.ref(storage))

    def _free(self, size: int) -> None:
        self.live -= size

    def start(self, unit: int) -> None:
        """A layer begins to run."""
        self.runs.append(_Run(unit, before=self._between + self._making))
        self._making = []

    def end(self, out: Any) -> None:
        """It has run."""
        run = self.runs[-1]
        outputs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        results = {t.untyped_storage() for t in outputs}
        self._between = [ref for ref in self._making if ref() in results]
        run.made = [ref for ref in self._making if ref() not in results]
        self._making = []
        run.forward_peak, self.peak = self.peak, self.live
        for tensor in outputs:
            if tensor.requires_grad:
                run.trained = True
                tensor.register_hook(partial(self._start_backward, len(self.runs) - 1))

    def end_of_forward(self) -> None:
        """The loss is there: what is held now is held for the backward pass."""
        counted: set[Any] = set()
        for run in self.runs:
            self._kept.append((self._bytes(run.before, counted), self._bytes(run.made, counted)))

    def _bytes(self, refs: list[Any], counted: set[Any]) -> float:
        storages = {storage for ref in refs if (storage := ref()) is not None} - counted
        counted |= storages
        return float(sum(self._known[storage] for storage in storages))

    def _start_backward(self, number: int, grad: Tensor) -> None:
        if self._backward is not None and number >= self._backward:
            return  # another output of the same run
        if self._backward is None:
            self.loss_peak = self.peak
            self.waiting = max(0.0, self.live - sum(map(sum, self._kept)) - grad.untyped_storage().nbytes())
        else:
            self.runs[self._backward].backward_peak = self.peak
        self._backward = number
        self._drop_gradients()
        self.peak = self.live

    def _drop_gradients(self) -> None:
        """Gradients of layers are reduced and freed when their layer's backward pass is over."""
        for parameter in self._unit_of:
            parameter.grad = None

    def result(self, element_size: int) -> StepCount:
        """What was counted, after the backward pass."""
        if self._backward is None:
            self.loss_peak = self.peak
        else:
            self.runs[self._backward].backward_peak = self.peak
        gradients = [0.0] * (1 + max((run.unit for run in self.runs), default=0))
        for parameter, unit in self._unit_of.items():
            if parameter.requires_grad and unit < len(gradients):
                gradients[unit] += element_size * parameter.numel()
        root = element_size * sum(p.numel() for p in self._parameters if p.requires_grad and p not in self._unit_of)
        waiting = min(self.waiting, root)
        calls, below = [], 0.0
        for run, (held, saved) in zip(self.runs, self._kept, strict=True):
            below += held + saved
            extra = run.backward_peak - below - gradients[run.unit] - waiting
            calls.append(
                Call(
                    unit=run.unit, held=held, saved=saved, extra=max(0.0, extra), working=max(0.0, run.forward_peak - below),
                    trained=run.trained,
                )
            )  # fmt: skip
        # What the end of the forward pass holds is freed as the loss is differentiated: all of it counts as the loss's.
        return StepCount(
            flops=self.flops,
            calls=tuple(calls),
            loss=Loss(held=0.0, peak=max(0.0, self.loss_peak - below), shared_gradient=int(waiting / element_size)),
        )

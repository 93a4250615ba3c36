"""The model of one worker alone: whole, without the hooks of sharding, which cost more than a small model's step.

In bf16 it computes as FSDP2 has it done (`parallel.py`): parameters stay in fp32; forward and backward passes use copies in bf16, and what
goes into a layer is cast. A gradient returns to fp32 through the cast.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.utils._pytree import tree_leaves, tree_map


def compute_in(dtype: torch.dtype, model: nn.Module, layers: Iterable[nn.Module]) -> None:
    """Makes a model with parameters in fp32 compute in another type.

    Copies stand in the place of a layer's parameters while it runs, and in that of parameters outside of layers from the beginning of the
    forward pass to the end of the backward pass, so that a loss may use the output matrix.

    Args:
        layers: parts of the model that run as one, as `parallel.build_sharded` has them.
    """
    layers = list(layers)
    inside = {id(module) for layer in layers for module in layer.modules()}
    whole = _Pass()
    for layer in layers:
        _Copies(list(layer.modules()), dtype, whole).hang_on(layer)
    _Copies([module for module in model.modules() if id(module) not in inside], dtype, whole).hang_on(model, root=True)


class _Pass:
    """The forward pass of the whole model that copies belong to.

    How often a parameter was changed does not tell whether its copy is old: PyTorch's fused optimizers do not count.
    """

    def __init__(self) -> None:
        self.number = 0
        self.runs = False


class _Copies:
    """Copies of the parameters of some modules, made anew by each forward pass of the whole model when they are first needed."""

    def __init__(self, modules: list[nn.Module], dtype: torch.dtype, whole: _Pass) -> None:
        self._dtype, self._pass = dtype, whole
        self._places = [
            (module._parameters, name, parameter)
            for module in modules
            for name, parameter in module._parameters.items()
            if parameter is not None and parameter.is_floating_point()
        ]
        self._made: dict[nn.Parameter, Tensor] = {}
        self._made_in = 0, False
        self._waiting = False

    def hang_on(self, module: nn.Module, root: bool = False) -> None:
        """Puts copies in place when a module's forward pass begins.

        Args:
            root: the module is the whole model: until the backward pass has ended; else until the forward pass has.
        """
        disabled = torch.compiler.disable  # what is compiled begins after the hook
        if root:
            module.register_forward_pre_hook(disabled(self._begin))
        module.register_forward_pre_hook(disabled(self._before), with_kwargs=True)
        module.register_forward_hook(disabled(self._stay if root else self._leave), always_call=True)
        if root:
            module.register_state_dict_pre_hook(self._leave)

    def _begin(self, *_: Any) -> None:
        self._pass.number += 1
        self._pass.runs = True

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        self._renew()
        for place, name, parameter in self._places:
            place[name] = self._made[parameter]  # type: ignore[assignment]
        return tree_map(self._cast, args), tree_map(self._cast, kwargs)

    def _renew(self) -> None:
        of = self._pass.number, torch.is_grad_enabled()
        # A layer that runs in the backward pass computes its activations again. One that is called by itself belongs to no pass.
        repeated = self._pass.runs or torch._C._current_graph_task_id() != -1
        if of != self._made_in or not repeated:
            self._made.clear()  # first: the old ones are no longer needed
            self._made |= {parameter: parameter.to(self._dtype) for *_, parameter in self._places}
            self._made_in = of

    def _cast(self, value: Any) -> Any:
        return value.to(self._dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    def _stay(self, module: nn.Module, args: Any, out: Any) -> None:
        self._pass.runs = self._waiting = False
        needed = [tensor for tensor in tree_leaves(out) if isinstance(tensor, Tensor) and tensor.requires_grad]
        for tensor in needed:
            tensor.register_hook(self._leave_after_backward)
        if not needed:
            self._leave()

    def _leave_after_backward(self, gradient: Tensor) -> None:
        if not self._waiting:
            self._waiting = True
            Variable._execution_engine.queue_callback(self._leave)

    def _leave(self, *_: Any) -> None:
        for place, name, parameter in self._places:
            place[name] = parameter

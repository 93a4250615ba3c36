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
    for layer in layers:
        _Copies(list(layer.modules()), dtype).hang_on(layer, keep=False)
    _Copies([module for module in model.modules() if id(module) not in inside], dtype).hang_on(model, keep=True)


class _Copies:
    """Copies of the parameters of some modules, made when they are needed and the parameters have changed."""

    def __init__(self, modules: list[nn.Module], dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._places = [
            (module._parameters, name, parameter)
            for module in modules
            for name, parameter in module._parameters.items()
            if parameter is not None and parameter.is_floating_point()
        ]
        self._made: dict[nn.Parameter, tuple[tuple[int, bool], Tensor]] = {}
        self._waiting = False

    def hang_on(self, module: nn.Module, keep: bool) -> None:
        """Puts copies in place when a module's forward pass begins.

        Args:
            keep: until the backward pass has ended; else until the forward pass has.
        """
        disabled = torch.compiler.disable  # what is compiled begins after the hook
        module.register_forward_pre_hook(disabled(self._before), with_kwargs=True)
        module.register_forward_hook(disabled(self._stay if keep else self._leave), always_call=not keep)
        if keep:
            module.register_state_dict_pre_hook(self._leave)

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        state_of = torch.is_grad_enabled()
        for place, name, parameter in self._places:
            state = parameter._version, state_of
            known = self._made.get(parameter)
            if known is None or known[0] != state:
                self._made[parameter] = known = state, parameter.to(self._dtype)
            place[name] = known[1]  # type: ignore[assignment]
        return tree_map(self._cast, args), tree_map(self._cast, kwargs)

    def _cast(self, value: Any) -> Any:
        return value.to(self._dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    def _stay(self, module: nn.Module, args: Any, out: Any) -> None:
        self._waiting = False
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(self._leave_after_backward)

    def _leave_after_backward(self, gradient: Tensor) -> None:
        if not self._waiting:
            self._waiting = True
            Variable._execution_engine.queue_callback(self._leave)

    def _leave(self, *_: Any) -> None:
        for place, name, parameter in self._places:
            place[name] = parameter

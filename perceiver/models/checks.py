"""Checks that configurations of models share. Nothing is built for them."""

from typing import Any

from perceiver.config import Config, UserError
from perceiver.config.core import spelled

MOST_LAYERS = 1000
"""More would take minutes to build, and none is known to be of use."""
MOST = 2**31
"""Of anything else: tensors above it cannot be held, or not be counted."""
MOST_CHANNELS = 2**20


def check_sizes(node: Config, where: str, except_for: str = "") -> None:
    """Checks a model's part: counts and sizes are at least 1 and can be built, dropout is at least 0 and below 1, scales are more than 0.

    Raises:
        UserError: names the first field that is not.
    """
    for name, value in vars(node).items():
        if name == except_for or value is None or isinstance(value, bool):
            continue
        if isinstance(value, int) and value < 1:
            raise UserError(f"{spelled(where + name)} is {value}, but must be at least 1")
        if isinstance(value, int) and value > (most := _most(name)):
            raise UserError(f"{spelled(where + name)} is {value}, but must be at most {most}")
        if name.endswith("dropout") and not 0 <= value < 1:
            raise UserError(f"{spelled(where + name)} is {value}, but must be at least 0 and less than 1")
        if name in ("init_scale", "rescale_factor") and value <= 0:
            raise UserError(f"{spelled(where + name)} is {value}, but must be more than 0")


def _most(name: str) -> int:
    if "layers" in name or "blocks" in name:
        return MOST_LAYERS
    return MOST_CHANNELS if "channels" in name else MOST


def check_count(part: Config, what: str, number: Any) -> None:
    """Checks a number that a method of a model's part returned, which may be the user's. 0: it is not known before the data is.

    Raises:
        UserError: it is no whole number, or negative.
    """
    if type(number) is not int or number < 0:
        raise UserError(f"{type(part).__name__}.{what} is {number!r:.80} and must be a whole number from 0 on")


def check_heads(num_heads: int, num_channels: int, heads_field: str, channels_field: str) -> None:
    """Checks that heads share the channels evenly.

    Raises:
        UserError: names both fields and the numbers of heads that would do.
    """
    if num_channels % num_heads:
        possible = [n for n in range(1, min(num_channels, 64) + 1) if num_channels % n == 0]
        raise UserError(
            f"{heads_field} is {num_heads}, but must divide {channels_field}, {num_channels}: one of {', '.join(map(str, possible))}"
        )

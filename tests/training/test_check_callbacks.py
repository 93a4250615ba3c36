"""Mistakes in callbacks of one's own, found before a worker is held."""

import pytest
import torch

from perceiver.config import CallbackConfig, UserError
from perceiver.training.callbacks import Callback, EarlyStop
from perceiver.training.check_callbacks import check_callbacks


class Watch(CallbackConfig):
    """Builds what `METHODS` has under a name."""

    which: str = ""

    def build(self):
        return BUILT[self.which]()


def callback(**methods):
    return type("Watching", (Callback,), methods)


BUILT = {
    "fails": lambda: {}["missing"],
    "no callback": lambda: print,
    "hook": callback(after_step=lambda self, step: None),
    "end": callback(on_end=lambda self, step, metrics: None),
    "state of a list": callback(state_dict=lambda self: [1]),
    "state of a set": callback(state_dict=lambda self: {"seen": {1}}),
    "failing state": callback(state_dict=lambda self: {"best": best}),  # noqa: F821
    "not restored": callback(state_dict=lambda self: {"best": (1.0, 2.0)}, load_state_dict=lambda self, state: state["bets"]),
    "later": callback(state_dict=lambda self: {"norm": self.norm}, load_state_dict=lambda self, state: self.training.step),
    "good": callback(
        after_step=lambda self, *args: None,
        on_end=lambda self, step, metrics, error=None: None,
        state_dict=lambda self: {"best": (1.0, torch.ones(2))},
        load_state_dict=lambda self, state: setattr(self, "best", state["best"]),
    ),
}

MISTAKES = {
    "fails": "Watch.build fails: test_check_callbacks.py, line",
    "no callback": "Watch.build returned a builtin_function_or_method and must return a perceiver.training.callbacks.Callback",
    "hook": r"Watching.after_step must take \(self, step, result\)",
    "end": r"Watching.on_end must take \(self, step, metrics, error\)",
    "state of a list": "Watching.state_dict returned a list and must return a dict",
    "state of a set": r"Watching.state_dict\(\)\['seen'\] is a set: a state is made of",
    "failing state": "Watching.state_dict fails: test_check_callbacks.py, line .*: NameError",
    "not restored": "Watching.load_state_dict fails: test_check_callbacks.py, line .*: KeyError",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_callback_is_named(mistake):
    with pytest.raises(UserError, match=MISTAKES[mistake]):
        check_callbacks([Watch(which=mistake)])


def test_callbacks_of_the_package_and_states_that_are_made_later_pass():
    check_callbacks([EarlyStop(), Watch(which="good"), Watch(which="later")])

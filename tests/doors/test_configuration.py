"""Configurations and command lines with random faults: each is refused as a mistake of the user's, or usable."""

import copy
import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from perceiver.config import Experiment, UserError, flatten, from_dict, to_dict
from perceiver.config.core import load_tree
from perceiver.presets import PRESETS
from perceiver.tasks import build_task
from ray_jobs.cli import parse_experiment
from ray_jobs.preflight import check_experiment

NAMES = ["quickstart", "txt-clf-imdb-all", "clm-wikitext-small"]
TREES = {name: to_dict(PRESETS[name]()) for name in NAMES}
FIELDS = {name: sorted(flatten(tree)) for name, tree in TREES.items()}
VALUES = st.sampled_from(
    [
        *(None, True, False, -1, 0, 1, 2, 3, 7, 2**31, 2**40, 2**64, 10**400, -0.5, 0.5, 1e300, float("nan"), float("inf")),
        *("", " ", "a", "x" * 300, "ü", "a/b", "..", "\0", "3", "nan", "perceiver.models:TextInput", "os:system"),
        *([], [1, 2], ["a"], [[]], {}, {"type": "x"}, {"a": 1}),
    ]
)
FEW = settings(max_examples=25, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))


def places(tree: dict) -> list[tuple]:
    """Where something stands in a tree: the keys that lead to it."""
    found = []

    def walk(node, where):
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, value in items:
            found.append((*where, key))
            walk(value, (*where, key))

    walk(tree, ())
    return found


def changed(tree: dict, where: tuple, how: str, value) -> dict:
    tree = copy.deepcopy(tree)
    node = tree
    for key in where[:-1]:
        node = node[key]
    if how == "drop":
        del node[where[-1]]
    elif how == "add" and isinstance(node, dict):
        node["unknown"] = value
    else:
        node[where[-1]] = value
    return tree


def usable(experiment: Experiment) -> None:
    """Does what a start does before there are workers, and builds the model without memory."""
    check_experiment(experiment)
    with torch.device("meta"):
        build_task(experiment).build_model()
    assert from_dict(json.loads(json.dumps(to_dict(experiment)))) == experiment


@FEW
@given(st.data())
def test_a_changed_configuration_is_refused_in_one_sentence_or_usable(data):
    tree = TREES[data.draw(st.sampled_from(NAMES))]
    for _ in range(data.draw(st.integers(1, 2))):
        where = data.draw(st.sampled_from(places(tree)))
        tree = changed(tree, where, data.draw(st.sampled_from(["set", "set", "drop", "add"])), data.draw(VALUES))
    try:
        usable(from_dict(tree))
    except UserError as error:
        assert str(error).strip() and "Traceback" not in str(error)


@FEW
@given(VALUES)
def test_what_is_no_tree_at_all_is_refused(value):
    try:
        load_tree(value, Experiment, "a file")
    except UserError:
        return
    raise AssertionError(f"{value!r} is no experiment")


@settings(FEW, max_examples=12)
@given(st.data())
def test_a_command_line_is_refused_in_one_sentence_or_usable(data):
    name = data.draw(st.sampled_from(NAMES))
    fields = st.sampled_from([field for field in FIELDS[name] if field != "preset"])
    text = st.one_of(VALUES.map(lambda value: value if isinstance(value, str) else json.dumps(value)), st.text(max_size=8))
    words = [name]
    for field, value in data.draw(st.lists(st.tuples(fields, text), min_size=1, max_size=2)):
        words += [f"--{field.replace('_', '-')}", value]
    try:
        usable(parse_experiment(words, "ray_jobs.train"))
    except UserError as error:
        assert str(error).strip()


@pytest.mark.parametrize("schedule", [{"type": "Constant"}, [], 3, None, "none"])
def test_a_schedule_beside_an_optimizer_as_version_0_1_named_it_is_one_of_its_names(schedule):
    tree = copy.deepcopy(TREES["quickstart"])
    tree["optim"] |= {"optimizer": "adamw", "schedule": schedule}
    with pytest.raises(UserError, match=r"optim\.schedule"):
        from_dict(tree)

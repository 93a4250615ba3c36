"""Forks of runs, and runs that are made longer."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from perceiver.config import Adam, Constant, Cosine, Experiment, UserError
from perceiver.data.manifest import Manifest
from perceiver.runs import Run
from perceiver.tasks import build_task
from perceiver.training.batches import read_here
from perceiver.training.fork import check_extension, find_fork, is_extension, resolved
from perceiver.training.parallel import join_world
from perceiver.training.run import Training, save_experiment
from ray_jobs import runs
from ray_jobs.cli import parse_experiment
from ray_jobs.train_checks import check_fork, check_longer, is_longer
from tests.support.small import image_experiment
from tests.support.weights import full
from tests.training.test_training import run as run_workers


def experiment(storage: Path, name: str = "parent", **training) -> Experiment:
    made = image_experiment(**training)
    settings = replace(made.run, name=name, storage=str(storage), val_every=100, checkpoint_every=6, keep_checkpoints=5)
    return replace(made, optim=replace(made.optim, schedule=Constant()), run=settings)


def train(made: Experiment, data: Path, stop_at: int | None = None) -> dict[str, np.ndarray]:
    folder, manifest = Path(made.run.storage) / made.run.name, Manifest.load(data)
    world = join_world(torch.device("cpu"))
    training = Training(made, build_task(made), str(data), manifest, world, folder, read_here, stop_at=stop_at)
    save_experiment(Run(folder), made, manifest, str(data))
    training.run()
    return {name: full(p).numpy() for name, p in training.state.model.named_parameters()}


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def parent(images, tmp_path_factory):
    """Storage of a run of 12 steps with checkpoints at 6 and 12, and its weights."""
    storage = tmp_path_factory.mktemp("storage")
    return storage, train(experiment(storage), images)


def test_a_fork_that_changes_nothing_is_the_parent_bit_for_bit_also_where_it_is_interrupted(parent, images):
    storage, weights = parent
    fork = experiment(storage, "fork", fork="parent@6")
    train(fork, images, stop_at=9)
    assert [c.step for c in Run(storage / "fork").checkpoints()] == [9]
    continued = replace(fork, training=replace(fork.training, fork="gone@6"))  # it needs its parent no more
    assert same(train(continued, images), weights)
    assert [record["step"] for record in Run(storage / "fork").metrics() if "loss" in record] == list(range(7, 13))
    found = Run(storage / "fork").parent()
    assert (str(found), found.whole, len(found.digest)) == ("parent@6", True, 16)
    assert found.digest != replace(found, digest="").digest
    assert {run["name"]: run["parent"] for run in runs.list_runs(storage)}["fork"] == "parent@6"


def test_a_fork_with_another_learning_rate_begins_as_its_parent_was_and_becomes_another(parent, images):
    storage, weights = parent
    fork = experiment(storage, "slower", fork="parent@6")
    assert not same(train(replace(fork, optim=replace(fork.optim, lr=1e-4)), images), weights)


def test_a_fork_on_two_workers_begins_where_a_parent_on_one_was(parent, images):
    storage, weights = parent
    without = replace(experiment(storage, "two", fork="parent@12", max_steps=13), preset="quickstart")
    run_workers(without, images, storage / "two", world=2)
    assert [record["step"] for record in Run(storage / "two").metrics() if "loss" in record] == [13]


def test_weights_alone_start_optimizer_step_and_order_afresh_and_take_what_fits(parent, images):
    storage, _ = parent
    made = experiment(storage, "weights", fork="parent@6", fork_weights_only=True, max_steps=2)
    train(replace(made, optim=replace(made.optim, optimizer=Adam())), images)
    assert [record["step"] for record in Run(storage / "weights").metrics() if "loss" in record] == [1, 2]
    assert str(Run(storage / "weights").parent()) == "parent@6" and not Run(storage / "weights").parent().whole
    wider = replace(made, model=replace(made.model, num_latents=8), run=replace(made.run, name="wider"))
    assert find_fork(wider) is None
    train(wider, images)
    start = Run(storage / "wider").start_file.read_text()
    assert '"encoder.latents' in start.partition('"new"')[2].partition('"unused"')[0]


REFUSED = {
    "another model": (lambda e: replace(e, model=replace(e.model, num_latents=8)), "--model.num-latents: 4 -> 8"),
    "another optimizer": (lambda e: replace(e, optim=replace(e.optim, optimizer=Adam())), "--optim.optimizer: adamw -> adam"),
    "another batch": (lambda e: replace(e, training=replace(e.training, global_batch_size=6)), "--training.global-batch-size: 12 -> 6"),
    "other data": (lambda e: replace(e, data=replace(e.data, source="mnist")), "--data.source: none -> mnist"),
    "what is trained": (
        lambda e: replace(e, model=replace(e.model, encoder=replace(e.model.encoder, freeze=True))),
        "--model.encoder.freeze: False -> True",
    ),
}


@pytest.mark.parametrize(("change", "named"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_carried_over_is_named_with_the_way_out(parent, change, named):
    storage, _ = parent
    with pytest.raises(UserError) as error:
        check_fork(change(experiment(storage, "other", fork="parent")), Run(storage / "other"), [])
    assert str(error.value).startswith(f"run parent, step 12 cannot be forked with {named}: give --fork-weights-only")


def test_what_may_change_in_a_fork_does(parent):
    storage, _ = parent
    made = experiment(storage, "other", fork="parent", max_steps=30, seed=3, precision="bf16")
    made = replace(made, optim=replace(made.optim, lr=1e-4, schedule=Cosine(), weight_decay=0.0))
    found = check_fork(made, Run(storage / "other"), [])
    assert found.checkpoint.step == 12
    assert resolved(made, found.checkpoint).training.fork == f"{storage / 'parent'}@12"


def test_a_fork_without_a_name_of_its_own_a_parent_or_a_step_left_is_refused(parent):
    storage, _ = parent
    made = experiment(storage, "parent", fork="parent@6")
    with pytest.raises(UserError, match="--run.name is 'parent', the run that is forked"):
        check_fork(made, Run(storage / "parent"), [])
    with pytest.raises(UserError, match="--training.fork is 'parnt@6': no run's folder and no name of a run"):
        check_fork(experiment(storage, "x", fork="parnt@6"), Run(storage / "x"), [])
    with pytest.raises(UserError, match="--fork is .*@7'?: checkpoint '7' does not exist: say best, last or one of the steps 6, 12"):
        check_fork(experiment(storage, "x", fork="parent@7"), Run(storage / "x"), [])
    fork = check_fork(experiment(storage, "x", fork="parent"), Run(storage / "x"), [])
    with pytest.raises(UserError, match="forked into a run of 12 steps, which are over by then: give a larger --training.max-steps"):
        fork.check_data(fork.data, 12)
    with pytest.raises(UserError, match="the prepared data is not what run parent, step 12 was trained on"):
        fork.check_data("other", 20)


def test_the_command_line_of_a_fork_starts_from_its_parents_experiment(parent):
    storage, _ = parent
    words = ["--fork", f"{storage}/parent@6", "--name", "b", "--optim.lr", "0.5", "--fork-weights-only"]
    made = parse_experiment(words, "ray_jobs.train")
    assert made.model == experiment(storage).model and made.run.storage == str(storage)
    assert (made.run.name, made.optim.lr, made.training.fork_weights_only) == ("b", 0.5, True)
    assert parse_experiment([*words[:2], "--name", "b"], "ray_jobs.train").training.fork == f"{storage}/parent@6"
    assert parse_experiment(["--storage", str(storage), "--fork=parent", "--name", "b"], "x").run.storage == str(storage)
    with pytest.raises(UserError, match="--fork makes a new run: give it a --name"):
        parse_experiment(words[:2], "ray_jobs.train")
    with pytest.raises(UserError, match="'--name' does not exist"):
        parse_experiment(["--name", "b"], "ray_jobs.train")


def test_a_longer_run_with_a_constant_rate_is_the_run_that_was_so_long_from_its_start(parent, images):
    storage, weights = parent
    short, longer = experiment(storage, "longer", max_steps=6), experiment(storage, "longer")
    train(short, images)
    run = Run(storage / "longer")
    assert is_longer(longer, run) and not is_longer(short, run) and not is_extension(short, replace(longer, optim=Adam()))
    check_longer(longer, run, Manifest.load(images), 12)
    run.forget_result()
    assert same(train(longer, images), weights) and run.result()["step"] == 12


def test_a_longer_run_whose_learning_rate_would_have_been_another_is_refused_with_the_fork(parent, images):
    storage, _ = parent
    cosine = experiment(storage, "cosine", max_steps=12)
    cosine = replace(cosine, optim=replace(cosine.optim, schedule=Cosine()))
    train(cosine, images)
    longer = replace(cosine, training=replace(cosine.training, max_steps=24))
    with pytest.raises(UserError) as error:
        check_longer(longer, Run(storage / "cosine"), Manifest.load(images), 24)
    assert "with --optim.schedule cosine the learning rate from step 3 on is another in a run of 24" in str(error.value)
    command = f"--fork {storage}/cosine@12 --name cosine-longer --training.max-steps 24"
    assert str(error.value).endswith(command)
    words = command.split()
    assert parse_experiment(words, "ray_jobs.train").training.max_steps == 24
    with pytest.raises(UserError, match="can be continued to more, not to 6"):
        shorter = replace(cosine, training=replace(cosine.training, max_steps=6))
        check_longer(shorter, Run(storage / "cosine"), Manifest.load(images), 6)


def test_a_run_that_was_ended_early_is_not_made_longer(parent, tmp_path):
    storage, _ = parent
    old, new = experiment(storage), experiment(storage, max_steps=24)
    run = Run(tmp_path / "stopped")
    run.save_result({"step": 9}, "val_loss has not improved")
    with pytest.raises(
        UserError, match=r"was ended at step 0 \(val_loss has not improved\), so no more steps follow: fork it: the command"
    ):
        check_extension(run, old, new, 12, 24, lambda step: "the command")

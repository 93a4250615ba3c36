"""Optimizers, learning-rate schedules, groups of parameters."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from perceiver.config import (
    Adafactor,
    Adam,
    AdamW,
    AdamW8bit,
    Constant,
    Cosine,
    Experiment,
    InverseSquareRoot,
    Lamb,
    Linear,
    Lion,
    Muon,
    OneCycle,
    OptimConfig,
    OptimizerConfig,
    ParallelConfig,
    Sgd,
    UserError,
    WarmRestarts,
    Wsd,
    subclasses,
)
from perceiver.config.adamw8bit import dequantize, dynamic_values, quantize, row_blocks
from perceiver.data.manifest import Manifest
from perceiver.runs import Run
from perceiver.tasks import build_task
from perceiver.training.batches import read_here
from perceiver.training.checkpoint_files import all_tensors
from perceiver.training.optim import FACTOR, HIDDEN, build_optimizer, check_groups, described_groups, set_step
from perceiver.training.parallel import join_world
from perceiver.training.run import Training
from ray_jobs.cli import parse_experiment
from ray_jobs.preflight import check_experiment
from tests.support.small import image_experiment
from tests.support.weights import full
from tests.training import test_parallel
from tests.training.test_parallel import losses, make_data

OPTIMIZERS = {
    "sgd": (Sgd(nesterov=True), 0.05), "lion": (Lion(), 3e-4), "lamb": (Lamb(), 3e-2), "muon": (Muon(), 3e-3),
    "adafactor": (Adafactor(), 3e-2), "adamw8bit": (AdamW8bit(), 3e-3),
}  # fmt: skip
TOLERANCE = {"sgd": 2e-5, "lion": 2e-3, "lamb": 2e-5, "muon": 2e-5, "adafactor": 2e-5, "adamw8bit": 2e-5}
"""Relative, for every loss of the run. Of Lion: where a momentum is near 0, the order of sums decides its sign, and a step's direction."""


def train(made: Experiment, data: Path, folder: Path, stop_at: int | None = None) -> dict[str, np.ndarray]:
    world = join_world(torch.device("cpu"))
    training = Training(made, build_task(made), str(data), Manifest.load(data), world, folder, read_here, stop_at=stop_at)
    training.run()
    return {name: full(p).numpy() for name, p in training.state.model.named_parameters()}


def with_optim(**fields) -> Experiment:
    made = image_experiment()
    return replace(made, optim=replace(made.optim, **fields))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_training_continues_bit_for_bit_with_every_optimizer(name, images, tmp_path):
    optimizer, lr = OPTIMIZERS[name]
    made = with_optim(optimizer=optimizer, lr=lr)
    if name == "adamw8bit":  # small matrices are left in 32 bits
        made = replace(made, model=replace(made.model, num_latent_channels=64))
    whole = train(made, images, tmp_path / "whole")
    train(made, images, tmp_path / "run", stop_at=7)
    continued = train(made, images, tmp_path / "run")
    assert all(np.array_equal(whole[weight], continued[weight]) for weight in whole)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_two_workers_train_as_one_with_every_optimizer(name, tmp_path):
    data = make_data(tmp_path / "data")
    optimizer, lr = OPTIMIZERS[name]
    made = test_parallel.experiment()
    made = replace(made, optim=replace(made.optim, optimizer=optimizer, lr=lr), training=replace(made.training, max_steps=12))
    if name == "adamw8bit":
        made = replace(made, model=replace(made.model, num_channels=64))
    found = []
    for workers in (1, 2):
        folder = tmp_path / f"{workers}"
        test_parallel.train(replace(made, parallel=ParallelConfig(workers=workers)), data, folder)
        found.append(losses(folder))
    assert len(found[0]) == 12 and np.allclose(found[0], found[1], rtol=TOLERANCE[name], atol=0)
    assert found[0][-1] < found[0][0]


def factors(schedule, steps: int = 100) -> list[float]:
    return [OptimConfig(lr=1.0, schedule=schedule).learning_rate(step, steps) for step in range(steps + 1)]


def test_schedules_have_the_values_of_their_definitions():
    assert factors(Linear(min_lr_fraction=0.5))[::50] == [1.0, 0.75, 0.5]
    wsd = factors(Wsd(decay_fraction=0.2))
    assert wsd[:81] == [1.0] * 81 and wsd[90] == pytest.approx(0.5) and wsd[100] == 0.0
    assert factors(InverseSquareRoot(timescale=50))[50] == pytest.approx(math.sqrt(0.5))
    cycle = factors(OneCycle(rise_fraction=0.3, start_lr_fraction=0.1, min_lr_fraction=0.02))
    assert (cycle[0], cycle[30], cycle[100]) == (pytest.approx(0.1), 1.0, pytest.approx(0.02)) and max(cycle) == cycle[30]
    restarts = factors(WarmRestarts(cycle_steps=20, growth=2.0))
    assert [restarts[step] for step in (0, 20, 60)] == [1.0] * 3 and restarts[10] == pytest.approx(0.5) == restarts[40]
    assert factors(WarmRestarts(cycle_steps=20, growth=1.0))[::20] == [1.0] * 6
    assert OptimConfig(lr=1.0, schedule=WarmRestarts(cycle_steps=1, growth=1.0)).learning_rate(10**9, 10**9) == 1.0


@pytest.mark.parametrize(
    ("schedule", "same"),
    [(Constant(), 100), (InverseSquareRoot(), 100), (WarmRestarts(cycle_steps=7), 100), (Wsd(decay_fraction=0.25), 75), (Cosine(), 1)],
)
def test_up_to_where_a_longer_run_has_the_same_learning_rates(schedule, same):
    pairs = zip(factors(schedule, 100)[:100], factors(schedule, 1000), strict=False)
    assert next((step for step, (one, other) in enumerate(pairs) if one != other), 100) in (same, same + 1)


def test_lengths_in_epochs_are_steps_of_the_data(images, tmp_path):
    made = image_experiment(max_steps=20, global_batch_size=10)
    schedule = WarmRestarts(cycle_epochs=0.5, growth=1)
    optim = replace(made.optim, warmup_steps=99, warmup_epochs=0.25, schedule=schedule)
    epoch = -(-Manifest.load(str(images)).splits["train"].rows // 10)
    steps = optim.in_steps(epoch)
    assert (steps.warmup_steps, steps.schedule) == (round(0.25 * epoch), WarmRestarts(cycle_steps=round(0.5 * epoch), growth=1))
    assert InverseSquareRoot(timescale_epochs=2).in_steps(7) == InverseSquareRoot(timescale=14)
    assert made.optim.in_steps(epoch) is made.optim
    train(replace(made, optim=optim), images, tmp_path / "epochs")
    rates = [record["lr"] for record in Run(tmp_path / "epochs").metrics() if "lr" in record]
    assert rates == [steps.learning_rate(step, 20) for step in range(20)] and len(set(rates)) > 4
    restarts = ["--optim.schedule", "warmrestarts", "--optim.schedule.cycle-epochs", "-1"]
    for words, message in ((["--optim.warmup-epochs", "0"], "--optim.warmup-epochs is 0"), (restarts, "cycle-epochs is -1")):
        with pytest.raises(UserError, match=message):
            check_experiment(parse_experiment(["quickstart", *words], "x"))


def test_every_schedule_and_optimizer_is_chosen_by_its_name_and_checked():
    for name in ("linear", "wsd", "inversesquareroot", "onecycle", "warmrestarts"):
        assert type(parse_experiment(["quickstart", "--optim.schedule", name], "x").optim.schedule).__name__.lower() == name
    assert {"adam", "adamw", "sgd", "lion", "lamb"} <= set(subclasses(OptimizerConfig))
    assert parse_experiment(["quickstart", "--optim.optimizer", "sgd", "--optim.optimizer.momentum", "0.5"], "x").optim.optimizer == Sgd(
        momentum=0.5
    )
    wrong = [
        (
            ["--optim.schedule", "wsd", "--optim.schedule.decay-fraction", "2"],
            "--optim.schedule.decay-fraction is 2.0 and must be from 0 to 1",
        ),
        (["--optim.schedule", "warmrestarts", "--optim.schedule.growth", "0.5"], "growth is 0.5 and must be at least 1"),
        (["--optim.optimizer", "sgd", "--optim.optimizer.momentum", "1"], "momentum is 1.0 and must be at least 0"),
        (["--optim.optimizer", "lion", "--optim.optimizer.betas", "1", "0.9"], "--optim.optimizer.betas is"),
        (["--optim.optimizer", "muon", "--optim.optimizer.momentum", "1"], "--optim.optimizer.momentum is 1.0"),
        (["--optim.weight-decay-end", "-1"], "--optim.weight-decay-end is -1.0 and must not be negative"),
        (["--optim.weight-decay", "0", "--optim.weight-decay-end", "0.1"], "--optim.weight-decay, which it begins from, is 0.0"),
        (["--optim.groups", "encoder.*:from=0"], "--optim.groups has 'encoder.*:from=0'"),
        (["--optim.layer-decay", "0"], "--optim.layer-decay is 0.0"),
        (["--optim.groups", "encoder.*"], "--optim.groups has 'encoder.*'"),
        (["--optim.groups", "encoder.*:lr=x"], "--optim.groups has 'encoder.*:lr=x'"),
        (["--optim.groups", "encodr.*:lr=1"], "no parameter of the model has a name like 'encodr.*'"),
        (["--optim.groups", "*:freeze"], "freezes all of the model's parameters"),
    ]
    for words, message in wrong:
        with pytest.raises(UserError) as error:
            check_experiment(parse_experiment(["quickstart", *words], "x"))
        assert message in str(error.value)


def settings(**fields) -> dict[str, tuple[float, float]]:
    """Learning-rate factor and weight decay of each parameter, by name."""
    made = with_optim(weight_decay=0.1, **fields)
    model = build_task(made).build_model()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    check_groups(model, made.optim)
    groups = build_optimizer(model, made.optim).param_groups
    return {names[id(p)]: (group[FACTOR], group["weight_decay"]) for group in groups for p in group["params"]}


def test_groups_multiply_rates_and_set_weight_decays_by_name():
    plain, found = settings(), settings(groups=("encoder.*:lr=0.1", "encoder.latents*:lr=0.5,decay=0.2", "*.bias:decay=0.3"))
    assert plain.keys() == found.keys() and set(plain.values()) == {(1.0, 0.1), (1.0, 0.0)}
    for name, (factor, decay) in found.items():
        latents, bias = name.startswith("encoder.latents"), name.endswith(".bias")
        assert factor == pytest.approx((0.1 if name.startswith("encoder.") else 1.0) * (0.5 if latents else 1.0))
        assert decay == (0.3 if bias else 0.2 if latents else plain[name][1])


def test_each_group_says_how_many_parameters_it_names():
    made = with_optim(groups=("encoder.latents:freeze", "*.bias:decay=0.3,from=20", "*:lr=0.5"))
    model = build_task(made).build_model()
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    biases = [size for name, size in sizes.items() if name.endswith(".bias")]
    of = f"of {len(sizes):,} tensors, "
    whole = f"of {sum(sizes.values()):,} parameters"
    assert described_groups(model, made.optim) == [
        f"encoder.latents:freeze: 1 {of}{sizes['encoder.latents']:,} {whole}",
        f"*.bias:decay=0.3,from=20: {len(biases):,} {of}{sum(biases):,} {whole}",
        f"*:lr=0.5: {len(sizes):,} {of}{sum(sizes.values()):,} {whole}",
    ]


def test_deeper_layers_learn_faster_by_the_decay():
    made = image_experiment()
    model = build_task(made).build_model()
    layers = list(model.layers())
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = settings(layer_decay=0.5)
    for number, layer in enumerate(layers):
        assert {found[names[id(p)]][0] for p in layer.parameters()} == {0.5 ** (len(layers) - 1 - number)}
    inside = {id(p) for layer in layers for p in layer.parameters()}
    outside = [name for number, name in names.items() if number not in inside]
    assert found[outside[0]][0] == 0.5 ** len(layers) and found[outside[-1]][0] == 1.0


def test_frozen_weights_stay_and_others_learn_and_a_factor_of_one_changes_no_bit(images, tmp_path):
    plain = train(with_optim(), images, tmp_path / "plain")
    begun = train(with_optim(groups=("*:lr=0,decay=0",)), images, tmp_path / "begun")
    frozen = train(with_optim(groups=("encoder.*:freeze",)), images, tmp_path / "frozen")
    same = train(with_optim(groups=("encoder.*:lr=1",)), images, tmp_path / "same")
    for name, values in frozen.items():
        assert np.array_equal(values, begun[name]) is name.startswith("encoder."), name
    assert all(np.array_equal(plain[name], same[name]) for name in plain)


def test_muon_moves_the_matrices_of_layers_and_nothing_else():
    made = with_optim(optimizer=Muon())
    model = build_task(made).build_model()
    groups = build_optimizer(model, made.optim).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    hidden = {names[id(p)] for group in groups if group[HIDDEN] for p in group["params"]}
    inside = {id(p) for layer in model.layers() for p in layer.parameters()}
    assert hidden == {name for name, p in model.named_parameters() if id(p) in inside and p.ndim == 2}
    assert sum(len(group["params"]) for group in groups) == len(names) > len(hidden) > 10


def test_a_step_of_muon_is_orthogonal_and_as_long_as_its_rate_says():
    weight = torch.nn.Parameter(torch.zeros(8, 24))
    optimizer = Muon(momentum=0.0).build([{"params": [weight], "weight_decay": 0.0, HIDDEN: True}], lr=0.5)
    weight.grad = torch.randn(8, 24, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    values = torch.linalg.svdvals(weight.detach()) / (0.5 * 0.2 * 24**0.5)
    assert values.min() > 0.6 and values.max() < 1.3
    assert torch.equal(torch.sign((weight.detach() * weight.grad).sum()), torch.tensor(-1.0))


def test_a_step_of_adafactor_is_pytorchs_own():
    values = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed, shape in enumerate([(8, 24), (24,), (1, 3, 5)])]
    found = []
    for build in (Adafactor().build, torch.optim.Adafactor):
        weights = [torch.nn.Parameter(value.clone()) for value in values]
        optimizer = build([{"params": weights, "weight_decay": 0.1}], lr=0.01)
        for _ in range(3):
            for weight in weights:
                weight.grad = weight.detach().cos()
            optimizer.step()
        found.append(weights)
    assert all(torch.equal(one, other) and not torch.equal(one, value) for one, other, value in zip(*found, values, strict=True))


def test_moments_in_8_bits_are_near_those_in_32_and_their_blocks_end_with_rows():
    values = torch.randn(40, 300, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(40)[:, None].sub(20)
    for signed in (True, False):
        table = dynamic_values(signed)
        assert len(table.unique()) == 256 and table.min() >= -1 and table.max() == 1 and 0 in table
        exact = values if signed else values.abs()
        codes, scale = quantize(exact, row_blocks(exact.shape), table)
        assert codes.dtype is torch.uint8 and codes.shape == exact.shape and scale.shape == (40, 2)
        error = (dequantize(codes, scale, table) - exact).abs() / exact.abs().amax(1, keepdim=True)
        assert error.max() < 0.015
        part = quantize(exact[13:27], 2, table)
        assert torch.equal(part[0], codes[13:27]) and torch.equal(part[1], scale[13:27])
    assert torch.equal(dequantize(*quantize(torch.zeros(3, 70), 1, table), table), torch.zeros(3, 70))


def test_a_checkpoint_of_two_workers_with_moments_in_8_bits_continues_on_one_and_back(tmp_path):
    """From the same checkpoint: the next losses differ by the order of sums alone."""
    data = make_data(tmp_path / "data")
    made = test_parallel.experiment()
    made = replace(made, optim=replace(made.optim, optimizer=AdamW8bit(), lr=3e-3), training=replace(made.training, max_steps=8))
    made = replace(made, model=replace(made.model, num_channels=64))
    for first in (1, 2):
        found = []
        for then in (1, 2):
            folder = tmp_path / f"{first}-{then}"
            test_parallel.train(replace(made, parallel=ParallelConfig(workers=first)), data, folder, stop_at=4)
            held = all_tensors(Run(folder).checkpoints()[-1].path, "optimizer.")
            assert {tensor.dtype for name, tensor in held.items() if name.endswith("exp_avg")} == {torch.uint8, torch.float32}
            test_parallel.train(replace(made, parallel=ParallelConfig(workers=then)), data, folder)
            found.append(losses(folder))
        assert len(found[0]) == 8 and np.allclose(*found, rtol=2e-5, atol=0)


def test_weights_of_a_group_learn_from_its_first_step_on(images, tmp_path):
    begun = train(with_optim(groups=("*:lr=0,decay=0",)), images, tmp_path / "begun")
    made = with_optim(groups=("encoder.*:from=7",))
    before = train(made, images, tmp_path / "run", stop_at=6)
    after = train(made, images, tmp_path / "run")
    for name, values in begun.items():
        assert np.array_equal(values, before[name]) is name.startswith("encoder."), name
        assert not np.array_equal(values, after[name]), name


def test_weight_decay_goes_along_half_a_cosine_to_its_end():
    made = with_optim(weight_decay=0.2, weight_decay_end=0.1, groups=("*.bias:decay=0.4",))
    assert [made.optim.decay_factor(step, 101) for step in (0, 50, 100, 200)] == pytest.approx([1.0, 0.75, 0.5, 0.5])
    optimizer = build_optimizer(build_task(made).build_model(), made.optim)
    before = [group["weight_decay"] for group in optimizer.param_groups]
    for _ in range(2):  # a step that is set again is the same step
        set_step(optimizer, made.optim, 50, 101, 1.0)
        assert [group["weight_decay"] for group in optimizer.param_groups] == pytest.approx([0.75 * decay for decay in before])
    assert sorted(set(before)) == [0.0, 0.2, 0.4]
    assert OptimConfig().decay_factor(50, 101) == 1.0


@pytest.mark.parametrize(
    "optimizer", [AdamW(betas=(0.9, 0)), Adam(betas=(0, 0.99)), Lion(betas=(0, 0.9)), Lamb(betas=(0.9, 0)), Muon(betas=(0, 0))]
)
def test_a_beta_may_be_a_whole_number(optimizer):
    """Files and command lines give 0 where 0.0 is meant, which PyTorch's optimizers refuse beside a fraction."""
    weight = torch.nn.Parameter(torch.ones(4, 4))
    made = optimizer.build([{"params": [weight], "weight_decay": 0.0, HIDDEN: True}], lr=0.1)
    weight.grad = torch.ones(4, 4)
    made.step()
    assert bool(torch.isfinite(weight).all()) and not torch.equal(weight, torch.ones(4, 4))

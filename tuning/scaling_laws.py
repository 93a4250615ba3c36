"""`python -m tuning.scaling_laws clm-... --budgets 1e12,3e12 --channels 48,64,96,128`: trains isoFLOP studies of Perceiver AR.

For each budget, every width is trained for as many steps as the budget allows, by the FLOPs that perceiver/costs/flops.py
counts (prefix, latents and output separately, the backward pass as twice the forward pass). The study is a sweep of these runs,
so the same command continues it. Parabolas over model sizes give each budget's best size; a power law over the
budgets gives the exponents, with intervals (tuning/power_law.py; arXiv 2203.15556, Section 3.2, Approach 2).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from perceiver.config import Experiment, UserError
from perceiver.costs.flops import num_parameters
from perceiver.data.storage import write_file
from perceiver.disk import write_json
from perceiver.models import check_model
from perceiver.plots import GREY, color, frame, log_scale, new_figure, png
from perceiver.tasks import build_task
from perceiver.terminal import CommandParser, summary
from ray_jobs.cli import main_entry, refuse_empty
from ray_jobs.logs import show_progress
from ray_jobs.overrides import UNDOTTED
from ray_jobs.program import program
from tuning.power_law import Measurement, Study, fit_study
from tuning.scaling_page import page_of_study
from tuning.sweep import run_sweep, sweep_folder
from tuning.sweeps import Sweep, trial_experiment

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEAST_STEPS = 30
"""A training of fewer steps says nothing about its size."""


def main(argv: list[str]) -> int:
    argv = show_progress(argv)
    parser = CommandParser(prog=program("tuning.scaling_laws"), description=summary(__doc__), allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("preset", help="preset of a causal language model")
    parser.add_argument("--budgets", required=True, help="training FLOPs, separated by commas: at least two")
    parser.add_argument("--channels", required=True, help="widths of the model, separated by commas: at least three")
    parser.add_argument("--predict", type=float, help="a budget to predict the best size for")
    parser.add_argument("--name", help="folder of the study; default: the preset's name and -scaling")
    parser.add_argument("--storage", help="folder of all sweeps; default: $PERCEIVER_HOME/sweeps")
    parser.add_argument("--concurrent", type=int, help="number of concurrent runs; default: as many as the cluster has room for")
    args, overrides = parser.parse_with_fields(argv, UNDOTTED)
    refuse_empty(args, ("preset",))
    budgets, channels = _numbers("budgets", args.budgets, 2), [int(c) for c in _numbers("channels", args.channels, 3)]
    sweep, skipped = plan(args.preset, overrides, budgets, channels)
    for line in skipped:
        print(line)
    folder = sweep_folder(args.storage, args.name or f"{args.preset}-scaling")
    trials = run_sweep(sweep, folder, args.concurrent)
    study = fit_study(measurements(sweep.experiment(), trials, budgets))
    lines = describe(study, args.predict)
    write(folder, study, lines)
    for line in lines:
        print(line)
    print(f"written to {folder / 'scaling.json'}, {folder / 'scaling.png'} and {folder / 'scaling.html'}")
    return 0


def plan(preset: str, overrides: Sequence[str], budgets: Sequence[float], channels: Sequence[int]) -> tuple[Sweep, list[str]]:
    """The trainings of a study, and lines about sizes that a budget cannot pay for.

    Raises:
        UserError: no causal language model, a width that cannot be, or fewer than three sizes at a budget.
    """
    base = Sweep(preset=preset, overrides=tuple(overrides), points=({},), scheduler="fifo", reports=4, keep=1)
    experiment = base.experiment()
    of_text = experiment.task.kind == "tokens" and build_task(experiment).targets_per_example() is not None
    if not of_text or not hasattr(experiment.model, "num_channels"):
        raise UserError(f"scaling laws need a causal language model, and {preset} is none: clm-wikitext-small, say")
    points, skipped = [], []
    for budget in budgets:
        here = []
        for width in channels:
            sized = trial_experiment(experiment, {"model.num_channels": width})
            check_model(sized.model)
            steps = round(budget / step_flops(sized))
            if steps < LEAST_STEPS:
                skipped.append(f"budget {budget:.3g} pays for {steps} steps of {width} channels: left out (at least {LEAST_STEPS})")
                continue
            here.append({"model.num_channels": width, "training.max_steps": steps, "optim.warmup_steps": max(1, steps // 10)})
        if len(here) < 3:
            raise UserError(f"budget {budget:.3g} pays for {len(here)} of the widths; a parabola needs 3: add smaller ones, or raise it")
        points += here
    return replace(base, points=tuple(points)), skipped


def step_flops(experiment: Experiment) -> float:
    """FLOPs of an optimizer step."""
    return build_task(experiment).flops_per_example() * experiment.training.global_batch_size


def measurements(base: Experiment, trials: Sequence[dict[str, Any]], budgets: Sequence[float]) -> list[Measurement]:
    """What the finished trainings of a study measured: the validation loss at their end."""
    found = []
    for trial in trials:
        if trial["status"] != "finished":
            continue
        experiment = trial_experiment(base, trial["values"])
        steps, targets = experiment.training.max_steps, build_task(experiment).targets_per_example()
        assert steps is not None and targets is not None  # as `plan` made them
        spent = steps * step_flops(experiment)
        found.append(
            Measurement(
                budget=min(budgets, key=lambda b: abs(np.log(b / spent))),
                parameters=num_parameters(experiment.model),
                tokens=steps * experiment.training.global_batch_size * targets,
                loss=trial["last_value"],
            )
        )
    return found


def describe(study: Study, predict: float | None) -> list[str]:
    """Lines for a person."""
    lines = ["budget      best parameters   best tokens       loss"]
    for p in study.parabolas:
        note = "" if p.inside else "   (outside the sizes tried: a guess)"
        lines.append(f"{p.budget:<10.3g}  {p.parameters:>15,.0f}  {p.tokens:>12,.0f}  {p.loss:9.4f}{note}")
    for name, law in (("parameters", study.parameters), ("tokens", study.tokens)):
        lines.append(
            f"best {name} = {law.factor:.3g} x budget^{law.exponent:.3f}  "
            f"({law.level:.0%} interval of the exponent: {law.exponent_low:.3f} to {law.exponent_high:.3f})"
        )
    if study.dropped:
        lines.append(
            f"the intervals are of {study.num_samples - study.dropped} of {study.num_samples} resamplings: the others have no "
            "minimum at some budget"
        )
    if predict is not None:
        for name, law in (("parameters", study.parameters), ("tokens", study.tokens)):
            value, low, high = law.predict(predict)
            lines.append(f"at {predict:.3g} FLOPs: {value:,.0f} {name} ({low:,.0f} to {high:,.0f})")
    return lines


def write(folder: Path, study: Study, lines: Sequence[str]) -> None:
    """Writes scaling.json, scaling.png and scaling.html."""
    plain = asdict(study)
    for law in ("parameters", "tokens"):
        del plain[law]["samples"]
    write_json(folder / "scaling.json", plain)
    write_file(folder, "scaling.png", png(draw(study)))
    write_file(folder, "scaling.html", page_of_study(study, f"Scaling laws: {folder.name}", lines).render().encode())


def draw(study: Study) -> Figure:
    """Losses over sizes with each budget's parabola, and the best sizes over budgets with the power law and its interval."""
    figure = new_figure(760, 780)
    losses, best = figure.subplots(2, 1)
    for number, parabola in enumerate(study.parabolas):
        own = sorted((m.parameters, m.loss) for m in study.measurements if m.budget == parabola.budget)
        x = np.linspace(np.log10(own[0][0]), np.log10(own[-1][0]), 60)
        losses.plot(*zip(*own, strict=True), "o", color=color(number))
        losses.plot(10**x, np.polyval(parabola.coefficients, x), color=color(number), label=f"{parabola.budget:.3g} FLOPs")
        if parabola.inside:
            losses.plot(parabola.parameters, parabola.loss, "*", color=color(number), markersize=12)
    log_scale(losses, "x")
    frame(losses, "validation loss over size, by budget (stars: minima)", "parameters (log scale)", "validation loss")
    losses.legend(fontsize="small", frameon=False)
    law = study.parameters
    budgets = [p.budget for p in study.parabolas]
    grid = np.geomspace(min(budgets) / 2, max(budgets) * 4, 40)
    middle, low, high = np.array([law.predict(budget) for budget in grid]).T
    best.plot(grid, middle, color=color(0), label=f"{law.factor:.3g} x FLOPs^{law.exponent:.3f}")
    best.fill_between(grid, low, high, color=GREY, alpha=0.3, linewidth=0, label=f"{law.level:.0%} interval")
    best.plot(budgets, [p.parameters for p in study.parabolas], "o", color=color(0), label="minima of the budgets")
    log_scale(best, "x", "y")
    frame(best, "best size over training budget", "training FLOPs (log scale)", "parameters (log scale)")
    best.legend(fontsize="small", frameon=False)
    return figure


def _numbers(name: str, text: str, least: int) -> list[float]:
    try:
        values = sorted({float(part) for part in text.split(",")})
    except ValueError:
        raise UserError(f"{name} is {text!r} and must be numbers separated by commas") from None
    if len(values) < least or values[0] <= 0:
        raise UserError(f"{name} is {text!r} and must be at least {least} different numbers above 0")
    return values


if __name__ == "__main__":
    main_entry(main)

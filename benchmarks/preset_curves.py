"""Draws how the small presets learn, each beside the best answer without a Perceiver.

    python -m benchmarks.preset_curves --out docs/curves-presets.png [--runs FOLDER]

With --runs, the curves are first taken from the runs of this folder that have the names of `PANELS` (docs/presets.md has the commands) and
written to `benchmarks/results/preset_curves.json`; those of other runs stay as they are. Without it, they are drawn from this file.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

from matplotlib.ticker import MaxNLocator

from perceiver import plots

RECORDED = Path(__file__).parent / "results" / "preset_curves.json"
_MOST = 120
"""Points of a curve that are kept, about."""

Points = list[tuple[int, float]]


@dataclass(frozen=True)
class Panel:
    """Curves of a run."""

    run: str
    title: str
    metrics: dict[str, str]
    """By the name in metrics.jsonl, what the legend calls it."""
    y: str
    others: dict[str, float]
    """Answers without a Perceiver."""


PANELS = (
    Panel(
        "flow-by-heart",
        "optical-flow-small, 7 real pairs",
        {"loss": "training pairs"},
        "end-point error, pixels of 64 x 96",
        {"nothing moves": 1.967},
    ),
    Panel("flow-small", "optical-flow-small", {"val_epe": "validation"}, "end-point error, pixels", {"nothing moves": 1.532}),
    Panel(
        "video-small",
        "multimodal-small",
        {"val_psnr_video": "video", "val_psnr_audio": "audio"},
        "PSNR, dB",
        {"each clip's mean colour": 15.03, "silence": 9.93},
    ),
    Panel(
        "video-second",
        "the same, then for the video",
        {"val_psnr_video": "video", "val_psnr_audio": "audio"},
        "PSNR, dB",
        {"each clip's mean colour": 15.03, "silence": 9.93},
    ),
    Panel("audio-small", "audio-clf-small", {"val_acc": "validation"}, "accuracy", {"one class": 0.1}),
    Panel("copy-small", "copy-small", {"val_acc": "validation"}, "accuracy", {"guessing": 1 / 32}),
    Panel("mnist-pixels", "img-ar-mnist", {"val_bits_per_dim": "validation"}, "bits per dimension", {}),
    Panel("piano-small", "sam-small", {"val_loss": "validation"}, "nats per event", {"single events": 4.785, "pairs of events": 3.933}),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--runs", type=Path)
    args = parser.parse_args()
    recorded: dict[str, dict[str, Points]] = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
    if args.runs:
        there = {panel.run: args.runs / panel.run / "metrics.jsonl" for panel in PANELS}
        found = {panel.run: curves_of(there[panel.run], list(panel.metrics)) for panel in PANELS if there[panel.run].exists()}
        recorded |= found
        RECORDED.write_text(json.dumps(recorded) + "\n")
    args.out.write_bytes(drawn(recorded))


def curves_of(metrics: Path, names: list[str]) -> dict[str, Points]:
    """Of each metric, points (step, value) of a run's metrics.jsonl."""
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    found = {name: [(r["step"], round(r[name], 5)) for r in records if name in r] for name in names}
    return {name: points[:: max(1, len(points) // _MOST)] for name, points in found.items()}


def drawn(recorded: dict[str, dict[str, Points]]) -> bytes:
    """The picture of all runs of which there are curves, as a PNG file."""
    panels = [panel for panel in PANELS if all(recorded.get(panel.run, {"": []}).values())]
    columns = min(4, len(panels))
    figure = plots.new_figure(1200, 290 * -(-len(panels) // columns))
    places = figure.subplots(-(-len(panels) // columns), columns, squeeze=False).ravel()
    for axes, panel in zip(places, panels, strict=False):
        for number, (name, label) in enumerate(panel.metrics.items()):
            points = recorded[panel.run][name]
            marker = "o" if len(points) < 40 else None
            axes.plot(*zip(*points, strict=True), color=plots.color(number), label=label, marker=marker, markersize=3, linewidth=1.3)
        for number, (label, value) in enumerate(panel.others.items()):
            axes.axhline(value, color="0.45", linestyle=("--", ":")[number], linewidth=1, label=label)
        plots.frame(axes, panel.title, y=panel.y)
        plots.step_axis(axes)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.set_ylim(bottom=0)
        axes.legend(fontsize="x-small", frameon=False)
    for axes in places[len(panels) :]:
        axes.set_axis_off()
    return plots.png(figure)


if __name__ == "__main__":
    main()

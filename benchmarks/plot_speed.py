"""Draws docs/speed.png from the results on record: `python -m benchmarks.plot_speed FILE`."""

import json
import sys
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"
GOALS = {"img-clf-mnist": 0.6, "clm-wikitext": 1.1, "mlm-imdb": 1.12, "img-clf-imagenet": 1.0}


def main() -> None:
    start, step, busy = (
        json.loads((RESULTS / f"{name}_2_cores{suffix}.json").read_text())
        for name, suffix in (("first_step", ""), ("step_time", "_bf16"), ("busy_neighbour", ""))
    )
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    first, second, third = figure.subplots(1, 3)
    for key, label, shift, color in (("first_step_s", "time", -0.2, "tab:blue"), ("cpu_s", "processor time", 0.2, "0.7")):
        places = range(len(start["medians"]))
        first.bar([place + shift for place in places], [one[key] for one in start["medians"]], 0.4, color=color, label=label)
    first.set_xticks(places, start["trees"])
    first.set_xlabel("commit")
    first.set_title("quickstart: seconds to the first step", fontsize=10)
    first.set_ylim(top=42)
    first.legend(fontsize=8)
    for side, shift, color in (("ours", 0.2, "0.7"), ("ours bf16", -0.2, "tab:blue")):
        ratios = {row["workload"]: row["ratio_to_bound"] for row in step["rows"] if row["implementation"] == side}
        label = "bf16" if side.endswith("bf16") else "fp32"
        second.barh([place + shift for place in range(len(GOALS))], [ratios[name] for name in GOALS], 0.4, color=color, label=label)
    second.set_yticks(range(len(GOALS)), list(GOALS))
    second.plot(list(GOALS.values()), range(len(GOALS)), "k|", markersize=24, label="goal")
    second.set_title("a step, times the bound", fontsize=10)
    second.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=3)
    places = range(len(busy["ways"]))
    third.barh([place + 0.2 for place in places], busy["at_rest"], 0.4, color="0.7", label="at rest")
    third.barh([place - 0.2 for place in places], busy["beside_a_busy_process"], 0.4, color="tab:blue", label="beside a busy process")
    third.set_yticks(list(places), busy["ways"], fontsize=8)
    third.set_title("MNIST's step, ms", fontsize=10)
    third.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2)
    figure.savefig(sys.argv[1], dpi=80)


if __name__ == "__main__":
    main()

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
        json.loads((RESULTS / f"{name}_2_cores{number}.json").read_text())
        for name, number in (("first_step", ""), ("step_time", "_2"), ("busy_neighbour", ""))
    )
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    first, second, third = figure.subplots(1, 3)
    names = ["before", "read early", "now"]
    first.bar(names, [one["first_step_s"] for one in start["medians"]], color=["0.7", "0.55", "tab:blue"])
    first.bar(names, [one["waiting_s"] for one in start["medians"]], color="tab:orange", label="of it waiting for the first batch")
    first.set_title("quickstart: seconds to the first step", fontsize=10)
    first.set_ylim(top=40)
    first.legend(fontsize=8)
    second.barh(list(GOALS), [row["ratio_to_bound"] for row in step["rows"]], color="tab:blue", label="now")
    second.plot(list(GOALS.values()), list(GOALS), "k|", markersize=16, label="goal")
    second.set_title("a step, times the bound", fontsize=10)
    second.legend(fontsize=8)
    places = range(len(busy["ways"]))
    third.barh([place + 0.2 for place in places], busy["at_rest"], 0.4, color="0.7", label="at rest")
    third.barh([place - 0.2 for place in places], busy["beside_a_busy_process"], 0.4, color="tab:blue", label="beside a busy process")
    third.set_yticks(list(places), busy["ways"], fontsize=8)
    third.set_title("MNIST's step, ms", fontsize=10)
    third.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2)
    figure.savefig(sys.argv[1], dpi=80)


if __name__ == "__main__":
    main()

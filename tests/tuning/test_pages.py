"""Reports as HTML files: whole, of themselves, and what stands in them. How they look is seen in a browser (see the last test)."""

import base64
import html.parser
import io
import json
import re
import shutil
import subprocess
import wave

import numpy as np
import pytest
from PIL import Image

from perceiver.config import UserError
from perceiver.disk import write_json
from perceiver.pages import COLORS, Page, color, parallel_coordinates
from perceiver.runs import Run
from perceiver.tasks.multimodal_autoencoding import wav
from ray_jobs.run_pages import class_rows
from tests.ray_jobs.test_compare import make
from tests.tuning.test_tuning import folder as sweep_folder  # noqa: F401
from tuning import report
from tuning.page import importances
from tuning.power_law import Measurement, fit_study
from tuning.scaling_laws import describe
from tuning.scaling_page import page_of_study


class Links(html.parser.HTMLParser):
    """What a page would load."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        self.found += [value for name, value in attributes if name in ("src", "href", "srcset", "action", "poster", "data") and value]


def charts(text):
    return json.loads(re.search(r'<script type="application/json" id="charts">(.*?)</script>', text, flags=re.S)[1])


@pytest.fixture
def runs(tmp_path):
    for name, lr in (("one", 1e-3), ("two", 0.1)):
        folder = make(tmp_path / "runs" / name, lr=lr, losses=np.arange(10.0))
        samples = Run(folder).samples_folder
        samples.mkdir()
        for step in (10, 20):
            (samples / f"text-{step:08d}.txt").write_text(f"said at {step} </script><b>")
            Image.fromarray(np.full((4, 4, 3), step, np.uint8)).save(samples / f"confusion-{step:08d}.png")
            (samples / f"sound-after-{step:08d}.wav").write_bytes(wav(np.sin(np.arange(800) * step / 100), 8000))
        evaluation = Run(folder).evaluation_file(20, "abc")
        write_json(evaluation, json.loads(evaluation.read_text()) | {"sums": {"confusion": [[3, 1], [0, 6]]}})
        Run(folder).log_file.write_text("step 10/30  loss 1.0  lr 1\ncontinuing from step 10: <3 workers\n")
    return tmp_path / "runs"


@pytest.fixture
def page(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert report.main([str(runs)]) == 0
    return (tmp_path / "report.html").read_text()


def test_a_page_loads_nothing_from_anywhere(page):
    links = Links()
    links.feed(page)
    assert links.found and all(link.startswith("data:") for link in links.found)
    assert "Plotly" in page and page.count("<html") == 1


def test_the_charts_of_runs_are_valid_for_plotly_and_over_every_axis(page):
    figures = pytest.importorskip("plotly.graph_objects")
    found = charts(page)
    assert {"val_loss", "val_acc", "loss"} <= {chart["layout"]["title"]["text"] for chart in found}
    for chart in found:
        traces = [{key: value for key, value in trace.items() if key not in ("over", "smooth")} for trace in chart["data"]]
        figures.Figure(data=traces, layout=chart["layout"])  # refuses what plotly does not know
    (first, second) = found[0]["data"]
    assert first["y"] == [0.9, 0.5, 0.7] and first["over"]["optimizer step"] == [10, 20, 30]
    assert first["over"]["hours of training"] == pytest.approx([0.2, 0.4, 0.6]) and second["name"] == "two"


def test_what_runs_wrote_is_shown_and_never_executed(page):
    assert "said at 20 &lt;/script&gt;&lt;b&gt;" in page and "continuing from step 10: &lt;3 workers" in page
    own = page.partition('<script type="application/json"')[0]
    assert "step 10/30" not in own and own.count("data:image/png;base64") == 4
    assert page.count("</script>") == 3
    assert "optim.lr</td><td>0.001</td><td>0.1</td><td>yes" in page


def test_sounds_of_validations_are_players_that_hold_their_sound(page):
    players = re.findall(r'<audio controls[^>]* src="data:audio/wav;base64,([^"]+)"></audio><figcaption>step (\d+)', page)
    assert [step for _, step in players] == ["10", "20"] * 2
    with wave.open(io.BytesIO(base64.b64decode(players[0][0]))) as sound:
        assert sound.getframerate() == 8000 and sound.getnframes() == 800


def scaling_page() -> str:
    losses = {3e10: (3.0458, 2.8538, 3.1927, 3.1943), 6e10: (2.6845, 2.5682, 2.8367, 3.0886), 1.2e11: (2.6262, 2.4260, 2.4662, 2.7572)}
    sizes = (2458, 5806, 15958, 50086)
    measured = [
        Measurement(budget=budget, parameters=size, tokens=budget / size / 6, loss=loss)
        for budget, row in losses.items()
        for size, loss in zip(sizes, row, strict=True)
    ]
    study = fit_study(measured)
    return page_of_study(study, "Scaling laws", describe(study, 1e12)).render()


def test_the_page_of_a_scaling_study_has_the_curves_of_each_budget_and_the_laws():
    figures = pytest.importorskip("plotly.graph_objects")
    curves, sizes, tokens = charts(scaling_page())
    assert [trace["name"] for trace in curves["data"] if trace.get("showlegend", True)] == ["3e+10 FLOPs", "6e+10 FLOPs", "1.2e+11 FLOPs"]
    assert sum(trace.get("marker", {}).get("symbol") == "star" for trace in curves["data"]) == 3
    assert "best parameters = " in sizes["layout"]["title"]["text"] and "best tokens = " in tokens["layout"]["title"]["text"]
    for chart in (curves, sizes, tokens):
        figures.Figure(data=chart["data"], layout=chart["layout"])


def test_the_table_of_classes_has_their_precision_and_recall():
    rows = class_rows([[3, 1, 0], [0, 6, 0], [0, 0, 0]], ["a", "b", "c"])
    assert rows == [["a", 4, 1.0, 0.75, 6 / 7], ["b", 6, 6 / 7, 1.0, 12 / 13], ["c", 0, None, None, None]]


def test_where_the_page_goes_is_checked(runs, tmp_path, monkeypatch):
    monkeypatch.setenv("PERCEIVER_HOME", str(tmp_path / "home"))
    for words, message in ((["--out", "x.txt"], "--out is x.txt"), (["--out", "no/x.html"], "in a folder that exists")):
        with pytest.raises(UserError, match=message):
            report.main([str(runs), *words])
    with pytest.raises(UserError, match="neither a sweep nor a run"):
        report.main(["none"])


def test_a_sweeps_page_has_its_table_curves_fields_and_failures(sweep_folder):  # noqa: F811
    trials = report.write(sweep_folder)
    text = (sweep_folder / "report.html").read_text()
    for part in ("best val_loss", "at step", "trial-3 failed: the loss became nan", "When each trial ran"):
        assert part in text
    kinds = [trace["type"] for chart in charts(text) for trace in chart["data"]]
    assert "parcoords" in kinds and "bar" in kinds and len(trials) == 4


def test_the_table_of_a_sweep_has_best_and_last_and_recommends_no_winner_that_is_not_better(sweep_folder):  # noqa: F811
    metrics = sweep_folder / "trials" / "trial-0" / "metrics.jsonl"
    metrics.write_text("".join(json.dumps({"step": s, "val_loss": v}) + "\n" for s, v in ((10, 1.4), (20, 2.5), (30, 2.6))))
    trials, settings = report.read_trials(sweep_folder), report.read_settings(sweep_folder)
    lines = report.table(trials, settings)
    assert lines[0].split() == ["trial", "best", "val_loss", "at", "step", "last", "step", "status", "optim.lr"]
    assert lines[1].split()[1:6] == ["trial-0", "1.4000", "10", "2.6000", "30"]
    assert any("not better" in line for line in lines) and not any("winner at full length" in line for line in lines)
    better = report.table(trials, {**settings, "default": {"optim.lr": 12.0}})
    assert any("winner at full length" in line for line in better), "nothing is known against it"


def test_parallel_coordinates_are_logarithmic_where_values_are_far_apart_and_by_name_where_they_are_none():
    columns = {"lr": [1e-4, 1e-2, 1e-3], "kind": ["b", "a", None], "n": [1, 2, 3]}
    lr, kind, n, result = parallel_coordinates(columns, [3.0, 1.0, 2.0], "loss", True)["dimensions"]
    assert lr["values"] == pytest.approx([-4, -2, -3]) and lr["ticktext"] == ["0.0001", "0.001", "0.01"]
    assert kind["ticktext"] == ["None", "a", "b"] and kind["values"] == [2, 1, 0]
    assert n["values"] == [1, 2, 3] and result["label"] == "loss"


def test_the_field_that_decides_is_the_most_important():
    rng = np.random.default_rng(0)
    lr, noise = 10 ** rng.uniform(-4, -1, 40), rng.uniform(0, 1, 40)
    found, how = importances({"lr": lr.tolist(), "noise": noise.tolist()}, np.log10(lr).tolist())
    assert how and abs(found["lr"]) > 2 * abs(found["noise"])


def test_lines_have_colours_of_their_own_until_there_are_too_many():
    assert len({color(i) for i in range(len(COLORS))}) == len(COLORS) and color(99) == color(100)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
@pytest.mark.parametrize("kind", ["runs", "sweep", "scaling"])
def test_every_chart_is_drawn_in_a_browser_without_an_error(kind, page, sweep_folder, tmp_path):  # noqa: F811
    if kind == "sweep":
        report.write(sweep_folder)
        page = (sweep_folder / "report.html").read_text()
    elif kind == "scaling":
        page = scaling_page()
    watched = page.replace(
        "<head>", "<head><script>window.onerror = console.error = text => { document.title = 'error: ' + text }</script>", 1
    )
    (tmp_path / "watched.html").write_text(watched)
    command = ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'chromium'}", "--dump-dom"]
    command += ["--virtual-time-budget=20000", f"file://{tmp_path / 'watched.html'}"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout
    assert "<title>error" not in shown
    drawn = [part.split(">", 1)[0] for part in shown.split('<div class="chart')[1:]]
    assert len(drawn) == len(charts(page)) and all("js-plotly-plot" in each for each in drawn)


def test_a_page_without_charts_is_one(tmp_path):
    page = Page("a & b")
    page.table(["n"], [[float("nan")], [1234567], [0.5], [None], [True]])
    text = page.render()
    assert "<title>a &amp; b</title>" in text and charts(text) == [] and 'data-value="1234567">1,234,567<' in text

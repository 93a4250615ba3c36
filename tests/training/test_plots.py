"""What pictures show: the axes, lines, texts and marks that are in them (perceiver/plots.py)."""

import io
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from perceiver.plots import confusion_matrix, frame, log_scale, new_figure, pixels, png, training_curves

RECORDS = [
    {"step": 1, "loss": 20.0},
    {"step": 2, "loss": math.nan},
    {"step": 3, "loss": 2.0, "val_loss": 3.0, "val_acc": 0.5},
    {"step": 6, "loss": 1.0, "val_loss": 4.0, "val_acc": 0.7},
]


def shown(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def line(axes, name):
    return [tuple(map(float, point)) for point in next(line for line in axes.lines if line.get_label() == name).get_xydata()]


def test_loss_curves_name_their_axes_and_lines_and_mark_the_best_checkpoint():
    (axes,) = training_curves(RECORDS, "a run", "val_loss", best_step=3).axes
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_yscale()) == ("optimizer step", "loss (log scale)", "log")
    assert shown(axes) == ["training", "validation", "best checkpoint: step 3, by val_loss"]
    assert line(axes, "training") == [(1, 20), (3, 2), (6, 1)] and line(axes, "validation") == [(3, 3), (6, 4)]
    assert [line.get_xydata().tolist() for line in axes.lines if line.get_marker() == "*"] == [[[3, 3]]]


def test_the_metric_that_chooses_the_best_checkpoint_has_axes_of_its_own():
    loss, accuracy = training_curves(RECORDS, "a run", "val_acc", best_step=6).axes
    assert (accuracy.get_ylabel(), accuracy.get_yscale(), accuracy.get_xlabel()) == ("acc", "linear", "optimizer step")
    assert line(accuracy, "validation") == [(3, 0.5), (6, 0.7)]
    stars = [[line.get_xydata().tolist() for line in axes.lines if line.get_marker() == "*"] for axes in (loss, accuracy)]
    assert stars == [[[[6, 4]]], [[[6, 0.7]]]]


@pytest.mark.parametrize("records", [[], RECORDS[:1], RECORDS[1:2], [{"step": 1, "val_loss": 0.0}]])
def test_a_run_of_hardly_any_record_has_a_picture(records):
    figure = training_curves(records, "short")
    assert Image.open(io.BytesIO(png(figure))).size == (720, 400)
    assert figure.axes[0].get_yscale() == "linear"


def test_a_confusion_matrix_has_each_count_in_its_cell_and_the_classes_by_name():
    counts = np.array([[5, 1, 0], [2, 30, 4], [0, 0, 0]])
    axes = confusion_matrix(counts, ["under $5", "over $5", "free"]).axes[0]
    assert {text.get_position(): text.get_text() for text in axes.texts} == {
        (0, 0): "5", (1, 0): "1", (0, 1): "2", (1, 1): "30", (2, 1): "4",
    }  # fmt: skip
    for ticks in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [text.get_text().replace(r"\$", "$") for text in ticks] == ["under $5", "over $5", "free"]
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("true class", "predicted class")
    assert "83.3% of 42" in axes.get_title()


def test_texts_of_a_user_are_drawn_as_they_are():
    """Between dollar signs matplotlib reads formulas, and this would be an incomplete one."""
    figure = confusion_matrix(np.eye(2), [r"a$\frac$", "b"])
    frame(figure.axes[0], r"$\frac$")
    assert pixels(figure).std() > 0


def test_threads_draw_the_same_pictures_as_one():
    def draw(n):
        return pixels(confusion_matrix(np.full((n, n), 7), [f"class {i}" for i in range(n)]))

    alone = {n: draw(n) for n in (2, 3, 4)}
    with ThreadPoolExecutor(4) as pool:
        for n, picture in zip([2, 3, 4] * 3, pool.map(draw, [2, 3, 4] * 3), strict=True):
            assert picture.dtype == np.uint8 and picture.shape[2] == 3
            np.testing.assert_array_equal(picture, alone[n])


@pytest.mark.parametrize(
    "low, high, expected",
    [(3e4, 2e6, ["5e4", "1e5", "2e5", "5e5", "1e6", "2e6"]), (1, 1e5, ["1", "10", "100", "1e3", "1e4", "1e5"])],
)
def test_logarithmic_axes_have_few_short_numbers(low, high, expected):
    axes = new_figure(400, 400).subplots()
    axes.plot([low, high], [low, high])
    log_scale(axes, "x", "y")
    axes.set_xlim(low, high)
    axes.figure.canvas.draw()
    labels = [label.get_text() for value, label in zip(axes.get_xticks(), axes.get_xticklabels(), strict=True) if low <= value <= high]
    assert labels == expected


def test_shares_are_never_on_a_logarithmic_axis_and_other_metrics_that_are_far_apart_are():
    values = [(1, 0.03), (2, 0.9), (3, 1.0)]
    for metric, scale, factor in (("val_acc", "linear", 1), ("val_perplexity", "log", 100)):
        records = [{"step": step, metric: factor * value} for step, value in values]
        assert training_curves(records, "a run", metric).axes[1].get_yscale() == scale


@pytest.mark.parametrize("names", ["0123456789", ["short", "a very long name of a class"]])
def test_nothing_of_a_confusion_matrix_is_cut_off(names):
    figure = confusion_matrix(np.eye(len(names), dtype=int), list(names))
    pixels(figure)
    width, height = figure.canvas.get_width_height()
    for axes in figure.axes:
        for text in (axes.title, axes.xaxis.label, axes.yaxis.label, *axes.get_xticklabels(), *axes.get_yticklabels()):
            box = text.get_window_extent()
            assert not text.get_text() or (0 <= box.x0 and box.x1 <= width and 0 <= box.y0 and box.y1 <= height), text

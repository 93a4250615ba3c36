"""`perceiver data`: what it says of pictures, tables and texts, and that its commands are right."""

import csv
import shlex

import pytest

from perceiver.config import UserError
from ray_jobs.cli import parse_experiment
from ray_jobs.data import look
from tests.data.test_picture_folders import picture, split_folder


def command(lines, name):
    """The experiment of a command that is offered."""
    words = shlex.split(next(line for line in lines if line.startswith(name)).partition(":")[2])
    assert words[:2] == ["perceiver", name.replace("prepare", "preprocess")]
    return parse_experiment(words[2:], "ray_jobs.train")


def test_of_pictures_it_says_classes_sizes_and_what_is_new_in_validation(tmp_path):
    folder = split_folder(tmp_path / "in")
    picture(folder / "val" / "green" / "1.png", "red", 5, size=(9, 8))
    lines = look(str(folder))
    assert "pictures: 8 x 8 to 8 x 9, 2 sizes; 0 grey, 19 in colour" in lines
    assert "classes in train: blue (6), red (6)" in lines and "  not in train: green" in lines
    assert command(lines, "train").task.class_names == ("blue", "red")


def test_of_a_table_it_says_columns_labels_lengths_and_duplicates(tmp_path):
    with open(tmp_path / "in.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "review", "stars"])
        writer.writerows([i, "a" * 300 if i % 4 else "same", 1 + i % 3] for i in range(12))
    lines = look(str(tmp_path / "in.csv"))
    assert "12 rows, columns:" in lines and "classes in 'stars': 1 (4), 2 (4), 3 (4)" in lines
    assert "longer than 254 bytes (txt-clf's context): 9 of 12; 414 bytes would be cut" in lines and "duplicates: 10" in lines
    chosen = command(lines, "train")
    assert chosen.task.class_names == ("1", "2", "3") and chosen.data.text_column == "review"
    with pytest.raises(UserError, match=r"--label-column is 'star', which .* does not have \(it has: id, review, stars\)"):
        look(str(tmp_path / "in.csv"), label="star")


def test_of_texts_without_classes_it_offers_a_language_model(tmp_path):
    (tmp_path / "a.txt").write_text("a quiet evening")
    assert command(look(str(tmp_path)), "prepare").preset == "clm-wikitext-small"


def test_nothing_that_is_known_is_named(tmp_path):
    (tmp_path / "a.xyz").write_text("?")
    with pytest.raises(UserError, match="has no pictures, sounds, texts, tables or MIDI files"):
        look(str(tmp_path))

"""Symbolic audio: events as the reference has them, MIDI files of all sorts, windows of one performance, and augmentation."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from perceiver.config import Experiment, OptimConfig, TrainingConfig, UserError
from perceiver.data.midi import PAD, TIME_SHIFT, VELOCITY, Note, NotMidi, Pedal, decode, encode, read_midi, sustained, write_midi
from perceiver.data.shards import read_block
from perceiver.inference.__main__ import main as inference
from perceiver.inference.play import main as play
from perceiver.inference.trained import TrainedModel
from perceiver.models import PerceiverARConfig, build_model
from perceiver.tasks import build_task
from perceiver.tasks.base import IGNORE_INDEX
from perceiver.tasks.symbolic_audio import SymbolicAudioConfig, longest_run, louder, stretched, transposed
from perceiver.training.batches import make_val_loaders, read_here
from perceiver.training.metrics import evaluate
from perceiver.training.parallel import join_world
from perceiver.training.run import build_state
from ray_jobs.preprocess import prepare
from tests.support.preparing import load_prepared, serially

T, LATENTS = 32, 8


@pytest.fixture(scope="session")
def golden(shared):
    return json.loads((shared / "golden/midi_events.json").read_text())


def test_events_are_those_of_the_reference(golden):
    notes = [Note(*note) for note in golden["notes_velocity_pitch_start_end"]]
    assert encode(notes).tolist() == golden["expected_ids_without_pedal"]


def test_the_pedal_lengthens_notes_as_in_the_reference_and_none_is_lost_after_its_last_release(golden):
    """The reference drops the notes that start after the last release."""
    notes = [Note(*note) for note in golden["notes_velocity_pitch_start_end"]]
    pedals = [Pedal(value, time) for _, value, time in golden["sustain_pedal_number_value_time"]]
    ids = encode(notes, pedals).tolist()
    expected = golden["expected_ids_with_pedal"]
    assert ids[: len(expected)] == expected
    assert len(decode(ids)) == len(notes)


def test_decoded_notes_are_those_of_the_reference(golden):
    expected = sorted((Note(*note) for note in golden["expected_notes_after_decoding_ids_without_pedal"]), key=lambda n: (n.start, n.pitch))
    found = decode(golden["expected_ids_without_pedal"])
    assert [(n.velocity, n.pitch) for n in found] == [(n.velocity, n.pitch) for n in expected]
    for name in ("start", "end"):
        np.testing.assert_allclose([getattr(n, name) for n in found], [getattr(n, name) for n in expected], atol=golden["time_atol_s"])


def test_a_pedal_that_never_comes_up_holds_to_the_end():
    notes = [Note(64, 60, 1.0, 1.5), Note(64, 64, 2.0, 9.0)]
    assert [note.end for note in sustained(notes, [Pedal(100, 0.5)])] == [9.0, 9.0]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, PAD - 1), max_size=80))
def test_any_events_become_a_file_that_reads_as_the_same_notes(ids):
    notes = decode(ids)
    if not notes:
        return
    again = decode(read_midi(write_midi(ids)))
    assert [n.pitch for n in again] == [n.pitch for n in notes]
    starts = ([n.start for n in again], [n.start for n in notes])
    np.testing.assert_allclose(*starts, atol=0.011 * len(notes))  # each event's time is rounded anew


def performance(seed: int, num: int = 60) -> list[Note]:
    rng = np.random.default_rng(seed)
    starts = np.cumsum(rng.integers(5, 120, num)) / 100
    return [
        Note(int(v), int(p), float(s), float(s + d))
        for v, p, s, d in zip(rng.integers(8, 120, num), rng.integers(30, 90, num), starts, rng.uniform(0.1, 0.9, num), strict=True)
    ]


BAD = {
    "no MIDI": b"<html>not found</html>",
    "damaged MIDI": write_midi(encode(performance(0)))[:60],
    "no notes": write_midi([]),
    "type 2": b"MThd\0\0\0\6\0\2" + write_midi(encode(performance(0)))[10:],
}


@pytest.mark.parametrize("reason", BAD)
def test_a_file_that_is_no_performance_is_named_with_its_reason(reason):
    with pytest.raises(NotMidi) as error:
        read_midi(BAD[reason])
    assert error.value.reason == reason
    assert pytest.raises(NotMidi, read_midi, b"").value.args == ("is empty",)


def test_a_file_that_is_cut_off_is_said_to_end_too_early():
    whole = write_midi(encode(performance(0)))
    with pytest.raises(NotMidi, match="it ends too early"):
        read_midi(whole[: len(whole) // 2])


def test_running_status_is_read():
    """A second note without a status byte of its own, as many files are written."""
    track = b"\0\x90\x3c\x40" + b"\x60\x3c\0" + b"\0\x40\x40" + b"\x60\x40\0" + b"\0\xff\x2f\0"
    data = b"MThd\0\0\0\6\0\0\0\1\0\x60" + b"MTrk" + len(track).to_bytes(4, "big") + track
    assert [(n.pitch, n.start, n.end) for n in decode(read_midi(data))] == [(60, 0.0, 0.5), (64, 0.5, 1.0)]


# ---------------------------------------------------------------------------------------------------------------- training


def music_experiment(tmp_path, **task) -> Experiment:
    model = PerceiverARConfig(
        vocab_size=389, max_seq_len=T, max_latents=LATENTS, num_channels=16, num_heads=2, num_self_attention_layers=1, abs_pos_emb=False
    )
    task, training = SymbolicAudioConfig(**{"sample_tokens": 8} | task), TrainingConfig(global_batch_size=4)
    base = Experiment(preset="music", task=task, model=model, optim=OptimConfig(lr=1e-2), training=training)
    data = replace(base.data, source=str(tmp_path / "midi"), root=str(tmp_path / "data"), rows_per_block=4, blocks_per_shard=3)
    return replace(base, data=data)


@pytest.fixture
def pieces(tmp_path, monkeypatch):
    """Performances in files, of lengths at and beside the borders of rows, prepared; with those of validation."""
    serially(monkeypatch)
    folder = tmp_path / "midi"
    folder.mkdir()
    found = {}
    for i, num in enumerate((40, 61, 20, 35, 9, 12)):
        split = "validation" if i % 2 else "train"
        found[f"piece-{i}.mid"] = split
        (folder / f"piece-{i}.mid").write_bytes(write_midi(encode(performance(i, num))))
    (folder / "index.csv").write_text("composer,split,midi_filename\n" + "".join(f"x,{s},{n}\n" for n, s in found.items()))
    return {s: [read_midi((folder / n).read_bytes()) for n, split in found.items() if split == s] for s in found.values()}


@pytest.mark.parametrize("stride", [LATENTS, None])
def test_validation_scores_each_event_once_and_shows_no_other_performance(tmp_path, pieces, stride):
    """All events but each performance's first are targets, where windows are max_latents apart; else the last of each window."""
    experiment = music_experiment(tmp_path, val_stride=stride)
    prepare(experiment)
    folder, manifest = load_prepared(experiment)
    task = build_task(experiment)
    (_, loader), = make_val_loaders(experiment, task, folder, manifest)  # fmt: skip
    targets = []
    texts = [events.tobytes() for events in pieces["validation"]]
    for micro_batches in loader.steps(read_here, 0, 1, 0, loader.order.steps_per_epoch):
        for batch in micro_batches:
            padding = batch.get("pad_mask", torch.zeros_like(batch["ids"], dtype=torch.bool))
            for ids, hidden, labels in zip(batch["ids"], padding, batch["labels"], strict=True):
                valid = labels != IGNORE_INDEX
                if valid.any():
                    seen = ids[~hidden].numpy().astype(np.uint16)
                    assert PAD not in seen and any(seen.tobytes() in text for text in texts)
                    targets += labels[valid].tolist()
    if stride is not None:
        assert sorted(targets) == sorted(int(event) for events in pieces["validation"] for event in events[1:])
    else:
        assert len(targets) == sum(min(LATENTS, n - 1) for events in pieces["validation"] for n in _windows(len(events)))


def _windows(num: int) -> list[int]:
    """Events of each row's window of a performance: the first row begins with an id that marks it."""
    return [min(T, num), *(min(T + 1, num + 1 - first) for first in range(T, num + 1, T))]


def test_training_windows_hold_one_performance_in_all_epochs(tmp_path, pieces):
    experiment = music_experiment(tmp_path, random_shift=True)
    prepare(experiment)
    folder, manifest = load_prepared(experiment)
    task, split = build_task(experiment), manifest.splits["train"]
    texts = [events.tobytes() for events in pieces["train"]]
    for epoch in range(3):
        for block in range(split.num_blocks):
            rows = task.examples(read_block(folder, split, block), split, block * split.rows_per_block, epoch, True)
            for row in rows.to_pylist():
                events = np.array(row["tokens"][: row["length"]], np.uint16)
                assert PAD not in events and any(events.tobytes() in text for text in texts)


def test_the_table_beside_the_files_says_what_is_for_validation(tmp_path, pieces):
    experiment = music_experiment(tmp_path)
    prepare(experiment)
    _, manifest = load_prepared(experiment)
    assert {name: split.documents for name, split in manifest.splits.items()} == {"train": 3, "val": 3}
    assert manifest.splits["val"].words == sum(len(decode(events)) for events in pieces["validation"])


def test_the_baseline_is_that_of_single_events_and_a_validation_writes_a_midi_file(tmp_path, pieces):
    experiment = music_experiment(tmp_path, val_stride=LATENTS)
    prepare(experiment)
    folder, manifest = load_prepared(experiment)
    task, world = build_task(experiment), join_world(torch.device("cpu"))
    guess = task.guess(manifest, manifest)
    counts = np.ones(PAD) + sum(np.bincount(events, minlength=PAD) for events in pieces["train"])
    held_out = np.concatenate(pieces["validation"])
    assert task.metrics(guess.sums, manifest.splits["val"])["loss"] == pytest.approx(
        -np.log(counts / counts.sum())[held_out].mean(), rel=1e-5
    )
    model = build_state(experiment, task, world).model
    metrics, sums, split = evaluate(task, model, make_val_loaders(experiment, task, folder, manifest), world, read_here)
    assert metrics["val_bits_per_event"] == pytest.approx(metrics["val_loss"] / np.log(2))
    picture, file = task.samples(model, sums, split)
    assert picture.image.ndim == 3 and len(read_midi(file.file)) > 0


def test_a_model_plays_on_from_a_file_the_same_for_the_same_seed(tmp_path, pieces, capsys):
    experiment = music_experiment(tmp_path)
    model = build_model(experiment.model).eval()
    trained = TrainedModel(model=model, config=experiment.model, task=experiment.task)
    prompt = tmp_path / "midi/piece-0.mid"
    events = trained.play(prompt, max_new_tokens=20, seed=1)
    assert events[:-20].tolist() == read_midi(prompt.read_bytes()).tolist()
    assert (trained.play(prompt, max_new_tokens=20, seed=1) == events).all()
    assert len(trained.play(max_new_tokens=5)) == 6
    trained.export(tmp_path / "exported")
    assert play([str(tmp_path / "exported"), str(prompt), "--out", str(tmp_path / "on.mid"), "--events", "20", "--seed", "1"]) == 0
    assert read_midi((tmp_path / "on.mid").read_bytes())[:50].tolist() == read_midi(write_midi(events))[:50].tolist()
    assert inference([str(tmp_path / "exported")]) == 2
    assert f"run `perceiver play {tmp_path}/exported`" in capsys.readouterr().err
    for words, message in (
        (["--out", "x.txt"], "--out x.txt must end in .mid"),
        (["nowhere.mid", "--out", str(tmp_path / "x.mid")], "the prompt nowhere.mid cannot be read"),
    ):
        assert play([str(tmp_path / "exported"), *words]) == 2 and message in capsys.readouterr().err


def test_a_file_that_is_no_performance_stops_a_preparation_or_is_left_out_and_counted(tmp_path, pieces):
    (tmp_path / "midi/broken.mid").write_bytes(BAD["no MIDI"])
    with open(tmp_path / "midi/index.csv", "a") as table:
        table.write("x,train,broken.mid\n")
    experiment = music_experiment(tmp_path)
    with pytest.raises(UserError, match=r"midi/broken.mid is no MIDI file \(--data.on-error skip"):
        prepare(experiment)
    skipping = replace(experiment, data=replace(experiment.data, on_error="skip"))
    prepare(skipping)
    assert load_prepared(skipping)[1].stats["skipped"] == {"no MIDI": 1}


# ------------------------------------------------------------------------------------------------------------ augmentation


def test_transposed_notes_keep_their_distances_and_stay_in_range():
    events = encode(performance(3))
    for semitones in (5, -5, 100, -100):
        before, after = decode(events), decode(transposed(events, semitones))
        steps = {b.pitch - a.pitch for a, b in zip(sorted(before, key=lambda n: (n.start, n.pitch)), after, strict=True)}
        assert len(steps) == 1 and 0 < abs(steps.pop()) <= abs(semitones)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 50), st.floats(0.5, 2))
def test_stretched_events_are_the_same_notes_in_another_time(seed, factor):
    events = encode(performance(seed, 20))
    after = stretched(events, factor)
    rest = lambda ids: [e for e in ids if not TIME_SHIFT <= e < VELOCITY]  # noqa: E731
    passed = lambda ids: sum(int(e) - TIME_SHIFT + 1 for e in ids if TIME_SHIFT <= e < VELOCITY)  # noqa: E731
    assert rest(after) == rest(events)
    assert passed(after) == pytest.approx(passed(events) * factor, abs=0.51)
    assert (stretched(events, 1.0) == events).all()


def test_louder_events_differ_in_loudness_alone():
    events = encode(performance(1))
    after = louder(events, 3)
    loud = events >= VELOCITY
    assert (after[~loud] == events[~loud]).all()
    assert (after[loud] == np.minimum(events[loud] + 3, PAD - 1)).all()


def test_augmentation_is_a_function_of_seed_epoch_and_row(tmp_path):
    task = build_task(music_experiment(tmp_path, transpose=3, stretch=0.05, loudness=2))
    events = encode(performance(2))
    first = task._augmented(events, 5, 1)
    assert (first == task._augmented(events, 5, 1)).all()
    others = [task._augmented(events, row, epoch) for row, epoch in ((6, 1), (5, 2), (7, 3))]
    assert any(len(o) != len(first) or (o != first).any() for o in others)


def test_of_a_window_across_a_border_the_longer_part_counts():
    assert longest_run(np.array([1, 2, PAD, PAD, 3, 4, 5])) == (4, 7)
    assert longest_run(np.array([PAD, PAD])) == (0, 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"transpose": -1}, "task.transpose is -1 and must be from 0 to 24"),
        ({"stretch": 0.9}, "task.stretch is 0.9 and must be from 0 to 0.5"),
        ({"sample_prompt": "nowhere.mid"}, "task.sample-prompt nowhere.mid cannot be read"),
    ],
)
def test_settings_out_of_range_are_refused(tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        build_task(music_experiment(tmp_path, **settings)).check()

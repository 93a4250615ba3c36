"""Tables of floats to train on by command line alone, and what simple models reach on them.

    python -m benchmarks.tables_of_floats FOLDER
    perceiver train tables --data.source FOLDER/waves --task.targets frequency
    perceiver train table-heads --data.source FOLDER/waves --task.heads kind=classes frequency=gaussian*0.5
    perceiver train tables --data.source FOLDER/segments --task.targets state --task.loss positions --model.num-latents 32

`waves`: a damped wave of 48 samples (a list), three gains (a list of fixed size) and a temperature a row; its frequency, and whether it
is a sine, a square or a triangle. `segments`: a signal of 64 samples that is a sine, a square and noise one after another in any order;
which of them at each sample (-1: not said). `new-waves.parquet` and `new-segments.parquet` are without targets.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

Columns = dict[str, np.ndarray]
KINDS = np.array(["sine", "square", "triangle"])
AROUND = 4
"""Samples on either side of one that the simple model of segments sees."""


def waves(number: int, rng: np.random.Generator) -> Columns:
    time = np.arange(48) / 48
    kind, frequency, damping = rng.integers(0, 3, number), rng.uniform(1, 8, number), rng.uniform(0.2, 2, number)
    phase, gain, temperature = rng.uniform(0, 2 * np.pi, number), rng.uniform(0.5, 2, (number, 3)), rng.normal(20, 3, number)
    angle = 2 * np.pi * frequency[:, None] * time + phase[:, None]
    sine, which = np.sin(angle), kind[:, None]
    wave = np.where(which == 0, sine, np.where(which == 1, np.sign(sine), 2 / np.pi * np.arcsin(sine)))
    signal = gain[:, :1] * wave * np.exp(-time / damping[:, None]) + rng.normal(0, 0.05, wave.shape)
    found = {"signal": signal, "gain": gain, "temperature": temperature, "frequency": frequency}
    return {name: values.astype(np.float32) for name, values in found.items()} | {"kind": KINDS[kind]}


def segments(number: int, rng: np.random.Generator) -> Columns:
    time, signals, states = np.arange(64), [], []
    for _ in range(number):
        cuts, order = np.sort(rng.choice(np.arange(8, 56), 2, replace=False)), rng.permutation(3)
        state = order[np.searchsorted(cuts, time, side="right")]
        frequency, phase = rng.uniform(0.08, 0.2), rng.uniform(0, 6.28)
        sine = np.sin(2 * np.pi * frequency * time + phase)
        parts = np.stack([sine, np.sign(sine), rng.normal(0, 0.7, 64)])
        signals.append(parts[state, time] + rng.normal(0, 0.1, 64))
        states.append(np.where(rng.random(64) < 0.05, -1, state))
    return {"signal": np.array(signals, np.float32), "state": np.array(states, np.int16)}


def table(columns: Columns, lists: tuple[str, ...] = ()) -> pa.Table:
    """Arrays of two axes as lists, those of `lists` as lists of any size."""
    found = {}
    for name, values in columns.items():
        if values.ndim == 1:
            found[name] = pa.array(values)
            continue
        fixed = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])
        found[name] = fixed.cast(pa.list_(fixed.type.value_type)) if name in lists else fixed
    return pa.table(found)


def classified(x: np.ndarray, y: np.ndarray, new: np.ndarray) -> np.ndarray:
    """The classes that logistic regression by L-BFGS gives to new rows, features normalised, with a penalty of 1 / (2 rows)."""
    mean, scale = x.mean(0), x.std(0) + 1e-6
    inputs, labels = torch.from_numpy((x - mean) / scale).double(), torch.from_numpy(y).long()
    weights = torch.zeros(x.shape[1] + 1, int(y.max()) + 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=300, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = torch.nn.functional.cross_entropy(inputs @ weights[1:] + weights[0], labels) + weights[1:].square().sum() / (2 * len(x))
        value.backward()
        return value

    optimizer.step(loss)
    with torch.no_grad():
        return (torch.from_numpy((new - mean) / scale).double() @ weights[1:] + weights[0]).argmax(-1).numpy()


def around(signal: np.ndarray) -> np.ndarray:
    """Of each sample its neighbours, their sizes and squares: (samples of all rows, features)."""
    wide = np.pad(signal, ((0, 0), (AROUND, AROUND)), mode="edge")
    near = np.stack([wide[:, i : i + signal.shape[1]] for i in range(2 * AROUND + 1)], -1)
    return np.concatenate([near, np.abs(near), near**2], -1).reshape(-1, 3 * near.shape[-1])


def simple_waves(train: Columns, val: Columns) -> None:
    def flat(columns: Columns) -> np.ndarray:
        return np.concatenate([columns["signal"], columns["gain"], columns["temperature"][:, None], np.ones((len(columns["gain"]), 1))], 1)

    weights, *_ = np.linalg.lstsq(flat(train), train["frequency"], rcond=None)
    print(f"frequency, linear regression: mean absolute error {np.abs(flat(val) @ weights - val['frequency']).mean():.4f}")
    said = classified(flat(train)[:, :-1], np.searchsorted(KINDS, train["kind"]), flat(val)[:, :-1])
    print(f"kind, logistic regression: accuracy {(KINDS[said] == val['kind']).mean():.4f}")


def simple_segments(train: Columns, val: Columns) -> None:
    truth, rows = train["state"][:1500].ravel(), around(train["signal"][:1500])
    said, true = classified(rows[truth >= 0], truth[truth >= 0], around(val["signal"])), val["state"].ravel()
    said, true = said[true >= 0], true[true >= 0]
    union = [((said == k) & (true == k)).sum() / ((said == k) | (true == k)).sum() for k in range(3)]
    print(f"state, logistic regression on nine samples: accuracy {(said == true).mean():.4f}, mean IoU {np.mean(union):.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    for name, make, sizes, simple in (("waves", waves, (5000, 1000), simple_waves), ("segments", segments, (6000, 1000), simple_segments)):
        rng = np.random.default_rng(0 if name == "waves" else 1)
        (folder / name).mkdir(parents=True, exist_ok=True)
        train, val, new = (make(size, rng) for size in (*sizes, 200))
        lists = ("signal",) if name == "waves" else ()
        for split, columns in (("train", train), ("val", val)):
            pq.write_table(table(columns, lists), folder / name / f"{split}.parquet")
        given = {key: values for key, values in new.items() if key not in ("frequency", "kind", "state")}
        pq.write_table(table(given, lists), folder / f"new-{name}.parquet")
        simple(train, val)


if __name__ == "__main__":
    main()

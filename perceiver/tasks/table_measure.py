"""What tasks on tables measure of the training split: means and deviations of inputs and targets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
import pyarrow as pa

from perceiver.config import ModelConfig
from perceiver.data.rows import ArrayRows
from perceiver.tasks.moments import Moments
from perceiver.tasks.table_classes import class_numbers
from perceiver.tasks.table_positions import shares
from perceiver.tasks.table_task import TableSettings, flat, input_of

S = TypeVar("S", bound=TableSettings)


def measured(settings: Sequence[S], numbers: Sequence[int], model: ModelConfig, rows: ArrayRows, blocks: Iterator[pa.Table]) -> list[S]:
    """Settings of one target or several with the moments of the training split.

    Args:
        settings: of each target, or group of targets.
        numbers: classes of each, where it has classes; else numbers to predict.
        rows: the columns of all.
        blocks: all blocks of the split.
    """
    table = input_of(model)
    inputs = {cells.name: Moments(cells.channels) for cells in table.numbers()}
    targets = [Moments(number) for number in numbers]
    for block in blocks:
        arrays = rows.arrays(block)
        for name, moments in inputs.items():
            moments.add(arrays[name].reshape(-1, moments.size))
        for own, moments in zip(settings, targets, strict=True):
            if own.loss == "classes":
                moments.add(np.eye(moments.size)[class_numbers(own, block)])
            elif own.loss == "positions":
                moments.add(shares(own, arrays, block.num_rows, moments.size))
            else:
                moments.add(flat(arrays, own.targets, block.num_rows))
    return [
        replace(
            own.counted(target.mean.tolist()) if own.loss == "classes" else own,
            input_mean=tuple(value for moments in inputs.values() for value in moments.mean.tolist()),
            input_scale=tuple(value for moments in inputs.values() for value in moments.scale.tolist()),
            target_mean=tuple(target.mean.tolist()),
            target_scale=tuple(target.scale.tolist()),
        )
        for own, target in zip(settings, targets, strict=True)
    ]

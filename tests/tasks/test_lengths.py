"""Lengths of windows in multiples: few different ones, the same draws as without, the same rows."""

from dataclasses import replace

import numpy as np
import pytest

from perceiver.config import UserError
from perceiver.presets import PRESETS
from perceiver.tasks import build_task


def c4(multiple=1, shortest=512):
    base = PRESETS["clm-c4"]()
    return build_task(replace(base, task=replace(base.task, seq_len_multiple=multiple, min_seq_len=shortest)))


def lengths(task, steps=1000):
    return np.array([task._length(step) for step in range(steps)])


def test_lengths_are_the_drawn_ones_rounded_down_to_the_multiple_and_the_mean_is_theirs():
    plain, rounded = lengths(c4()), lengths(c4(64))
    assert np.array_equal(rounded, plain // 64 * 64)
    assert set(rounded) == set(range(512, 1025, 64)) and len(set(plain)) > 400
    assert c4(64).throughput_unit()[1] == pytest.approx(rounded.mean(), rel=0.02)
    assert c4().throughput_unit()[1] == (512 + 1024) // 2
    assert c4(64).flops_per_example() < c4().flops_per_example()


def test_no_length_is_below_the_shortest():
    found = lengths(c4(64, shortest=530))
    assert found.min() == 530 and set(found) <= {530, *range(576, 1025, 64)}


@pytest.mark.parametrize(("multiple", "shortest"), [(0, 512), (-64, 512), (2048, 512), (64, None)])
def test_a_multiple_that_cannot_be_is_refused(multiple, shortest):
    with pytest.raises(UserError, match=f"task.seq-len-multiple is {multiple} and must be"):
        c4(multiple, shortest).check()

"""Packed equals unpacked: sharing a row changes neither loss nor gradients."""

import functools

import jax
import numpy as np
import pytest

from tests.small_runs import EXACT, MODEL, VIEWS, Weights, segment
from vlm_jax.train import state as states
from vlm_jax.train.step import loss_and_gradients, split_micro_batches

SAMPLES = [(9, 1), (7, 0), (8, 1), (12, 2), (10, 0), (6, 1)]  # (slots, images) of each
ROWS = [[0, 1, 2], [3, 4], [5]]


def lay_out(groups, slots=24, rows=6):
    """The samples as rows that hold those of each group, filled up with empty rows."""
    made = []
    for group in groups + [[]] * (rows - len(groups)):
        row = {k: np.zeros(slots, np.int32) for k in ("tokens", "image_slots", "targets", "segments", "positions")}
        row["image_slots"] -= 1
        row |= {"weights": np.zeros(slots, np.float32), "images": np.zeros((VIEWS, 28, 28, 3), np.uint8)}
        at = view = 0
        for number, index in enumerate(group, 1):
            rng, (length, views) = np.random.default_rng(index), SAMPLES[index]
            for key, value in segment(rng, length, views, view).items():
                row[key][at : at + length] = value
            row["segments"][at : at + length] = number
            row["images"][view : view + views] = rng.integers(0, 256, (views, 28, 28, 3))
            at, view = at + length, view + views
        made.append(row)
    return split_micro_batches({k: np.stack([row[k] for row in made]) for k in made[0]}, 1)


@functools.cache
def evaluate():
    params = Weights().arrays
    chosen = states.select(EXACT.trainable, params)
    trainable, frozen = ({k: v for k, v in params.items() if (k in chosen) == side} for side in (True, False))
    run = jax.jit(functools.partial(loss_and_gradients, MODEL, EXACT))
    return lambda rows: run(trainable, frozen, lay_out(rows))


@pytest.mark.parametrize("groups", [ROWS, [[2, 1, 0], [5], [4, 3]], [[5, 0], [1, 3], [2, 4]]], ids=str)
def test_packed_equals_unpacked(groups):
    alone, sums = evaluate()([[i] for i in range(len(SAMPLES))])
    packed, packed_sums = evaluate()(groups)
    assert float(packed_sums["tokens"]) == float(sums["tokens"]) == 20
    assert abs(float(packed_sums["loss"]) - float(sums["loss"])) < 1e-5
    for path, gradient in alone.items():
        np.testing.assert_allclose(packed[path], gradient, atol=1e-5, err_msg=path)


def test_the_samples_of_a_row_matter():
    """The comparison above could fail: another sample in the row changes the loss."""
    assert abs(float(evaluate()(ROWS)[1]["loss"]) - float(evaluate()([[0, 1], [3, 4], [5]])[1]["loss"])) > 1e-4

"""Contract 4, the plan: every sample once per epoch, within the budgets, a pure function of its arguments."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.bench import packing as packing_bench
from vlm_jax.data.packing import first_fit_decreasing, permutation, plan

T, VIEWS = 50, 4
LENGTHS = st.lists(st.tuples(st.integers(1, T), st.integers(0, VIEWS)), max_size=150)


@settings(max_examples=150)
@given(LENGTHS, st.integers(0, 3), st.integers(0, 5), st.integers(1, 64), st.sampled_from([None, 1, 3]))
def test_plan(items, seed, epoch, window, max_samples):
    lengths, views = np.array([l for l, _ in items], int), np.array([v for _, v in items], int)
    made = plan(lengths, views, T, VIEWS, seed, epoch, window, max_samples)
    assert sorted(made.samples.tolist()) == list(range(len(items)))
    for row in made:
        assert 1 <= len(row) <= (max_samples or len(items))
        assert lengths[row].sum() <= T and views[row].sum() <= VIEWS
    again = plan(lengths, views, T, VIEWS, seed, epoch, window, max_samples)
    assert (again.samples == made.samples).all() and (again.starts == made.starts).all()
    if window >= len(items) and max_samples is None and items:
        # no two rows could share one: each pair exceeds a budget, so twice the load bounds the rows
        assert len(made) <= 2 * (lengths.sum() / T + views.sum() / VIEWS) + 1


@settings(max_examples=80)
@given(LENGTHS, st.data(), st.integers(1, 40))
def test_encoder_and_decoder_are_packed_together(items, data, window):
    """A third budget: the answers of a row fit the decoder's slots."""
    lengths, views = np.array([l for l, _ in items], int), np.array([v for _, v in items], int)
    answers = np.array(data.draw(st.lists(st.integers(1, 12), min_size=len(items), max_size=len(items))), int)
    made = plan(lengths, views, T, VIEWS, 0, 0, window, answers=answers, answer_length=12)
    assert sorted(made.samples.tolist()) == list(range(len(items)))
    for row in made:
        assert lengths[row].sum() <= T and views[row].sum() <= VIEWS and answers[row].sum() <= 12
    costs = [np.array(c, np.int32) for c in (lengths, views, answers)]
    got = first_fit_decreasing(costs, (T, VIEWS, 12), window)
    assert got.tolist() == slow_first_fit(costs, (T, VIEWS, 12), window).tolist()


def slow_first_fit(costs, limits, window):
    """The same rule, one item at a time."""
    bins, opened = np.zeros(len(costs[0]), int), 0
    for start in range(0, len(costs[0]), window):
        items = list(range(start, min(start + window, len(costs[0]))))
        items.sort(key=lambda i: -sum(c[i] / max(limit, 1) for c, limit in zip(costs, limits)))
        rows = []
        for i in items:
            for k, left in enumerate([*rows, list(limits)]):  # noqa: B007 (k is where the loop stops)
                if all(c[i] <= room for c, room in zip(costs, left)):
                    break
            if k == len(rows):
                rows.append(list(limits))
            rows[k] = [room - c[i] for c, room in zip(costs, rows[k])]
            bins[i] = opened + k
        opened += len(rows)
    return bins


@settings(max_examples=100)
@given(LENGTHS, st.integers(1, 40))
def test_first_fit_equals_the_plain_loop(items, window):
    costs = [np.array([i[k] for i in items], np.int32) for k in (0, 1)]
    got = first_fit_decreasing(costs, (T, VIEWS), window)
    assert got.tolist() == slow_first_fit(costs, (T, VIEWS), window).tolist()


def test_rows_of_a_mixture_like_mix665k_are_nearly_as_few_as_can_be():
    """Against best-fit-decreasing over all samples at once, which sees the whole epoch and plans it one sample at a time."""
    lengths, views = packing_bench.lengths_and_views(40_000)
    for row, budget, wanted in ((2048, 3, 0.88), (4096, 6, 0.95), (8192, 12, 0.98)):
        full = packing_bench.full(lengths, len(plan(lengths, views, row, budget, 0, 0)), row)
        best = packing_bench.full(lengths, packing_bench.best_fit_decreasing(lengths, views, row, budget), row)
        assert full > wanted and full > best - 0.005


def test_the_benchmark_imitates_the_published_lengths():
    lengths, views = packing_bench.lengths_and_views(100_000)
    assert abs(lengths.mean() - 892) < 5 and abs(np.percentile(lengths, 95) - 1417) < 15
    assert lengths.max() == 2048 and abs(views.mean() - 0.94) < 0.01


@settings(max_examples=60)
@given(LENGTHS)
def test_best_fit_keeps_every_budget(items):
    """The yardstick itself: it never uses fewer rows than the budgets allow, nor more than first-fit's guarantee."""
    lengths, views = np.array([l for l, _ in items], int), np.array([v for _, v in items], int)
    rows = packing_bench.best_fit_decreasing(lengths, views, T, VIEWS)
    assert max(-(-lengths.sum() // T), -(-views.sum() // VIEWS)) <= rows <= len(items)
    if items:
        assert rows <= 2 * (lengths.sum() / T + views.sum() / VIEWS) + 1


def test_epochs_and_seeds_differ_and_rows_are_mixed():
    lengths, views = np.arange(1, 41), np.zeros(40, int)
    rows = {(s, e): plan(lengths, views, T, VIEWS, s, e).samples.tolist() for s in (0, 1) for e in (0, 1)}
    assert len({tuple(r) for r in rows.values()}) == 4
    long_first = [lengths[r].max() for r in plan(lengths, views, T, VIEWS, 0, 0)]
    assert long_first != sorted(long_first, reverse=True), "rows of one epoch come out longest first"


def test_permutation_does_not_depend_on_the_numpy_version():
    assert permutation(8, seed=3, epoch=1).tolist() == [5, 6, 3, 7, 0, 1, 2, 4]
    assert sorted(permutation(1000, 0, 0).tolist()) == list(range(1000))


def test_a_given_order_chooses_the_samples_of_an_epoch():
    made = plan(np.full(10, 20), np.zeros(10, int), T, VIEWS, 0, 0, order=[7, 7, 2])
    assert sorted(made.samples.tolist()) == [2, 7, 7]


def test_a_sample_larger_than_a_row_is_named():
    with pytest.raises(ValueError, match="sample 1 takes 51 slots, more than the 50 of a row"):
        plan(np.array([3, 51]), np.zeros(2, int), T, VIEWS, 0, 0)

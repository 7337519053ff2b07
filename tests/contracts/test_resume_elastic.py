"""Contract 5, the data: a run goes on with other hosts and batches in the same global order; changed data is refused in words."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny_data import TINY
from vlm_jax.config import IGNORE
from vlm_jax.data.epochs import Packing
from vlm_jax.data.manifest import DataError
from vlm_jax.data.options import Source
from vlm_jax.data.pipeline import Batches, Rows, total_steps
from vlm_jax.data.sampler import group_by_modality_length
from vlm_jax.data.tasks import Sample

HOSTS = st.integers(1, 8)
NAMED = 1000  # token 1000 + 100 s + i says: record i of source s
DRAWN = 5000  # token 5000 + k says: draw k


@dataclasses.dataclass(frozen=True)
class Encode:
    """Text of as many tokens as a record says, its name in the first; the second is drawn anew in every pass."""

    random = True
    fingerprint: str = "encode"

    def __call__(self, record, draws=None):
        tokens = np.full(record["length"], 7, np.int32)
        tokens[0], tokens[1] = NAMED + record["name"], DRAWN + (0 if draws is None else draws.integer(0, 0, 900))
        return Sample(tokens, np.where(tokens < NAMED, tokens, IGNORE))


def source(number, count, seed=0):
    rng = np.random.default_rng([number, seed])
    return [{"name": 100 * number + i, "length": int(n)} for i, n in enumerate(rng.integers(3, 20, count))]


DATA = {"a": source(0, 30), "b": source(1, 17), "c": source(2, 5)}
WEIGHTS = {"a": Source(weight=2.0), "b": Source(weight=1.0), "c": Source(weight=0.5)}
PLAIN = {"a": Source(), "b": Source(limit=6), "c": Source(repeat=2)}


def open_rows(data=DATA, sources=PLAIN, **packing):
    made = Packing(**{"row_length": 32, "window": 16, "epochs": 3, "seed": 5, "sources": sources} | packing)
    return Rows(data, Encode(), TINY, made, settings={"data.template": "v1"})


def shown(batch):
    """What a batch shows, row by row: [(record, draw), ...] of every row."""
    rows = []
    for tokens in batch["tokens"]:
        found = np.flatnonzero((tokens >= NAMED) & (tokens < DRAWN))
        rows.append([(int(tokens[i]) - NAMED, int(tokens[i + 1]) - DRAWN) for i in found])
    return rows


def one_step(hosts):
    """The rows of one step over all hosts, None at the end; every host must agree on the number of the step."""
    got = [next(host, None) for host in hosts]
    if got[0] is None:
        assert got == [None] * len(hosts)
        return None
    assert len({step for step, _ in got}) == 1
    return got[0][0], [row for _, batch in got for row in shown(batch)]


def undisturbed(rows):
    """Rows of the whole run on one host, one row a step."""
    return [shown(batch)[0] for _, batch in Batches(rows, 1, num_threads=0)]


@pytest.fixture(scope="module")
def orders():
    """(how samples are chosen and packed, the whole run's rows)"""
    chosen = [
        {"sources": PLAIN},
        {"sources": WEIGHTS, "epoch_samples": 40},
        {"sources": PLAIN, "order": "shuffled"},
        {"sources": PLAIN, "max_samples": 1},
    ]
    return [(how, undisturbed(open_rows(**how))) for how in chosen]


STINTS = st.lists(st.tuples(HOSTS, st.integers(1, 3), st.integers(0, 6)), min_size=1, max_size=4)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 3), STINTS)
def test_any_hosts_and_batches_continue_one_global_order(orders, chosen, stints):
    """Stopped and started again, each time on other hosts and with another global batch; the last stint goes to the end."""
    how, whole = orders[chosen]
    state, done, steps = None, [], 0
    for number, (count, times, stop) in enumerate(stints, 1):
        rows, batch = open_rows(**how), count * times  # as in a new process
        hosts = [Batches(rows, batch, 0, h, count, num_threads=0, state=state) for h in range(count)]
        left = total_steps(rows, batch, state) - steps
        for _ in range(left if number == len(stints) else min(left, stop)):
            step, got = one_step(hosts)
            assert step == steps and len(got) == batch
            assert got == (whole[len(done) :] + [[]] * batch)[:batch], "the next rows of the global order, or padding"
            done += got
            steps += 1
        states = [json.loads(json.dumps(host.state())) for host in hosts]
        assert states == [states[0]] * count, "every host would save the same"
        state = states[0]
    assert one_step(hosts) is None and done[: len(whole)] == whole and not any(done[len(whole) :])


@settings(max_examples=8, deadline=None)
@given(HOSTS, HOSTS, st.integers(0, 5))
def test_grouping_by_length_continues_on_other_hosts(before, after, steps):
    """The groups are steps, so the number of hosts may change and the global batch may not."""
    batch = before * after
    rows = open_rows(order="modality_length", group=batch)
    whole = undisturbed(rows)
    hosts = [Batches(rows, batch, 0, h, before, num_threads=0) for h in range(before)]
    done = [row for _ in range(min(steps, total_steps(rows, batch))) for row in one_step(hosts)[1]]
    fresh = open_rows(order="modality_length", group=batch)
    hosts = [Batches(fresh, batch, 0, h, after, num_threads=0, state=hosts[0].state()) for h in range(after)]
    while (got := one_step(hosts)) is not None:
        done += got[1]
    assert done[: len(whole)] == whole and all(len(row) == 1 for row in whole)
    with pytest.raises(DataError, match=f"train.global_batch was {batch} and is {batch + 1} now"):
        other = open_rows(order="modality_length", group=batch + 1)
        Batches(other, batch + 1, num_threads=0, state=Batches(rows, batch).state())


def test_nothing_is_lost_and_nothing_comes_twice(orders):
    """What the global order of a plain concatenation is, counted record by record."""
    for how, whole in orders:
        seen = [record for row in whole for record, _ in row]
        counts = {name: [seen.count(100 * k + i) for i in range(len(DATA[name]))] for k, name in enumerate(DATA)}
        assert sum(map(sum, counts.values())) == len(seen), "and no record that nobody gave"
        if how["sources"] is PLAIN:
            assert set(counts["a"]) == {3}, "three epochs"
            assert set(counts["c"]) == {6}, "two passes in each of three epochs"
            assert sum(counts["b"]) == 18 and set(counts["b"]) == {1, 2}, "six of seventeen in each of three epochs"
        else:
            assert [sum(counts[name]) for name in "abc"] == [3 * 23, 3 * 11, 3 * 6], "40 samples at 2 : 1 : 0.5"
            assert all(max(counts[name]) - min(counts[name]) <= 1 for name in "abc"), "passes end before the next begin"


def test_grouped_steps_hold_like_lengths():
    """A step of modality_length is one of LLaVA's mega-batches: longest first, as the sampler deals them."""
    rows = open_rows(order="modality_length", group=8, epochs=1)
    lengths = [int(rows.manifest.lengths[rows.records_of(r)[0]]) for r in range(len(rows))]
    steps = [lengths[k : k + 8] for k in range(0, len(lengths) - 7, 8)]
    assert all(step == sorted(step, reverse=True) for step in steps) or all(step == sorted(step) for step in steps)
    plain = open_rows(order="shuffled", epochs=1)
    mixed = [int(plain.manifest.lengths[plain.records_of(r)[0]]) for r in range(len(plain))]
    assert sorted(mixed) == sorted(lengths) and mixed != lengths


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(-30, 30).filter(bool), min_size=1, max_size=60), st.integers(1, 9))
def test_dealing_rows_of_one_sample_is_llavas_dealing(lengths, group):
    """Epochs group for one device of `group` rows; LLaVA's sampler for `group` devices of one row gives the same order."""
    for permute in (lambda n: range(n), lambda n: range(n - 1, -1, -1)):
        rows = group_by_modality_length(lengths, 1, group, permute)
        assert rows == group_by_modality_length(lengths, group, 1, permute)


def test_what_is_drawn_belongs_to_record_and_pass():
    """Two passes in one epoch draw anew, and adding a source changes no draw of another."""
    alone = dict(pair for row in undisturbed(open_rows({"b": DATA["b"]}, {}, epochs=1)) for pair in row)
    both = dict(pair for row in undisturbed(open_rows({"a": DATA["a"], "b": DATA["b"]}, {}, epochs=1)) for pair in row)
    assert alone == {record: draw for record, draw in both.items() if record >= 100} and len(set(alone.values())) > 10
    twice = [pair for row in undisturbed(open_rows(epochs=1)) for pair in row if pair[0] >= 200]
    assert len(set(twice)) == len(twice) == 2 * len(DATA["c"])


LONGER = [{**record, "length": record["length"] + (record["name"] == 3)} for record in DATA["a"]]
RENAMED = [{**record, "name": record["name"] ^ (record["name"] == 3)} for record in DATA["a"]]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"data": DATA | {"a": DATA["a"][:-1]}}, "a had 30 records then and has 29 now"),
        ({"data": DATA | {"a": LONGER}}, r"the lengths in a changed \(they were \d+ slots in all and are \d+ now\)"),
        ({"data": DATA | {"a": RENAMED}}, "the text or the lengths of samples in a changed"),
        (
            {"data": DATA | {"a": [*DATA["a"][:-1], {"name": 29, "length": 2}]}},
            "a had 30 usable records then and has 29",
        ),
        ({"data": DATA | {"d": DATA["c"]}}, "the source d was not there"),
        ({"data": {"a": DATA["a"], "b": DATA["b"]}}, "the source c is not there any more"),
        ({"sources": PLAIN | {"b": Source(limit=7)}}, "data.sources.b.limit was 6 and is 7 now"),
        ({"sources": PLAIN | {"c": Source()}}, "data.sources.c.repeat was 2 and is 1 now"),
        ({"sources": WEIGHTS}, "data.sources.a.weight was 0.0 and is 2.0 now"),
        ({"seed": 6}, "data.seed was 5 and is 6 now"),
        ({"view_budget": 7}, "data.views_per_row was 6 and is 7 now"),
        ({"order": "shuffled"}, "data.order was 'packed' and is 'shuffled' now"),
    ],
)
def test_changed_data_is_refused_in_words(change, words):
    state = json.loads(json.dumps(Batches(open_rows(), 4).state()))
    with pytest.raises(DataError, match=f"^the training data changed since the checkpoint was saved: .*{words}"):
        Batches(open_rows(**change), 4, state=state)
    Batches(open_rows(epochs=7), 4, state=state)  # more epochs continue the same order
    assert len(open_rows(least_rows=500, epochs=1)) >= 500


def test_the_setting_that_changed_all_texts_is_named():
    state = Batches(open_rows(), 4).state()
    other = Rows(DATA | {"a": LONGER}, Encode(), TINY, open_rows().how, settings={"data.template": "mpt"})
    with pytest.raises(DataError, match="data.template was 'v1' and is 'mpt' now; the lengths in a changed"):
        Batches(other, 4, state=state)
    same = Rows(DATA, Encode(), TINY, open_rows().how, settings={"data.template": "mpt"})
    Batches(same, 4, state=state)  # another name for the same samples
    drawn = Rows(DATA, Encode("other draws"), TINY, open_rows().how, settings={"data.template": "mpt"})
    with pytest.raises(DataError, match="data.template was 'v1' and is 'mpt' now"):
        Batches(drawn, 4, state=state)


def test_a_new_global_batch_still_shows_every_row():
    rows = open_rows()
    running = Batches(rows, 4, num_threads=0)
    done = [next(running) for _ in range(3)]
    for batch in (3, 8, 12):
        rest = list(Batches(rows, batch, num_threads=0, state=running.state()))
        assert len(done) + len(rest) == total_steps(rows, batch, running.state())
        assert len(rest) == -(-(len(rows) - 12) // batch)

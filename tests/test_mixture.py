"""Mixtures: what an epoch holds, and that one source's settings do not touch the order of another's samples."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_jax.config import ConfigError
from vlm_jax.data.mixture import Mixture, shares, used_sources
from vlm_jax.data.options import Source

EPOCHS = 4
SIZES = st.integers(1, 30)
PLAIN = st.builds(Source, repeat=st.integers(1, 3), limit=st.integers(0, 35))
WEIGHTED = st.builds(Source, weight=st.floats(0.05, 5), limit=st.integers(0, 35))


@st.composite
def mixtures(draw, kinds=(PLAIN, WEIGHTED)):
    """name -> (Source, records), at least two of them, either all weighted or none."""
    kind = draw(st.sampled_from(kinds))
    names = draw(st.lists(st.sampled_from("abcdefgh"), min_size=2, max_size=4, unique=True))
    return {name: (draw(kind), draw(SIZES)) for name in names}


def streams(mixture, sources):
    """name -> what the source gives over EPOCHS epochs: [(record inside it, pass), ...]."""
    first, out = 0, {}
    taken = [mixture.samples(epoch) for epoch in range(EPOCHS)]
    records, passes = (np.concatenate([t[k] for t in taken]) for k in (0, 1))
    for name, (_, size) in sources.items():
        here = (records >= first) & (records < first + size)
        out[name] = list(zip((records[here] - first).tolist(), passes[here].tolist()))
        first += size
    assert sum(map(len, out.values())) == len(records)
    return out


@settings(max_examples=60)
@given(mixtures(), st.integers(0, 3))
def test_every_source_goes_through_its_own_shuffled_passes(sources, seed):
    total = 200 if any(s.weight for s, _ in sources.values()) else 0
    for name, got in streams(Mixture(sources, total, seed), sources).items():
        size = sources[name][1]
        assert [turn for _, turn in got] == [k // size for k in range(len(got))], "a pass ends before the next begins"
        for turn in range(len(got) // size):
            assert sorted(r for r, t in got if t == turn) == list(range(size)), "every record once per pass"
        left = [r for r, t in got if t == len(got) // size]
        assert len(set(left)) == len(left)


@settings(max_examples=60)
@given(mixtures(), st.data())
def test_settings_of_one_source_leave_the_order_of_the_others(sources, data):
    """Another weight, limit or size of `a`, or a source more: every other source's samples come in the same order."""
    total = 150 if any(s.weight for s, _ in sources.values()) else 0
    changed = dict(sources)
    name = data.draw(st.sampled_from(sorted(sources)))
    source, size = sources[name]
    what = data.draw(st.sampled_from(["weight" if total else "repeat", "limit", "size", "another", "gone"]))
    if what == "another":
        changed = {"zz": (source, size), **changed}
    elif what == "gone":
        del changed[name]
    else:
        source = dataclasses.replace(source, **({} if what == "size" else {what: getattr(source, what) + 1}))
        changed[name] = (source, size + (what == "size"))
    before, after = (streams(Mixture(s, total, 7), s) for s in (sources, changed))
    for other in (before.keys() & after.keys()) - ({name} if what == "size" else set()):
        shared = min(len(before[other]), len(after[other]))
        assert before[other][:shared] == after[other][:shared]
        if not total and other != name:
            assert len(before[other]) == len(after[other]), "without weights not even how many there are"


@settings(max_examples=60)
@given(mixtures([PLAIN]))
def test_plain_concatenation_takes_limits_and_repeats(sources):
    mixture = Mixture(sources)
    for name, got in streams(mixture, sources).items():
        source, size = sources[name]
        a_pass = min(source.limit or size, size)
        assert len(got) == EPOCHS * source.repeat * a_pass
        seen = {record for record, _ in got}
        assert len(seen) == min(size, len(got)), "a limit takes the next records in every pass: in time all are seen"


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=8), st.integers(0, 10_000))
def test_shares_are_whole_and_proportional(weights, total):
    parts = shares(np.array(weights), total)
    assert parts.sum() == total and (parts >= 0).all()
    assert (abs(parts - total * np.array(weights) / sum(weights)) < 1).all()


def test_the_largest_remainders_get_the_rest():
    assert shares(np.array([1.0, 1.0, 1.0]), 10).tolist() == [4, 3, 3]
    assert shares(np.array([0.5, 0.3, 0.2]), 7).tolist() == [4, 2, 1]  # 3.5, 2.1, 1.4


def test_an_epoch_is_as_long_as_it_was_asked_to_be():
    sources = {"a": (Source(weight=3.0), 10), "b": (Source(weight=1.0, limit=6), 50)}
    assert len(Mixture(sources)) == 16 and Mixture(sources).counts.tolist() == [12, 4]
    assert Mixture(sources, 100).counts.tolist() == [75, 25]
    assert len(Mixture(sources, 100).order(3)) == 100


def test_epochs_and_seeds_differ_and_are_repeatable():
    sources = {"a": (Source(), 20), "b": (Source(), 20)}
    orders = {(seed, epoch): Mixture(sources, 0, seed).order(epoch).tolist() for seed in (0, 1) for epoch in (0, 1)}
    assert len({tuple(order) for order in orders.values()}) == 4
    assert orders == {key: Mixture(sources, 0, key[0]).order(key[1]).tolist() for key in orders}
    assert [n < 20 for n in orders[0, 0]] != [n < 20 for n in orders[0, 1]], "sources are interleaved anew"
    assert orders[0, 0] != sorted(orders[0, 0])


def test_a_source_that_is_left_out_keeps_its_numbers():
    sources = {"a": (Source(repeat=0), 5), "b": (Source(), 3)}
    assert sorted(Mixture(sources).order(0).tolist()) == [5, 6, 7]


@pytest.mark.parametrize(
    "sources, epoch_samples, words",
    [
        ({"a": Source(weight=1.0), "b": Source()}, 0, "the source b has no weight, but a has"),
        ({"a": Source(weight=1.0, repeat=2)}, 0, "data.sources.a has weight=1 and repeat=2"),
        ({"a": Source(repeat=0)}, 0, "every source of data.sources has repeat=0"),
        ({"a": Source()}, 50, "data.epoch_samples=50 needs weights"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(sources, epoch_samples, words):
    with pytest.raises(ConfigError, match=words):
        used_sources(sources, epoch_samples)


def test_a_source_that_would_never_be_seen_is_refused():
    with pytest.raises(ConfigError, match=r"data.sources.b.weight=0.001 gives the source none of the 10 samples"):
        Mixture({"a": (Source(weight=1.0), 9), "b": (Source(weight=0.001), 9)}, 10)
    with pytest.raises(ConfigError, match="the source b has no usable record"):
        Mixture({"a": (Source(), 9), "b": (Source(), 0)})
    assert Mixture({"a": (Source(weight=1.0), 9), "b": (Source(weight=1.0, repeat=0), 9)}).names == ("a",)

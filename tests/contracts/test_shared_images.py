"""One image encoded once with all its questions: the loss and gradients of samples apart, in any stints, and refused if images change."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.contracts.test_encoder_decoder import MODEL as T5_MODEL
from tests.small_runs import EXACT, MODEL, Weights
from tests.tiny_data import encode, write_images
from vlm_jax.config import IGNORE, IMAGE, ConfigError
from vlm_jax.data import packing, sharing
from vlm_jax.data.check import Samples, fill
from vlm_jax.data.epochs import Packing
from vlm_jax.data.flatten import Flattened
from vlm_jax.data.manifest import DataError
from vlm_jax.data.options import DataConfig
from vlm_jax.data.pipeline import Batches, Rows, total_steps
from vlm_jax.data.records import Record
from vlm_jax.data.tasks import Sample
from vlm_jax.train import state as states
from vlm_jax.train.step import loss_and_gradients, row_counts, split_micro_batches

T, VIEWS, P = 40, 2, MODEL.vision.features
SHARED = Packing(row_length=T, view_budget=VIEWS, window=16, epochs=2, seed=5, answer_length=24, shared_images=True)
NAMED = 30  # the last token of record i is 30 + i


def encode_both(record):
    """For an encoder-decoder: the question is everything but the last tokens, which are the answer."""
    tokens = np.asarray(record["tokens"], np.int32)
    return Sample(tokens[:-2], np.full(len(tokens) - 2, IGNORE), tuple(record["images"]), answer=tokens[-2:])


ENCODERS = {"decoder": (MODEL, encode), "encoder-decoder": (T5_MODEL, encode_both)}


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Seven questions about one image, four about another, three about two together, single ones, and text."""
    paths, rng = write_images(tmp_path_factory.mktemp("images")), np.random.default_rng(0)
    shown = (
        [paths[:1]] * 7
        + [paths[1:2]] * 4
        + [paths[:2]] * 3
        + [paths[1::-1]]
        + [[path] for path in paths[2:]]
        + [[]] * 6
    )
    made = []
    for i, images in enumerate(shown):
        tokens = [1, *rng.integers(3, 29, rng.integers(2, 6)).tolist(), 2, NAMED + i]
        for k, _ in enumerate(images):
            tokens.insert(1 + k, IMAGE)
        made.append({"tokens": tokens, "images": list(images)})
    return made


def decoded(records, how=SHARED, kind="decoder"):
    """(rows, list of images that are decoded while rows are made)"""
    model, encoded = ENCODERS[kind]
    rows = Rows(records, encoded, model, how)
    found, load = [], rows.load

    def watched(image):
        found.append(image.path)
        return load(image)

    rows.load = watched
    return rows, found


@settings(max_examples=80)
@given(
    st.lists(st.tuples(st.integers(1, T), st.integers(0, 9), st.integers(0, 6)), max_size=80),
    st.integers(1, 20),
    st.sampled_from([None, 3]),
)
def test_a_plan_counts_shared_views_once(items, window, most):
    lengths, groups, answers = (np.array([item[k] for item in items], int) for k in range(3))
    views = np.where(groups > 7, 0, groups % VIEWS + 1)  # one number for all samples of a group
    made = packing.plan(lengths, views, T, VIEWS, 0, 1, window, most, None, answers, 12, groups)
    assert sorted(made.samples.tolist()) == list(range(len(items)))
    total = 0
    for row in made:
        apart = {int(groups[i]): int(views[i]) for i in row}
        total += sum(apart.values())
        assert lengths[row].sum() <= T and answers[row].sum() <= 12 and sum(apart.values()) <= VIEWS
        assert len(row) <= (most or T)
    assert sharing.views_shown(made.starts, made.samples, views, groups) == total


@settings(max_examples=80)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 10)), max_size=60))
def test_bundles_take_as_many_as_fit(items):
    """The same by a loop over the samples of each group."""
    groups, costs = (np.array([item[k] for item in items], int) for k in range(2))
    wanted, room, current = [], {}, {}
    for group, cost in items:
        if group not in room or cost > room[group]:
            room[group], current[group] = 10, max(wanted, default=-1) + 1
        room[group] -= cost
        wanted.append(current[group])
    assert sharing.bundles(groups, [costs], [10]).tolist() == wanted


def test_alike_are_the_same_images_in_the_same_order(records):
    rows, _ = decoded(records)
    found = rows.manifest.alike().tolist()
    assert found[:18] == [0] * 7 + [7] * 4 + [11] * 3 + [14, 15, 16, 17] and found[18:] == list(range(18, len(records)))
    assert decoded(records, dataclasses.replace(SHARED, shared_images=False))[0].epochs.groups is None


@pytest.mark.parametrize("kind", ENCODERS)
def test_a_row_shows_every_sample_its_own_images(records, kind):
    """What a sample sees in a shared row is what it sees alone; an image of a row is decoded once and stands there once."""
    rows, found = decoded(records, kind=kind)
    alone, _ = decoded(records, Packing(row_length=T, view_budget=2, max_samples=1, answer_length=24), kind)
    singles = {int(alone.records_of(r)[0]): alone[r] for r in range(len(alone))}
    seen = []
    for r in range(len(rows.plan(0))):
        found.clear()
        row, numbers = rows[r], rows.records_of(r).tolist()
        different = {path for number in numbers for path in records[number]["images"]}
        assert sorted(found) == sorted(different)
        for segment, number in enumerate(numbers, start=1):
            here, one = np.flatnonzero(row["segments"] == segment), singles[number]
            n = len(here)
            assert row["tokens"][here].tolist() == one["tokens"][:n].tolist() and not one["segments"][n:].any()
            a, b = row["image_slots"][here], one["image_slots"][:n]
            assert ((a < 0) == (b < 0)).all() and (a[a >= 0] % P == b[b >= 0] % P).all()
            assert (row["images"][a[a >= 0] // P] == one["images"][b[b >= 0] // P]).all()
            if kind == "encoder-decoder":
                assert row["answer_targets"][row["answer_segments"] == segment].tolist()[-1] == NAMED + number
        seen += numbers
    assert sorted(seen) == list(range(len(records)))


@functools.cache
def program(kind):
    """(gradients, sums) of a batch of rows."""
    model = ENCODERS[kind][0]
    params = Weights(model).arrays
    chosen = states.select(EXACT.trainable, params)
    trainable, frozen = ({k: v for k, v in params.items() if (k in chosen) == side} for side in (True, False))
    run = jax.jit(functools.partial(loss_and_gradients, model, EXACT))
    return lambda batch: run(trainable, frozen, batch)


@pytest.mark.parametrize("kind", ENCODERS)
def test_loss_and_gradients_are_those_of_samples_apart(records, kind):
    found, counts = [], []
    for how in (SHARED, Packing(row_length=T, view_budget=2, max_samples=1, answer_length=24)):
        rows, _ = decoded(records, dataclasses.replace(how, epochs=1), kind)
        assert len(rows) == len(records) or how is SHARED
        batch = split_micro_batches(packing.batch_rows([rows[r] for r in range(len(records))]), 1)  # padding behind
        found.append(program(kind)(batch))
        counts.append({key: float(value) for key, value in row_counts(batch, P).items()})
    (shared, sums), (apart, wanted) = found
    assert float(sums["tokens"]) == float(wanted["tokens"]) > 30
    assert abs(float(sums["loss"]) - float(wanted["loss"])) < 1e-5
    for path, gradient in apart.items():
        np.testing.assert_allclose(shared[path], gradient, atol=1e-5, err_msg=path)
    assert all(np.abs(apart[path]).max() > 1e-4 for path in apart if path.startswith("projector/"))
    assert counts[0]["slots"] == counts[1]["slots"] and counts[0]["samples"] == counts[1]["samples"] == len(records)
    assert counts[0]["views"] < 0.7 * counts[1]["views"], "FLOPs are counted for images that are encoded"


def names(batch):
    """Records of every row, by their last tokens."""
    return [[int(t) - NAMED for t in row if t >= NAMED] for row in batch["tokens"]]


@settings(max_examples=10, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 2), st.integers(0, 4)), min_size=1, max_size=3))
def test_a_run_goes_on_with_any_hosts_in_the_same_order(records, stints):
    whole = [names(batch)[0] for _, batch in Batches(decoded(records)[0], 1, num_threads=0)]
    assert sorted(sum(whole, [])) == sorted(2 * list(range(len(records))))
    state, done, steps = None, [], 0
    for number, (count, times, stop) in enumerate(stints, 1):
        rows, batch = decoded(records)[0], count * times
        hosts = [Batches(rows, batch, 0, h, count, num_threads=0, state=state) for h in range(count)]
        left = total_steps(rows, batch, state) - steps
        for _ in range(left if number == len(stints) else min(left, stop)):
            done += [row for host in hosts for row in names(next(host)[1])]
            steps += 1
        state = json.loads(json.dumps(hosts[0].state()))
    assert done[: len(whole)] == whole and not any(done[len(whole) :])


def test_another_order_is_refused_and_moved_images_are_not(records, tmp_path):
    state = json.loads(json.dumps(Batches(decoded(records)[0], 4).state()))
    swapped = [{**r, "images": records[7]["images"] if i == 3 else r["images"]} for i, r in enumerate(records)]
    with pytest.raises(DataError, match="which samples of the data show the same images changed"):
        Batches(decoded(swapped)[0], 4, state=state)
    off = dataclasses.replace(SHARED, shared_images=False)
    with pytest.raises(DataError, match="data.shared_images was True and is None now"):
        Batches(decoded(records, off)[0], 4, state=state)
    moved = {path: str(tmp_path / path.rsplit("/", 1)[1]) for r in records for path in r["images"]}
    for old, new in moved.items():
        with open(old, "rb") as source, open(new, "wb") as target:
            target.write(source.read())
    elsewhere = [{**r, "images": [moved[path] for path in r["images"]]} for r in records]
    wanted, found = (next(Batches(decoded(which)[0], 4, state=state)) for which in (records, elsewhere))
    assert all((wanted[1][key] == found[1][key]).all() for key in wanted[1])


def test_a_broken_image_is_padding_for_all_its_samples(records, tmp_path):
    broken = tmp_path / "broken.png"
    with open(records[0]["images"][0], "rb") as source:
        broken.write_bytes(source.read()[:60])
    bad = [{**r, "images": [str(broken)] if i < 7 else r["images"]} for i, r in enumerate(records)]
    rows, _ = decoded(bad)
    shown = sum((sum(names({"tokens": rows[r]["tokens"][None]}), []) for r in range(len(rows.plan(0)))), [])
    assert sorted(shown) == list(range(7, len(records))) and set(rows.broken) == set(range(7))


def test_questions_of_a_flattened_dialogue_share_its_image(records):
    """Five questions about each of three images, in rows with room for five and a view: three rows of one image."""

    def dialogue(number):
        turns = [("human", "Why?"), ("gpt", "So.")] * 5
        return Record(
            str(number), (("human", "<image>\nWhy?"), *turns[1:]), (records[(0, 7, 15)[number]]["images"][0],), "x.json"
        )

    def encode_pair(record):
        tokens = np.array([1, IMAGE, 5, 6])  # seven slots
        return Sample(tokens, np.where(tokens == 6, tokens, IGNORE), record.images)

    flat = Flattened([dialogue(n) for n in range(3)])
    how = Packing(row_length=5 * (3 + P), view_budget=1, shared_images=True)
    rows = Rows(flat, encode_pair, MODEL, how)
    assert len(flat) == 15 and len(rows) == 3
    assert all({int(n) // 5 for n in rows.records_of(r)} == {int(rows.records_of(r)[0]) // 5} for r in range(3))
    assert len(Rows(flat, encode_pair, MODEL, dataclasses.replace(how, shared_images=False))) == 15


def test_settings_that_exclude_each_other():
    for other in ({"order": "shuffled"}, {"max_samples": 1}):
        with pytest.raises(ConfigError, match="data.shared_images needs several samples in a row"):
            DataConfig(shared_images=True, **other)


def test_the_survey_counts_as_training_packs():
    """Forty dialogues of nine questions, six in a row: forty rows of one image, twenty of three questions about each of two."""
    apart = Samples(np.full(360, 600), np.ones(360, int), np.zeros(360, int))
    shared, how = (
        dataclasses.replace(apart, groups=np.repeat(np.arange(40), 9)),
        Packing(row_length=4096, view_budget=2),
    )
    assert (fill(apart, how, 4096, 2).rows, fill(apart, how, 4096, 2).views_used) == (180, 1.0)
    found = fill(shared, how, 4096, 2)
    assert (found.rows, found.views_used) == (60, 80 / 120)

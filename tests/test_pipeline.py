"""The order of batches is the same from any step and on any number of hosts; changed data is refused."""

import json

import numpy as np
import pytest

from tests.tiny_data import ANYRES, TINY, encode, make_records, write_images
from vlm_jax.config import IGNORE
from vlm_jax.data import measuring
from vlm_jax.data.draws import Draws
from vlm_jax.data.epochs import Packing
from vlm_jax.data.manifest import DataError
from vlm_jax.data.pipeline import Batches, Rows, total_steps
from vlm_jax.data.tasks import Sample

PACKED = Packing(row_length=64, view_budget=4, window=16, epochs=3, seed=5)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return make_records(write_images(tmp_path_factory.mktemp("images")), 40)


@pytest.fixture(scope="module")
def rows(records):
    return Rows(records, encode, TINY, PACKED)


def equal(a, b):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def names(batch):
    """Records shown in a batch: the last token of record i is 3 + i."""
    return [int(t) - 3 for t in batch["tokens"].reshape(-1) if 3 <= t < 100]


def test_batches_have_the_layout_of_the_models(rows):
    steps = list(Batches(rows, 4))
    assert [s for s, _ in steps] == list(range(total_steps(rows, 4)))
    for _, batch in steps:
        assert batch["images"].shape == (4, 4, 28, 28, 3) and batch["images"].dtype == np.uint8
        for key in ("tokens", "image_slots", "targets", "segments", "positions"):
            assert batch[key].shape == (4, 64) and batch[key].dtype == np.int32
        assert batch["weights"].dtype == np.float32 and not any(key.startswith("answer") for key in batch)
        assert (batch["image_slots"] <= 4 * TINY.vision.features).all()


def test_each_epoch_shows_every_sample_once_in_another_order(rows):
    assert sum(len(rows.plan(e)) for e in range(3)) == len(rows)
    orders = []
    for epoch, start in enumerate(rows.epochs.starts):
        shown = sum((rows.records_of(start + r).tolist() for r in range(len(rows.plan(epoch)))), [])
        assert sorted(shown) == list(range(40))
        assert rows.epochs.locate(start) == (epoch, 0)
        assert {int(p) for r in range(len(rows.plan(epoch))) for p in rows.epochs.samples_of(start + r)[1]} == {epoch}
        orders.append(shown)
    assert orders[0] != orders[1] != orders[2]
    shown = sum((names(batch) for _, batch in Batches(rows, 4)), [])
    assert sorted(shown) == sorted(list(range(40)) * 3), "batches straddle epochs without losing or repeating a row"


def test_the_last_batch_is_filled_with_padding(rows):
    batch_size = next(g for g in range(3, 20) if len(rows) % g)
    *_, (_, last) = Batches(rows, batch_size)
    real = len(rows) % batch_size
    assert (
        (last["segments"][real:] == 0).all()
        and (last["weights"][real:] == 0).all()
        and (last["segments"][real - 1] > 0).any()
    )


@pytest.mark.parametrize("threads", [0, 1, 4])
def test_resume_from_any_step(records, rows, threads):
    whole = [batch for _, batch in Batches(rows, 4)]
    running = Batches(rows, 4, num_threads=threads)
    for step in range(len(whole) + 1):
        state = json.loads(json.dumps(running.state()))
        if step % 3 == 0 or step == len(whole):
            fresh = Rows(records, encode, TINY, PACKED)  # as in a new process
            rest = list(Batches(fresh, 4, num_threads=threads, state=state))
            assert [s for s, _ in rest] == list(range(step, len(whole)))
            for (_, batch), wanted in zip(rest, whole[step:], strict=True):
                equal(batch, wanted)
        if step < len(whole):
            equal(next(running)[1], whole[step])
    equal(next(Batches(rows, 4, start_step=2))[1], whole[2])


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_share_each_batch_in_one_global_order(rows, hosts):
    whole = [batch for _, batch in Batches(rows, 4)]
    parts = [Batches(rows, 4, process_index=h, process_count=hosts) for h in range(hosts)]
    for wanted in whole[:3]:
        got = [next(p)[1] for p in parts]
        equal({k: np.concatenate([g[k] for g in got]) for k in wanted}, wanted)
    moved = [
        Batches(rows, 4, process_index=h, process_count=4 // hosts, state=parts[0].state()) for h in range(4 // hosts)
    ]
    got = [next(p)[1] for p in moved]
    equal({k: np.concatenate([g[k] for g in got]) for k in whole[3]}, whole[3])


def test_resume_with_another_batch_size_continues_at_the_same_row(rows):
    running = Batches(rows, 4)
    next(running), next(running)
    step, batch = next(Batches(rows, 2, state=running.state()))
    assert step == 2
    equal(batch, {k: v[:2] for k, v in list(Batches(rows, 4))[2][1].items()})


def test_hosts_must_divide_the_batch(rows):
    with pytest.raises(DataError, match="train.global_batch=4 rows cannot be divided evenly among 3 hosts"):
        Batches(rows, 4, process_count=3)


def test_resume_refuses_changed_data_or_order(records, rows):
    state = json.loads(json.dumps(Batches(rows, 4).state()))
    changed = [{**r, "tokens": [2 if t == 1 else t for t in r["tokens"]]} for r in records[:1]] + records[1:]
    for other, words in (
        (changed, "the text or the lengths of samples in the data changed"),
        (records[:-1], "the data had 40 records then and has 39 now"),
        ([*records[:-1], {**records[-1], "tokens": [1, 2]}], "the data had 40 usable records then and has 39 now"),
        (
            [{**r, "tokens": [*r["tokens"], 5]} for r in records],
            r"the lengths in the data changed \(they were \d+ slots",
        ),
    ):
        with pytest.raises(DataError, match=f"the training data changed since the checkpoint was saved: {words}"):
            Batches(Rows(other, encode, TINY, PACKED), 4, state=state)
    for how, words in (
        (Packing(64, 4, window=16, epochs=3, seed=6), "data.seed was 5 and is 6 now"),
        (Packing(80, 4, window=16, epochs=3, seed=5), "data.row_length was 64 and is 80 now"),
        (
            Packing(64, 4, window=16, epochs=3, seed=5, order="shuffled"),
            "data.order was 'packed' and is 'shuffled' now",
        ),
    ):
        with pytest.raises(DataError, match=words):
            Batches(Rows(records, encode, TINY, how), 4, state=state)
    Batches(
        Rows(records, encode, TINY, Packing(64, 4, window=16, epochs=9, seed=5)), 4, state=state
    )  # more epochs are fine
    with pytest.raises(DataError, match="an earlier version of vlm_jax"):
        Batches(rows, 4, state={"step": 1, "row": 4, "seed": 5, "manifest": "0f", "packing": [64, 4]})


class Drawn:
    """Records that are (longest length, measured length): a draw chooses between 3 and the longest."""

    random, fingerprint = True, "drawn"

    def __call__(self, record, draws=None):
        longest, measured = record["lengths"]
        n = measured if draws is None else draws.integer(0, 3, longest)
        tokens = np.arange(100, 100 + n, dtype=np.int32)
        labels = np.where(np.arange(n) >= 2, tokens, IGNORE)
        return Sample(tokens, labels if draws is None or not record.get("mute") else np.full(n, IGNORE))


def test_drawn_samples_stay_in_their_place():
    records = [{"lengths": (12, 12)} for _ in range(30)]
    rows = Rows(records, Drawn(), TINY, Packing(row_length=32, view_budget=1, epochs=4, seed=1))
    lengths, seen = {}, set()
    for r in range(len(rows)):
        row, (numbers, passes) = rows[r], rows.epochs.samples_of(r)
        for k, (number, turn) in enumerate(zip(numbers.tolist(), passes.tolist()), start=1):
            here = np.flatnonzero(row["segments"] == k)
            assert here[0] == 12 * (k - 1) and len(here) == Draws(1, turn, number).integer(0, 3, 12)
            assert row["tokens"][here].tolist() == list(range(100, 100 + len(here)))
            lengths.setdefault(number, set()).add(len(here))
            seen.add((number, turn))
    assert len(seen) == 120 and any(len(n) > 1 for n in lengths.values()), "drawn anew in every epoch"
    assert rows.counts() == {"samples_without_loss": 0, "unusable_samples": 0, "cut_samples": 0}


def test_draws_that_do_not_fit_or_teach_nothing_are_counted():
    records = [{"lengths": (12, 5)}] * 20 + [{"lengths": (12, 12), "mute": True}] * 3 + [{"lengths": (90, 90)}]
    rows = Rows(records, Drawn(), TINY, Packing(row_length=32, view_budget=1, epochs=1))
    made = [rows[r] for r in range(len(rows))]
    long = sum(Draws(0, 0, i).integer(0, 3, 12) > 5 for i in range(20))
    assert rows.manifest.cut_count == 1 and rows.empty_draws == 3 and rows.cut_draws == long > 0
    assert rows.counts() == {"samples_without_loss": 3, "unusable_samples": 0, "cut_samples": 1 + long}
    assert all((row["segments"] == k).sum() <= 32 for row in made for k in range(1, 9))


def test_encoder_decoder_rows_hold_answers():
    def encode_both(record):
        tokens = np.arange(1, 1 + record, dtype=np.int32)
        return Sample(tokens, np.full(record, IGNORE), answer=tokens[: record // 2] + 200)

    rows = Rows(list(range(2, 20)), encode_both, TINY, Packing(row_length=24, view_budget=1, answer_length=10))
    shown = []
    for r in range(len(rows) + 1):  # one of padding
        row = rows[r]
        assert row["answer_tokens"].shape == row["answer_weights"].shape == (10,)
        for k, number in enumerate(rows.records_of(r).tolist() if r < len(rows) else (), start=1):
            here, n = row["answer_segments"] == k, number + 2
            assert row["answer_targets"][here].tolist() == [200 + i for i in range(1, 1 + n // 2)]
            assert row["answer_tokens"][here].tolist() == [0, *range(201, 200 + n // 2)]
            assert (row["segments"] == k).sum() == n
            shown.append(number)
    assert sorted(shown) == list(range(18)) and max(rows.manifest.answers) == 9
    assert not row["answer_segments"].any() and not row["weights"].any()


def test_rows_hold_what_the_loader_gives(records):
    """A loader may say what it gives: features in place of pixels, say."""

    class Features:
        key, view_shape, dtype = "features", (TINY.vision.features, 3), np.float16

        def __call__(self, source):
            number = float(source.path.removesuffix(".png")[-1])
            return np.full((1, *self.view_shape), number, np.float16), (9, 9)

    rows = Rows(records, encode, TINY, PACKED, load=Features())
    for r in range(3):
        row = rows[r]
        shown = [float(i.removesuffix(".png")[-1]) for k in rows.records_of(r) for i in records[k]["images"]]
        assert row["features"].shape == (4, TINY.vision.features, 3) and row["features"].dtype == np.float16
        assert row["features"][:, 0, 0].tolist() == shown + [0.0] * (4 - len(shown)) and "images" not in row
    wanted = sorted(image for record in records for image in record["images"])
    assert sorted(source.path for source in rows.images()) == wanted


def test_unpacked_rows_hold_one_sample(records):
    rows = Rows(records, encode, TINY, Packing(row_length=64, view_budget=4, max_samples=1))
    assert len(rows) == 40
    assert all(rows[r]["segments"].max() == 1 for r in range(40))


def test_pixels_and_features_of_a_packed_row_belong_together(records):
    """Each sample of a packed row has its own views, and its slots point at exactly these."""
    for config in (TINY, ANYRES):
        alone = Rows(records, encode, config, Packing(row_length=200, view_budget=12, max_samples=1))
        packed = Rows(records, encode, config, Packing(row_length=200, view_budget=12))
        singles = {int(alone.records_of(r)[0]): alone[r] for r in range(len(alone))}
        features = config.vision.features
        for r in range(len(packed)):
            row = packed[r]
            for segment, record in enumerate(packed.records_of(r), start=1):
                one, here = singles[int(record)], row["segments"] == segment
                n = int((one["segments"] > 0).sum())
                for key in ("tokens", "targets", "weights", "positions"):
                    assert (row[key][here] == one[key][:n]).all()
                for a, b in zip(row["image_slots"][here], one["image_slots"][:n], strict=True):
                    real = 0 <= b < 12 * features
                    assert real == (0 <= a < 12 * features)
                    if real:
                        assert a % features == b % features
                        assert (row["images"][a // features] == one["images"][b // features]).all()
                    else:
                        assert a == b


class Marked(list):
    """Records that say what they hold."""

    fingerprint = "forty records"


def test_the_manifest_is_kept_and_measured_by_processes(records, tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "fingerprint", "tiny", raising=False)
    first = Rows(Marked(records), encode, TINY, PACKED, cache=tmp_path)
    assert len(list(tmp_path.glob("manifest-*.npz"))) == 1
    monkeypatch.setattr(measuring, "measure", None)  # a second run must not measure
    again = Rows(Marked(records), encode, TINY, PACKED, cache=tmp_path)
    assert again.identity() == first.identity()
    monkeypatch.undo()
    assert Rows(records, encode, TINY, PACKED, processes=2).identity() == first.identity()
    Marked.fingerprint = "others"
    Rows(Marked(records[:30]), encode, TINY, PACKED, cache=tmp_path)
    monkeypatch.setattr(encode, "fingerprint", "tiny", raising=False)
    Rows(Marked(records[:30]), encode, TINY, PACKED, cache=tmp_path)
    assert len(list(tmp_path.glob("manifest-*.npz"))) == 2


def test_waiting_for_data_is_measured(records):
    slow = Batches(Rows(records, encode, TINY, PACKED), 4)
    assert slow.waited == 0
    next(slow)
    assert slow.waited > 0

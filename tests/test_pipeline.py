"""The order of batches is the same from any step and on any number of hosts; changed data is refused."""

import json

import numpy as np
import pytest

from tests.tiny_data import ANYRES, TINY, encode, make_records, write_images
from vlm_jax.data import manifest
from vlm_jax.data.manifest import DataError
from vlm_jax.data.pipeline import Batches, Packing, Rows, total_steps

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
        assert batch["weights"].dtype == np.float32
        assert (batch["image_slots"] <= 4 * TINY.vision.features).all()


def test_each_epoch_shows_every_sample_once_in_another_order(rows):
    assert sum(rows.rows_per_epoch(e) for e in range(3)) == len(rows)
    orders = []
    for epoch in range(3):
        start = sum(rows.rows_per_epoch(e) for e in range(epoch))
        shown = sum((rows.records_of(start + r).tolist() for r in range(rows.rows_per_epoch(epoch))), [])
        assert sorted(shown) == list(range(40))
        assert rows.locate(start) == (epoch, 0)
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
    state = Batches(rows, 4).state()
    changed = [{**r, "tokens": [2 if t == 1 else t for t in r["tokens"]]} for r in records[:1]] + records[1:]
    with pytest.raises(DataError, match="the training data changed since the checkpoint was saved"):
        Batches(Rows(changed, encode, TINY, PACKED), 4, state=state)
    with pytest.raises(DataError, match="data.seed changed"):
        Batches(Rows(records, encode, TINY, Packing(64, 4, window=16, epochs=3, seed=6)), 4, state=state)
    with pytest.raises(DataError, match="row length, view budget or packing changed"):
        Batches(Rows(records, encode, TINY, Packing(80, 4, window=16, epochs=3, seed=5)), 4, state=state)
    Batches(
        Rows(records, encode, TINY, Packing(64, 4, window=16, epochs=9, seed=5)), 4, state=state
    )  # more epochs are fine


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
    monkeypatch.setattr(manifest, "measure", None)  # a second run must not measure
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

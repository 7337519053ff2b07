"""safetensors directories: slices, sharding, damage, and a disk that fills up."""

import errno
import json
import os

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from vlm_jax.convert import shards
from vlm_jax.convert.files import replacing, staging
from vlm_jax.convert.shards import Planned, plan_shards, read_directory, write_directory, write_file
from vlm_jax.convert.tensors import (
    AS_IS,
    PATCH,
    TRANSPOSE,
    VECTOR,
    CheckpointError,
    Leaf,
    Tensor,
    full,
    grown,
    resolve,
)


def planned(arrays: dict) -> list[Planned]:
    return [Planned(name, value.shape, value.dtype, lambda value=value: value) for name, value in arrays.items()]


ARRAYS = {
    "a": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b": np.arange(6).astype(ml_dtypes.bfloat16).reshape(2, 3),
    "c": np.float16(3.5) * np.ones((), np.float16),
    "d": np.zeros((0, 2), np.float32),
    "e": np.arange(5),
}


def test_written_file_is_read_by_the_library(tmp_path):
    write_file(tmp_path / "x.safetensors", planned(ARRAYS))
    with safe_open(tmp_path / "x.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}
        for name, value in ARRAYS.items():
            got = file.get_tensor(name)
            assert got.dtype == value.dtype and got.shape == value.shape and got.tobytes() == value.tobytes()


@pytest.mark.parametrize("limit", [1, 30, 70, 10**9])
def test_shards_and_index(tmp_path, limit):
    write_directory(tmp_path, planned(ARRAYS), limit)
    index = tmp_path / shards.INDEX
    if limit == 10**9:
        assert not index.exists() and (tmp_path / shards.SINGLE).exists()
    else:
        content = json.loads(index.read_text())
        assert content["metadata"] == {
            "total_size": sum(a.nbytes for a in ARRAYS.values()),
            "total_parameters": sum(a.size for a in ARRAYS.values())
        }  # fmt: skip
        assert all(name == f"model-{i:05d}-of-{len(set(content['weight_map'].values())):05d}.safetensors"
                   for i, name in enumerate(sorted(set(content["weight_map"].values())), 1))  # fmt: skip
    for name, tensor in read_directory(tmp_path).items():
        assert tensor.read(full(tensor.shape)).tobytes() == ARRAYS[name].tobytes()


@given(st.lists(st.integers(0, 50), max_size=20), st.integers(1, 60))
def test_every_tensor_is_in_one_shard_in_order(sizes, limit):
    tensors = [Planned(str(i), (n,), np.dtype(np.uint8), lambda: None) for i, n in enumerate(sizes)]
    cut = plan_shards(tensors, limit)
    assert [t for shard in cut for t in shard] == tensors
    assert all(len(shard) == 1 or sum(t.size for t in shard) <= limit for shard in cut)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_leaf_slices(data):
    """A slice of a stacked, laid-out parameter is that slice of the whole."""
    layout, shape = data.draw(
        st.sampled_from(
            [(AS_IS, (5, 4)), (AS_IS, (6,)), (TRANSPOSE, (3, 7)), (PATCH, (4, 3, 2, 2)), (VECTOR, (1, 1, 5))]
        )
    )
    layers = data.draw(st.integers(1, 3))
    values = np.random.default_rng(0).normal(size=(layers, *shape)).astype(np.float32)
    tensors = tuple(
        Tensor(str(i), shape, values.dtype, "x", lambda index, v=v: v[resolve(index, shape)])
        for i, v in enumerate(values)
    )
    stacked = data.draw(st.booleans())
    leaf = Leaf("p", tensors if stacked else tensors[:1], layout, stacked)
    whole = leaf.read()
    assert whole.shape == leaf.shape
    bounds = [sorted(data.draw(st.lists(st.integers(0, n), min_size=2, max_size=2))) for n in leaf.shape]
    index = tuple(slice(a, b) for a, b in bounds)
    np.testing.assert_array_equal(leaf.read(index), whole[index])
    one = whole[0] if stacked else whole
    np.testing.assert_array_equal(layout.write(one, shape), values[0])


def test_grown_rows_are_the_mean():
    values = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    tensor = Tensor("e", (5, 3), values.dtype, "x", lambda index: values[index])
    more = grown(tensor, 8)
    whole = np.concatenate([values, np.repeat(values.mean(0, keepdims=True), 3, 0)])
    np.testing.assert_allclose(more.read(full(more.shape)), whole, rtol=1e-6)
    np.testing.assert_allclose(more.read((slice(4, 7), slice(1, 2))), whole[4:7, 1:2], rtol=1e-6)
    np.testing.assert_allclose(more.read((slice(6, 8), slice(0, 3))), whole[6:8], rtol=1e-6)
    np.testing.assert_array_equal(grown(tensor, 2).read((slice(0, 2), slice(0, 3))), values[:2])


def test_damage_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="holds no weights"):
        read_directory(tmp_path)
    write_directory(tmp_path, planned(ARRAYS), 30)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="lacks the shard model-00002-of-00003.safetensors"):
        read_directory(tmp_path)
    save_file({"other": np.zeros(2)}, tmp_path / "model-00002-of-00003.safetensors")
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors lacks the tensor b"):
        read_directory(tmp_path)
    (tmp_path / "model-00002-of-00003.safetensors").write_bytes(
        (tmp_path / "model-00001-of-00003.safetensors").read_bytes()[:-7]
    )
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors is damaged"):
        read_directory(tmp_path)
    (tmp_path / shards.INDEX).write_text("{")
    with pytest.raises(CheckpointError, match=r"index\.json is not readable JSON"):
        read_directory(tmp_path)


def full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_leaves_the_old_export(tmp_path):
    target = tmp_path / "model"
    with staging(target) as stage:
        write_directory(stage, planned(ARRAYS), 30)
    before = {p.name: p.read_bytes() for p in target.iterdir()}
    with pytest.raises(CheckpointError, match=r"model could not be written \(No space left on device\): nothing"):
        with staging(target) as stage:
            write_directory(stage, planned({k: v + 1 for k, v in ARRAYS.items() if k != "d"}), 30, progress=full_disk)
    assert {p.name: p.read_bytes() for p in target.iterdir()} == before
    with pytest.raises(CheckpointError, match="fresh could not be written"):
        with staging(tmp_path / "fresh") as stage:
            full_disk()
    assert not (tmp_path / "fresh").exists()
    with pytest.raises(CheckpointError, match="single could not be written"):
        with replacing(tmp_path / "single") as partial:
            partial.write_text("half")
            full_disk()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def test_a_smaller_export_removes_stale_shards(tmp_path):
    for limit in (30, 10**9, 70):
        with staging(tmp_path) as stage:
            write_directory(stage, planned(ARRAYS), limit)
        assert {n: t.read(full(t.shape)).tobytes() for n, t in read_directory(tmp_path).items()} == {
            n: a.tobytes() for n, a in ARRAYS.items()
        }
    names = {p.name for p in tmp_path.iterdir()}
    assert shards.SINGLE not in names and len(names) == 1 + len({n for n in names if n.startswith("model-")})

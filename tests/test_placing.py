"""Weights on their way from files to devices: the right numbers in the right places, and no part of a file read twice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from vlm_jax.convert.tensors import AS_IS, DTYPES, STRIP, TRANSPOSE, Leaf, Tensor, copy
from vlm_jax.models import placing
from vlm_jax.models.placing import place
from vlm_jax.parallel.mesh import MeshConfig, make_mesh


class Counted:
    """A source of one parameter that counts the numbers it is asked for, and notes the slices."""

    def __init__(self, values):
        self.values, self.read_in_all, self.largest, self.asked = values, 0, 0, []

    def read(self, path, index):
        part = self.values[index]
        self.asked.append(tuple((one.start, one.stop) for one in index))
        self.read_in_all += part.size
        self.largest = max(self.largest, part.size)
        return part


SPECS = [PartitionSpec(), PartitionSpec(None, "fsdp", "tensor"), PartitionSpec(None, None, ("fsdp", "tensor"))]


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("sizes", [(1, 8, 1, 1), (2, 2, 2, 1)], ids=str)
def test_layers_are_read_once_for_all_devices(spec, sizes):
    values = np.random.default_rng(0).normal(size=(3, 16, 24)).astype(np.float32)
    source, mesh = Counted(values), make_mesh(MeshConfig(*sizes), jax.devices())
    goal = jax.ShapeDtypeStruct(values.shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))
    placed = place(source, "kernel", goal)
    assert placed.sharding.is_equivalent_to(goal.sharding, 3) and placed.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(placed), values.astype(jnp.bfloat16))
    assert source.read_in_all == values.size and source.largest == 16 * 24, "once, and one layer at a time"


@pytest.mark.parametrize(
    "path, shape, pieces",
    [
        ("a/kernel", (2, 6, 20), [((k, k + 1), (0, 6), (c, c + 5)) for k in (0, 1) for c in range(0, 20, 5)]),
        ("a/kernel", (6, 20), [((0, 6), (c, c + 5)) for c in range(0, 20, 5)]),
        ("a/embedding", (7, 8), [((0, 3), (0, 8)), ((3, 6), (0, 8)), ((6, 7), (0, 8))]),
        ("a/kernel_codes", (2, 4, 8), [((k, k + 1), (r, min(r + 3, 4)), (0, 8)) for k in (0, 1) for r in (0, 3)]),
        ("a/bias", (70,), [((0, 30),), ((30, 60),), ((60, 70),)]),
    ],
)
def test_pieces_lie_together_in_a_torch_file(monkeypatch, path, shape, pieces):
    """Of a kernel, (out, in) there, some columns at a time, of everything else some rows; 30 numbers at most."""
    monkeypatch.setattr(placing, "CHUNK", 30)
    source = Counted(np.arange(np.prod(shape), dtype=np.float32).reshape(shape))
    placed = place(source, path, jax.ShapeDtypeStruct(shape, jnp.float32))
    np.testing.assert_array_equal(np.asarray(placed), source.values)
    assert sorted(source.asked) == sorted(pieces)


def test_slices_that_lie_far_apart_are_read_alone():
    """A host that holds the first and the last eighth of the rows does not read what is between."""
    devices = jax.devices()
    values = np.arange(64, dtype=np.float32).reshape(16, 4)

    indices = {devices[0]: (slice(0, 2), slice(None)), devices[7]: (slice(14, 16), slice(None))}

    class Ends(jax.sharding.SingleDeviceSharding):
        """As if the other devices of the mesh belonged to other hosts."""

        def __init__(self):
            super().__init__(devices[0])

        def addressable_devices_indices_map(self, shape):
            return indices

    source = Counted(values)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "make_array_from_callback", lambda shape, where, get: list(map(get, indices.values())))
        first, last = place(source, "kernel", jax.ShapeDtypeStruct((16, 4), np.float32, sharding=Ends()))
    assert (first == values[:2]).all() and (last == values[14:]).all() and source.read_in_all == 16


def test_without_a_mesh_and_without_axes():
    source = Counted(np.float32(3))
    assert float(place(source, "scale", jax.ShapeDtypeStruct((), jnp.float32))) == 3
    rows = np.arange(12, dtype=np.float32).reshape(3, 4)
    placed = place(Counted(rows), "table", jax.ShapeDtypeStruct((3, 4), jnp.float32))
    assert (np.asarray(placed) == rows).all() and len(placed.devices()) == 1


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("layout", [AS_IS, TRANSPOSE], ids=["as_is", "transpose"])
@pytest.mark.parametrize("stacked", [True, False])
def test_a_leaf_is_what_its_layout_says(dtype, layout, stacked):
    """Sizes that strips do not divide; whole and by slices."""
    layers = np.random.default_rng(1).normal(size=(2 if stacked else 1, STRIP + 37, 45)).astype(dtype)
    parts = tuple(Tensor(str(k), one.shape, one.dtype, "file", one.__getitem__) for k, one in enumerate(layers))
    wanted = np.stack([one.T if layout is TRANSPOSE else one for one in layers])
    leaf = Leaf("kernel", parts, layout, stacked)
    wanted = wanted if stacked else wanted[0]
    for index in (None, (*[slice(1, 2)] * stacked, slice(3, 30), slice(5, 36))):
        found = leaf.read(index)
        np.testing.assert_array_equal(found, wanted if index is None else wanted[index])
        assert found.flags.c_contiguous and found.dtype == dtype


@pytest.mark.parametrize("stored", DTYPES.values(), ids=str)
@pytest.mark.parametrize("wanted", DTYPES.values(), ids=str)
def test_a_transposed_copy_casts_as_numpy_does(stored, wanted):
    values = np.random.default_rng(2).normal(size=(2 * STRIP + 5, 33)).astype(stored)
    for part in (values.T, values.T[4:9, 3:], values.T[:, ::-1]):
        out = np.zeros(part.shape, wanted)
        copy(part, out)
        assert out.tobytes() == part.astype(wanted).tobytes()

"""Meshes over several slices: `data` crosses them, so that nothing but reduced gradients travels between slices."""

import dataclasses
import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from vlm_jax.config import ConfigError
from vlm_jax.parallel.mesh import MeshConfig, make_mesh

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: extra tpu"
)


@dataclasses.dataclass(frozen=True)
class Device:
    """What a mesh asks of a device."""

    id: int
    slice_index: int
    process_index: int
    platform: str = "gpu"
    device_kind: str = "a device"
    coords: tuple[int, int, int] = (0, 0, 0)
    core_on_chip: int = 0
    client: object = None


def gpus(hosts, each):
    return [Device(h * each + d, h, h) for h in range(hosts) for d in range(each)]


def chips(slices, rows, columns):
    """TPU chips of a slice lie on a grid; ids run over all slices."""
    places = [(s, x, y) for s in range(slices) for y in range(columns) for x in range(rows)]
    return [Device(i, s, s, "tpu", "TPU v5 lite", (x, y, 0)) for i, (s, x, y) in enumerate(places)]


def grid(config, devices):
    """Slice of every device of the mesh, [data, fsdp, tensor, seq]."""
    return np.vectorize(lambda d: d.slice_index)(make_mesh(config, devices).devices)


@pytest.mark.parametrize("sizes", [(2, 8, 1, 1), (2, 4, 2, 1), (4, 1, 2, 2), (2, 1, 8, 1)])
def test_data_crosses_tpu_slices_and_nothing_else_does(sizes):
    """(2, 1, 8, 1) on 2 x 4 chips splits the axes of the grid."""
    found = grid(MeshConfig(*sizes), chips(2, 2, 4))
    assert found.shape == sizes
    assert (found == np.repeat([0, 1], sizes[0] // 2)[:, None, None, None]).all()


def test_tpu_slices_refuse_a_mesh_that_would_cross_them():
    with pytest.raises(
        ConfigError, match="mesh data=1 must be a multiple of the 2 slices: set mesh.data, for example to 2"
    ):
        make_mesh(MeshConfig(), chips(2, 2, 4))


def test_gpu_hosts_take_any_mesh_and_keep_the_last_axes_inside():
    devices = gpus(2, 8)
    assert (grid(MeshConfig(data=2, fsdp=8), devices) == np.array([0, 1])[:, None, None, None]).all()
    across = grid(MeshConfig(fsdp=8, tensor=2), devices[::-1])  # in whatever order they are listed
    assert across.shape == (1, 8, 2, 1) and (across == np.repeat([0, 1], 4)[None, :, None, None]).all()


@needs_libtpu
def test_only_shards_of_gradients_travel_between_slices():
    """Compiled for two v5e slices: the one thing sent is the gradient's shard, summed inside a slice before."""
    from jax.experimental import topologies

    from vlm_jax.planning.chips import topology
    from vlm_jax.planning.devices import devices

    devices(topology("v5e:2x4"))  # settles how libtpu starts on a machine without a TPU
    mesh = make_mesh(
        MeshConfig(data=2, fsdp=4, tensor=2), topologies.get_topology_desc("v5e:2x4", "tpu", num_slices=2).devices
    )
    assert [{d.slice_index for d in half.flat} for half in mesh.devices] == [{0}, {1}]
    size = 512
    place = NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
    kernel = jax.ShapeDtypeStruct((size, size), jnp.float32, sharding=place)
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    x = jax.ShapeDtypeStruct((64, size), jnp.float32, sharding=rows)
    step = jax.jit(jax.grad(lambda w, x: (jnp.tanh(x @ w) ** 2).sum()), out_shardings=place)
    text = step.trace(kernel, x).lower(lowering_platforms=("tpu",)).compile().as_text()
    sent = re.findall(r"= \(f32\[([\d,]+)\][^)]*\)[^=]* send\(.*xla_megascale_runtime", text)
    assert [np.prod(list(map(int, shape.split(",")))) for shape in sent] == [size * size // 8], text

"""The device mesh: axes `data, fsdp, tensor, seq` on CPU fakes, one GPU, GPU clusters and TPU slices alike."""

from __future__ import annotations

import dataclasses
import math
from typing import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from vlm_jax.config import ConfigError

AXES = ("data", "fsdp", "tensor", "seq")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; one of them may be -1 and takes what the others leave."""

    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    seq: int = 1

    def resolve(self, devices: int) -> tuple[int, int, int, int]:
        """Axis sizes for `devices` devices, in the order of AXES."""
        sizes = [self.data, self.fsdp, self.tensor, self.seq]
        text = ", ".join(f"{a}={n}" for a, n in zip(AXES, sizes))
        if sizes.count(-1) > 1 or any(n == 0 or n < -1 for n in sizes):
            raise ConfigError(f"mesh ({text}) needs positive sizes, with -1 for at most one axis")
        known = math.prod(n for n in sizes if n != -1)
        if -1 in sizes and devices % known == 0:
            sizes[sizes.index(-1)] = devices // known
        if math.prod(sizes) != devices:
            raise ConfigError(f"mesh ({text}) does not divide the {devices} devices there are: change the config keys under mesh")
        return tuple(sizes)


def make_mesh(config: MeshConfig = MeshConfig(), devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Mesh over `devices` (default: all). Over several TPU slices the `data` axis crosses the slices, so that only gradient
    reductions travel over the slow network between them."""
    devices = list(jax.devices() if devices is None else devices)
    sizes = config.resolve(len(devices))
    slices = len({getattr(d, "slice_index", 0) for d in devices})
    if slices > 1:
        if sizes[0] % slices:
            raise ConfigError(f"mesh data={sizes[0]} must be a multiple of the {slices} slices: set mesh.data")
        inner = (sizes[0] // slices, *sizes[1:])
        grid = mesh_utils.create_hybrid_device_mesh(inner, (slices, 1, 1, 1), devices)
    elif devices[0].platform == "tpu":
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    else:
        grid = np.asarray(devices).reshape(sizes)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))

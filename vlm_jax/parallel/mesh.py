"""The device mesh: axes `data, fsdp, tensor, seq` on CPU fakes, one GPU, GPU clusters and TPU slices alike."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from vlm_jax.config import ConfigError
from vlm_jax.parallel.mesh_config import AXES, MeshConfig


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

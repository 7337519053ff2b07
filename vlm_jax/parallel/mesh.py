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
    """Mesh over `devices` (default: all), which may lie in several slices (TPU slices, or GPUs that NVLink joins).

    The axis `data` crosses slices, so that only gradient reductions travel over the slow network between them. TPU slices refuse
    anything else. GPU hosts take other meshes too, the later axes within a host as far as they fit.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = config.resolve(len(devices))
    slices = len({getattr(d, "slice_index", 0) for d in devices})
    if devices[0].platform != "tpu":
        devices.sort(key=lambda d: (getattr(d, "slice_index", 0), d.id))  # XLA numbers the devices of a host in a row
        grid = np.empty(len(devices), object)
        grid[:] = devices
        grid = grid.reshape(sizes)
    elif sizes[0] % slices:
        raise ConfigError(
            f"mesh data={sizes[0]} must be a multiple of the {slices} slices: set mesh.data, for example to {slices}"
        )
    elif slices == 1:
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    else:
        inner = (sizes[0] // slices, *sizes[1:])
        grid = mesh_utils.create_hybrid_device_mesh(inner, (slices, 1, 1, 1), devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))

"""Devices that are not there: TPU slices through libtpu's compiler, GPUs through a target description."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence

import jax
from jax.experimental import topologies

from vlm_jax.config import ConfigError
from vlm_jax.planning.chips import Topology

# libtpu otherwise asks a metadata server that is not there, and refuses a second process on the same machine
_QUIET = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
}

# streaming multiprocessors, shared memory of one, L2 cache, clock in GHz, compute capability; from NVIDIA's data sheets
_GPUS = {
    "a100": ("NVIDIA A100-SXM4-80GB", 108, 167936, 41943040, 1.41, (8, 0)),
    "h100": ("NVIDIA H100 80GB HBM3", 132, 233472, 52428800, 1.98, (9, 0)),
    "h200": ("NVIDIA H200", 132, 233472, 62914560, 1.98, (9, 0)),
}


def devices(of: Topology) -> Sequence[jax.Device]:
    """The devices of a topology, to compile for and not to run on; ConfigError where the compiler is missing or refuses."""
    jax.config.update("jax_platforms", "cpu")  # planning needs no accelerator, and must not occupy one
    described = _gpus if of.chip.platform == "gpu" else _tpus
    try:
        return described(of)
    except ConfigError:
        raise
    except Exception as error:  # the compilers' own classes differ between versions
        raise ConfigError(
            f"--topology {of} is nothing that its compiler knows: {' '.join(str(error).split())[:200]}"
        ) from None


def _tpus(of: Topology) -> Sequence[jax.Device]:
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(f"--topology {of} needs the TPU compiler: pip install 'vlm_jax[tpu]' (no TPU is needed)")
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    several = {"num_slices": of.slices} if of.slices > 1 else {}
    return topologies.get_topology_desc(of.slice, "tpu", **several).devices


def _gpus(of: Topology) -> Sequence[jax.Device]:
    if not any(map(importlib.util.find_spec, ("jax_cuda12_plugin", "jax_cuda13_plugin"))):
        raise ConfigError(f"--topology {of} needs XLA's GPU compiler: pip install 'vlm_jax[gpu]' (no GPU is needed)")
    nodes, gpus = of.sizes if len(of.sizes) == 2 else (1, of.sizes[0])
    return topologies.get_topology_desc(
        "gpus", "cuda", target_config=_gpu_target(of), topology=f"1x{nodes}x{gpus}"
    ).devices


def _gpu_target(of: Topology) -> str:
    """XLA's GpuTargetConfigProto in text form."""
    name, cores, shared, l2, clock, (major, minor) = _GPUS[of.chip.name]
    feature = " feature_extension: ACCELERATED_FEATURES" if major >= 9 else ""
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: {shared}
  threads_per_core_limit: 2048 core_count: {cores} fpus_per_core: {128 if major >= 9 else 64} block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: {int(of.chip.bandwidth)} l2_cache_size: {l2}
  clock_rate_ghz: {clock} device_memory_size: {int(of.chip.memory)} shared_memory_per_block_optin: {shared - 1024}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability {{ major: {major} minor: {minor}{feature} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 patch: 0 }}
runtime_version {{ major: 12 minor: 8 patch: 0 }}
device_description_str: "{name}"
"""

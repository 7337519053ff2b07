"""Several processes as one program: start-up, which rows a process loads, batches made of all their rows.

    one process             python -m vlm_jax train ...
    Slurm, TPU slices       the same in every process; jax.distributed finds the others
    anything else           with VLM_JAX_COORDINATOR=host:port VLM_JAX_PROCESSES=2 VLM_JAX_PROCESS=0

`data_shard` says which rows of a batch a process loads.
"""

from __future__ import annotations

import glob
import hashlib
import importlib.util
import os
import sys
from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vlm_jax.config import ConfigError
from vlm_jax.parallel.rules import DEFAULT_RULES, Rules


def initialise(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Join the other processes, before anything touches a device; arguments that are given (not None, not negative) win over
    VLM_JAX_* variables."""
    coordinator = coordinator or os.environ.get("VLM_JAX_COORDINATOR")
    if coordinator:
        count = _number("VLM_JAX_PROCESSES") if processes is None or processes < 0 else processes
        index = _number("VLM_JAX_PROCESS") if process is None or process < 0 else process
        jax.distributed.initialize(coordinator, count, index)
    elif int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1 or _on_tpu_host():
        jax.distributed.initialize()


def _number(name: str) -> int:
    value = os.environ.get(name, "")
    if not value.isdigit():
        raise ConfigError(
            f"{name}={value!r} must be a number when a coordinator is given: "
            "set VLM_JAX_PROCESSES and VLM_JAX_PROCESS, or --process_count and --process_id"
        )
    return int(value)


def _on_tpu_host() -> bool:
    wanted = os.environ.get("JAX_PLATFORMS", "tpu").split(",")[0] == "tpu"
    return (
        wanted
        and importlib.util.find_spec("libtpu") is not None
        and bool(glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*"))
    )


def is_first() -> bool:
    """Whether this process prints and writes logs."""
    return jax.process_index() == 0


def say(message: str) -> None:
    """Print to stderr, once for all processes."""
    if is_first():
        print(message, file=sys.stderr, flush=True)


def wait_for_all(what: str) -> None:
    """Return when every process has come here; `what` names the place."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils  # here, because it starts the backend

        multihost_utils.sync_global_devices(what)


def agree(value: str) -> bool:
    """Whether every process has come here with the same text."""
    if jax.process_count() == 1:
        return True
    from jax.experimental import multihost_utils  # here, because it starts the backend

    mine = np.frombuffer(hashlib.sha256(value.encode()).digest(), np.uint32)
    return bool((multihost_utils.process_allgather(mine) == mine).all())


def data_shard(mesh: Mesh, rules: Rules = DEFAULT_RULES) -> tuple[int, int]:
    """(index, count): this process loads part `index` of `count` equal contiguous parts of each batch's rows.

    Processes that share rows, because a tensor or seq axis crosses them, get the same index.
    """
    over = tuple(a for a in rules["batch"] if a in mesh.shape)
    parts = int(np.prod([mesh.shape[a] for a in over]))
    where = NamedSharding(mesh, PartitionSpec(over)).addressable_devices_indices_map((parts,))
    mine = sorted({index[0].indices(parts)[0] for index in where.values()})
    if mine != list(range(mine[0], mine[0] + len(mine))) or mine[0] % len(mine):
        raise ConfigError(
            f"this process would load rows {mine} of {parts}, which are not one block: "
            "put mesh.data and mesh.fsdp first"
        )
    return mine[0] // len(mine), parts // len(mine)


def to_devices(local: Mapping[str, np.ndarray], shardings: Mapping[str, NamedSharding] | None) -> dict[str, jax.Array]:
    """Global arrays, laid out by `shardings`, from this process's rows (all rows where it is alone)."""
    if shardings is None:
        return {key: jax.device_put(x) for key, x in local.items()}
    return {key: jax.make_array_from_process_local_data(shardings[key], x) for key, x in local.items()}

"""Several processes as one program: start-up, what they do when one is lost, which rows a process loads.

    one process                  python -m vlm_jax train ...
    Slurm, TPU VMs, GKE, xpk     the same in every process; jax.distributed finds the others, those of other slices too
    anything else                with VLM_JAX_COORDINATOR=host:port VLM_JAX_PROCESSES=2 VLM_JAX_PROCESS=0
    limits                       VLM_JAX_CONNECT_SECONDS=300 to come together, VLM_JAX_HEARTBEAT_SECONDS=100 without a sign of life

`data_shard` says which rows of a batch a process loads.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import importlib.util
import json
import os
import socket
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vlm_jax.config import ConfigError, UserError
from vlm_jax.parallel import peers
from vlm_jax.parallel.rules import DEFAULT_RULES, Rules

CONNECT, HEARTBEAT = 300.0, 100.0  # seconds
MARGIN = 30  # seconds that jax waits longer than we do: it aborts the process with a stack trace
VERDICT = 5.0  # seconds in which a lost process is noticed after a collective failed

_peers: peers.Peers | None = None


def initialise(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    connect_seconds: float | None = None,
    heartbeat_seconds: float | None = None,
) -> None:
    """Join the other processes, before anything touches a device; arguments that are given (not None, not empty, not negative) win
    over VLM_JAX_* variables.

    A process whose peers do not come within `connect_seconds` says so in a sentence and exits with peers.LOST.
    """
    coordinator = coordinator or os.environ.get("VLM_JAX_COORDINATOR")
    limit = _seconds("VLM_JAX_CONNECT_SECONDS", connect_seconds, CONNECT)
    silence = _seconds("VLM_JAX_HEARTBEAT_SECONDS", heartbeat_seconds, HEARTBEAT)
    waits = {"initialization_timeout": int(limit) + MARGIN, "heartbeat_timeout_seconds": int(silence) + MARGIN}
    if coordinator:
        if not coordinator.rpartition(":")[2].isdigit():
            raise ConfigError(f"the coordinator {coordinator!r} must be HOST:PORT of process 0")
        count = _number("VLM_JAX_PROCESSES") if processes is None or processes < 0 else processes
        index = _number("VLM_JAX_PROCESS") if process is None or process < 0 else process
        if not 0 <= index < count:
            raise ConfigError(f"process {index} of {count} cannot be: --process_id goes from 0 to --process_count - 1")
        with _limited(limit, coordinator, index, count):
            jax.distributed.initialize(coordinator, count, index, **waits)
    elif int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1 or _on_tpu_host():
        with _limited(limit):
            jax.distributed.initialize(**waits)


@contextlib.contextmanager
def joined(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    connect_seconds: float | None = None,
    heartbeat_seconds: float | None = None,
) -> Iterator[None]:
    """`initialise`, and what is inside runs in all processes to its end or in none.

    A process that is killed, hangs or raises ends the others too, within `heartbeat_seconds` and mostly at once: each says which
    one it was in a sentence, and exits with the code of its error or, where it left none, with peers.LOST.
    """
    global _peers
    initialise(coordinator, processes, process, connect_seconds, heartbeat_seconds)
    silence = _seconds("VLM_JAX_HEARTBEAT_SECONDS", heartbeat_seconds, HEARTBEAT)
    known = coordinator or os.environ.get("VLM_JAX_COORDINATOR") or ""
    _peers = _watch(silence, known.rpartition(":")[0].strip("[]")) if jax.distributed.is_initialized() else None
    if _peers is None:
        yield
        return
    try:
        yield
    except BaseException as error:
        _fail(error)
    _peers.end()
    _peers = None


def _watch(silence: float, known: str) -> peers.Peers | None:
    """The watch over all processes, None where they cannot reach the first; known: a name of its host."""
    from jax.experimental import multihost_utils  # here, because it starts the backend

    me, count = jax.process_index(), jax.process_count()
    if count == 1:
        return None
    listener, offer = peers.listen(known) if me == 0 else (None, None)
    told = np.zeros(1024, np.uint8)
    if offer:
        words = json.dumps(offer).encode()[: len(told)]
        told[: len(words)] = np.frombuffer(words, np.uint8)
    told = np.asarray(multihost_utils.broadcast_one_to_all(told)).tobytes().rstrip(b"\0")
    offer = peers.Offer(*json.loads(told))
    line = None if me == 0 else peers.call(offer, me)
    watch = peers.Peers(me, count, silence, offer.token, listener, line)
    watch.start()
    reached = multihost_utils.process_allgather(np.asarray(me == 0 or line is not None))
    if reached.all():
        return watch
    watch.cancel()
    say(
        "the processes cannot reach each other but through jax: one that is lost is noticed after jax's heartbeat timeout"
    )
    return None


def _fail(error: BaseException) -> None:
    """End this process, and the others, with what went wrong here, unless it went wrong because another is lost."""
    if isinstance(error, UserError):
        sentence, code = str(error), 2
    else:
        _peers.join(VERDICT)  # a collective may have failed because a process is gone: then the watch ends this one
        traceback.print_exception(error)
        sentence, code = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", 1
    _peers.end(sentence, code)
    peers.leave(sentence, code)  # no exit handlers: jax's waits for the others


def share(number: float) -> None:
    """Tell the first process a number of this one, at no cost for the devices; see `shared`."""
    if _peers is not None:
        _peers.share(number)


def shared() -> dict[int, float]:
    """{process: the number it shared last, at most some seconds ago}, on the first process inside `joined`; else empty."""
    return {} if _peers is None else _peers.shared()


@contextlib.contextmanager
def _limited(seconds: float, coordinator: str = "", process: int = 0, count: int = 0) -> Iterator[None]:
    """Give up on the others after `seconds`: jax would abort with a stack trace."""

    def give_up() -> None:
        peers.leave(_nobody(seconds, coordinator, process, count), peers.LOST)

    clock = threading.Timer(seconds, give_up)
    clock.daemon = True
    clock.start()
    try:
        yield
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise ConfigError(
            f"the other processes could not be joined: {' '.join(str(error).split())[:300]}; check what the cluster says about them, "
            "or give --coordinator, --process_id and --process_count"
        ) from error
    finally:
        clock.cancel()


def _nobody(seconds: float, coordinator: str, process: int, count: int) -> str:
    """Why the processes did not come together, as far as this one can tell."""
    longer = "or wait longer with --connect_seconds"
    if coordinator and process:
        host, _, port = coordinator.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), 3).close()
        except OSError as error:
            return (
                f"the coordinator {coordinator} could not be reached within {seconds:g} s ({error.strerror or error}): start "
                f"process 0 there, check name, port and firewall, {longer}"
            )
    who = (
        f"all {count} processes, each --process_id from 0 to {count - 1} once" if count else "the command on all hosts"
    )
    return f"the processes did not come together within {seconds:g} s: start {who}, {longer}"


def _seconds(name: str, given: float | None, default: float) -> float:
    """A limit: the argument, else the variable `name`, else the default."""
    if given is not None and given > 0:
        return given
    text = os.environ.get(name, "")
    try:
        seconds = float(text) if text else default
    except ValueError:
        seconds = 0.0
    if seconds <= 0:
        raise ConfigError(f"{name}={text!r} must be a positive number of seconds")
    return seconds


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

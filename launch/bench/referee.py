"""Two sides in processes of their own that take turns: orders and replies are lines of JSON over the standard streams.

    side.ask("run", updates=3) -> {"seconds": ..., "cpu": ...}      in the process: serve({"run": run})

Both sides get the same number of cores. A side that fails (out of memory, a compiler that gives up) answers with the reason and can
be asked again; one that dies is started anew.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ACCELERATED = (
    shutil.which("nvidia-smi") is not None
)  # asked without a library, so that this process takes no memory of it
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # of this process


class Failed(Exception):
    """A side could not do what it was asked; the message is the reason in one line."""


class Side:
    """One side: `script` of this folder, started with `folder` when it is first asked."""

    def __init__(self, name: str, script: str, folder: Path, cores: int):
        self.name, self._script, self._folder, self._cores = name, script, folder, cores
        self._process: subprocess.Popen | None = None
        self._log = folder / f"{name}.log"

    def ask(self, do: str, **order: Any) -> dict[str, Any]:
        """The reply to an order; Failed if the side says so or dies."""
        self._start()
        self._process.stdin.write(json.dumps({"do": do, **order}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            self.stop()
            last = self._log.read_text(errors="replace").strip().splitlines()[-1:] or ["without a word"]
            raise Failed(f"{self.name} died: {last[0][:200]}")
        reply = json.loads(line)
        if "failed" in reply:
            raise Failed(reply["failed"])
        return reply

    def stop(self) -> None:
        """End the process and give its memory back."""
        if self._process is not None:
            self._process.stdin.close()
            self._process.wait()
            self._process.stdout.close()
            self._process = None

    def _start(self) -> None:
        if self._process is not None:
            return
        environment = os.environ | {"OMP_NUM_THREADS": str(self._cores), "XLA_PYTHON_CLIENT_MEM_FRACTION": ".93"}
        environment |= {"PYTORCH_ALLOC_CONF": "expandable_segments:True", "TRANSFORMERS_VERBOSITY": "error"}
        environment |= {
            "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"
        }  # large pages for both, as launch/quickstart.sh has them
        with self._log.open("a") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(HERE / self._script), str(self._folder), str(self._cores)], env=environment,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            )  # fmt: skip


@contextlib.contextmanager
def sides(case: Any, **scripts: str) -> Iterator[dict[str, Side]]:
    """{name: Side} of {name: script}, each with `case.threads` cores, in a folder whose case.json is the dataclass `case`; sides and
    folder end with the context."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "case.json").write_text(json.dumps(dataclasses.asdict(case)))
        made = {name: Side(name, script, Path(folder), case.threads) for name, script in scripts.items()}
        try:
            yield made
        finally:
            for side in made.values():
                side.stop()


def take_cores(count: int) -> None:
    """Let this process run on `count` cores only; before jax starts, which makes as many threads. A machine that cannot bind
    processes is left alone."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])


def keep_programs(folder: Path) -> None:
    """Compiled programs of jax are kept in `folder` for a side that is started again."""
    import jax

    jax.config.update("jax_compilation_cache_dir", str(folder / "programs"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def serve(orders: Mapping[str, Callable[..., dict[str, Any]]]) -> None:
    """Answer orders until the input ends. What libraries print goes to the error stream."""
    wire = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        order = json.loads(line)
        try:
            reply = orders[order.pop("do")](**order)
        except Exception as error:  # of compilers and allocators, whose types differ; the reason is handed on
            sys.excepthook(*sys.exc_info())
            reply = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
        wire.write(json.dumps(reply) + "\n")
        wire.flush()


class Clock:
    """Seconds, and processor seconds of this process, its threads and its ended children, since it was made."""

    def __init__(self):
        self._began, self._cpu = time.perf_counter(), self._used()

    def read(self) -> dict[str, float]:
        """{"seconds", "cpu"}"""
        return {"seconds": time.perf_counter() - self._began, "cpu": self._used() - self._cpu}

    def _used(self) -> float:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(u.ru_utime + u.ru_stime for u in used)


def alternate(
    visits: Mapping[str, Callable[[], dict[str, Any]]], rounds: int, between: Callable[[], None] = lambda: None
) -> dict[str, dict[str, Any]]:
    """{name: the last reply with medians of "seconds" and "cpu"}: the visits take turns, every round in the other order.

    A visit that fails is {"failed": why}. between: called after every visit.
    """
    replies: dict[str, list[dict[str, Any]]] = {name: [] for name in visits}
    failed: dict[str, str] = {}
    for number in range(rounds):
        for name in list(visits)[:: -1 if number % 2 else 1]:
            if name in failed:
                continue
            try:
                replies[name].append(visits[name]())
            except Failed as error:
                failed[name] = str(error)
            between()
    found: dict[str, dict[str, Any]] = {name: {"failed": why} for name, why in failed.items()}
    for name in visits.keys() - failed.keys():
        medians = {key: statistics.median(r[key] for r in replies[name]) for key in ("seconds", "cpu")}
        spread = [min(r["seconds"] for r in replies[name]), max(r["seconds"] for r in replies[name])]
        found[name] = replies[name][-1] | medians | {"spread": spread}
    return {name: found[name] for name in visits}


def write_results(path: str, results: Mapping[str, Any]) -> None:
    """Results as JSON, if a path is given."""
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(results, indent=1) + "\n")

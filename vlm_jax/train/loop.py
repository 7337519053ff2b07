"""The training loop: restore or create, compile once, feed, step, log, save, stop cleanly.

    run/config.json     the resolved config        run/metrics.jsonl    one line per update (train.metrics)
    run/checkpoints/    see train.checkpoint       run/profile/         a trace, when asked for

At most two updates are in flight and metrics are fetched once per `log_every` updates: the device never
waits for the host. What is trained is a `task.Task`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from vlm_jax.config import UserError, VLMConfig
from vlm_jax.parallel import hosts, rules
from vlm_jax.parallel.compiling import compile_step
from vlm_jax.parallel.mesh import make_mesh
from vlm_jax.train import compiled, metrics
from vlm_jax.train.checkpoint import Checkpointer
from vlm_jax.train.feed import Feed, OpenBatches
from vlm_jax.train.options import TrainConfig
from vlm_jax.train.state import LeafSource, TrainState
from vlm_jax.train.task import Given, Task, VLMTask


class TrainingError(UserError):
    """Training cannot go on; the message names the step and what to do."""


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended: status "finished", "stopped" (SIGTERM, saved) or "already finished".

    step: updates done; seconds: in all, compile_seconds of them compiling; rates: medians over logging
    windows (metrics.Speed).
    """

    status: str
    state: TrainState
    step: int
    seconds: float = 0.0
    compile_seconds: float = 0.0
    rates: Mapping[str, float] = dataclasses.field(default_factory=dict)


class StopSignal:
    """Remembers a SIGTERM, so that the loop can finish its update, save, and leave with exit status 0."""

    def __enter__(self) -> StopSignal:
        self._seen = False
        self._several = (
            jax.process_count() > 1
        )  # then jax.distributed watches for the signal and all processes agree on a step
        if not self._several:
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: Any) -> None:
        if not self._several:
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, *_: Any) -> None:
        self._seen = True

    def seen(self, step: int) -> bool:
        """Whether to stop after `step`."""
        return multihost_utils.reached_preemption_sync_point(step) if self._several else self._seen


def train(
    config: TrainConfig,
    model: VLMConfig,
    batches: OpenBatches,
    run: str | Path,
    *,
    source: LeafSource | None = None,
    **how: Any,
) -> Result:
    """`run_task` of a vision-language model; source: initial weights (default: random)."""
    return run_task(VLMTask(config, model, source), batches, run, **how)


def run_task(
    task: Task,
    batches: OpenBatches,
    run: str | Path,
    *,
    available_steps: int | None = None,
    mesh: Mesh | None = None,
    table: rules.Rules = rules.DEFAULT_RULES,
    saved_config: Mapping[str, Any] | None = None,
    progress: bool = True,
    prepare: Callable[[TrainState], None] | None = None,
) -> Result:
    """Train until the last update, or go on from the newest checkpoint in the folder `run`.

    batches: see feed.OpenBatches; available_steps: updates that the data gives. saved_config: what is stored beside
    the checkpoints (default: the task's). prepare: called with the state before the first batch is read.
    """
    began, run, total = time.perf_counter(), Path(run), task.config.total_steps(available_steps)
    saved_config = saved_config or task.saved_config()
    with contextlib.ExitStack() as stack:
        stack.enter_context(compiled.kept(task.config.compile_cache, run))
        stack.enter_context(rules.use(mesh or make_mesh(), table))
        checkpoints = Checkpointer(run / "checkpoints", task.config.keep)
        stack.callback(checkpoints.close)
        state, data, start = _start(task, checkpoints, saved_config)
        if start >= total:
            hosts.say(
                f"the run in {run} is finished: all {total} steps are done; "
                "raise train.steps or name another run folder to train more"
            )
            return Result("already finished", state, start)
        if prepare is not None:
            prepare(state)
        stop = stack.enter_context(StopSignal())  # until here a SIGTERM ends the process: there is nothing to save
        if hosts.is_first():
            (run / "config.json").write_text(json.dumps(saved_config, indent=2) + "\n")
        loop = Loop(task, run, total, checkpoints, saved_config, progress)
        loop.open(state, batches, start, data)
        stack.callback(loop.close)
        status = loop.run_until(stop)
        checkpoints.wait()
        if status == "stopped":
            hosts.say(
                f"stopped by SIGTERM: step {loop.step} of {total} is saved in {run}; "
                "start the same command again to go on"
            )
        return Result(
            status,
            loop.state,
            loop.step,
            time.perf_counter() - began,
            loop.compile_seconds,
            loop.speed.median(),
        )


def _start(
    task: Task, checkpoints: Checkpointer, saved_config: Mapping[str, Any]
) -> tuple[TrainState, dict[str, Any] | None, int]:
    """(state, data state, updates done): the newest checkpoint if there is one, else a fresh state."""
    if checkpoints.latest() is None:
        return task.create(), None, 0
    state, meta = checkpoints.restore(task.abstract())
    hosts.say(f"the checkpoint of step {meta['step']} is read from {checkpoints.folder}")
    before, now = meta["config"].get("train", {}), json.loads(json.dumps(saved_config.get("train", {})))
    for key in sorted(key for key in before.keys() & now.keys() if before[key] != now[key]):
        hosts.say(f"train.{key} was {before[key]!r} when the checkpoint was saved and is {now[key]!r} now")
    return state, meta["data"], meta["step"]


class Loop:
    """The moving parts of one run between its first and last update."""

    def __init__(
        self,
        task: Task,
        run: Path,
        total: int,
        checkpoints: Checkpointer,
        saved_config: Mapping,
        progress: bool,
    ):
        self.task, self.config, self.run, self.total = task, task.config, run, total
        self._checkpoints, self._saved_config, self._shown = checkpoints, saved_config, progress
        self._pending: list[tuple[int, Given, dict[str, jax.Array]]] = []  # (step, scheduled, results on the device)
        self._tracing = False

    def open(self, state: TrainState, batches: OpenBatches, start: int, data: dict[str, Any] | None) -> None:
        """Read the first batch, compile for its shapes, open the logs."""
        c = self.config
        self.state, self.step = state, start
        self._feed = Feed(batches, start, data, c.accum, self.task.axes)
        began = time.perf_counter()
        batch = {key: jax.ShapeDtypeStruct(shape, self._feed.dtypes[key]) for key, shape in self._feed.shapes.items()}
        given = jax.tree.map(lambda _: jax.ShapeDtypeStruct((), np.float32), self.task.given(start, self.total))
        lowered = self.task.step(self._feed.shapes).lower(state, batch, given)
        self._update = compile_step(lowered, jax.default_backend())
        self.compile_seconds = time.perf_counter() - began
        self.speed = self.task.rates(state, self._feed.shapes)
        self._writer = metrics.MetricWriter(self.run, start, c.tensorboard, c.wandb, self._saved_config)
        hosts.say(
            f"{jax.device_count()} x {jax.devices()[0].device_kind}: {self.task.size(state)}, "
            f"{self.total} steps of {c.global_batch} {self.task.unit}, compiled in {self.compile_seconds:.1f} s"
        )
        self._bar = metrics.Progress(self.total, start, self._shown)
        self._restart_clock()

    def close(self) -> None:
        """Stop the reader thread and finish the logs."""
        if self._tracing:
            jax.profiler.stop_trace()
        self._feed.close()
        self._bar.close()
        self._writer.close()

    def run_until(self, stop: StopSignal) -> str:
        """Updates until the last one or a stop signal; returns the status of Result."""
        stopping = False
        while self.step < self.total and not stopping:
            data = self._advance()
            stopping = stop.seen(self.step)
            saving = stopping or self.step == self.total or self.step % self.config.save_every == 0
            if saving or self.step % self.config.log_every == 0:
                self._report()
            if saving:
                self._checkpoints.save(self.step, self.state, data, self._saved_config)
                self._restart_clock()
        return "finished" if self.step == self.total else "stopped"

    def _advance(self) -> dict[str, Any] | None:
        """Start one update; returns the data state after its batch."""
        fed = next(self._feed, None)
        if fed is None:
            raise TrainingError(
                f"the data ended after step {self.step} of {self.total}: raise train.epochs or lower train.steps"
            )
        first, last = self.config.profile or (0, 0)
        if self.step + 1 == first:
            jax.profiler.start_trace(str(self.run / "profile"))
            self._tracing = True
        given = self.task.given(self.step, self.total)
        self.state, results = self._update(self.state, fed.arrays, jax.tree.map(np.float32, given))
        self.step += 1
        self._pending.append((self.step, given, results))
        if len(self._pending) > 1:
            began = time.perf_counter()
            jax.block_until_ready(self._pending[-2][2]["loss"])
            self._blocked += time.perf_counter() - began
        if self._tracing and self.step >= last:
            jax.block_until_ready(results["loss"])
            jax.profiler.stop_trace()
            self._tracing = False
        return fed.state

    def _report(self) -> None:
        """Fetch and write the metrics since the last report; raise at the first that is not finite."""
        if not self._pending:
            return
        began = time.perf_counter()
        fetched = [(step, given, jax.device_get(results)) for step, given, results in self._pending]
        self._blocked += time.perf_counter() - began
        seconds, waited = time.perf_counter() - self._clock, self._feed.waited - self._waited
        hosts.share((seconds - self._blocked) / len(fetched))
        lines = [self.task.line(*one, self._feed.shapes) for one in fetched]
        lines[-1] |= self.speed.window([results for _, _, results in fetched], seconds, waited) | self._feed.counts()
        lines[-1] |= metrics.straggler(hosts.shared(), seconds / len(fetched))
        for line in lines:
            if words := metrics.not_finite(line):
                self._writer.flush()
                raise TrainingError(self._not_finite(line["step"], words))
            self._writer.write(line)
        self._writer.flush()
        self._bar.update(len(lines), self.speed.words(lines[-1]) + metrics.slow_words(lines[-1]))
        self._restart_clock()

    def _not_finite(self, step: int, words: str) -> str:
        samples, saved = self._feed.samples_of(step - 1), self._checkpoints.latest()
        made_of = f", whose batch holds samples {samples}," if samples is not None else ""
        kept = f"the checkpoint of step {saved} is intact" if saved is not None else "no checkpoint had been written"
        return f"step {step}{made_of} has {words}; {kept}: lower train.lr, raise train.warmup_ratio, or look at these samples"

    def _restart_clock(self) -> None:
        self._pending = []
        self._clock, self._waited, self._blocked = time.perf_counter(), self._feed.waited, 0.0

"""Batches on their way to the devices: read and copied ahead by one thread, each with its data state."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from vlm_jax.parallel import hosts, rules
from vlm_jax.train.step import BATCH_AXES, Axes, batch_shardings, split_micro_batches

# (first step wanted, data state of the checkpoint or None) -> iterator of (step, row batch of this process);
# it may also have
# state() -> dict (JSON: where it stands), samples_of(step) -> list (what a batch is made of, for messages) and
# counts() -> dict of numbers (what is not trained on as it stands, for the metrics)
OpenBatches = Callable[[int, dict[str, Any] | None], Iterator[tuple[int, dict[str, np.ndarray]]]]


class Fed(NamedTuple):
    """A batch on the devices [A, B, ...] and the data state after it."""

    step: int
    arrays: dict[str, jax.Array]
    state: dict[str, Any] | None


class Feed:
    """Iterator of Fed with `ahead` batches in flight; `waited` adds up the seconds that next() had to wait.

    axes: logical axes of the arrays that are read (default: of row batches). shapes, dtypes: {key: global shape [A, B, ...]},
    {key: dtype} of every batch.
    """

    def __init__(
        self,
        open_batches: OpenBatches,
        start: int,
        state: dict[str, Any] | None,
        accum: int,
        axes: Axes = BATCH_AXES,
        ahead: int = 2,
    ):
        self.waited, self._accum, self._axes = 0.0, accum, axes
        self._batches = open_batches(start, state)
        self._queue: queue.Queue = queue.Queue(ahead)
        self._stop = threading.Event()
        step, rows = next(self._batches)
        local = split_micro_batches(rows, accum, axes)
        shards = hosts.data_shard(*rules.current())[1] if rules.current() else 1
        self.shapes = {key: (x.shape[0], x.shape[1] * shards, *x.shape[2:]) for key, x in local.items()}
        self.dtypes = {key: x.dtype for key, x in local.items()}
        self._shardings = batch_shardings(
            self.shapes, axes
        )  # here, because the other thread is outside the mesh in use
        self._queue.put(self._place(step, local))
        self._thread = threading.Thread(target=self._run, daemon=True, name="feed")
        self._thread.start()

    def __iter__(self) -> Iterator[Fed]:
        return self

    def __next__(self) -> Fed:
        began = time.perf_counter()
        item = self._queue.get()
        self.waited += time.perf_counter() - began
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        """Stop reading ahead."""
        self._stop.set()
        while self._thread.is_alive():
            try:
                self._queue.get(timeout=0.05)
            except queue.Empty:
                continue

    def samples_of(self, step: int) -> list | None:
        """What the batch of `step` was made of, if the data can tell."""
        tell = getattr(self._batches, "samples_of", None)
        return None if tell is None else list(tell(step))

    def counts(self) -> dict[str, int]:
        """What the data says about samples that are not trained on."""
        count = getattr(self._batches, "counts", None)
        return {} if count is None else dict(count())

    def _place(self, step: int, local: dict[str, np.ndarray]) -> Fed:
        state = self._batches.state() if hasattr(self._batches, "state") else None
        return Fed(step, hosts.to_devices(local, self._shardings), state)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                step, rows = next(self._batches)
                item = self._place(step, split_micro_batches(rows, self._accum, self._axes))
            except BaseException as error:  # handed to the consumer, StopIteration too
                item = error
            self._put(item)
            if isinstance(item, BaseException):
                return

    def _put(self, item: Any) -> None:
        while not self._stop.is_set():
            try:
                return self._queue.put(item, timeout=0.05)
            except queue.Full:
                continue

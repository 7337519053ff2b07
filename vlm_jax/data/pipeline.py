"""Records to batches, in an order that depends on data, seed and step alone, whatever the hosts and restarts.

    records -> manifest (lengths, once) -> plan of each epoch -> Rows[row] -> Grain threads -> host's batch

    global row   0 ... of epoch 0 | of epoch 1 | ... | padding rows that fill the last batch
    step s       rows [row0 + s*G, row0 + (s+1)*G); of these host h of H takes its contiguous G/H

Images are decoded only when a row is built, in Grain's reader threads (Pillow releases the GIL). The state of
the pipeline is one number, the next global row; seed and manifest hash are kept beside it so that changed
data is refused.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np

from vlm_jax.config import VLMConfig
from vlm_jax.data import images, packing
from vlm_jax.data.manifest import (
    BAD,
    DataError,
    Layout,
    check_limit,
    checksum,
    load_or_measure,
    name_of,
    sources_of,
)
from vlm_jax.data.tasks import Sample

log = logging.getLogger(__name__)

PLANS_KEPT = 8  # epochs whose plan stays in memory: readers run ahead over the end of an epoch


@dataclasses.dataclass(frozen=True)
class Packing:
    """How samples share rows, in which order and for how long.

    row_length slots and view_budget image views per row, sample_length slots per sample (default: a row),
    max_samples per row (1: unpacked); epochs passes in an order drawn from seed; up to max_bad broken samples
    are skipped.
    """

    row_length: int = 4096
    view_budget: int = 6
    sample_length: int | None = None
    max_samples: int | None = None
    window: int = packing.WINDOW
    seed: int = 0
    epochs: int = 1
    max_bad: int = 100


class Rows:
    """All rows of a run: `rows[k]` is row k counted over all epochs, a numpy dict (see packing.build_row).

    records: anything with len() and [i]; encode(record) -> Sample(tokens, labels, images). Both may have a
    `fingerprint` string, then the measured manifest is kept in `cache`.
    """

    def __init__(
        self,
        records: Sequence[Any],
        encode: Callable[[Any], Sample],
        config: VLMConfig,
        how: Packing = Packing(),
        cache: str | Path | None = None,
        threads: int = 4,
        processes: int = 0,
    ):
        self.records, self.how, self.preprocess = records, how, images.Preprocess.of(config)
        limit, vision = min(how.sample_length or how.row_length, how.row_length), config.vision
        self.layout = Layout(encode, config, limit, how.view_budget)
        self.shape = packing.RowShape(how.row_length, how.view_budget, vision.image_size, vision.features)
        self.manifest = load_or_measure(records, self.layout, how.max_bad, cache, threads, processes)
        self.broken: dict[int, str] = {}  # record index -> sentence, found while decoding
        self._usable = self.manifest.usable
        self._plans: collections.OrderedDict[int, packing.Plan] = collections.OrderedDict()
        self._lock = threading.Lock()
        self._ends: list[int] = []  # global row after the last of each epoch
        for epoch in range(how.epochs):
            self._ends.append((self._ends[-1] if epoch else 0) + len(self.plan(epoch)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def plan(self, epoch: int) -> packing.Plan:
        """The packing plan of `epoch`; its sample numbers index the usable records."""
        h, m = self.how, self.manifest
        with self._lock:
            if epoch not in self._plans:
                lengths, views = m.lengths[self._usable], m.views[self._usable]
                limits = h.row_length, h.view_budget, h.seed, epoch, h.window, h.max_samples
                self._plans[epoch] = packing.plan(lengths, views, *limits)
                if len(self._plans) > PLANS_KEPT:
                    self._plans.popitem(last=False)
            self._plans.move_to_end(epoch)
            return self._plans[epoch]

    def rows_per_epoch(self, epoch: int) -> int:
        """Rows of one epoch (epochs differ a little, because each is shuffled before it is packed)."""
        return self._ends[epoch] - (self._ends[epoch - 1] if epoch else 0)

    def locate(self, row: int) -> tuple[int, int]:
        """Global row -> (epoch, row inside it)."""
        epoch = bisect.bisect_right(self._ends, row)
        return epoch, row - (self._ends[epoch - 1] if epoch else 0)

    def records_of(self, row: int) -> np.ndarray:
        """Indices of the records that share global row `row`."""
        epoch, inside = self.locate(row)
        return self._usable[self.plan(epoch)[inside]]

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        pieces = [self._piece(int(i)) for i in self.records_of(row)] if row < len(self) else []
        return packing.build_row(pieces, self.shape)

    def _piece(self, index: int) -> packing.Piece:
        """Encode and decode one record; a broken image leaves padding of the measured size and is counted."""
        length, views = int(self.manifest.lengths[index]), int(self.manifest.views[index])
        record = self.records[index]
        sample, name = self.layout.encode(record), name_of(record, index)
        if checksum(sample) != self.manifest.checks[index]:
            raise DataError(f"{name} has changed since its length was measured: restart to measure the data again")
        try:
            loaded = [images.load_views(source, self.preprocess) for source in sources_of(sample, name)]
        except images.ImageError as error:
            self._count_broken(index, str(error))
            return packing.Piece(length, views, None, None)
        slots, count, found = self.layout.place(sample, [size for _, size in loaded], name)
        if (len(slots), found) != (length, views):
            raise DataError(f"an image of {name} has changed its size since it was measured: restart to measure again")
        pixels = np.concatenate([v for v, _ in loaded[:count]]) if count else None
        return packing.Piece(length, views, slots, pixels)

    def _count_broken(self, index: int, sentence: str) -> None:
        with self._lock:
            if index not in self.broken:
                log.warning("trained as padding: %s", sentence)
            self.broken[index] = sentence
            check_limit(self.bad_count, self.how.max_bad, sentence)

    @property
    def bad_count(self) -> int:
        """Bad samples known so far: those of the manifest and those found while decoding."""
        return self.manifest.count(BAD) + len(self.broken)

    def identity(self) -> dict[str, Any]:
        """What decides the order of samples: seed, manifest hash and packing limits (JSON)."""
        h = self.how
        packed = [h.row_length, h.view_budget, h.max_samples, h.window, self.layout.limit]
        return {"seed": h.seed, "manifest": self.manifest.digest(), "packing": packed}


class Batches:
    """Iterator of (step, row batch of this host), read ahead by Grain threads.

    global_batch: rows per step over all hosts. Starts at `start_step`, or where `state` (of a checkpoint, of
    any number of hosts and any batch size) says. `waited` is the time in seconds spent waiting for data.
    """

    def __init__(
        self,
        rows: Rows,
        global_batch: int,
        start_step: int = 0,
        process_index: int = 0,
        process_count: int = 1,
        num_threads: int = 4,
        state: Mapping[str, Any] | None = None,
    ):
        if global_batch % process_count:
            raise DataError(
                f"train.global_batch={global_batch} rows cannot be divided evenly among {process_count} hosts"
            )
        self.rows, self.global_batch, self.waited = rows, global_batch, 0.0
        self._identity = rows.identity()
        self.step, self._row = start_step, start_step * global_batch
        if state is not None:
            self.step, self._row = check_state(state, self._identity)
        self._origin = self._row - self.step * global_batch  # row that step 0 would start with
        local = global_batch // process_count
        source = _HostRows(rows, self._row, global_batch, process_index * local, local)
        ahead = max(2 * local, 2 * num_threads, 1)
        options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=ahead)
        rows_in_order = grain.MapDataset.source(source).to_iter_dataset(options)
        batches = rows_in_order.batch(local, batch_fn=packing.batch_rows)
        self._iterator = iter(batches) if len(source) else iter(())

    def __iter__(self) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        return self

    def __next__(self) -> tuple[int, dict[str, np.ndarray]]:
        began = time.perf_counter()
        batch = next(self._iterator)
        self.waited += time.perf_counter() - began
        step, self.step, self._row = self.step, self.step + 1, self._row + self.global_batch
        return step, batch

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps to continue with the batch after the last one returned (JSON)."""
        return {"step": self.step, "row": self._row, **self._identity}

    def samples_of(self, step: int) -> list[int]:
        """Indices of the records in the batch of `step`, over all hosts."""
        first = self._origin + step * self.global_batch
        rows = range(first, min(first + self.global_batch, len(self.rows)))
        return [int(index) for row in rows for index in self.rows.records_of(row)]


def check_state(state: Mapping[str, Any], identity: Mapping[str, Any]) -> tuple[int, int]:
    """(step, global row) of a saved state; raises DataError if the data or its order has changed since."""
    words = {
        "manifest": "the training data",
        "seed": "data.seed",
        "packing": "the row length, view budget or packing",
    }
    for key, what in words.items():
        if state[key] != identity[key]:
            raise DataError(
                f"{what} changed since the checkpoint was saved ({key} {state[key]} then, {identity[key]} "
                "now): restore it, or start a new run from the saved parameters"
            )
    return int(state["step"]), int(state["row"])


def total_steps(rows: Rows, global_batch: int) -> int:
    """Steps that show every row of every epoch once; the last batch is filled up with padding rows."""
    return -(-len(rows) // global_batch)


@dataclasses.dataclass(frozen=True)
class _HostRows:
    """Random-access source for Grain: the rows of one host, step after step, from global row `first` on."""

    rows: Rows
    first: int
    global_batch: int
    offset: int
    local: int

    def __len__(self) -> int:
        return max(0, -(-(len(self.rows) - self.first) // self.global_batch)) * self.local

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        step, inside = divmod(index, self.local)
        return self.rows[self.first + step * self.global_batch + self.offset + inside]

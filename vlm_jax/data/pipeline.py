"""Records to batches, in an order that depends on data, seed and step alone, whatever the hosts and restarts.

    sources -> manifest (lengths, once) -> mixture (records of an epoch) -> plan (rows of an epoch)
            -> Rows[row] -> Grain threads -> host's batch

    global row   0 ... of epoch 0 | of epoch 1 | ... | padding rows that fill the last batch
    step s       rows [row0 + s*G, row0 + (s+1)*G); of these host h of H takes its contiguous G/H

Images are decoded only when a row is built, in Grain's reader threads (Pillow releases the GIL). The state of
the pipeline is one number, the next global row; what decides the order is kept beside it (`data.resume`), so that
changed data is refused.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
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
from vlm_jax.data.draws import Draws
from vlm_jax.data.epochs import Epochs, Packing
from vlm_jax.data.image_source import ImageError, ImageSource
from vlm_jax.data.manifest import BAD, DataError, Manifest, Room, TooLong, checksum, name_of, sources_of
from vlm_jax.data.measuring import Means, explain, fingerprint, measure_sources
from vlm_jax.data.options import Source
from vlm_jax.data.resume import check_state
from vlm_jax.data.tasks import Sample

log = logging.getLogger(__name__)

Load = Callable[[ImageSource], tuple[np.ndarray, tuple[int, int]]]  # image -> (views [V, ...], (w, h)), or ImageError


class Rows:
    """All rows of a run: `rows[k]` is row k counted over all epochs, a numpy dict (see packing.build_row).

    records: anything with len() and [i], or several by name. encode(record) -> Sample; one with a true attribute `random` is
    measured by that and called again in every epoch as encode(record, Draws). Both may have a `fingerprint` string, then the
    measured manifests are kept in `cache`. manifests: by source, if they are measured already.

    load: how images are read (default: data.images.load_views); its key, view_shape and dtype, if it has them, say what rows hold
    per view in place of pixels. settings: what the encoder depends on, for messages about changed data.
    """

    def __init__(
        self,
        records: Sequence[Any] | Mapping[str, Sequence[Any]],
        encode: Callable[..., Sample],
        config: VLMConfig,
        how: Packing = Packing(),
        cache: str | Path | None = None,
        threads: int = 4,
        processes: int = 0,
        *,
        manifests: Mapping[str, Manifest] | None = None,
        load: Load | None = None,
        settings: Mapping[str, Any] | None = None,
    ):
        sources = records if isinstance(records, Mapping) else {"": records}
        self.sources = {name: sources[name] for name in sorted(sources)}  # whatever the order in the config
        self.how, self.layout, self._settings = how, how.layout(encode, config), dict(settings or {})
        self._random = bool(getattr(encode, "random", False))
        self.load = load or functools.partial(images.load_views, how=images.Preprocess.of(config))
        if manifests is None:
            means = Means(None if cache is None else Path(cache), threads, processes)
            manifests = measure_sources(self.sources, self.layout, how.limits, means)
        self.manifests = {name: manifests[name] for name in self.sources}
        self.epochs = Epochs(self.manifests, how)
        self.manifest = self.epochs.manifest
        self.shape = self._shape(config)
        self._names = list(self.sources)
        self._ends = np.cumsum([len(part) for part in self.sources.values()]).tolist()  # of the sources
        self._lock = threading.Lock()
        self.broken: dict[int, str] = {}  # record number -> sentence, found while decoding
        self.cut_draws = self.empty_draws = 0  # drawn samples that were longer than measured, that supervised nothing
        self._check_limits(lambda: explain(self.manifest.notes))

    def _shape(self, config: VLMConfig) -> packing.RowShape:
        vision, held = config.vision, {}
        if hasattr(self.load, "key"):
            held = {"key": self.load.key, "view_shape": tuple(self.load.view_shape), "dtype": self.load.dtype}
        answers = self.how.answer_length if self.epochs.has_answers else 0
        sizes = self.how.row_length, self.how.view_budget, vision.image_size, vision.features
        return packing.RowShape(*sizes, answers, **held)

    def __len__(self) -> int:
        return len(self.epochs)

    def plan(self, epoch: int) -> packing.Plan:
        """The rows of `epoch`; its samples are record numbers, counted through the sources."""
        return self.epochs.plan(epoch)

    def records_of(self, row: int) -> np.ndarray:
        """Numbers of the records that share global row `row`."""
        return self.epochs.samples_of(row)[0]

    def source_of(self, number: int) -> tuple[str, int]:
        """(source, number inside it) of a record."""
        part = bisect.bisect_right(self._ends, number)
        return self._names[part], number - (self._ends[part - 1] if part else 0)

    def images(self) -> Iterator[ImageSource]:
        """The images of every usable record, for a cache that is filled before training; repeated ones come again."""
        for number in self.manifest.usable.tolist():
            source, inside = self.source_of(number)
            record = self.sources[source][inside]
            shown = getattr(record, "images", None)  # of a Record, which need not be encoded to tell
            for image in self.layout.encode(record).images if shown is None else shown:
                yield ImageSource.of(image, name_of(record, inside))

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        samples = zip(*map(np.ndarray.tolist, self.epochs.samples_of(row))) if row < len(self) else ()
        pieces, first, opened = [], {}, {}
        for k, (number, turn) in enumerate(samples):
            piece = self._piece(number, turn, opened)
            like = k if self.epochs.groups is None else first.setdefault(self.epochs.groups[number], k)
            pieces.append(piece if like == k else dataclasses.replace(piece, like=like))
        return packing.build_row(pieces, self.shape)

    def _piece(self, number: int, turn: int, opened: dict[tuple, tuple]) -> packing.Piece:
        """Encode and decode a record in pass `turn`; a broken image leaves padding of the measured size and is counted.

        opened: the images of the row so far, by their key, which are not decoded again.
        """
        m, (source, inside) = self.manifest, self.source_of(number)
        record = self.sources[source][inside]
        sample, name = self.layout.encode(record), name_of(record, inside)
        if checksum(sample) != m.checks[number]:
            raise DataError(f"{name} has changed since its length was measured: restart to measure the data again")
        if self._random:
            sample = self.layout.encode(record, Draws(self.how.seed, turn, inside))
        room = Room(int(m.lengths[number]), int(m.views[number]), int(m.answers[number]))
        empty = packing.Piece(room.slots, room.views, None, None, room.answers)
        try:
            loaded = [self._open(image, opened) for image in sources_of(sample, name)]
        except ImageError as error:
            self._count_broken(number, str(error))
            return empty
        try:
            slots, count, views = self.layout.place(sample, [size for _, size in loaded], name, room)
        except TooLong:
            slots = None
        if not self._random and (slots is None or (len(slots), views) != (room.slots, room.views)):
            raise DataError(f"an image of {name} has changed its size since it was measured: restart to measure again")
        if self._random:
            self._count_draw(slots, number)
        if slots is None:
            return empty
        pixels = np.concatenate([v for v, _ in loaded[:count]]) if count else None
        return dataclasses.replace(empty, slots=slots, pixels=pixels)

    def _open(self, image: ImageSource, opened: dict[tuple, tuple]) -> tuple[np.ndarray, tuple[int, int]]:
        if image.key not in opened:
            opened[image.key] = self.load(image)
        return opened[image.key]

    def _count_broken(self, number: int, sentence: str) -> None:
        with self._lock:
            if number not in self.broken:
                log.warning("trained as padding: %s", sentence)
            self.broken[number] = sentence
            self._check_limits(lambda: f"the last one: {sentence}")

    def _count_draw(self, slots: packing.Slots | None, number: int) -> None:
        """A drawn sample that supervises nothing, or was cut although the measured one was not."""
        with self._lock:
            self.empty_draws += slots is None
            self.cut_draws += slots is not None and slots.cut > 0 and not self.manifest.cut[number]

    def _check_limits(self, words: Callable[[], str]) -> None:
        unusable = len(self.manifest.notes) + len(self.broken)
        self.how.limits.check(self.bad_count, unusable, len(self.manifest), words)

    @property
    def bad_count(self) -> int:
        """Broken samples known so far: those of the manifest and those found while decoding."""
        return self.manifest.count(BAD) + len(self.broken)

    def counts(self) -> dict[str, int]:
        """What is not trained on as it stands, for the metrics; of broken images only those that this process met."""
        return {
            "samples_without_loss": self.manifest.without_loss + self.empty_draws,
            "unusable_samples": len(self.manifest.notes) + len(self.broken),
            "cut_samples": self.manifest.cut_count + self.cut_draws,
        }

    def identity(self) -> dict[str, Any]:
        """What decides the order of samples, as a checkpoint keeps it (JSON; see data.resume)."""
        mixed = {name: self.how.sources.get(name, Source()) for name in self.sources}
        return {
            "seed": self.how.seed,
            "sources": {name: manifest.summary(self.how.shared_images) for name, manifest in self.manifests.items()},
            "packing": self.how.identity(self.layout.limit, self.epochs.has_answers),
            "mixture": {n: {"weight": s.weight, "repeat": s.repeat, "limit": s.limit} for n, s in mixed.items()},
            "encoder": str(fingerprint(self.layout.encode)) if self._random else "",
            "settings": self._settings,
        }


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

    def counts(self) -> dict[str, int]:
        """What the data has lost, for the metrics."""
        return self.rows.counts()

    def samples_of(self, step: int) -> list[int]:
        """Numbers of the records in the batch of `step`, over all hosts."""
        first = self._origin + step * self.global_batch
        rows = range(first, min(first + self.global_batch, len(self.rows)))
        return [int(index) for row in rows for index in self.rows.records_of(row)]


def total_steps(rows: Rows, global_batch: int, state: Mapping[str, Any] | None = None) -> int:
    """Steps that show every row of every epoch once; the last batch is filled up with padding rows.

    state: of a checkpoint, whose steps may have had another global batch; they count as they were.
    """
    done, row = (int(state["step"]), int(state["row"])) if state else (0, 0)
    return done - (row - len(rows)) // global_batch


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

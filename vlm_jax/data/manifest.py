"""What every record takes in a row, measured once and kept: packing plans and exact resume rest on this.

lengths [N]  slots of the record after cutting it to the limit; 0 = unusable
views   [N]  image views
checks  [N]  crc32 of tokens and labels, so that a changed record is noticed
status  [N]  OK, REJECTED (images do not fit, nothing supervised) or BAD (broken record or image)
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import hashlib
import json
import logging
import multiprocessing
import os
import uuid
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlm_jax.config import ConfigError, UserError, VLMConfig, to_dict
from vlm_jax.data import images
from vlm_jax.data.packing import Slots, expand, truncate
from vlm_jax.data.tasks import Sample
from vlm_jax.models.slots import slots_of_image, views_of_image

log = logging.getLogger(__name__)

OK, REJECTED, BAD = 0, 1, 2
CHUNK = 256  # records measured by one worker at a time
VERSION = 1  # of the measurement: a cached manifest of another version is measured again


class DataError(UserError):
    """The data cannot be trained on; the message names the record and says what to do."""


class TooLong(UserError):
    """A sample is rejected: its images do not fit, or nothing that is supervised would be left."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one record becomes slots: `encode`, the image geometry of the model, and the limits of a sample."""

    encode: Callable[[Any], Sample]
    config: VLMConfig
    limit: int
    view_budget: int

    def place(self, sample: Sample, sizes: Sequence[tuple[int, int]], name: str) -> tuple[Slots, int, int]:
        """(slots, images kept, their views) of a sample with images of `sizes` (w, h), cut to the limit.

        Raises TooLong if a row cannot hold its views or nothing that is supervised is left.
        """
        slots = [slots_of_image(*size, self.config) for size in sizes]
        kept = truncate(sample, [len(s) for s in slots], self.limit)
        if kept is None:
            takes = len(sample.tokens) + sum(len(s) - 1 for s in slots)
            raise TooLong(f"{name} takes {takes} slots and nothing in the first {self.limit} is trained on")
        count = len(kept.images)
        views = [views_of_image(*size, self.config) for size in sizes[:count]]
        if sum(views) > self.view_budget:
            raise TooLong(f"{name} has {sum(views)} image views, but data.views_per_row={self.view_budget}")
        return expand(kept, slots[:count], views, self.config.vision.features), count, sum(views)

    def sizes(self, sources: Sequence[images.ImageSource]) -> list[tuple[int, int]]:
        """(w, h) of images: from their headers where slots depend on them, else only that the files exist."""
        if self.config.aspect == "anyres":
            return [images.image_size(source) for source in sources]
        for source in sources:
            images.check_exists(source)
        return [(1, 1)] * len(sources)

    def measure(self, records: Sequence[Any], start: int, stop: int) -> tuple[np.ndarray, list[tuple[int, int, str]]]:
        """Rows start..stop of the manifest, [n, 4], and (index, status, sentence) of the unusable records."""
        table, notes = np.zeros((stop - start, 4), np.int64), []
        for index in range(start, stop):
            try:
                record = records[index]
                sample, name = self.encode(record), name_of(record, index)
                slots, _, views = self.place(sample, self.sizes(sources_of(sample, name)), name)
                table[index - start] = len(slots), views, checksum(sample), OK
            except ConfigError:
                raise
            except (ValueError, OSError) as error:
                status = REJECTED if isinstance(error, TooLong) else BAD
                table[index - start, 3] = status
                notes.append((index, status, str(error)))
        return table, notes


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The module's table, int64 [N] each; notes: (index, status, sentence) of the unusable records."""

    lengths: np.ndarray
    views: np.ndarray
    checks: np.ndarray
    status: np.ndarray
    notes: tuple[tuple[int, int, str], ...] = ()

    @property
    def usable(self) -> np.ndarray:
        """Indices of the records that are trained on, int64 [n]."""
        return np.flatnonzero(self.status == OK)

    def count(self, status: int) -> int:
        """Number of records with this status."""
        return int((self.status == status).sum())

    def digest(self) -> str:
        """Hash of everything in the data that the order of samples and their slots depend on."""
        digest = hashlib.sha256()
        for array in (self.lengths, self.views, self.checks, self.status):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()[:32]


def name_of(record: Any, index: int) -> str:
    """Words for messages: the record's own `where` (file and number) if it has one."""
    return getattr(record, "where", f"record {index}")


def sources_of(sample: Sample, name: str) -> list[images.ImageSource]:
    """Images of a sample in order; paths are given the name of their record."""
    return [images.ImageSource.of(image, name) for image in sample.images]


def checksum(sample: Sample) -> int:
    """crc32 of the tokens and labels of a sample."""
    tokens, labels = (np.asarray(a, np.int32).tobytes() for a in (sample.tokens, sample.labels))
    return zlib.crc32(labels, zlib.crc32(tokens))


def check_limit(bad: int, max_bad: int, sentence: str) -> None:
    """Raise DataError when more samples are bad than the config allows."""
    if bad > max_bad:
        raise DataError(
            f"{bad} samples are unusable, more than train.max_bad_samples={max_bad}; the last one: {sentence}"
        )


def measure(records: Sequence[Any], layout: Layout, max_bad: int, threads: int = 4, processes: int = 0) -> Manifest:
    """Encode every record once; stops with DataError as soon as more than `max_bad` are bad.

    processes > 0 starts that many workers (records and layout.encode must be picklable), else threads work.
    """
    parts, notes, bad = [np.zeros((0, 4), np.int64)], [], 0
    for table, found in _chunks(records, layout, threads, processes):
        parts.append(table)
        notes += found
        broken = [sentence for _, status, sentence in found if status == BAD]
        bad += len(broken)
        check_limit(bad, max_bad, broken[-1] if broken else "")
    manifest = Manifest(*np.concatenate(parts).T.copy(), notes=tuple(notes))
    for _, status, sentence in notes[:20]:
        log.warning("%s: %s", "skipped" if status == BAD else "rejected", sentence)
    if len(notes) > 20:
        log.warning("%d skipped and %d rejected records in all", manifest.count(BAD), manifest.count(REJECTED))
    if not len(manifest.usable):
        first = f"; the first: {notes[0][2]}" if notes else ""
        raise DataError(f"none of the {len(records)} records can be trained on{first}")
    return manifest


def _chunks(records: Sequence[Any], layout: Layout, threads: int, processes: int) -> Iterator[tuple[np.ndarray, list]]:
    """`Layout.measure` over all records in chunks, in order, a bounded number of chunks ahead."""
    if processes:
        context = multiprocessing.get_context("spawn")  # fork is unsafe once JAX has started its threads
        pool = concurrent.futures.ProcessPoolExecutor(processes, context, _start_worker, (records, layout))
        task, ahead = _measure_here, 4 * processes
    else:
        pool, ahead = concurrent.futures.ThreadPoolExecutor(max(threads, 1)), 4 * max(threads, 1)

        def task(start: int, stop: int):
            return layout.measure(records, start, stop)

    pending = collections.deque()
    try:
        for start in range(0, len(records), CHUNK):
            pending.append(pool.submit(task, start, min(start + CHUNK, len(records))))
            if len(pending) >= ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)  # an error stops the measurement at once


_WORKER: list[Any] = []  # (records, layout) of a measuring process


def _start_worker(records: Sequence[Any], layout: Layout) -> None:
    _WORKER[:] = [records, layout]


def _measure_here(start: int, stop: int) -> tuple[np.ndarray, list]:
    records, layout = _WORKER
    return layout.measure(records, start, stop)


def load_or_measure(
    records: Sequence[Any],
    layout: Layout,
    max_bad: int,
    cache: str | Path | None = None,
    threads: int = 4,
    processes: int = 0,
) -> Manifest:
    """`measure`, kept as <cache>/manifest-<key>.npz for the next run over the same records and encoding.

    Kept only where the content of both is known (see `fingerprint`) and no record is bad: a missing image may
    be there the next time.
    """
    path = _cache_path(records, layout, cache)
    if path is not None and path.is_file():
        with np.load(path) as kept:
            notes = tuple((int(i), int(s), str(t)) for i, s, t in json.loads(str(kept["notes"])))
            return Manifest(*(kept[name] for name in ("lengths", "views", "checks", "status")), notes=notes)
    manifest = measure(records, layout, max_bad, threads, processes)
    if path is not None and not manifest.count(BAD):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{uuid.uuid4().hex}.partial")  # other hosts may write the same file
        fields = {k: getattr(manifest, k) for k in ("lengths", "views", "checks", "status")}
        with open(partial, "wb") as file:
            np.savez_compressed(file, notes=json.dumps(manifest.notes), **fields)
        os.replace(partial, path)
    return manifest


def fingerprint(source: Any) -> str | None:
    """What records or an encode function hold: their own `fingerprint`, or the hash of their file `path`."""
    mark = getattr(source, "fingerprint", None)
    if mark is None and getattr(source, "path", None) is not None:
        with open(source.path, "rb") as file:
            mark = f"{hashlib.file_digest(file, 'blake2b').hexdigest()} {getattr(source, 'image_folder', '')}"
    return mark


def _cache_path(records: Sequence[Any], layout: Layout, cache: str | Path | None) -> Path | None:
    marks = [fingerprint(records), fingerprint(layout.encode)] if cache is not None else [None]
    if None in marks:
        return None
    config = to_dict(layout.config)
    geometry = [config[name] for name in ("vision", "aspect", "merge", "pinpoints")]
    limits = [layout.limit, layout.view_budget, len(records)]
    key = json.dumps([VERSION, marks, geometry, limits], sort_keys=True)
    return Path(cache) / f"manifest-{hashlib.sha256(key.encode()).hexdigest()[:24]}.npz"

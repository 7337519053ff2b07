"""Measuring a source: every record encoded once, by threads or processes, and the manifest kept for the next run.

    <cache>/manifest-<what was measured>-<how closely images were looked at>-<hash of the result>.npz

The first part is a hash of the records' and the encoder's fingerprints, the image geometry and the limits, so that
another source, tokenizer or row length measures only what it changes. A new run takes the closest look and looks again
at what was broken (an image may be there by now); a run that goes on takes the very manifest that it began with.
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
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlm_jax.data.manifest import BAD, COLUMNS, OK, DataError, Layout, Manifest, Note

log = logging.getLogger(__name__)

CHUNK = 256  # records measured by one worker at a time
VERSION = 3  # of the measurement: a cached manifest of another version is measured again
SHOWN = 20  # sentences about unusable records that are logged


@dataclasses.dataclass(frozen=True)
class Limits:
    """What stops the measurement: more than max_bad broken records (None: any number), or a larger share of unusable ones in a source."""

    max_bad: int | None = None
    max_share: float = 1.0

    def check(self, broken: int, unusable: int, records: int, words: Callable[[], str]) -> None:
        """DataError if either limit is exceeded; `words` says what is wrong."""
        if self.max_bad is not None and broken > self.max_bad:
            raise DataError(f"{broken} samples are unusable, more than train.max_bad_samples={self.max_bad}; {words()}")
        if unusable > self.max_share * records:
            raise DataError(
                f"{unusable} of {records} records ({unusable / records:.1%}) cannot be trained on, more than "
                f"data.max_bad_share={self.max_share:g} allows; {words()}"
            )


@dataclasses.dataclass(frozen=True)
class Means:
    """How to measure: threads, or `processes` (records and encoder must then be picklable), and the cache's folder (None: no cache).

    done: told the number of records that were measured since the last time.
    """

    cache: Path | None = None
    threads: int = 4
    processes: int = 0
    done: Callable[[int], Any] = lambda count: None


def measure(
    records: Sequence[Any], layout: Layout, limits: Limits | None = Limits(), name: str = "", means: Means = Means()
) -> Manifest:
    """Encode every record once; stops with DataError as soon as more are unusable than `limits` allow.

    limits: None for a survey, which refuses and logs nothing. name: of the source, for messages.
    """
    parts, notes, broken = [], [], 0
    for part in _chunks(records, layout, means):
        parts.append(part)
        notes += part.notes
        broken += part.count(BAD)
        means.done(len(part))
        if limits is not None:
            limits.check(broken, len(notes), len(records), lambda: explain(notes, name))
    manifest = Manifest.join(parts)
    if limits is None:
        return manifest
    for note in manifest.notes[:SHOWN]:
        log.warning("%s: %s", "skipped" if note.status == BAD else "rejected", note.sentence)
    if len(notes) > SHOWN:
        log.warning("%d of %d records are not used", len(notes), len(records))
    _check_any(manifest, name)
    return manifest


def refuse(manifest: Manifest, limits: Limits, name: str = "") -> None:
    """DataError if more records are unusable than `limits` allow, or all of them."""
    limits.check(manifest.count(BAD), len(manifest.notes), len(manifest), lambda: explain(manifest.notes, name))
    _check_any(manifest, name)


def _check_any(manifest: Manifest, name: str) -> None:
    if not manifest.count(OK):
        first = f"; the first: {manifest.notes[0].sentence}" if manifest.notes else ""
        of = f" of {name}" if name else ""
        raise DataError(f"none of the {len(manifest)} records{of} can be trained on{first}")


def explain(notes: Sequence[Note], name: str = "") -> str:
    """Counts by reason and the first sentence: `3 missing, 1 record in train.json; the first: ...`."""
    counts = collections.Counter(note.reason for note in notes).most_common()
    found = ", ".join(f"{count} {reason}" for reason, count in counts)
    return f"{found}{f' in {name}' if name else ''}; the first: {notes[0].sentence}"


def _chunks(records: Sequence[Any], layout: Layout, means: Means) -> Iterator[Manifest]:
    """`Layout.measure` over all records in chunks, in order, a bounded number of chunks ahead."""
    if means.processes:
        context = multiprocessing.get_context("spawn")  # fork is unsafe once JAX has started its threads
        pool = concurrent.futures.ProcessPoolExecutor(means.processes, context, _start_worker, (records, layout))
        task, ahead = _measure_here, 4 * means.processes
    else:
        pool, ahead = concurrent.futures.ThreadPoolExecutor(max(means.threads, 1)), 4 * max(means.threads, 1)

        def task(start: int, stop: int) -> Manifest:
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


def _measure_here(start: int, stop: int) -> Manifest:
    records, layout = _WORKER
    return layout.measure(records, start, stop)


def load_or_measure(
    records: Sequence[Any],
    layout: Layout,
    limits: Limits | None = Limits(),
    name: str = "",
    means: Means = Means(),
    wanted: str = "",
) -> Manifest:
    """`measure`, kept in means.cache for the next run over the same records and encoding.

    Kept only where the content of both is known (see `fingerprint`). wanted: digest of the manifest that a run began with, which is
    taken as it is where it is still there.
    """
    key = _key(records, layout) if means.cache is not None else None
    kept = _kept(means.cache, key, layout.depth) if key else {}
    exact = [path for path in kept if wanted and path.stem.endswith(f"-{wanted}")]
    manifest, depth = next(((m, kept[path]) for path in exact if (m := _read(path))), (None, 0))
    if manifest is None and layout.look is None:
        before, depth = next(((m, kept[path]) for path in reversed(kept) if (m := _read(path))), (None, 0))
        if before is not None:
            manifest = look_again(before, records, dataclasses.replace(layout, depth=depth))
        if manifest is not before:
            _write(manifest, means.cache, key, depth)
    if manifest is None:
        manifest = measure(records, layout, limits, name, means)
        if key:
            _write(manifest, means.cache, key, layout.depth)
        return manifest
    if limits is not None:
        refuse(manifest, limits, name)
    return manifest


def measure_sources(
    sources: Mapping[str, Sequence[Any]],
    layout: Layout,
    limits: Limits | None = Limits(),
    means: Means = Means(),
    wanted: Mapping[str, str] | None = None,
    turn: Callable[[Callable[[], Any]], Any] = lambda measuring: measuring(),
) -> dict[str, Manifest]:
    """`load_or_measure` of every source by name; wanted: their digests in a run that goes on.

    turn(function) calls it when it is this process's turn: on several hosts the first one measures, the others read what it kept.
    """
    wanted = wanted or {}

    def all_sources() -> dict[str, Manifest]:
        return {
            name: load_or_measure(records, layout, limits, name, means, wanted.get(name, ""))
            for name, records in sources.items()
        }

    return turn(all_sources)


def look_again(manifest: Manifest, records: Sequence[Any], layout: Layout) -> Manifest:
    """The manifest with its broken records measured once more; itself if nothing has changed."""
    broken = [note.index for note in manifest.notes if note.status == BAD]
    again = {index: layout.measure(records, index, index + 1) for index in broken}
    better = {index: line for index, line in again.items() if line.status[0] != BAD}
    return manifest.replaced(better) if better else manifest


def fingerprint(source: Any) -> str | None:
    """What records or an encode function hold: their own `fingerprint`, or the hash of their file `path`."""
    mark = getattr(source, "fingerprint", None)
    if mark is None and getattr(source, "path", None) is not None:
        with open(source.path, "rb") as file:
            mark = f"{hashlib.file_digest(file, 'blake2b').hexdigest()} {getattr(source, 'image_folder', '')}"
    return mark


def _key(records: Sequence[Any], layout: Layout) -> str | None:
    """Hash of everything that is measured, None where that is not known."""
    marks = [fingerprint(records), fingerprint(layout.encode)]
    if None in marks:
        return None
    config, vision = layout.config, layout.config.vision  # of which only this says how many slots an image takes
    geometry = [vision.kind, vision.image_size, vision.patch_size, vision.features]
    geometry += [config.aspect, config.merge, config.pinpoints]
    limits = [layout.limit, layout.view_budget, layout.answer_limit, len(records)]
    return hashlib.sha256(json.dumps([VERSION, marks, geometry, limits], sort_keys=True).encode()).hexdigest()[:24]


def _kept(cache: Path, key: str, depth: int) -> dict[Path, int]:
    """Manifests of `key` that looked at images at least as closely as `depth`: file -> depth, the one to prefer last."""
    found = {path: int(path.stem.split("-")[2]) for path in Path(cache).glob(f"manifest-{key}-*.npz")}
    return {
        path: d for d, _, path in sorted((d, path.stat().st_mtime, path) for path, d in found.items()) if d >= depth
    }


def _read(path: Path) -> Manifest | None:
    """None if the file is damaged, then the records are measured again."""
    try:
        with np.load(path) as kept:
            notes = tuple(Note(*note) for note in json.loads(str(kept["notes"])))
            return Manifest(**{name: kept[name] for name in (*COLUMNS, "sizes")}, notes=notes)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        log.warning("%s is damaged, its records are measured again: %s", path, error)
        return None


def _write(manifest: Manifest, cache: Path, key: str, depth: int) -> None:
    path = Path(cache) / f"manifest-{key}-{depth}-{manifest.digest()}.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{uuid.uuid4().hex}.partial")  # other hosts may write the same file
    fields = {name: getattr(manifest, name) for name in (*COLUMNS, "sizes")}
    notes = json.dumps(manifest.notes)
    with open(partial, "wb") as file:
        np.savez_compressed(file, notes=notes, **fields)
    os.replace(partial, path)

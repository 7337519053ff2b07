"""What every record will take in a row, measured once and kept: the manifest that packing plans and resuming rest on.

    lengths int32 [N]   slots of each record after cutting to the limit; 0 = unusable
    views   int32 [N]   image views
    checks  uint32 [N]  checksum of tokens and labels, so that a changed record is noticed
    status  uint8 [N]   OK, REJECTED (its images do not fit) or BAD (broken record or image)
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import json
import logging
import multiprocessing
import os
import zlib
from pathlib import Path
from typing import Any, Callable, Iterator, Sequence

import numpy as np

from vlm_jax.config import VLMConfig, to_dict
from vlm_jax.data import images
from vlm_jax.data.packing import Slots, TooLong, expand
from vlm_jax.models.slots import slots_of_image, views_of_image

log = logging.getLogger(__name__)

OK, REJECTED, BAD = 0, 1, 2
CHUNK = 256  # records measured by one worker at a time
VERSION = 1  # of the measurement: a cached manifest of another version is measured again


class DataError(ValueError):
    """The data cannot be trained on; the message names the record and what to do."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one record becomes slots: `encode(record) -> Sample`, the model's image geometry, and the limits of a sample."""

    encode: Callable[[Any], Any]
    config: VLMConfig
    limit: int
    view_budget: int

    def place(self, sample: Any, sizes: Sequence[tuple[int, int]], name: str) -> tuple[Slots, int]:
        """(slots of the sample, its image views) for images of `sizes` (w, h); raises TooLong if its images do not fit."""
        views = [views_of_image(*size, self.config) for size in sizes]
        if sum(views) > self.view_budget:
            raise TooLong(f"{name} has {sum(views)} image views, but a row holds {self.view_budget}")
        slots = [slots_of_image(*size, self.config) for size in sizes]
        return expand(sample, slots, views, self.config.vision.features, self.limit, name), sum(views)

    def sizes(self, sample: Any) -> list[tuple[int, int]]:
        """(w, h) of the sample's images: from the headers where slots depend on them, else only that the files exist."""
        if self.config.aspect == "anyres":
            return [images.image_size(source) for source in sample.images]
        for source in sample.images:
            images.check_exists(source)
        return [(1, 1)] * len(sample.images)


@dataclasses.dataclass(frozen=True)
class Manifest:
    """See the module; `notes` holds (record index, sentence) of the unusable records, the first of each chunk only."""

    lengths: np.ndarray
    views: np.ndarray
    checks: np.ndarray
    status: np.ndarray
    notes: tuple[tuple[int, str], ...] = ()

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def usable(self) -> np.ndarray:
        """Indices of the records that are trained on, int64 [n]."""
        return np.flatnonzero(self.status == OK)

    def count(self, status: int) -> int:
        """Number of records with `status`."""
        return int((self.status == status).sum())

    @property
    def digest(self) -> str:
        """Hash of everything that the order of samples depends on."""
        digest = hashlib.sha256()
        for array in (self.lengths, self.views, self.checks, self.status):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()[:32]


def checksum(sample: Any) -> int:
    """crc32 of the tokens and labels of a sample."""
    return zlib.crc32(np.asarray(sample.labels, np.int32).tobytes(), zlib.crc32(np.asarray(sample.tokens, np.int32).tobytes()))


def measure(records: Sequence[Any], layout: Layout, max_bad: int, threads: int = 4, processes: int = 0) -> Manifest:
    """Encode every record once; stops with DataError as soon as more than `max_bad` are bad.

    `processes` > 0 spawns that many workers (records and encode must then be picklable); else `threads` threads measure.
    """
    bounds = [(a, min(a + CHUNK, len(records))) for a in range(0, len(records), CHUNK)]
    parts, notes, bad = [], [], 0
    for table, sentences in _chunks(records, layout, bounds, threads, processes):
        parts.append(table)
        notes += sentences[:1]
        bad += int((table[3] == BAD).sum())
        check_limit(bad, max_bad, next((s for _, s in notes if not s.startswith(_REJECTED)), ""))
    columns = [np.concatenate(column) if parts else np.zeros(0) for column in zip(*parts)] or [np.zeros(0)] * 4
    dtypes = (np.int32, np.int32, np.uint32, np.uint8)
    return Manifest(*[c.astype(d) for c, d in zip(columns, dtypes)], notes=tuple(notes))


def check_limit(bad: int, max_bad: int, sentence: str) -> None:
    """Raise DataError when more samples are bad than the config allows."""
    if bad > max_bad:
        raise DataError(f"{bad} samples are unusable, more than data.max_bad={max_bad} allows; one of them: {sentence}")



"""What is found out about a data file once, kept as an array for the next start, which maps it into memory instead of reading it.

    <cache>/<key>.npy      the key names the content of the file, so a changed file gets another array

Several processes and hosts may share a cache: an array is written aside and renamed.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np

log = logging.getLogger(__name__)


class Kept:
    """An array that pickles as the name of its file if it has one, so that workers map it too. rows: the array."""

    def __init__(self, array: np.ndarray):
        self.rows = np.asarray(array)  # a memmap's own indexing is slow
        self._file = array.filename if isinstance(array, np.memmap) else None

    @classmethod
    def load(cls, file: str | Path) -> Kept:
        """The array of a .npy file, mapped read-only; raises OSError or ValueError."""
        return cls(np.load(file, mmap_mode="r"))

    def __reduce__(self):
        return (Kept, (self.rows,)) if self._file is None else (Kept.load, (self._file,))


def kept_array(cache: str | Path | None, key: str, make: Callable[[], np.ndarray]) -> Kept:
    """The array of `make`, from <cache>/<key>.npy if it is there; without a cache it is made every time."""
    if cache is None:
        return Kept(make())
    path = Path(cache) / f"{key}.npy"
    try:
        return Kept.load(path)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, EOFError) as error:
        log.warning("%s is damaged and is made again: %s", path, error)
    array = make()
    partial = path.with_suffix(f".{uuid.uuid4().hex}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            np.save(file, array)
        os.replace(partial, path)
        return Kept.load(path) if array.size else Kept(array)  # nothing cannot be mapped
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        log.warning("%s is not kept for the next start: %s", path, error)
        return Kept(array)


def content_hash(path: str | Path) -> str:
    """Hash of a file's bytes: about a second per GB, and the same on every host, unlike dates, which copies and edits can keep."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_of(*parts: object) -> str:
    """One short hash of several strings or numbers."""
    return hashlib.sha256("\0".join(map(str, parts)).encode("utf-8", "surrogatepass")).hexdigest()


def read_at(descriptor: int, offset: int, size: int) -> bytes:
    """`size` bytes from `offset` of an open file, fewer at its end; threads may share it, its position is not used."""
    parts = []
    while size > 0:
        part = os.pread(descriptor, size, offset)
        if not part:
            break
        parts.append(part)
        offset, size = offset + len(part), size - len(part)
    return b"".join(parts)

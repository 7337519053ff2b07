"""Features of a frozen tower on disk, found by image: what a row holds in place of pixels.

    folder/3f..a1.features    [n, P, C] of n views, one after another, as plain numbers of one dtype
    folder/3f..a1.npz         which images these are: keys uint64 [m, 2], first view, views, (width, height)

The .npz is written last, so a shard is there as a whole or not at all, and processes add shards side by side without
locks. Keys are `image_cache.identity`; the folder belongs to one tower and preprocessing (train.features names it).
"""

from __future__ import annotations

import dataclasses
import logging
import os
import time
import uuid
import zipfile
from pathlib import Path

import numpy as np

from vlm_jax.data.image_cache import Views, identity
from vlm_jax.data.image_source import ImageSource
from vlm_jax.data.manifest import DataError

log = logging.getLogger(__name__)

SHARD_BYTES = 1 << 30
DEAD = 3600.0  # seconds after which a shard that nobody finished belongs to a killed run
INDEX = (("keys", np.uint64), ("first", np.int64), ("count", np.int32), ("size", np.int32))


@dataclasses.dataclass(frozen=True)
class Entry:
    """One image of a shard: its key, its number of views, and its (width, height)."""

    key: bytes
    count: int
    size: tuple[int, int]


class Features:
    """Callable ImageSource -> (features [V, P, C], (width, height)), a loader of data.pipeline.Rows.

    view_shape: (P, C). views: the loader of pixels, asked where an image has no features, because it says what is wrong with it.
    """

    key = "features"

    def __init__(self, folder: str | Path, view_shape: tuple[int, int], dtype: np.dtype, views: Views):
        self.folder, self.view_shape, self.dtype, self.views = Path(folder), view_shape, np.dtype(dtype), views
        self.view_bytes = view_shape[0] * view_shape[1] * self.dtype.itemsize
        self.reopen()

    def __call__(self, source: ImageSource) -> tuple[np.ndarray, tuple[int, int]]:
        try:
            at = self._find(identity(source))
        except (OSError, ValueError):
            at = None
        if at is None:
            self.views(source)
            raise DataError(f"{source.label} has changed since its features were computed: restart to compute it again")
        first, count = self._index["first"][at], self._index["count"][at]
        width, height = self._index["size"][at]
        path = self._shards[
            self._shard[at]
        ]  # opened for each image: a map of every shard would hold hundreds of files open
        raw = np.fromfile(path, np.uint8, count * self.view_bytes, offset=first * self.view_bytes)
        return raw.view(self.dtype).reshape(count, *self.view_shape), (int(width), int(height))

    def __contains__(self, key: bytes) -> bool:
        return self._find(key) is not None

    def __len__(self) -> int:
        return len(self._shard)

    @property
    def bytes(self) -> int:
        """Size of all shards on disk."""
        return int(self._index["count"].sum()) * self.view_bytes

    def reopen(self) -> None:
        """Read the index of every shard that is there."""
        self._shards: list[Path] = []
        parts: dict[str, list[np.ndarray]] = {name: [] for name, _ in INDEX}
        numbers = []
        for path in sorted(self.folder.glob("*.npz")):
            index = self._open(path)
            if index is None:
                continue
            for name, dtype in INDEX:
                parts[name].append(index[name].astype(dtype))
            numbers.append(np.full(len(index["keys"]), len(self._shards) - 1, np.int32))
        empty = {"keys": (0, 2), "first": (0,), "count": (0,), "size": (0, 2)}
        self._index = {name: np.concatenate([np.zeros(empty[name], dtype), *parts[name]]) for name, dtype in INDEX}
        order = np.argsort(self._index["keys"][:, 0], kind="stable")
        self._index = {name: array[order] for name, array in self._index.items()}
        self._shard = np.concatenate([np.zeros(0, np.int32), *numbers])[order]

    def _open(self, path: Path) -> dict[str, np.ndarray] | None:
        """Index of a shard; None if it is damaged, then its images count as missing."""
        try:
            with np.load(path) as kept:
                index = {name: kept[name] for name, _ in INDEX}
            views = int(index["count"].sum())
            data = path.with_suffix(".features")
            if data.stat().st_size != views * self.view_bytes:
                raise ValueError(f"{data.name} should have {views * self.view_bytes} bytes")
            self._shards.append(data)
            return index
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            log.warning("%s is damaged, its features are computed again: %s", path, error)
            return None

    def _find(self, key: bytes) -> int | None:
        wanted, keys = np.frombuffer(key, np.uint64), self._index["keys"]
        at = int(np.searchsorted(keys[:, 0], wanted[0]))
        while at < len(keys) and keys[at, 0] == wanted[0]:
            if keys[at, 1] == wanted[1]:
                return at
            at += 1
        return None


class Writer:
    """Adds features to a folder, a shard of SHARD_BYTES at a time; `close` keeps the last one."""

    def __init__(self, folder: Path):
        self.folder, self._file = folder, None
        folder.mkdir(parents=True, exist_ok=True)
        remove_dead(folder)

    def add(self, entry: Entry, features: np.ndarray) -> None:
        """Append the features [V, P, C] of one image; raises OSError where the disk is full."""
        if self._file is None:
            self._path, self._entries = self.folder / f"{uuid.uuid4().hex}.features", []
            self._file = open(self._path, "xb")
        self._file.write(np.ascontiguousarray(features).view(np.uint8).data)
        self._entries.append(entry)
        if self._file.tell() >= SHARD_BYTES:
            self.close()

    def close(self) -> None:
        """Finish the shard: its index makes it valid."""
        if self._file is None:
            return
        self._file.close()
        self._file = None
        counts = np.array([e.count for e in self._entries], np.int32)
        keys = np.frombuffer(b"".join(e.key for e in self._entries), np.uint64).reshape(-1, 2)
        partial = self._path.with_suffix(".partial")
        with open(partial, "wb") as file:
            np.savez(
                file, keys=keys, first=np.cumsum(counts) - counts, count=counts, size=[e.size for e in self._entries]
            )
        os.replace(partial, self._path.with_suffix(".npz"))


def remove_dead(folder: Path) -> None:
    """Delete what killed runs left: shards without an index that nobody has written to for an hour."""
    for path in [*folder.glob("*.features"), *folder.glob("*.partial")]:
        try:
            if not path.with_suffix(".npz").exists() and time.time() - path.stat().st_mtime > DEAD:
                path.unlink()
        except FileNotFoundError:
            continue  # another process was faster

"""Views of images, kept on disk once they are resized: a later epoch or run reads pixels and decodes nothing.

    folder/336-pad-crop-5f0c21aa/7e/7e91...b2.views      header [magic, crc32, V, S, w, h], then uint8 [V, S, S, 3]

One file per image, written under another name and then renamed, so that threads, processes and hosts may share the
folder without locks and a killed one leaves nothing half-written under a valid name; pixels are not compressed, because
reading them is then a copy (a tenth of a millisecond at 336 pixels, against four or five to decode and resize). A file
whose length or checksum is wrong is made again.

An entry belongs to path, size and time of change (ns) of the image file, and to its place inside a tar shard: the
original is not read at all, which is the point where it lies on slow storage, and an edited, replaced or moved file is
made anew. (As with make and rsync, an edit that keeps both size and time is not seen.) Images that come as bytes are
known by the hash of these.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import struct
import threading
import uuid
import zlib
from pathlib import Path

import numpy as np

from vlm_jax.data.image_source import ImageSource
from vlm_jax.data.images import Preprocess, load_views

log = logging.getLogger(__name__)

HEADER = struct.Struct("<8s5I")
MAGIC = b"VIEWS\x00\x001"


class Views:
    """Callable ImageSource -> (uint8 views [V, S, S, 3], (width, height)); ImageError in one sentence.

    folder: of resized images; None: every image is decoded. `read` and `made` count entries used and added. key, view_shape and
    dtype say what the rows of a batch hold.
    """

    key, dtype = "images", np.dtype(np.uint8)

    def __init__(self, preprocess: Preprocess, folder: str | Path | None = None):
        self.preprocess, self.view_shape = preprocess, (preprocess.size, preprocess.size, 3)
        self.folder = Path(folder) / folder_name(preprocess) if folder else None
        self.read = self.made = 0
        self._full, self._lock = False, threading.Lock()

    def __call__(self, source: ImageSource) -> tuple[np.ndarray, tuple[int, int]]:
        path = self._entry(source)
        kept = None if path is None else self._read(path)
        if kept is not None:
            with self._lock:
                self.read += 1
            return kept
        views, size = load_views(source, self.preprocess)
        if path is not None and not self._full:
            self._write(path, views, size)
        return views, size

    def stored(self) -> tuple[int, int]:
        """(entries, bytes) on disk for this preprocessing."""
        files = [] if self.folder is None or not self.folder.is_dir() else list(self.folder.glob("*/*.views"))
        if self.preprocess.aspect != "anyres":  # all are equally large: nothing is asked file by file
            return len(files), cache_bytes(len(files), self.preprocess)
        return len(files), sum(file.stat().st_size for file in files)

    def expect(self, count: int) -> str:
        """What `count` images will take, in words, for the start of a run."""
        there, size = self.stored()
        self.folder.mkdir(parents=True, exist_ok=True)
        at_most = "at most " if most_views(self.preprocess) > 1 else ""
        needed, free = cache_bytes(count, self.preprocess), shutil.disk_usage(self.folder).free
        words = f"data.pixel_cache: {count:,} resized images take {at_most}{gigabytes(needed)} in {self.folder}"
        if needed - size > free:
            words += f", where only {gigabytes(free)} are free: those that do not fit are decoded in every epoch"
        return f"{words}; {there:,} ({gigabytes(size)}) are there already"

    def report(self) -> str:
        """What the cache did and holds, in words, for the end of a run."""
        there, size = self.stored()
        return (
            f"data.pixel_cache: {self.read:,} resized images were read and {self.made:,} added; "
            f"{self.folder} holds {there:,}, {gigabytes(size)}"
        )

    def _entry(self, source: ImageSource) -> Path | None:
        if self.folder is None:
            return None
        try:
            name = identity(source).hex()
        except (OSError, ValueError):
            return None  # the decoder says what is wrong with the file
        return self.folder / name[:2] / f"{name}.views"

    def _read(self, path: Path) -> tuple[np.ndarray, tuple[int, int]] | None:
        """What an entry holds; None if it is not there or damaged."""
        side = self.preprocess.size
        try:
            with open(path, "rb") as file:
                head = file.read(HEADER.size)
                magic, checksum, count, found, *size = HEADER.unpack(head)
                whole = HEADER.size + count * side * side * 3 == os.fstat(file.fileno()).st_size
                if magic == MAGIC and found == side and whole:
                    views = np.empty((count, side, side, 3), np.uint8)
                    file.readinto(views.data)
                    if _checksum(head, views) == checksum:
                        return views, (size[0], size[1])
        except FileNotFoundError:
            return None
        except (OSError, struct.error):
            pass
        log.warning("%s is damaged and is made again", path)
        return None

    def _write(self, path: Path, views: np.ndarray, size: tuple[int, int]) -> None:
        """Add an entry; on a full disk training goes on without."""
        views = np.ascontiguousarray(views)
        head = HEADER.pack(MAGIC, 0, len(views), views.shape[1], *size)
        head = HEADER.pack(MAGIC, _checksum(head, views), len(views), views.shape[1], *size)
        partial = path.with_suffix(f".{uuid.uuid4().hex}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(partial, "wb") as file:
                file.write(head)
                file.write(views.data)
            os.replace(partial, path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            with self._lock:
                if not self._full:
                    log.warning("no more resized images are kept in %s: %s", self.folder, error.strerror)
                self._full = True
            return
        with self._lock:
            self.made += 1


def identity(source: ImageSource) -> bytes:
    """16 bytes that change with the image (see the module); OSError if its file is not there."""
    if source.data is not None:
        return hashlib.blake2b(source.data, digest_size=16).digest()
    status = os.stat(source.path)
    mark = (os.path.abspath(source.path), status.st_size, status.st_mtime_ns, source.piece)
    return hashlib.blake2b(repr(mark).encode(), digest_size=16).digest()


def most_views(preprocess: Preprocess) -> int:
    """Views of an image: 1, or under anyres at most this many."""
    if preprocess.aspect != "anyres":
        return 1
    return 1 + max(w * h // preprocess.size**2 for w, h in preprocess.pinpoints)


def cache_bytes(count: int, preprocess: Preprocess) -> int:
    """Bytes that `count` images take in the cache: exact for one view per image, at most that under anyres.

    558,128 images at 336 pixels: 189 GB.
    """
    return count * (HEADER.size + most_views(preprocess) * preprocess.size**2 * 3)


def gigabytes(count: int) -> str:
    """A size in words: 658.4 GB, 1.2 MB."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"


def folder_name(preprocess: Preprocess) -> str:
    """Folder of all entries that one preprocessing made, e.g. 336-pad-crop-5f0c21aa."""
    how = preprocess
    marks = [how.size, how.aspect, how.fit, how.pad_colour if how.aspect == "pad" else None]
    marks.append(how.pinpoints if how.aspect == "anyres" else None)
    digest = hashlib.blake2b(json.dumps(marks).encode(), digest_size=4).hexdigest()
    return f"{how.size}-{how.aspect}-{how.fit}-{digest}"


def _checksum(head: bytes, views: np.ndarray) -> int:
    """Of everything behind the checksum itself."""
    return zlib.crc32(views.data, zlib.crc32(head[12:]))

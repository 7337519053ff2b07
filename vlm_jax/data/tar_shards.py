"""Tar shards in the webdataset layout: consecutive members with the same name up to the first dot of the file name are one record.

    000007.json     {"conversations": [...], "image": ...}      a LLaVA record, or
    000007.txt      a caption: one human turn `<image>`, one gpt turn   (as img2dataset writes, whose .json holds no dialogue)
    000007.jpg      its image; several are 000007.0.jpg, 000007.1.jpg ..., or have the names that `image` gives

Members are found once by reading headers, and kept as one table per shard; then a text or an image is one read at its offset in the
tar, so shards must not be compressed. Images named in `image` are matched by file name or ending; if the names say nothing about the
members, the images are taken in order.

    members [M]     sample (number in the shard), offset, size, name
"""

from __future__ import annotations

import json
import os
import re
import tarfile
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlm_jax.data.image_source import ImageSource
from vlm_jax.data.kept_arrays import hash_of, kept_array, read_at
from vlm_jax.data.records import Record, RecordError, record_of
from vlm_jax.data.templates import IMAGE_TEXT

VERSION = 1  # of the table
IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm")
TEXTS = ("json", "txt")
ENDS = 1 << 16  # bytes at either end of a shard that its fingerprint looks at
_KEY = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)")


class TarShard(Sequence[Record]):
    """The records of one tar file, random access; threads and processes may share it.

    cache: folder where the table of members is kept. A shard is told from a changed one by its size, date and both ends: reading
    terabytes of images only to hash them would take longer than training on them. RecordError names a record that cannot be used.
    """

    def __init__(self, path: str | Path, *, cache: str | Path | None = None):
        self.path = Path(path)
        self._descriptor: int | None = None
        try:
            self.fingerprint = self._ends()
            self._members = kept_array(cache, f"tar-{self.fingerprint[:24]}", self._read_headers)
        except OSError as error:
            raise RecordError(f"{self.path} cannot be read: {error.strerror or error}", "file") from error
        samples = np.ascontiguousarray(self._members.rows["sample"])
        if not len(samples):
            raise RecordError(
                f"{self.path} holds no records: a shard needs members such as 7.json and 7.jpg, or 7.txt and 7.jpg",
                "file",
            )
        self._first = np.searchsorted(samples, np.arange(samples[-1] + 2))  # member of every sample

    def __len__(self) -> int:
        return len(self._first) - 1

    def __getitem__(self, index: int) -> Record:
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.path} has {len(self)} records, there is no number {index}")
        index %= len(self)
        rows = self._members.rows[self._first[index] : self._first[index + 1]].tolist()
        members = [(name.decode(), offset, size) for _, offset, size, name in rows]
        raw = self._raw(index, members)
        pieces = [(name, ImageSource(str(self.path), "", None, (o, n), name)) for name, o, n in _images(members)]
        return record_of(raw, index, self.path, place=lambda names: _chosen(names, pieces))

    def __iter__(self) -> Iterator[Record]:
        return (self[i] for i in range(len(self)))

    def images(self) -> Iterator[ImageSource]:
        """Every image of the shard, in its order, whether or not a text goes with it."""
        for _, offset, size, name in self._members.rows.tolist():
            if _ending(name.decode()) in IMAGES:
                yield ImageSource(str(self.path), "", None, (offset, size), name.decode())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptor": None}

    def _raw(self, index: int, members: list[tuple[str, int, int]]) -> Any:
        """The record of a sample as LLaVA JSON: its own, or made of its caption."""
        key = _KEY.fullmatch(members[0][0])[1].rsplit("/", 1)[-1]
        texts = {_ending(name): (offset, size) for name, offset, size in members if _ending(name) in TEXTS}
        names = [name for name, _, _ in _images(members)]
        raw = None
        if "json" in texts:
            raw = self._parsed(index, self._text(index, texts["json"]))
            if not isinstance(raw, dict):
                return raw
            if "conversations" in raw or not ("txt" in texts or isinstance(raw.get("caption"), str)):
                raw = {"id": key, **raw}
                return raw if "image" in raw else {**raw, "image": names}
        if not texts:
            raise RecordError(
                f"{self.path}: record {index} (id {key}) has no .json and no .txt member", "no_conversations"
            )
        caption = self._text(index, texts["txt"]) if "txt" in texts else raw["caption"]
        turns = [{"from": "human", "value": IMAGE_TEXT}, {"from": "gpt", "value": caption.strip()}]
        return {"id": key, "image": names, "conversations": turns}

    def _text(self, index: int, piece: tuple[int, int]) -> str:
        data = read_at(self._open(), *piece)
        if len(data) != piece[1]:
            raise RecordError(f"{self.path}: record {index} is cut short with its file: fetch the shard again", "file")
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise RecordError(f"{self.path}: record {index} is not UTF-8 text: {error}", "encoding") from error

    def _parsed(self, index: int, text: str) -> Any:
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise RecordError(f"{self.path}: record {index} is not JSON: {error}", "not_json") from error

    def _read_headers(self) -> np.ndarray:
        """The module's table; members that belong to no record are left out."""
        found, keys, pending = [], 0, []
        for name, offset, size in [*_members(self.path), ("", 0, 0)]:
            match = _KEY.fullmatch(name)
            if name and (match is None or _ending(name) not in (*TEXTS, *IMAGES)):
                continue
            if pending and (match is None or match[1] != pending[0][0]):
                found += [(keys, offset, size, member.encode()) for _, member, offset, size in pending]
                keys, pending = keys + 1, []
            if match is not None:
                pending.append((match[1], name, offset, size))
        longest = max((len(row[3]) for row in found), default=1)
        return np.array(found, [("sample", "<i8"), ("offset", "<i8"), ("size", "<i8"), ("name", f"S{longest}")])

    def _ends(self) -> str:
        """Hash of the size, date, first and last bytes; RecordError for a compressed file."""
        with open(self.path, "rb") as file:
            status = os.fstat(file.fileno())
            head = read_at(file.fileno(), 0, ENDS)
            tail = read_at(file.fileno(), max(0, status.st_size - ENDS), ENDS)
        if head.startswith((b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zXZ")):
            raise RecordError(
                f"{self.path} is compressed, so its members cannot be read one by one: unpack it to a plain .tar",
                "file",
            )
        return hash_of(VERSION, status.st_size, status.st_mtime_ns, head.hex(), tail.hex())

    def _open(self) -> int:
        """The file's descriptor in this process."""
        if self._descriptor is None:
            descriptor = os.open(self.path, os.O_RDONLY)
            weakref.finalize(self, os.close, descriptor)
            self._descriptor = descriptor
        return self._descriptor


def _members(path: Path) -> Iterator[tuple[str, int, int]]:
    """(name, offset, size) of the files in a tar, in order; only headers are read."""
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # they are not asked for again, and there may be millions
                if member.isreg() and not member.issparse():
                    yield member.name, member.offset_data, member.size
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise tarfile.ReadError(f"no member begins at byte {tar.offset}")
    except tarfile.TarError as error:
        raise RecordError(f"{path} is not a whole tar file: {error}; fetch it again", "file") from error


def _ending(name: str) -> str:
    return name.rsplit(".", 1)[-1].lower()


def _images(members: Sequence[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
    """The images among the members of a sample, 7.2.jpg before 7.10.jpg, else in the order of the tar."""

    def number(member: tuple[str, int, int]) -> int:
        found = re.match(r"(\d+)\.", _KEY.fullmatch(member[0])[2])
        return int(found[1]) if found else -1

    return sorted((m for m in members if _ending(m[0]) in IMAGES), key=number)


def _chosen(names: Sequence[str], pieces: Sequence[tuple[str, ImageSource]]) -> list[ImageSource]:
    """The images that a record names, or all in order if none of the names is that of a member."""
    by_name = {name.rsplit("/", 1)[-1]: piece for name, piece in pieces}
    by_name |= {_KEY.fullmatch(name)[2]: piece for name, piece in pieces if len(pieces) > 1}
    found = [by_name.get(name.rsplit("/", 1)[-1]) for name in names]
    if names and any(piece is None for piece in found):
        return [piece for _, piece in pieces]
    return found

"""Codes of images as ArrayRecord shards: random access by number, one record of an image with all its views.

    codes.arrayrecord, or codes-00000-of-00008.arrayrecord ...
        record 0 .. n-1   JSON {"id", "size": [width, height], "shapes": [[views, h, w(, depth)], ...]}, a line end, then the codes of
                          every level, coarsest first: little-endian numbers of the type that the last record names
        last              JSON {"format", "job", "records": n, "broken": [{"id", "reason", "sentence"}, ...], "about": {...}}
    codes.json            the sum of all shards, for people and scripts: the shards do without it

A shard has another name until it is whole. `job` is the same in all shards of one run, and in no other run's.
"""

from __future__ import annotations

import glob
import json
import math
import os
import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vlm_jax.config import UserError
from vlm_jax.data.array_records import OPTIONS, forget, read_record, reader_of

FORMAT = "vlm_jax codes 1"
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})$")


class CodesError(UserError):
    """Codes that cannot be read or written; the message names the file and what to do."""


class Coded(NamedTuple):
    """Codes of one image: one int32 array [views, h, w] (residual: [views, h, w, depth]) per level, coarsest first.

    id: its name below the folder that was turned into codes; size: (width, height) of the file.
    """

    id: str
    codes: tuple[np.ndarray, ...]
    size: tuple[int, int]


def shard_files(out: str | Path, count: int) -> list[Path]:
    """Names of the `count` shards of `out`: itself, or numbered ones beside it."""
    out = Path(out)
    if count == 1:
        return [out]
    return [out.with_name(f"{out.stem}-{k:05d}-of-{count:05d}{out.suffix}") for k in range(count)]


def manifest_file(out: str | Path) -> Path:
    """Where the sum of all shards is written."""
    return Path(out).with_suffix(".json")


def number_type(entries: Sequence[int]) -> str:
    """The smallest type that holds codes of codebooks of so many entries."""
    return "uint16" if max(entries) <= 1 << 16 else "int32"


def write_shard(
    file: Path, images: Iterable[Coded], *, job: str, broken: Sequence[dict[str, str]], about: dict[str, Any]
) -> None:
    """Write one shard, whole or not at all. about: JSON values that are the same in all shards, among them "dtype"."""
    from array_record.python.array_record_module import ArrayRecordWriter  # here, because most runs need none

    partial, count = file.with_name(f"{file.name}.partial"), 0
    writer = ArrayRecordWriter(str(partial), OPTIONS)
    for one in images:
        writer.write(_packed(one, about["dtype"]))
        count += 1
    last = {"format": FORMAT, "job": job, "records": count, "broken": list(broken), "about": about}
    writer.write(json.dumps(last, ensure_ascii=False).encode())
    writer.close()
    with open(partial, "rb") as written:  # a shard that is there survives the machine's end
        os.fsync(written.fileno())
    os.replace(partial, file)


def _packed(one: Coded, dtype: str) -> bytes:
    codes = [np.ascontiguousarray(level) for level in one.codes]
    head = {"id": one.id, "size": list(one.size), "shapes": [list(level.shape) for level in codes]}
    stored = np.dtype(dtype).newbyteorder("<")
    return json.dumps(head, ensure_ascii=False).encode() + b"\n" + b"".join(x.astype(stored).tobytes() for x in codes)


class CodeShard(Sequence[Coded]):
    """The records of one file; threads and processes may share it. about, job, broken: see the module."""

    def __init__(self, path: str | Path):
        self.path = str(path)
        forget(self.path)
        try:
            size = len(reader_of(self.path))
            last = json.loads(read_record(self.path, size - 1)) if size else None
        except OSError as error:
            raise CodesError(f"{error}: make it again with `tokenize`") from error
        except ValueError:
            last = None
        if not isinstance(last, dict) or last.get("format") != FORMAT:
            raise CodesError(f"{path} is an ArrayRecord file, but not one that `tokenize` writes ({FORMAT})")
        self.about, self.job, self.broken = last["about"], last["job"], last["broken"]
        self._records, self._dtype = last["records"], np.dtype(last["about"]["dtype"]).newbyteorder("<")

    def __len__(self) -> int:
        return self._records

    def __getitem__(self, index: int) -> Coded:
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.path} has the codes of {len(self)} images, there is no number {index}")
        try:
            head, _, data = read_record(self.path, index % len(self)).partition(b"\n")
        except OSError as error:
            raise CodesError(f"{self.path}: record {index} cannot be read: {error}") from error
        said, levels, at = json.loads(head), [], 0
        for shape in said["shapes"]:
            count = math.prod(shape)
            levels.append(np.frombuffer(data, self._dtype, count, at).reshape(shape).astype(np.int32))
            at += count * self._dtype.itemsize
        return Coded(said["id"], tuple(levels), tuple(said["size"]))


class Codes(Sequence[Coded]):
    """All shards of a run, one after another, in the order of its images; picklable. about: model, crop, levels (see `tokenize`)."""

    def __init__(self, shards: Sequence[CodeShard]):
        self.shards = list(shards)
        self.about: dict[str, Any] = self.shards[0].about
        self.broken = [one for shard in self.shards for one in shard.broken]
        self._ends = list(accumulate(map(len, self.shards)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Coded:
        if not -len(self) <= index < len(self):
            raise IndexError(f"there are codes of {len(self)} images, there is no number {index}")
        index %= len(self)
        shard = bisect_right(self._ends, index)
        return self.shards[shard][index - (self._ends[shard - 1] if shard else 0)]


def open_codes(path: str | Path) -> Codes:
    """The codes that `tokenize --out PATH` wrote; also by its manifest, one of its shards, or a pattern of shards.

    CodesError in one sentence where a shard is missing or damaged, or shards are of several runs.
    """
    path = Path(path)
    shards = [CodeShard(file) for file in _files(path)]
    if len({shard.job for shard in shards}) > 1:
        raise CodesError(f"{path}: its shards are of several runs of `tokenize`: remove those of the other run")
    return Codes(shards)


def _files(path: Path) -> list[Path]:
    found = _SHARD.fullmatch(path.stem)
    if path.suffix == ".json":
        kinds = (".arrayrecord", ".array_record")
        path = next((path.with_suffix(kind) for kind in kinds if shards_of(path.with_suffix(kind))), path)
    elif path.is_file() and not found:
        return [path]
    elif found:
        path = path.with_name(found[1] + path.suffix)
    elif any(sign in path.name for sign in "*?["):
        return sorted(map(Path, glob.glob(str(path)))) or _none(path)
    files = [path] if path.is_file() else shards_of(path)
    if not files:
        _none(path)
    wanted = int(_SHARD.fullmatch(files[0].stem)[3]) if _SHARD.fullmatch(files[0].stem) else 1
    if len(files) != wanted:
        raise CodesError(
            f"{path} has {len(files)} of its {wanted} shards: run `tokenize` again, which makes the others"
        )
    return files


def shards_of(out: Path) -> list[Path]:
    """The shards of `out` that are there, in order."""
    numbered = sorted(out.parent.glob(f"{glob.escape(out.stem)}-*-of-*{out.suffix}"))
    return [out] if out.is_file() else [file for file in numbered if _SHARD.fullmatch(file.stem)]


def _none(path: Path) -> list[Path]:
    raise CodesError(f"{path} does not exist, nor do shards of it: make it with `tokenize --out {path}`")

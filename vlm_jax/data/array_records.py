"""ArrayRecord shards that hold dialogues and their images: one file to copy, random access, texts that can be read without the images.

    name-00000-of-00008.array_record
        record 0 .. m-1      images as they were encoded, each once however many records of the shard show it
        m .. m+n-1           {"id", "task", "conversations", "images": [[record number, bytes, name], ...]}
        last                 {"format", "images": m, "records": n, "hash"}
    name.index.json          counts, hashes and what was left out, for people and scripts: the shards do without it

Made by `write`, in the order of the records, so that shards in order of name are the data set again.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import os
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from vlm_jax.config import ConfigError, UserError
from vlm_jax.data.image_source import ImageSource
from vlm_jax.data.images import open_image
from vlm_jax.data.kept_arrays import hash_of
from vlm_jax.data.records import Image, Record, RecordError, record_of

FORMAT = "vlm_jax dialogues 1"
OPTIONS = "group_size:1,uncompressed"  # one record is one read; encoded images do not shrink
CHUNK = 64  # records whose images are read together
_READERS: dict[str, Any] = {}  # by path: images of a shard share its reader


@dataclasses.dataclass(frozen=True)
class ArrayImage(ImageSource):
    """An image inside an ArrayRecord file; piece: (record number, bytes)."""

    def read(self) -> bytes:
        """The encoded bytes; raises OSError."""
        return self.data if self.data is not None else read_record(self.path, self.piece[0])


class ArrayShard(Sequence[Record]):
    """The records of one file of `write`, random access; threads and processes may share it."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        forget(str(path))
        try:
            size = len(reader_of(str(path)))
            about = json.loads(read_record(str(path), size - 1)) if size else None
        except OSError as error:
            raise RecordError(f"{error}: make it again with `data build`, or fetch it again", "file") from error
        except ValueError:
            about = None
        if not isinstance(about, dict) or about.get("format") != FORMAT:
            raise RecordError(f"{path} is an ArrayRecord file, but not one that `data build` writes ({FORMAT})", "file")
        self._images, self._records = about["images"], about["records"]
        self.fingerprint = hash_of(FORMAT, about["hash"])

    def __len__(self) -> int:
        return self._records

    def __getitem__(self, index: int) -> Record:
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.path} has {len(self)} records, there is no number {index}")
        index %= len(self)
        try:
            raw = json.loads(read_record(str(self.path), self._images + index))
        except OSError as error:
            raise RecordError(f"{self.path}: record {index} cannot be read: {error}", "file") from error
        places = raw.pop("images")
        images = [ArrayImage(str(self.path), "", None, (number, size), name) for number, size, name in places]
        return record_of(raw | {"image": [image.member for image in images]}, index, self.path, place=lambda _: images)

    def __iter__(self) -> Iterator[Record]:
        return (self[i] for i in range(len(self)))

    def images(self) -> Iterator[ArrayImage]:
        """Every image of the shard, once; nothing is read."""
        return (ArrayImage(str(self.path), "", None, (number, 0), f"image {number}") for number in range(self._images))


class Skipped(NamedTuple):
    """A record that was not written: its number, why (a `reason` of records or images), and the sentence."""

    index: int
    reason: str
    sentence: str


@dataclasses.dataclass(frozen=True)
class Written:
    """What a data set on disk came to: files, their records, images and bytes, and the records that were left out."""

    files: tuple[Path, ...]
    records: int
    images: int
    bytes: int
    skipped: tuple[Skipped, ...] = ()

    @property
    def reasons(self) -> dict[str, int]:
        """Why records were left out -> how many, the most frequent first."""
        return dict(Counter(one.reason for one in self.skipped).most_common())


class Whole(NamedTuple):
    """A record with its images: (key, name, encoded bytes, or None if the key is known)."""

    index: int
    record: Record
    images: list[tuple[Any, str, bytes | None]]


def write(
    records: Sequence[Record],
    folder: str | Path,
    name: str = "data",
    *,
    shards: int = 8,
    threads: int = 8,
    progress: bool = False,
) -> Written:
    """Write `records` with their images into `folder` as shards of equal shares, see the module; existing shards are not touched.

    A record is left out, and returned with its reason, if it cannot be used or one of its images cannot be decoded. A shard appears
    when it is whole.
    """
    folder, shards = Path(folder), max(1, min(shards, len(records)))
    if shards > 99999 or not name or os.sep in name:
        raise ConfigError(f"shards={shards}, name={name!r} give no file names: use up to 99999 shards and a plain name")
    there = sorted(folder.glob(f"{name}-*-of-*.array_record"))
    if there:
        raise ConfigError(f"{there[0]} is there already: write into an empty folder, or remove the shards of {name}")
    folder.mkdir(parents=True, exist_ok=True)
    bounds = [len(records) * k // shards for k in range(shards + 1)]
    made, skipped = [], []
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(threads))
        bar = stack.enter_context(tqdm(total=len(records), desc="write", unit="record", disable=not progress))
        for k in range(shards):
            file = folder / f"{name}-{k:05d}-of-{shards:05d}.array_record"
            about, left_out = _write_shard(records, range(bounds[k], bounds[k + 1]), file, pool, bar)
            made.append({"file": file.name, "bytes": file.stat().st_size, **about})
            skipped += left_out
    counts = [sum(shard[key] for shard in made) for key in ("records", "images", "bytes")]
    written = Written(tuple(folder / shard["file"] for shard in made), *counts, tuple(skipped))
    if not written.records:
        for file in written.files:
            file.unlink()
        first = f"; the first: {skipped[0].sentence}" if skipped else ""
        raise RecordError(f"none of the {len(records)} records can be written to {folder}{first}", "file")
    index = {"format": FORMAT, "records": written.records, "images": written.images, "bytes": written.bytes}
    index |= {"hash": hash_of(*(shard["hash"] for shard in made)), "skipped": written.reasons, "shards": made}
    partial = folder / f"{name}.index.json.partial"
    partial.write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, folder / f"{name}.index.json")
    return written


def whole_records(
    records: Sequence[Record],
    indices: Sequence[int],
    pool: concurrent.futures.Executor,
    known: Container[Any] = (),
) -> Iterator[Whole | Skipped]:
    """Records with the bytes of their images, every image decoded once to see that it can be; `known` keys are not read again."""
    for start in range(0, len(indices), CHUNK):
        found, wanted = [], {}
        for index in indices[start : start + CHUNK]:
            try:
                record = records[index]
            except UserError as error:
                found.append(Skipped(index, getattr(error, "reason", "record"), str(error)))
                continue
            images = [(_key(image), ImageSource.of(image, record.where)) for image in record.images]
            wanted |= {key: image for key, image in images if key not in known and key not in wanted}
            found.append((index, record, images))
        data = dict(zip(wanted, pool.map(_encoded, wanted.values())))
        for one in found:
            yield one if isinstance(one, Skipped) else _whole(*one, data)


def _whole(index: int, record: Record, images: list[tuple[Any, ImageSource]], data: dict) -> Whole | Skipped:
    for key, image in images:
        if isinstance(data.get(key), tuple):
            reason, words = data[key]
            return Skipped(index, reason, f"{image.label}{words}")
    return Whole(index, record, [(key, image.member or image.path, data.get(key)) for key, image in images])


def _encoded(image: ImageSource) -> bytes | tuple[str, str]:
    """The bytes of an image that can be decoded, else (reason, what is wrong with it)."""
    try:
        try:
            data = image.read()
        except OSError:
            open_image(image)  # which says what is wrong
            raise
        open_image(dataclasses.replace(image, data=data))
        return data
    except (UserError, OSError) as error:
        return getattr(error, "reason", "unreadable"), str(error).removeprefix(image.label)


def _write_shard(
    records: Sequence[Record], indices: Sequence[int], file: Path, pool: concurrent.futures.Executor, bar: tqdm
) -> tuple[dict[str, Any], list[Skipped]]:
    """One file of `write`: (its last record without the format, what was left out)."""
    from array_record.python.array_record_module import ArrayRecordWriter  # here, because most runs need none

    partial, digest = file.with_suffix(".partial"), hashlib.sha256()
    places, texts, skipped = {}, [], []
    writer = ArrayRecordWriter(str(partial), OPTIONS)

    def put(data: bytes) -> None:
        digest.update(len(data).to_bytes(8, "little") + data)
        writer.write(data)

    for one in whole_records(records, indices, pool, places):
        bar.update()
        if isinstance(one, Skipped):
            skipped.append(one)
            continue
        for key, _, data in one.images:
            if key not in places:
                places[key] = len(places), len(data)
                put(data)
        images = [[*places[key], image] for key, image, _ in one.images]
        turns = [{"from": role, "value": text} for role, text in one.record.turns]
        raw = {"id": one.record.id, "task": one.record.task, "conversations": turns, "images": images}
        texts.append(json.dumps(raw, ensure_ascii=False).encode())
    for text in texts:
        put(text)
    about = {"images": len(places), "records": len(texts), "hash": digest.hexdigest()}
    writer.write(json.dumps({"format": FORMAT, **about}).encode())
    writer.close()
    os.replace(partial, file)
    return about, skipped


def _key(image: Image) -> Any:
    """What tells an image from others without reading it."""
    source = ImageSource.of(image)
    return (source.path, source.piece) if source.data is None else hashlib.sha256(source.data).digest()


def reader_of(path: str) -> Any:
    """The reader of a file in this process; threads may share it. OSError if it is no whole ArrayRecord file."""
    if path not in _READERS:
        from array_record.python.array_record_data_source import (
            ArrayRecordDataSource,
        )  # here, because most runs need none

        try:
            _READERS[path] = ArrayRecordDataSource([path])
        except (RuntimeError, ValueError) as error:
            raise OSError(f"{path} cannot be read as ArrayRecord ({str(error).split(';')[0]})") from error
    return _READERS[path]


def forget(path: str) -> None:
    """Open a file anew at the next read: it may be another one by now."""
    _READERS.pop(path, None)


def read_record(path: str, number: int) -> bytes:
    """One record of an ArrayRecord file; OSError if the file is damaged."""
    try:
        return reader_of(path)[number]
    except (RuntimeError, ValueError, IndexError) as error:
        raise OSError(f"{path} is damaged ({str(error).split(';')[0]})") from error

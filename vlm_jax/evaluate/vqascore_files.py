"""What a benchmark of image-text scores is once it is read, and reading its files so that a bad one ends in one sentence.

Item      images x texts that are scored against each other
ScoreSet  items, and the function from their scores to the benchmark's numbers, {row: {number: value}}
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from vlm_jax.config import UserError
from vlm_jax.data.image_source import ImageSource
from vlm_jax.data.images import open_image

Numbers = dict[str, dict[str, float]]


class BenchmarkError(UserError):
    """A file of a benchmark that cannot be used; the message names it."""


class Item(NamedTuple):
    """Images and texts of which every pair is scored."""

    images: tuple[ImageSource, ...]
    texts: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class ScoreSet:
    """A benchmark, read. numbers(scores) takes an array [images, texts] per item."""

    items: Sequence[Item]
    numbers: Callable[[Sequence[np.ndarray]], Numbers]


@dataclasses.dataclass(frozen=True)
class ImageGrid(ImageSource):
    """Several images of one size as one, `columns` side by side, row after row; a JPEG as the published ones are."""

    parts: tuple[str, ...] = ()
    columns: int = 1

    def exists(self) -> bool:
        """Whether all parts are there."""
        return all(ImageSource(part).exists() for part in self.parts)

    def open(self) -> io.BytesIO:
        """The grid as a file."""
        return io.BytesIO(self.read())

    def read(self) -> bytes:
        """The encoded grid; ImageError names a part that cannot be used."""
        pictures = [open_image(ImageSource(part, self.record)) for part in self.parts]
        (w, h), rows = pictures[0].size, -(-len(pictures) // self.columns)
        grid = Image.new("RGB", (w * self.columns, h * rows))
        for i, picture in enumerate(pictures):
            grid.paste(picture, (w * (i % self.columns), h * (i // self.columns)))
        held = io.BytesIO()
        grid.save(held, "JPEG")
        return held.getvalue()


class Entry:
    """A record of a file: `entry["key"]` is what it holds, checked; `where` says which it is."""

    def __init__(self, values: Any, where: str):
        if not isinstance(values, Mapping):
            raise BenchmarkError(f"{where} is {_kind(values)}: it must be an object")
        self.values, self.where = values, where

    def get(self, key: str, kind: type | tuple[type, ...], what: str) -> Any:
        """The value of a key of one of these types; BenchmarkError names the entry and says `what` it must be."""
        value = self.values.get(key)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise BenchmarkError(f"{self.where} has {key}={value!r}: it must be {what}")
        return value

    def text(self, key: str) -> str:
        """A string that is not empty."""
        value = self.get(key, str, "a text")
        if not value.strip():
            raise BenchmarkError(f"{self.where} has an empty {key}")
        return value

    def number(self, key: str) -> float:
        """A number, also one written as text in a CSV file; nan is none."""
        value = self.values.get(key)
        try:
            found = float("nan") if value is None or isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            found = float("nan")
        if not np.isfinite(found):
            raise BenchmarkError(f"{self.where} has {key}={value!r}: it must be a number")
        return found

    def object(self, key: str) -> Entry:
        """An object inside this one."""
        return Entry(self.get(key, dict, "an object"), f"{key} of {self.where}")

    def entries(self, key: str) -> list[Entry]:
        """A list of objects inside this one."""
        found = self.get(key, list, "a list of objects")
        return [Entry(value, f"{key}[{i}] of {self.where}") for i, value in enumerate(found)]

    def mean(self, key: str) -> float:
        """The mean of a list of numbers that is not empty."""
        found = self.get(key, list, "a list of numbers")
        if not found or any(isinstance(x, bool) or not isinstance(x, (int, float)) or x != x for x in found):
            raise BenchmarkError(f"{self.where} has {key}={found!r}: it must be a list of numbers")
        return float(np.mean(found))

    def image(self, folder: Path, key: str) -> ImageSource:
        """The image that a key names, in `folder`."""
        return ImageSource(str(folder / self.text(key)), self.where)


def read_json(path: Path) -> Any:
    """A JSON file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def entries_of(path: Path) -> list[Entry]:
    """The objects of a JSON file that is a list of them, or {key: object}; Entry.where holds the key."""
    found = read_json(path)
    pairs: Iterable[tuple[Any, Any]]
    pairs = found.items() if isinstance(found, dict) else enumerate(found) if isinstance(found, list) else ()
    entries = [Entry(value, f"entry {key} of {path}") for key, value in pairs]
    if not entries:
        raise BenchmarkError(f"{path} holds no entries: it must be a list or an object of them")
    return entries


def keyed_entries(path: Path) -> dict[str, Entry]:
    """The objects of a JSON file {key: object}."""
    found = read_json(path)
    if not isinstance(found, dict) or not found:
        raise BenchmarkError(f"{path} is {_kind(found)}: it must be an object of entries that is not empty")
    return {key: Entry(value, f"entry {key} of {path}") for key, value in found.items()}


def table_of(path: Path, columns: Sequence[str]) -> list[Entry]:
    """The lines of a CSV file that has these columns."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            lines = [Entry(line, f"line {reader.line_num} of {path}") for line in reader]
    except (OSError, ValueError, csv.Error) as error:
        raise _unreadable(path, error) from error
    missing = [name for name in columns if name not in (reader.fieldnames or ())]
    if missing:
        raise BenchmarkError(f"{path} has no column {', '.join(missing)}: it must have {', '.join(columns)}")
    if not lines:
        raise BenchmarkError(f"{path} has no lines")
    return lines


def lines_of(path: Path) -> list[Entry]:
    """The objects of a JSON-lines file."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    entries = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                entries.append(Entry(json.loads(line), f"line {number} of {path}"))
            except ValueError as error:
                raise BenchmarkError(f"line {number} of {path} is no JSON: {error}") from error
    return entries


def folder_of(data: Path, *names: str) -> Path:
    """The first of the folders `names` that `data` has, or `data` itself."""
    return next((data / name for name in names if (data / name).is_dir()), data)


def single(scores: Sequence[np.ndarray]) -> np.ndarray:
    """float64 [items]: the score of each item, the mean over its images where it has several."""
    return np.asarray([np.mean(score, axis=0, dtype=np.float64)[0] for score in scores])


def _unreadable(path: Path, error: Exception) -> BenchmarkError:
    if isinstance(error, FileNotFoundError):
        return BenchmarkError(f"{path} does not exist: --data must be the folder of the benchmark")
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return BenchmarkError(f"{path} cannot be read: {reason}")


def _kind(value: Any) -> str:
    return {dict: "an empty object", list: "a list", str: "a text", type(None): "null"}.get(type(value), "a number")

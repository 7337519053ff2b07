"""A data set of a recipe, opened: files of any kind -> records, each with its task.

    x.json, x.jsonl, part-*.json        LLaVA records                          data.records
    shard-{000..012}.tar, shard-*.tar   webdataset shards                      data.tar_shards
    x-*.array_record, or their folder   shards of `data build`                 data.array_records
    a TFDS folder                       llava_mixture                          data.llava_mixture
    a folder with records.json          drawn smart-watches, images in images/ data.smartwatch_files

Several files are taken in order of name.
"""

from __future__ import annotations

import dataclasses
import functools
import glob
import itertools
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from vlm_jax.data.array_records import ArrayShard
from vlm_jax.data.flatten import Flattened
from vlm_jax.data.kept_arrays import hash_of
from vlm_jax.data.options import DataConfig, Source
from vlm_jax.data.records import Record, RecordError, Records
from vlm_jax.data.tar_shards import TarShard

TASK = "understanding"  # of a record that does not name one
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_CHOICE = re.compile(r"\{([^{}]*,[^{}]*)\}")
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.array_record")
_PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".json.gz", ".jsonl.gz", ".zip")


class Opened(Sequence[Record]):
    """Several parts, one after another, every record with a task; picklable if they are.

    task: goes before the records' own. A record that cannot be used raises RecordError and leaves the others usable.
    """

    def __init__(self, parts: Sequence[Sequence[Record]], task: str = ""):
        self.parts, self.task = list(parts), task
        self._ends = list(accumulate(len(part) for part in parts))

    @property
    def fingerprint(self) -> str:
        """Hash of the content of every part."""
        return hash_of(self.task, *(part.fingerprint for part in self.parts))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Record:
        if not -len(self) <= index < len(self):
            raise IndexError(f"there are {len(self)} records, there is no number {index}")
        index %= len(self)
        part = bisect_right(self._ends, index)
        record = self.parts[part][index - (self._ends[part - 1] if part else 0)]
        task = self.task or record.task or TASK
        return record if task == record.task else dataclasses.replace(record, task=task)

    def __iter__(self) -> Iterator[Record]:
        return (self[i] for i in range(len(self)))


def open_source(source: Source, data: DataConfig, cache: str | Path | None = None) -> Opened | Flattened:
    """The records of `source`, with a `fingerprint` of their content; `limit`, `repeat` and `weight` are the mixture's business.

    cache: folder for what is found out about the files (default: data.cache, else nothing is kept). UserError in one sentence if
    there is no such file, it is of no kind we know, or it holds nothing.
    """
    cache = cache or data.cache or None
    kinds: dict[str, Callable[[str], Sequence[Record]]] = {
        ".json": functools.partial(
            Records, image_folder=source.image_folder or data.image_folder, roots=data.image_roots, cache=cache
        ),
        ".tar": functools.partial(TarShard, cache=cache),
        ".array_record": ArrayShard,
    }
    kinds[".jsonl"] = kinds[".json"]
    if not source.path:
        raise RecordError("a source has no path: set data.path, or data.sources.NAME.path, to a data file", "file")
    parts = []
    for path in expand(source.path):
        parts += _open_folder(Path(path), kinds) if Path(path).is_dir() else [_open_file(path, kinds)]
    opened = Opened(parts, source.task)
    if not len(opened):
        raise RecordError(f"{source.path} holds no records", "file")
    return Flattened(opened, source.flatten, cache) if source.flatten else opened


def expand(pattern: str) -> list[str]:
    """The files of a pattern in order of name: {000..012} and {a,b} are written out, * ? [ ] are looked for.

    >>> expand("x-{08..10}.tar")
    ['x-08.tar', 'x-09.tar', 'x-10.tar']
    """
    paths = []
    for written in _written_out(pattern):
        found = [written] if Path(written).exists() else sorted(glob.glob(written, recursive=True))
        if not found and glob.has_magic(written):
            raise RecordError(f"no file matches {written}: check data.path or data.sources", "file")
        paths += found or [written]
    _check_complete(paths if paths != [pattern] else [])
    return paths


def _written_out(pattern: str) -> list[str]:
    """Braces of a pattern as a shell writes them out."""
    if match := _RANGE.search(pattern):
        first, last = match.groups()
        step = 1 if int(first) <= int(last) else -1
        middles = [f"{k:0{len(first)}d}" for k in range(int(first), int(last) + step, step)]
    elif match := _CHOICE.search(pattern):
        middles = match[1].split(",")
    else:
        return [pattern]
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return list(itertools.chain.from_iterable(_written_out(head + middle + tail) for middle in middles))


def _check_complete(paths: Sequence[str]) -> None:
    """Raise if shards 00000-of-00008 ... are found together but not all of them."""
    sets: dict[tuple[str, str], set[str]] = {}
    for path in paths:
        if match := _SHARD.fullmatch(path):
            sets.setdefault((match[1], match[3]), set()).add(match[2])
    for (name, count), numbers in sets.items():
        missing = [f"{k:05d}" for k in range(int(count)) if f"{k:05d}" not in numbers]
        if missing:
            raise RecordError(
                f"{name} lacks {len(missing)} of its {int(count)} shards, the first is {name}-{missing[0]}-of-{count}.array_record: "
                "fetch it, or name the shards you want one by one",
                "file",
            )


def _open_file(path: str, kinds: dict[str, Callable[[str], Sequence[Record]]]) -> Sequence[Record]:
    name = path.lower()
    if name.endswith(_PACKED):
        raise RecordError(f"{path} is compressed, so its records cannot be read one by one: unpack it", "file")
    if re.search(r"\.array_record-\d{5}-of-\d{5}$", name):
        raise RecordError(
            f"{path} is a file of a TFDS data set: name its folder, which holds dataset_info.json", "file"
        )
    for ending, open_kind in kinds.items():
        if name.endswith(ending):
            if not Path(path).is_file():
                raise RecordError(f"{path} does not exist: check data.path or data.sources", "file")
            return open_kind(path)
    if not Path(path).exists():
        raise RecordError(f"{path} does not exist: check data.path or data.sources", "file")
    raise RecordError(
        f"{path} is of an unknown kind: a source is a .json, .jsonl, .tar or .array_record file, or a folder of them",
        "file",
    )


def _open_folder(path: Path, kinds: dict[str, Callable[[str], Any]]) -> list[Sequence[Record]]:
    """The parts of a folder: TFDS, shards, or drawn smart-watches."""
    if any(any(path.glob("*/" * depth + "dataset_info.json")) for depth in range(4)):
        return [_open_tfds(path)]
    for ending in (".array_record", ".tar"):
        found = sorted(str(file) for file in path.glob(f"*{ending}"))
        _check_complete(found)
        if found:
            return [kinds[ending](file) for file in found]
    if (path / "records.json").is_file() and (path / "images").is_dir():
        return [kinds[".json"](str(path / "records.json"), image_folder=str(path / "images"))]
    raise RecordError(
        f"{path} is a folder without .array_record or .tar shards and no TFDS data set: name the .json file in it",
        "file",
    )


def _open_tfds(path: Path) -> Sequence[Record]:
    from vlm_jax.data.llava_mixture import TfdsRecords, tfds_folders  # here, because it loads tensorflow_datasets

    found = tfds_folders(path)
    if len(found) != 1:
        raise RecordError(
            f"{path} holds {len(found)} TFDS data sets: name the folder of one version"
            + (f", such as {found[0]}" if found else ""),
            "file",
        )
    return TfdsRecords(found[0])

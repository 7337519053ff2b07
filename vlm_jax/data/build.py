"""Data sets for pods and for the generation task: what `data build` writes, and the lines that put it into a recipe.

NAME-00000-of-00008.array_record ...   the usable records of source NAME with their images   (data.array_records)
captions.json                          captioned images turned round into requests to draw them   (data.generation)
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vlm_jax.config import UserError, one_of
from vlm_jax.data.array_records import Written, write
from vlm_jax.data.generation import to_generation
from vlm_jax.data.options import DataConfig, Source
from vlm_jax.data.records import Record

FORMATS = ("array_record", "tfds")
RECORDS_PER_SHARD = 8192  # about 1 GB of photographs


class Built(NamedTuple):
    """What a source became: the path that a recipe names, and what was written and left out."""

    path: str
    written: Written


def build_shards(
    sources: Mapping[str, Sequence[Record]],
    out: Path,
    *,
    form: str = "array_record",
    shards: int = 0,
    threads: int = 8,
    progress: bool = False,
) -> dict[str, Built]:
    """The usable records of every source with their images, under `out`; form: one of FORMATS.

    shards: files per source, 0: one for RECORDS_PER_SHARD records. What is written is whole or has another name.
    """
    one_of("--format", form, FORMATS)
    made = {}
    for name, records in sources.items():
        stem, count = file_stem(name), shards or -(-len(records) // RECORDS_PER_SHARD)
        if form == "array_record":
            written = write(records, out, stem, shards=count, threads=threads, progress=progress)
            made[name] = Built(str(out / f"{stem}-*.array_record"), written)
        else:
            from vlm_jax.data.llava_mixture import build  # here, because it loads tensorflow_datasets

            written = build(records, out / stem, shards=count, threads=threads)
            made[name] = Built(str(written.files[0].parent), written)
    return made


def file_stem(name: str) -> str:
    """The name of a source as the beginning of file names: "photos" for photos.json."""
    return Path(name).stem if Path(name).suffix in (".json", ".jsonl") else name.replace(os.sep, "_")


def recipe_lines(data: DataConfig, sources: Mapping[str, Source], made: Mapping[str, Built]) -> str:
    """What to put into a recipe, or behind a command, to train on what was built in place of `sources`.

    A source keeps its name, weight, repeat and limit, so that an epoch has the same samples in the same order. Its images, task and
    flattening are in the files.
    """
    if not data.sources:
        return f'--config.data.path="{tuple(one.path for one in made.values())}"'
    lines = []
    for name, one in made.items():
        kept = dataclasses.replace(sources[name], path=one.path, image_folder="", task="", flatten="")
        default = Source()
        fields = [f for f in dataclasses.fields(Source) if getattr(kept, f.name) != getattr(default, f.name)]
        settings = ", ".join(f"{f.name}={getattr(kept, f.name)!r}" for f in fields)
        lines.append(f"    {name!r}: Source({settings}),")
    return "\n".join(["sources={", *lines, "}"])


def build_generation(
    sources: Mapping[str, Sequence[Record]],
    folders: Mapping[str, str],
    out: Path,
    *,
    count: int = 0,
    seed: int = 0,
    skip: str = "sam",
    start: int = 0,
) -> tuple[int, int]:
    """Write `out`, a LLaVA JSON list of generation records made of captions; returns (records written, records skipped).

    folders: image folder of every source; images below it are named relative to it. count: at most so many (0: all); skip, start:
    see generation.to_generation.
    """
    unusable: list[str] = []
    raw = (one for name, records in sources.items() for one in _raw(records, folders[name], unusable))
    most = count or sum(map(len, sources.values()))
    partial, written = out.with_name(out.name + ".partial"), 0
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(partial, "w", encoding="utf-8") as file:
        for one in to_generation(raw, most, seed, skip, start):
            file.write(("[\n" if written == 0 else ",\n") + json.dumps(one, indent=2, ensure_ascii=False))
            written += 1
        file.write("\n]\n")
    if not written:
        partial.unlink()
        first = f"; the first that cannot be used: {unusable[0]}" if unusable else ""
        raise UserError(f"no record is left to be turned into a request for an image{first}")
    os.replace(partial, out)
    return written, len(unusable)


def _raw(records: Sequence[Record], folder: str, unusable: list[str]) -> Iterator[dict[str, Any]]:
    """Records as LLaVA's JSON has them; sentences about those that cannot be used go to `unusable`."""
    for index in range(len(records)):
        try:
            record = records[index]
        except UserError as error:
            unusable.append(str(error))
            continue
        if not record.images or not all(isinstance(image, str) for image in record.images):
            unusable.append(f"{record.where} has no image in a file of its own")
            continue
        images = [os.path.relpath(image, folder) if _below(image, folder) else image for image in record.images]
        turns = [{"from": role, "value": text} for role, text in record.turns]
        yield {"id": record.id, "image": images[0] if len(images) == 1 else images, "conversations": turns}


def _below(path: str, folder: str) -> bool:
    return bool(folder) and os.path.normpath(path).startswith(os.path.normpath(folder) + os.sep)

"""`python -m vlm_jax tokenize`: images -> codes as ArrayRecord shards (data.code_records), which priors are trained on.

Processes (see parallel.hosts) share the shards, each computing on its own devices. A shard that is whole is kept when the command is
started again after it was killed, in any number of processes: no image is lost, none is there twice. Images that are broken are left
out, counted and named in the manifest.
"""

from __future__ import annotations

import collections
import concurrent.futures
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from tqdm import tqdm

from vlm_jax.config import UserError
from vlm_jax.convert.visual_tokenizer import load_tokenizer
from vlm_jax.data.code_records import (
    FORMAT,
    Coded,
    CodesError,
    CodeShard,
    manifest_file,
    number_type,
    open_codes,
    shard_files,
    shards_of,
    write_shard,
)
from vlm_jax.data.code_views import OWN_CROPS, Views
from vlm_jax.data.image_lists import named, open_images
from vlm_jax.data.image_options import ImageDataConfig
from vlm_jax.data.image_source import ImageError, ImageSource
from vlm_jax.data.kept_arrays import hash_of
from vlm_jax.data.manifest import DataError
from vlm_jax.generate.visual_codes import VisualCoder, check_size, fingerprint
from vlm_jax.parallel import hosts
from vlm_jax.visual_tokenizers.encoding import code_shapes
from vlm_jax.visual_tokenizers.options import TokenizerConfig

NAMED = 20  # broken images that are named on the screen; the manifest names all


class Item(NamedTuple):
    """An image to be turned into codes, and its name in the records."""

    id: str
    source: ImageSource


def tokenize(
    model: str,
    images: Sequence[str],
    out: str,
    crop: str = "",
    size: int = 0,
    margin: float = 1.1,
    batch: int = 32,
    dtype: str = "float32",
    shard_images: int = 4096,
    threads: int = 8,
) -> None:
    """Write the codes of `images` to `out`. crop, margin: see data.code_views, "" is the rule of the tokenizer's program.

    size: pixels per side, 0 is the resolution of the tokenizer. shard_images: images of a shard, what a killed run may lose.
    """
    if shard_images < 1 or threads < 1:
        raise CodesError(f"--shard_images={shard_images} and --threads={threads} must be at least 1")
    with hosts.joined():
        _tokenize(model, images, Path(out), (crop, size, margin), batch, dtype, shard_images, threads)


def _tokenize(
    model: str, images: Sequence[str], out: Path, how: tuple[str, int, float], batch: int, dtype: str, shard_images: int, threads: int
) -> None:  # fmt: skip
    """This process's share of the shards, and on the first process the manifest."""
    tokenizer = load_tokenizer(model)
    config = tokenizer.config
    views = views_of(config, *how)
    items = named_images(images)
    about = _about(config, views, dtype) | {"hash": fingerprint(tokenizer)}
    job = hash_of(FORMAT, json.dumps(about, sort_keys=True), shard_images, *(item.id for item in items))
    about["model"] = Path(model).name
    files = shard_files(out, -(-len(items) // shard_images))
    missing = _missing(out, files, job)
    hosts.wait_for_all("the shards are counted")  # before one of them is written, so that all share the same
    mine = missing[jax.process_index() :: jax.process_count()]
    kept = f", {len(files) - len(missing)} are there already" if len(missing) < len(files) else ""
    hosts.say(
        f"{len(items):,} images -> {len(files)} shards{kept}; crop {views.rule}, {views.size} pixels, {views.count} views"
    )
    if mine:
        coder = VisualCoder(tokenizer, batch=batch, dtype=dtype)
        with concurrent.futures.ThreadPoolExecutor(threads) as pool, _bar(mine, shard_images, len(items)) as bar:
            for k in mine:
                part, broken = items[k * shard_images : (k + 1) * shard_images], []
                coded = _coded(coder, views, part, broken, pool, bar.update)
                write_shard(files[k], coded, job=job, broken=broken, about=about)
    hosts.wait_for_all("codes are written")
    if hosts.is_first():
        _finish(out, files, job, len(items))
    hosts.wait_for_all("the manifest is written")


def views_of(config: TokenizerConfig, crop: str, size: int, margin: float = 1.1) -> Views:
    """The views that flags ask for; ConfigError where they give no whole codes."""
    views = Views(crop or OWN_CROPS[config.names], size or config.autoencoder.resolution, margin)
    check_size(config, views.size)
    return views


def named_images(places: Sequence[str]) -> list[Item]:
    """The images of folders, files, patterns, lists and shards, with names that are unique: below the folder that was given."""
    try:
        found = open_images(ImageDataConfig(path=tuple(places)))
    except DataError as error:
        raise DataError(str(error).replace("data.path", "--images")) from error
    return [Item(name, image) for name, image in named(found, places).items()]


def _about(config: TokenizerConfig, views: Views, dtype: str) -> dict[str, Any]:
    """What all shards say about their codes."""
    levels = code_shapes(config, views.size)
    return {
        "crop": {"rule": views.rule, "size": views.size, "views": views.count}
        | ({"margin": views.margin} if views.rule == "ten" else {}),
        "levels": [{"entries": n, "shape": list(shape)} for n, shape in levels],
        "dtype": number_type([n for n, _ in levels]),
        "computed": dtype,
    }


def _missing(out: Path, files: Sequence[Path], job: str) -> list[int]:
    """Numbers of the shards that are not there; CodesError if those that are there belong to another run."""
    out.parent.mkdir(parents=True, exist_ok=True)
    for file in shards_of(out):
        if file not in files or CodeShard(file).job != job:
            raise CodesError(
                f"{file} was made by another run, with other images, another tokenizer, crop or --shard_images: remove it, or "
                "choose another --out"
            )
    return [k for k, file in enumerate(files) if not file.is_file()]


def _coded(
    coder: VisualCoder,
    views: Views,
    items: Sequence[Item],
    broken: list[dict[str, str]],
    pool: concurrent.futures.Executor,
    done: Callable[[], Any],
) -> Iterator[Coded]:
    """Codes of the images in order; those that cannot be used are put on the list `broken`."""
    known: collections.deque[tuple[str, tuple[int, int]]] = collections.deque()

    def loaded() -> Iterator[Any]:
        for item, found in _ahead(items, views, pool):
            if isinstance(found, ImageError):
                broken.append({"id": item.id, "reason": found.reason, "sentence": str(found)})
                done()
            else:
                known.append((item.id, found[1]))
                yield found[0]

    for codes in coder.encode_each(loaded()):
        name, size = known.popleft()
        done()
        yield Coded(name, codes, size)


def _ahead(items: Sequence[Item], views: Views, pool: concurrent.futures.Executor) -> Iterator[tuple[Item, Any]]:
    """(item, views and size, or why not), read ahead by threads."""

    def load(item: Item) -> tuple[Item, Any]:
        try:
            return item, views.load(item.source)
        except ImageError as error:
            return item, error

    pending: collections.deque[concurrent.futures.Future] = collections.deque()
    for item in items:
        pending.append(pool.submit(load, item))
        if len(pending) >= 64:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _bar(mine: Sequence[int], shard_images: int, count: int) -> tqdm:
    total = sum(min(shard_images, count - k * shard_images) for k in mine)
    return tqdm(total=total, desc="codes", unit="image", disable=not hosts.is_first(), dynamic_ncols=True)


def _finish(out: Path, files: Sequence[Path], job: str, images: int) -> None:
    """Write the manifest; say what is broken. Without any usable image nothing stays."""
    codes = open_codes(out)
    if not len(codes):
        for file in files:
            file.unlink()
        raise UserError(f"none of the {images} images can be used; the first: {codes.broken[0]['sentence']}")
    shards = [{"file": file.name, "records": len(shard)} for file, shard in zip(files, codes.shards)]
    whole = {
        "format": FORMAT,
        "job": job,
        "records": len(codes),
        "broken": codes.broken,
        "about": codes.about,
        "shards": shards,
    }
    partial = manifest_file(out).with_name(manifest_file(out).name + ".partial")
    partial.write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, manifest_file(out))
    for one in codes.broken[:NAMED]:
        hosts.say(one["sentence"])
    if codes.broken:
        more = f"; {manifest_file(out)} names all" if len(codes.broken) > NAMED else ""
        hosts.say(f"{len(codes.broken)} of {images:,} images are broken and have no codes{more}")
    hosts.say(
        f"{len(codes):,} images in {', '.join(file.name for file in files[:3])}{' ...' if len(files) > 3 else ''}"
    )

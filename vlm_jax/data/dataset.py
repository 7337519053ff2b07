"""The `data` part of a recipe, opened: sources -> manifests -> mixture -> rows of slots.

open_sources   name -> records             open_layout   record -> sample -> slots
open_rows      both, measured (or read from the cache), mixed and planned
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_jax.config import ConfigError, VLMConfig
from vlm_jax.data.epochs import Packing
from vlm_jax.data.manifest import Layout
from vlm_jax.data.measuring import Means, measure_sources
from vlm_jax.data.mixture import used_sources
from vlm_jax.data.options import DataConfig, Source
from vlm_jax.data.pipeline import Load, Rows
from vlm_jax.data.records import Record
from vlm_jax.data.sources import open_source
from vlm_jax.data.tasks import encoder
from vlm_jax.data.tokenizer import Tokenizer

SETTINGS = (
    "template",
    "im_start_end",
    "keep_images",
    "self_question",
    "compat",
)  # what text becomes, beside the tokenizer


def named_sources(data: DataConfig) -> dict[str, Source]:
    """data.sources and the files of data.path (named after the file), without those that are left out; all checked."""
    found = dict(data.sources)
    for path in data.path:
        name = stem = Path(path).name
        count = 1
        while name in found:
            count += 1
            name = f"{stem}#{count}"
        found[name] = Source(path)
    if not found:
        raise ConfigError(
            "data.path is empty and there are no data.sources: give LLaVA JSON files, e.g. "
            "--config.data.path=\"('train.json',)\""
        )
    for name, source in found.items():
        if not source.path:
            raise ConfigError(f"data.sources.{name}.path is empty: name its file")
    return used_sources(found, data.epoch_samples)


def open_sources(data: DataConfig, cache: Path | None = None) -> dict[str, Sequence[Record]]:
    """The records of every source that is used, by name; `cache` is where a source may keep an index of its file."""
    cache = Path(data.cache) if data.cache else cache
    return {name: open_source(source, data, cache) for name, source in named_sources(data).items()}


def packing_of(data: DataConfig, **more: Any) -> Packing:
    """How `data` packs its samples; more: what the training part of a recipe says (epochs, least_rows, group, max_bad)."""
    return Packing(
        row_length=data.row_length,
        view_budget=data.views_per_row,
        sample_length=data.sample_length,
        answer_length=data.answer_length,
        max_samples=data.max_samples,
        shared_images=data.shared_images,
        order=data.order,
        seed=data.seed,
        sources=named_sources(data),
        epoch_samples=data.epoch_samples,
        max_bad_share=data.max_bad_share,
        **more,
    )


def open_layout(data: DataConfig, model: VLMConfig, tokenizer: Tokenizer) -> Layout:
    """How a record becomes slots of `model`."""
    return packing_of(data).layout(encoder(data, tokenizer), model)


def open_rows(
    data: DataConfig,
    model: VLMConfig,
    tokenizer: Tokenizer,
    *,
    cache: Path,
    epochs: int = 1,
    least_rows: int = 0,
    global_batch: int = 1,
    max_bad: int | None = None,
    state: Mapping[str, Any] | None = None,
    load: Load | None = None,
    turn: Callable[[Callable[[], Any]], Any] = lambda measuring: measuring(),
) -> Rows:
    """Rows of `epochs` passes over `data`, and of more passes until there are `least_rows`.

    cache: where manifests are kept unless data.cache says another place. global_batch: rows of a step. state: where a run stands
    that goes on (Batches.state), whose manifests are then taken if they are still there. load, turn: see Rows, measure_sources.
    """
    how = packing_of(data, epochs=epochs, least_rows=least_rows, group=global_batch, max_bad=max_bad)
    cache = Path(data.cache) if data.cache else cache
    sources, encode = open_sources(data, cache), encoder(data, tokenizer)
    means = Means(cache, data.threads, data.processes)
    wanted = {name: kept["digest"] for name, kept in (state or {}).get("sources", {}).items()}
    manifests = measure_sources(sources, how.layout(encode, model), how.limits, means, wanted, turn)
    settings = {"data.tokenizer": tokenizer.fingerprint} | {f"data.{key}": getattr(data, key) for key in SETTINGS}
    return Rows(sources, encode, model, how, manifests=manifests, load=load, settings=settings)

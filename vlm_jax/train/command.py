"""The body of `python -m vlm_jax train`: a recipe in; checkpoints, metrics and an HF export out."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlm_jax import recipe as recipes
from vlm_jax.config import ConfigError, VLMConfig, to_dict
from vlm_jax.data.dataset import open_rows
from vlm_jax.data.generated import make_watch_data
from vlm_jax.data.image_cache import Views
from vlm_jax.data.images import Preprocess
from vlm_jax.data.manifest import DataError
from vlm_jax.data.pipeline import Rows, total_steps
from vlm_jax.data.t5_text import T5_TEMPLATES
from vlm_jax.data.tokenizer import Tokenizer
from vlm_jax.parallel import hosts
from vlm_jax.parallel.mesh import make_mesh
from vlm_jax.prior_recipe import PriorRecipe
from vlm_jax.recipe import Recipe
from vlm_jax.train import loop
from vlm_jax.train.export import export_result
from vlm_jax.train.features import FeatureCache
from vlm_jax.train.prior_command import run_prior_recipe
from vlm_jax.train.runs import batches_of, budget
from vlm_jax.train.tokenizer_command import run_tokenizer_recipe
from vlm_jax.train.weights import open_tokenizer, open_weights

SHOWN = 5  # records per source that are named before training


def train(
    config: Any,
    coordinator: str = "",
    process_id: int = -1,
    process_count: int = -1,
    stopped_code: int = 0,
    connect_seconds: float = 0.0,
    heartbeat_seconds: float = 0.0,
) -> int:
    """Run the recipe in ConfigDict `config`; returns the exit code: `stopped_code` where SIGTERM ended it before its last step."""
    with hosts.joined(coordinator, process_count, process_id, connect_seconds, heartbeat_seconds):
        recipe = recipes.from_config(config)
        other = run_prior_recipe if isinstance(recipe, PriorRecipe) else run_tokenizer_recipe
        result = (run_recipe if isinstance(recipe, Recipe) else other)(recipe)
    return stopped_code if result.status == "stopped" else 0


def run_recipe(recipe: Recipe, progress: bool = True) -> loop.Result:
    """Train, or go on with, the run in recipe.output; writes its export at the end."""
    run = Path(recipe.output)
    if recipe.data.generated_watches:
        recipe = with_generated_data(recipe, run / "data", progress)
    tokenizer = open_tokenizer(recipe)
    model, source = open_weights(recipe, tokenizer)
    recipe = dataclasses.replace(recipe, model=model)
    mesh = make_mesh(recipe.mesh)
    load = image_loader(recipe, model)
    rows, steps = rows_for(recipe, model, tokenizer, run, load)
    report_skipped(rows)
    check_trainable(rows, model)
    views = load.views if isinstance(load, FeatureCache) else load
    told = views.folder is not None and hosts.is_first()
    if told:
        hosts.say(views.expect(int(rows.manifest.images[rows.manifest.usable].sum())))
    batches = batches_of(rows, recipe.train, recipe.data.threads, mesh)
    result = loop.train(
        recipe.train,
        model,
        batches,
        run,
        available_steps=steps,
        mesh=mesh,
        source=source,
        saved_config=to_dict(recipe),
        progress=progress,
        prepare=(lambda state: load.fill(state, rows.images())) if isinstance(load, FeatureCache) else None,
    )
    if told:
        hosts.say(views.report())
    if recipe.export and result.status != "stopped":
        export_result(recipe, result, run)
    return result


def with_generated_data(recipe: Recipe, folder: Path, progress: bool = False) -> Recipe:
    """The recipe over smart-watch images drawn into `folder` by the first process; without weights, the tokenizer is made from their
    text."""
    d = recipe.data
    if hosts.is_first():
        make_watch_data(folder, d, recipe.model.llm.vocab, progress)
    hosts.wait_for_all("generated data is written")
    data = dataclasses.replace(
        d,
        path=(str(folder / "train.json"),),
        sources={},
        image_folder=str(folder / "images"),
        tokenizer=d.tokenizer or recipe.init.checkpoint or recipe.init.llm or str(folder),
        generated_watches=0,
    )
    return dataclasses.replace(recipe, data=data)


def image_loader(recipe: Recipe, model: VLMConfig) -> Views | FeatureCache:
    """How rows get their images: decoded, from data.pixel_cache, or as features from data.feature_cache."""
    d = recipe.data
    views = Views(Preprocess.of(model), d.pixel_cache or None)
    return FeatureCache(d.feature_cache, model, recipe.train, views, d.threads) if d.feature_cache else views


def rows_for(
    recipe: Recipe, model: VLMConfig, tokenizer: Tokenizer, run: Path, load: Views | FeatureCache
) -> tuple[Rows, int]:
    """(rows for the whole run, steps they give); see runs.budget."""
    t = recipe.train
    state, needed = budget(t, run)
    rows = open_rows(
        recipe.data,
        model,
        tokenizer,
        cache=run / "cache",
        **needed,
        global_batch=t.global_batch,
        max_bad=t.max_bad_samples,
        state=state,
        load=load,
        turn=first_process_first,
    )
    if not hosts.agree(json.dumps(rows.identity())):
        raise DataError(
            "the hosts see different data, perhaps images that only some of them can read: give all of them the same files, "
            "and data.cache a folder that they share"
        )
    return rows, total_steps(rows, t.global_batch, state)


def first_process_first(measure: Callable[[], Any]) -> Any:
    """Call `measure` on the first process, then on the others, which read what it wrote into the cache if they see its disk.

    The others are let go also where it fails: they find the same error and say it themselves.
    """
    try:
        if not hosts.is_first():
            hosts.wait_for_all("the data is measured")
        return measure()
    finally:
        if hosts.is_first():
            hosts.wait_for_all("the data is measured")


def check_trainable(rows: Rows, model: VLMConfig) -> None:
    """Raise ConfigError for samples that `model` cannot learn."""
    if rows.epochs.has_answers and not model.encoder_decoder:
        raise ConfigError(
            "data.template makes samples for an encoder-decoder model, but model.llm is a decoder: use a template such as v1"
        )
    if model.encoder_decoder and not rows.epochs.has_answers:
        raise ConfigError(
            "data.template makes samples for a decoder, but model.llm is an encoder-decoder: use one of "
            + ", ".join(T5_TEMPLATES)
        )
    if rows.manifest.generated.any():
        source, number = rows.source_of(int(rows.manifest.generated.argmax()))
        raise ConfigError(
            f"record {number} of {source} asks for an image to be generated, which needs a visual tokenizer, and the model has "
            "none: leave such records out or set the task of their source to understanding"
        )


def report_skipped(rows: Rows) -> None:
    """Say before training how much of every source is not used, by reason, and why the first of it is not."""
    for name, manifest in rows.manifests.items():
        notes, records = manifest.notes, len(manifest)
        if notes:
            reasons = ", ".join(f"{count} {reason}" for reason, count in manifest.reasons().items())
            hosts.say(
                f"{len(notes)} of {records} records of {name} ({len(notes) / records:.1%}) are not trained on: {reasons}"
            )
        for note in notes[:SHOWN]:
            hosts.say(f"  {note.sentence}")
        if manifest.cut_count:
            hosts.say(
                f"{manifest.cut_count} samples of {name} are longer than {rows.layout.limit} slots and lose their end"
            )

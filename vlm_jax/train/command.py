"""The body of `python -m vlm_jax train`: a recipe in; checkpoints, metrics and an HF export out."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax

from vlm_jax import recipe as recipes
from vlm_jax.config import VLMConfig, to_dict
from vlm_jax.data.dataset import open_rows
from vlm_jax.data.generated import make_watch_data
from vlm_jax.data.pipeline import Batches, Rows, total_steps
from vlm_jax.data.tokenizer import Tokenizer
from vlm_jax.parallel import hosts
from vlm_jax.parallel.mesh import make_mesh
from vlm_jax.recipe import Recipe
from vlm_jax.train import loop
from vlm_jax.train.export import export_result
from vlm_jax.train.weights import open_tokenizer, open_weights


def train(config: Any, coordinator: str = "", process_id: int = -1, process_count: int = -1) -> int:
    """Run the recipe in ConfigDict `config`; returns the exit code."""
    several = (coordinator, process_count, process_id) if coordinator else (None, None, None)
    hosts.initialise(*several)
    run_recipe(recipes.from_config(config))
    return 0


def run_recipe(recipe: Recipe, progress: bool = True) -> loop.Result:
    """Train, or go on with, the run in recipe.output; writes its export at the end."""
    run = Path(recipe.output)
    if recipe.data.generated_watches:
        recipe = with_generated_data(recipe, run / "data", progress)
    tokenizer = open_tokenizer(recipe)
    model, source = open_weights(recipe, tokenizer)
    recipe = dataclasses.replace(recipe, model=model)
    mesh = make_mesh(recipe.mesh)
    rows, steps = rows_for(recipe, model, tokenizer, run)
    report_skipped(rows)
    index, count = hosts.data_shard(mesh)

    def batches(start: int, state: dict | None) -> Batches:
        return Batches(rows, recipe.train.global_batch, start, index, count, recipe.data.threads, state)

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
    )
    if recipe.export and result.status != "stopped":
        export_result(recipe, result, run)
    return result


def with_generated_data(recipe: Recipe, folder: Path, progress: bool = False) -> Recipe:
    """The recipe over smart-watch images drawn into `folder` by the first process, with a tokenizer made from their text."""
    d = recipe.data
    if hosts.is_first():
        make_watch_data(folder, d, recipe.model.llm.vocab, progress)
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("generated data is written")
    data = dataclasses.replace(
        d,
        path=(str(folder / "train.json"),),
        image_folder=str(folder / "images"),
        tokenizer=d.tokenizer or str(folder),
        generated_watches=0,
    )
    return dataclasses.replace(recipe, data=data)


def rows_for(recipe: Recipe, model: VLMConfig, tokenizer: Tokenizer, run: Path) -> tuple[Rows, int]:
    """(rows for the whole run, steps they give): train.epochs passes, or as many as train.steps needs."""
    t, epochs = recipe.train, recipe.train.epochs
    settings = {"max_bad": t.max_bad_samples, "cache": run / "cache"}
    rows = open_rows(recipe.data, model, tokenizer, epochs=1 if t.steps else epochs, **settings)
    if t.steps and total_steps(rows, t.global_batch) < t.steps:
        # epochs differ by a few rows, because each is shuffled before it is packed: one more than the first suggests is enough
        epochs = t.steps * t.global_batch // max(len(rows), 1) + 2
        rows = open_rows(recipe.data, model, tokenizer, epochs=epochs, **settings)
    return rows, total_steps(rows, t.global_batch)


def report_skipped(rows: Rows) -> None:
    """Say before training how much of the data is not used, and why the first of it is not."""
    notes, records = rows.manifest.notes, len(rows.manifest.status)
    if notes:
        hosts.say(f"{len(notes)} of {records} records ({len(notes) / records:.1%}) are not trained on:")
    for _, _, sentence in notes[:5]:
        hosts.say(f"  {sentence}")

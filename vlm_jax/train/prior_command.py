"""The body of `python -m vlm_jax train` for a prior: codes in; checkpoints, metrics and an exported prior out."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np

from vlm_jax.config import ConfigError, to_dict
from vlm_jax.convert.prior import load_prior, save_prior
from vlm_jax.data.code_rows import Captions, CodeRows, Labels, make_codes, open_sets
from vlm_jax.data.manifest import DataError
from vlm_jax.data.measuring import Limits
from vlm_jax.data.pipeline import total_steps
from vlm_jax.parallel import hosts
from vlm_jax.parallel.mesh import make_mesh
from vlm_jax.prior_recipe import PriorRecipe
from vlm_jax.train import loop
from vlm_jax.train.export import EXPORT
from vlm_jax.train.prior_task import PriorTask
from vlm_jax.train.runs import batches_of, budget
from vlm_jax.train.tokenizer_state import AVERAGE, under
from vlm_jax.visual_tokenizers.priors import gpt


def run_prior_recipe(recipe: PriorRecipe, progress: bool = True) -> loop.Result:
    """Train, or go on with, the run in recipe.output; writes its export at the end."""
    run = Path(recipe.output)
    if recipe.data.generated:
        recipe = with_generated_codes(recipe, run / "data")
    task = task_of(recipe)
    mesh = make_mesh(recipe.mesh)
    rows, steps = rows_for(recipe, run)
    batches = batches_of(rows, recipe.train, recipe.data.threads, mesh)
    how = {"available_steps": steps, "mesh": mesh, "saved_config": to_dict(recipe), "progress": progress}
    result = loop.run_task(task, batches, run, **how)
    if recipe.export and result.status != "stopped":
        export_result(recipe, result, run)
    return result


def with_generated_codes(recipe: PriorRecipe, folder: Path) -> PriorRecipe:
    """The recipe over codes that are made up in `folder` by the first process."""
    p = recipe.prior
    caption = (p.caption_slots, p.caption_width) if p.condition == "caption" else None
    if hosts.is_first():
        make_codes(folder, recipe.data, p.codes, p.grid, p.classes, caption)
    hosts.wait_for_all("made-up codes are written")
    captions = str(folder / "captions") if caption else ""
    data = dataclasses.replace(recipe.data, codes=(str(folder / "codes.arrayrecord"),), captions=captions, generated=0)
    return dataclasses.replace(recipe, data=data)


def rows_for(recipe: PriorRecipe, run: Path) -> tuple[CodeRows, int]:
    """(rows for the whole run, steps they give); see runs.budget."""
    t, d, p = recipe.train, recipe.data, recipe.prior
    state, needed = budget(t, run)
    sets, ids = open_sets(d.codes, p.codes, p.grid)
    if p.condition == "caption":
        known = Captions(ids, d, p.caption_slots, p.caption_width)
    else:
        known = Labels(ids, d.labels, p.classes)
    rows = CodeRows(
        sets,
        ids,
        known,
        **needed,
        seed=d.seed,
        limits=Limits(t.max_bad_samples, d.max_bad_share),
    )
    if not hosts.agree(json.dumps(rows.identity())):
        raise DataError("the hosts see different codes: give all of them the same files")
    hosts.say(f"codes of {len(known.usable):,} images, {len(sets[0][0].codes[0])} views of each")
    for sentence in known.skipped[:1]:
        hosts.say(f"{len(known.skipped)} images are left out, the first: {sentence}")
    return rows, total_steps(rows, t.global_batch, state)


def task_of(recipe: PriorRecipe) -> PriorTask:
    """The recipe with the weights read that it starts from."""
    name = recipe.init.checkpoint
    if not name:
        return PriorTask(recipe)
    params = load_prior(name, recipe.prior.grid, recipe.prior.heads).params
    for path, like in gpt.shapes(recipe.prior).items():
        if path not in params or params[path].shape != like.shape:
            there = list(params[path].shape) if path in params else "absent"
            raise ConfigError(
                f"init.checkpoint={name} is of another prior: its {path} is {there}, this recipe's is {list(like.shape)}"
            )
    return PriorTask(recipe, params)


def export_result(recipe: PriorRecipe, result: loop.Result, run: Path) -> None:
    """Write run/export at the end of training."""
    target, state = run / EXPORT, result.state
    if jax.process_count() > 1:
        hosts.say(f"start the same command in one process to export the finished run to {target}")
    elif result.status != "already finished" or not target.exists():
        leaves = {**state.frozen, **state.trainable}
        leaves |= under(AVERAGE, state.moving) if recipe.export_average else {}
        save_prior(target, recipe.prior, {path: np.asarray(x) for path, x in jax.device_get(leaves).items()})
        hosts.say(f"exported to {target}")

"""The body of `python -m vlm_jax train` for a prior: codes in; checkpoints, metrics and an exported prior out."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np

from vlm_jax.config import ConfigError, to_dict
from vlm_jax.convert.prior import load_prior, save_prior
from vlm_jax.convert.visual_tokenizer import load_tokenizer
from vlm_jax.data.code_rows import Captions, CodeRows, Labels, Texts, Unlabelled, make_codes, open_sets
from vlm_jax.data.manifest import DataError
from vlm_jax.data.measuring import Limits
from vlm_jax.data.pipeline import total_steps
from vlm_jax.parallel import hosts
from vlm_jax.parallel.mesh import make_mesh
from vlm_jax.prior_recipe import PriorRecipe
from vlm_jax.train import loop
from vlm_jax.train.prior_task import PriorTask
from vlm_jax.train.runs import EXPORT, batches_of, budget, export_target
from vlm_jax.train.tokenizer_state import AVERAGE, under
from vlm_jax.visual_tokenizers.codebook import TABLE
from vlm_jax.visual_tokenizers.priors import models
from vlm_jax.visual_tokenizers.priors.hierarchy_options import RQTransformerConfig
from vlm_jax.visual_tokenizers.priors.options import GPTConfig


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
    caption = (p.condition_tokens, 0) if p.condition == "text" else None
    caption = (p.caption_slots, p.caption_width) if p.condition == "caption" else caption
    if hosts.is_first():
        make_codes(folder, recipe.data, p.levels_of_codes, p.numbers, caption)
    hosts.wait_for_all("made-up codes are written")
    captions = str(folder / "captions") if caption else ""
    data = dataclasses.replace(recipe.data, codes=(str(folder / "codes.arrayrecord"),), captions=captions, generated=0)
    return dataclasses.replace(recipe, data=data)


def rows_for(recipe: PriorRecipe, run: Path) -> tuple[CodeRows, int]:
    """(rows for the whole run, steps they give); see runs.budget."""
    t, d = recipe.train, recipe.data
    state, needed = budget(t, run)
    sets, ids = open_sets(d.codes, recipe.prior.levels_of_codes)
    known = conditions_of(recipe, ids)
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


def conditions_of(recipe: PriorRecipe, ids: list[str]) -> Captions | Labels | Texts | Unlabelled:
    """What the images of the codes are drawn from."""
    d, p = recipe.data, recipe.prior
    if p.condition == "caption":
        return Captions(ids, d, p.caption_slots, p.caption_width)
    if p.condition == "text":
        return Texts(ids, d, p.condition_tokens, p.numbers)
    return Labels(ids, d.labels, p.numbers) if p.condition == "class" else Unlabelled(ids)


def codebook(recipe: PriorRecipe) -> np.ndarray | None:
    """The tokenizer's table [V, C] (or [depth, V, C]) where the prior reads it, random numbers without a tokenizer."""
    p, name = recipe.prior, recipe.init.tokenizer
    if not (isinstance(p, RQTransformerConfig) and p.reads_codebook):
        return None
    if not name:
        hosts.say("the codebook that the prior reads is random numbers")
        return np.random.default_rng(recipe.data.seed).standard_normal((p.codes, p.code_width)).astype(np.float32)
    found = load_tokenizer(name)
    table = found.codebooks.get("codebook", {}).get(TABLE) if found.config.quantizer.kind == "rq" else None
    there = None if table is None else table.shape
    if there not in ((p.codes, p.code_width), (p.depth, p.codes, p.code_width)):
        raise ConfigError(
            f"init.tokenizer={name} has {f'a codebook {list(there)}' if there else 'no residual codebook'}, but this prior needs "
            f"prior.codes={p.codes} rows of prior.code_width={p.code_width} numbers"
        )
    return table


def task_of(recipe: PriorRecipe) -> PriorTask:
    """The recipe with the files read that it names: weights to start from, and the tokenizer's codebook."""
    name, p, table = recipe.init.checkpoint, recipe.prior, codebook(recipe)
    if not name:
        return PriorTask(recipe, table=table)
    params = load_prior(name, p.grid, p.heads).params if isinstance(p, GPTConfig) else load_prior(name).params
    for path, like in models.shapes(p).items():
        if path not in params or params[path].shape != like.shape:
            there = list(params[path].shape) if path in params else "absent"
            raise ConfigError(
                f"init.checkpoint={name} is of another prior: its {path} is {there}, this recipe's is {list(like.shape)}"
            )
    return PriorTask(recipe, params, table)


def export_result(recipe: PriorRecipe, result: loop.Result, run: Path) -> None:
    """Write run/export at the end of training."""
    state = result.state
    again = f"start the same command in one process to export the finished run to {run / EXPORT}"
    target = export_target(run, result.status, again)
    if target:
        leaves = {**state.frozen, **state.trainable}
        leaves |= under(AVERAGE, state.moving) if recipe.export_average else {}
        save_prior(target, recipe.prior, {path: np.asarray(x) for path, x in jax.device_get(leaves).items()})
        hosts.say(f"exported to {target}")

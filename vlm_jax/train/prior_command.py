"""The body of `python -m vlm_jax train` for a prior: codes in; checkpoints, metrics and an exported prior out."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from vlm_jax.config import ConfigError, to_dict
from vlm_jax.convert.prior import load_prior, save_prior
from vlm_jax.convert.visual_tokenizer import Tokenizer, load_tokenizer
from vlm_jax.data.code_rows import (
    MADE_UP,
    Captions,
    CodeRows,
    Labels,
    Texts,
    Unlabelled,
    make_captions,
    make_codes,
    open_sets,
)
from vlm_jax.data.code_views import OWN_CROPS
from vlm_jax.data.conditioned_images import ConditionedImages, Cut, find_images, make_images
from vlm_jax.data.manifest import DataError
from vlm_jax.data.measuring import Limits
from vlm_jax.data.pipeline import total_steps
from vlm_jax.nn.params import split
from vlm_jax.parallel import hosts
from vlm_jax.parallel.mesh import make_mesh
from vlm_jax.prior_recipe import PriorRecipe
from vlm_jax.train import loop
from vlm_jax.train.prior_codes import ImageCoder, size_of
from vlm_jax.train.prior_task import PriorTask
from vlm_jax.train.runs import EXPORT, batches_of, budget, export_target
from vlm_jax.train.tokenizer_state import AVERAGE, under
from vlm_jax.visual_tokenizers.codebook import TABLE
from vlm_jax.visual_tokenizers.options import AutoencoderConfig, QuantizerConfig, TokenizerConfig
from vlm_jax.visual_tokenizers.priors import models
from vlm_jax.visual_tokenizers.priors.hierarchy_options import RQTransformerConfig
from vlm_jax.visual_tokenizers.priors.models import Config
from vlm_jax.visual_tokenizers.priors.options import GPTConfig
from vlm_jax.visual_tokenizers.tokenizer import VisualTokenizer


def run_prior_recipe(recipe: PriorRecipe, progress: bool = True) -> loop.Result:
    """Train, or go on with, the run in recipe.output; writes its export at the end."""
    run = Path(recipe.output)
    if recipe.data.generated:
        recipe = with_generated_data(recipe, run / "data")
    task = task_of(recipe)
    mesh = make_mesh(recipe.mesh)
    rows, steps = rows_for(recipe, task.coder, run)
    batches = batches_of(rows, recipe.train, recipe.data.threads, mesh)
    how = {"available_steps": steps, "mesh": mesh, "saved_config": to_dict(recipe), "progress": progress}
    result = loop.run_task(task, batches, run, **how)
    if recipe.export and result.status != "stopped":
        export_result(recipe, result, run)
    return result


def with_generated_data(recipe: PriorRecipe, folder: Path) -> PriorRecipe:
    """The recipe over codes, or images, that are made up in `folder` by the first process."""
    p, d = recipe.prior, recipe.data
    caption = (p.condition_tokens, 0) if p.condition == "text" else None
    caption = (p.caption_slots, p.caption_width) if p.condition == "caption" else caption
    if hosts.is_first() and d.path:
        labels = make_images(folder, d.generated, 2 * p.levels_of_codes[-1][1][0], min(p.numbers, MADE_UP), d.seed)
        if caption:
            make_captions(folder / "captions", labels, caption)
    elif hosts.is_first():
        make_codes(folder, d, p.levels_of_codes, p.numbers, caption)
    hosts.wait_for_all("made-up data is written")
    made = {"path": (str(folder / "images"),)} if d.path else {"codes": (str(folder / "codes.arrayrecord"),)}
    data = dataclasses.replace(d, **made, captions=str(folder / "captions") if caption else "", generated=0)
    return dataclasses.replace(recipe, data=data)


def rows_for(recipe: PriorRecipe, coder: ImageCoder | None, run: Path) -> tuple[CodeRows | ConditionedImages, int]:
    """(rows for the whole run, steps they give); see runs.budget."""
    t, d = recipe.train, recipe.data
    state, needed = budget(t, run)
    how = {**needed, "seed": d.seed, "limits": Limits(t.max_bad_samples, d.max_bad_share)}
    rows = code_rows(recipe, how) if coder is None else image_rows(recipe, coder, run, how)
    if not hosts.agree(json.dumps(rows.identity())):
        raise DataError(
            f"the hosts see different {'codes' if coder is None else 'images'}: give all of them the same files"
        )
    for sentence in rows.known.skipped[:1]:
        hosts.say(f"{len(rows.known.skipped)} images are left out, the first: {sentence}")
    return rows, total_steps(rows, t.global_batch, state)


def code_rows(recipe: PriorRecipe, how: Mapping[str, Any]) -> CodeRows:
    """Rows of data.codes; how: what CodeRows is told beside them."""
    sets, ids = open_sets(recipe.data.codes, recipe.prior.levels_of_codes)
    rows = CodeRows(sets, ids, conditions_of(recipe, ids), **how)
    hosts.say(f"codes of {len(rows.known.usable):,} images, {len(sets[0][0].codes[0])} views of each")
    return rows


def image_rows(recipe: PriorRecipe, coder: ImageCoder, run: Path, how: Mapping[str, Any]) -> ConditionedImages:
    """Rows of data.path."""
    d, t, c = recipe.data, recipe.train, coder.tokenizer.config
    size = size_of(c, recipe.prior.levels_of_codes, recipe.init.tokenizer)
    cut = Cut(d.crop or OWN_CROPS[c.names], size, d.flip, d.margin)
    images, skipped = find_images(d, run / "cache")
    rows = ConditionedImages(images, conditions_of(recipe, list(images)), cut, skipped=skipped, **how)
    labels = f"soft labels of temperature {t.soft_temperature:g}" if t.soft_temperature else "hard labels"
    codes = "codes drawn from them" if t.stochastic_codes else "the nearest codes"
    hosts.say(
        f"{len(rows.known.usable):,} images, cut to {size} x {size} pixels by the rule {cut.rule}, mirrored {cut.flip:.0%}, encoded at "
        f"every step: {labels}, {codes}"
    )
    return rows


def conditions_of(recipe: PriorRecipe, ids: list[str]) -> Captions | Labels | Texts | Unlabelled:
    """What the images of the codes are drawn from."""
    d, p = recipe.data, recipe.prior
    if p.condition == "caption":
        return Captions(ids, d, p.caption_slots, p.caption_width)
    if p.condition == "text":
        return Texts(ids, d, p.condition_tokens, p.numbers)
    return Labels(ids, d.labels, p.numbers) if p.condition == "class" else Unlabelled(ids)


def tokenizer_of(recipe: PriorRecipe) -> Tokenizer | None:
    """What init.tokenizer names, where the recipe needs it; for images without one a random one."""
    p, name = recipe.prior, recipe.init.tokenizer
    if name and (recipe.data.path or isinstance(p, RQTransformerConfig) and p.reads_codebook):
        return load_tokenizer(name)
    if not recipe.data.path:
        return None
    hosts.say("the tokenizer that encodes images is random numbers")
    config, key = small_tokenizer(p), jax.random.key(recipe.train.seed)
    model = VisualTokenizer(config, nnx.Rngs(key))
    return Tokenizer(config, *jax.device_get((split(model)[1], model.initial(key))))


def small_tokenizer(p: Config) -> TokenizerConfig:
    """One that makes codes for a prior out of 2 x 2 pixels each."""
    if isinstance(p, GPTConfig):
        quantizer = QuantizerConfig(codes=(p.codes,), width=8)
    elif isinstance(p, RQTransformerConfig):
        quantizer = QuantizerConfig("rq", (p.codes,), p.code_width, depth=p.depth, shared=True)
    else:
        quantizer = QuantizerConfig("two_level" if p.levels == 2 else "levels", p.codes, 8)
    size = 2 * p.levels_of_codes[-1][1][0]
    return TokenizerConfig(AutoencoderConfig(32, (1, 1), 1, (), size, 8, middle_attention=False), quantizer, "taming")


def codebook(recipe: PriorRecipe, found: Tokenizer | None) -> np.ndarray | None:
    """The tokenizer's table [V, C] (or [depth, V, C]) where the prior reads it, random numbers without a tokenizer."""
    p, name = recipe.prior, recipe.init.tokenizer
    if not (isinstance(p, RQTransformerConfig) and p.reads_codebook):
        return None
    if found is None:
        hosts.say("the codebook that the prior reads is random numbers")
        return np.random.default_rng(recipe.data.seed).standard_normal((p.codes, p.code_width)).astype(np.float32)
    table = found.codebooks.get("codebook", {}).get(TABLE) if found.config.quantizer.kind == "rq" else None
    there = None if table is None else table.shape
    if there not in ((p.codes, p.code_width), (p.depth, p.codes, p.code_width)):
        raise ConfigError(
            f"init.tokenizer={name} has {f'a codebook {list(there)}' if there else 'no residual codebook'}, but this prior needs "
            f"prior.codes={p.codes} rows of prior.code_width={p.code_width} numbers"
        )
    return table


def task_of(recipe: PriorRecipe) -> PriorTask:
    """The recipe with the files read that it names: weights to start from, and the tokenizer, its codebook or all of it."""
    name, p, found = recipe.init.checkpoint, recipe.prior, tokenizer_of(recipe)
    task = PriorTask(
        recipe,
        table=codebook(recipe, found),
        coder=ImageCoder(found, recipe.train) if recipe.data.path else None,
    )
    if not name:
        return task
    params = load_prior(name, p.grid, p.heads).params if isinstance(p, GPTConfig) else load_prior(name).params
    for path, like in models.shapes(p).items():
        if path not in params or params[path].shape != like.shape:
            there = list(params[path].shape) if path in params else "absent"
            raise ConfigError(
                f"init.checkpoint={name} is of another prior: its {path} is {there}, this recipe's is {list(like.shape)}"
            )
    return dataclasses.replace(task, start=params)


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

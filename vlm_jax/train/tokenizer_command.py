"""The body of `python -m vlm_jax train` for a visual tokenizer: images in; checkpoints, metrics and an exported tokenizer out."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from vlm_jax.config import ConfigError, to_dict
from vlm_jax.convert.read import open_checkpoint
from vlm_jax.convert.shards import read_file
from vlm_jax.convert.tensors import full
from vlm_jax.convert.torch_pickle import read_tensors
from vlm_jax.convert.visual_tokenizer import load_tokenizer, save_tokenizer
from vlm_jax.data.crops import Crop
from vlm_jax.data.image_lists import ImageList, open_images
from vlm_jax.data.image_rows import ImageRows
from vlm_jax.data.manifest import DataError
from vlm_jax.data.measuring import Limits
from vlm_jax.data.pipeline import total_steps
from vlm_jax.data.smartwatch_files import WatchSet, generate
from vlm_jax.parallel import hosts
from vlm_jax.parallel.mesh import make_mesh
from vlm_jax.tokenizer_recipe import TokenizerRecipe
from vlm_jax.train import loop
from vlm_jax.train.runs import EXPORT, batches_of, budget, export_target
from vlm_jax.train.state import TrainState
from vlm_jax.train.tokenizer_state import AVERAGE, BOOKS, TOKENIZER, below, books_of, leaves_of_books, under
from vlm_jax.train.tokenizer_task import TokenizerTask
from vlm_jax.visual_tokenizers.perceptual import SLICES, read_lpips

EMBEDDING = "llm/embed/embedding"
VGG_WIDTHS = (64, 128, 256, 512, 512)
NARROW = 16  # a random VGG-16 has so many times fewer channels
WORDS = 512  # rows of a random embedding table, as long as those of a language model


def run_tokenizer_recipe(recipe: TokenizerRecipe, progress: bool = True) -> loop.Result:
    """Train, or go on with, the run in recipe.output; writes its export at the end."""
    run = Path(recipe.output)
    if recipe.data.generated_watches:
        recipe = with_generated_images(recipe, run / "data", progress)
    task = task_of(recipe)
    mesh = make_mesh(recipe.mesh)
    rows, steps = rows_for(recipe, run)
    batches = batches_of(rows, recipe.train, recipe.data.threads, mesh)
    how = {"available_steps": steps, "mesh": mesh, "saved_config": to_dict(recipe), "progress": progress}
    result = loop.run_task(task, batches, run, **how)
    if recipe.export and result.status != "stopped":
        export_result(recipe, result, run)
    return result


def with_generated_images(recipe: TokenizerRecipe, folder: Path, progress: bool = False) -> TokenizerRecipe:
    """The recipe over smart-watch images drawn into `folder` by the first process."""
    d = recipe.data
    if hosts.is_first():
        generate(folder, WatchSet(d.generated_watches, d.seed), progress=progress)
    hosts.wait_for_all("generated images are written")
    return dataclasses.replace(recipe, data=dataclasses.replace(d, path=(str(folder / "images"),), generated_watches=0))


def rows_for(recipe: TokenizerRecipe, run: Path) -> tuple[ImageRows, int]:
    """(rows for the whole run, steps they give); see runs.budget."""
    t, d = recipe.train, recipe.data
    state, needed = budget(t, run)
    images: ImageList = open_images(d, d.cache or run / "cache")
    rows = ImageRows(
        images,
        Crop(d.size, d.crop, d.flip),
        **needed,
        seed=d.seed,
        limits=Limits(t.max_bad_samples, d.max_bad_share),
    )
    if not hosts.agree(json.dumps(rows.identity())):
        raise DataError("the hosts see different images: give all of them the same files, in folders of the same names")
    hosts.say(f"{len(images):,} images, cut to {d.size} x {d.size} pixels by the rule {d.crop}, mirrored {d.flip:.0%}")
    for sentence in images.skipped[:1]:
        hosts.say(f"{len(images.skipped)} records could not be read, the first: {sentence}")
    return rows, total_steps(rows, t.global_batch, state)


def task_of(recipe: TokenizerRecipe) -> TokenizerTask:
    """The recipe with the files it names read: perceptual network, token embeddings, weights to start from."""
    seen = perceptual_arrays(recipe)
    table = token_embeddings(recipe) if recipe.tokenizer.quantizer.language else None
    if not recipe.init.checkpoint:
        return TokenizerTask(recipe, seen, table)
    _, params, books = load_tokenizer(recipe.init.checkpoint)
    start, task = below(TOKENIZER, params) | leaves_of_books(books), TokenizerTask(recipe, seen, table)
    wanted = {**(goal := task.abstract()).trainable, **goal.moving, **goal.frozen}
    for path, like in wanted.items():
        if path.startswith((TOKENIZER, BOOKS)) and (path not in start or start[path].shape != like.shape):
            there = list(start[path].shape) if path in start else "absent"
            raise ConfigError(
                f"init.checkpoint={recipe.init.checkpoint} is of another tokenizer: its {path} is {there}, this recipe's is "
                f"{list(like.shape)}; use the recipe that it was trained with"
            )
    return dataclasses.replace(task, start=start)


def perceptual_arrays(recipe: TokenizerRecipe) -> dict[str, np.ndarray]:
    """VGG-16 and the linear heads of LPIPS from init.vgg and init.lpips; {} where adversary.perceptual_weight is 0."""
    init = recipe.init
    if not recipe.adversary.perceptual_weight:
        return {}
    if init.vgg and init.lpips:
        return read_lpips({**_tensors(init.vgg), **_tensors(init.lpips)})
    if init.random and not (init.vgg or init.lpips):
        hosts.say("the perceptual loss is that of a narrow VGG-16 with random weights: it measures nothing of note")
        return random_lpips(recipe.train.seed)
    missing = "init.vgg" if not init.vgg else "init.lpips"
    raise ConfigError(
        f"{missing} is empty: adversary.perceptual_weight={recipe.adversary.perceptual_weight:g} needs init.vgg (torchvision's "
        "vgg16-397923af.pth or the like) and init.lpips (vgg.pth of LPIPS v0.1), or set adversary.perceptual_weight=0.0"
    )


def _tensors(path: str) -> Mapping[str, np.ndarray]:
    """All tensors of a .safetensors or torch file."""
    found = (read_file if path.endswith(".safetensors") else read_tensors)(Path(path))
    return {name: np.asarray(tensor.read(full(tensor.shape))) for name, tensor in found.items()}


def random_lpips(seed: int) -> dict[str, np.ndarray]:
    """LPIPS with a narrow VGG-16 of random weights, for runs that only show that everything works."""
    rng, found, din = np.random.default_rng(seed), {}, 3
    for k, (numbers, width) in enumerate(zip(SLICES, VGG_WIDTHS)):
        width //= NARROW
        for n in numbers:
            kernel = rng.standard_normal((3, 3, din, width)) * np.sqrt(2 / (9 * din))
            found[f"conv_{n}/kernel"], found[f"conv_{n}/bias"] = kernel.astype(np.float32), np.zeros(width, np.float32)
            din = width
        found[f"lin_{k}"] = np.full(width, 1 / width, np.float32)
    return found


def token_embeddings(recipe: TokenizerRecipe) -> np.ndarray:
    """[V, D] float32: the embedding table of init.llm, or random rows of the lengths of a language model's."""
    init, q = recipe.init, recipe.tokenizer.quantizer
    if init.llm:
        return np.asarray(open_checkpoint(init.llm, partial=True).read(EMBEDDING), np.float32)
    if init.random:
        hosts.say("the token embeddings that the codebook approaches are random numbers")
        rng = np.random.default_rng(recipe.train.seed)
        rows = rng.standard_normal((max(WORDS, *q.codes), q.width)).astype(np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True) * rng.uniform(1.0, 1.5, (len(rows), 1))
    raise ConfigError(
        "init.llm is empty: tokenizer.quantizer.language draws the codebook to the token embeddings of a language model, so name the "
        "folder of a Llama-family model"
    )


def exported(
    recipe: TokenizerRecipe, state: TrainState
) -> tuple[dict[str, np.ndarray], dict[str, dict[str, np.ndarray]]]:
    """(parameters, codebooks) that a run has made: averaged ones where there are, unless export_average is off."""
    leaves = {**state.frozen, **state.moving, **state.trainable}
    if recipe.export_average:
        leaves |= under(AVERAGE, leaves)
    leaves = {path: np.asarray(x) for path, x in jax.device_get(leaves).items()}
    return under(TOKENIZER, leaves), books_of(leaves)


def export_result(recipe: TokenizerRecipe, result: loop.Result, run: Path) -> None:
    """Write run/export at the end of training."""
    again = f"start the same command in one process to export the finished run to {run / EXPORT}"
    target = export_target(run, result.status, again)
    if target:
        params, books = exported(recipe, result.state)
        averaged = bool(recipe.train.average and recipe.export_average)
        extra = {"step": result.step, "averaged": averaged, "size": recipe.data.size}
        save_tokenizer(target, recipe.tokenizer, params, books, extra=extra)
        hosts.say(f"exported to {target}")

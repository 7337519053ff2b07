"""A run as a Hugging Face directory: at its end, or from its newest checkpoint by `python -m vlm_jax convert --from RUN --to DIR`."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from vlm_jax import recipe as recipes
from vlm_jax.config import ConfigError, VLMConfig
from vlm_jax.convert import command
from vlm_jax.convert.write import export, export_projector
from vlm_jax.data.chat_template import chat_template
from vlm_jax.parallel import hosts
from vlm_jax.recipe import Recipe
from vlm_jax.train.checkpoint import Checkpointer
from vlm_jax.train.loop import Result
from vlm_jax.train.weights import open_tokenizer, tokenizer_folder

EXPORT = "export"  # folder of a run that holds the HF directory


def export_result(recipe: Recipe, result: Result, run: Path) -> None:
    """Write run/export at the end of training; several processes leave it to `convert`, which reads the checkpoint on one host."""
    target = run / EXPORT
    if jax.process_count() > 1:
        hosts.say(f"export it with: python -m vlm_jax convert --from {run} --to DIR")
    elif result.status != "already finished" or not target.exists():
        write(recipe, recipe.model, result.state.params, target)
        hosts.say(f"exported to {target}")


def write(recipe: Recipe, model: VLMConfig, params: Mapping[str, Any], target: Path, **options: Any) -> None:
    """The model with its tokenizer, image processor and chat template. options: further arguments of convert.write.export."""
    dialogue = chat_template(recipe.data.template, recipe.data.im_start_end)
    with tempfile.TemporaryDirectory() as made:
        folder = tokenizer_folder(recipe)
        if recipe.data.im_start_end:  # the run's tokenizer has two tokens more than the one it started from
            open_tokenizer(recipe).save(made)
            folder = Path(made)
        export(target, model, params, tokenizer=folder, chat_template=dialogue, **options)


def convert(**flags: str) -> int:
    """The command `convert`: a training run is read from its newest checkpoint, anything else by convert.command."""
    run = Path(flags["from"] or "")
    if not flags["from"] or not (run / "checkpoints").is_dir():
        return command.convert(**flags)
    ignored = [name for name in ("vision", "llm", "projector", "tokenizer", "tower") if flags[name]]
    if ignored:
        raise ConfigError(
            f"--{ignored[0]} cannot replace a part of the run {run}: convert the run first, then the directory it gives"
        )
    recipe = recipes.load(run / "config.json")
    checkpoints = Checkpointer(run / "checkpoints")
    params, meta = checkpoints.params()
    dtype, target = command.parse_dtype(flags["dtype"]), Path(flags["to"])
    if target.suffix == ".bin":
        export_projector(target, recipe.model, params, dtype)
    else:
        write(
            recipe,
            recipe.model,
            params,
            target,
            names=flags["names"],
            dtype=dtype,
            max_shard=command.parse_size(flags["max_shard"]),
        )
    checkpoints.close()
    print(f"{flags['to']}: step {meta['step']} of {run}")
    return 0

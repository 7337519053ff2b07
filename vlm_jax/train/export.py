"""A run as a Hugging Face directory: at its end, or from its newest checkpoint by `python -m vlm_jax convert --from RUN --to DIR`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Mapping

import jax

from vlm_jax import recipe as recipes
from vlm_jax.config import VLMConfig
from vlm_jax.convert import command
from vlm_jax.convert.write import export
from vlm_jax.data.chat_template import chat_template
from vlm_jax.parallel import hosts
from vlm_jax.recipe import Recipe
from vlm_jax.train.checkpoint import Checkpointer
from vlm_jax.train.loop import Result
from vlm_jax.train.weights import tokenizer_folder

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
    export(target, model, params, tokenizer=tokenizer_folder(recipe), chat_template=chat_template(recipe.data.template), **options)


def convert(**flags: str) -> int:
    """The command `convert`: a training run is read from its newest checkpoint, anything else by convert.command."""
    run = Path(flags["from"] or "")
    if not flags["from"] or not (run / "checkpoints").is_dir():
        return command.convert(**flags)
    recipe = recipes.load(run / "config.json")
    checkpoints = Checkpointer(run / "checkpoints")
    params, meta = checkpoints.params()
    dtype = command.LONG_NAMES.get(flags["dtype"], flags["dtype"]) or None
    options = {"names": flags["names"], "dtype": dtype, "max_shard": command.parse_size(flags["max_shard"])}
    write(recipe, recipe.model, params, Path(flags["to"]), **options)
    checkpoints.close()
    print(f"{flags['to']}: step {meta['step']} of {run}")
    return 0

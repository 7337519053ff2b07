"""How every published recipe lays its state over a mesh, as text: tests/shardings/NAME.txt, compared by tests/test_shardings.py.

    python -m tests.sharding_dumps          writes them again; look at the difference before it is committed

A line per array: part of the state, path, dtype and shape, and for every dimension the mesh axis that it is divided over (- whole). Moments
are laid out like their parameters, which the test checks, and are not listed. Nothing is compiled or allocated.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import Any

import jax

import tests.conftest  # noqa: F401  eight fake devices
from vlm_jax.parallel import rules
from vlm_jax.parallel.mesh import make_mesh
from vlm_jax.parallel.mesh_config import MeshConfig
from vlm_jax.planning.tokenizer_programs import abstract_task
from vlm_jax.prior_recipe import PriorRecipe
from vlm_jax.recipe import AnyRecipe, from_config
from vlm_jax.tokenizer_recipe import TokenizerRecipe
from vlm_jax.train.prior_task import PriorTask
from vlm_jax.train.state import TrainState
from vlm_jax.train.task import VLMTask

ROOT = Path(__file__).resolve().parent
FOLDER = ROOT / "shardings"
MESH = MeshConfig(data=1, fsdp=4, tensor=2)
RECIPES = {
    "llava15": ("7b,stage1", "7b,stage2", "13b,stage2", "7b,stage2,lora", "7b,stage2,qlora"),
    "clip_flant5": ("xl,stage1", "xl,stage2", "xxl,stage2"),
    "visual_tokenizer": ("vq16", "vq8", "rq", "hq", "hq3", "unicode_hq", "unicode_rq"),
    "prior": ("gpt_b,c2i", "gpt_xl,t2i"),
}
NAMES = tuple(f"{file}:{words}" for file, kinds in RECIPES.items() for words in kinds)


def recipe_of(name: str) -> AnyRecipe:
    """The recipe "file:words" of configs/."""
    file, _, words = name.partition(":")
    spec = importlib.util.spec_from_file_location(f"configs_{file}", ROOT.parent / "configs" / f"{file}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return from_config(module.get_config(words))


@functools.cache
def state_of(name: str) -> TrainState:
    """Shapes and shardings of its train state under MESH."""
    recipe = recipe_of(name)
    with rules.use(make_mesh(MESH, jax.devices()[:8])):
        if isinstance(recipe, TokenizerRecipe):
            return abstract_task(recipe).abstract()
        return (
            PriorTask(recipe) if isinstance(recipe, PriorRecipe) else VLMTask(recipe.train, recipe.model)
        ).abstract()


def line(part: str, path: str, like: Any) -> str:
    """One array."""
    parts = tuple(like.sharding.spec) + (None,) * (len(like.shape) - len(like.sharding.spec))
    axes = ", ".join("-" if p is None else p if isinstance(p, str) else "+".join(p) for p in parts)
    return f"{part} {path}  {like.dtype}{list(like.shape)}  {axes or 'whole'}"


def dump(name: str) -> str:
    """The text of a recipe."""
    state = state_of(name)
    lines = [f"{name} under fsdp {MESH.fsdp}, tensor {MESH.tensor}"]
    for part in ("trainable", "frozen", "moving"):
        lines += [line(part, path, like) for path, like in sorted(getattr(state, part).items())]
    return "\n".join(lines) + "\n"


def file_of(name: str) -> Path:
    """Where its text lies."""
    return FOLDER / (name.replace(":", "_").replace(",", "_") + ".txt")


def main() -> None:
    """Write all of them."""
    FOLDER.mkdir(exist_ok=True)
    for name in NAMES:
        file_of(name).write_text(dump(name))


if __name__ == "__main__":
    main()

"""The quickstart's model learns another style of watch in three ways, and what it remembers of the old one.

    python launch/bench/new_style.py [--base runs/quickstart/export] [--out runs/watch_style] [--steps 300] [--held_out 200]

For full training, LoRA and QLoRA (configs/watch_style.py): accuracy on held-out watches of both styles before and after, bytes of
what is trained, of the optimizer and of the frozen base. With torch, transformers and peft installed, peft loads the LoRA adapter and
its logits are compared with ours. Typed again it goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax import recipe as recipes
from vlm_jax.data.image_source import ImageSource
from vlm_jax.data.smartwatch_files import WatchSet, generate
from vlm_jax.evaluate.query import Model
from vlm_jax.evaluate.smartwatch import smartwatch
from vlm_jax.generate.load import Loaded, load_model
from vlm_jax.generate.rows import batch_of, place
from vlm_jax.models import vlm
from vlm_jax.recipe import Recipe
from vlm_jax.train import state as states
from vlm_jax.train.command import run_recipe
from vlm_jax.train.export import EXPORT

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "configs"))
import watch_style  # noqa: E402

HELD_OUT_SEED = 1  # the quickstart's own held-out watches, and the same in the new style
BATCH = 64


def recipe_of(tuning: str, base: Path, out: Path, steps: int, watches: int) -> Recipe:
    """The config's recipe for this base and folder."""
    recipe = recipes.from_config(watch_style.get_config(tuning))
    return dataclasses.replace(
        recipe,
        init=dataclasses.replace(recipe.init, checkpoint=str(base)),
        data=dataclasses.replace(recipe.data, generated_watches=watches),
        train=dataclasses.replace(recipe.train, steps=steps),
        output=str(out / tuning),
    )


def answered(loaded: Loaded, data: Path) -> dict[str, dict[str, float]]:
    """Accuracy and score by attribute (evaluate.smartwatch); the model's own answers are the dialogue so far."""
    model = Model(loaded, loaded.generator(dtype="float32", batch_size=BATCH), progress=False)
    result = smartwatch(model, data, history="own")
    return {kind: dict(result[kind]) for kind in ("accuracy", "score")}


def bytes_of(recipe: Recipe, run: Path) -> dict[str, int]:
    """Bytes of trainable parameters, optimizer state and frozen base of a finished run."""
    saved = recipes.load(run / "config.json")
    state = states.abstract(saved.model, recipe.train)
    parts = {"trainable": state.trainable, "optimizer": state.opt_state, "base": state.frozen}
    return {name: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)) for name, tree in parts.items()}


def peft_difference(base: Path, adapter: Path, image: Path) -> float | None:
    """Largest difference between peft's logits and ours of a question about `image`; None without torch, transformers and peft."""
    if not all(map(importlib.util.find_spec, ("torch", "transformers", "peft"))):
        return None
    import torch
    from peft import PeftModel
    from transformers import LlavaForConditionalGeneration

    ours = load_model(base, dtype="float32", adapters={"a": str(adapter)})
    picture = ours.picture(ImageSource(str(image)))
    placed = place(ours.prompt("What is the time?", [picture]), ours.config)
    rows = {
        key: jnp.asarray(x) for key, x in batch_of([placed], ours.config, rows=1, slots=len(placed), views=1).items()
    }
    model = vlm.build(ours.config, ours.params)
    wanted = np.asarray(model.logits(vlm.forward(model, rows)))[0]

    theirs = LlavaForConditionalGeneration.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    image_token = (
        theirs.config.image_token_index if hasattr(theirs.config, "image_token_index") else theirs.config.image_token_id
    )
    theirs = PeftModel.from_pretrained(theirs, adapter).eval()
    ids = np.where(np.asarray(rows["image_slots"]) >= 0, image_token, np.asarray(rows["tokens"]))
    vision = ours.config.vision
    pixels = (np.asarray(picture.views, np.float32) / 255 - vision.mean) / vision.std
    with torch.no_grad():
        found = theirs(
            input_ids=torch.tensor(ids, dtype=torch.long),
            pixel_values=torch.tensor(pixels.transpose(0, 3, 1, 2), dtype=torch.float32),
        ).logits.numpy()[0]
    return float(np.abs(found - wanted).max())


def main() -> None:
    """Draw, train, ask, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, default=Path("runs/quickstart/export"))
    parser.add_argument("--out", type=Path, default=Path("runs/watch_style"))
    for name, default in (("steps", 300), ("watches", 6000), ("held_out", 200)):
        parser.add_argument(f"--{name}", type=int, default=default)
    a = parser.parse_args()
    new_look = {"material": watch_style.MATERIAL, "hands": watch_style.HANDS}
    sets = {
        "old": generate(a.out / "old", WatchSet(a.held_out, HELD_OUT_SEED), progress=False).parent,
        "new": generate(a.out / "new", WatchSet(a.held_out, HELD_OUT_SEED, **new_look), progress=False).parent,
    }
    results: dict[str, Any] = {
        "base": {k: answered(load_model(a.base, dtype="float32"), path) for k, path in sets.items()}
    }
    results["base"] |= {"trainable": 0, "optimizer": 0, "base": 0}
    for tuning in ("full", "lora", "qlora"):
        recipe, export = recipe_of(tuning, a.base, a.out, a.steps, a.watches), a.out / tuning / EXPORT
        run_recipe(recipe)
        if tuning == "full":
            loaded = load_model(export, dtype="float32")
        else:
            quant = recipe.model.quant or ""
            loaded = load_model(a.base, dtype="float32", quant=quant, adapters={tuning: str(export)})
        found = {k: answered(loaded, path) for k, path in sets.items()}
        results[tuning] = found | bytes_of(recipe, a.out / tuning)
    image = sets["new"] / "images" / "0.png"
    results["peft_difference"] = peft_difference(a.base, a.out / "lora" / EXPORT, image)
    (a.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    titles = [
        f"{what}, {style}"
        for style in ("new", "old")
        for what in ("weather", "battery score", "time score", "time exact")
    ]
    titles += ["trainable MB", "optimizer MB", "base MB"]
    lines = [f"| mode | {' | '.join(titles)} |", "|---" * (len(titles) + 1) + "|"]
    for mode in ("base", "full", "lora", "qlora"):
        r, cells = results[mode], []
        for style in ("new", "old"):
            right, score = r[style]["accuracy"], r[style]["score"]
            cells += [f"{x:.3f}" for x in (right["weather"], score["battery"], score["time"], right["time_exact"])]
        cells += [f"{r[name] / 1e6:.2f}" for name in ("trainable", "optimizer", "base")]
        lines.append(f"| {mode} | {' | '.join(cells)} |")
    difference = results["peft_difference"]
    peft = "peft is not installed" if difference is None else f"largest difference from peft's logits: {difference:.2g}"
    return "\n".join([*lines, "", peft])


if __name__ == "__main__":
    main()

"""`python -m vlm_jax quickstart`: a vision-language model from nothing, start to end.

    draw watches -> train -> ask about held-out watches -> summary.json, loss.png, report.html beside the run's checkpoints and export
Typed again it goes on where it stopped; a finished part is not done twice. A model that learned whether captions are true
(data.generated_task=claims) is not asked but used as VQAScore, which ranks captions of the held-out watches.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import time
from pathlib import Path
from typing import Any

import jax

from vlm_jax import recipe as recipes
from vlm_jax.config import UserError
from vlm_jax.data.smartwatch_claims import rankings
from vlm_jax.data.smartwatch_files import WatchSet, draw_all, generate
from vlm_jax.evaluate import report, smartwatch, watch_claims
from vlm_jax.evaluate.query import Model
from vlm_jax.evaluate.vqascore import VQAScore
from vlm_jax.generate.load import load_model
from vlm_jax.models import vlm
from vlm_jax.recipe import Recipe
from vlm_jax.train import metrics
from vlm_jax.train.command import run_recipe
from vlm_jax.train.runs import EXPORT

HELD_OUT = 200  # watches that training never sees
BATCH = 64  # questions answered at once
STARTED = "VLM_JAX_STARTED"  # set by launch/quickstart.sh before it installs anything: seconds since 1970


def quickstart(out: str = "", config: Any = None) -> int:
    """Run the recipe (default: configs/quickstart.py) in folder `out` and print scores and where the report is."""
    started = float(os.environ.get(STARTED) or time.time())
    recipe = recipes.of_vlm(config)
    if not recipe.data.generated_watches:
        raise UserError("quickstart draws its own data: set config.data.generated_watches")
    folder = Path(out or recipe.output)
    recipe = dataclasses.replace(recipe, output=str(folder))
    held_out = min(HELD_OUT, recipe.data.generated_watches)
    unseen = WatchSet(held_out, recipe.data.seed + 1)
    test = generate(folder / "held_out", unseen, progress=False).parent
    result = run_recipe(recipe)
    if result.status == "stopped":
        return 0
    page = folder / "report.html"
    if result.status == "already finished" and page.exists():
        print(f"report: {page.resolve()}")  # its seconds are those of the run that trained
        return 0
    before, lines = stage_before(recipe), metrics.read_metrics(folder)
    if recipe.data.generated_task == "claims":
        answered = rank(folder, unseen, test / "images")
        table = watch_claims.table(answered)
    else:
        answered = ask(folder, test)
        table = smartwatch.table(answered)
    summary = summarise(recipe, folder, [before, lines], answered, started)
    report.draw_curves(lines, folder / "loss.png", before)
    report.write_summary(folder / "summary.json", summary)
    report.write_page(page, summary, answered["answers"], test / "images", folder / "loss.png")
    print(
        f"\n{table}\n\n{summary['seconds']:.0f} s in all, {summary['training_seconds']:.0f} s of them training, "
        f"of which {summary['data_stall']:.1%} waiting for data"
    )
    print(f"report: {page.resolve()}")
    return 0


def ask(folder: Path, test: Path) -> dict[str, Any]:
    """Every question about the held-out watches, answered by the exported model; the model's own answers are the dialogue so far."""
    loaded = load_model(folder / EXPORT, dtype="float32")
    model = Model(loaded, loaded.generator(dtype="float32", batch_size=BATCH))
    reference = json.loads((folder / "data" / "train.json").read_text(encoding="utf-8"))
    return smartwatch.smartwatch(model, test, history="own", reference=reference)


def rank(folder: Path, unseen: WatchSet, images: Path) -> dict[str, Any]:
    """A true and several wrong captions of every held-out watch, scored by the exported model."""
    score = VQAScore(folder / EXPORT, batch=BATCH, dtype="float32", progress=True)
    return watch_claims.rank(score, rankings(draw_all(unseen)[0], unseen.seed), images)


def stage_before(recipe: Recipe) -> list[dict[str, Any]]:
    """Metrics of the run whose export this one went on from; none if it began from other weights."""
    start = Path(recipe.init.checkpoint)
    return metrics.read_metrics(start.parent) if recipe.init.checkpoint and start.name == EXPORT else []


def summarise(
    recipe: Recipe, folder: Path, stages: list[list[dict[str, Any]]], answered: dict[str, Any], started: float
) -> dict[str, Any]:
    """What summary.json holds; see the README for its keys. stages: metrics of the run before this one, if any, and of this one."""
    saved = recipes.load(folder / "config.json")
    spent = [timed for lines in stages for timed in _timed(lines)]
    training = sum(seconds for seconds, _ in spent)
    if STARTED not in os.environ:  # a stage that was typed before this one is part of what it took
        started -= sum(seconds for lines in stages[:-1] for seconds, _ in _timed(lines))
    slots = sum(line["slots"] for lines in stages for line in lines)
    return {
        "seconds": time.time() - started,
        "training_seconds": training,
        "steps": sum(lines[-1]["step"] for lines in stages if lines),
        "parameters": vlm.count(saved.model),
        "tokens_per_second": slots / training if training else math.nan,
        "data_stall": sum(seconds * stall for seconds, stall in spent) / training if training else math.nan,
        "loss": stages[-1][-1]["loss"],
        "held_out_watches": answered["count"].get("weather", 0),
        **{key: answered[key] for key in ("accuracy", "score", "chance", "count")},
        "machine": {
            "devices": [d.device_kind for d in jax.devices()],
            "cpus": os.cpu_count(),
            "processor": platform.machine(),
        },
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "recipe": {"train": dataclasses.asdict(recipe.train), "watches": recipe.data.generated_watches},
    }


def _timed(lines: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """(seconds, share of them waiting for data) of every logging window of a run."""
    windows = [line for line in lines if "tokens_per_second" in line]
    before = [0, *(w["step"] for w in windows)]
    return [(w["seconds_per_step"] * (w["step"] - first), w["data_stall"]) for w, first in zip(windows, before)]

"""Training data made on the spot, for smoke runs: smart-watch images, their records, and a tokenizer for exactly their text."""

from __future__ import annotations

import json
import random
from pathlib import Path

from vlm_jax.config import one_of
from vlm_jax.data.new_tokenizer import byte_level
from vlm_jax.data.smartwatch import render, sample_watch
from vlm_jax.data.smartwatch_text import published_records, rounds_records
from vlm_jax.data.templates import template

TASKS = ("questions", "vqa", "caption")


def make_watch_data(folder: Path, count: int, task: str, template_name: str, vocab: int, seed: int) -> None:
    """Write images/, train.json, tokenizer.json and tokenizer_config.json to `folder`, unless train.json is there.

    task: "questions" asks every attribute once, "vqa" and "caption" are those of the published data set. vocab: tokens at most.
    """
    one_of("data.generated_task", task, TASKS)
    if (folder / "train.json").exists():
        return
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng, records = random.Random(seed), []
    for i in range(count):
        watch, name = sample_watch(rng), f"{i}.png"
        render(watch, seed=i).save(folder / "images" / name)
        made = rounds_records(rng, watch, name) if task == "questions" else published_records(rng, watch, name)
        records += [r for r in made if task == "questions" or r["task"] == task]
    texts = [turn["value"] for r in records for turn in r["conversations"]]
    t = template(template_name)
    byte_level([*texts, t.system, " ".join(t.roles), "\n"], vocab, folder)
    partial = folder / "train.json.partial"
    partial.write_text(json.dumps(records, indent=1))
    partial.rename(folder / "train.json")

"""Training data made on the spot, for smoke runs: smart-watch images, their records, and a tokenizer for exactly their text."""

from __future__ import annotations

import json
from pathlib import Path

from vlm_jax.config import one_of
from vlm_jax.data.new_tokenizer import byte_level
from vlm_jax.data.smartwatch_files import WatchSet, generate
from vlm_jax.data.templates import template

TASKS = ("rounds", "vqa", "caption")


def make_watch_data(folder: Path, count: int, task: str, template_name: str, vocab: int, seed: int) -> Path:
    """Draw `count` watches into `folder` and write train.json and a tokenizer of at most `vocab` tokens; returns train.json.

    task: "rounds" asks every attribute once, "vqa" and "caption" are those of the published data set.
    """
    one_of("data.generated_task", task, TASKS)
    drawn = generate(folder, WatchSet(count, seed, "rounds" if task == "rounds" else "published"), progress=False)
    records = [r for r in json.loads(drawn.read_text(encoding="utf-8")) if task == "rounds" or r["task"] == task]
    texts = [turn["value"] for r in records for turn in r["conversations"]]
    t = template(template_name)
    byte_level([*texts, t.system, " ".join(t.roles), "\n"], vocab, folder)
    (folder / "train.json").write_text(json.dumps(records, indent=1), encoding="utf-8")
    return folder / "train.json"

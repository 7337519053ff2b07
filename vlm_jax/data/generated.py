"""Training data made on the spot, for smoke runs: smart-watch images, their records, and a tokenizer for exactly their text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from vlm_jax.config import one_of
from vlm_jax.data.new_tokenizer import LLAMA, T5, byte_level, word_level
from vlm_jax.data.options import DataConfig
from vlm_jax.data.smartwatch_files import WatchSet, generate
from vlm_jax.data.templates import Template, messages_of, render, template

TASKS = {  # data.generated_task -> style of the set, task of its records
    "rounds": ("rounds", "vqa"),
    "vqa": ("published", "vqa"),
    "caption": ("published", "caption"),
    "claims": ("claims", "vqa"),
    "claim_captions": ("claims", "caption"),
}
TOKENIZERS = ("byte", "word")
SPARE = 8  # rows of the vocabulary left for tokens that a recipe adds, such as <im_start>


def make_watch_data(folder: Path, data: DataConfig, vocab: int, progress: bool = False) -> Path:
    """Draw data.generated_watches into `folder`; write train.json and a tokenizer of at most `vocab` tokens; returns train.json.

    data.generated_task: "rounds" asks every attribute once, "vqa" and "caption" are those of the published data set, "claims" asks
    whether captions are true, "claim_captions" has true ones to begin with; the last two have one tokenizer.
    """
    one_of("data.generated_task", data.generated_task, tuple(TASKS))
    one_of("data.generated_tokenizer", data.generated_tokenizer, TOKENIZERS)
    style, task = TASKS[data.generated_task]
    look = {"material": data.generated_material, "hands": data.generated_hands}
    settings = WatchSet(data.generated_watches, data.seed, style, **look)
    drawn = json.loads(generate(folder, settings, progress=progress).read_text(encoding="utf-8"))
    records = [r for r in drawn if r["task"] == task]
    t = template(data.template)
    layout = T5 if t.origin == "clip_flant5" else LLAMA
    read = records
    if style == "claims":  # its captions are read first, and then its questions by the same tokenizer
        read, t = drawn, template("t5_v1" if layout is T5 else "v1") if t.style == "PLAIN" else t
    texts = [t.system, *training_texts(read, t)]
    if data.generated_tokenizer == "word":
        word_level(texts, folder, layout)
    else:
        byte_level(texts, vocab - SPARE, folder, layout)
    (folder / "train.json").write_text(json.dumps(records, indent=1), encoding="utf-8")
    return folder / "train.json"


def training_texts(records: list[dict], t: Template) -> Iterator[str]:
    """Every dialogue as the template writes it, so that a word-level tokenizer knows its marks and line breaks too."""
    for record in records:
        texts = [turn["value"] for turn in record["conversations"]]
        yield "".join(texts) if t.style == "PLAIN" else render(t, messages_of(t, texts))

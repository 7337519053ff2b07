"""`python -m vlm_jax score`: how well texts fit images, as a table on stdout and a JSON or CSV file.

table   a line per image, a column per text, which are listed above
JSON    {"model", "question", "answer", "mode", "images": [...], "texts": [...], "scores": [[...] per image]}
CSV     image,TEXT,TEXT...  and a line per image
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vlm_jax.config import ConfigError
from vlm_jax.data.image_source import ImageSource
from vlm_jax.data.images import check_exists
from vlm_jax.evaluate.vqascore import ANSWER, QUESTION, Asking, VQAScore
from vlm_jax.generate.adapters import adapter_flags

SUFFIXES = (".json", ".csv")


def score(
    model: str, *, images: Sequence[str] = (), texts: Sequence[str] = (), question: str = QUESTION, answer: str = ANSWER,
    mode: str = "original", template: str = "", dtype: str = "", batch: int = 16, out: str = "", quant: str = "",
    adapter: Sequence[str] = (), use: Sequence[str] = (), image: Sequence[str] = (), text: Sequence[str] = (),
) -> None:  # fmt: skip
    """Score every image against every text (see evaluate.vqascore); print the table and write it to `out`.

    image, text: further images and texts. quant, adapter, use: see generate.load.load_model and generate.adapters.adapter_flags.
    """
    image, text = [*images, *image], [*texts, *text]
    if not image or not text:
        raise ConfigError('score needs images and texts: --images a.png b.png --texts "a dog" "a cat"')
    empty = [number for number, one in enumerate(text, 1) if not one.strip()]
    if empty:
        raise ConfigError(f"text {empty[0]} of {len(text)} is empty: there is nothing that an image could show")
    if out and Path(out).suffix not in SUFFIXES:
        raise ConfigError(f"--out={out} must end in {' or '.join(SUFFIXES)}")
    asking = Asking(question, answer, mode)
    for path in image:
        check_exists(ImageSource(path))
    vqascore = VQAScore(
        model, batch=batch, asking=asking, progress=len(image) * len(text) > batch, dtype=dtype, template=template,
        quant=quant, **adapter_flags(adapter, use),
    )  # fmt: skip
    scores = vqascore(image, text)
    print(table(image, text, scores))
    if out:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        if Path(out).suffix == ".csv":
            with open(out, "w", encoding="utf-8", newline="") as file:
                lines = csv.writer(file)
                lines.writerow(["image", *text])
                lines.writerows([path, *map(float, row)] for path, row in zip(image, scores))
        else:
            said = {"model": model, "question": question, "answer": answer, "mode": mode}
            result = {**said, "images": image, "texts": text, "scores": scores.tolist()}
            Path(out).write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def table(images: Sequence[str], texts: Sequence[str], scores: np.ndarray) -> str:
    """The matrix as aligned text, texts numbered and listed above it."""
    heads = [f"[{i}]" for i in range(1, len(texts) + 1)]
    listed = [f"{head} {text}" for head, text in zip(heads, texts)]
    wide = max(map(len, images))
    cells = [[f"{value:.6f}" for value in row] for row in scores]
    lines = [" " * wide + "".join(f"  {head:>8}" for head in heads)]
    lines += [path.ljust(wide) + "".join(f"  {cell:>8}" for cell in row) for path, row in zip(images, cells)]
    return "\n".join([*listed, *lines])

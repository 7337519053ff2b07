"""The benchmarks of VQAScore by name, and running one: every image of an item against every text, then the benchmark's numbers.

Published numbers of CLIP-FlanT5-XXL, to compare with: Winoground group 46.0, EqBen group 47.9, AUROC DrawBench 85.3, EditBench 77.0,
COCO-T2I 85.0, TIFA160 pairwise accuracy 71.2, Pick-a-Pic 84.0, GenAI-Bench 64.1 (arXiv 2404.01291, 2406.13743).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vlm_jax.data.images import check_exists
from vlm_jax.evaluate import vqascore_preferences as preferences
from vlm_jax.evaluate import vqascore_ratings as ratings
from vlm_jax.evaluate.vqascore import VQAScore
from vlm_jax.evaluate.vqascore_files import Numbers, ScoreSet

BENCHMARKS: dict[str, Callable[[Path], ScoreSet]] = {
    "winoground": preferences.winoground,
    "eqben": preferences.eqben,
    "naturalbench": preferences.naturalbench,
    "sugarcrepe": preferences.sugarcrepe,
    "pickapic": preferences.pickapic,
    "tifa160": ratings.tifa160,
    "seetrue": ratings.seetrue,
    "drawbench": functools.partial(ratings.seetrue, only="drawbench"),
    "editbench": functools.partial(ratings.seetrue, only="editbench"),
    "coco_t2i": functools.partial(ratings.seetrue, only="coco_t2i"),
    "flickr8k_expert": functools.partial(ratings.flickr8k, file="flickr8k.json"),
    "flickr8k_cf": functools.partial(ratings.flickr8k, file="crowdflower_flickr8k.json"),
    "genai_image": ratings.genai_image,
    "genai_video": ratings.genai_video,
    "t2vscore": ratings.t2vscore,
    "genai_ranking": ratings.genai_ranking,
    "stanfordt23d": ratings.stanfordt23d,
}


def open_set(name: str, data: Path) -> ScoreSet:
    """A benchmark by name from its folder. UserError names a file that is not as published, or an image that is not there."""
    benchmark = BENCHMARKS[name](data)
    for image in dict.fromkeys(image for item in benchmark.items for image in item.images):
        check_exists(image)
    return benchmark


def run(benchmark: ScoreSet, score: VQAScore) -> dict[str, Any]:
    """{"numbers": {row: {number: value}}, "answers": [{"images", "texts", "scores"} per item]}."""
    scores = score.items(benchmark.items)
    answers = [
        {"images": [image.path for image in item.images], "texts": list(item.texts), "scores": values.tolist()}
        for item, values in zip(benchmark.items, scores)
    ]
    return {"numbers": benchmark.numbers(scores), "answers": answers}


def table(result: Mapping[str, Any]) -> str:
    """A result's numbers as aligned text, a line per row; accuracies are shares, Pearson's correlation is times 100."""
    numbers: Numbers = result["numbers"]
    columns = list(dict.fromkeys(name for row in numbers.values() for name in row))
    lines = [["", *columns]] + [[name, *(_cell(row.get(c)) for c in columns)] for name, row in numbers.items()]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join(
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths))).rstrip()
        for line in lines
    )


def _cell(value: float | None) -> str:
    return "" if value is None else str(value) if isinstance(value, int) else f"{value:.4f}"

"""Records with small pictures and an encoder without a tokenizer, for tests of the data path."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from PIL import Image

from vlm_jax.config import IGNORE, IMAGE, VisionConfig, VLMConfig
from vlm_jax.data.tasks import Sample

TINY = VLMConfig(vision=VisionConfig(image_size=28, patch_size=14, width=32, heads=4, layers=2, mlp=32))
ANYRES = dataclasses.replace(
    TINY, aspect="anyres", merge="spatial_unpad", image_newline=True, pinpoints=((28, 56), (56, 28), (56, 56))
)


def encode(record: dict) -> Sample:
    """The first two tokens and the images are not supervised."""
    tokens = np.asarray(record["tokens"], np.int32)
    labels = np.where(tokens == IMAGE, IGNORE, tokens)
    labels[:2] = IGNORE
    return Sample(tokens, labels, tuple(record["images"]))


def write_images(folder: Path, count: int = 6, seed: int = 0) -> list[str]:
    """PNG files of random sizes and pixels."""
    rng, paths = np.random.default_rng(seed), []
    for i in range(count):
        width, height = rng.integers(8, 90, 2)
        path = folder / f"{i}.png"
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(path)
        paths.append(str(path))
    return paths


def make_records(paths: list[str], count: int = 40, seed: int = 0, most_images: int = 2) -> list[dict]:
    """Records of 4 to 30 tokens with 0 to `most_images` images each; token 3+i names record i."""
    rng, records = np.random.default_rng(seed), []
    for i in range(count):
        tokens = [1, *rng.integers(100, 200, rng.integers(2, 29)).tolist(), 3 + i]
        images = rng.choice(paths, rng.integers(0, most_images + 1)).tolist()
        for _ in images:
            tokens.insert(int(rng.integers(1, len(tokens))), IMAGE)
        records.append({"tokens": tokens, "images": images})
    return records

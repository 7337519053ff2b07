"""HF goldens as our model: a checkpoint directory with reference.npz -> parameters and row batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np

from vlm_jax.config import VLMConfig
from vlm_jax.convert.read import Checkpoint, load, open_checkpoint
from vlm_jax.models import vlm


def open_golden(directory: Path) -> tuple[Checkpoint, vlm.VLM]:
    """The checkpoint and its model in float32, every parameter placed through `make_array_from_callback` as
    training does.
    """
    checkpoint = open_checkpoint(directory)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def place(path: str, shape: tuple[int, ...], dtype: np.dtype, read) -> jax.Array:
        return jax.make_array_from_callback(shape, device, lambda index: read(index).astype(np.float32))

    return checkpoint, vlm.build(checkpoint.config, load(checkpoint, place))


def row_batch(
    config: VLMConfig,
    image_token: int,
    ids: np.ndarray,
    mask: np.ndarray,
    pixels: np.ndarray,
    counts: Any,
    shape: tuple | None = None,
) -> dict[str, np.ndarray]:
    """HF's padded batch as rows: `pixels` [images, 3, S, S] of all rows in order, `counts` how many each row
    takes.

    An image is as many image tokens as it has features; a row that has one token per image (transformers
    before 4.47) is expanded. shape: (B, T, I) to pad to, so that several batches share one compilation; rows
    keep their side of padding.
    """
    features = config.vision.features
    rows = [_row(row[kept == 1], image_token, features, count) for row, kept, count in zip(ids, mask, counts)]
    height, length, images = shape or (len(rows), max(len(tokens) for tokens, _ in rows), max(max(counts), 1))
    left = mask[:, -1].all()
    batch = {name: np.full((height, length), fill, np.int32) for name, fill in (("tokens", 0), ("image_slots", -1))}
    batch |= {name: np.zeros((height, length), np.int32) for name in ("segments", "positions")}
    batch["images"] = np.zeros((height, images, config.vision.image_size, config.vision.image_size, 3), np.float32)
    starts = np.concatenate([[0], np.cumsum(counts)])
    for r, (tokens, slots) in enumerate(rows):
        at = slice(length - len(tokens), length) if left else slice(0, len(tokens))
        batch["tokens"][r, at], batch["image_slots"][r, at] = tokens, slots
        batch["segments"][r, at], batch["positions"][r, at] = 1, np.arange(len(tokens))
        batch["images"][r, : counts[r]] = pixels[starts[r] : starts[r + 1]].transpose(0, 2, 3, 1)
    return batch


def _row(ids: np.ndarray, image_token: int, features: int, images: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, image_slots) of one row without padding."""
    is_image = ids == image_token
    if images and is_image.sum() == images and features > 1:
        repeats = np.where(is_image, features, 1)
        ids, is_image = np.repeat(ids, repeats), np.repeat(is_image, repeats)
    assert is_image.sum() >= images * features, "the golden's image tokens do not match its images"
    is_image &= np.cumsum(is_image) <= images * features  # a model may also generate the image token: text
    return np.where(is_image, 0, ids), np.where(is_image, np.cumsum(is_image) - 1, -1)

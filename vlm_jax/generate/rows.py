"""Prompts as left-padded rows of a few fixed sizes, so that few programs are compiled and every row ends at the same slot.

tokens    . . . 1 <image> 5 6       segments  0 0 0 1 1 1 1 1       the model then writes all rows at one cache index
slots     . . . 1 p p p p 5 6       positions 0 0 0 0 1 2 3 4 ...   restart where the prompt begins
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from vlm_jax.config import IMAGE, UserError, VLMConfig
from vlm_jax.models.slots import NEWLINE, slots_of_views


class PromptError(UserError):
    """A prompt that the model cannot take; the message names it."""


@dataclasses.dataclass(frozen=True)
class Picture:
    """Views [V, S, S, 3] of one image, uint8 pixels (or floats that are normalised already), and its size (w, h) in pixels.

    The size matters for anyres layouts alone.
    """

    views: np.ndarray
    size: tuple[int, int] = (0, 0)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Token ids with IMAGE where each of `images` stands."""

    tokens: Sequence[int]
    images: Sequence[Picture] = ()

    @property
    def views(self) -> int:
        """Views of all images."""
        return sum(len(picture.views) for picture in self.images)


@dataclasses.dataclass(frozen=True)
class Placed:
    """A prompt in slots: tokens int32 [n] and image_slots int32 [n] (-1 text, NEWLINE, or feature index from its first view)."""

    tokens: np.ndarray
    image_slots: np.ndarray
    prompt: Prompt

    def __len__(self) -> int:
        return len(self.tokens)


def place(prompt: Prompt, config: VLMConfig, name: str = "the prompt") -> Placed:
    """Lay a prompt out in slots; PromptError names it where images and placeholders differ or an id has no embedding."""
    tokens = np.asarray(prompt.tokens, np.int64)
    where = np.flatnonzero(tokens == IMAGE)
    text = tokens[tokens != IMAGE]
    if not len(tokens):
        raise PromptError(f"{name} is empty: it needs at least one token")
    if len(where) != len(prompt.images):
        raise PromptError(f"{name} has {len(where)} image placeholders but {len(prompt.images)} images")
    if len(text) and not 0 <= text.min() <= text.max() < config.llm.vocab:
        wrong = int(text[(text < 0) | (text >= config.llm.vocab)][0])
        raise PromptError(f"{name} has the token id {wrong}, but the model has llm.vocab={config.llm.vocab} embeddings")
    S, parts, first = config.vision.image_size, [], 0
    for picture in prompt.images:
        if picture.views.ndim != 4 or picture.views.shape[1:] != (S, S, 3):
            raise PromptError(
                f"{name} has an image of shape {picture.views.shape}, but the model reads [views, {S}, {S}, 3]"
            )
        relative = slots_of_views(len(picture.views), *picture.size, config)
        parts.append(np.where(relative == NEWLINE, NEWLINE, relative + first * config.vision.features))
        first += len(picture.views)
    takes = np.ones(len(tokens), np.int64)
    takes[where] = [len(part) for part in parts]
    slots = np.repeat(np.where(tokens == IMAGE, NEWLINE - 1, -1), takes)
    if parts:
        slots[slots == NEWLINE - 1] = np.concatenate(parts)
    return Placed(
        np.repeat(np.where(tokens == IMAGE, 0, tokens), takes).astype(np.int32), slots.astype(np.int32), prompt
    )


def bucket(n: int, smallest: int) -> int:
    """The smallest of `smallest` * (1, 1.5, 2, 3, 4, 6, 8, 12, ...) that is at least n.

    >>> [bucket(n, 64) for n in (1, 65, 97, 700)]
    [64, 96, 128, 768]
    """
    size = smallest
    while size < n:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n; 0 for 0."""
    return 1 << (n - 1).bit_length() if n else 0


def batch_of(
    placed: Sequence[Placed], config: VLMConfig, rows: int, slots: int, views: int, pixels: bool = True
) -> dict[str, np.ndarray]:
    """Rows [rows, slots] with the prompts at their right ends; further rows are padding. Without any view (or without `pixels`): no
    "images" key."""
    if max(map(len, placed)) > slots or max(p.prompt.views for p in placed) > views or len(placed) > rows:
        raise PromptError(f"{len(placed)} prompts do not fit into {rows} rows of {slots} slots and {views} views")
    batch = {key: np.zeros((rows, slots), np.int32) for key in ("tokens", "image_slots", "segments", "positions")}
    batch["image_slots"] -= 1
    newline = views * config.vision.features
    for r, one in enumerate(placed):
        at = slice(slots - len(one), slots)
        batch["tokens"][r, at], batch["segments"][r, at] = one.tokens, 1
        batch["image_slots"][r, at] = np.where(one.image_slots == NEWLINE, newline, one.image_slots)
        batch["positions"][r, at] = np.arange(len(one))
    if views and pixels:
        batch["images"] = _images(placed, rows, views, config.vision.image_size)
    return batch


def _images(placed: Sequence[Placed], rows: int, views: int, size: int) -> np.ndarray:
    """[rows, views, S, S, 3], uint8 if every picture is; rows with fewer views end in zeros."""
    pixels = {picture.views.dtype == np.uint8 for one in placed for picture in one.prompt.images}
    if len(pixels) > 1:
        raise PromptError("one batch has images in uint8 pixels and in normalised floats: give all of them in one way")
    images = np.zeros((rows, views, size, size, 3), np.uint8 if pixels.pop() else np.float32)
    for r, one in enumerate(placed):
        first = 0
        for picture in one.prompt.images:
            images[r, first : first + len(picture.views)] = picture.views
            first += len(picture.views)
    return images

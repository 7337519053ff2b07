"""A model of a few thousand parameters and generated rows, for tests of training."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from vlm_jax.config import LLMConfig, VisionConfig, VLMConfig
from vlm_jax.models import vlm
from vlm_jax.train.options import TrainConfig

VISION = VisionConfig(image_size=28, patch_size=14, width=16, layers=2, heads=2, mlp=32)
LLM = LLMConfig(vocab=64, width=32, mlp=64, layers=2, heads=4, kv_heads=2, head_dim=8, max_position=64)
MODEL = VLMConfig(vision=VISION, llm=LLM)
EXACT = TrainConfig(
    global_batch=8,
    steps=6,
    lr=3e-3,
    dtype="float32",
    vision_dtype="float32",
    frozen_dtype="float32",
    remat="none",
    loss_chunk=8,
    log_every=2,
    save_every=2,
)
VIEWS = 2


class Weights:
    """Initial weights from numpy, which spares a run the compilation of random initialisers."""

    def __init__(self, model: VLMConfig = MODEL):
        rng = np.random.default_rng(0)
        self.arrays = {}
        for path, shape in vlm.shapes(model).items():
            noise = 0.1 * rng.normal(size=shape.shape).astype(np.float32)
            self.arrays[path] = noise + 1 if path.endswith("scale") else noise

    def __contains__(self, path: str) -> bool:
        return path in self.arrays

    def read(self, path: str, index: tuple[slice, ...]) -> np.ndarray:
        """The slice `index` of a parameter."""
        return self.arrays[path][index]


def segment(
    rng: np.random.Generator, length: int, views: int, first_view: int = 0, model: VLMConfig = MODEL
) -> dict[str, np.ndarray]:
    """One sample of `length` slots: a token, `views` whole images, then supervised text."""
    P = model.vision.features
    tokens = rng.integers(1, model.llm.vocab, length + 1)
    slots = np.full(length, -1)
    slots[1 : 1 + views * P] = np.arange(views * P) + first_view * P
    weights = (np.arange(length) >= 1 + views * P).astype(np.float32)
    weights[-1] = 0  # nothing follows the last slot
    out = {
        "tokens": np.where(slots >= 0, 0, tokens[:-1]),
        "image_slots": slots,
        "targets": np.where(weights > 0, tokens[1:], 0),
    }
    return {k: v.astype(np.int32) for k, v in out.items()} | {
        "weights": weights,
        "positions": np.arange(length, dtype=np.int32),
    }


def row(
    rng: np.random.Generator, plan: list[tuple[int, int]], slots: int = 24, model: VLMConfig = MODEL
) -> dict[str, np.ndarray]:
    """A row of samples given as (length, views), padded to `slots` slots and VIEWS views."""
    out = {k: np.zeros(slots, np.int32) for k in ("tokens", "image_slots", "targets", "segments", "positions")}
    out["image_slots"] -= 1
    out["weights"] = np.zeros(slots, np.float32)
    size = model.vision.image_size
    out["images"] = np.zeros((VIEWS, size, size, 3), np.uint8)
    at = view = 0
    for number, (length, views) in enumerate(plan, 1):
        for key, value in segment(rng, length, views, view, model).items():
            out[key][at : at + length] = value
        out["segments"][at : at + length] = number
        out["images"][view : view + views] = rng.integers(0, 256, (views, size, size, 3))
        at, view = at + length, view + views
    return out


PLANS = (
    [(9, 1), (10, 1)],
    [(20, 2)],
    [(7, 0), (8, 0)],
    [(12, 1)],
    [(24, 0)],
    [(11, 2), (6, 0)],
    [(5, 0)],
    [(8, 1), (9, 0), (7, 1)],
)


def batch(seed: int, rows: int = 8, slots: int = 24, model: VLMConfig = MODEL) -> dict[str, np.ndarray]:
    """Rows with text only, one and several images, one and several samples."""
    rng = np.random.default_rng(seed)
    made = [row(rng, PLANS[(seed + i) % len(PLANS)], slots, model) for i in range(rows)]
    return {key: np.stack([r[key] for r in made]) for key in made[0]}


@dataclasses.dataclass
class Batches:
    """Endless generated batches, each a function of its step; repeats after `period` steps."""

    step: int
    rows: int = 8
    period: int = 1000

    def __iter__(self) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        return self

    def __next__(self) -> tuple[int, dict[str, np.ndarray]]:
        self.step += 1
        return self.step - 1, batch((self.step - 1) % self.period, self.rows)

    def state(self) -> dict[str, Any]:
        """Where the next batch is."""
        return {"step": self.step}

    def samples_of(self, step: int) -> list[int]:
        """Sample numbers of a step."""
        return [step * self.rows + i for i in range(self.rows)]


def open_batches(start: int, state: dict[str, Any] | None) -> Batches:
    """The argument `batches` of train.loop.train."""
    assert state is None or state["step"] == start
    return Batches(start)

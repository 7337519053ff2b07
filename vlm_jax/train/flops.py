"""Model FLOPs of real work only, and what the device could do: the two sides of an honest MFU.

    matrix products   2 per weight and token forward, +2 where the gradient of their input is needed,
                      +2 where they are trained
    causal attention  4 N H per pair of slots and layer forward, x3 if gradients pass through;
                      pairs = sum of n^2 / 2 per SEGMENT
    tower             only the layers that the features need; bidirectional; forward only while frozen

Padding, unused image views, recomputation and the embedding gather count zero (PaLM's accounting,
Chowdhery et al. 2022).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import NamedTuple

from vlm_jax.config import VLMConfig
from vlm_jax.models import vlm

# dense bf16 FLOP/s by jax's device_kind, from the vendors' data sheets
PEAKS: tuple[tuple[str, float], ...] = (
    (r"A100", 312e12),
    (r"H100 80GB HBM3|H100 SXM|H200(?! NVL)|GH200", 989.5e12),
    (r"^TPU v4$", 275e12),
    (r"^TPU (v5 ?lite|v5e)", 197e12),
    (r"^TPU (v5p|v5)$", 459e12),
    (r"^TPU (v6 ?lite|v6e)", 918e12),
)


class Cost(NamedTuple):
    """Training FLOPs per real slot, per causal pair of slots, and per image view in use."""

    slot: float
    pair: float
    view: float

    def total(self, slots: float, pairs: float, views: float) -> float:
        """FLOPs of a batch with these counts (step.row_counts)."""
        return self.slot * slots + self.pair * pairs + self.view * views


def training_cost(config: VLMConfig, trainable: Iterable[str]) -> Cost:
    """Cost of one update in which the parameters at the paths `trainable` change."""
    chosen, shapes, v, llm = set(trainable), vlm.shapes(config), config.vision, config.llm

    def trained(prefix: str) -> bool:
        return any(path.startswith(prefix) for path in chosen)

    # gradients reach a part if it, or anything before it, is trained
    to_tower = trained("tower/")
    to_projector = to_tower or trained("projector/")
    to_llm = to_projector or trained("llm/embed") or trained("image_newline") or trained("llm/blocks")

    def products(prefix: str, reached: bool) -> float:  # per token that passes through
        kernels = [p for p in shapes if p.startswith(prefix) and p.endswith("kernel")]
        return sum(math.prod(shapes[p].shape) * (2 + 2 * reached + 2 * (p in chosen)) for p in kernels)

    head = 0 if llm.tie else math.prod(shapes["llm/head/kernel"].shape)
    head_trained = "llm/head/kernel" in chosen
    if llm.tie:
        head, head_trained = llm.vocab * llm.width, "llm/embed/embedding" in chosen
    slot = products("llm/blocks/", to_llm) + head * (2 + 2 * (to_llm or trained("llm/norm")) + 2 * head_trained)
    pair = 4 * llm.layers * llm.heads * llm.head_dim * (3 if to_llm else 1)
    attention = 4 * v.used_layers * v.tokens**2 * v.width * (3 if to_tower else 1)
    tower = v.tokens * products("tower/blocks/", to_tower) + v.grid**2 * products("tower/patch/", to_tower) + attention
    return Cost(slot, pair, tower + v.features * products("projector/", to_projector))


def causal_pairs(lengths: Iterable[int]) -> float:
    """Pairs of slots that causal attention looks at in segments of these lengths: half of each square."""
    return sum(n * n / 2 for n in lengths)


def peak_flops(device_kind: str) -> float | None:
    """Dense bf16 FLOP/s of one device; None if unknown (then TFLOP/s is printed, and no utilisation)."""
    return next((peak for pattern, peak in PEAKS if re.search(pattern, device_kind)), None)

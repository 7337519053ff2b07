"""Model FLOPs of real work only, and what the device could do: the two sides of an honest MFU.

    matrix products   2 per weight and token forward, +2 where the gradient of their input is needed,
                      +2 where they are trained: 4 for a frozen kernel behind which something trains, 6 for a trained one
    adapters          their two products by the same rule (6 and 6), because what they compute is part of the model
    causal attention  4 N H per pair of slots and layer forward, x3 if gradients pass through;
                      pairs = sum of n^2 / 2 per SEGMENT
    tower             only the layers that the features need; bidirectional; forward only while frozen

Padding, unused image views, recomputation, reading a kernel from its codes, dropout and the embedding gather
count zero (PaLM's accounting, Chowdhery et al. 2022).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from vlm_jax.config import LLMConfig, T5Config, VLMConfig
from vlm_jax.models import vlm
from vlm_jax.models.adapters import LORA_A, LORA_B

# dense bf16 FLOP/s by jax's device_kind, from the vendors' data sheets
PEAKS: tuple[tuple[str, float], ...] = (
    (r"A100", 312e12),
    (r"H100 80GB HBM3|H100 SXM|H200(?! NVL)|GH200", 989.5e12),
    (r"^TPU v4$", 275e12),
    (r"^TPU (v5 ?lite|v5e)", 197e12),
    (r"^TPU (v5p|v5)$", 459e12),
    (r"^TPU (v6 ?lite|v6e)", 918e12),
)

PRODUCTS = ("/kernel", f"/{LORA_A}", f"/{LORA_B}")  # leaves that are multiplied with


class Cost(NamedTuple):
    """Training FLOPs per real slot, per pair of slots that causal attention would look at, and per image view in use.

    An encoder-decoder also has a cost per answer slot, per causal pair of answer slots, and per pair of an answer slot and a slot of
    its sample.
    """

    slot: float
    pair: float
    view: float
    answer: float = 0.0
    answer_pair: float = 0.0
    cross_pair: float = 0.0

    def total(
        self,
        slots: float,
        pairs: float,
        views: float,
        answers: float = 0.0,
        answer_pairs: float = 0.0,
        cross_pairs: float = 0.0,
    ) -> float:
        """FLOPs of a batch with these counts (step.row_counts)."""
        counts = (slots, pairs, views, answers, answer_pairs, cross_pairs)
        return sum(cost * count for cost, count in zip(self, counts))


@dataclasses.dataclass(frozen=True)
class _Work:
    """Parameters by path with their shapes, and which of them change."""

    shapes: Mapping[str, tuple[int, ...]]
    chosen: set[str]

    def trained(self, *prefixes: str) -> bool:
        return any(path.startswith(prefixes) for path in self.chosen)

    def products(self, prefix: str, reached: bool, but: str = "$^") -> float:
        """Per token that passes through every kernel under `prefix`; `but` is a pattern of those that it does not."""
        kernels = [p for p in self.shapes if p.startswith(prefix) and p.endswith(PRODUCTS) and not re.search(but, p)]
        return sum(math.prod(self.shapes[p]) * (2 + 2 * reached + 2 * (p in self.chosen)) for p in kernels)

    def head(self, llm: LLMConfig | T5Config, reached: bool) -> float:
        """Per token whose logits are computed."""
        if llm.tie:
            return llm.vocab * llm.width * (2 + 2 * reached + 2 * ("llm/embed/embedding" in self.chosen))
        # an adapter of the head is added to its kernel, which then has a gradient
        return math.prod(self.shapes["llm/head/kernel"]) * (2 + 2 * reached + 2 * self.trained("llm/head/"))


def training_cost(config: VLMConfig, trainable: Iterable[str], cached_features: bool = False) -> Cost:
    """Cost of one update in which the parameters at the paths `trainable` change.

    cached_features: the batch holds the tower's features, which then costs nothing.
    """
    v = config.vision
    shapes = vlm.shapes(
        dataclasses.replace(config, quant=None)
    )  # codes are no weights: count the kernels they stand for
    work = _Work({path: like.shape for path, like in shapes.items()}, set(trainable))
    # gradients reach a part if it, or anything before it, is trained
    to_tower = work.trained("tower/")
    to_projector = to_tower or work.trained("projector/")
    to_llm = to_projector or work.trained("llm/embed", "image_newline")
    attention = 4 * v.used_layers * v.tokens**2 * v.width * (3 if to_tower else 1)
    tower = v.tokens * work.products("tower/blocks/", to_tower)
    tower += v.grid**2 * work.products("tower/patch/", to_tower) + attention
    view = (0.0 if cached_features else tower) + v.features * work.products("projector/", to_projector)
    return (_t5_cost if config.encoder_decoder else _llama_cost)(config.llm, work, to_llm, view)


def _llama_cost(llm: LLMConfig, work: _Work, reached: bool, view: float) -> Cost:
    reached = reached or work.trained("llm/blocks")
    slot = work.products("llm/blocks/", reached) + work.head(llm, reached or work.trained("llm/norm"))
    return Cost(slot, 4 * llm.layers * llm.heads * llm.head_dim * (3 if reached else 1), view)


def _t5_cost(llm: T5Config, work: _Work, reached: bool, view: float) -> Cost:
    """Both sides; keys and values for cross-attention are made of the encoder's slots, which look in both directions."""
    encoder = reached or work.trained("llm/encoder/")
    decoder = encoder or work.trained("llm/decoder/")
    read, inner = r"/cross/[kv]/", llm.heads * llm.head_dim
    slot = work.products("llm/encoder/blocks/", encoder)
    slot += work.products("llm/decoder/blocks/cross/k/", encoder) + work.products(
        "llm/decoder/blocks/cross/v/", encoder
    )
    answer = work.products("llm/decoder/blocks/", decoder, but=read) + work.head(llm, decoder)
    own = 4 * llm.decoder_layers * inner * (3 if decoder else 1)
    return Cost(slot, 2 * 4 * llm.encoder_layers * inner * (3 if encoder else 1), view, answer, own, own)


def causal_pairs(lengths: Iterable[int]) -> float:
    """Pairs of slots that causal attention looks at in segments of these lengths: half of each square."""
    return sum(n * n / 2 for n in lengths)


def peak_flops(device_kind: str) -> float | None:
    """Dense bf16 FLOP/s of one device; None if unknown (then TFLOP/s is printed, and no utilisation)."""
    return next((peak for pattern, peak in PEAKS if re.search(pattern, device_kind)), None)

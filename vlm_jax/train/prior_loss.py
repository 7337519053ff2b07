"""Losses of priors over codes: cross-entropy of every code given the condition and the codes before it.

    loss = sum_bn w_b (logsumexp_v z[b,n,:] - z[b,n,code[b,n]]) / sum_bn w_b        w_b: 1, or 0 for an image without codes
A share of the conditions is taken away, so that sampling can be guided (Ho & Salimans 2022).
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from vlm_jax.nn.dropout import dropout_key
from vlm_jax.train.losses import LossSums, cross_entropy
from vlm_jax.visual_tokenizers.priors.gpt import GPT

CONDITION, FORWARD = 0, 1  # what the two keys of a step are for


def gpt_loss(
    model: GPT, batch: Mapping[str, jax.Array], key: jax.Array | None = None, *,
    dtype: str = "float32", impl: str = "auto", remat: str = "none", chunk: int = 512,
) -> LossSums:  # fmt: skip
    """Sums over the codes of a batch; the loss is sums.loss / sums.tokens.

    codes int32 [B, N]; labels int32 [B], or captions [B, S, C] with caption_mask [B, S]; valid [B], optional. key: draws which
    conditions are taken away, and dropout; None draws neither (evaluation).
    """
    codes, drop, forward = batch["codes"], None, None
    if key is not None:
        forward = jax.random.fold_in(key, FORWARD)
        drop = jax.random.uniform(jax.random.fold_in(key, CONDITION), (len(codes),)) < model.config.condition_dropout
    condition = batch["labels" if model.config.condition == "class" else "captions"]
    with dropout_key(forward):
        hidden = model(codes, condition, batch.get("caption_mask"), drop, dtype, impl, remat)
    valid = batch["valid"] if "valid" in batch else jnp.ones(len(codes))
    weights = jnp.broadcast_to(valid.astype(jnp.float32)[:, None], codes.shape)
    return cross_entropy(hidden, model.head.weight(), codes, weights, chunk)

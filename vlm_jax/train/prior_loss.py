"""Losses of priors over codes: cross-entropy of every code given the condition and the codes before it.

    loss = sum_bn w_b (logsumexp_v z[b,n,:] - z[b,n,code[b,n]]) / sum_bn w_b        w_b: 1, or 0 for an image without codes
of LlamaGen's prior; those of RQ- and HQ-Transformers are in priors.hierarchy_loss. A share of the conditions is taken away, so that
sampling can be guided (Ho & Salimans 2022).
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from vlm_jax.data.code_rows import code_keys, soft_keys
from vlm_jax.nn.dropout import dropout_key
from vlm_jax.train.losses import LossSums, cross_entropy
from vlm_jax.visual_tokenizers.priors.gpt import GPT
from vlm_jax.visual_tokenizers.priors.hierarchy_loss import hq_losses, rq_losses
from vlm_jax.visual_tokenizers.priors.hq_transformer import HQTransformer
from vlm_jax.visual_tokenizers.priors.models import Model
from vlm_jax.visual_tokenizers.priors.rq_transformer import RQTransformer

CONDITION, FORWARD, CODES = 0, 1, 2  # what the keys of a step are for

Arrays = Mapping[str, jax.Array]


def prior_loss(
    model: Model, batch: Arrays, key: jax.Array | None = None, table: jax.Array | None = None, *,
    dtype: str = "float32", impl: str = "auto", remat: str = "none", chunk: int = 512,
) -> tuple[jax.Array, dict[str, jax.Array]]:  # fmt: skip
    """(mean loss, {"loss", "accuracy", and of several depths or levels the loss of each}) of a batch of code rows.

    batch: codes of every level, and where an RQ- or HQ-Transformer shall learn soft labels those beside them. table: of the tokenizer,
    for an RQ-Transformer. key: as in `gpt_loss`. chunk: of LlamaGen's prior; the others have all logits at one time.
    """
    if isinstance(model, GPT):
        sums = gpt_loss(model, batch, key, dtype=dtype, impl=impl, remat=remat, chunk=chunk)
        loss = sums.loss / sums.tokens
        return loss, {"loss": loss, "accuracy": sums.correct / sums.tokens}
    condition, forward = batch.get("labels"), None
    if key is not None:
        forward = jax.random.fold_in(key, FORWARD)
        if model.config.condition_dropout:
            condition = jnp.where(_taken(key, model, len(condition)), model.nothing(len(condition)), condition)
    call = hq_part if isinstance(model, HQTransformer) else rq_part
    with dropout_key(forward):
        logits, codes, losses = call(model, batch, condition, table, {"dtype": dtype, "impl": impl, "remat": remat})
    right = sum(jnp.sum(z.argmax(-1) == y) for z, y in zip(logits, codes))
    accuracy = right / sum(y.size for y in codes)
    return losses["loss"], losses | {"accuracy": accuracy.astype(jnp.float32)}


def rq_part(model: RQTransformer, batch: Arrays, condition: jax.Array | None, table: jax.Array | None, how: dict):
    """([logits], [codes], losses) of a batch."""
    codes = batch["codes"]
    logits = model(codes, table, condition, **how)
    return [logits.image], [codes], rq_losses(model.config, logits, batch.get("soft", codes), condition)


def hq_part(model: HQTransformer, batch: Arrays, condition: jax.Array | None, table: None, how: dict):
    """(logits, codes, losses) of a batch, coarsest level first."""
    levels = model.config.levels
    codes = [batch[key] for key in code_keys(levels)]
    logits = model(codes, condition, **how)
    targets = [batch.get(key, y) for key, y in zip(soft_keys(levels), codes)]
    return logits.image, codes, hq_losses(model.config, logits, targets, condition)


def _taken(key: jax.Array, model: Model, rows: int) -> jax.Array:
    return jax.random.uniform(jax.random.fold_in(key, CONDITION), (rows,)) < model.config.condition_dropout


def gpt_loss(
    model: GPT, batch: Arrays, key: jax.Array | None = None, *,
    dtype: str = "float32", impl: str = "auto", remat: str = "none", chunk: int = 512,
) -> LossSums:  # fmt: skip
    """Sums over the codes of a batch; the loss is sums.loss / sums.tokens.

    codes int32 [B, N] (or [B, h, w]); labels int32 [B], or captions [B, S, C] with caption_mask [B, S]; valid [B], optional. key:
    draws which conditions are taken away, and dropout; None draws neither (evaluation).
    """
    codes, drop, forward = batch["codes"].reshape(len(batch["codes"]), -1), None, None
    if key is not None:
        forward, drop = jax.random.fold_in(key, FORWARD), _taken(key, model, len(codes))
    condition = batch["labels" if model.config.condition == "class" else "captions"]
    with dropout_key(forward):
        hidden = model(codes, condition, batch.get("caption_mask"), drop, dtype, impl, remat)
    valid = batch["valid"] if "valid" in batch else jnp.ones(len(codes))
    weights = jnp.broadcast_to(valid.astype(jnp.float32)[:, None], codes.shape)
    return cross_entropy(hidden, model.head.weight(), codes, weights, chunk)

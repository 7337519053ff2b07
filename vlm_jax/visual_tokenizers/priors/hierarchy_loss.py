"""What RQ- and HQ-Transformers are trained with: cross entropy of codes, or of soft labels, per depth or level.

hard   logsumexp(z) - z_y
soft   - sum_v p_v (z_v - max z - log(sum exp(z - max z) + 1e-7))      p: softmax(-distance / temperature) of the tokenizer
RQ     mean over all codes of all depths                               HQ: sum over levels of weight_l mean_l
text   image_weight image + text_weight text; HQ's text counts (1 + weight of level 1) times, to keep pace with its image
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from vlm_jax.config import ConfigError
from vlm_jax.visual_tokenizers.priors.hierarchy_options import HQTransformerConfig, RQTransformerConfig
from vlm_jax.visual_tokenizers.priors.hq_transformer import HQLogits
from vlm_jax.visual_tokenizers.priors.rq_transformer import RQLogits

FLOOR = 1e-7  # of the sum of exponentials in the soft cross entropy, as the originals have it


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Losses [...] of float32 logits [..., V] and targets: codes int32 [...], or soft labels float32 [..., V]."""
    shape = logits.shape if jnp.issubdtype(targets.dtype, jnp.floating) else logits.shape[:-1]
    if targets.shape != shape:
        raise ConfigError(f"targets of shape {targets.shape} do not fit logits of shape {logits.shape}")
    highest = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    total = jnp.exp(logits - highest).sum(-1)
    if jnp.issubdtype(targets.dtype, jnp.floating):
        logp = logits - highest - jnp.log(total + FLOOR)[..., None]
        return -(targets * logp).sum(-1)
    # a masked sum and not a gather: it stays local where the codes are sharded
    at_target = jnp.arange(logits.shape[-1]) == targets[..., None]
    return highest[..., 0] + jnp.log(total) - jnp.where(at_target, logits, 0.0).sum(-1)


def rq_losses(
    c: RQTransformerConfig, logits: RQLogits, targets: jax.Array, condition: jax.Array | None = None
) -> dict[str, jax.Array]:
    """{"loss", "image", "depth_0" .., ("text")} of codes [B, H, W, depth] or soft labels [B, H, W, depth, V]."""
    each = cross_entropy(logits.image, targets)
    out = {f"depth_{d}": each[..., d].mean() for d in range(c.depth)}
    return _whole(c, out, each.mean(), logits.text, condition, 1.0)


def hq_losses(
    c: HQTransformerConfig, logits: HQLogits, targets: Sequence[jax.Array], condition: jax.Array | None = None
) -> dict[str, jax.Array]:
    """{"loss", "image", "level_0" .., ("text")} of codes [B, h, w] or soft labels [B, h, w, V] per level."""
    out = {f"level_{i}": cross_entropy(z, y).mean() for i, (z, y) in enumerate(zip(logits.image, targets, strict=True))}
    image = sum(weight * out[f"level_{i}"] for i, weight in enumerate(c.weights))
    return _whole(c, out, image, logits.text, condition, 1.0 + c.weights[1])


def _whole(c, out: dict, image: jax.Array, text: jax.Array | None, condition: jax.Array | None, scale: float) -> dict:
    """`out` with the image's loss, the text's where there is one, and their weighted sum."""
    if text is None:
        return out | {"image": image, "loss": image}
    if condition is None:
        raise ConfigError("the loss of a prior of texts needs the texts' tokens")
    said = cross_entropy(text, condition.reshape(len(condition), -1)[:, 1:]).mean()
    loss = c.image_weight * image + c.text_weight * scale * said
    return out | {"image": image, "text": said, "loss": loss}

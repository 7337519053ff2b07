"""One attention function; a Mask is a value; an implementation honours the whole mask or raises.

    attention(q [B,T,N,H], k [B,S,K,H], v [B,S,K,H], mask) -> [B,T,N,H]      query head n reads key head n // (N/K)

| impl    | where      | causal | segments | window | bias | diagonals | dropout | cache | T != S | memory               |
|---------|------------|--------|----------|--------|------|-----------|---------|-------|--------|----------------------|
| dense   | everywhere | yes    | yes      | yes    | yes  | yes       | yes     | yes   | yes    | T S                  |
| chunked | everywhere | yes    | yes      | yes    | yes  | yes       | yes     | yes   | yes    | 512 S                |
| blocked | everywhere | yes    | yes      | yes    | no   | no        | no      | yes   | yes    | T + S                |
| context | everywhere | yes    | yes      | yes    | yes  | yes       | yes     | yes   | yes    | S + its part of T    |
| cudnn   | NVIDIA GPU | yes    | yes      | yes    | yes  | no        | no      | yes   | yes    | T S, of the mask     |
| splash  | TPU        | yes    | yes      | yes    | no   | no        | no      | no    | no     | T + S                |
| flash   | TPU        | yes    | yes      | yes    | yes  | yes       | no      | no    | yes    | T + S, or 256 S      |

dense is the reference. chunked needs T in multiples of 128, blocked T and S in multiples of 128 (it leaves out blocks without an allowed
pair, and is what `auto` takes for rows on a CPU), context a mesh with seq > 1 that divides T (nn.attention_context), cudnn 16
bits and a head width of at most 128 in multiples of 8, flash T and S in multiples of 128 and one bias for all rows. cache: query slots
begin at an index that is known only when the program runs.

cuDNN gets causality alone as a flag, and segments, windows and caches as a mask of T x S bits. No maintained public function does
better: jax.nn's has no packed rows (offsets of segments are private, jax-ml/jax#29731, and were wrong for grouped heads until
jax-ml/jax#39521), tokamax's takes segments as such a mask too, and the Triton kernel of jax.experimental.pallas is deprecated.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from vlm_jax.config import ATTENTIONS, ConfigError, one_of
from vlm_jax.nn import attention_blocked, attention_context, attention_plain, attention_tpu, dropout
from vlm_jax.nn.masks import NEGATIVE, Mask
from vlm_jax.parallel import rules

__all__ = ["NEGATIVE", "Mask", "attention", "choose", "refusal"]

LANES = attention_tpu.LANES


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, impl: str = "auto", scale: float | None = None
) -> jax.Array:
    """Scaled dot-product attention with grouped key/value heads; see the module docstring. scale defaults to H^-1/2."""
    one_of("attention", impl, ATTENTIONS)
    if impl == "auto":
        impl = choose(q, k, mask, rules.platform())
    reason = refusal(impl, q, k, mask)
    if reason:
        raise ConfigError(f"attention={impl} cannot compute this mask: {reason}; use attention=auto")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if impl == "context":
        name = attention_context.inner(q, k, mask, lambda name: not refusal(name, q, k, mask), rules.platform())
        return attention_context.context(q, k, v, mask, scale, name)
    if attention_context.split_over(q.shape[1]) > 1:  # slots over devices are gathered once, and not in every chunk
        q, k, v = (rules.shard(x, "batch", None, "act_heads", None) for x in (q, k, v))
    run = {
        "dense": attention_plain.dense,
        "chunked": attention_plain.chunked,
        "blocked": attention_blocked.blocked,
        "cudnn": attention_plain.cudnn,
        "splash": attention_tpu.splash,
        "flash": attention_tpu.flash,
    }[impl]
    return run(q, k, v, mask, scale)


def refusal(impl: str, q: jax.Array, k: jax.Array, mask: Mask) -> str | None:
    """Why `impl` cannot compute this call exactly, or None."""
    drops = bool(mask.drop and dropout.drawing())
    if impl == "chunked" and not attention_plain.chunk_of(q.shape[1]):
        return f"{q.shape[1]} query slots are not a multiple of {attention_plain.CHUNK // 4}"
    if impl == "context":
        return attention_context.refusal(q, k, mask)
    if impl in ("blocked", "cudnn", "splash", "flash") and drops:
        return f"{impl} has no dropout"
    if impl in ("blocked", "cudnn", "splash") and mask.diagonals is not None:
        return f"{impl} takes no bias by diagonals here"
    if impl in ("blocked", "splash") and mask.bias is not None:
        return f"{impl} takes no bias"
    if impl == "blocked" and (q.shape[1] % attention_blocked.BLOCK or k.shape[1] % attention_blocked.BLOCK):
        return f"{q.shape[1]} query and {k.shape[1]} key slots are not multiples of {attention_blocked.BLOCK}"
    if impl == "cudnn":
        if q.dtype not in (jnp.bfloat16, jnp.float16):
            return f"cuDNN needs a 16-bit dtype, not {q.dtype}"
        if q.shape[-1] % 8 or q.shape[-1] > 128:
            return f"cuDNN needs a head width that is a multiple of 8 and at most 128, not {q.shape[-1]}"
    if impl == "splash":
        if q.shape[1] != k.shape[1] or not mask.from_the_first:
            return f"the splash kernel needs equal query and key slots, not {q.shape[1]} and {k.shape[1]}, and no cache"
    return _flash_refusal(q, k, mask) if impl == "flash" else None


def _flash_refusal(q: jax.Array, k: jax.Array, mask: Mask) -> str | None:
    if q.shape[1] % LANES or k.shape[1] % LANES or not mask.from_the_first:
        return f"the flash kernel needs slots in multiples of {LANES}, not {q.shape[1]} and {k.shape[1]}, and no cache"
    if q.shape[-1] > LANES and q.shape[-1] % LANES:
        return f"the flash kernel needs a head width of at most {LANES} or a multiple of it, not {q.shape[-1]}"
    if mask.bias is not None and mask.bias.shape[0] > 1:
        return "the flash kernel takes one bias for all rows here"
    return None


def choose(q: jax.Array, k: jax.Array, mask: Mask, platform: str) -> str:
    """The implementation that "auto" means on `platform`."""
    if not refusal("context", q, k, mask):
        return "context"
    long = q.shape[1] >= attention_plain.LONG
    if platform == "tpu":
        kernel = attention_tpu.kernel_for(q, k, lambda kernel: not refusal(kernel, q, k, mask))
        if kernel is not None:
            return kernel
    if platform == "gpu" and q.shape[1] > 1 and not refusal("cudnn", q, k, mask):
        return "cudnn"
    if platform == "cpu" and k.shape[1] > attention_blocked.BLOCK and not refusal("blocked", q, k, mask):
        return "blocked"
    return "chunked" if long and not refusal("chunked", q, k, mask) else "dense"

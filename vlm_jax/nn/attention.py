"""One attention function; a Mask is a value; an implementation honours the whole mask or raises.

    attention(q [B,T,N,H], k [B,S,K,H], v [B,S,K,H], mask) -> [B,T,N,H]      query head n reads key head n // (N/K)

| impl    | where        | causal | segments | window | bias | diagonals, dropout | memory  | needs                               |
|---------|--------------|--------|----------|--------|------|--------------------|---------|-------------------------------------|
| dense   | everywhere   | yes    | yes      | yes    | yes  | yes                | T S     | nothing: the reference              |
| chunked | everywhere   | yes    | yes      | yes    | yes  | yes                | T S / n | T a multiple of the chunk           |
| cudnn   | NVIDIA GPU   | yes    | as mask  | yes    | yes  | no                 | T S mask| 16-bit dtype, H % 8 == 0, H <= 128  |
| splash  | TPU          | yes    | yes      | no     | no   | no                 | T + S   | T == S, a multiple of 128, no cache |
| flash   | TPU          | yes    | yes      | yes    | yes  | diagonals          | T S / n | T and S multiples of 128, no cache  |

flash and its gradients (those of the bias too) need causality, window and bias as numbers, which exist for one chunk of query slots at a
time; its bias is the same for all rows.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from vlm_jax.config import ATTENTIONS, ConfigError, one_of
from vlm_jax.nn import dropout
from vlm_jax.nn.relative_position import toeplitz
from vlm_jax.parallel import rules

CHUNK = 512  # query slots per step of the chunked implementation
# query slots whose bias flash writes down at a time: backward over two rows of 4096 slots of T5-XL 512 plan 2.1 GB, 256 1.5, chunked 1.2
BIASED = 256
LANES = 128  # of a TPU's vector unit, and what its kernels take slots by
NEGATIVE = -1e30  # finite, so that a row without any key gives the mean of v and not nan


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["q_segments", "k_segments", "q_offset", "bias", "diagonals"],
    meta_fields=["causal", "window", "drop", "place"],
)
@dataclasses.dataclass(frozen=True)
class Mask:
    """Who may attend to whom. Query slot t has index t + q_offset among the key slots.

    causal: key slot <= query slot. window W: query - W < key slot (Mistral). Segments: equal ids only, 0 being padding
    (padding sees padding, so that no softmax is empty). bias is added to the scores: [B|1, N|1, T, S]. So are diagonals
    [N, T + S - 1], as nn.relative_position says. drop: share of the attention weights that training zeroes, drawn under `place`
    (see nn.dropout).
    """

    causal: bool = False
    window: int | None = None
    q_segments: jax.Array | None = None
    k_segments: jax.Array | None = None
    q_offset: jax.Array | int = 0
    bias: jax.Array | None = None
    diagonals: jax.Array | None = None
    drop: float = 0.0
    place: int = 0

    def allowed(self, queries: int, keys: int) -> jax.Array | None:
        """Boolean [B|1, 1, T, S], or None where everything is allowed.

        Two samples of 2 and 1 tokens and one pad slot, causal (segments 1 1 2 0):
            1 . . .
            1 1 . .
            . . 1 .
            . . . 1
        """
        parts = []
        distance = (jnp.arange(queries)[:, None] + self.q_offset) - jnp.arange(keys)[None, :]
        if self.causal:
            parts.append((distance >= 0)[None, None])
        if self.window is not None:
            parts.append((distance < self.window)[None, None])
        if self.q_segments is not None:
            parts.append((self.q_segments[:, :, None] == self.k_segments[:, None, :])[:, None])
        return functools.reduce(jnp.logical_and, parts) if parts else None

    def whole_bias(self, queries: int, keys: int) -> jax.Array | None:
        """bias and diagonals together [B|1, N|1, T, S], or None without both."""
        if self.diagonals is None:
            return self.bias
        spread = toeplitz(self.diagonals, queries, keys)[None]
        return spread if self.bias is None else self.bias + spread


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
    return {"dense": _dense, "chunked": _chunked, "cudnn": _cudnn, "splash": _splash, "flash": _flash}[impl](
        q, k, v, mask, scale
    )


def refusal(impl: str, q: jax.Array, k: jax.Array, mask: Mask) -> str | None:
    """Why `impl` cannot compute this call exactly, or None."""
    queries, keys, width = q.shape[1], k.shape[1], q.shape[-1]
    static_start = isinstance(mask.q_offset, int) and mask.q_offset == 0
    if impl == "chunked" and queries % CHUNK:
        return f"{queries} query slots are not a multiple of {CHUNK}"
    if impl in ("cudnn", "splash") and (mask.diagonals is not None or (mask.drop and dropout.drawing())):
        return f"{impl} takes neither a bias by diagonals nor dropout here"
    if impl == "flash":
        return _flash_refusal(q, k, mask, static_start)
    if impl == "cudnn":
        if q.dtype not in (jnp.bfloat16, jnp.float16):
            return f"cuDNN needs a 16-bit dtype, not {q.dtype}"
        if width % 8 or width > 128:
            return f"cuDNN needs a head width that is a multiple of 8 and at most 128, not {width}"
    if impl == "splash":
        if mask.window is not None or mask.bias is not None:
            return "the splash kernel takes neither a window nor a bias here"
        if queries != keys or queries % 128 or not static_start:
            return f"the splash kernel needs equal query and key slots in multiples of 128, not {queries} and {keys}, and no cache"
    return None


def _flash_refusal(q: jax.Array, k: jax.Array, mask: Mask, static_start: bool) -> str | None:
    if q.shape[1] % LANES or k.shape[1] % LANES or not static_start:
        return f"the flash kernel needs slots in multiples of {LANES}, not {q.shape[1]} and {k.shape[1]}, and no cache"
    if q.shape[-1] > LANES and q.shape[-1] % LANES:
        return f"the flash kernel needs a head width of at most {LANES} or a multiple of it, not {q.shape[-1]}"
    if mask.bias is not None and mask.bias.shape[0] > 1:
        return "the flash kernel takes one bias for all rows here"
    return "the flash kernel has no dropout" if mask.drop and dropout.drawing() else None


def choose(q: jax.Array, k: jax.Array, mask: Mask, platform: str) -> str:
    """The implementation that "auto" means on `platform`."""
    long = q.shape[1] >= 1024
    if platform == "tpu" and q.shape[1] * k.shape[1] >= 1024**2:
        kernel = next((kernel for kernel in ("splash", "flash") if not refusal(kernel, q, k, mask)), None)
        if kernel is not None:
            return kernel
    if platform == "gpu" and q.shape[1] > 1 and not refusal("cudnn", q, k, mask):
        return "cudnn"
    return "chunked" if long and not refusal("chunked", q, k, mask) else "dense"


def _dense(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, scale: float) -> jax.Array:
    shape = q.shape[1], k.shape[1]
    return _scores_and_values(q, k, v, mask.allowed(*shape), mask.whole_bias(*shape), scale, mask.drop, mask.place)


def _scores_and_values(q, k, v, allowed, bias, scale, drop, place) -> jax.Array:
    """Float32 softmax over the allowed scores; grouped heads as [B, K, G, T, S]."""
    B, T, N, H = q.shape
    S, K = k.shape[1], k.shape[2]
    grouped = q.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", grouped * scale, k, preferred_element_type=jnp.float32)
    if bias is not None:
        wide = jnp.broadcast_to(bias, (bias.shape[0], N, T, S)) if bias.shape[1] == 1 else bias
        scores = scores + wide.reshape(bias.shape[0], K, N // K, T, S)
    if allowed is not None:
        scores = jnp.where(allowed[:, :, None], scores, NEGATIVE)
    weights = dropout.dropout(jax.nn.softmax(scores, axis=-1).astype(v.dtype), drop, place)
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights, v).reshape(B, T, N, H)


def _chunked(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, scale: float) -> jax.Array:
    """Dense attention for CHUNK query slots at a time, recomputed in the backward pass."""

    @jax.checkpoint
    def block(i: jax.Array) -> jax.Array:
        some, part = _cut(q, k.shape[1], mask, i, CHUNK)
        with dropout.part(i):
            return _dense(some, k, v, part, scale)

    out = jax.lax.map(block, jnp.arange(q.shape[1] // CHUNK))
    return jnp.moveaxis(out, 0, 1).reshape(q.shape)


def _cut(q: jax.Array, keys: int, mask: Mask, i: jax.Array, size: int) -> tuple[jax.Array, Mask]:
    """Query slots i * size .. (i + 1) * size - 1 and their mask."""

    def cut(x, axis):
        return None if x is None else jax.lax.dynamic_slice_in_dim(x, i * size, size, axis)

    diagonals = mask.diagonals
    if diagonals is not None:
        diagonals = jax.lax.dynamic_slice_in_dim(diagonals, q.shape[1] - (i + 1) * size, size + keys - 1, 1)
    segments, offset = cut(mask.q_segments, 1), mask.q_offset + i * size
    part = dataclasses.replace(mask, q_segments=segments, q_offset=offset, bias=cut(mask.bias, 2), diagonals=diagonals)
    return cut(q, 1), part


def _cudnn(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, scale: float) -> jax.Array:
    """cuDNN's fused kernel through jax.nn; segments become a boolean mask, which is exact and costs T x S bits."""
    return jax.nn.dot_product_attention(
        q, k, v, mask.bias, mask=mask.allowed(q.shape[1], k.shape[1]), scale=scale, implementation="cudnn"
    )


def _splash(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, scale: float, interpret: bool = False) -> jax.Array:
    """TPU splash kernel with segment ids, run per shard: rows over batch axes, heads over the tensor axis."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    T, groups = q.shape[1], q.shape[2] // k.shape[2]
    one = masks.CausalMask((T, T)) if mask.causal else masks.FullMask((T, T))
    kernel = kernels.make_splash_mqa_single_device(masks.MultiHeadMask([one] * groups), interpret=interpret)
    segments = mask.q_segments if mask.q_segments is not None else jnp.ones(q.shape[:2], jnp.int32)

    def rows(q, k, v, ids):  # [b, T, n, H]: kernel over one row and one key head, with its group of query heads
        grouped = (q * scale).reshape(*q.shape[:2], k.shape[2], groups, q.shape[-1])
        heads = jax.vmap(kernel, in_axes=(0, 0, 0, None))
        out = jax.vmap(heads)(
            jnp.einsum("BTKGH->BKGTH", grouped),
            jnp.einsum("BSKH->BKSH", k),
            jnp.einsum("BSKH->BKSH", v),
            kernels.SegmentIds(ids, ids),
        )
        return jnp.einsum("BKGTH->BTKGH", out).reshape(q.shape).astype(q.dtype)

    current = rules.current()
    if current is None:
        return rows(q, k, v, segments)
    mesh, table = current
    batch, heads = rules.spec(("batch", "act_heads"), (q.shape[0], k.shape[2]), mesh, table)
    wide, flat = PartitionSpec(batch, None, heads, None), PartitionSpec(batch, None)
    return jax.shard_map(rows, mesh=mesh, in_specs=(wide, wide, wide, flat), out_specs=wide, check_vma=False)(
        q, k, v, segments
    )


def _flash(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, scale: float) -> jax.Array:
    """TPU flash kernel with bias and segment ids, run per shard; chunk by chunk and row by row where there is a bias.

    The bias of a chunk [N, chunk, S] is made once for all rows; its gradient adds up over them.
    """
    groups = q.shape[2] // k.shape[2]
    k, v = (k, v) if groups == 1 else (jnp.repeat(x, groups, axis=2) for x in (k, v))
    of_q, of_k = mask.q_segments, mask.k_segments
    if of_q is None:
        of_q, of_k = (jnp.ones(x.shape[:2], jnp.int32) for x in (q, k))
    size, apart = _block(q.shape[1], BIASED), dataclasses.replace(mask, q_segments=None, k_segments=None)

    def rows(q, k, v, of_q, of_k, diagonals, bias):
        here = dataclasses.replace(apart, diagonals=diagonals, bias=bias)
        if not here.causal and here.window is None and here.diagonals is None and here.bias is None:
            return _flash_kernel(q, k, v, of_q, of_k, None, scale)

        @jax.checkpoint
        def block(i: jax.Array) -> jax.Array:
            some, part = _cut(q, k.shape[1], here, i, size)
            ids = jax.lax.dynamic_slice_in_dim(of_q, i * size, size, 1)
            added = _added(part, size, k.shape[1], q.shape[2])

            def row(one: tuple) -> jax.Array:
                return _flash_kernel(*(x[None] for x in one), added, scale)[0]

            return jax.lax.map(row, (some, k, v, ids, of_k))

        out = jax.lax.map(block, jnp.arange(q.shape[1] // size))
        return jnp.moveaxis(out, 0, 1).reshape(q.shape)

    arrays = q, k, v, of_q, of_k, mask.diagonals, mask.bias
    current = rules.current()
    if current is None:
        return rows(*arrays)
    mesh, table = current
    batch, heads = rules.spec(("batch", "act_heads"), (q.shape[0], q.shape[2]), mesh, table)
    wide, flat = PartitionSpec(batch, None, heads, None), PartitionSpec(batch, None)
    own = heads if mask.bias is not None and mask.bias.shape[1] > 1 else None
    specs = wide, wide, wide, flat, flat, PartitionSpec(heads, None), PartitionSpec(None, own, None, None)
    return jax.shard_map(rows, mesh=mesh, in_specs=specs, out_specs=wide, check_vma=False)(*arrays)


def _added(mask: Mask, queries: int, keys: int, heads: int) -> jax.Array:
    """What is added to the scores, float32 [1, N, T, S]: the bias, and NEGATIVE where nobody may look; without segments."""
    allowed, bias = mask.allowed(queries, keys), mask.whole_bias(queries, keys)
    bias = jnp.zeros((), jnp.float32) if bias is None else bias.astype(jnp.float32)
    made = bias if allowed is None else jnp.where(allowed, bias, NEGATIVE)
    return jnp.broadcast_to(made, (1, heads, queries, keys))


def _flash_kernel(q, k, v, of_q, of_k, added, scale) -> jax.Array:
    """q [B, T, N, H], k and v [B, S, N, H], segments [B, T] and [B, S], added [B, N, T, S] or None -> [B, T, N, H]."""
    from jax.experimental.pallas.ops.tpu import flash_attention as kernels

    t, s = _block(q.shape[1]), _block(k.shape[1])
    sizes = kernels.BlockSizes(t, s, s, 1, t, s, s, t, s, s, t)
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q * scale, k, v))
    out = kernels.flash_attention(q, k, v, added, kernels.SegmentIds(of_q, of_k), block_sizes=sizes)
    return jnp.swapaxes(out, 1, 2).astype(v.dtype)


def _block(slots: int, most: int = 4 * LANES) -> int:
    """The largest block of at most `most` slots that divides `slots`, a multiple of LANES."""
    return next(size for size in (4 * LANES, 2 * LANES, LANES) if size <= most and slots % size == 0)

"""Context parallelism: the slots of a row lie over the mesh axis `seq`; every device has all keys of a layer, and its own queries.

    all-gather   k, v [b, S / n, K, H] -> [b, S, K, H], in the backward pass their gradients are summed and scattered
    compute      query slots i * T / n ... of device i against all keys, by whichever implementation takes them

Any mask works unchanged, and keys and values of one layer are small beside all else (Llama Team 2024, section 3.3.2). A layer of 32768
slots on 8 v5e chips, 32 heads of 128, forward and backward, is compiled to 1.05 GiB a chip, with 8 key heads to 0.40, and with all slots
on every chip to 2.03. The buffers of a ring would come to 0.44 GiB, but no public kernel has both part of a softmax and its gradient.

Under a causal mask the last device would have nearly twice the average work, so the splash kernel's queries are exchanged before and
their results behind it: rows are cut into 2n halves, and device i computes halves i and 2n - 1 - i.

      four devices     0 1 | 2 3 | 4 5 | 6 7   ->   0 7 | 1 6 | 2 5 | 3 4
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vlm_jax.nn import attention_plain, attention_tpu, dropout
from vlm_jax.nn.masks import Mask
from vlm_jax.parallel import rules


def split_over(slots: int) -> int:
    """Devices over which a row of `slots` slots lies under the mesh in use; 1 where it is whole."""
    current = rules.current()
    if current is None:
        return 1
    (length,) = rules.spec(("length",), (slots,), *current)
    return int(np.prod([current[0].shape[axis] for axis in rules.axes_of(length)]))


def refusal(q: jax.Array, k: jax.Array, mask: Mask) -> str | None:
    """Why this call cannot be computed with its queries over devices, or None."""
    T, parts = q.shape[1], split_over(q.shape[1])
    if parts == 1:
        return f"its {T} query slots do not lie over several devices (mesh.seq, which must divide them)"
    chunk = attention_plain.chunk_of(T)
    if mask.drop and dropout.drawing() and T >= attention_plain.LONG and chunk and T // parts % chunk:
        return f"dropout is drawn for {chunk} query slots at a time, which do not divide {T} slots on {parts} devices"
    return None


def inner(q: jax.Array, k: jax.Array, mask: Mask, takes: Callable[[str], bool], platform: str) -> str:
    """What computes the part of one device; takes(name): whether implementation `name` computes the call."""
    own = q.shape[1] // split_over(q.shape[1])
    fits = own % attention_tpu.LANES == 0 and k.shape[1] % attention_tpu.LANES == 0
    if platform == "tpu" and fits:
        kernel = attention_tpu.kernel_for(q, k, takes)
        if kernel is not None:
            return kernel
    if platform == "gpu" and takes("cudnn"):
        return "cudnn"
    chunk = attention_plain.chunk_of(q.shape[1])
    return "chunked" if q.shape[1] >= attention_plain.LONG and chunk and own % chunk == 0 else "dense"


def context(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, scale: float, name: str) -> jax.Array:
    """Arguments and result of `nn.attention.attention`; name: what `inner` said."""
    if name == "dense":
        q = rules.shard(q, "batch", "length", "act_heads", None)
        k, v = (rules.shard(x, "batch", None, "act_heads", None) for x in (k, v))
        return rules.shard(attention_plain.dense(q, k, v, mask, scale), "batch", "length", "act_heads", None)
    mesh, table = rules.current()
    shape = q.shape[0], q.shape[1], k.shape[2]
    batch, length, heads = rules.spec(("batch", "length", "act_heads"), shape, mesh, table)
    if name == "chunked":  # rows and heads stay whole for its dropout, which then is that of one device
        own = rules.axes_of(length)
        return _apart(name, q, k, v, mask, scale, _Shards(mesh, (), own, (), set(own)))
    shards = _Shards(mesh, rules.axes_of(batch), rules.axes_of(length), rules.axes_of(heads), set(mesh.axis_names))
    if name == "splash":
        return _splash(q, k, v, mask, scale, shards)
    return _apart(name, q, k, v, mask, scale, shards)


@dataclasses.dataclass(frozen=True)
class _Shards:
    """Mesh axes over which rows, slots and heads lie, and those that the program inside handles itself."""

    mesh: Mesh
    batch: tuple[str, ...]
    length: tuple[str, ...]
    heads: tuple[str, ...]
    manual: set[str]

    @property
    def parts(self) -> int:
        """Devices of a row."""
        return int(np.prod([self.mesh.shape[axis] for axis in self.length]))

    @property
    def wide(self) -> PartitionSpec:
        """Of the queries and the result."""
        return PartitionSpec(self.batch, self.length, self.heads, None)

    def keys(self, slots: int) -> tuple[tuple[str, ...], Callable[[jax.Array], jax.Array]]:
        """(axes of key slots outside, what makes them whole inside); slots that do not divide are whole already."""
        if slots % self.parts:
            return (), lambda x: x
        return self.length, lambda x: jax.lax.all_gather(x, self.length, axis=1, tiled=True)

    def run(self, part: Callable, specs: tuple, *arrays) -> jax.Array:
        """part(index of this device in its row, its parts of the arrays) on every device."""

        def inside(*own):
            return part(jax.lax.axis_index(self.length), *own)

        return jax.shard_map(
            inside, mesh=self.mesh, in_specs=specs, out_specs=self.wide, check_vma=False, axis_names=self.manual
        )(*arrays)


def _apart(name: str, q, k, v, mask: Mask, scale: float, shards: _Shards) -> jax.Array:
    """Every device computes its rows of the mask by chunked, cudnn or flash."""
    of_q, of_k = attention_tpu.segments_of(q, k, mask)
    mask = dataclasses.replace(mask, q_segments=of_q, k_segments=of_k, q_offset=jnp.asarray(mask.q_offset))
    T, S, size, chunk = q.shape[1], k.shape[1], q.shape[1] // shards.parts, attention_plain.chunk_of(q.shape[1])
    keys, whole = shards.keys(S)
    wide = PartitionSpec(shards.batch, keys, shards.heads, None)
    specs = shards.wide, wide, wide, attention_tpu.mask_spec(mask, shards.batch, shards.heads, shards.length, keys)

    def part(index: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask) -> jax.Array:
        bare = dataclasses.replace(mask, q_segments=None, k_segments=None).rows(T, S, index, size)
        here = dataclasses.replace(bare, q_segments=mask.q_segments, k_segments=whole(mask.k_segments))
        arguments = q, whole(k), whole(v), here, scale
        if name == "chunked":
            return attention_plain.chunked(*arguments, first=index * (size // chunk), size=chunk)
        return {"cudnn": attention_plain.cudnn, "flash": attention_tpu.flash_rows}[name](*arguments)

    return shards.run(part, specs, q, k, v, mask)


def _splash(q, k, v, mask: Mask, scale: float, shards: _Shards) -> jax.Array:
    of_q, of_k = attention_tpu.segments_of(q, k, mask)
    T, parts = q.shape[1], shards.parts
    _, whole = shards.keys(T)
    exchanged = mask.causal and T // parts % (2 * attention_tpu.LANES) == 0
    order = _exchanged_order(T, parts) if exchanged else None
    kernel = attention_tpu.splash_kernel(mask, T, q.shape[2] // k.shape[2], parts, order)
    of_kernel = kernel.manual_sharding_spec(NamedSharding(shards.mesh, PartitionSpec(None, shards.length)))
    flat = PartitionSpec(shards.batch, shards.length)

    def part(index, q, k, v, of_q, of_k, kernel):
        q = q * scale
        if exchanged:
            q, of_q = (_exchange(x, index, shards) for x in (q, of_q))
        out = attention_tpu.splash_rows(kernel, q, whole(k), whole(v), of_q, whole(of_k))
        return _exchange_back(out, index, shards) if exchanged else out

    return shards.run(part, (shards.wide,) * 3 + (flat, flat, of_kernel), q, k, v, of_q, of_k, kernel)


def _exchanged_order(slots: int, parts: int) -> np.ndarray:
    """Index of every query slot once halves i and 2n - 1 - i are on device i."""
    halves = np.arange(slots).reshape(2 * parts, -1)
    return np.concatenate([halves[half] for i in range(parts) for half in (i, 2 * parts - 1 - i)])


def _destinations(parts: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(from, to) of the first and of the second half of every device: of even and of odd halves."""
    return tuple(
        [(i, half if half < parts else 2 * parts - 1 - half) for i, half in enumerate(range(first, 2 * parts, 2))]
        for first in (0, 1)
    )


def _exchange(x: jax.Array, index: jax.Array, shards: _Shards) -> jax.Array:
    """x [b, t, ...], halves 2i and 2i + 1 of a row -> halves i and 2n - 1 - i."""
    even, odd = (
        jax.lax.ppermute(half, shards.length, to) for half, to in zip(jnp.split(x, 2, 1), _destinations(shards.parts))
    )
    early = index % 2 == 0  # half i is an even one, which came as such
    return jnp.concatenate([jnp.where(early, even, odd), jnp.where(early, odd, even)], axis=1)


def _exchange_back(x: jax.Array, index: jax.Array, shards: _Shards) -> jax.Array:
    """The inverse of `_exchange`."""
    first, second = jnp.split(x, 2, 1)
    early = index % 2 == 0
    halves = jnp.where(early, first, second), jnp.where(early, second, first)
    back = [[(to, source) for source, to in pairs] for pairs in _destinations(shards.parts)]
    return jnp.concatenate([jax.lax.ppermute(half, shards.length, to) for half, to in zip(halves, back)], axis=1)

"""Logical axis names -> mesh axes: the one table that says what is sharded over what.

Parameters and activations name *logical* axes ("embed", "mlp", "batch"); only this file and `mesh` know the mesh axes
`data, fsdp, tensor, seq`. Without a mesh in use every function here is a no-op, so models run unchanged on one device.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Iterator, Mapping, Sequence

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Rules = Mapping[str, tuple[str, ...]]

# Parameter axes first, then activation axes. A name that is absent is not sharded.
DEFAULT_RULES: Rules = {
    "vocab": ("tensor",),
    "embed": ("fsdp", "seq"),  # devices that share a row share the parameters too
    "mlp": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "batch": ("data", "fsdp"),
    "length": ("seq",),
    "act_heads": ("tensor",),
    "act_mlp": ("tensor",),
    "act_vocab": ("tensor",),
}

_current: contextvars.ContextVar[tuple[Mesh, Rules] | None] = contextvars.ContextVar("mesh_and_rules", default=None)
_usual: contextvars.ContextVar[bool] = contextvars.ContextVar("usual_ways", default=False)


@contextlib.contextmanager
def use(mesh: Mesh, rules: Rules = DEFAULT_RULES) -> Iterator[Mesh]:
    """Trace and run everything inside under `mesh`; `shard` then resolves logical names through `rules`."""
    token = _current.set((mesh, rules))
    try:
        # constants are computed while a program is traced, which devices that are not there cannot do
        with jax.set_mesh(mesh) if _exists(mesh) else jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            yield mesh
    finally:
        _current.reset(token)


@contextlib.contextmanager
def usual_ways() -> Iterator[None]:
    """Trace everything inside without what is special to one platform: to count work, not to do it."""
    token = _usual.set(True)
    try:
        yield
    finally:
        _usual.reset(token)


def _exists(mesh: Mesh) -> bool:
    """Whether this process can use the mesh's devices; programs are also compiled for those of a topology alone."""
    first = mesh.devices.flat[0]
    try:
        return first in jax.devices(first.platform)
    except RuntimeError:
        return False


def current() -> tuple[Mesh, Rules] | None:
    """The mesh and rules in use, or None."""
    return _current.get()


def platform() -> str:
    """Where the program that is being traced will run: "cpu", "gpu" or "tpu". A mesh may be of devices that are not there.

    GPUs that are not there are "absent gpu": kernels of libraries that ask the GPU itself cannot be compiled for them. "any": `usual_ways`.
    """
    if _usual.get():
        return "any"
    current = _current.get()
    name = jax.default_backend() if current is None else current[0].devices.flat[0].platform
    name = "gpu" if name in ("cuda", "rocm") else name
    return "absent gpu" if name == "gpu" and current is not None and not _exists(current[0]) else name


def alone() -> bool:
    """Whether the program that is being traced will run on a single device."""
    current = _current.get()
    return current is None or current[0].size == 1


def free_axes() -> set[str]:
    """Axes of the mesh in use that no enclosing shard_map has taken."""
    mesh = jax.sharding.get_abstract_mesh()
    return set(mesh.axis_names) - set(mesh.manual_axes)


def spec(axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh, rules: Rules = DEFAULT_RULES) -> PartitionSpec:
    """PartitionSpec of an array of `shape` with logical `axes`.

    A mesh axis is used at most once (first dimension wins). Where the mesh axes do not divide a dimension the last of them are left
    out until the others do, because jit refuses uneven shards at its boundary.
    """
    taken: set[str] = set()
    out: list[tuple[str, ...] | None] = []
    for name, size in zip(axes, shape, strict=True):
        names = tuple(a for a in rules.get(name, ()) if mesh.shape.get(a, 1) > 1 and a not in taken) if name else ()
        while size % math.prod(mesh.shape[a] for a in names):
            names = names[:-1]
        taken.update(names)
        out.append(names or None)
    return PartitionSpec(*out)


def axes_of(entry: str | Sequence[str] | None) -> tuple[str, ...]:
    """Mesh axes of one dimension of a PartitionSpec."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def sharding(
    axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh, rules: Rules = DEFAULT_RULES
) -> NamedSharding:
    """NamedSharding of an array with logical `axes`; see `spec`."""
    return NamedSharding(mesh, spec(axes, shape, mesh, rules))


def shard(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrain `x` to its logical axes under the mesh in use; identity without one."""
    current = _current.get()
    if current is None:
        return x
    mesh, rules = current
    return jax.lax.with_sharding_constraint(x, sharding(axes, x.shape, mesh, rules))

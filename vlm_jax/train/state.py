"""Train state: what an update reads and writes, as flat dicts of arrays created where they will live.

step int32 | trainable {path: float32} | frozen {path: frozen_dtype} | opt_state (moments of trainable) |
rng uint32 [2]
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from vlm_jax.config import ConfigError, VLMConfig
from vlm_jax.models import vlm
from vlm_jax.nn.params import Params
from vlm_jax.parallel import rules
from vlm_jax.train import optimizer
from vlm_jax.train.options import TrainConfig


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["step", "trainable", "frozen", "opt_state", "rng"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class TrainState:
    """See the module docstring; `step` counts finished updates."""

    step: Any
    trainable: dict[str, Any]
    frozen: dict[str, Any]
    opt_state: Any
    rng: Any

    @property
    def params(self) -> Params:
        """Trainable and frozen parameters together."""
        return {**self.frozen, **self.trainable}


class LeafSource(Protocol):
    """Weights outside the program, read by path and slice, so that no host ever holds a whole model."""

    def __contains__(self, path: str) -> bool:
        """Whether the parameter is there; others start at random."""

    def read(self, path: str, index: tuple[slice, ...]) -> np.ndarray:
        """The slice `index` of the parameter."""


def select(patterns: Iterable[str], paths: Iterable[str]) -> set[str]:
    """Paths that any of `patterns` finds (each must find one); uncomputed tower parts are never trained."""
    paths = [path for path in paths if not path.startswith("tower/unused/")]
    found: set[str] = set()
    for pattern in patterns:
        matched = {path for path in paths if re.search(pattern, path)}
        if not matched:
            heads = ", ".join(sorted({"/".join(path.split("/")[:2]) for path in paths}))
            raise ConfigError(f"train.trainable has {pattern!r}, which matches no parameter: there are {heads}")
        found |= matched
    return found


def abstract(model: VLMConfig, config: TrainConfig) -> TrainState:
    """Shapes, dtypes and (under a mesh) shardings of the state; nothing is allocated."""
    shapes = vlm.shapes(model)
    chosen = select(config.trainable, shapes)
    trainable = {p: jax.ShapeDtypeStruct(s.shape, jnp.float32) for p, s in shapes.items() if p in chosen}
    frozen = {p: jax.ShapeDtypeStruct(s.shape, config.frozen_dtype) for p, s in shapes.items() if p not in chosen}
    opt_state = jax.eval_shape(optimizer.moments(config).init, trainable)
    scalar, key = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((2,), jnp.uint32)
    state = TrainState(scalar, trainable, frozen, opt_state, key)
    where = shardings(model, config)
    if where is None:
        return state
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, where)


def shardings(model: VLMConfig, config: TrainConfig) -> TrainState | None:
    """NamedSharding of every array of the state under the mesh in use, None without one."""
    leaves = vlm.shardings(model)
    if leaves is None:
        return None
    replicated = NamedSharding(rules.current()[0], PartitionSpec())
    shapes = vlm.shapes(model)
    chosen = select(config.trainable, shapes)
    trainable = {p: leaves[p] for p in shapes if p in chosen}
    frozen = {p: leaves[p] for p in shapes if p not in chosen}
    moments = optimizer.state_shardings(config, {p: shapes[p] for p in trainable}, trainable, replicated)
    return TrainState(replicated, trainable, frozen, moments, replicated)


def initialiser(model: VLMConfig, config: TrainConfig, paths: Iterable[str] | None = None) -> Callable[[], Params]:
    """Jitted () -> random parameters at `paths` (default: all) in the state's dtypes, created sharded."""
    goal = abstract(model, config).params
    wanted = sorted(goal if paths is None else paths)
    dtypes = {path: goal[path].dtype for path in wanted}
    where = {path: goal[path].sharding for path in wanted} if rules.current() else None

    def make() -> Params:
        params = vlm.init(model, config.seed, dtypes)
        return {path: params[path] for path in wanted}  # the compiler removes the others, random bits and all

    return jax.jit(make, out_shardings=where)


def create(model: VLMConfig, config: TrainConfig, source: LeafSource | None = None) -> TrainState:
    """A sharded state at step 0: parameters from `source` where it has them, the rest random."""
    goal = abstract(model, config)
    from_source = [path for path in goal.params if source is not None and path in source]
    missing = set(goal.params) - set(from_source)
    params = initialiser(model, config, missing)() if missing else {}
    params |= {path: _place(source, path, goal.params[path]) for path in from_source}
    return assemble(model, config, params)


def assemble(model: VLMConfig, config: TrainConfig, params: Params) -> TrainState:
    """State at step 0 around parameters that are in place already."""
    goal, where = abstract(model, config), shardings(model, config)
    trainable = {path: params[path] for path in goal.trainable}
    frozen = {path: params[path] for path in goal.frozen}
    start = jax.jit(optimizer.moments(config).init, out_shardings=where and where.opt_state)
    rest = jax.jit(
        lambda: (jnp.zeros((), jnp.int32), jax.random.key_data(jax.random.key(config.seed))),
        out_shardings=where and (where.step, where.rng),
    )
    step, rng = rest()
    return TrainState(step, trainable, frozen, start(trainable), rng)


def _place(source: LeafSource, path: str, goal: jax.ShapeDtypeStruct) -> jax.Array:
    """One parameter from the source to its devices, each device reading only its slice."""

    def slice_of(index: tuple[slice, ...]) -> np.ndarray:
        return np.asarray(source.read(path, index)).astype(goal.dtype)

    if goal.sharding is None:
        return jnp.asarray(slice_of(tuple(slice(0, n) for n in goal.shape)))
    return jax.make_array_from_callback(goal.shape, goal.sharding, slice_of)

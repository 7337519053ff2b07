"""Train state: what an update reads and writes, as flat dicts of arrays created where they will live.

step int32 | trainable {path: float32} | frozen {path: frozen_dtype} | opt_state (moments of trainable) |
rng uint32 [2] | moving {path: array}, what an update changes without an optimizer (of visual tokenizers)

Frozen leaves that mean something only in their own type keep it: codes and scales of quantised kernels, scales of adapters.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from vlm_jax.config import ConfigError, VLMConfig
from vlm_jax.models import vlm
from vlm_jax.models.adapters import LORA_A, LORA_SCALE, UNUSED, stored_dtype
from vlm_jax.models.placing import place
from vlm_jax.models.quantised import LeafSource, quantised
from vlm_jax.nn.params import Params
from vlm_jax.nn.quantise import is_quantised
from vlm_jax.parallel import rules
from vlm_jax.train import optimizer
from vlm_jax.train.options import TrainConfig


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["step", "trainable", "frozen", "opt_state", "rng", "moving"],
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
    moving: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def params(self) -> Params:
        """Trainable and frozen parameters together."""
        return {**self.frozen, **self.trainable}


def select(patterns: Iterable[str], paths: Iterable[str]) -> set[str]:
    """Paths that any of `patterns` finds (each must find one); uncomputed tower parts and scales of adapters are never trained."""
    paths = [path for path in paths if not path.startswith(UNUSED) and not path.endswith(f"/{LORA_SCALE}")]
    found: set[str] = set()
    for pattern in patterns:
        matched = {path for path in paths if re.search(pattern, path)}
        if not matched:
            heads = ", ".join(sorted({"/".join(path.split("/")[:2]) for path in paths}))
            raise ConfigError(f"train.trainable has {pattern!r}, which matches no parameter: there are {heads}")
        codes = sorted(filter(is_quantised, matched))
        if codes:
            linear = codes[0].rpartition("/")[0]
            raise ConfigError(
                f"train.trainable has {pattern!r}, which trains {linear}, but model.quant stores its kernel in codes that cannot be "
                r"trained: train adapters with model.lora and '/lora_[ab]$', or take it out of model.quant.targets"
            )
        found |= matched
    return found


def chosen(model: VLMConfig, config: TrainConfig) -> set[str]:
    """Paths of the parameters of `model` that a run changes."""
    shapes = vlm.shapes(model)
    biases = {path for path in shapes if path.endswith("/bias") and not path.startswith(UNUSED)}
    if config.lora_bias == "lora_only":
        biases = {path for path in biases if f"{path.removesuffix('/bias')}/{LORA_A}" in shapes}
    return select(config.trainable, shapes) | (set() if config.lora_bias == "none" else biases)


def abstract(model: VLMConfig, config: TrainConfig) -> TrainState:
    """Shapes, dtypes and (under a mesh) shardings of the state; nothing is allocated."""
    shapes, trained = vlm.shapes(model), chosen(model, config)
    trainable = {p: jax.ShapeDtypeStruct(s.shape, jnp.float32) for p, s in shapes.items() if p in trained}
    frozen = {
        p: jax.ShapeDtypeStruct(s.shape, stored_dtype(p, jnp.dtype(config.frozen_dtype), s.dtype))
        for p, s in shapes.items()
        if p not in trained
    }
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
    shapes, trained = vlm.shapes(model), chosen(model, config)
    trainable = {p: leaves[p] for p in shapes if p in trained}
    frozen = {p: leaves[p] for p in shapes if p not in trained}
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
    """A sharded state at step 0: parameters from `source` where it has them, the rest random. Kernels are quantised as they are read."""
    goal = abstract(model, config)
    source = quantised(source, model)
    from_source = [path for path in goal.params if source is not None and path in source]
    missing = set(goal.params) - set(from_source)
    params = initialiser(model, config, missing)() if missing else {}
    params |= {path: place(source, path, goal.params[path]) for path in from_source}
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

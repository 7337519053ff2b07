"""Which linears of a model have adapters and quantised kernels: patterns of the config over the paths of linears.

attach(model, config)    gives every matching linear its leaves, after the model is built and its blocks are stacked
groups_of(ranks, ...)    the config of several adapters that lie side by side on one model
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
from flax import nnx

from vlm_jax.config import ConfigError, LoRAConfig, VLMConfig
from vlm_jax.models import scratch
from vlm_jax.nn import quantise
from vlm_jax.nn.dropout import place_of
from vlm_jax.nn.layers import Linear

LORA_A, LORA_B, LORA_SCALE = LEAVES = ("lora_a", "lora_b", "lora_scale")
UNUSED = "tower/unused/"


def linears(model: nnx.Module) -> dict[str, Linear]:
    """{"llm/blocks/attn/q": linear} of every linear in a model."""
    found = {"/".join(map(str, path)): node for path, node in nnx.iter_graph(model) if isinstance(node, Linear)}
    return dict(sorted(found.items()))


def matching(key: str, patterns: Iterable[str], paths: Iterable[str]) -> set[str]:
    """Paths that any of `patterns` finds; ConfigError naming `key` if one finds none."""
    found: set[str] = set()
    paths = list(paths)
    for pattern in patterns:
        matched = {path for path in paths if re.search(pattern, path)}
        if not matched:
            there = ", ".join(path for path in paths if not path.startswith(UNUSED))
            raise ConfigError(f"{key} has {pattern!r}, which matches no linear: there are {there}")
        found |= matched
    return found


def group_of_linear(config: VLMConfig, paths: Iterable[str]) -> dict[str, LoRAConfig]:
    """{path: its adapter} of the linears at `paths` that have one: the first group that matches."""
    paths, out = list(paths), {}
    for group in config.lora:
        for path in sorted(matching("model.lora.targets", group.targets, paths)):
            out.setdefault(path, group)
    return out


def attach(model: nnx.Module, config: VLMConfig, seed: int) -> nnx.Module:
    """`model` whose linears have what `config.lora` and `config.quant` give them; random numbers depend on `seed` and the path."""
    found = linears(model)
    for path, group in group_of_linear(config, found).items():
        linear = found[path]
        if group.dropout and not linear.called:
            raise ConfigError(
                f"model.lora.dropout={group.dropout} cannot be applied to {path}, whose inputs the loss reads: "
                "give it a group with dropout=0, or leave it out of model.lora.targets"
            )
        linear.adapt(group, _key(seed, f"{path}/lora_a"), place_of(path))
    if config.quant is not None:
        for path in sorted(matching("model.quant.targets", config.quant.targets, found)):
            linear = found[path]
            quantise.check(path, linear.shape[-2], config.quant)
            name = f"{path}/{quantise.KERNEL}"
            std = scratch.standard_deviation(name, linear.shape, config) if config.init == "scratch" else None
            linear.store(config.quant, _key(seed, name), linear.std if std is None else std)
    return model


def side_by_side(ranks: Mapping[str, int]) -> tuple[LoRAConfig, ...]:
    """Groups that give every linear the rank {path: rank}; their scales are 1 until lora_scale is set."""
    found: dict[int, list[str]] = {}
    for path, rank in sorted(ranks.items()):
        found.setdefault(rank, []).append(f"^{re.escape(path)}$")
    return tuple(LoRAConfig(tuple(paths), rank, float(rank)) for rank, paths in found.items())


def stored_dtype(path: str, wanted: Any, own: Any) -> Any:
    """Type of a parameter that is to be kept in `wanted`: codes and scales mean something only in their `own`."""
    return own if quantise.is_quantised(path) or path.endswith(f"/{LORA_SCALE}") else wanted


def _key(seed: int, path: str) -> jax.Array:
    return jax.random.fold_in(jax.random.key(seed), place_of(path))

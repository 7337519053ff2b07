"""AdamW with parameter groups by path, learning-rate schedules, clipping, and the sharding of its state.

    g' = g min(1, clip / (|g| + 1e-6));   u = adam(g') + decay p;   p <- p - lr_group factor(update) u

(Loshchilov & Hutter 2019; the clipping factor is torch's clip_grad_norm_.) The schedule is plain Python
arithmetic: its value is an argument of the jitted step, so what is logged is what was used.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vlm_jax.nn.params import Params
from vlm_jax.train.options import RunConfig, TrainConfig


def schedule(step: int, total: int, warmup: int, kind: str, decay: int = 0) -> float:
    """HF's schedules: linear warm-up over `warmup` steps; cosine or linear to 0 at `total`, or constant.

    "wsd" (warm-up, stable, decay; Hu et al. 2024, MiniCPM) is constant until the last `decay` steps, then linear to 0.
    """
    if step < warmup:
        return step / max(1, warmup)
    progress = (step - warmup) / max(1, total - warmup)
    decays: dict[str, Callable[[float], float]] = {
        "cosine": lambda x: 0.5 * (1.0 + math.cos(math.pi * x)),
        "linear": lambda x: 1.0 - x,
        "constant": lambda x: 1.0,
        "wsd": lambda _: min(1.0, (total - step) / max(1, decay)),
    }
    return max(0.0, decays[kind](progress))


def rate_factor(config: TrainConfig, update: int, total: int) -> float:
    """What multiplies every group's learning rate in update 0, 1, ... total-1."""
    warmup = config.warmup(total)
    decay = math.ceil(total * config.decay_ratio)
    if config.compat.zero_first_lr:
        return schedule(update, total, warmup, config.schedule, decay)
    return schedule(update + 1, total + 1, warmup, config.schedule, decay)


def group_lr(config: RunConfig, path: str) -> float:
    """Peak learning rate of the parameter at `path`."""
    return next((lr for pattern, lr in config.group_lrs if re.search(pattern, path)), config.lr)


def group_decay(config: RunConfig, path: str) -> float:
    """Weight decay of the parameter at `path`: none for biases and norm scales."""
    return 0.0 if any(re.search(pattern, path) for pattern in config.no_decay) else config.weight_decay


def groups(config: RunConfig, paths: Iterable[str]) -> dict[tuple[float, float], list[str]]:
    """{(peak learning rate, weight decay): paths}, for the run's log."""
    out: dict[tuple[float, float], list[str]] = {}
    for path in sorted(paths):
        out.setdefault((group_lr(config, path), group_decay(config, path)), []).append(path)
    return out


def moments(config: RunConfig) -> optax.GradientTransformation:
    """Adam's preconditioner; rates and decay are applied in `updates`."""
    return optax.scale_by_adam(config.beta1, config.beta2, config.eps, mu_dtype=config.moment_dtype)


def global_norm(tree: Any) -> jax.Array:
    """Euclidean norm of all leaves together, float32."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)))


def updates(
    config: RunConfig, grads: Params, opt_state: optax.OptState, params: Params, factor: jax.Array
) -> tuple[Params, optax.OptState, jax.Array]:
    """(what to add to `params`, new optimizer state, norm of the gradients before clipping)."""
    norm = global_norm(grads)
    if config.clip_norm is not None:
        scale = jnp.minimum(1.0, config.clip_norm / (norm + 1e-6))
        grads = {path: g * scale for path, g in grads.items()}
    directions, opt_state = moments(config).update(grads, opt_state, params)
    steps = {}
    for path, direction in directions.items():
        decay = group_decay(config, path)
        direction = direction + decay * params[path] if decay else direction
        steps[path] = -factor * group_lr(config, path) * direction
    return steps, opt_state, norm


def state_shardings(config: RunConfig, params: Mapping[str, Any], shardings: Mapping[str, Any], replicated: Any) -> Any:
    """NamedShardings of the optimizer state: each moment like its parameter (jit alone leaves it whole).

    params: {path: shape and dtype}.
    """
    transform = moments(config)
    state = jax.eval_shape(transform.init, dict(params))
    return optax.tree_utils.tree_map_params(
        transform, lambda _, s: s, state, dict(shardings), transform_non_params=lambda _: replicated
    )

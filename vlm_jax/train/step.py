"""The training step: one jitted function (state, batch, rate factor) -> (state, metrics).

    batch leaves [A, B, ...]: A micro-batches of B rows (keys: data.packing), gradients summed by a scan
    global_tokens   g = d/dp (sum of all losses / number of all supervised tokens)
    per_microbatch  g = d/dp (1/A) sum_a (losses of a / tokens of a)

Only trainable leaves are differentiated. Metrics are sums, counts and norms; the host divides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from vlm_jax.config import ConfigError, VLMConfig
from vlm_jax.models import vlm
from vlm_jax.nn.dropout import dropout_key
from vlm_jax.nn.params import Params
from vlm_jax.parallel import rules
from vlm_jax.train import optimizer
from vlm_jax.train.losses import cross_entropy
from vlm_jax.train.options import TrainConfig
from vlm_jax.train.state import TrainState, shardings

# logical axes of a row batch behind the accumulation axis
SLOTS = ("tokens", "image_slots", "targets", "weights", "segments", "positions")
ANSWER_SLOTS = tuple(f"answer_{key}" for key in ("tokens", "targets", "weights", "segments", "positions"))
Axes = Mapping[str, tuple[str | None, ...]]
BATCH_AXES: Axes = {key: ("batch", "length") for key in SLOTS + ANSWER_SLOTS} | {
    "images": ("batch", None, None, None, None),
    "features": ("batch", None, None, None),
}

Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]
Step = Callable[[TrainState, Batch, Any], tuple[TrainState, Metrics]]


def compute_of(config: TrainConfig) -> vlm.Compute:
    """The forward pass's dtypes, attention and rematerialisation of a run."""
    return vlm.Compute(config.dtype, config.vision_dtype, config.attention, config.remat)


def batch_shardings(shapes: Mapping[str, tuple[int, ...]], axes: Axes = BATCH_AXES) -> dict[str, NamedSharding] | None:
    """NamedSharding of batch arrays [A, B, ...]: rows over `data` and `fsdp`, slots over `seq`; axes: logical ones behind A."""
    current = rules.current()
    if current is None:
        return None
    mesh, table = current
    over = [a for a in table.get("batch", ()) if mesh.shape.get(a, 1) > 1]
    parts = int(np.prod([mesh.shape[a] for a in over]))
    rows = next(iter(shapes.values()))[1]
    if rows % parts:
        raise ConfigError(
            f"train.global_batch / train.accum = {rows} rows cannot be divided among the {parts} devices "
            f"of mesh axes {' and '.join(over)}: make it a multiple of {parts}"
        )
    return {key: rules.sharding((None, *axes[key]), shape, mesh, table) for key, shape in shapes.items()}


def loss_and_gradients(
    model: VLMConfig,
    config: TrainConfig,
    trainable: Params,
    frozen: Params,
    batch: Batch,
    key: jax.Array | None = None,
) -> tuple[Params, Metrics]:
    """(gradients sharded like the parameters, sums of losses and counts) of a batch [A, B, ...]; key: of dropout, None for none."""
    _, weights = supervised(model, batch)
    micros = weights.shape[0]
    if config.compat.loss_normalisation == "per_microbatch":
        scales = 1 / (micros * jnp.maximum(jnp.sum(weights, axis=(1, 2)), 1.0))
    else:
        scales = jnp.full(micros, 1 / jnp.maximum(jnp.sum(weights), 1.0))

    keys = None if key is None else jax.random.split(key, micros)

    def micro_loss(trainable: Params, micro: Batch, scale: jax.Array, key: jax.Array | None) -> tuple[jax.Array, Any]:
        net = vlm.build(model, {**frozen, **trainable})
        with dropout_key(key):
            hidden = vlm.forward(net, micro, compute_of(config))
        sums = cross_entropy(
            hidden, net.llm.head_kernel(), *supervised(model, micro), config.loss_chunk, config.compat.logits_dtype
        )
        return sums.loss * scale, sums

    def gradients(micro: Batch, scale: jax.Array, key: jax.Array | None) -> tuple[Params, Any]:
        grads, sums = jax.grad(micro_loss, has_aux=True)(trainable, micro, scale, key)
        return constrain(model, grads), sums

    def accumulate(total: Params, inputs: tuple) -> tuple[Params, Any]:
        grads, sums = gradients(*inputs)
        return constrain(model, jax.tree.map(jnp.add, total, grads)), sums

    if micros == 1:
        grads, sums = gradients(*jax.tree.map(lambda x: x[0], (batch, scales, keys)))
        sums = jax.tree.map(lambda x: x[None], sums)
    else:
        zeros = constrain(model, jax.tree.map(jnp.zeros_like, trainable))
        grads, sums = jax.lax.scan(accumulate, zeros, (batch, scales, keys))
    return grads, {
        "loss": jnp.sum(sums.loss * scales),
        "micro_losses": sums.loss / jnp.maximum(sums.tokens, 1.0),
        "tokens": jnp.sum(sums.tokens),
        "correct": jnp.sum(sums.correct),
    }


def supervised(model: VLMConfig, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """(targets, weights) of the slots whose hidden states the model gives: those of the answers where it has a decoder for them."""
    prefix = "answer_" if model.encoder_decoder else ""
    return batch[f"{prefix}targets"], batch[f"{prefix}weights"]


def constrain(model: VLMConfig, leaves: Params) -> Params:
    """Gradients by path, laid out like their parameters; without it they would come back replicated."""
    where = vlm.shardings(model)
    if where is None:
        return leaves
    return {path: jax.lax.with_sharding_constraint(x, where[path]) for path, x in leaves.items()}


def row_counts(batch: Batch, features: int) -> Metrics:
    """What a batch [A, B, ...] really holds: samples, views in use, real slots, causal pairs (sum of n^2/2).

    Everything that is padding counts zero. features: P, slots per view. Answers of an encoder-decoder are counted alike, and
    cross_pairs: pairs of an answer slot and a slot of its sample.
    """
    real = batch["segments"] > 0
    views = (batch["features"] if "features" in batch else batch["images"]).shape[2]
    shown = jnp.where(
        batch["image_slots"] >= 0, batch["image_slots"] // features, views
    )  # image_newline has index views
    in_use = jnp.any(shown[..., None] == jnp.arange(views), axis=-2)
    counts = {}
    if "answer_segments" in batch:
        said = batch["answer_segments"] > 0
        same = (batch["answer_segments"][..., :, None] == batch["segments"][..., None, :]) & said[..., None]
        counts = {
            "answers": jnp.sum(said).astype(jnp.float32),
            "answer_pairs": jnp.sum(jnp.where(said, batch["answer_positions"] + 0.5, 0.0)),
            "cross_pairs": jnp.sum(same).astype(jnp.float32),
        }
    return counts | {
        "samples": jnp.sum(jnp.max(batch["segments"], axis=-1)).astype(jnp.float32),
        "views": jnp.sum(in_use).astype(jnp.float32),
        "slots": jnp.sum(real).astype(jnp.float32),
        "pairs": jnp.sum(jnp.where(real, batch["positions"] + 0.5, 0.0)),
    }


def make_step(model: VLMConfig, config: TrainConfig, batch_shapes: Mapping[str, tuple[int, ...]]) -> Step:
    """The jitted step for batches of `batch_shapes` ({key: shape [A, B, ...]}); the state is donated.

    rate factor: optimizer.rate_factor of the update, a float.
    """

    def step(state: TrainState, batch: Batch, factor: jax.Array) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step) if model.drops else None
        grads, metrics = loss_and_gradients(model, config, state.trainable, state.frozen, batch, key)
        steps, opt_state, grad_norm = optimizer.updates(config, grads, state.opt_state, state.trainable, factor)
        trainable = {path: p + steps[path] for path, p in state.trainable.items()}
        metrics |= row_counts(batch, model.vision.features)
        metrics |= {
            "grad_norm": grad_norm,
            "update_norm": optimizer.global_norm(steps),
            "param_norm": optimizer.global_norm(trainable),
        }
        return TrainState(state.step + 1, trainable, state.frozen, opt_state, state.rng), metrics

    where = shardings(model, config)
    if where is None:
        return jax.jit(step, donate_argnums=0)
    batch_where = batch_shardings(batch_shapes)
    # metrics come back replicated, so that every process can read them
    return jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(where, batch_where, where.step),
        out_shardings=(where, where.step),
    )


def split_micro_batches(rows: Mapping[str, np.ndarray], accum: int, axes: Axes = BATCH_AXES) -> dict[str, np.ndarray]:
    """A row batch [R, ...] as [A, R / A, ...]; keys that are not in `axes`, which the step does not read, are left out."""
    return {key: rows[key].reshape(accum, -1, *rows[key].shape[1:]) for key in axes if key in rows}

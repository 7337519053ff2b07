"""The programs that a recipe runs, lowered for devices that are not there: shapes and shardings in, nothing allocated.

train     one update of the recipe, with its batch [A, B, ...]
prefill   `rows` prompts of `slots` slots and one image each into a cache with room for `new` tokens; an encoder-decoder's encoder reads
          them, and the cache holds the keys and values of cross-attention too
decode    the loop of single tokens over that cache
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.config import ConfigError, VLMConfig
from vlm_jax.generate.programs import programs
from vlm_jax.generate.sampling import Settings
from vlm_jax.models import vlm
from vlm_jax.models.vlm import Compute
from vlm_jax.parallel import rules
from vlm_jax.recipe import Recipe
from vlm_jax.train import state as states
from vlm_jax.train.options import TrainConfig
from vlm_jax.train.step import batch_shardings, compute_of, make_step

Tree = Any
PROMPT = ("tower/", "projector/", "llm/encoder/")  # parameters that read prompts and write nothing


class Program(NamedTuple):
    """A lowered program, bytes of its arguments on one chip by kind, and bytes that the backward pass keeps of the forward pass
    (per chip, without the parameters). unread: bytes of parameters that a chip holds and does not use in this program.
    """

    lowered: jax.stages.Lowered
    held: dict[str, float]
    saved: float = 0.0
    unread: float = 0.0


def per_chip(tree: Tree) -> float:
    """Bytes of one chip's part of every array of a tree of ShapeDtypeStructs."""
    total = 0
    for x in jax.tree.leaves(tree):
        shape = x.shape if getattr(x, "sharding", None) is None else x.sharding.shard_shape(x.shape)
        total += int(np.prod(shape)) * x.dtype.itemsize
    return total


def batch_shapes(recipe: Recipe) -> dict[str, jax.ShapeDtypeStruct]:
    """The recipe's batch [A, B, ...] as arrays without content, laid out over the mesh in use."""
    t, d, v = recipe.train, recipe.data, recipe.model.vision
    rows = (t.accum, t.global_batch // t.accum)
    side = v.image_size
    shapes = {
        key: (*rows, d.row_length) for key in ("tokens", "targets", "image_slots", "positions", "segments", "weights")
    }
    if recipe.model.encoder_decoder:
        shapes = {key: shapes[key] for key in ("tokens", "image_slots", "positions", "segments")}
        shapes |= {
            f"answer_{key}": (*rows, d.answer_length)
            for key in ("tokens", "targets", "weights", "segments", "positions")
        }
    dtypes = {key: jnp.float32 if key.endswith("weights") else jnp.int32 for key in shapes}
    if d.feature_cache:
        shapes["features"] = (*rows, d.views_per_row, v.features, v.feature_width)
        dtypes["features"] = jnp.dtype(t.vision_dtype)
    else:
        shapes["images"], dtypes["images"] = (*rows, d.views_per_row, side, side, 3), jnp.uint8
    where = batch_shardings(shapes) or {}
    return {key: jax.ShapeDtypeStruct(shape, dtypes[key], sharding=where.get(key)) for key, shape in shapes.items()}


def train_program(recipe: Recipe, platform: str) -> Program:
    """One update of the recipe under the mesh in use."""
    model, config = recipe.model, recipe.train
    state, batch = states.abstract(model, config), batch_shapes(recipe)
    step = make_step(model, config, {key: x.shape for key, x in batch.items()})
    factor = jax.ShapeDtypeStruct((), jnp.float32, sharding=state.step.sharding)
    lowered = step.trace(state, batch, factor).lower(lowering_platforms=(platform,))
    held = {
        "parameters": per_chip(state.trainable),
        "frozen": per_chip(state.frozen),
        "optimizer": per_chip(state.opt_state),
        "batch": per_chip(batch),
    }
    return Program(lowered, held, saved_bytes(model, config, state, batch))


def saved_bytes(model: VLMConfig, config: TrainConfig, state: states.TrainState, batch: Tree) -> float:
    """Bytes per chip that the backward pass keeps of one micro-batch."""
    micro = {key: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for key, x in batch.items()}
    rows = next(iter(micro.values())).shape[0]

    def hidden(trainable: Tree, frozen: Tree, rows: Tree) -> jax.Array:
        return vlm.forward(vlm.build(model, {**frozen, **trainable}), rows, compute_of(config))

    views = rows * (micro["images"] if "images" in micro else micro["features"]).shape[1]
    return kept_bytes(hidden, (*without_places((state.trainable, state.frozen)), micro), {rows, views})


def without_places(tree: Tree) -> Tree:
    """ShapeDtypeStructs without their shardings."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def kept_bytes(function: Callable[..., Any], arguments: tuple, rows: set[int]) -> float:
    """Bytes per chip of what differentiating `function` by its first argument keeps: residuals that have one of `rows` as an axis."""

    def residuals(first: Tree, *rest: Tree) -> Tree:
        return jax.vjp(lambda x: function(x, *rest), first)[1]

    found = jax.tree.leaves(jax.eval_shape(residuals, *arguments))
    mesh, table = rules.current()
    parts = int(np.prod([mesh.shape[a] for a in (*table["batch"], *table["length"])]))
    grown = [x for x in found if rows & set(x.shape[:3])]
    return sum(float(np.prod(x.shape)) * x.dtype.itemsize for x in grown) / parts


def decode_program(recipe: Recipe, platform: str, step: str, rows: int, slots: int, new: int) -> Program:
    """`prefill` or `decode` of the recipe's model in bfloat16 under the mesh in use."""
    model = recipe.model
    if slots <= model.vision.features:
        raise ConfigError(
            f"--slots {slots} leaves no room for a prompt beside the {model.vision.features} slots of its image"
        )
    where = vlm.shardings(model)
    params = {
        p: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16 if x.dtype == jnp.float32 else x.dtype, sharding=where[p])
        for p, x in vlm.shapes(model).items()
    }
    mesh, table = rules.current()

    def rows_of(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        axes = ("batch", *(None,) * (len(shape) - 1))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=rules.sharding(axes, shape, mesh, table))

    batch = {key: rows_of((rows, slots), jnp.int32) for key in ("tokens", "image_slots", "segments", "positions")}
    side = model.vision.image_size
    batch["images"] = rows_of((rows, 1, side, side, 3), jnp.uint8)
    seeds, eos = jax.ShapeDtypeStruct((rows,), jnp.uint32), jax.ShapeDtypeStruct((1,), jnp.int32)
    keys = jax.eval_shape(jax.vmap(jax.random.key), seeds)
    number = rows_of((rows,), jnp.float32)
    settings = Settings(number, rows_of((rows,), jnp.int32), number, number)
    jitted = programs(model, Compute("bfloat16", "bfloat16", recipe.train.attention), mesh)
    prefill = jitted.prefill.trace(params, batch, keys, settings, eos, new=new, plain=True)
    state = prefill.out_info
    held = {"parameters": per_chip(params), "batch": per_chip(batch)}
    if step == "prefill":
        return Program(prefill.lower(lowering_platforms=(platform,)), held)
    split = (None, "batch", None, "act_heads", None)
    cache = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rules.sharding(split, x.shape, mesh, table))
        for name, x in state.cache._asdict().items()
        if x.ndim == len(split)
    }
    state = without_places(state)
    state = state._replace(cache=state.cache._replace(**cache))
    upto = jax.ShapeDtypeStruct((), jnp.int32)
    decode = jitted.decode.trace(params, state, settings, eos, upto, plain=True)
    unread = per_chip({path: x for path, x in params.items() if path.startswith(PROMPT)})
    return Program(decode.lower(lowering_platforms=(platform,)), held | {"cache": per_chip(cache)}, unread=unread)

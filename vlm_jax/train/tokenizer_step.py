"""The training step of a visual tokenizer: both networks updated by one jitted function (state, batch, given) -> (state, results).

    pictures, codebooks' = tokenizer(images)                              one pass for both updates
    generator   d/d(encoder, decoder, bottleneck, VQ table)  nll + balance w adversarial(critic(pictures)) + codebook losses
    critic      d/d(critic)                                  adversary.weighed_critic_loss(critic(images), critic(stop(pictures)))
Both gradients are taken at the old parameters, then both Adams step. Batch norms of the critic see images and pictures one after
the other; running statistics follow those two and not the generator's look. The codebooks and the critic's statistics come back as the
state's moving part, with the average of the new weights. given: rate, what multiplies the learning rates; ratio, ratio_after: how far
a language-driven codebook is drawn in this pass and (compat.two_pass) in the second.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax.nn.params import Params
from vlm_jax.tokenizer_recipe import TokenizerRecipe
from vlm_jax.train import optimizer
from vlm_jax.train.state import TrainState
from vlm_jax.train.step import Axes, Step, batch_shardings
from vlm_jax.train.tokenizer_state import (
    AVERAGE,
    BOOKS,
    LPIPS,
    STATISTICS,
    TOKENIZER,
    Networks,
    below,
    books_of,
    leaves_of_books,
    network,
    networks,
    shardings,
    under,
)
from vlm_jax.visual_tokenizers import adversary
from vlm_jax.visual_tokenizers.bottlenecks import Coded
from vlm_jax.visual_tokenizers.codebook import TABLE, usage
from vlm_jax.visual_tokenizers.layers import convolve
from vlm_jax.visual_tokenizers.perceptual import lpips

IMAGE_AXES: Axes = {"images": ("batch", None, None, None)}  # behind the accumulation axis, which has length 1
LAST_KERNEL = f"{TOKENIZER}decoder/conv_out/kernel"
USAGE = "codes/"  # results under this name are histograms

Results = dict[str, jax.Array]


def scaled(pixels: jax.Array) -> jax.Array:
    """uint8 0..255 -> float32 -1..1."""
    return pixels.astype(jnp.float32) / 127.5 - 1


def pass_through(
    nets: Networks, leaves: Mapping[str, jax.Array], images: jax.Array, key: jax.Array, ratio: jax.Array
) -> tuple[list[jax.Array], Coded]:
    """(what the decoder's last convolution reads for each picture, [(top alone,) whole]; the bottleneck's result) of a training pass."""
    model, recipe = nets.tokenize(leaves), nets.recipe
    books = {book: dict(state) for book, state in books_of(leaves).items()}
    draws = model.bottleneck.draws(key) if recipe.tokenizer.quantizer.restart else None
    found = model(images, books, train=True, ratio=ratio, draws=draws)
    if not recipe.top_picture:
        return [found.features], found.coded
    up, fine = jnp.split(found.coded.latents, 2, axis=-1)
    top = jnp.concatenate([up, jnp.zeros_like(fine)], -1).astype(images.dtype)
    return [model.decoder.features(model.post_quant_conv(top)), found.features], found.coded


def picture_of(leaves: Mapping[str, jax.Array], features: jax.Array, kernel: jax.Array) -> jax.Array:
    """The decoder's last convolution with `kernel` in place of its own, float32."""
    bias = leaves[LAST_KERNEL.replace("/kernel", "/bias")]
    return (convolve(features, kernel, pad=1) + bias.astype(features.dtype)).astype(jnp.float32)


def generator_gradients(
    nets: Networks, state: TrainState, images: jax.Array, key: jax.Array, ratio: jax.Array
) -> tuple[Params, Results, Coded, list[jax.Array]]:
    """(gradients, results, the bottleneck's result, pictures) of the generator's loss at `state`."""
    recipe, dtype = nets.recipe, jnp.dtype(nets.recipe.train.dtype)
    c, step = recipe.adversary, state.step + 1  # of this update, as metrics.jsonl counts
    c = c if nets.critic is not None else dataclasses.replace(c, adaptive=False)
    seen, stats = under(LPIPS, state.frozen), under(STATISTICS, state.moving)

    def perceptual(a: jax.Array, b: jax.Array) -> jax.Array:
        if not seen or not c.perceptual_weight:
            return jnp.zeros(len(a))
        return lpips(seen, a.astype(dtype), b.astype(dtype))

    def critic(pictures: jax.Array) -> jax.Array:
        if nets.critic is None:
            return jnp.zeros(())
        return nets.judge(state.trainable, pictures.astype(dtype), stats)[0]

    def loss(trained: Params) -> tuple[jax.Array, Any]:
        leaves = {**state.frozen, **state.moving, **state.trainable, **trained}
        features, coded = pass_through(nets, leaves, images.astype(dtype), key, ratio)
        render = lambda kernel: [picture_of(leaves, f, kernel) for f in features]
        codebook = sum(coded.losses.values())
        kernel = leaves[LAST_KERNEL]
        total, logs = adversary.generator_loss(
            c, images, render, kernel, perceptual, critic, codebook, step, ratio if nets.critic is not None else 0.0
        )
        return total, (logs | {"loss": total}, coded, render(kernel))

    grads, (logs, coded, pictures) = jax.grad(loss, has_aux=True)(network(state.trainable, critic=False))
    gap = jnp.clip(pictures[-1], -1, 1) - images
    logs |= {"squared_error": jnp.mean(jnp.square(gap), axis=(1, 2, 3)).mean()}
    return grads, logs, coded, pictures


def critic_gradients(
    nets: Networks, state: TrainState, images: jax.Array, pictures: list[jax.Array]
) -> tuple[Params, Results, dict[str, jax.Array]]:
    """(gradients, results, running statistics after the images and each picture) of the critic's loss at `state`."""
    recipe, dtype = nets.recipe, jnp.dtype(nets.recipe.train.dtype)
    c, pictures = recipe.adversary, [jax.lax.stop_gradient(p) for p in pictures]

    def loss(trained: Params) -> tuple[jax.Array, Any]:
        real, stats = nets.judge(trained, images.astype(dtype), under(STATISTICS, state.moving))
        fakes = []
        for picture in pictures if c.top_adversarial else pictures[-1:]:
            fake, stats = nets.judge(trained, picture.astype(dtype), stats)
            fakes.append(fake)
        total = adversary.weighed_critic_loss(c, real, fakes, state.step + 1)
        shown = {
            "critic_loss": total,
            "real_logits": real.mean(),
            "fake_logits": sum(f.mean() for f in fakes) / len(fakes),
        }
        return total, (shown, below(STATISTICS, stats))

    grads, (shown, stats) = jax.grad(loss, has_aux=True)(network(state.trainable, critic=True))
    return grads, shown, stats


def histograms(nets: Networks, coded: Coded) -> Results:
    """How often each code was taken, int32 [K] by book ([depths K] of a table per depth); levels that share a book together."""
    found: Results = {}
    for book, codes in zip(nets.recipe.tokenizer.quantizer.books, coded.codes):
        *depths, k, _ = coded.codebooks[book][TABLE].shape
        if depths:  # a table for each
            codes = codes + k * jnp.arange(depths[0])
        counts = usage(codes, k * (depths[0] if depths else 1)).astype(jnp.int32)
        found[USAGE + book] = found.get(USAGE + book, 0) + counts
    return found


def stepped(
    recipe: TokenizerRecipe, name: str, grads: Params, state: TrainState, rate: jax.Array
) -> tuple[Params, Any, Results]:
    """(new parameters of a network, its Adam after, norms of gradients before clipping and of the update)."""
    old = {path: state.trainable[path] for path in grads}
    steps, moments, norm = optimizer.updates(recipe.train, grads, state.opt_state[name], old, rate)
    new = {path: p + steps[path] for path, p in old.items()}
    prefix = "critic_" if name == "critic" else ""
    norms = {"grad_norm": norm, "update_norm": optimizer.global_norm(steps), "param_norm": optimizer.global_norm(new)}
    return new, moments, {prefix + key: value for key, value in norms.items()}


def update(
    nets: Networks, state: TrainState, images: jax.Array, given: Mapping[str, jax.Array], where: TrainState | None
) -> tuple[TrainState, Results]:
    """One update of both networks with images float32 [B, S, S, 3] in [-1, 1]."""
    recipe = nets.recipe
    keys = jax.random.split(jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step))

    def laid_out(leaves: Params) -> Params:
        """Gradients like their parameters; without it they would come back replicated."""
        if where is None:
            return leaves
        return {p: jax.lax.with_sharding_constraint(x, where.trainable[p]) for p, x in leaves.items()}

    grads, results, coded, pictures = generator_gradients(nets, state, images, keys[0], given["ratio"])
    new, moments, norms = stepped(recipe, "generator", laid_out(grads), state, given["rate"])
    results |= norms | {f"codebook/{k}": v for k, v in {**coded.losses, **coded.metrics}.items()}
    results |= histograms(nets, coded)
    trainable, opt_state = {**state.trainable, **new}, {**state.opt_state, "generator": moments}
    moving = dict(state.moving) | _moved(state, coded)
    if recipe.train.compat.two_pass:
        after = {**state.frozen, **moving, **trainable}
        dtype = jnp.dtype(recipe.train.dtype)
        features, coded = pass_through(nets, after, images.astype(dtype), keys[1], given["ratio_after"])
        pictures = [picture_of(after, f, after[LAST_KERNEL]) for f in features]
        moving |= _moved(state, coded)
    if nets.critic is not None:
        grads, shown, stats = critic_gradients(nets, state, images, pictures)
        new, moments, norms = stepped(recipe, "critic", laid_out(grads), state, given["rate"])
        results |= shown | norms
        trainable, opt_state, moving = {**trainable, **new}, {**opt_state, "critic": moments}, moving | stats
    kept = recipe.train.average
    for path in (p for p in moving if p.startswith(AVERAGE)):
        moving[path] = kept * moving[path] + (1 - kept) * trainable[path.removeprefix(AVERAGE)]
    return TrainState(state.step + 1, trainable, state.frozen, opt_state, state.rng, moving), results


def _moved(state: TrainState, coded: Coded) -> dict[str, jax.Array]:
    """The leaves of the codebooks that a pass changed."""
    return {p: x for p, x in leaves_of_books(coded.codebooks).items() if p.startswith(BOOKS) and p in state.moving}


def make_step(recipe: TokenizerRecipe, seen: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Step:
    """The jitted step for batches {"images": uint8 [1, B, S, S, 3]}; the state is donated.

    seen: arrays of the perceptual loss, whose shapes alone matter.
    """
    nets, where = networks(recipe), shardings(recipe, seen)

    def step(state: TrainState, batch: Mapping[str, jax.Array], given: Mapping[str, jax.Array]):
        return update(nets, state, scaled(batch["images"][0]), given, where)

    if where is None:
        return jax.jit(step, donate_argnums=0)
    batch_where = batch_shardings(shapes, IMAGE_AXES)
    # results come back replicated, so that every process can read them
    return jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(where, batch_where, where.step),
        out_shardings=(where, where.step),
    )

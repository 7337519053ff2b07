"""The update of a visual tokenizer and its critic, lowered for devices that are not there, and what it computes.

FLOPs of an update, from forward FLOPs of a batch: T autoencoder, Q search in the codebooks, V VGG-16 of LPIPS, C critic; n pictures that
the generator is judged by (with top_picture 2), m of them that the critic is; first: the convolutions that read pixels, last: that draws
    3 T - first_T + Q  +  (1 + 2 n) V  +  2 n C  +  (1 + m) (3 C - first_C)  [ + 2 n last, adaptive ]  [ + T + Q, compat.two_pass ]
A trained convolution costs a forward pass, its input's gradient and its kernel's; VGG-16 and, in the generator's loss, the critic have no
gradient of kernels, and pixels need none. With hardware: what the balance of an adaptive critic computes twice, n V + n C.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax.planning.products import products
from vlm_jax.planning.programs import Program, kept_bytes, per_chip, without_places
from vlm_jax.tokenizer_recipe import TokenizerRecipe
from vlm_jax.train.step import batch_shardings
from vlm_jax.train.tokenizer_command import NARROW, VGG_WIDTHS
from vlm_jax.train.tokenizer_state import LPIPS, STATISTICS, TOKENIZER, Networks, books_of, network, networks, under
from vlm_jax.train.tokenizer_step import IMAGE_AXES, LAST_KERNEL, pass_through, picture_of
from vlm_jax.train.tokenizer_task import TokenizerTask
from vlm_jax.visual_tokenizers.perceptual import SLICES, features, lpips

Shapes = Mapping[str, jax.ShapeDtypeStruct]


def lpips_shapes(recipe: TokenizerRecipe) -> dict[str, jax.ShapeDtypeStruct]:
    """Arrays of the perceptual loss without content, {} where it has no weight; the narrow ones of a recipe without files."""
    if not recipe.adversary.perceptual_weight:
        return {}
    init, found, din = recipe.init, {}, 3
    share = NARROW if init.random and not (init.vgg or init.lpips) else 1
    for k, (numbers, width) in enumerate(zip(SLICES, VGG_WIDTHS)):
        width //= share
        for n in numbers:
            found[f"conv_{n}/kernel"], found[f"conv_{n}/bias"] = (3, 3, din, width), (width,)
            din = width
        found[f"lin_{k}"] = (width,)
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in found.items()}


def abstract_task(recipe: TokenizerRecipe) -> TokenizerTask:
    """The recipe's task with shapes in place of the files it names."""
    return TokenizerTask(recipe, lpips_shapes(recipe))


def tokenizer_program(recipe: TokenizerRecipe, platform: str) -> Program:
    """One update of both networks under the mesh in use."""
    task, side = abstract_task(recipe), recipe.data.size
    state, shape = task.abstract(), (1, recipe.train.global_batch, side, side, 3)
    where = batch_shardings({"images": shape}, IMAGE_AXES)
    batch = {"images": jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=where and where["images"])}
    number = jax.ShapeDtypeStruct((), jnp.float32, sharding=state.step.sharding)
    given = {"rate": number, "ratio": number, "ratio_after": number}
    lowered = task.step({"images": shape}).trace(state, batch, given).lower(lowering_platforms=(platform,))
    held = {"parameters": per_chip(state.trainable), "frozen": per_chip(state.frozen), "moving": per_chip(state.moving)}
    held |= {"optimizer": per_chip(state.opt_state), "batch": per_chip(batch)}
    return Program(lowered, held, kept_of_update(recipe))


def kept_of_update(recipe: TokenizerRecipe) -> float:
    """Bytes per chip that the generator's backward pass keeps of its forward pass, perceptual loss and critic included."""
    nets, dtype = networks(recipe), jnp.dtype(recipe.train.dtype)
    state = without_places(abstract_task(recipe).abstract())
    rest = {**state.frozen, **state.moving, **network(state.trainable, critic=True)}

    def judged(trained: Shapes, images: jax.Array, rest: Shapes) -> Any:
        leaves, zero = {**rest, **trained}, jnp.zeros(())
        found, _ = pass_through(nets, leaves, images, jax.random.key(0), zero)
        pictures = [picture_of(leaves, f, leaves[LAST_KERNEL]).astype(dtype) for f in found]
        seen, stats = under(LPIPS, rest), under(STATISTICS, rest)
        distances = [lpips(seen, images, p) for p in pictures] if seen else []
        return pictures, distances, [nets.judge(rest, p, stats)[0] for p in pictures] if nets.critic else []

    images, rows = pixels(recipe, dtype), recipe.train.global_batch
    return kept_bytes(judged, (network(state.trainable, critic=False), images, rest), {rows})


def pixels(recipe: TokenizerRecipe, dtype: Any) -> jax.ShapeDtypeStruct:
    """A batch of images [B, S, S, 3]."""
    side = recipe.data.size
    return jax.ShapeDtypeStruct((recipe.train.global_batch, side, side, 3), dtype)


def tokenizer_flops(recipe: TokenizerRecipe) -> tuple[float, float]:
    """(useful, with what is computed twice) FLOPs of an update; see the module. To be called without a mesh in use."""
    nets, state = networks(recipe), abstract_task(recipe).abstract()
    images = pixels(recipe, jnp.dtype(recipe.train.dtype))
    net, search, drawing = _autoencoder(nets, state, images)
    seen = under(LPIPS, state.frozen)
    vgg = products(features, seen, images).total if seen else 0.0
    judge, first = _critic(nets, state, images)
    a, shown = recipe.adversary, 1 + recipe.top_picture
    reading = _of_pixels(state.trainable[f"{TOKENIZER}encoder/conv_in/kernel"], images, recipe)
    useful = 3 * net - reading + search + (1 + 2 * shown) * vgg
    if recipe.train.compat.two_pass:
        useful += net + search
    if nets.critic is None:
        return useful, useful
    fakes = shown if a.top_adversarial else 1
    useful += 2 * shown * judge + (1 + fakes) * (3 * judge - first) + (2 * shown * drawing if a.adaptive else 0.0)
    return useful, useful + (shown * (vgg + judge) if a.adaptive else 0.0)


def _autoencoder(nets: Networks, state: Any, images: jax.ShapeDtypeStruct) -> tuple[float, float, float]:
    """Forward FLOPs (of what gradients pass through, of the search in the codebooks, of the decoder's last convolution)."""
    leaves = {**state.frozen, **state.moving, **state.trainable}

    def whole(leaves: Shapes, images: jax.Array) -> Any:
        return pass_through(nets, leaves, images, jax.random.key(0), jnp.zeros(()))[0]

    def search(leaves: Shapes, latents: jax.Array) -> Any:
        return nets.tokenize(leaves).bottleneck.encode(latents, books_of(leaves), train=True).latents

    latents = jax.eval_shape(lambda p, x: nets.tokenize(p).latents(x).astype(jnp.float32), leaves, images)
    found = jax.eval_shape(whole, leaves, images)
    last = products(lambda p, f: [picture_of(p, x, p[LAST_KERNEL]) for x in f], leaves, found).total
    looked = products(search, leaves, latents).matrices
    return products(whole, leaves, images).total + last - looked, looked, last / len(found)


def _critic(nets: Networks, state: Any, images: jax.ShapeDtypeStruct) -> tuple[float, float]:
    """Forward FLOPs (of the whole critic, of its convolution that reads pixels) for a batch; 0 without one."""
    if nets.critic is None:
        return 0.0, 0.0
    stats = under(STATISTICS, state.moving)
    whole = products(lambda p, x, s: nets.judge(p, x, s)[0], state.trainable, images, stats)
    kernels = {p: x for p, x in network(state.trainable, critic=True).items() if x.ndim == 4 and x.shape[2] == 3}
    return whole.total, sum(_of_pixels(x, images, nets.recipe, _stride(nets)) for x in kernels.values())


def _stride(nets: Networks) -> int:
    """Of the critic's first convolution: PatchGAN halves the image, StyleGAN's reads it pixel by pixel."""
    return 2 if nets.recipe.critic.kind == "patch" else 1


def _of_pixels(
    kernel: jax.ShapeDtypeStruct, images: jax.ShapeDtypeStruct, recipe: TokenizerRecipe, stride: int = 0
) -> float:
    """FLOPs of a convolution [k, k, 3, O] of the images; stride 0: the encoder's."""
    stride = stride or 1 + recipe.tokenizer.autoencoder.init_downsample
    rows, height, width, _ = images.shape
    return 2.0 * rows * (height // stride) * (width // stride) * kernel.size

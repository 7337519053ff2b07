"""Losses of a tokenizer that is trained against a critic: reconstruction, perceptual, adversarial, and the critic's own.

generator  nll + balance * factor(step) * adversarial + codebook losses,   nll = rec_weight * rec + lpips_weight * LPIPS
balance    weight * |d nll / dW| / (|d adversarial / dW| + 1e-4), at most `limit`;  W: the decoder's last kernel (Esser et al. 2021)
critic     hinge    (mean relu(1 - real) + mean relu(1 + fake)) / 2
           vanilla  (mean softplus(-real) + mean softplus(fake)) / 2
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from vlm_jax.visual_tokenizers.options import AdversaryConfig


def cross_entropy(logits: jax.Array, target: jax.Array | float) -> jax.Array:
    """Mean binary cross-entropy of logits and targets of any value."""
    return jnp.mean(jax.nn.softplus(logits) - logits * target)


def critic_loss(c: AdversaryConfig, real: jax.Array, fake: jax.Array) -> jax.Array:
    """Unweighted loss of logits of real images and of pictures without gradient to their maker."""
    if c.critic == "hinge":
        return 0.5 * (jnp.mean(jax.nn.relu(1 - real)) + jnp.mean(jax.nn.relu(1 + fake)))
    if c.critic == "vanilla":
        return 0.5 * (jnp.mean(jax.nn.softplus(-real)) + jnp.mean(jax.nn.softplus(fake)))
    if c.swapped:
        return 0.5 * (cross_entropy(jnp.ones_like(real), real) + cross_entropy(jnp.zeros_like(fake), fake))
    return 0.5 * (cross_entropy(real, 1.0) + cross_entropy(fake, 0.0))


def adversarial_loss(c: AdversaryConfig, fake: jax.Array) -> jax.Array:
    """What a picture's maker pays for logits of its pictures."""
    if c.adversarial == "hinge":
        return -jnp.mean(fake)
    return cross_entropy(jnp.ones_like(fake), fake) if c.swapped else cross_entropy(fake, 1.0)


def factor(c: AdversaryConfig, step: jax.Array | int) -> jax.Array:
    """1 from step `start` on, 0 before."""
    return jnp.where(jnp.asarray(step) >= c.start, 1.0, 0.0)


def weighed_critic_loss(
    c: AdversaryConfig, real: jax.Array, fakes: Sequence[jax.Array], step: jax.Array | int
) -> jax.Array:
    """The critic's loss at a step; fakes: logits of the (top alone,) whole pictures, averaged where `top_adversarial`."""
    counted = fakes if c.top_adversarial else fakes[-1:]
    loss = sum(critic_loss(c, real, fake) for fake in counted) / len(counted)
    return factor(c, step) * loss * (c.weight if c.weigh_critic else 1.0)


def generator_loss(
    c: AdversaryConfig,
    image: jax.Array,
    render: Callable[[jax.Array], Sequence[jax.Array]],
    kernel: jax.Array,
    perceptual: Callable[[jax.Array, jax.Array], jax.Array],
    critic: Callable[[jax.Array], jax.Array],
    codebook: jax.Array | float,
    step: jax.Array | int,
    ratio: jax.Array | float = 0.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(total, parts). render(W): pictures [(top alone,) whole] with the decoder's last kernel W; perceptual(a, b) -> [B];
    critic(pictures) -> logits; codebook: sum of the quantiser's losses; ratio: `language.alignment`, which `fade` follows.
    """

    def mean(values: list[jax.Array], every: bool) -> jax.Array:
        counted = values if every else values[-1:]
        return sum(counted) / len(counted)

    def parts(kernel: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
        pictures = list(render(kernel))
        gap = jnp.abs if c.reconstruction == "l1" else jnp.square
        rec = mean([jnp.mean(gap(image - p)) for p in pictures], c.top_reconstruction)
        seen = mean([jnp.mean(perceptual(image, p)) for p in pictures], c.top_perceptual)
        logits = [critic(p) for p in pictures]
        fake = mean([adversarial_loss(c, x) for x in logits], c.top_adversarial)
        shown = mean([jnp.mean(x) for x in logits], c.top_adversarial)
        return c.reconstruction_weight * rec + c.perceptual_weight * seen, fake, rec, seen, shown

    nll, fake, rec, seen, shown = parts(kernel)
    balance = jnp.asarray(1.0)
    if c.adaptive:
        constant = jax.lax.stop_gradient(kernel)
        sizes = [jnp.linalg.norm(jax.grad(lambda w, i=i: parts(w)[i])(constant)) for i in (0, 1)]
        balance = jax.lax.stop_gradient(jnp.clip(sizes[0] / (sizes[1] + 1e-4), 0, c.limit))
    fake = fake * (1 - c.fade * ratio)
    total = nll + balance * c.weight * factor(c, step) * fake + codebook
    logs = {"nll": nll, "reconstruction": rec, "perceptual": seen, "adversarial": fake, "balance": balance}
    return total, logs | {"fake_logits": shown}

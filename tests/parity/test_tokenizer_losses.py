"""Critics, LPIPS and the losses of tokenizer training against LlamaGen's and UniCode's programs."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.golden_tokenizers import first, formula, last, load, weights
from tests.goldens import beside, golden
from vlm_jax.config import ConfigError
from vlm_jax.nn.params import merge, split
from vlm_jax.visual_tokenizers import perceptual
from vlm_jax.visual_tokenizers.adversary import (
    AdversaryConfig,
    adversarial_loss,
    critic_loss,
    generator_loss,
    weighed_critic_loss,
)
from vlm_jax.visual_tokenizers.critics import PatchCritic, StyleCritic, read_patch_critic, read_style_critic
from vlm_jax.visual_tokenizers.layers import convolve
from vlm_jax.visual_tokenizers.perceptual import lpips, read_lpips

CLOSE = {"rtol": 1e-3, "atol": 1e-5}


def _critic(tensors, norm, width, layers):
    """(graph, parameters, statistics) of an original discriminator."""
    graph, made = split(nnx.eval_shape(lambda: PatchCritic(nnx.Rngs(0), width=width, layers=layers, norm=norm)))
    params, stats = read_patch_critic(tensors)
    assert {k: v.shape for k, v in params.items()} == {k: v.shape for k, v in made.items()}
    return graph, jax.tree.map(jnp.asarray, params), jax.tree.map(jnp.asarray, stats)


@golden("unicode", "discriminator.npz")
def test_patch_critics(path):
    arrays, info = load(path)
    real, fake = last(arrays["real"]), last(arrays["fake"])
    for short, norm in (("gn", "group"), ("bn", "batch"), ("actnorm", "act")):
        want = weights(arrays, f"{short}/")
        graph, params, stats = _critic(weights(arrays, f"w_{short}/"), norm, info["ndf"][short], info["n_layers"])
        if norm == "act":
            critic = merge(graph, params)
            critic.calibrate(real)
            params = split(critic)[1]
        apply = jax.jit(lambda x, stats, train, g=graph, p=params: merge(g, p)(x, stats, train), static_argnums=2)
        logits = {}
        for name, images in (("real", real), ("fake", fake)):
            logits[name], stats = apply(images, stats, True)
            np.testing.assert_allclose(first(logits[name]), want[f"train_logits_{name}"], atol=2e-4, err_msg=short)
        have = {f"{k.replace('main_', 'main.').replace('/', '.running_')}": v for k, v in stats.items()}
        for key, value in weights(want, "after_train/").items():
            if "running" in key:
                np.testing.assert_allclose(have[key], value, rtol=1e-4, atol=1e-6)
        for name, images in (("real", real), ("fake", fake)):
            np.testing.assert_allclose(first(apply(images, stats, False)[0]), want[f"eval_logits_{name}"], atol=2e-4)
        for kind, name in (("hinge", "hinge_d"), ("vanilla", "vanilla_d")):
            loss = critic_loss(AdversaryConfig(critic=kind), logits["real"], logits["fake"])
            np.testing.assert_allclose(loss, want[name], rtol=1e-4)
        np.testing.assert_allclose(adversarial_loss(AdversaryConfig(), logits["fake"]), want["g"], rtol=1e-4, atol=1e-6)


@golden("unicode", "lpips_tiny.npz")
def test_lpips_of_a_narrow_network(path):
    arrays, _ = load(path)
    params = jax.tree.map(jnp.asarray, read_lpips(weights(arrays)))
    a, b = last(arrays["a"]), last(arrays["b"])
    value, grad = jax.jit(jax.value_and_grad(lambda b: lpips(params, a, b).mean()))(b)
    np.testing.assert_allclose(value, arrays["lpips_mean"], rtol=1e-4)
    np.testing.assert_allclose(first(grad), arrays["grad_b_of_mean"], rtol=2e-3, atol=1e-5)
    for found, name in zip(perceptual.features(params, a), ("1_2", "2_2", "3_3", "4_3", "5_3")):
        np.testing.assert_allclose(found.mean((1, 2)), arrays[f"feat_a_spatial_mean/relu{name}"], atol=2e-4)
    same = jax.grad(lambda b: lpips(params, a, b).mean())(a)
    assert np.isfinite(same).all(), "equal images have a gradient of 0"


@golden("unicode", "lpips_full_recipe.npz")
def test_lpips_with_the_published_heads(path):
    arrays, info = load(path)
    tensors, sizes = {}, (64, 64, 128, 128, 256, 256, 256, *[512] * 6)
    numbers = [n for numbers in perceptual.SLICES for n in numbers]
    for i, (n, din, dout) in enumerate(zip(numbers, (3, *sizes), sizes)):
        rs = np.random.RandomState(info["seed"] + i)
        tensors[f"features.{n}.weight"] = rs.standard_normal((dout, din, 3, 3)) * np.sqrt(2 / (9 * din))
        tensors[f"features.{n}.bias"] = rs.standard_normal(dout) * 0.05
    tensors |= {f"lin{k}.model.1.weight": arrays[f"lin{k}"] for k in range(5)}
    params = jax.tree.map(jnp.asarray, read_lpips(tensors))
    value = jax.jit(lpips)(params, last(arrays["a"]), last(arrays["b"]))
    np.testing.assert_allclose(value, arrays["lpips"].reshape(-1), rtol=1e-4)


def test_lpips_says_what_its_file_lacks():
    with pytest.raises(ConfigError, match="lack conv_0/kernel"):
        read_lpips({"lin0.model.1.weight": np.ones((1, 64, 1, 1))})


def _seeded(manifest, seed, skip=("scaling_layer", "num_batches_tracked")):
    tensors = {k: formula(k, tuple(v), seed) for k, v in manifest.items() if not any(s in k for s in skip)}
    return {k: np.abs(v) if k.startswith("lin") else v for k, v in tensors.items()}


def _style_critic(tensors, size):
    graph, made = split(nnx.eval_shape(lambda: StyleCritic(nnx.Rngs(0), size=size)))
    params = read_style_critic(tensors)
    assert {k: v.shape for k, v in params.items()} == {k: v.shape for k, v in made.items()}
    return graph, jax.tree.map(jnp.asarray, params), {}


@golden("unified", "vqloss_*.npz")
def test_llamagens_losses(path):
    arrays, info = load(path)
    manifests = json.loads(beside(path, "vqloss_manifests.json").read_text())
    seen = jax.tree.map(jnp.asarray, read_lpips(_seeded(manifests["lpips"], info["lpips_weight_seed"])))
    patch = info["disc_type"] == "patchgan"
    manifest = manifests["patchgan_discriminator" if patch else f"stylegan_discriminator_{info['image_size']}"]
    tensors = _seeded(manifest, info["disc_weight_seed"])
    graph, params, stats = _critic(tensors, "batch", 64, 3) if patch else _style_critic(tensors, info["image_size"])
    adaptive, train = info.get("disc_adaptive_weight", False), info["discriminator_mode"] == "train"
    c = AdversaryConfig(
        reconstruction=info.get("reconstruction_loss", "l2"),
        reconstruction_weight=info.get("reconstruction_weight", 1.0),
        perceptual_weight=info.get("perceptual_weight", 1.0),
        weight=info["disc_weight"],
        start=info["disc_start"],
        critic=info["disc_loss"].replace("-", "_"),
        adversarial=info["gen_adv_loss"].replace("-", "_"),
        swapped=True,
        adaptive=adaptive,
        weigh_critic=True,
    )
    image, recon = last(arrays["image"]), last(arrays["recon"])
    kernel, render = jnp.zeros(()), lambda kernel: [recon]
    if adaptive:
        feat, kernel = last(arrays["feat"]), jnp.asarray(arrays["last_layer"].transpose(2, 3, 1, 0))
        render = lambda kernel: [convolve(feat, kernel, pad=1)]
    judge = jax.jit(
        lambda x, stats: merge(graph, params)(x, stats, train) if patch else (merge(graph, params)(x), stats)
    )

    @jax.jit
    def generator(kernel):
        codebook, step = arrays["codebook_losses"].sum(), info["global_step"]
        look = lambda x: judge(x, stats)[0]
        return generator_loss(c, image, render, kernel, lambda a, b: lpips(seen, a, b), look, codebook, step)

    total, logs = generator(kernel)
    np.testing.assert_allclose(logs["reconstruction"], arrays["rec_loss"], **CLOSE)
    np.testing.assert_allclose(logs["perceptual"], arrays["lpips_per_image"].mean(), **CLOSE)
    np.testing.assert_allclose(logs["adversarial"], arrays["gen_adv_loss"], **CLOSE)
    if adaptive:
        np.testing.assert_allclose(logs["balance"], arrays["adaptive_weight"], **CLOSE)
    np.testing.assert_allclose(total, arrays["total_gen"], **CLOSE)
    real, after = judge(image, stats)
    fake, after = judge(recon, after) if train else (judge(recon, stats)[0], after)
    for logits, name in ((real, "logits_real"), (fake, "logits_fake")):
        logits = first(logits) if logits.ndim == 4 else logits
        np.testing.assert_allclose(logits.reshape(arrays[name].shape), arrays[name], **CLOSE)
    np.testing.assert_allclose(critic_loss(c, real, fake), arrays["disc_loss_raw"], **CLOSE)
    np.testing.assert_allclose(weighed_critic_loss(c, real, [fake], info["global_step"]), arrays["total_disc"], **CLOSE)
    for key, value in weights(arrays, "after_disc/").items():
        have = after[key.replace("main.", "main_").replace(".running_", "/")]
        np.testing.assert_allclose(have, value, **CLOSE)


@golden("unicode", "vqgan_loss_tuple.npz")
def test_unicodes_losses_of_pairs_of_pictures(path):
    arrays, info = load(path)
    seen = jax.tree.map(jnp.asarray, read_lpips(weights(load(beside(path, "lpips_tiny.npz"))[0])))
    tensors = weights(load(beside(path, "discriminator.npz"))[0], "w_gn/")
    graph, params, _ = _critic(tensors, "group", info["ndf"], info["n_layers"])
    image, h = last(arrays["x"]), last(arrays["h"])
    kernel = jnp.asarray(arrays["last_layer"].astype(np.float32).transpose(2, 3, 1, 0))
    render = lambda kernel: [convolve(0.7 * h, kernel, pad=1), convolve(h, kernel, pad=1)]
    judge = lambda x: merge(graph, params)(x, {})[0]
    for i, case in enumerate(info["cases"]):
        c = AdversaryConfig(
            weight=info["disc_weight"],
            start=info["disc_start"],
            limit=500.0,
            fade=0.9,
            critic="vanilla" if "vanilla" in case else "hinge",
            top_reconstruction="recon_top" in case,
            top_perceptual="perceptual_top" in case,
            top_adversarial="adversarial_top" in case,
        )
        generator = jax.jit(
            lambda step, c=c: generator_loss(
                c,
                image,
                render,
                kernel,
                lambda a, b: lpips(seen, a, b),
                judge,
                info["codebook_loss"],
                step,
                info["llm_ratio"],
            )
        )
        for step in sorted({int(n.split("/")[1][2:]) for n in arrays if n.startswith(f"c{i}/")}):
            want = weights(arrays, f"c{i}/gs{step}/")
            total, logs = generator(step)
            np.testing.assert_allclose(total, want["opt0/loss"], rtol=1e-4, err_msg=case)
            np.testing.assert_allclose(logs["nll"], want["opt0/train/nll_loss"], rtol=1e-4)
            np.testing.assert_allclose(logs["perceptual"], want["opt0/train/p_loss"], rtol=1e-4)
            np.testing.assert_allclose(logs["balance"] * c.weight, want["opt0/train/d_weight"], rtol=2e-3)
            np.testing.assert_allclose(logs["adversarial"], want["opt0/train/g_loss"], rtol=1e-4, atol=1e-6)
            fakes = [judge(p) for p in render(kernel)]
            loss = weighed_critic_loss(c, judge(image), fakes, step)
            np.testing.assert_allclose(loss, want["opt1/loss"], rtol=1e-4, atol=1e-6)


def test_the_corrected_non_saturating_losses_have_gradients():
    real, fake = jnp.asarray([0.3, -1.0]), jnp.asarray([0.5, 2.0])
    right, swapped = (
        AdversaryConfig(critic="non_saturating", adversarial="non_saturating", swapped=s) for s in (False, True)
    )
    grad = lambda c: jax.grad(lambda f: critic_loss(c, real, f))(fake)
    np.testing.assert_allclose(grad(right), 0.25 * jax.nn.sigmoid(fake), rtol=1e-5)
    np.testing.assert_array_equal(grad(swapped), 0)
    np.testing.assert_allclose(adversarial_loss(right, fake), jnp.mean(jax.nn.softplus(-fake)), rtol=1e-5)


@golden("unified", "vqloss_manifests.json")
def test_the_style_critic_has_the_shapes_of_the_original(path):
    manifest = json.loads(path.read_text())["stylegan_discriminator_256"]
    _style_critic({k: np.zeros(v, np.float32) for k, v in manifest.items()}, 256)
    out = jax.eval_shape(
        lambda x: StyleCritic(nnx.Rngs(0), size=64)(x), jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)
    )
    assert out.shape == (2, 1)

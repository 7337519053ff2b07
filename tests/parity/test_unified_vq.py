"""LlamaGen's VQ tokenizer against its original program: codes, pictures, losses, gradients."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np

from tests.golden_tokenizers import first, formula, last, load, tokenizer, vq_config, weights
from tests.goldens import golden
from vlm_jax.nn.params import merge
from vlm_jax.visual_tokenizers import names


def _model(arrays, info):
    config = vq_config(info)
    stored = weights(arrays)
    if info["weights"] == "formula":
        wanted = (e for e in names.entries(config) if not e.again)
        stored = {e.key: formula(e.key, e.shape, info["weight_seed"]) for e in wanted}
    return config, *tokenizer(config, stored)


@golden("unified", "weight_formula_check.json")
def test_the_formula_of_the_weights(path):
    for key, want in json.loads(path.read_text()).items():
        seed, name = key.removeprefix("seed").split(":")
        made = formula(name, tuple(want["shape"]), int(seed))
        np.testing.assert_allclose(made.reshape(-1)[:4], want["first4"][: made.size], rtol=1e-6)
        np.testing.assert_allclose(made.astype(np.float64).sum(), want["sum"], rtol=1e-5)


@golden("unified", "vq_*_manifest.json", "vq_ds*_manifest.json")
def test_every_tensor_of_the_published_checkpoints_has_a_place(path):
    manifest = json.loads(path.read_text())
    info = {"model": manifest["model"], "codebook_size": 16384, "codebook_embed_dim": 8}
    entries = names.entries(vq_config(info))
    assert {e.key: list(e.shape) for e in entries} == {k: v["shape"] for k, v in manifest["tensors"].items()}
    assert sum(np.prod(e.shape, dtype=int) for e in entries if not e.again) == manifest["n_parameters"]


@golden("unified", "vq_[!d]*.npz", "vq8*.npz", "vq16*.npz")
def test_codes_and_pictures(path):
    arrays, info = load(path)
    _, graph, params, books = _model(arrays, info)
    atol = 1e-3 if "model" in info else 1e-4

    @jax.jit
    def forward(params, books, images):
        model = merge(graph, params)
        encoded = model.encoder(images)
        out = model(images, books)
        return encoded, model.quant_conv(encoded), out, model.decode(out.coded.codes, books)

    encoded, latents, out, decoded = forward(params, books, last(arrays["image"]))
    if "encoder_out" in arrays:
        np.testing.assert_allclose(first(encoded), arrays["encoder_out"], atol=atol)
    np.testing.assert_allclose(first(latents), arrays["z_pre_quant"], atol=atol)
    sure = arrays["code_margin"] > 1e-4
    assert sure.mean() > 0.5
    codes = np.asarray(out.coded.codes[0]).reshape(-1)
    np.testing.assert_array_equal(codes[sure], arrays["codes"][sure])
    if (codes == arrays["codes"]).all():
        np.testing.assert_allclose(first(out.coded.latents), arrays["quant"], atol=atol)
        np.testing.assert_allclose(first(out.image), arrays["recon"], atol=atol)
        np.testing.assert_allclose(first(decoded), arrays["recon"], atol=atol)


@golden("unified", "vq_[!d]*.npz")
def test_losses_and_gradients(path):
    arrays, info = load(path)
    if "loss_vq" not in arrays:
        return
    config, graph, params, books = _model(arrays, info)
    image = last(arrays["image"])

    @jax.jit
    def loss(params, books):
        out = merge(graph, params)(image, books, train=True)
        return jnp.mean((out.image - image) ** 2) + sum(out.coded.losses.values()), out.coded.losses

    (total, losses), (grads, table) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params, books)
    for ours, theirs in {"vq": "loss_vq", "commit": "loss_commit", "entropy": "loss_entropy"}.items():
        np.testing.assert_allclose(losses.get(ours, 0.0), arrays[theirs], rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(total, arrays["loss_mse_plus_vq"], rtol=1e-4)
    rtol = 1e-2 if info["entropy_loss_ratio"] else 1e-3
    written = names.write(config, grads, table)
    for theirs, key in {
        "grad_codebook": "quantize.embedding.weight",
        "grad_quant_conv": "quant_conv.weight",
        "grad_enc_conv_in": "encoder.conv_in.weight",
        "grad_dec_conv_out": "decoder.conv_out.weight",
    }.items():
        # the entropy term divides distances by 0.01: small entries of a gradient are the rounding of its large ones
        atol = max(1e-6, 1e-4 * np.abs(arrays[theirs]).max()) if info["entropy_loss_ratio"] else 1e-6
        np.testing.assert_allclose(written[key], arrays[theirs], rtol=rtol, atol=atol, err_msg=key)

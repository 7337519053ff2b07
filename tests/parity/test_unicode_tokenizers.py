"""RQ-VAE, HQ-VAE and UniCode's tokenizers against their original programs: codes, latents, pictures, losses, moving tables."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np

from tests.golden_tokenizers import case, first, hq_quantizer, last, load, rq_quantizer, tokenizer, weights
from tests.goldens import golden
from vlm_jax.nn.params import merge
from vlm_jax.visual_tokenizers import language, names
from vlm_jax.visual_tokenizers.codebook import COUNT, SUM, TABLE, soft_codes
from vlm_jax.visual_tokenizers.language import POST, Language
from vlm_jax.visual_tokenizers.options import PUBLISHED, QuantizerConfig, TokenizerConfig
from vlm_jax.visual_tokenizers.quantizers import Residual

FEATURES, TABLES = {"atol": 2e-4, "rtol": 1e-4}, {"atol": 5e-5, "rtol": 1e-4}
MANIFESTS = {
    "unicode_hqvae_vicuna7b": "unicode_hq",
    "unicode_rqvae_vicuna7b": "unicode_rq",
    "hqtransformer_hqvae_imagenet_8x8_16x16": "hq",
    "hqtransformer_hqvae_imagenet_conv2": "hq_conv",
    "hqtransformer_hqvae_level3_8_16_32": "hq3",
    "rqvae_imagenet_8x8x4": "rq",
}


@golden("unicode", "manifests_fullsize.json")
def test_every_tensor_of_the_published_models_has_a_place(path):
    manifests = json.loads(path.read_text())
    for model, name in MANIFESTS.items():
        tensors = manifests[model]["tensors"]
        entries = names.entries(PUBLISHED[name])
        assert {e.key: list(e.shape) for e in entries} == {k: v[0] for k, v in tensors.items()}, model
        trained = sum(np.prod(e.shape, dtype=int) for e in entries if not e.book)
        assert trained == manifests[model]["n_trainable_params"], model


@golden("unicode", "rqvae_*.npz")
def test_rq_vae(path):
    arrays, info, tensors, autoencoder = case(path, "tiny_rqvae_encdec_weights.npz")
    config = TokenizerConfig(autoencoder, rq_quantizer(info), "taming")
    graph, params, books = tokenizer(config, tensors)
    x, quantizer, state = last(arrays["x"]), Residual(config.quantizer), books["codebook"]

    @jax.jit
    def loss(params):
        out = merge(graph, params)(x, books)
        latent = sum(out.coded.losses.values())
        return jnp.mean((out.image - x) ** 2) + latent, (out, latent)

    (total, (out, latent)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    codes = np.asarray(out.coded.codes[0])
    np.testing.assert_array_equal(codes, arrays["codes"])
    np.testing.assert_allclose(out.coded.latents, arrays["z_q"], **FEATURES)
    np.testing.assert_allclose(first(out.image), arrays["recon"], **FEATURES)
    np.testing.assert_allclose(latent / config.quantizer.beta, arrays["commitment_loss"], rtol=1e-4)
    np.testing.assert_allclose(total, arrays["loss_total"], rtol=1e-4)
    written = names.write(config, grads, books)
    for key, want in weights(arrays, "grad/").items():
        np.testing.assert_allclose(written[key], want, rtol=2e-3, atol=1e-5, err_msg=key)

    rows = quantizer.decode_depths(jnp.asarray(arrays["codes"]), state)
    np.testing.assert_allclose(
        rows[0].reshape(arrays["code_emb_with_depth_b0"].shape[1:]), arrays["code_emb_with_depth_b0"][0], atol=1e-3
    )
    for i in range(config.quantizer.depth):
        np.testing.assert_allclose(rows[..., : i + 1, :].sum(-2), arrays[f"cum_quant_{i}"], atol=5e-3)
    for name in (n for n in arrays if n.startswith("soft_temp")):
        temperature = float(name.removeprefix("soft_temp").split("_")[0])
        soft, hard = quantizer.soft_codes(jnp.asarray(arrays["z_e"]), state, temperature)
        np.testing.assert_allclose(soft[0], arrays[name], atol=2e-4)
        np.testing.assert_array_equal(hard, arrays["codes"])


@golden("unicode", "rqvae_*.npz")
def test_rq_vae_decodes_any_number_of_depths(path):
    arrays, info, tensors, autoencoder = case(path, "tiny_rqvae_encdec_weights.npz")
    graph, params, books = tokenizer(TokenizerConfig(autoencoder, rq_quantizer(info), "taming"), tensors)
    decode = jax.jit(lambda z: merge(graph, params).decoder(merge(graph, params).post_quant_conv(z)))
    rows = Residual(rq_quantizer(info)).decode_depths(jnp.asarray(arrays["codes"][:1]), books["codebook"])
    np.testing.assert_allclose(first(decode(rows.sum(-2))), arrays["decode_code_b0"], **FEATURES)
    for name in (n for n in arrays if n.startswith("decode_partial")):
        kind, depth = name.removeprefix("decode_partial_").removesuffix("_b0").split("_")
        z = rows[..., int(depth), :] if kind == "select" else rows[..., : int(depth) + 1, :].sum(-2)
        np.testing.assert_allclose(first(decode(z)), arrays[name], **FEATURES, err_msg=name)


def _permuted(order):
    return lambda z, k: z[jnp.asarray(order)[:k]]


@golden("unicode", "rqvae_*.npz")
def test_rq_tables_follow_the_batches(path):
    arrays, info, tensors, autoencoder = case(path, "tiny_rqvae_encdec_weights.npz")
    config = TokenizerConfig(autoencoder, rq_quantizer(info), "taming")
    graph, params, books = tokenizer(config, tensors)
    depth, call = config.quantizer.depth, 0
    latents = jax.jit(lambda x: merge(graph, params).latents(x))
    for step in range(2):
        z = latents(last(arrays[f"train{step}/x"]))
        draws = (
            [_permuted(arrays[f"restart_perm_{call + i}"]) for i in range(depth)]
            if info["restart_unused_codes"]
            else None
        )
        call += depth
        found = Residual(config.quantizer).encode(z, books["codebook"], train=True, draw=draws)
        books = {"codebook": found.state}
        np.testing.assert_array_equal(found.codes, arrays[f"train{step}/codes"])
        loss = found.losses["commit"] / config.quantizer.beta
        np.testing.assert_allclose(loss, arrays[f"train{step}/commitment_loss"], rtol=1e-4)
        for d in range(1 if config.quantizer.shared else depth):
            for ours, theirs in ((TABLE, "weight"), (COUNT, "cluster_size"), (SUM, "embed_ema")):
                have = found.state[ours] if config.quantizer.shared else found.state[ours][d]
                want = arrays[f"train{step}/{theirs}_after_{d}"][: info["n_embed"]]
                np.testing.assert_allclose(have, want, **TABLES, err_msg=f"{step} {d} {ours}")


@golden("unicode", "hq_sim_*.npz")
def test_hq_vae_of_two_levels(path):
    arrays, info, tensors, autoencoder = case(path, "tiny_encdec_weights.npz")
    config = TokenizerConfig(autoencoder, hq_quantizer(info), "taming")
    graph, params, books = tokenizer(config, tensors)
    x = last(arrays["x"])
    out = jax.jit(lambda x: merge(graph, params)(x, books))(x)
    for code, name in zip(out.coded.codes, ("code_t", "code_b")):
        np.testing.assert_array_equal(code, arrays[name])
    np.testing.assert_allclose(first(out.image), arrays["recon"], **FEATURES)
    np.testing.assert_allclose(out.coded.losses["commit_top"], arrays["diff_t"], rtol=1e-4)
    np.testing.assert_allclose(out.coded.losses["commit_bottom"], arrays["diff_b"], rtol=1e-4)
    np.testing.assert_allclose(out.coded.metrics["residual"], arrays["abs_h_b"], rtol=1e-4)

    model = merge(graph, params)
    top, bottom = (c[:1] for c in out.coded.codes)
    decode = jax.jit(lambda codes: merge(graph, params).decode(codes, books))
    np.testing.assert_allclose(first(decode((top, bottom))), arrays["decode_code_b0"], **FEATURES)
    np.testing.assert_allclose(first(decode((top, None))), arrays["decode_code_top_only_b0"], **FEATURES)
    np.testing.assert_allclose(first(decode((None, bottom))), arrays["decode_code_bottom_only_b0"], **FEATURES)

    h = jax.jit(lambda x: merge(graph, params).latents(x))(x)
    rows = model.bottleneck.top.decode(out.coded.codes[0], books["top"])
    np.testing.assert_allclose(first(rows), arrays["quant_t"], **FEATURES)
    left = h - model.bottleneck.up(rows)
    np.testing.assert_allclose(first(left), arrays["h_b_resid"], **FEATURES)
    for name in (n for n in arrays if n.startswith("soft_")):
        _, level, temperature, _ = name.split("_")
        z, book = (model.bottleneck.down(h), "top") if level == "t" else (left, model.bottleneck.bottom_name)
        soft = soft_codes(z[:1], books[book][TABLE], float(temperature.removeprefix("temp")))
        np.testing.assert_allclose(soft.reshape(arrays[name].shape), arrays[name], atol=2e-4)

    after = jax.jit(lambda x: merge(graph, params)(x, books, train=True))(x).coded.codebooks
    for book, level in (("top", "t"), ("bottom", "b")):
        for ours, theirs in ((TABLE, "embedding"), (COUNT, "cluster_size"), (SUM, "embedding_avg")):
            np.testing.assert_allclose(after[book][ours], arrays[f"train/{theirs}_{level}_after"], **TABLES)


@golden("unicode", "hq_level*.npz")
def test_hq_vae_of_several_levels(path):
    arrays, info, tensors, autoencoder = case(path, "tiny_encdec_weights.npz")
    config = TokenizerConfig(autoencoder, hq_quantizer(info), "taming")
    graph, params, books = tokenizer(config, tensors)
    out = jax.jit(lambda x: merge(graph, params)(x, books))(last(arrays["x"]))
    for level, code in enumerate(out.coded.codes):
        np.testing.assert_array_equal(code, arrays[f"code_{level}"])
        np.testing.assert_allclose(out.coded.losses[f"commit_{level}"], arrays[f"diff_{level}"], rtol=1e-4)
    np.testing.assert_allclose(first(out.coded.latents), arrays["quant"], **FEATURES)
    np.testing.assert_allclose(first(out.image), arrays["recon"], **FEATURES)
    np.testing.assert_allclose(out.coded.metrics["residual_mean"], arrays["resid_mean_sum"], rtol=1e-3, atol=1e-6)
    decode = jax.jit(lambda codes: merge(graph, params).decode(codes, books))
    np.testing.assert_allclose(first(decode(out.coded.codes)), arrays["decode_code"], **FEATURES)
    top = (out.coded.codes[0], *[None] * (len(out.coded.codes) - 1))
    np.testing.assert_allclose(first(decode(top)), arrays["decode_code_top_only"], **FEATURES)


def _language(info, **more):
    aux = info.get("hparams_aux", info)
    return QuantizerConfig(
        codes=(info["n_embed"],),
        shared=True,
        language=True,
        width=info.get("embed_dim") or info["dim"],
        length=aux["fix_len_l2norm"],
        relative=aux["norm_type"] == "rela_llm",
        normalise=aux["use_l2_norm"],
        restart=aux["restart_unused_codes"],
        beta=info.get("beta", 0.25),
        first_commitment=True,
        tile=20,
        **more,
    )


def _ramp(info, aux):
    return 2 * info["epoch_train_steps"] * (info["max_epochs"] - aux["tail_epoch"])


def _noisy(order, noise):
    """The recorded restart of a batch that was repeated until it had a vector per code."""

    def draw(z, k):
        rows = jnp.tile(z, (len(order) // len(z), 1)) + jnp.asarray(noise) * 0.01 / z.shape[-1] ** 0.5
        return rows[jnp.asarray(order)[:k]]

    return draw


@golden("unicode", "uc_ema_*.npz")
def test_the_codebook_moves_towards_the_language_model(path):
    arrays, info = load(path)
    quantizer = Language(_language(info, kind="rq"))
    chosen = language.choose_rows(arrays["llm_table"].astype(np.float32), info["n_embed"])
    np.testing.assert_array_equal(chosen, arrays["selected_llm_indices"])
    state = quantizer.initial(jax.random.key(0), arrays["llm_table"].astype(np.float32))
    np.testing.assert_allclose(state["language_lengths"], arrays["llm_len_l2norm"], rtol=1e-5)
    steps = sorted({name.split("/")[0] for name in arrays if name.startswith("s") and "/" in name})
    for step in steps:
        case = weights(arrays, f"{step}/")
        for ours, theirs in ((TABLE, "embedding"), (COUNT, "cluster_size"), (SUM, "embedding_avg")):
            state[ours] = jnp.asarray(case[f"{theirs}_before"], jnp.float32)
        ratio = language.alignment(int(case["global_step"]), _ramp(info, info))
        np.testing.assert_allclose(ratio, case["ratio"], rtol=1e-6)
        draw = _noisy(case["restart_perm"], case["restart_uniform_noise"]) if "restart_perm" in case else None
        given = info["cls"].startswith("RQ_")

        def loss(z, state=state, ratio=ratio, draw=draw, given=given, case=case):
            if given:
                state = {**state, POST: jnp.asarray(case["post_len_l2norm"], jnp.float32)}
                found = quantizer.encode(z, state, train=True, ratio=ratio, draw=draw, short=True)
            else:
                found = quantizer.encode(z, state, train=True, ratio=ratio, draw=draw)
            return jnp.mean(found.latents**2) + found.losses["commit"], found

        (_, found), grad = jax.value_and_grad(loss, has_aux=True)(last(case["z"]))
        np.testing.assert_array_equal(np.asarray(found.codes).reshape(-1), case["code"])
        np.testing.assert_allclose(first(found.latents), case["z_q"], **FEATURES)
        np.testing.assert_allclose(found.losses["commit"], case["diff"], rtol=1e-4)
        np.testing.assert_allclose(first(grad), case["grad_z_of_mean_zq2_plus_diff"], rtol=2e-3, atol=1e-5)
        if not given:
            np.testing.assert_allclose(found.metrics["pre_length"], case["pre_len_l2norm"], rtol=1e-5)
            np.testing.assert_allclose(found.metrics[POST], case["post_len_l2norm"], rtol=1e-5)
        for ours, theirs in ((TABLE, "embedding"), (COUNT, "cluster_size"), (SUM, "embedding_avg")):
            np.testing.assert_allclose(found.state[ours], case[f"{theirs}_after"], **TABLES, err_msg=f"{step} {ours}")


@golden("unicode", "uc_hqvae_*.npz")
def test_unicode_hq(path):
    arrays, info, tensors, autoencoder = case(path, "tiny_encdec_weights.npz")
    config = TokenizerConfig(autoencoder, _language(info, kind="two_level"), "taming")
    graph, params, books = tokenizer(config, tensors)
    out = jax.jit(lambda x: merge(graph, params)(x, books))(last(arrays["x"]))
    for code, name in zip(out.coded.codes, ("code_t", "code_b")):
        np.testing.assert_array_equal(code, arrays[name])
    model = merge(graph, params)
    top = model.bottleneck.top
    np.testing.assert_allclose(top.scale(books["top"]), arrays["scaled_ratio"], rtol=1e-5)
    for code, name in zip(out.coded.codes, ("quant_t", "quant_b_embed")):
        np.testing.assert_allclose(first(top.decode(code, books["top"])), arrays[name], **FEATURES)
    half = out.coded.latents.shape[-1] // 2
    np.testing.assert_allclose(first(out.coded.latents[..., half:]), arrays["quant_b"], **FEATURES)
    np.testing.assert_allclose(first(out.image), arrays["recon"], **FEATURES)
    decoded = jax.jit(lambda codes: merge(graph, params).decode(codes, books))(out.coded.codes)
    np.testing.assert_allclose(first(decoded), arrays["recon"], **FEATURES)
    for key, name in (("commit_top", "fwd_diff_t"), ("commit_bottom", "fwd_diff_b")):
        np.testing.assert_allclose(out.coded.losses[key], arrays[name], rtol=1e-4)
    metrics = out.coded.metrics
    np.testing.assert_allclose(metrics["cosine_gap"], arrays["fwd_diff_cos"], rtol=1e-4)
    np.testing.assert_allclose(metrics["residual"], arrays["fwd_abs_h_b_mean"], rtol=1e-4)
    np.testing.assert_allclose(metrics["top/pre_length"], arrays["pre_len_l2norm_t"], rtol=1e-5)
    tokens = np.asarray(books["top"]["tokens"])
    np.testing.assert_array_equal(tokens[np.asarray(out.coded.codes[0])].reshape(2, -1), arrays["token_ids_t"])


@golden("unicode", "uc_rqvae_*.npz")
def test_unicode_rq(path):
    arrays, info, tensors, autoencoder = case(path, "tiny_encdec_weights.npz")
    quantizer = _language(info, kind="rq", depth=info["hparams_aux"]["num_quant_layer"])
    graph, params, books = tokenizer(TokenizerConfig(autoencoder, quantizer, "taming"), tensors)
    ratio = language.alignment(info["global_step"], _ramp(info, info["hparams_aux"])) if info["train"] else 0.0

    @jax.jit
    def forward(x):
        model = merge(graph, params)
        return model.latents(x), model(x, books, train=info["train"], ratio=ratio)

    h, out = forward(last(arrays["x"]))
    np.testing.assert_allclose(first(h), arrays["h"], **FEATURES)
    np.testing.assert_array_equal(out.coded.codes[0], arrays["codes"])
    np.testing.assert_allclose(first(out.coded.latents), arrays["quant_sum"], **FEATURES)
    np.testing.assert_allclose(out.coded.losses["commit"], arrays["diff"], rtol=1e-4)
    np.testing.assert_allclose(out.coded.metrics["pre_length"], arrays["pre_len_l2norm"], rtol=1e-5)
    np.testing.assert_allclose(out.coded.metrics[POST], arrays["post_len_l2norm"], rtol=1e-5)
    if "recon" in arrays:
        np.testing.assert_allclose(first(out.image), arrays["recon"], **FEATURES)
        np.testing.assert_allclose(out.coded.metrics["residual"], arrays["fwd_abs_resid_mean"], rtol=1e-4)
        np.testing.assert_allclose(out.coded.metrics["cosine_gap"], arrays["fwd_diff_cos"], rtol=1e-4)
    if info["train"]:
        np.testing.assert_allclose(ratio, arrays["ratio"], rtol=1e-6)
        for ours, theirs in ((TABLE, "embedding"), (COUNT, "cluster_size"), (SUM, "embedding_avg")):
            np.testing.assert_allclose(out.coded.codebooks["codebook"][ours], arrays[f"{theirs}_after"], **TABLES)

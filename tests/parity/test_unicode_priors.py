"""RQ-Transformer and HQ-Transformer against their original programs: logits, losses, greedy codes, filters, names of tensors."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.golden_tokenizers import case, hq_quantizer, last, load, rq_quantizer, weights
from tests.goldens import golden
from vlm_jax.convert.hierarchical_prior import hq_config, rq_config
from vlm_jax.convert.visual_tokenizer import Tokenizer
from vlm_jax.nn.params import merge
from vlm_jax.train.prior_codes import ImageCoder
from vlm_jax.train.prior_loss import prior_loss
from vlm_jax.train.prior_options import PriorTrainConfig
from vlm_jax.visual_tokenizers import names
from vlm_jax.visual_tokenizers.bottlenecks import bottleneck
from vlm_jax.visual_tokenizers.codebook import TABLE
from vlm_jax.visual_tokenizers.options import TokenizerConfig
from vlm_jax.visual_tokenizers.priors import hierarchy_names, models
from vlm_jax.visual_tokenizers.priors.hierarchy_loss import cross_entropy, hq_losses, rq_losses
from vlm_jax.visual_tokenizers.priors.hierarchy_sampling import sampler
from vlm_jax.visual_tokenizers.priors.hq_transformer import to_local
from vlm_jax.visual_tokenizers.priors.options import Sampling
from vlm_jax.visual_tokenizers.priors.sampling import keep_top_k, keep_top_p
from vlm_jax.visual_tokenizers.priors.soft_labels import soft_labels

LOGITS, GREEDY = {"atol": 2e-4, "rtol": 1e-4}, Sampling(temperature=0.0)


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Programs here run once and are tiny: most of the time would go into optimising them."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def _model(config, tensors):
    """(structure, parameters) of a golden's weights, which go back under their names as they came."""
    params = hierarchy_names.read(config, tensors)
    assert {k: v.shape for k, v in params.items()} == {k: v.shape for k, v in models.shapes(config).items()}
    written = hierarchy_names.write(config, params)
    assert written.keys() == tensors.keys()
    for key, value in tensors.items():
        np.testing.assert_array_equal(written[key], value, err_msg=key)
    return models.structure(config), jax.tree.map(jnp.asarray, params)


def _keys(rows):
    return jax.random.split(jax.random.key(0), rows)


@golden("unicode", "rqtransformer_*.npz")
def test_rq_transformer(path):
    arrays, info = load(path)
    config = rq_config(info)
    graph, params = _model(config, weights(arrays))
    codes, condition, table = (jnp.asarray(arrays[name]) for name in ("codes", "cond", "codebook"))
    soft = jnp.asarray(arrays["soft_targets_b0"], jnp.float32)[None].repeat(len(codes), 0)

    @jax.jit
    def run(p):
        logits = merge(graph, p)(codes, table, condition)
        softly = prior_loss(merge(graph, p), {"codes": codes, "soft": soft, "labels": condition}, table=table)[1]
        return logits, rq_losses(config, logits, codes, condition), softly

    logits, losses, softly = run(params)
    np.testing.assert_allclose(logits.image, arrays["logits"], **LOGITS)
    assert (logits.text is not None) == ("cond_logits" in arrays)

    np.testing.assert_allclose(losses["image"], arrays["loss"], rtol=1e-4)
    each = [losses[f"depth_{d}"] for d in range(config.depth)]
    np.testing.assert_allclose(each, arrays["codebook_loss"], rtol=1e-4)
    np.testing.assert_allclose(softly["image"], arrays["soft_loss"], rtol=1e-4)
    if "cond_logits" in arrays:
        np.testing.assert_allclose(logits.text, arrays["cond_logits"], **LOGITS)
        np.testing.assert_allclose(losses["text"], arrays["cond_loss"], rtol=1e-4)
        whole = config.image_weight * arrays["loss"] + config.text_weight * arrays["cond_loss"]
        np.testing.assert_allclose(losses["loss"], whole, rtol=1e-4)
    drawn = sampler(config, GREEDY)(params, _keys(len(codes)), condition, table)
    np.testing.assert_array_equal(drawn, arrays["greedy_codes"])


def _hq(info, top_codes):
    """The config of a golden, which tells as the program's config.yaml does, with names of its own for a few things."""
    h = info["hparams"]
    deep = info.get("hparams_dec") or {**h, "n_layers": h["n_layers_depth"]}
    stage2 = {
        **info,
        "type": f"hq-transformer/{info['model_type']}",
        "vocab_size_txt": info["vocab_txt"],
        "hparams_dec": deep,
    }
    return hq_config(stage2, int(top_codes**0.5), (info["vocab_top"], info["vocab_bot"]))


@golden("unicode", "hqtransformer_*.npz")
def test_hq_transformer(path):
    arrays, info = load(path)
    config = _hq(info, arrays["codes_t"].shape[1])
    graph, params = _model(config, weights(arrays))
    B, side = len(arrays["codes_t"]), config.grid
    codes = (
        jnp.asarray(arrays["codes_t"]).reshape(B, side, side),
        jnp.asarray(arrays["codes_b"]).reshape(B, 2 * side, 2 * side),
    )
    condition = None if config.condition == "none" else jnp.asarray(arrays["labels"])

    @jax.jit
    def run(p):
        logits = merge(graph, p)(codes, condition)
        return logits, hq_losses(config, logits, codes, condition)

    logits, losses = run(params)
    for found, name in zip(logits.image, ("logits_top", "logits_bot")):
        np.testing.assert_allclose(found.reshape(arrays[name].shape), arrays[name], **LOGITS, err_msg=name)

    wanted = {"level_0": "loss_top", "level_1": "loss_bot", "image": "loss_img_weight_bottom4"}
    if config.condition == "text":
        np.testing.assert_allclose(logits.text, arrays["logits_txt"], **LOGITS)
        wanted["text"] = "loss_txt"
    for ours, theirs in wanted.items():
        np.testing.assert_allclose(losses[ours], arrays[theirs], rtol=1e-4, err_msg=theirs)
    top, bottom = sampler(config, GREEDY)(params, _keys(B), condition)
    np.testing.assert_array_equal(top.reshape(B, -1), arrays["greedy_codes_t"])
    np.testing.assert_array_equal(to_local(bottom, side), arrays["greedy_codes_b_local"])


@golden("unicode", "hq_sim_*.npz")
def test_soft_labels_of_two_levels(path):
    arrays, info = load(path)
    quantizer = hq_quantizer(info)
    module = bottleneck(quantizer, nnx.Rngs(0))
    tables = {name: jnp.asarray(arrays[f"w/quantize_{name[0]}.embedding"], jnp.float32) for name in ("top", "bottom")}
    if quantizer.upsample == "conv":
        for ours, theirs, turn in (
            (module.down_conv, "down_t", (2, 3, 1, 0)),
            (module.up_conv, "upsample_t", (2, 3, 0, 1)),
        ):
            ours.kernel[...] = jnp.asarray(arrays[f"w/{theirs}.weight"], jnp.float32).transpose(turn)
            ours.bias[...] = jnp.asarray(arrays[f"w/{theirs}.bias"], jnp.float32)
    books = {name: {TABLE: table} for name, table in tables.items()}
    z = last(arrays["h_b_resid"]) + module.up(last(arrays["quant_t"]))
    for temperature in ("0.5", "1.0"):
        codes, soft = jax.jit(lambda z, t=float(temperature): soft_labels(module, z, books, t))(z)
        for level, found, labels in zip("tb", codes, soft, strict=True):
            np.testing.assert_array_equal(found, arrays[f"code_{level}"])
            wanted = arrays.get(f"soft_{level}_temp{temperature}_b0")
            if wanted is not None:
                np.testing.assert_allclose(labels[0].reshape(wanted.shape), wanted, atol=2e-4)


@golden("unicode", "rqvae_*.npz", "hq_sim_*.npz")
def test_a_step_makes_the_codes_and_soft_labels_of_images(path):
    """By the very function that a prior's step encodes its batch with, from pixels on."""
    residual = path.name.startswith("rq")
    shared = "tiny_rqvae_encdec_weights.npz" if residual else "tiny_encdec_weights.npz"
    arrays, info, tensors, autoencoder = case(path, shared)
    quantizer = (rq_quantizer if residual else hq_quantizer)(info)
    config = TokenizerConfig(autoencoder, quantizer, "taming")
    pixels = (last(arrays["x"]) * 0.5 + 0.5) * 255
    keys = {"codes": "soft_temp{}_b0"} if residual else {f"code_{x}": f"soft_{x}_temp{{}}_b0" for x in "tb"}
    told = {float(found[1]) for found in (re.search("^soft_.*temp(.+)_b0$", name) for name in arrays) if found}
    for temperature in (0.0, *sorted(told)):
        how = PriorTrainConfig(soft_temperature=temperature)
        coder = ImageCoder(Tokenizer(config, *names.read(config, tensors)), how)
        batch = jax.jit(lambda leaves, x, coder=coder: coder(leaves, {"images": x}, jax.random.key(0)))(
            coder.leaves, pixels
        )
        for ours, (code, soft) in zip(("",) if residual else ("_0", "_1"), keys.items(), strict=True):
            np.testing.assert_array_equal(batch[f"codes{ours}"], arrays[code])
            wanted = arrays.get(soft.format(temperature))
            if wanted is not None:
                np.testing.assert_allclose(batch[f"soft{ours}"][0].reshape(wanted.shape), wanted, atol=5e-4)
        assert (temperature > 0) == any(key.startswith("soft") for key in batch)
    assert told


@golden("unicode", "sampling_filters*.npz")
def test_filters_and_soft_labels(path):
    arrays, _ = load(path)
    logits = jnp.asarray(arrays["logits"])
    for name, wanted in arrays.items():
        if name.startswith("topk_logits_"):
            _same_kept(keep_top_k(logits, int(name.removeprefix("topk_logits_"))), wanted)
        if name.startswith("topp_probs_"):
            kept = keep_top_p(logits, float(name.removeprefix("topp_probs_")))
            np.testing.assert_allclose(jax.nn.softmax(kept), wanted, atol=1e-6, err_msg=name)
        if name.startswith("tie_topk_"):
            _same_kept(keep_top_k(jnp.asarray(arrays["tie_logits"]), int(name.removeprefix("tie_topk_"))), wanted)
    each = cross_entropy(logits, jnp.asarray(arrays["target"]))
    np.testing.assert_allclose(each, arrays["rq_soft_ce_none"], rtol=1e-5)
    np.testing.assert_allclose(each.mean(), arrays["rq_soft_ce_mean"], rtol=1e-5)


def _same_kept(found, wanted):
    """Equal where an entry is kept; the goldens write -1e30 where it is not."""
    kept = wanted > -1e29
    np.testing.assert_array_equal(np.isfinite(found), kept)
    np.testing.assert_allclose(np.asarray(found)[kept], wanted[kept], rtol=1e-6)

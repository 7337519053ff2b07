"""One training step of a visual tokenizer and its critic, and the learning rates, against UniCode, HQ-VAE and RQ-VAE."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.golden_tokenizers import autoencoder_config, last, load, weights
from tests.goldens import beside, golden
from vlm_jax.config import ConfigError
from vlm_jax.data.image_options import ImageDataConfig
from vlm_jax.tokenizer_recipe import TokenizerRecipe
from vlm_jax.train import tokenizer_state as states
from vlm_jax.train.tokenizer_options import TokenizerCompat, TokenizerTrainConfig, ramp, rate_factor
from vlm_jax.train.tokenizer_step import pass_through, update
from vlm_jax.visual_tokenizers import names
from vlm_jax.visual_tokenizers.critics import read_patch_critic
from vlm_jax.visual_tokenizers.options import AdversaryConfig, CriticConfig, QuantizerConfig, TokenizerConfig
from vlm_jax.visual_tokenizers.perceptual import read_lpips

TABLES = {"embedding": "embedding", "cluster_size": "cluster_size", "embedding_sum": "embedding_avg"}
BETA1 = 0.5


def _recipe(info):
    h, aux, d = info["hparams"], info["hparams_aux"], info["hparams_disc"]
    quantizer = QuantizerConfig(
        kind="two_level",
        codes=(info["n_embed"],),
        width=info["embed_dim"],
        shared=aux["shared_codebook"],
        language=True,
        length=aux["fix_len_l2norm"],
        relative=aux["norm_type"] == "rela_llm",
        normalise=aux["use_l2_norm"],
        restart=aux["restart_unused_codes"],
        tile=20,
    )
    return TokenizerRecipe(
        tokenizer=TokenizerConfig(autoencoder_config(h), quantizer, "taming"),
        adversary=AdversaryConfig(
            weight=d["disc_weight"], start=d["disc_start"], critic=d["disc_loss"], limit=500.0, fade=0.9
        ),
        critic=CriticConfig(width=d["disc_ndf"], layers=d["disc_num_layers"], norm={"gn": "group"}[d["norm_type"]]),
        data=ImageDataConfig(size=h["resolution"]),
        train=TokenizerTrainConfig(beta1=BETA1, beta2=0.9, compat=TokenizerCompat(two_pass=True)),
    )


@golden("unicode", "uc_training_step*.npz")
def test_one_update_of_both_networks(path):
    """The rate is 0, so that the second pass has the weights of the first, as when the step was recorded; Adam's first moment
    then holds the gradients."""
    arrays, info = load(path)
    recipe, nets = _recipe(info), states.networks(_recipe(info))
    encdec = weights(load(beside(path, "tiny_encdec_weights.npz"))[0])
    params, books = names.read(recipe.tokenizer, encdec | weights(arrays))
    critic, _ = read_patch_critic(weights(load(beside(path, "discriminator.npz"))[0], "w_gn/"))
    seen = read_lpips(weights(load(beside(path, "lpips_tiny.npz"))[0]))
    start = states.below(states.TOKENIZER, params) | states.leaves_of_books(books) | states.below(states.CRITIC, critic)
    state = states.create(recipe, seen, arrays["llm_table"].astype(np.float32), start)
    state = dataclasses.replace(state, step=jnp.asarray(info["global_step_opt0"] // 2))
    ends = 2 * info["epoch_train_steps"] * (info["max_epochs"] - info["hparams_aux"]["tail_epoch"])
    ratios = {f"ratio{name}": info[f"global_step_opt{i}"] / ends for i, name in enumerate(("", "_after"))}
    given = {key: jnp.float32(value) for key, value in {"rate": 0.0, **ratios}.items()}
    step = jax.jit(lambda state, images: update(nets, state, images, given, None))
    after, results = step(state, last(arrays["x"]))

    want = weights(arrays, "opt0/train/")
    logged = {
        "reconstruction": results["reconstruction"] + results["perceptual"],
        "perceptual": results["perceptual"],
        "adversarial": results["adversarial"],
        "balance": results["balance"] * recipe.adversary.weight,
        "diff": results["codebook/commit_top"] + results["codebook/commit_bottom"],
    }
    for ours, theirs in (
        ("reconstruction", "rec_loss"),
        ("reconstruction", "nll_loss"),
        ("perceptual", "p_loss"),
        ("adversarial", "g_loss"),
        ("balance", "d_weight"),
        ("diff", "diff"),
        ("diff", "quant_loss"),
    ):
        rtol = 2e-3 if ours == "balance" else 1e-4
        np.testing.assert_allclose(logged[ours], want[theirs], rtol=rtol, atol=1e-6, err_msg=theirs)
    np.testing.assert_allclose(results["loss"], arrays["opt0/aeloss"], rtol=1e-4)
    np.testing.assert_allclose(results["loss"], want["total_loss"], rtol=1e-4)
    np.testing.assert_allclose(results["codebook/bottom/pre_length"], want["pre_len_l2norm"], rtol=1e-4)
    np.testing.assert_allclose(results["codebook/cosine_gap"], want["diff_cos"], rtol=1e-4)
    np.testing.assert_allclose(results["critic_loss"], arrays["opt1/discloss"], rtol=1e-4)
    np.testing.assert_allclose(results["critic_loss"], arrays["opt1/train/disc_loss"], rtol=1e-4)
    np.testing.assert_allclose(results["real_logits"], arrays["opt1/train/logits_real"], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(results["fake_logits"], arrays["opt1/train/logits_fake"], rtol=1e-4, atol=1e-6)

    moments = {name: after.opt_state[name].mu for name in states.NETWORKS}
    grads = {path: m / (1 - BETA1) for path, m in states.under(states.TOKENIZER, moments["generator"]).items()}
    written = names.write(recipe.tokenizer, grads, books)
    for key, value in weights(arrays, "opt0/grad/").items():
        np.testing.assert_allclose(written[key], value, rtol=2e-3, atol=1e-5, err_msg=key)
    grads = {path: m / (1 - BETA1) for path, m in states.under(states.CRITIC, moments["critic"]).items()}
    wanted, _ = read_patch_critic(weights(arrays, "opt1/grad/"))
    assert wanted
    for key, value in wanted.items():
        np.testing.assert_allclose(grads[key], value, rtol=2e-3, atol=1e-5, err_msg=key)
    np.testing.assert_allclose(
        after.moving["codebooks/top/embedding"], arrays["opt1/embedding_after"], atol=5e-5, rtol=1e-4
    )
    leaves = {**state.frozen, **state.moving, **state.trainable}
    once = jax.jit(lambda x: pass_through(nets, leaves, x, jax.random.key(0), given["ratio"])[1].codebooks["top"])
    book = once(last(arrays["x"]))
    for ours, theirs in TABLES.items():
        np.testing.assert_allclose(book[ours], arrays[f"opt0/{theirs}_after"], atol=5e-5, rtol=1e-4, err_msg=ours)


@golden("unicode", "lr_schedules*.json")
def test_learning_rates(path):
    clocks = {"unicode": "unicode", "hqtransformer": "hq", "rqvae": "rq"}
    checked = 0
    for case in json.loads(path.read_text()):
        c = case["config"]
        assert (c["multiplier"], c["buffer_epoch"], c["start_from_zero"]) == (1, 0, True)
        total = c["steps_per_epoch"] * c["max_epoch"]
        for name in clocks.keys() & case.keys():
            config = TokenizerTrainConfig(
                lr=c["base_lr"],
                min_lr=c["min_lr"],
                schedule="cosine",
                warmup_steps=round(c["warmup_epoch"] * c["steps_per_epoch"]),
                compat=TokenizerCompat(schedule=clocks[name]),
            )
            have = [config.lr * rate_factor(config, i, total) for i in range(total)]
            np.testing.assert_allclose(have, case[name], rtol=1e-9, atol=1e-18, err_msg=f"{name} {c}")
            checked += 1
    assert checked


def test_no_update_is_void_by_default():
    config = TokenizerTrainConfig(schedule="cosine", warmup_ratio=0.2)
    rates = [rate_factor(config, i, 10) for i in range(10)]
    assert min(rates) > 0 and max(rates) == rates[1] == 1.0 and rates[2:] == sorted(rates[2:], reverse=True)
    assert rate_factor(TokenizerTrainConfig(), 0, 10) == 1.0
    assert ramp(TokenizerTrainConfig(tail=0.1), 50) == 45


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"accum": 2, "global_batch": 4}, "trained with accum=1"),
        ({"schedule": "wsd"}, "train.schedule='wsd'"),
        ({"average": 1.0}, "train.average=1.0"),
        ({"no_decay": ("(",)}, "not a regular expression"),
    ],
)
def test_hyperparameters_that_cannot_be_used(wrong, says):
    with pytest.raises(ConfigError, match=says):
        TokenizerTrainConfig(**wrong)

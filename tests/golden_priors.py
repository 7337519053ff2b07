"""Goldens of LlamaGen's prior: its config as ours, the model of its formula weights, and codes that may part at a near tie."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from tests.golden_tokenizers import formula
from vlm_jax.nn.params import merge
from vlm_jax.visual_tokenizers.priors import gpt, gpt_names, models
from vlm_jax.visual_tokenizers.priors.options import GPTConfig, mlp_width

NEAR = 1e-3  # gap of the two largest logits below which either code may be chosen


def gpt_config(info: dict) -> GPTConfig:
    """GPTConfig of a golden's configuration."""
    return GPTConfig(
        layers=info["n_layer"],
        heads=info["n_head"],
        kv_heads=info["n_kv_head"] or info["n_head"],
        width=info["dim"],
        mlp=mlp_width(info["dim"], info["multiple_of"], info["ffn_dim_multiplier"]),
        codes=info["vocab_size"],
        grid=int(info["block_size"] ** 0.5),
        condition={"c2i": "class", "t2i": "caption"}[info["model_type"]],
        classes=info["num_classes"],
        caption_slots=info["cls_token_num"],
        caption_width=info["caption_dim"],
        condition_dropout=info["class_dropout_prob"],
        token_dropout=info["token_dropout_p"],
        attention_dropout=info["attn_dropout_p"],
        residual_dropout=info["resid_dropout_p"],
        mlp_dropout=info["ffn_dropout_p"],
        drop_path=info["drop_path_rate"],
        theta=info["rope_base"],
        eps=info["norm_eps"],
        init_std=info["initializer_range"],
    )


def gpt_model(info: dict) -> gpt.GPT:
    """The model with the weights that the goldens' README derives from names."""
    config = gpt_config(info)
    tensors = {name: formula(name, tuple(shape), info["weight_seed"]) for name, shape in info["param_shapes"].items()}
    params = gpt_names.read(config, tensors)
    return merge(models.structure(config), {path: jnp.asarray(value) for path, value in params.items()})


def agree_but_for_ties(ours: np.ndarray, theirs: np.ndarray, logits: np.ndarray) -> None:
    """Codes [B, N] are equal up to the first step of a row whose two largest of `logits` [B, N, V] are near each other."""
    best = np.sort(logits, axis=-1)
    near = best[..., -1] - best[..., -2] < NEAR
    for row in range(len(theirs)):
        sure = int(near[row].argmax()) if near[row].any() else theirs.shape[1]
        np.testing.assert_array_equal(ours[row, :sure], theirs[row, :sure], err_msg=f"row {row}")

"""LlamaGen's prior against its original program: rope, logits, losses, greedy codes with guidance, filters, tensor names."""

from __future__ import annotations

import json
import re

import jax
import jax.numpy as jnp
import numpy as np

from tests.golden_priors import agree_but_for_ties, gpt_config, gpt_model
from tests.golden_tokenizers import load
from tests.goldens import golden
from vlm_jax.train.prior_loss import gpt_loss
from vlm_jax.visual_tokenizers.priors import gpt, gpt_names, sampling
from vlm_jax.visual_tokenizers.priors.gpt_sampling import sample
from vlm_jax.visual_tokenizers.priors.options import PUBLISHED, Sampling

GREEDY_CLASSES = (3, 7)  # of every class-conditional golden
CASES = golden("unified", "gpt_*.npz")


def batch_of(arrays: dict, info: dict) -> dict:
    codes = jnp.asarray(arrays["idx"], jnp.int32)
    if info["model_type"] == "c2i":
        return {"codes": codes, "labels": jnp.asarray(arrays["cond"], jnp.int32).reshape(-1)}
    return {"codes": codes, "captions": jnp.asarray(arrays["caption"]), "caption_mask": jnp.asarray(arrays["emb_mask"])}


def condition_of(batch: dict) -> tuple:
    return batch["labels"] if "labels" in batch else batch["captions"], batch.get("caption_mask")


@CASES
def test_rope_is_that_of_the_checkpoints(path):
    arrays, info = load(path)
    c = gpt_config(info)
    rope = gpt.rope_table(c)
    assert rope.cos.shape == (1, c.slots + c.length, 1, c.head_dim // 2)
    assert not rope.cos[:, : c.slots].any() and not rope.sin[:, : c.slots].any()
    if "freqs_cis" in arrays:
        np.testing.assert_allclose(rope.cos[0, :, 0], arrays["freqs_cis"][..., 0], atol=1e-6)
        np.testing.assert_allclose(rope.sin[0, :, 0], arrays["freqs_cis"][..., 1], atol=1e-6)


@CASES
def test_logits_and_losses(path):
    arrays, info = load(path)
    model, batch = gpt_model(info), batch_of(arrays, info)
    condition, mask = condition_of(batch)
    hidden = jax.jit(lambda codes, condition, mask: model(codes, condition, mask))(batch["codes"], condition, mask)
    np.testing.assert_allclose(model.logits(hidden), arrays["train_logits"], atol=1e-4)
    loss = jax.jit(lambda batch: gpt_loss(model, batch, chunk=5))
    sums = loss(batch)
    np.testing.assert_allclose(sums.loss / sums.tokens, arrays["train_loss"], atol=1e-4)
    if "train_loss_second_invalid" in arrays:
        sums = loss(batch | {"valid": jnp.asarray([1, 0])})
        np.testing.assert_allclose(sums.loss / sums.tokens, arrays["train_loss_second_invalid"], atol=1e-4)


@CASES
def test_mask_of_padded_captions(path):
    arrays, _ = load(path)
    if "attn_mask" not in arrays:
        return
    real, theirs = arrays["emb_mask"] > 0, arrays["attn_mask"].astype(bool)
    slots = real.shape[1]
    segments = np.where(real, 1, 2 + np.arange(slots))
    segments = jnp.pad(jnp.asarray(segments), ((0, 0), (0, theirs.shape[-1] - slots)), constant_values=1)
    mask = gpt.Mask(causal=True, q_segments=segments, k_segments=segments)
    np.testing.assert_array_equal(mask.allowed(*theirs.shape[-2:]).reshape(theirs.shape), theirs)


@CASES
def test_greedy_codes(path):
    arrays, info = load(path)
    model, batch = gpt_model(info), batch_of(arrays, info)
    condition, mask = condition_of(batch)
    if info["model_type"] == "c2i":
        condition = jnp.asarray(GREEDY_CLASSES)
    found = {name: re.fullmatch(r"greedy_cfg([\d.]+)(?:_interval(-?\d+))?", name) for name in arrays}
    cases = {name: (float(m[1]), int(m[2] or -1)) for name, m in found.items() if m}
    assert cases
    for name, (scale, interval) in cases.items():
        how = Sampling(scale=scale, interval=interval, temperature=0)
        theirs = jnp.asarray(arrays[name], jnp.int32)
        keys = jax.random.split(jax.random.key(0), len(theirs))
        ours = jax.jit(lambda condition, keys, mask: sample(model, condition, keys, mask, how))(condition, keys, mask)
        logits = model.logits(model(theirs, condition, mask))
        if how.guided:
            drop = jnp.ones(len(theirs), bool)
            without = model.logits(model(theirs, condition, mask, drop))
            guided = sampling.guide(logits, without, scale)
            steps = jnp.arange(theirs.shape[1])[None, :, None]
            logits = jnp.where((interval < 0) | (steps < interval + 2), guided, logits)
        agree_but_for_ties(np.asarray(ours), np.asarray(theirs), np.asarray(logits))


@golden("unified", "topk_topp*.npz")
def test_filters(path):
    arrays, _ = load(path)
    logits = jnp.asarray(arrays["logits"])
    for name in arrays.keys() - {"logits"}:
        k, p = re.fullmatch(r"k(\d+)_p([\d.]+)", name).groups()
        ours = sampling.warp(logits, Sampling(top_k=int(k), top_p=float(p)))
        np.testing.assert_allclose(ours, arrays[name], atol=1e-6, err_msg=name)


@golden("unified", "gpt*_manifest.json")
def test_every_tensor_of_the_published_checkpoints_has_a_place(path):
    manifest = json.loads(path.read_text())
    tensors = {name: tuple(shape) for name, shape in manifest["tensors"].items()}
    config = gpt_names.config_of(tensors, grid=16)
    entries = gpt_names.entries(config)
    assert {e.key: e.shape for e in entries} == tensors
    assert sum(int(np.prod(e.shape)) for e in entries) == manifest["n_parameters"]
    size = re.search(r"GPT-(\w+)", manifest["model"])[1].lower()
    if config.condition == "class":
        assert config == PUBLISHED[f"gpt_{size}"]

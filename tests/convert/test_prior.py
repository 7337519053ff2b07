"""Priors in files: LlamaGen's checkpoints in every container, our directory byte for byte, and files that are neither."""

import argparse
import json

import numpy as np
import pytest

from vlm_jax.convert import torch_pickle
from vlm_jax.convert.prior import load_prior, save_prior
from vlm_jax.convert.tensors import CheckpointError
from vlm_jax.visual_tokenizers.priors import gpt, gpt_names
from vlm_jax.visual_tokenizers.priors.options import GPTConfig

SIZES = dict(layers=2, heads=2, kv_heads=2, width=16, mlp=24, codes=12, grid=2, classes=5)
CONFIGS = {
    "class": GPTConfig(**SIZES),
    "caption": GPTConfig(**SIZES | {"classes": 1000}, condition="caption", caption_slots=3, caption_width=10),
}


def params_of(config):
    rng = np.random.RandomState(0)
    return {path: rng.normal(size=s.shape).astype(np.float32) for path, s in gpt.shapes(config).items()}


@pytest.mark.parametrize("kind", CONFIGS)
def test_our_directory_is_read_back_byte_for_byte(tmp_path, kind):
    config, params = CONFIGS[kind], params_of(CONFIGS[kind])
    save_prior(tmp_path / "a", config, params)
    found = load_prior(tmp_path / "a")
    assert found.config == config and found.params.keys() == params.keys()
    for path, value in params.items():
        np.testing.assert_array_equal(found.params[path], value, err_msg=path, strict=True)
    save_prior(tmp_path / "run" / "export", *found)
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "run/export" / file).read_bytes()
    assert load_prior(tmp_path / "run").config == config


@pytest.mark.parametrize("container", ["", "model", "module", "state_dict", "ema"])
def test_original_checkpoints(tmp_path, container):
    config, params = CONFIGS["caption"], params_of(CONFIGS["caption"])
    torch = pytest.importorskip("torch")
    tensors = {key: torch.from_numpy(value) for key, value in gpt_names.write(config, params).items()}
    whole = {container: tensors, "steps": 3, "args": argparse.Namespace(lr=1e-4)} if container else tensors
    torch.save(whole, tmp_path / "t2i.pt")
    found = load_prior(tmp_path / "t2i.pt", grid=2, heads=2)
    assert found.config == config
    for path, value in params.items():
        np.testing.assert_array_equal(found.params[path], value, err_msg=path)


def test_what_is_no_prior(tmp_path):
    config = CONFIGS["class"]
    tensors = gpt_names.write(config, params_of(config))
    torch_pickle.save(tmp_path / "c2i.pt", tensors)
    for how, says in (
        ({}, "give --grid"),
        ({"grid": 2}, "say how many heads"),
        ({"grid": 2, "heads": 3}, "multiple of 4 x"),
    ):
        with pytest.raises(CheckpointError, match=f"c2i.pt: .*{says}"):
            load_prior(tmp_path / "c2i.pt", **how)
    del tensors["layers.1.ffn_norm.weight"]
    torch_pickle.save(tmp_path / "cut.pt", tensors)
    with pytest.raises(CheckpointError, match="cut.pt: the checkpoint has no tensor layers.1.ffn_norm.weight"):
        load_prior(tmp_path / "cut.pt", grid=2, heads=2)
    torch_pickle.save(tmp_path / "other.pt", {"a": np.zeros(3, np.float32)})
    with pytest.raises(CheckpointError, match="no prior of LlamaGen"):
        load_prior(tmp_path / "other.pt", grid=2)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava"}))
    with pytest.raises(CheckpointError, match="is no prior"):
        load_prior(tmp_path)
    with pytest.raises(CheckpointError, match="neither a prior's directory nor a weight file"):
        load_prior(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match="absent.pt does not exist"):
        load_prior(tmp_path / "absent.pt", grid=2)

"""Priors in files: original checkpoints in every container, our directory byte for byte, the command, and files that are neither."""

import argparse
import dataclasses
import json

import numpy as np
import pytest
import yaml

from tests.tiny_hierarchies import KINDS
from tests.tiny_hierarchies import params_of as tiny
from vlm_jax.__main__ import main
from vlm_jax.convert import torch_pickle
from vlm_jax.convert.prior import load_prior, save_prior
from vlm_jax.convert.tensors import CheckpointError
from vlm_jax.visual_tokenizers.priors import gpt_names, hierarchy_names, models
from vlm_jax.visual_tokenizers.priors.options import GPTConfig

SIZES = dict(layers=2, heads=2, kv_heads=2, width=16, mlp=24, codes=12, grid=2, classes=5)
CONFIGS = {
    "class": GPTConfig(**SIZES),
    "caption": GPTConfig(**SIZES | {"classes": 1000}, condition="caption", caption_slots=3, caption_width=10),
}


def params_of(config):
    rng = np.random.RandomState(0)
    return {path: rng.normal(size=s.shape).astype(np.float32) for path, s in models.shapes(config).items()}


@pytest.mark.parametrize("kind", [*CONFIGS, "rq", "hq_three"])
def test_our_directory_is_read_back_byte_for_byte(tmp_path, kind):
    config = (CONFIGS | KINDS)[kind]
    params = params_of(config)
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


def convert(folder, *flags, source="c2i.pt"):
    return main(["convert", f"--from={folder / source}", f"--to={folder / 'out'}", *flags])


def of_rq(folder):
    """An RQ-Transformer as its program leaves it."""
    config = KINDS["rq"]
    settings = {
        "dataset": {"vocab_size": config.codes},
        "arch": {
            "type": "rq-transformer", "block_size": [*config.grid, config.depth], "embed_dim": 16, "input_embed_dim": config.code_width,
            "shared_tok_emb": True, "shared_cls_emb": True, "input_emb_vqvae": True, "head_emb_vqvae": True, "cumsum_depth_ctx": True,
            "vocab_size_cond": config.conditions, "block_size_cond": 1,
            "body": {"n_layer": config.body.layers, "block": {"n_head": config.body.heads}},
            "head": {"n_layer": config.head.layers, "block": {"n_head": config.head.heads}},
        },
    }  # fmt: skip
    folder.mkdir()
    torch_pickle.save(folder / "model.pt", hierarchy_names.write(config, tiny(config)))
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return config


def test_the_command(tmp_path, capsys):
    config, params = CONFIGS["class"], params_of(CONFIGS["class"])
    torch_pickle.save(tmp_path / "c2i.pt", gpt_names.write(config, params))
    assert convert(tmp_path, "--grid=2", "--heads=2") == 0
    assert "gpt prior of" in capsys.readouterr().out
    found = load_prior(tmp_path / "out")
    assert found.config == config
    for path, value in params.items():
        np.testing.assert_array_equal(found.params[path], value, err_msg=path)
    rq = of_rq(tmp_path / "rq")
    for source in ("rq", "rq/model.pt"):
        assert convert(tmp_path, source=source) == 0
        assert "draws 2 x 3 x 2 codes" in capsys.readouterr().out
        found = load_prior(tmp_path / "out")
        assert found.config == rq
        for path, value in tiny(rq).items():
            np.testing.assert_array_equal(found.params[path], value, err_msg=path)


def test_a_prior_beside_its_tokenizer(tmp_path, capsys):
    """The checkpoint of an HQ-Transformer is one of a tokenizer too, so the prior is asked for."""
    config = KINDS["hq_bidirectional"]
    h = {
        "embed_dim": 16, "n_heads": 2, "n_layers": 1, "embedding_type": "bidirectional2", "ctx_len_img": 9, "resid_pdrop": 0.1,
        "n_classes": 5, "gelu_use_approx": True, "attn_bias": False, "mlp_bias": False,
    }  # fmt: skip
    deep = {**h, "n_heads": 4, "gelu_use_approx": False, "attn_bias": True, "mlp_bias": True}
    stage2 = {
        "type": "hq-transformer/bidirectional4",
        "use_cls_cond": True,
        "vocab_size_img": 9,
        "hparams": h,
        "hparams_dec": deep,
    }
    settings = {"dataset": {"image_resolution": 16}, "stage1": {"hparams": {"ch_mult": [1, 2, 4]}}, "stage2": stage2}
    same = dataclasses.replace(config, codes=(9, 9))
    (tmp_path / "hq/ckpt").mkdir(parents=True)
    (tmp_path / "hq/config.yaml").write_text(yaml.safe_dump(settings))
    state = {f"stage2.{k}": v for k, v in hierarchy_names.write(same, tiny(same)).items()}
    state["stage1.encoder.conv_in.weight"] = np.zeros((2, 3), np.float32)
    torch_pickle.save(tmp_path / "hq/ckpt/last.ckpt", state)
    assert convert(tmp_path, "--extract=prior", source="hq") == 0
    assert "draws 2 x 2 and 4 x 4 codes" in capsys.readouterr().out
    assert load_prior(tmp_path / "out").config == same


@pytest.mark.parametrize(
    ("source", "flags", "says"),
    [
        ("c2i.pt", [], "give --grid, e.g. one of 16, 24, 32"),
        ("c2i.pt", ["--grid=2"], "say how many heads it has"),
        ("c2i.pt", ["--names=hf"], "is a prior over codes: --names has no meaning for it"),
        ("c2i.pt", ["--grid=2", "--heads=2", "--to=x.pt"], "a prior is written as a directory, give one"),
        ("rq.pt", [], "rq.pt has no config.yaml in its folder or the one above"),
        ("other.pt", ["--grid=16"], "is no prior over codes: --grid has no meaning for it"),
        ("other.pt", ["--extract=prior", "--grid=16"], "it is no prior of LlamaGen"),
    ],
)
def test_what_the_command_refuses(tmp_path, capsys, source, flags, says):
    config = CONFIGS["class"]
    torch_pickle.save(tmp_path / "c2i.pt", gpt_names.write(config, params_of(config)))
    torch_pickle.save(tmp_path / "rq.pt", hierarchy_names.write(KINDS["rq"], tiny(KINDS["rq"])))
    torch_pickle.save(tmp_path / "other.pt", {"a": np.zeros(3, np.float32)})
    assert convert(tmp_path, *flags, source=source) == 2
    message = capsys.readouterr().err
    assert says in message and message.count("\n") == 1
    assert not (tmp_path / "out").exists()

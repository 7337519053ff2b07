"""Visual tokenizers in files: original checkpoints in every container, our directory byte for byte, and files that are neither."""

import argparse
import collections
import json
import os
import pickle
import zipfile

import numpy as np
import pytest
import yaml

from tests.tiny_visual_tokenizers import TINY, tensors
from vlm_jax.__main__ import main
from vlm_jax.convert import torch_pickle
from vlm_jax.convert.shards import read_file
from vlm_jax.convert.tensors import CheckpointError, full
from vlm_jax.convert.visual_tokenizer import is_tokenizer, load_tokenizer, published, save_tokenizer
from vlm_jax.convert.visual_tokenizer_config import config_of
from vlm_jax.visual_tokenizers import names
from vlm_jax.visual_tokenizers.options import PUBLISHED


def same(found, config, made):
    params, books = names.read(config, made)
    assert found.params.keys() == params.keys() and found.codebooks.keys() == books.keys()
    for path, value in params.items():
        np.testing.assert_array_equal(found.params[path], value, err_msg=path, strict=True)
    for book, fields in books.items():
        for field, value in fields.items():
            np.testing.assert_array_equal(found.codebooks[book][field], value, err_msg=field, strict=True)


@pytest.mark.parametrize("name", TINY)
def test_shapes_tell_the_config(tmp_path, name):
    config, made = TINY[name], tensors(TINY[name])
    torch_pickle.save(tmp_path / "x.pt", made)
    found = load_tokenizer(tmp_path / "x.pt")
    assert found.config == config
    same(found, config, made)


@pytest.mark.parametrize("name", ["vq8", "rq_ffhq", "hq_top4"])
def test_shapes_tell_the_published_configs(name):
    config = PUBLISHED[name]
    shapes = {entry.key: entry.shape for entry in names.entries(config)}
    again = frozenset(e.key.rpartition(".")[0] for e in names.entries(config) if e.again)
    assert config_of(shapes, again) == config


@pytest.mark.parametrize("name", TINY)
def test_our_directory_is_read_back_byte_for_byte(tmp_path, name):
    config, made = TINY[name], tensors(TINY[name])
    params, books = names.read(config, made)
    save_tokenizer(tmp_path / "a", config, params, books, extra={"step": 7})
    found = load_tokenizer(tmp_path / "a")
    assert found.config == config and is_tokenizer(tmp_path / "a")
    same(found, config, made)
    save_tokenizer(tmp_path / "b", *found, extra={"step": 7})
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    stored = {
        key: tensor.read(full(tensor.shape)) for key, tensor in read_file(tmp_path / "a/model.safetensors").items()
    }
    assert stored.keys() == made.keys()
    for key, value in made.items():
        np.testing.assert_array_equal(stored[key], value, err_msg=key, strict=True)
    assert json.loads((tmp_path / "a/config.json").read_text())["extra"] == {"step": 7}


@pytest.mark.parametrize("prefix", ["", "generator.", "stage1.", "module.", "some.other."])
def test_prefixes(tmp_path, prefix):
    made = tensors(TINY["hq"])
    others = {"discriminator.main.0.weight": np.zeros((4, 3, 4, 4), np.float32)}
    torch_pickle.save(tmp_path / "x.ckpt", {prefix + key: value for key, value in made.items()} | others)
    same(load_tokenizer(tmp_path / "x.ckpt"), TINY["hq"], made)


def test_several_models_in_one_file(tmp_path):
    made = tensors(TINY["vq"])
    torch_pickle.save(tmp_path / "x.pt", {f"{p}.{k}": v for p in ("one", "two") for k, v in made.items()})
    with pytest.raises(CheckpointError, match=r"x\.pt .*several \(one\., two\.\)"):
        load_tokenizer(tmp_path / "x.pt")


@pytest.mark.parametrize("container", ["ema", "model", "state_dict"])
def test_containers_and_what_lies_beside(tmp_path, container):
    torch = pytest.importorskip("torch")
    made, other = tensors(TINY["vq"]), tensors(TINY["vq"], seed=1)
    wrapped = collections.OrderedDict((k, torch.tensor(v)) for k, v in made.items())
    args = argparse.Namespace(codebook_l2_norm=False, commit_loss_beta=0.5, entropy_loss_ratio=0.1, lr=1e-4)
    saved = {container: wrapped, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}, "steps": 5, "args": args}
    if container == "ema":
        saved["model"] = {k: torch.tensor(v) for k, v in other.items()}
    torch.save(saved, tmp_path / "x.pt")
    found = load_tokenizer(tmp_path / "x.pt")
    same(found, TINY["vq"], made)
    q = found.config.quantizer
    assert (q.normalise, q.beta, q.entropy) == (False, 0.5, 0.1)


def test_half_precision_is_read_as_float32(tmp_path):
    made = {k: v.astype(np.float16) for k, v in tensors(TINY["vq"]).items()}
    torch_pickle.save(tmp_path / "x.pt", made)
    same(load_tokenizer(tmp_path / "x.pt"), TINY["vq"], {k: v.astype(np.float32) for k, v in made.items()})


SETTINGS = {
    "rq": {
        "arch": {
            "type": "rq-vae",
            "hparams": {
                "shared_codebook": True,
                "decay": 0.9,
                "restart_unused_codes": False,
                "latent_loss_weight": 0.5,
            },
            "ddconfig": {"resolution": 64},
        }
    },
    "unicode_rq": {
        "stage1": {
            "hparams": {"resolution": 64},
            "hparams_aux": {"norm_type": "fix", "fix_len_l2norm": 20, "num_quant_layer": 2},
        }
    },
}


@pytest.mark.parametrize("where", ["model.pt", "ckpt/state_dict.ckpt", "ckpt/last.ckpt"])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_folder_with_its_settings(tmp_path, name, where):
    (tmp_path / where).parent.mkdir(exist_ok=True)
    torch_pickle.save(tmp_path / where, tensors(TINY[name]))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(SETTINGS[name]))
    assert is_tokenizer(tmp_path)
    for path in (tmp_path, tmp_path / where):
        found = load_tokenizer(path).config
        assert (found.autoencoder.resolution, found.autoencoder.attention) == (64, (32,))
        q = found.quantizer
        if name == "rq":
            assert (q.shared, q.decay, q.restart, q.beta) == (True, 0.9, False, 0.5)
        else:
            assert (q.relative, q.length, q.depth) == (False, 20.0, 2)


def test_the_command(tmp_path, capsys):
    made = tensors(TINY["vq"])
    torch_pickle.save(tmp_path / "vq.pt", made)
    assert main(["convert", "--from", str(tmp_path / "vq.pt"), "--to", str(tmp_path / "out")]) == 0
    assert "vq tokenizer of" in capsys.readouterr().out
    same(load_tokenizer(tmp_path / "out"), TINY["vq"], made)
    for flags, words in (
        (["--config_name", "vq17"], "--config_name=vq17 is unknown: use one of vq16"),
        (["--config_name", "vq16"], "has shape"),
        (["--merge"], "--merge has no meaning"),
        (["--dtype", "bfloat16"], "--dtype has no meaning"),
    ):
        assert main(["convert", "--from", str(tmp_path / "vq.pt"), "--to", str(tmp_path / "no"), *flags]) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
    assert published("VQ-16") == PUBLISHED["vq16"]


def changed(key, value):
    made = tensors(TINY["vq"])
    if value is None:
        del made[key]
    else:
        made[key] = value
    return made


@pytest.mark.parametrize(
    "made, words",
    [
        ({"a.weight": np.zeros((2, 2), np.float32)}, "is not a tokenizer checkpoint: one tensor encoder.conv_in.weight"),
        (changed("encoder.conv_blocks.1.res.0.conv2.bias", None), "no tensor encoder.conv_blocks.1.res.0.conv2.bias"),
        (changed("encoder.conv_out.weight", None), "no tensor encoder.conv_out.weight, so its sizes"),
        (changed("encoder.conv_blocks.0.res.0.conv1.weight", None), "not a visual tokenizer that is known"),
        (changed("quantize.embedding.weight", None), "its quantiser is not"),
        (changed("quantize.embedding.weight", np.zeros((4, 4, 4), np.float32)), "2 dimensions are needed"),
        (changed("decoder.conv_out.weight", np.zeros((4, 32, 3, 3), np.float32)), r"decoder.conv_out.weight has shape \(4,"),
        (changed("encoder.conv_blocks.1.res.0.conv1.weight", np.zeros((40, 32, 3, 3), np.float32)), "40 wide"),
        (changed("decoder.conv_blocks.1.attn.0.q.weight", np.zeros((32, 32, 1, 1), np.float32)), "attention at the levels"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit(tmp_path, made, words):
    torch_pickle.save(tmp_path / "x.pt", made)
    with pytest.raises(CheckpointError, match=words) as error:
        load_tokenizer(tmp_path / "x.pt")
    assert "x.pt" in str(error.value) and "\n" not in str(error.value)


class Runs:
    def __init__(self, call, *args):
        self.parts = (call, args)

    def __reduce__(self):
        return self.parts


def zipped(path, value):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(value, protocol=2))


@pytest.mark.parametrize("call", [os.system, eval, getattr, exec])
def test_a_pickle_that_wants_to_run_code_is_refused(tmp_path, call):
    zipped(tmp_path / "x.pt", {"model": {}, "args": Runs(call, f"touch {tmp_path / 'ran'}")})
    with pytest.raises(CheckpointError, match=rf"x\.pt holds the Python object .*{call.__name__}.* was not run"):
        load_tokenizer(tmp_path / "x.pt")
    assert not (tmp_path / "ran").exists()


def test_what_is_remembered_is_never_made(tmp_path):
    """Even a global that is let through is a stand-in: building, calling or filling it does nothing."""
    zipped(tmp_path / "x.pt", {"args": argparse.Namespace(a=1), "d": collections.defaultdict(list, b=2)})
    found = torch_pickle.load(tmp_path / "x.pt", objects=True)
    assert found["args"].state == {"a": 1} and found["args"].kind == "argparse.Namespace"
    assert found["d"].state == {"b": 2} and not isinstance(found["d"], dict)
    with pytest.raises(CheckpointError, match="argparse.Namespace"):
        torch_pickle.load(tmp_path / "x.pt")


@pytest.mark.parametrize(
    "files, words",
    [
        ({}, "no weight file"),
        ({"a.pt": b"", "b.pt": b""}, r"2 weight files \(a\.pt, b\.pt"),
        ({"a.pt": b"no torch file"}, r"a\.pt is damaged or not a file written by torch.save"),
        ({"config.json": b'{"model_type": "llava"}'}, "not the config of a visual tokenizer"),
        ({"config.yaml": b"arch: [", "a.pt": b""}, "config.yaml is not readable YAML"),
    ],
)
def test_folders_that_do_not_fit(tmp_path, files, words):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    if "config.yaml" in files:
        torch_pickle.save(tmp_path / "a.pt", tensors(TINY["vq"]))
    with pytest.raises(CheckpointError, match=words):
        load_tokenizer(tmp_path)


def test_our_directory_damaged(tmp_path):
    save_tokenizer(tmp_path, TINY["vq"], *names.read(TINY["vq"], tensors(TINY["vq"])))
    raw = json.loads((tmp_path / "config.json").read_text())
    for change, words in (
        ({"names": "other"}, "tokenizer.names='other' is unknown"),
        ({"quantizer": raw["quantizer"] | {"codes": [25]}}, "quantize.embedding.weight has shape"),
        ({"quantizer": raw["quantizer"] | {"codez": 1}}, "unknown config key"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(raw | change))
        with pytest.raises(CheckpointError, match=words):
            load_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:100])
    with pytest.raises(CheckpointError, match="damaged"):
        load_tokenizer(tmp_path)

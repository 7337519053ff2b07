"""A model in parts: what lies where, there and back byte for byte, what replaces what, and transformers on each part."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from tests.convert.models import CLIP, SIGLIP, TINY, random_params
from tests.tiny_tokenizers import t5_directory
from vlm_jax.config import T5Config
from vlm_jax.convert.command import convert, convert_model
from vlm_jax.convert.manifest import read_manifest
from vlm_jax.convert.parts import PROJECTOR, VISION
from vlm_jax.convert.read import open_checkpoint
from vlm_jax.convert.shards import read_directory, read_file
from vlm_jax.convert.tensors import CheckpointError, full
from vlm_jax.convert.write import export
from vlm_jax.data.tokenizer import load_tokenizer
from vlm_jax.models import vlm

FLAN = T5Config(
    vocab=320, width=32, mlp=64, encoder_layers=2, decoder_layers=3, heads=4, head_dim=12, buckets=8, max_distance=16
)
OWN = dataclasses.replace(CLIP, mean=(0.5, 0.4, 0.3), std=(0.15, 0.2, 0.25), init_std=0.02)
CLIP_T5 = dataclasses.replace(TINY, vision=OWN, llm=FLAN, aspect="pad")
MODELS = {
    "flan": CLIP_T5,
    "original_t5": dataclasses.replace(
        CLIP_T5, llm=dataclasses.replace(FLAN, gated=False, act="relu", tie=True, dropout=0.0)
    ),
    "llama_siglip": dataclasses.replace(TINY, vision=SIGLIP),
}


def contents(directory):
    """{key: (dtype, shape, bytes)} of a model directory."""
    found = read_directory(directory)
    return {name: (str(t.dtype), t.shape, t.read(full(t.shape)).tobytes()) for name, t in found.items()}


@pytest.fixture
def tokenizer(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    return t5_directory(tmp_path / "tokenizer")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_there_and_back(tmp_path, name, dtype):
    """As a whole, in parts (in one file each and in several), as a whole again; the config with its statistics too."""
    config, params = MODELS[name], random_params(MODELS[name])
    export(tmp_path / "whole", config, params, names="hf" if config.encoder_decoder else "llava", dtype=dtype)
    whole = open_checkpoint(tmp_path / "whole")
    assert whole.config == config
    for size, place in ((10**9, "parts"), (20_000, "shards")):
        export(tmp_path / place, whole.config, whole.leaves, names="parts", source=whole, max_shard=size)
        parts = open_checkpoint(tmp_path / place)
        assert parts.config == config and set(parts.leaves) == set(whole.leaves)
        for path, leaf in whole.leaves.items():
            assert parts.leaves[path].dtype == leaf.dtype
            assert parts.read(path).tobytes() == leaf.read().tobytes(), path
    assert len(list((tmp_path / "shards" / VISION).glob("model-*.safetensors"))) > 1
    convert_model(tmp_path / "shards", tmp_path / "again", names="hf" if config.encoder_decoder else "llava")
    assert contents(tmp_path / "again") == contents(tmp_path / "whole")
    again, first = (json.loads((tmp_path / place / "config.json").read_text()) for place in ("again", "whole"))
    assert again == first


def test_the_command_and_its_manifest(tmp_path, tokenizer, capsys):
    export(tmp_path / "whole", CLIP_T5, random_params(CLIP_T5), tokenizer=tokenizer, chat_template="as T5 talks")
    assert (tmp_path / "whole" / "spiece.model").is_file() and (
        tmp_path / "whole" / "preprocessor_config.json"
    ).is_file()
    assert convert(**{"from": str(tmp_path / "whole"), "to": str(tmp_path / "parts"), "names": "parts"}) == 0
    assert "llava model of" in capsys.readouterr().out
    manifest = read_manifest(tmp_path / "parts")
    assert manifest.parts == {"llm": "t5", "vision": VISION, "projector": PROJECTOR}
    there = {file.name for file in (tmp_path / "parts").iterdir()}
    assert {"config.json", "vlm_jax.json", "spiece.model", "generation_config.json", "chat_template.jinja"} <= there
    assert not any(name.startswith("model") for name in there), "nothing is held twice"
    for folder in (tmp_path / "parts", tmp_path / "parts" / "t5"):
        assert load_tokenizer(folder).fingerprint == load_tokenizer(tokenizer).fingerprint
    wanted = {f"mm_projector.{i}.{p}" for i in (0, 2) for p in ("weight", "bias")}
    assert set(read_file(tmp_path / "parts" / PROJECTOR)) == wanted
    checked_table(tmp_path / "parts")


def checked_table(directory):
    """Every tensor of every part is named once, and what the manifest says about it gives our parameter."""
    raw, checkpoint = json.loads((directory / "vlm_jax.json").read_text()), open_checkpoint(directory)
    tensors = {part: directory / place for part, place in raw["parts"].items()}
    tensors = {part: (read_directory if path.is_dir() else read_file)(path) for part, path in tensors.items()}
    named = {part: [] for part in tensors}
    for path, said in raw["tensors"].items():
        named[said["part"]] += said["names"]
        first = tensors[said["part"]][said["names"][0]].read(())
        ours = checkpoint.read(path)
        ours = ours[0] if checkpoint.leaves[path].stacked else ours
        turned = {"as_is": lambda x: x, "transpose": lambda x: x.T, "patch": lambda x: x.transpose(2, 3, 1, 0)}
        np.testing.assert_array_equal(turned[said["layout"]](first).reshape(ours.shape), ours, err_msg=path)
    assert {part: sorted(names) for part, names in named.items()} == {p: sorted(found) for p, found in tensors.items()}


def test_a_part_may_be_replaced(tmp_path):
    config, params = MODELS["llama_siglip"], random_params(MODELS["llama_siglip"])
    export(tmp_path / "parts", config, params, names="parts")
    other = random_params(config, 7)
    export(tmp_path / "other", config, other, names="parts")
    mixed = open_checkpoint(tmp_path / "parts", llm=tmp_path / "other" / "llm")
    np.testing.assert_array_equal(mixed.read("llm/head/kernel"), other["llm/head/kernel"])
    np.testing.assert_array_equal(mixed.read("tower/position"), params["tower/position"])
    (tmp_path / "parts" / PROJECTOR).unlink()
    with pytest.raises(CheckpointError, match="mm_projector.safetensors does not exist"):
        open_checkpoint(tmp_path / "parts")


def test_what_replaces_what(tmp_path):
    """An export removes what an earlier one wrote, and nothing else."""
    config, params = CLIP_T5, random_params(CLIP_T5)
    for names in ("parts", "clip_t5", "parts"):
        export(tmp_path / "x", config, params, names=names)
        assert open_checkpoint(tmp_path / "x").config == config
        held = {file.name for file in (tmp_path / "x").iterdir()} & {"t5", VISION, PROJECTOR, "model.safetensors"}
        assert held == ({"t5", VISION, PROJECTOR} if names == "parts" else {"model.safetensors"})
    (tmp_path / "y" / "t5").mkdir(parents=True)
    (tmp_path / "y" / "t5" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="t5 is in the way: no earlier export wrote this folder"):
        export(tmp_path / "y", config, params, names="parts")
    assert [file.name for file in (tmp_path / "y").iterdir()] == ["t5"]
    export(tmp_path / "y", config, params)
    assert (tmp_path / "y" / "t5" / "config.json").read_text() == "{}"


@pytest.mark.parametrize("name", MODELS)
def test_transformers_loads_the_parts(tmp_path, name):
    """The language model with equal logits, the tower with equal features."""
    torch = pytest.importorskip("torch")
    import transformers

    config, params = MODELS[name], random_params(MODELS[name])
    export(tmp_path / "x", config, params, names="parts")
    parts = read_manifest(tmp_path / "x").parts
    rng = np.random.default_rng(0)
    ids, said = rng.integers(2, config.llm.vocab, (2, 40)), rng.integers(2, config.llm.vocab, (2, 9))
    rows = {"tokens": ids, "segments": np.ones_like(ids), "positions": np.tile(np.arange(40), (2, 1))}
    rows |= {"answer_tokens": said, "answer_segments": np.ones_like(said)}
    pixels = rng.normal(size=(2, 28, 28, 3)).astype(np.float32)

    @jax.jit
    def run(params):
        net = vlm.build(config, params)
        return net.logits(vlm.forward(net, rows)), net.tower(pixels)

    ours, features = run(params)
    kind = transformers.AutoModelForSeq2SeqLM if config.encoder_decoder else transformers.AutoModelForCausalLM
    more = {"decoder_input_ids": torch.tensor(said)} if config.encoder_decoder else {}
    theirs = kind.from_pretrained(tmp_path / "x" / parts["llm"], dtype=torch.float32).eval()
    with torch.no_grad():
        np.testing.assert_allclose(theirs(input_ids=torch.tensor(ids), **more).logits.numpy(), ours, atol=2e-4)

    kind = transformers.SiglipVisionModel if config.vision.kind == "siglip" else transformers.CLIPVisionModel
    tower, loading = kind.from_pretrained(tmp_path / "x" / VISION, dtype=torch.float32, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    with torch.no_grad():
        states = tower.eval()(torch.tensor(pixels.transpose(0, 3, 1, 2)), output_hidden_states=True).hidden_states
    wanted = states[config.vision.feature_layers[0]].numpy()
    wanted = wanted[:, 1:] if config.vision.select == "patch" else wanted
    np.testing.assert_allclose(features, wanted, atol=2e-4)

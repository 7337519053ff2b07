"""Contract: what transformers saves we load, what we save it loads, tensors come back byte for byte and
logits are equal.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.convert.models import TINY, VARIANTS, random_adapter, random_params
from tests.goldens import cases
from vlm_jax.config import LoRAConfig
from vlm_jax.convert import torch_pickle
from vlm_jax.convert.command import convert_model
from vlm_jax.convert.merge import merged, open_model
from vlm_jax.convert.names import NAMINGS
from vlm_jax.convert.read import open_checkpoint
from vlm_jax.convert.shards import read_directory, read_file
from vlm_jax.convert.tensors import full
from vlm_jax.convert.write import export
from vlm_jax.convert.write_adapter import export_adapter
from vlm_jax.data.new_tokenizer import word_level
from vlm_jax.models import vlm

DIRECTORIES = [path.parent for path in cases("llava_hf", "*/config.json")]


def each(test):
    """Once per checkpoint directory; where there is none the test is not collected."""
    mark = pytest.mark.parametrize("directory", DIRECTORIES, ids=[d.name for d in DIRECTORIES])
    return mark(test) if DIRECTORIES else None


def contents(directory: Path) -> dict[str, tuple]:
    """{key: (dtype, shape, bytes)} of a model directory."""
    return {
        name: (str(t.dtype), t.shape, t.read(full(t.shape)).tobytes()) for name, t in read_directory(directory).items()
    }


@each
def test_round_trip_is_byte_equal(directory, tmp_path):
    source = open_checkpoint(directory)
    for max_shard in (5 * 10**9, 30_000):
        export(tmp_path, source.config, source.leaves, names="source", source=source, max_shard=max_shard)
        assert contents(tmp_path) == contents(directory)
        assert json.loads((tmp_path / "config.json").read_text()) == json.loads((directory / "config.json").read_text())


@each
def test_every_naming_holds_the_same_parameters(directory, tmp_path):
    source = open_checkpoint(directory)
    want = {path: leaf.read() for path, leaf in source.leaves.items()}
    for naming in [n for n in NAMINGS if n != "llava"]:
        export(tmp_path / naming, source.config, source.leaves, names=naming, source=source)
        back = open_checkpoint(tmp_path / naming)
        assert back.naming == naming and back.config == source.config and back.image_token == source.image_token
        for path, value in want.items():
            assert back.read(path).tobytes() == value.tobytes(), path


@each
@pytest.mark.parity
def test_transformers_loads_what_we_write(directory, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import LlavaForConditionalGeneration

    source = open_checkpoint(directory)
    theirs = LlavaForConditionalGeneration.from_pretrained(directory).state_dict()
    for names in ("source", "hf"):
        export(tmp_path / names, source.config, source.leaves, names=names, source=source, max_shard=40_000)
        model, info = LlavaForConditionalGeneration.from_pretrained(tmp_path / names, output_loading_info=True)
        assert not any(info.values()), info
        ours = model.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(ours[key].dtype == theirs[key].dtype and torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parity
def test_logits_are_equal(variant, tmp_path):
    """A model of ours, exported and run by transformers: two rows, one image and none, beyond the window and
    the rope's first range.
    """
    torch = pytest.importorskip("torch")
    from transformers import LlavaForConditionalGeneration

    config, params = VARIANTS[variant], random_params(VARIANTS[variant])
    export(
        tmp_path,
        config,
        params,
        image_token=100,
        tokens={"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    )
    rng = np.random.default_rng(1)
    length, features = 70, config.vision.features
    ids = rng.integers(3, 99, (2, length))
    ids[0, 5 : 5 + features] = 100
    pixels = rng.normal(size=(1, 3, 28, 28)).astype(np.float32)

    model = LlavaForConditionalGeneration.from_pretrained(
        tmp_path, attn_implementation="eager", dtype=torch.float32
    ).eval()
    with torch.no_grad():
        want = model(input_ids=torch.tensor(ids), pixel_values=torch.tensor(pixels)).logits.numpy()

    slots = np.full(ids.shape, -1, np.int32)
    slots[0, 5 : 5 + features] = np.arange(features)
    images = np.zeros((2, 1, 28, 28, 3), np.float32)
    images[0] = pixels.transpose(0, 2, 3, 1)
    batch = {
        "tokens": np.where(slots < 0, ids, 0).astype(np.int32), "image_slots": slots, "images": images,
        "positions": np.tile(np.arange(length, dtype=np.int32), (2, 1)),
        "segments": np.ones(ids.shape, np.int32),
    }  # fmt: skip
    ours = vlm.build(config, params)
    got = np.asarray(jax.jit(lambda batch: ours.logits(vlm.forward(ours, batch)))(batch))
    np.testing.assert_allclose(got, want[..., : got.shape[-1]], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("variant", ["plain", "siglip_pad", "full_two_layers"])
@pytest.mark.parity
def test_transformers_processor_of_an_export(variant, tmp_path):
    """Its processor expands `<image>` to our number of features and makes our pixels."""
    pytest.importorskip("torch")
    from PIL import Image
    from transformers import AutoProcessor

    from vlm_jax.data.image_source import ImageSource
    from vlm_jax.data.images import Preprocess, load_views

    config = VARIANTS[variant]
    word_level(["USER: what is this? ASSISTANT: a cat."], tmp_path / "tokenizer")
    export(tmp_path / "model", config, random_params(config), tokenizer=tmp_path / "tokenizer")
    processor = AutoProcessor.from_pretrained(tmp_path / "model")
    dialogue = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is this?"}]}]
    text = processor.apply_chat_template(dialogue, add_generation_prompt=True)
    assert text == "USER: <image>\nwhat is this? ASSISTANT:"
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 61, 3), np.uint8))
    picture.save(tmp_path / "x.png")
    made = processor(text=text, images=picture, return_tensors="np")
    checkpoint = open_checkpoint(tmp_path / "model")
    assert (made["input_ids"] == checkpoint.image_token).sum() == config.vision.features
    assert made["input_ids"][0, 0] == checkpoint.tokens["bos_token_id"]
    views = load_views(ImageSource(str(tmp_path / "x.png")), Preprocess.of(checkpoint.config))[0]
    ours = (np.asarray(views, np.float32) / 255 - config.vision.mean) / config.vision.std
    np.testing.assert_allclose(made["pixel_values"], ours.transpose(0, 3, 1, 2), atol=2e-5)


def test_default_names_are_the_published_ones(tmp_path):
    export(tmp_path, TINY, random_params(TINY))
    assert open_checkpoint(tmp_path).naming == "hf"


ADAPTED = {
    "plain": (LoRAConfig(("^llm/blocks/",), 4, 8.0),),
    "siglip_pad": (LoRAConfig(("^llm/.*/attn/",), 3, 5.0, rslora=True), LoRAConfig(("^tower/(unused/)?blocks/",), 2, 6.0)),
    "tied_biased": (LoRAConfig(("^llm/.*/[qk]$",), 2, 6.0), LoRAConfig(("^llm/.*/up$", "^tower/.*/q$"), 4, 3.0)),
}  # fmt: skip
PROJECTOR = dict.fromkeys(f"projector/layer_{i}/{leaf}" for i in (0, 1) for leaf in ("kernel", "bias"))
BIASES = {"tower/blocks/attn/q/bias": None, "tower/blocks/norm1/bias": None}


def question(config) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """One image and a text, as transformers takes them and as we do."""
    rng, features = np.random.default_rng(1), config.vision.features
    ids = rng.integers(3, 99, (1, features + 9))
    ids[0, 4 : 4 + features] = 100
    pixels = rng.normal(size=(1, 3, 28, 28)).astype(np.float32)
    slots = np.full(ids.shape, -1, np.int32)
    slots[0, 4 : 4 + features] = np.arange(features)
    batch = {
        "tokens": np.where(slots < 0, ids, 0).astype(np.int32), "image_slots": slots,
        "images": pixels.transpose(0, 2, 3, 1)[None], "segments": np.ones(ids.shape, np.int32),
        "positions": np.arange(ids.shape[1], dtype=np.int32)[None],
    }  # fmt: skip
    return {"input_ids": ids, "pixel_values": pixels}, batch


def logits(checkpoint, batch) -> np.ndarray:
    model = vlm.build(checkpoint.config, {path: leaf.read() for path, leaf in checkpoint.leaves.items()})
    return np.asarray(jax.jit(lambda batch: model.logits(vlm.forward(model, batch)))(batch))


def export_base(folder: Path, config, seed: int = 0) -> Path:
    """A model of `config` without its adapters."""
    plain = dataclasses.replace(config, lora=())
    export(folder, plain, random_params(plain, seed), image_token=100, tokens={"pad_token_id": 0})
    return folder


@pytest.mark.parametrize("variant", ADAPTED)
@pytest.mark.parity
def test_peft_loads_our_adapters(variant, tmp_path):
    """With the projector and biases that were trained whole: equal logits, beside the kernels and merged by either side."""
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    from transformers import LlavaForConditionalGeneration

    config = dataclasses.replace(VARIANTS[variant], lora=ADAPTED[variant])
    base = export_base(tmp_path / "base", config)
    trained = PROJECTOR | (BIASES if variant == "tied_biased" else {})
    changed = {path: value for path, value in random_params(config, 7).items() if path in trained}
    params = random_params(config) | changed | random_adapter(config)
    export_adapter(tmp_path / "adapter", config, params, trained=trained, base=base)
    theirs, batch = question(config)
    theirs = {name: torch.tensor(value) for name, value in theirs.items()}
    model = LlavaForConditionalGeneration.from_pretrained(base, attn_implementation="eager", dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    with torch.no_grad():
        want = model(**theirs).logits.numpy()
        alone = model.merge_and_unload()(**theirs).logits.numpy()
    checkpoint = open_model(tmp_path / "adapter")
    for got in (logits(checkpoint, batch), logits(merged(checkpoint), batch)):
        np.testing.assert_allclose(got, want[..., : got.shape[-1]], atol=1e-4, rtol=1e-4)
        np.testing.assert_allclose(got, alone[..., : got.shape[-1]], atol=1e-4, rtol=1e-4)
    without = logits(open_checkpoint(base), batch)
    assert np.abs(without - got).max() > 0.1  # the adapter says something


PEFT_SETTINGS = {
    "names": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "fc1", "gate_proj"]},
    "patterns": {
        "r": 4, "lora_alpha": 3, "target_modules": r".*language_model.*\.(q_proj|v_proj|up_proj)", "use_rslora": True,
        "rank_pattern": {r"layers\.0\.self_attn\.q_proj": 2}, "alpha_pattern": {r".*v_proj": 9},
    },
    "layers": {"r": 2, "target_modules": ["k_proj", "down_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "bias": {"r": 2, "target_modules": ["q_proj"], "bias": "all", "modules_to_save": ["multi_modal_projector"]},
    "lora_only": {"r": 2, "target_modules": ["out_proj", "v_proj"], "bias": "lora_only", "modules_to_save": ["embed_tokens"]},
}  # fmt: skip


@pytest.mark.parametrize("settings, bare", [*((name, False) for name in PEFT_SETTINGS), ("bias", True)])
@pytest.mark.parity
def test_we_load_their_adapters(settings, bare, tmp_path):
    """Equal logits, and written again in PEFT's layout the same tensors."""
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    from transformers import LlavaForConditionalGeneration

    config = VARIANTS["plain"]
    base = export_base(tmp_path / "base", config)
    model = LlavaForConditionalGeneration.from_pretrained(base, attn_implementation="eager", dtype=torch.float32)
    raw = {"lora_alpha": 8, "task_type": "CAUSAL_LM"} | PEFT_SETTINGS[settings]
    model = peft.get_peft_model(model, peft.LoraConfig(**raw)).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value += 0.2 * torch.randn(value.shape)
        theirs, batch = question(config)
        want = model(**{name: torch.tensor(value) for name, value in theirs.items()}).logits.numpy()
    model.save_pretrained(tmp_path / "adapter", safe_serialization=not bare)
    if bare:  # the newest version has no other format, older ones wrote this file
        saved = tmp_path / "adapter" / "adapter_model.safetensors"
        if saved.is_file():
            torch.save(
                {k: torch.tensor(t.read(full(t.shape))) for k, t in read_file(saved).items()}, saved.with_suffix(".bin")
            )
            saved.unlink()
    checkpoint = open_model(tmp_path / "adapter")
    for got in (logits(checkpoint, batch), logits(merged(checkpoint), batch)):
        np.testing.assert_allclose(got, want[..., : got.shape[-1]], atol=1e-4, rtol=1e-4)

    convert_model(tmp_path / "adapter", tmp_path / "again")
    before, after = (tensors_of(tmp_path / name) for name in ("adapter", "again"))
    copies = {name for name in before if ".modules_to_save." in name or ".original_module." in name}
    assert after == {name: value for name, value in before.items() if name not in copies}


def tensors_of(folder: Path) -> dict[str, tuple]:
    """{name: (dtype, shape, bytes)} of an adapter's weights."""
    file = next(folder.glob("adapter_model.*"))
    found = read_file(file) if file.suffix == ".safetensors" else torch_pickle.read_tensors(file)
    return {name: (str(t.dtype), t.shape, t.read(full(t.shape)).tobytes()) for name, t in found.items()}

"""Contract: what transformers saves we load, what we save it loads, tensors come back byte for byte and
logits are equal.
"""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.convert.models import TINY, VARIANTS, random_params
from tests.goldens import cases
from vlm_jax.convert.names import NAMINGS
from vlm_jax.convert.read import open_checkpoint
from vlm_jax.convert.shards import read_directory
from vlm_jax.convert.tensors import full
from vlm_jax.convert.write import export
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

    from vlm_jax.data.images import ImageSource, Preprocess, load_views

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

"""CLIP-FlanT5 and T5 directories as others write them: bins in shards, aliases, stage 1, full sizes, heads that are tied or not."""

import dataclasses
import importlib.util
import json
import math
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from tests.convert.models import TINY, random_params, tower_directory, write_tensors
from tests.goldens import cases
from vlm_jax import recipe as recipes
from vlm_jax.config import T5Config
from vlm_jax.convert import names, torch_pickle
from vlm_jax.convert.command import convert_model
from vlm_jax.convert.files import write_json
from vlm_jax.convert.hf_config import llm_to_hf
from vlm_jax.convert.llava_config import vlm_to_llava
from vlm_jax.convert.read import open_checkpoint
from vlm_jax.convert.tensors import CheckpointError, as_leaves
from vlm_jax.convert.write import export_projector, plan
from vlm_jax.models import vlm

FLAN = T5Config(
    vocab=96, width=32, mlp=64, encoder_layers=2, decoder_layers=3, heads=4, head_dim=12, buckets=8, max_distance=16
)
MODEL = dataclasses.replace(TINY, llm=FLAN, aspect="pad")
TIED = dataclasses.replace(FLAN, gated=False, act="relu", tie=True)
LLM = ("llm", "head")


def tensors_of(config, rooms=names.ROOMS, naming="clip_t5", seed=0):
    """{original name: array} of a random model."""
    planned = plan(config, leaves(config, seed), naming, entries=names.entries(config, rooms))
    return {tensor.name: tensor.read() for tensor in planned}


def leaves(config, seed=0):
    return as_leaves(random_params(config, seed))


def write_bins(directory, tensors, config, shards=3):
    """pytorch_model-0000i-of-0000n.bin in bfloat16 with an index, as DeepSpeed leaves them."""
    directory.mkdir(parents=True)
    names_, places = sorted(tensors), {}
    for i in range(shards):
        file = f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin"
        here = {name: tensors[name].astype(ml_dtypes.bfloat16) for name in names_[i::shards]}
        torch_pickle.save(directory / file, here)
        places |= dict.fromkeys(here, file)
    write_json(directory / "pytorch_model.bin.index.json", {"metadata": {}, "weight_map": places})
    write_json(directory / "config.json", config)
    return directory


def t5_alone(directory, config=FLAN, drop=(), **changes):
    """A T5ForConditionalGeneration; `drop`: tensors that it lacks, `changes` of its config.json."""
    tensors = tensors_of(dataclasses.replace(MODEL, llm=config), LLM)
    kept = {name: value for name, value in tensors.items() if name not in drop}
    raw = {key: value for key, value in (llm_to_hf(config) | changes).items() if value is not None}
    return write_tensors(directory, kept, raw)


@pytest.mark.parametrize("model_type", ["clip_t5", "t5"])
@pytest.mark.parametrize("aliases", [(), names.ALIASES], ids=["shared", "aliases"])
@pytest.mark.parametrize("with_tower", [True, False], ids=["tower", "no_tower"])
def test_published_bins(tmp_path, model_type, aliases, with_tower):
    """Whatever of aliases and tower is in the shards; written again it is the same model."""
    tensors, described = tensors_of(MODEL), vlm_to_llava(MODEL, {}, "bfloat16", None if with_tower else "clip")
    tensors |= dict.fromkeys(aliases, tensors["shared.weight"])
    tower = tower_directory(tmp_path / "x" / "clip", MODEL) if not with_tower else None
    kept = {name: value for name, value in tensors.items() if with_tower or not name.startswith("vision_tower")}
    write_bins(tmp_path / "bins", kept, {**described, "model_type": model_type})
    if tower is not None:
        with pytest.raises(CheckpointError, match="give its directory with --vision"):
            open_checkpoint(tmp_path / "bins")
    opened = open_checkpoint(tmp_path / "bins", vision=tower)
    assert opened.config == MODEL and opened.kind == "llava" and opened.naming == ("clip_t5" if with_tower else None)
    assert all(opened.leaves[path].dtype == "bfloat16" for path in opened.leaves if path.startswith("llm/"))
    for path, value in leaves(MODEL).items():
        if with_tower or not path.startswith("tower/"):
            wanted = value.read().astype(ml_dtypes.bfloat16)
            assert opened.read(path).tobytes() == wanted.tobytes(), path
    convert_model(tmp_path / "bins", tmp_path / "again", **({"vision": tower} if tower else {}))
    again = open_checkpoint(tmp_path / "again")
    assert again.naming == "clip_t5" and again.config == MODEL
    assert all(again.read(path).tobytes() == opened.read(path).tobytes() for path in opened.leaves)


def test_stage_1_is_a_projector_beside_its_parts(tmp_path):
    """config.json and mm_projector.bin, put on the FLAN-T5 and the CLIP that they were trained with."""
    (tmp_path / "stage1").mkdir()
    export_projector(tmp_path / "stage1" / "mm_projector.bin", MODEL, random_params(MODEL))
    assert set(torch_pickle.read_tensors(tmp_path / "stage1" / "mm_projector.bin")) == {
        f"mm_projector.{i}.{part}" for i in (0, 2) for part in ("weight", "bias")
    }
    write_json(tmp_path / "stage1" / "config.json", vlm_to_llava(MODEL, {}, "bfloat16", "somewhere/clip"))
    llm, tower = t5_alone(tmp_path / "flan"), tower_directory(tmp_path / "clip", MODEL)
    for opened in (
        open_checkpoint(tmp_path / "stage1", llm=llm, vision=tower),
        open_checkpoint(llm, vision=tower, projector=tmp_path / "stage1"),
    ):
        assert opened.config == MODEL
        for path in ("projector/layer_1/kernel", "llm/decoder/blocks/cross/k/kernel"):
            np.testing.assert_array_equal(opened.read(path), random_params(MODEL)[path])
    with pytest.raises(CheckpointError, match="flan has no projector: give one with --projector"):
        open_checkpoint(llm, vision=tower)


def sparse(directory, shapes, config):
    """A safetensors file whose data is a hole: its header and its size are real, nothing lies on the disk."""
    header, at = {}, 0
    for name, shape in shapes.items():
        end = at + 2 * math.prod(shape)
        header[name], at = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, end]}, end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    directory.mkdir()
    with open(directory / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)
    write_json(directory / "config.json", config)
    return directory


def of_xxl(name, shape):
    """The XXL model has the names of XL, and its T5 twice the width, heads and hidden width."""
    sizes = {"lm_head": (1, 2), "shared": (1, 2), "mm_projector.0": (2, 1), "mm_projector.2": (2, 2)}
    sizes |= {"relative_attention_bias": (1, 2), "norm": (2,), "embed_tokens": (1, 2)}
    if name.startswith("vision_tower"):
        return shape
    factors = next((factors for key, factors in sizes.items() if key in name), (2, 2))
    return [n * f for n, f in zip(shape, factors)]


def clip_flant5():
    """The module configs/clip_flant5.py."""
    place = Path(__file__).parents[2] / "configs" / "clip_flant5.py"
    spec = importlib.util.spec_from_file_location("clip_flant5", place)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("size", ["xl", "xxl"])
def test_full_sizes(tmp_path, size):
    """A checkpoint with all names and shapes of the published one is the model of our recipe."""
    config = recipes.from_config(clip_flant5().get_config(f"{size},stage2")).model
    for path in cases("clip_flant5", "checkpoint_names_*xl.json"):
        published = json.loads(path.read_text())
        if published["model"].endswith("xxl"):
            continue
        tensors = published["tensors"]
        tensors = tensors if isinstance(tensors, dict) else {t["name"]: t["shape"] for t in tensors}
        shapes = {name: of_xxl(name, shape) if size == "xxl" else shape for name, shape in tensors.items()}
        raw = vlm_to_llava(config, {}, "bfloat16", None)
        opened = open_checkpoint(sparse(tmp_path / path.stem, shapes, raw))
        assert opened.naming == "clip_t5" and opened.dtype == "bfloat16"
        assert {p: leaf.shape for p, leaf in opened.leaves.items()} == {
            p: like.shape for p, like in vlm.shapes(config).items()
        }
        assert not opened.read("llm/decoder/relative").any()


@pytest.mark.parametrize("tie, scale, own_head, wanted", [
    (False, None, True, False),   # FLAN-T5 as published
    (True, False, True, False),   # FLAN-T5 as transformers 5 saves it
    (True, False, False, False),  # a FLAN-T5 made by transformers 5: its head is the embedding, unscaled
    (True, None, False, True),    # the first T5
    (True, True, False, True),    # the first T5 as transformers 5 saves it
    (None, None, False, True),
])  # fmt: skip
def test_heads_that_are_tied_or_not(tmp_path, tie, scale, own_head, wanted):
    drop = () if own_head else ("lm_head.weight",)
    base = FLAN if own_head else dataclasses.replace(FLAN, tie=False)
    t5_alone(tmp_path / "t5", base, drop, tie_word_embeddings=tie, scale_decoder_outputs=scale)
    opened = open_checkpoint(tmp_path / "t5", partial=True)
    assert opened.config.llm == dataclasses.replace(FLAN, tie=wanted)
    assert ("llm/head/kernel" in opened.leaves) != wanted
    if not wanted:
        table, head = opened.read("llm/embed/embedding"), opened.read("llm/head/kernel")
        assert np.array_equal(table.T, head) != own_head


def test_heads_that_contradict_the_config(tmp_path):
    t5_alone(tmp_path / "a", tie_word_embeddings=True)
    with pytest.raises(
        CheckpointError, match="lm_head.weight is another tensor than shared.weight, but config.json says"
    ):
        open_checkpoint(tmp_path / "a", partial=True)
    t5_alone(tmp_path / "b", drop=("lm_head.weight",))
    with pytest.raises(CheckpointError, match="b is incomplete .* it should have lm_head.weight"):
        open_checkpoint(tmp_path / "b", partial=True)
    tensors = tensors_of(dataclasses.replace(MODEL, llm=TIED), LLM)
    tensors["lm_head.weight"] = tensors["shared.weight"].copy()  # old bins hold it twice
    write_tensors(tmp_path / "c", tensors, llm_to_hf(TIED))
    assert open_checkpoint(tmp_path / "c", partial=True).config.llm == TIED


def test_what_is_no_whole_t5(tmp_path):
    encoder = {name: value for name, value in tensors_of(MODEL, ("llm",)).items() if not name.startswith("decoder")}
    write_tensors(tmp_path / "encoder", encoder, llm_to_hf(FLAN))
    with pytest.raises(CheckpointError, match=r"encoder is incomplete .* should have decoder\.block\.0.* and \d+ more"):
        open_checkpoint(tmp_path / "encoder", partial=True)
    t5_alone(tmp_path / "act", feed_forward_proj="gated-swish")
    with pytest.raises(CheckpointError, match="feed_forward_proj='gated-swish' is not supported"):
        open_checkpoint(tmp_path / "act", partial=True)
    tower = tower_directory(tmp_path / "clip", MODEL)
    with pytest.raises(CheckpointError, match="clip_vision_model.*give it with --vision"):
        open_checkpoint(tower)

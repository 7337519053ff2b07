"""`convert` on whole directories: parts put together, original LLaVA, vocabularies that grow, and every kind
of wrong input.
"""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from tests.convert.models import (
    CLIP,
    LLAMA,
    SIGLIP,
    TINY,
    VARIANTS,
    llm_directory,
    random_params,
    random_tensors,
    tower_directory,
    with_llm,
    write_tensors,
)  # fmt: skip
from vlm_jax.config import ProjectorConfig
from vlm_jax.convert import torch_pickle
from vlm_jax.convert.command import convert, convert_model, parse_size
from vlm_jax.convert.files import write_json
from vlm_jax.convert.llava_config import vlm_to_llava
from vlm_jax.convert.names import NAMINGS
from vlm_jax.convert.processor_files import START_END
from vlm_jax.convert.read import load, open_checkpoint
from vlm_jax.convert.tensors import CheckpointError
from vlm_jax.convert.write import export, export_projector
from vlm_jax.data.new_tokenizer import word_level


def assert_same(checkpoint, params, rows=None):
    """Every parameter of the checkpoint is that of `params`; of embedding and head the first `rows`."""
    assert checkpoint.leaves.keys() == params.keys()
    for path, leaf in checkpoint.leaves.items():
        got, want = leaf.read(), np.asarray(params[path])
        if path in ("llm/embed/embedding", "llm/head/kernel"):
            got = got[:rows] if path.endswith("embedding") else got[:, :rows]
        np.testing.assert_array_equal(got, want.astype(got.dtype), err_msg=path)


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("variant", ["plain", "siglip_pad", "tied_biased"])
def test_every_naming_comes_back(tmp_path, naming, variant):
    config, params = VARIANTS[variant], random_params(VARIANTS[variant])
    export(
        tmp_path / "x",
        config,
        params,
        names=naming,
        max_shard=20000,
        image_token=50,
        tokens={"pad_token_id": 0},
    )
    back = open_checkpoint(tmp_path / "x")
    assert back.naming == naming and back.config == config
    assert_same(back, params)


def test_original_llava_through_hf_and_back(tmp_path):
    config = dataclasses.replace(TINY, aspect="pad")
    tensors = random_tensors(config, ("llm", "head"), {"llm": "model.", "head": "lm_head."})
    tensors |= random_tensors(config, ("tower",), {"tower": "model.vision_tower.vision_tower.vision_model."})
    for n, (rows, columns) in enumerate([(32, 24), (32, 32)]):
        tensors |= {
            f"model.mm_projector.{2 * n}.weight": np.ones((rows, columns), np.float32),
            f"model.mm_projector.{2 * n}.bias": np.ones(rows, np.float32),
        }
    original = tmp_path / "llava"
    original.mkdir()
    split = dict(list(tensors.items())[::2]), dict(list(tensors.items())[1::2])
    names = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    for name, part in zip(names, split):
        torch_pickle.save(original / name, part)
    write_json(
        original / "pytorch_model.bin.index.json",
        {"weight_map": {k: name for name, part in zip(names, split) for k in part}},
    )
    write_json(
        original / "config.json",
        vlm_to_llava(config, {"bos_token_id": 1, "eos_token_id": 2}, "float16", None),
    )
    first = open_checkpoint(original)
    assert (first.kind, first.naming, first.image_token) == ("llava", "llava", None)

    convert_model(original, tmp_path / "hf", max_shard="30KB")
    hf = open_checkpoint(tmp_path / "hf")
    assert hf.config.llm.vocab == 128 and hf.image_token == 104 and hf.config.aspect == "pad"
    params = {path: leaf.read() for path, leaf in first.leaves.items()}
    assert_same(hf, params, rows=104)
    mean = params["llm/embed/embedding"].mean(0)
    np.testing.assert_allclose(hf.read("llm/embed/embedding")[104:], np.broadcast_to(mean, (24, 32)), atol=1e-6)
    np.testing.assert_allclose(
        hf.read("llm/head/kernel")[:, 104:].T,
        np.broadcast_to(params["llm/head/kernel"].mean(1), (24, 32)),
        atol=1e-6,
    )

    convert_model(original, tmp_path / "again", names="source")
    again = open_checkpoint(tmp_path / "again")
    assert again.raw == first.raw
    assert_same(again, params)


def test_how_dialogues_are_written_survives_every_format(tmp_path):
    export(tmp_path / "hf", TINY, random_params(TINY), chat_template="{# vlm_jax: mpt #}")
    for there, back in (("llava", "hf"), ("hf_5", "hf")):
        convert_model(tmp_path / "hf", tmp_path / there, names=there)
        convert_model(tmp_path / there, tmp_path / f"{there}_back", names=back)
        assert (tmp_path / f"{there}_back" / "chat_template.jinja").read_text() == "{# vlm_jax: mpt #}"
    export(tmp_path / "tags", TINY, random_params(TINY), names="llava")
    raw = json.loads((tmp_path / "tags" / "config.json").read_text())
    write_json(tmp_path / "tags" / "config.json", raw | {"mm_use_im_start_end": True})
    convert_model(tmp_path / "tags", tmp_path / "tags_hf")
    assert START_END in (tmp_path / "tags_hf" / "chat_template.jinja").read_text()
    convert_model(tmp_path / "tags_hf", tmp_path / "tags_back", names="llava")
    assert json.loads((tmp_path / "tags_back" / "config.json").read_text())["mm_use_im_start_end"] is True


def test_another_tower_gets_its_own_image_processor(tmp_path):
    export(tmp_path / "x", TINY, random_params(TINY))
    other = dataclasses.replace(TINY, vision=dataclasses.replace(TINY.vision, mean=(0.1, 0.2, 0.3)))
    vision = tower_directory(tmp_path / "tower", other)
    write_json(vision / "preprocessor_config.json", {"image_mean": [0.1, 0.2, 0.3]})
    convert_model(tmp_path / "x", tmp_path / "y", vision=vision)
    assert open_checkpoint(tmp_path / "y").config.vision.mean == (0.1, 0.2, 0.3)


@pytest.mark.parametrize("tower", [CLIP, SIGLIP])
def test_parts_put_together(tmp_path, tower):
    config = dataclasses.replace(TINY, vision=dataclasses.replace(tower, mean=(0.5, 0.4, 0.3), feature_layers=(-1,)))
    params = random_params(config, 3)
    llm, vision = llm_directory(tmp_path / "llm"), tower_directory(tmp_path / "tower", config)
    write_json(vision / "preprocessor_config.json", {"image_mean": [0.5, 0.4, 0.3], "image_std": list(tower.std)})
    stage1 = tmp_path / "stage1"
    stage1.mkdir()
    export_projector(stage1 / "mm_projector.bin", config, params, dtype="bf16")
    settings = {
        "mm_vision_select_layer": -1,
        "mm_vision_select_feature": "patch",
        "image_aspect_ratio": "pad",
    }
    write_json(stage1 / "config.json", settings)

    for projector in (stage1, stage1 / "mm_projector.bin"):
        together = open_checkpoint(llm, vision=vision, projector=projector)
        assert together.config == dataclasses.replace(config, aspect="pad") and together.naming is None
        assert together.read("projector/layer_1/kernel").dtype == "bfloat16"
    export(tmp_path / "hf", together.config, together.leaves, source=together, dtype="f32", image_token=99)
    back = open_checkpoint(tmp_path / "hf")
    assert back.config == together.config
    assert_same(back, {path: leaf.read() for path, leaf in together.leaves.items()})
    with pytest.raises(CheckpointError, match="names=source needs a model that came whole"):
        export(tmp_path / "no", together.config, together.leaves, source=together, names="source")

    swapped = open_checkpoint(tmp_path / "hf", llm=llm_directory(tmp_path / "llm2", seed=9))
    assert not np.array_equal(swapped.read("llm/norm/scale"), back.read("llm/norm/scale"))
    np.testing.assert_array_equal(swapped.read("tower/position"), back.read("tower/position"))


def test_an_original_checkpoint_finds_its_tower(tmp_path):
    tensors = random_tensors(TINY, ("llm", "head"), {"llm": "model.", "head": "lm_head."})
    tensors |= {
        "model.mm_projector.weight": np.ones((32, 24), np.float32),
        "model.mm_projector.bias": np.ones(32, np.float32),
    }
    config = dataclasses.replace(TINY, projector=ProjectorConfig("linear"))
    directory = write_tensors(tmp_path / "llava", tensors, vlm_to_llava(config, {}, "float32", "tower"))
    tower_directory(directory / "tower")
    assert open_checkpoint(directory).config.vision == CLIP
    shutil.rmtree(directory / "tower")
    with pytest.raises(CheckpointError, match="give its directory with --vision"):
        open_checkpoint(directory)


def test_partial_and_placed(tmp_path):
    llm, vision = llm_directory(tmp_path / "llm"), tower_directory(tmp_path / "tower")
    with pytest.raises(CheckpointError, match="llm has no projector: give one with --projector"):
        open_checkpoint(llm, vision=vision)
    with pytest.raises(CheckpointError, match="llm is a language model: give a vision tower with --vision"):
        open_checkpoint(llm)
    wanted = with_llm(vocab=110)
    opened = open_checkpoint(llm, vision=vision, config=wanted, vocab=110, partial=True)
    assert set(opened.missing) == {f"projector/layer_{i}/{part}" for i in (0, 1) for part in ("kernel", "bias")}
    seen = []

    def place(path, shape, dtype, read):
        seen.append(path)
        halves = [read((slice(0, shape[0] // 2),)), read((slice(shape[0] // 2, None),))]
        return np.concatenate(halves)

    placed = load(opened, place, [path for path in opened.leaves if path.startswith("llm/")])
    assert placed["llm/embed/embedding"].shape == (110, 32) and placed["llm/head/kernel"].shape == (32, 110)
    np.testing.assert_array_equal(placed["llm/blocks/attn/q/kernel"], opened.read("llm/blocks/attn/q/kernel"))
    assert seen == list(placed)
    assert open_checkpoint(llm, partial=True).missing[0].startswith("tower/")


def test_export_of_a_trained_model_with_its_tokenizer(tmp_path):
    word_level(["USER: what is this? ASSISTANT: a cat."], tmp_path / "tokenizer")
    config, params = with_llm(vocab=18), random_params(with_llm(vocab=18))
    for path in [p for p in params if p.startswith("tower/unused/")]:
        del params[path]
    export(tmp_path / "x", config, params, tokenizer=tmp_path / "tokenizer", dtype="bf16", chat_template="hello")
    raw = json.loads((tmp_path / "x" / "config.json").read_text())
    assert raw["torch_dtype"] == "bfloat16" and raw["pad_token_id"] == 3 and raw["text_config"]["eos_token_id"] == 2
    assert (tmp_path / "x" / "chat_template.jinja").read_text() == "hello"
    back = open_checkpoint(tmp_path / "x")
    size = len(json.loads((tmp_path / "x" / "tokenizer.json").read_text())["model"]["vocab"])
    assert back.image_token == size and back.config.llm.vocab == (18 if size < 18 else 64)
    np.testing.assert_array_equal(back.read("tower/unused/post_norm/scale"), np.ones(24))
    assert not back.read("tower/unused/blocks/mlp/up/kernel").any()


def test_the_command(tmp_path, capsys):
    export(tmp_path / "x", TINY, random_params(TINY), image_token=50)
    (tmp_path / "run").mkdir()
    assert (
        convert(
            **{
                "from": str(tmp_path / "x"),
                "to": str(tmp_path / "y"),
                "vision": "",
                "dtype": "bfloat16",
                "names": "hf_5",
            }
        )
        == 0
    )
    assert "llava_hf model of" in capsys.readouterr().out
    assert open_checkpoint(tmp_path / "y").dtype == "bfloat16"
    bin_file = {"extract": "projector", "to": str(tmp_path / "mm_projector.bin")}
    assert convert(**{"from": str(tmp_path / "y"), **bin_file}) == 0
    assert len(torch_pickle.read_tensors(tmp_path / "mm_projector.bin")) == 4
    (tmp_path / "run" / "checkpoints").mkdir()
    with pytest.raises(
        CheckpointError, match="run is a training run without an export: write one with python -m vlm_jax convert"
    ):
        convert_model(tmp_path / "run", tmp_path / "z")
    shutil.copytree(tmp_path / "x", tmp_path / "run" / "export")
    convert_model(tmp_path / "run", tmp_path / "z")


def test_sizes():
    assert [parse_size(text) for text in ("5GB", "1.5 MiB", 7, "100kb")] == [5 * 10**9, 3 * 2**19, 7, 10**5]
    for text in ("5 bananas", "", "-1GB", "0"):
        with pytest.raises(CheckpointError, match="is not a size"):
            parse_size(text)


def wrong(tmp_path, change) -> str:
    """The sentence that opening a changed copy of a good model gives."""
    export(tmp_path / "x", TINY, random_params(TINY), image_token=50)
    file = tmp_path / "x" / "config.json"
    write_json(file, change(json.loads(file.read_text())))
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(tmp_path / "x")
    return str(error.value)


def changed(part, **values):
    return lambda raw: {**raw, part: {**raw[part], **values}}


@pytest.mark.parametrize("change, sentence", [
    (changed("text_config", hidden_size=64),
     r"model\.safetensors is the checkpoint of another model: "
     r"language_model\.model\.embed_tokens\.weight has shape \[104, 32\], by the config it should "
     r"have \[104, 64\]"),
    (changed("text_config", vocab_size=96),
     r"has shape \[104, 32\], by the config it should have \[96, 32\]"),
    (changed("text_config", num_hidden_layers=3),
     r"incomplete or the checkpoint of another model: .* should have .*layers\.2.* and \d+ more"),
    (changed("text_config", num_hidden_layers=1),
     r"another model: by its config it should not have .*layers\.1.* and \d+ more"),
    (changed("text_config", attention_bias=True),
     r"should have language_model\.model\.layers\.0\.self_attn\.q_proj\.bias"),
    (lambda raw: {**raw, "model_type": "idefics"},
     r"config\.json is of model_type 'idefics', not a LLaVA model"),
    (lambda raw: {**raw, "model_type": "clip"}, r"give it with --vision"),
])  # fmt: skip
def test_the_checkpoint_of_another_model(tmp_path, change, sentence):
    message = wrong(tmp_path, change)
    pytest.raises(CheckpointError, lambda: (_ for _ in ()).throw(CheckpointError(message))).match(sentence)
    assert str(tmp_path / "x") in message and "\n" not in message


def test_wrong_parts(tmp_path):
    llm, tower = llm_directory(tmp_path / "llm"), tower_directory(tmp_path / "tower")
    with pytest.raises(
        CheckpointError,
        match="llm has no tensor of a vision tower, it has lm_head.weight, model.embed_tokens.weight",
    ):
        open_checkpoint(llm, vision=llm)
    with pytest.raises(
        CheckpointError, match="tower is the checkpoint of another model: resnet.conv1 belongs to no part"
    ):
        write_tensors(
            tmp_path / "resnet",
            {"resnet.conv1": np.zeros(3, np.float32)},
            json.loads((tower / "config.json").read_text()),
        )
        shutil.copy(tmp_path / "resnet" / "model.safetensors", tower / "model.safetensors")
        open_checkpoint(llm, vision=tower)
    (tmp_path / "adapter").mkdir()
    write_json(tmp_path / "adapter" / "config.json", vlm_to_llava(TINY, {}, "float32", None))
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="adapter holds the weights of an adapter but no adapter_config.json"):
        open_checkpoint(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="config.json does not exist"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="both .*: a checkpoint is not converted onto itself"):
        convert_model(llm, f"{llm}/../llm")
    with pytest.raises(CheckpointError, match="--dtype=int4 is unknown"):
        convert_model(llm, tmp_path / "z", dtype="int4")
    with pytest.raises(CheckpointError, match="names='hf_6' is unknown"):
        export(tmp_path / "z", TINY, random_params(TINY), names="hf_6")
    with pytest.raises(CheckpointError, match="the parameters lack llm/norm/scale"):
        export(tmp_path / "z", TINY, {k: v for k, v in random_params(TINY).items() if k != "llm/norm/scale"})
    with pytest.raises(CheckpointError, match=r"parameter llm/norm/scale has shape \[31\]"):
        export(tmp_path / "z", TINY, random_params(TINY) | {"llm/norm/scale": np.ones(31, np.float32)})
    assert not (tmp_path / "z").exists() and LLAMA == TINY.llm

"""Adapters in files: every layout there and back, merged into their base, adapters of others, and every kind of wrong one."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil

import numpy as np
import pytest

from tests.convert.models import (
    TINY,
    VARIANTS,
    linears,
    llm_directory,
    random_adapter,
    random_params,
    random_tensors,
    tower_directory,
    write_tensors,
)
from vlm_jax.config import LoRAConfig
from vlm_jax.convert import torch_pickle
from vlm_jax.convert.command import convert, convert_model
from vlm_jax.convert.files import read_json, write_json
from vlm_jax.convert.llava_config import vlm_to_llava
from vlm_jax.convert.manifest import FILE, VIT_FOLDER, read_manifest
from vlm_jax.convert.merge import MergedLeaf, merged, merged_parameters, open_adapted, open_model
from vlm_jax.convert.peft import read_adapter
from vlm_jax.convert.read import model_directory, open_checkpoint
from vlm_jax.convert.shards import Planned, read_file, write_file
from vlm_jax.convert.tensors import ArrayLeaf, CheckpointError, full
from vlm_jax.convert.write import export
from vlm_jax.convert.write_adapter import LAYOUTS, export_adapter

LLM = LoRAConfig(("^llm/blocks/",), 4, 8.0, 0.05)
TOWER = LoRAConfig(("^tower/blocks/attn/[qkvo]$", "^tower/(unused/)?blocks/mlp/"), 3, 7.0, 0.2)
GROUPS = {
    "llm": (LLM,),
    "tower and llm": (LLM, TOWER),
    "tower": (TOWER,),
    "rslora, alpha that does not divide": (LoRAConfig(("attn/[qk]$",), 3, 2.5, rslora=True),),
    "several": (LoRAConfig(("^llm/.*/q$",), 2, 6.0), LoRAConfig(("^llm/.*/k$", "^tower/.*/q$"), 4, 1.0), TOWER),
    "projector": (LoRAConfig(("^projector/", "up$"), 2, 4.0),),
}
PROJECTOR = dict.fromkeys(f"projector/layer_{i}/{leaf}" for i in (0, 1) for leaf in ("kernel", "bias"))


def with_lora(*groups, config=TINY):
    return dataclasses.replace(config, lora=groups)


def adapted_params(config, seed=0):
    return random_params(config, seed) | random_adapter(config)


def contents(file) -> dict[str, tuple]:
    """{name: (dtype, shape, bytes)} of a file of tensors."""
    found = read_file(file) if file.suffix == ".safetensors" else torch_pickle.read_tensors(file)
    return {name: (str(t.dtype), t.shape, t.read(full(t.shape)).tobytes()) for name, t in found.items()}


def assert_same(adapter, params):
    """The adapter's leaves and what it trained whole are those of `params`."""
    wanted = {path: value for path, value in params.items() if "/lora_" in path}
    assert adapter.leaves.keys() == wanted.keys()
    for path, value in adapter.arrays().items():
        np.testing.assert_allclose(value, wanted[path], rtol=1e-6 if path.endswith("scale") else 0, err_msg=path)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base model as an HF directory."""
    folder = tmp_path_factory.mktemp("model") / "base"
    export(folder, TINY, random_params(TINY), image_token=50, tokens={"pad_token_id": 0})
    return folder


@pytest.mark.parametrize("names", LAYOUTS)
@pytest.mark.parametrize("groups", GROUPS)
def test_every_layout_comes_back(tmp_path, base, groups, names):
    config = with_lora(*GROUPS[groups])
    params = adapted_params(config)
    trained = {} if groups == "projector" else PROJECTOR
    export_adapter(tmp_path / "a", config, params, trained=trained, names=names, base=base)
    checkpoint, adapter = open_adapted(tmp_path / "a")
    assert_same(adapter, params)
    assert adapter.extra.keys() == trained.keys() and not checkpoint.missing
    by_path = {target: group for group in checkpoint.config.lora for target in group.targets}
    for path in linears(config):
        group = next((g for g in config.lora if any(re.search(t, path) for t in g.targets)), None)
        got = by_path.get(f"^{path}$")
        assert (got is None) == (group is None)
        if group:
            assert (got.rank, got.alpha, got.rslora) == (group.rank, group.alpha, group.rslora)

    convert_model(tmp_path / "a", tmp_path / "b", names=names)
    for file in (p for p in (tmp_path / "a").rglob("*") if p.suffix in (".safetensors", ".bin")):
        assert contents(tmp_path / "b" / file.relative_to(tmp_path / "a")) == contents(file)
    one, two = (read_json(p) for p in sorted(tmp_path.glob("[ab]/adapter_config.json")) or _vit(tmp_path))
    assert one == two


def _vit(folder):
    return sorted(folder.glob(f"[ab]/{VIT_FOLDER}/adapter_config.json"))


def test_other_layout_is_the_same_adapter(tmp_path, base):
    config = with_lora(*GROUPS["several"])
    params = adapted_params(config)
    export_adapter(tmp_path / "hf", config, params, trained=PROJECTOR, base=base)
    for there, here in (("hf", "llava"), ("llava", "sq_llava"), ("sq_llava", "hf_5")):
        convert_model(tmp_path / there, tmp_path / here, base=base, names=here)
        assert_same(open_adapted(tmp_path / here)[1], params)
    assert contents(tmp_path / "hf_5" / "adapter_model.safetensors") == contents(
        tmp_path / "hf" / "adapter_model.safetensors"
    )


def test_layers_and_ranks_that_are_not_there(tmp_path, base):
    config = with_lora(LLM)
    params = adapted_params(config)
    params["llm/blocks/attn/q/lora_a"][0] = params["llm/blocks/attn/q/lora_b"][0] = 0  # layer 0 has none
    params["llm/blocks/mlp/up/lora_a"][1, :, 2:] = params["llm/blocks/mlp/up/lora_b"][1, 2:] = 0  # layer 1: rank 2
    params["llm/blocks/attn/k/lora_b"][:] = 0  # not trained yet, which is not the same as absent
    export_adapter(tmp_path / "a", config, params, base=base)
    raw = read_json(tmp_path / "a" / "adapter_config.json")
    assert not any("layers.0.self_attn.q_proj" in name for name in contents(tmp_path / "a/adapter_model.safetensors"))
    assert raw["rank_pattern"] == {r"language_model\.layers\.(1)\.mlp\.up_proj": 2}
    assert raw["alpha_pattern"] == {r"language_model\.layers\.(1)\.mlp\.up_proj": 4}
    modules = [f"model.language_model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    assert [bool(re.fullmatch(raw["target_modules"], module)) for module in modules] == [False, True]
    assert_same(open_adapted(tmp_path / "a")[1], params)


def test_adapters_mixed_into_one_are_written_as_one(tmp_path, base):
    config = with_lora(LLM)
    params = adapted_params(config)
    params["llm/blocks/attn/q/lora_scale"][:, :2] = 0.5
    export_adapter(tmp_path / "a", config, params, base=base)
    got, want = merged(open_adapted(tmp_path / "a")[0]), merged_parameters(config, params)[1]
    for path in ("llm/blocks/attn/q/kernel", "llm/blocks/mlp/up/kernel"):
        np.testing.assert_allclose(got.read(path), want[path].read(), atol=1e-6)


def test_merged_by_hand():
    config = with_lora(LLM, TOWER)
    params = adapted_params(config)
    plain, leaves = merged_parameters(config, params)
    assert plain == TINY and leaves.keys() == random_params(TINY).keys()
    for path in ("llm/blocks/mlp/down/kernel", "tower/blocks/attn/v/kernel", "tower/unused/blocks/mlp/up/kernel"):
        a, b, s = (params[path.replace("kernel", name)] for name in ("lora_a", "lora_b", "lora_scale"))
        want = params[path] + np.einsum("lir,lr,lro->lio", a, s, b)
        np.testing.assert_allclose(leaves[path].read(), want, atol=1e-5)
        part = leaves[path].read((slice(0, 1), slice(3, 9), slice(2, None)))
        np.testing.assert_allclose(part, want[:1, 3:9, 2:], atol=1e-5)
    half = MergedLeaf(
        ArrayLeaf(params["projector/layer_0/kernel"].astype("bfloat16")), *map(ArrayLeaf, (a[0], b[0], s[0]))
    )
    assert half.dtype == "bfloat16" and half.shape == params["projector/layer_0/kernel"].shape
    with pytest.raises(CheckpointError, match="llm/blocks/attn/q has an adapter but no kernel"):
        merged_parameters(config, {k: v for k, v in params.items() if k != "llm/blocks/attn/q/kernel"})


@pytest.mark.parametrize("names", ["hf", "llava", "source", "hf_5"])
def test_the_merged_model(tmp_path, base, names, capsys):
    config = with_lora(LLM, TOWER)
    params = adapted_params(config, seed=0) | random_params(TINY, seed=9) | random_params(TINY)
    params["projector/layer_0/bias"] = np.arange(32, dtype=np.float32)
    export_adapter(tmp_path / "a", config, params, trained={"projector/layer_0/bias": None}, base=base)
    flags = {"from": str(tmp_path / "a"), "to": str(tmp_path / "m"), "base": "", "merge": True, "names": names}
    assert convert(**flags) == 0 and "M parameters" in capsys.readouterr().out
    got, want = open_model(tmp_path / "m"), merged_parameters(config, params)[1]
    assert got.config == TINY and read_manifest(tmp_path / "m").kind == "model"
    for path, leaf in want.items():
        np.testing.assert_allclose(got.read(path), leaf.read(), atol=1e-6, err_msg=path)
    export(tmp_path / "direct", config, params, image_token=50, tokens={"pad_token_id": 0})  # export merges by itself
    direct = open_checkpoint(tmp_path / "direct")
    np.testing.assert_allclose(direct.read("llm/blocks/attn/q/kernel"), want["llm/blocks/attn/q/kernel"].read())


def test_biases_and_norms(tmp_path):
    config = with_lora(LoRAConfig(("attn/[qv]$",), 2, 4.0), config=VARIANTS["tied_biased"])
    export(tmp_path / "base", config, random_params(dataclasses.replace(config, lora=())), image_token=50)
    params = adapted_params(config, seed=3)
    params["llm/embed/embedding"] = random_params(config)["llm/embed/embedding"]
    biases = {f"{room}/blocks/attn/{x}/bias": None for room in ("llm", "tower") for x in "qv"}
    cases = {
        "lora_only": biases,
        "all": {"tower/blocks/norm1/bias": None, **biases},
        "none": {"llm/norm/scale": None, "tower/blocks/norm2/scale": {1}, "llm/embed/embedding": None},
    }
    for bias, trained in cases.items():
        for names in ("hf", "llava"):
            export_adapter(tmp_path / "a", config, params, trained=trained, names=names, base=tmp_path / "base")
            checkpoint, adapter = open_adapted(tmp_path / "a")
            assert trained.keys() <= adapter.extra.keys()
            for path in trained:
                got = checkpoint.read(path)
                layers = trained[path] or range(len(got))
                np.testing.assert_array_equal(got[list(layers)], params[path][list(layers)])
            raw = read_json(tmp_path / "a" / "adapter_config.json")
            assert names == "llava" or raw["bias"] == bias
    assert not np.array_equal(checkpoint.read("tower/blocks/norm2/scale")[0], params["tower/blocks/norm2/scale"][0])


def test_an_adapter_of_llava_on_a_bare_language_model(tmp_path):
    """The way LLaVA's own program gives adapters: Vicuna and CLIP are elsewhere, the projector is in the adapter."""
    config = with_lora(LLM, config=dataclasses.replace(TINY, aspect="pad"))
    llm, tower = llm_directory(tmp_path / "vicuna"), tower_directory(tmp_path / "clip")
    params = adapted_params(config)
    export_adapter(
        tmp_path / "a",
        config,
        params,
        trained=PROJECTOR,
        names="llava",
        base="lmsys/vicuna",
        tower=str(tower),
        binary=True,
    )
    assert sorted(read_json(tmp_path / "a/adapter_config.json")["target_modules"]) == sorted(
        f"{x}_proj" for x in ("q", "k", "v", "o", "gate", "up", "down")
    )
    (tmp_path / "a" / FILE).unlink()  # theirs have no manifest
    with pytest.raises(CheckpointError, match=r"a is an adapter: give .* with --base \(it names lmsys/vicuna\)"):
        open_adapted(tmp_path / "a")
    checkpoint, adapter = open_adapted(tmp_path / "a", base=llm)
    assert dataclasses.replace(checkpoint.config, lora=()) == dataclasses.replace(config, lora=())
    np.testing.assert_array_equal(checkpoint.read("projector/layer_1/kernel"), params["projector/layer_1/kernel"])
    assert_same(adapter, params)
    convert_model(tmp_path / "a", tmp_path / "m", base=llm, merge=True, names="llava")
    assert read_json(tmp_path / "m/config.json")["mm_vision_tower"] == str(tower)
    write_json(
        tmp_path / "a/config.json",
        read_json(tmp_path / "a/config.json") | {"mm_vision_tower": "openai/clip-vit-large-patch14"},
    )
    with pytest.raises(CheckpointError):  # the named tower is not here, and is not of these sizes
        open_adapted(tmp_path / "a", base=llm)
    (tmp_path / "a" / "config.json").unlink()
    with pytest.raises(
        CheckpointError, match="is a language model, and .*a does not say of which LLaVA model it is a part"
    ):
        open_adapted(tmp_path / "a", base=llm)


def test_the_adapter_says_how_images_are_seen(tmp_path, base):
    config = dataclasses.replace(with_lora(LLM), aspect="pad")
    for names in ("hf", "llava"):
        export_adapter(tmp_path / names, config, adapted_params(config), names=names, base=base)
        checkpoint, _ = open_adapted(tmp_path / names)
        assert checkpoint.config.aspect == "pad" and checkpoint.naming is None
        convert_model(tmp_path / names, tmp_path / f"{names}_merged", merge=True)
        assert open_checkpoint(tmp_path / f"{names}_merged").config.aspect == "pad"


def test_a_larger_vocabulary_comes_with_the_adapter(tmp_path, base):
    config = with_lora(LLM, config=dataclasses.replace(TINY, llm=dataclasses.replace(TINY.llm, vocab=110)))
    params, trained = adapted_params(config), {"llm/embed/embedding": None, "llm/head/kernel": None}
    export_adapter(tmp_path / "a", config, params, trained=trained, base=base)
    checkpoint, _ = open_adapted(tmp_path / "a")
    assert checkpoint.config.llm.vocab == 110
    np.testing.assert_array_equal(checkpoint.read("llm/head/kernel"), params["llm/head/kernel"])


def test_another_base_of_the_same_sizes(tmp_path, base):
    config = with_lora(LLM)
    export_adapter(tmp_path / "a", config, adapted_params(config), base=base)
    export(tmp_path / "half", TINY, random_params(TINY), dtype="bf16", image_token=50, tokens={"pad_token_id": 0})
    assert open_adapted(tmp_path / "a", base=tmp_path / "half")  # the same base in another type
    export(tmp_path / "other", TINY, random_params(TINY, seed=1), image_token=50, tokens={"pad_token_id": 0})
    with pytest.raises(CheckpointError, match="a is an adapter made for another base: .*other has the same sizes, but"):
        open_adapted(tmp_path / "a", base=tmp_path / "other")


def foreign(folder, tensors, **settings):
    """An adapter directory as other programs write them."""
    folder.mkdir(parents=True, exist_ok=True)
    write_file(
        folder / "adapter_model.safetensors", [Planned(k, v.shape, v.dtype, lambda v=v: v) for k, v in tensors.items()]
    )
    write_json(folder / "adapter_config.json", {"peft_type": "LORA", "r": 2, "lora_alpha": 4} | settings)
    return folder


def pair(linear, rank=2, din=32, dout=32, form="{}.lora_{}.weight"):
    rng = np.random.default_rng(1)
    return {
        form.format(linear, "A"): rng.normal(size=(rank, din)).astype(np.float32),
        form.format(linear, "B"): rng.normal(size=(dout, rank)).astype(np.float32),
    }


@pytest.mark.parametrize("form", ["base_model.model.{}.lora_{}.weight", "base_model.model.{}.lora_{}.default.weight"])
@pytest.mark.parametrize(
    "linear",
    [
        "model.layers.1.self_attn.q_proj",
        "language_model.model.layers.1.self_attn.q_proj",
        "model.language_model.layers.1.self_attn.q_proj",
    ],
)
def test_key_forms(tmp_path, base, linear, form):
    folder = foreign(
        tmp_path / "a", pair(linear, form=form), alpha_pattern={r"self_attn\.q_proj": 5}, fan_in_fan_out=True
    )
    adapter = read_adapter(folder, TINY)
    a = adapter.leaves["llm/blocks/attn/q/lora_a"].read()
    assert a.shape == (2, 32, 2) and not a[0].any() and a[1].any()
    np.testing.assert_allclose(adapter.leaves["llm/blocks/attn/q/lora_scale"].read(), 2.5)
    assert adapter.groups == (LoRAConfig(("^llm/blocks/attn/q$",), 2, 5.0),)


Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("tensors, settings, sentence", [
    (pair("base_model.model.transformer.h.0.attn.c_attn"), {},
     r"a/adapter_model\.safetensors has base_model\.\S*c_attn\.lora_A\.weight, which fits no linear of .*base$"),
    (pair("base_model.model.model.layers.7.self_attn.q_proj"), {}, r"layers\.7\S* which fits no linear of"),
    (pair("base_model.model.model.layers.0.input_layernorm"), {}, r"llm/blocks/norm1/scale of .*base is no linear"),
    (pair(Q, din=48), {},
     r"a is an adapter made for another base: \S*lora_A\.weight has shape \[2, 48\], for .*base it should have \[2, 32\]"),
    (pair(Q, dout=48), {}, r"made for another base: \S*lora_B\.weight has shape \[48, 2\], .* \[32, 2\]"),
    (pair(Q) | {"base_model.model.lm_head.weight": np.zeros((3, 32), np.float32)}, {}, r"made for another base: \S*lm_head"),
    (pair(Q, rank=3), {}, r"has rank 3 and its lora_B 3, but adapter_config\.json says 2"),
    (pair(Q), {"r": 0}, r"has r=0: the rank must be at least 1"),
    (pair(Q), {"use_dora": True}, r"has use_dora=True: DoRA's magnitudes are not plain LoRA"),
    (pair(Q), {"init_lora_weights": "pissa_niter_4"}, r"init_lora_weights='pissa_niter_4', which alters the base"),
    (pair(Q), {"peft_type": "IA3"}, r"an adapter of kind IA3: only LORA is supported"),
    (pair(Q) | {f"{Q}.lora_magnitude_vector": np.zeros(3, np.float32)}, {}, r"only lora_A and lora_B of linears"),
    ({f"{Q}.lora_A.weight": np.zeros((2, 32), np.float32)}, {}, r"without its lora_B: copy .*a again"),
    ({"base_model.model.lm_head.weight": np.zeros((104, 32), np.float32)}, {}, r"a has no pair of lora_A and lora_B"),
])  # fmt: skip
def test_wrong_adapters(tmp_path, base, tensors, settings, sentence):
    folder = foreign(tmp_path / "a", tensors, **settings)
    with pytest.raises(CheckpointError, match=sentence) as error:
        open_adapted(folder, base=base)
    assert "\n" not in str(error.value)


def test_what_is_base_and_what_is_adapter(tmp_path, base):
    config = with_lora(LLM)
    params = adapted_params(config)
    export_adapter(tmp_path / "llava-lora-merged", config, params, base=base)
    adapter = tmp_path / "llava-lora-merged"
    assert not os.path.isabs(read_json(adapter / FILE)["base"])
    assert read_manifest(adapter).base_directory().resolve() == base.resolve()
    assert model_directory(adapter) == adapter
    with pytest.raises(CheckpointError, match="is an adapter and no model: it is opened together with its base"):
        open_checkpoint(adapter)
    for flag, given in (("--base", {"base": str(base)}), ("--merge", {"merge": True})):
        with pytest.raises(CheckpointError, match=f"base is no adapter: {flag} has no meaning for it"):
            convert_model(base, tmp_path / "x", **given)
    with pytest.raises(CheckpointError, match="is an adapter too: merge it into its base first"):
        open_adapted(adapter, base=adapter)
    with pytest.raises(CheckpointError, match="--extract projector writes a .bin file"):
        convert_model(base, tmp_path / "x.bin")
    with pytest.raises(CheckpointError, match="names='source' is unknown for an adapter"):
        convert_model(adapter, tmp_path / "x", names="source")
    with pytest.raises(CheckpointError, match="was trained whole and has an adapter"):
        export_adapter(tmp_path / "x", config, params, trained={"llm/blocks/attn/q/kernel": None})
    with pytest.raises(CheckpointError, match="would be empty: the parameters have no adapter"):
        export_adapter(tmp_path / "x", config, random_params(TINY))
    write_json(adapter / FILE, {"format": 2, "kind": "adapter"})
    with pytest.raises(CheckpointError, match="has format 2 and kind 'adapter': this version reads format 1"):
        open_model(adapter)
    (adapter / "adapter_model.safetensors").unlink()
    shutil.move(adapter / FILE, tmp_path / "gone")
    with pytest.raises(CheckpointError, match="has adapter_config.json but no weights"):
        open_model(adapter, base=base)


def test_a_model_written_over_an_adapter_leaves_none_of_it(tmp_path, base):
    config = with_lora(LLM, TOWER)
    export_adapter(tmp_path / "x", config, adapted_params(config), trained=PROJECTOR, names="sq_llava", base=base)
    assert (tmp_path / "x" / VIT_FOLDER / "adapter_config.json").is_file()
    export_adapter(tmp_path / "x", config, adapted_params(config), trained=PROJECTOR, names="sq_llava", base=base)
    convert_model(base, tmp_path / "x")
    assert not [
        p.name
        for p in (tmp_path / "x").iterdir()
        if "adapter" in p.name or p.name in (VIT_FOLDER, "non_lora_trainables.bin")
    ]
    assert open_model(tmp_path / "x").config == TINY


def test_a_copy_of_the_towers_pairs_is_ignored(tmp_path, base):
    """SQ-LLaVA gathers by the name `lora_`, so its main file also holds the tower's pairs, under another scale."""
    config = with_lora(LLM, TOWER)
    params = adapted_params(config)
    export_adapter(tmp_path / "sq", config, params, names="sq_llava", base=base)
    main = tmp_path / "sq" / "adapter_model.safetensors"
    copies = pair(
        "base_model.model.model.vision_tower.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj", 4, 24, 24
    )
    tensors = {name: t.read(full(t.shape)) for name, t in read_file(main).items()} | copies
    write_file(main, [Planned(k, v.shape, v.dtype, lambda v=v: v) for k, v in tensors.items()])
    assert_same(open_adapted(tmp_path / "sq")[1], params)
    inner = json.loads((tmp_path / "sq" / VIT_FOLDER / "adapter_config.json").read_text())
    assert (inner["r"], inner["lora_alpha"], inner["lora_dropout"]) == (3, 7, 0.2)
    names = contents(tmp_path / "sq" / VIT_FOLDER / "adapter_model.safetensors")
    assert all(name.startswith("base_model.model.vision_tower.vision_model.encoder.layers.") for name in names)


def test_a_tower_that_is_nowhere(tmp_path):
    tensors = random_llava()
    config = with_lora(LLM)
    write_tensors(tmp_path / "base", tensors, vlm_to_llava(TINY, {}, "float32", None))
    export_adapter(tmp_path / "a", config, random_adapter(config), base=tmp_path / "base")
    with pytest.raises(
        CheckpointError, match="neither .*a nor its base .*base has a vision tower: give one with --vision"
    ):
        open_adapted(tmp_path / "a")
    clip = tower_directory(tmp_path / "clip")
    assert not open_adapted(tmp_path / "a", vision=clip)[0].missing


def random_llava():
    """Tensors of an original LLaVA without its tower."""
    found = random_tensors(TINY, ("llm", "head"), {"llm": "model.", "head": "lm_head."})
    for n, width in enumerate((24, 32)):
        key = f"model.mm_projector.{2 * n}"
        found |= {f"{key}.weight": np.ones((32, width), np.float32), f"{key}.bias": np.ones(32, np.float32)}
    return found


def test_sq_llava_after_its_first_stage(tmp_path, base):
    """Vit-lora/ and the projector, nothing for the language model."""
    config = with_lora(TOWER)
    params = adapted_params(config)
    params["projector/layer_0/kernel"] = np.ones((24, 32), np.float32)
    export_adapter(tmp_path / "a", config, params, trained=PROJECTOR, names="sq_llava", base=base)
    (tmp_path / "a" / FILE).unlink()
    (tmp_path / "a" / "non_lora_trainables.bin").rename(tmp_path / "a" / "mm_projector.bin")
    checkpoint, adapter = open_adapted(tmp_path / "a", base=base)
    assert_same(adapter, params)
    np.testing.assert_array_equal(checkpoint.read("projector/layer_0/kernel"), params["projector/layer_0/kernel"])

"""What a run that trained adapters leaves behind: an adapter that its base takes, or by request a model, equal to each other."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from tests.test_train_command import changed, convert_flags, llava15
from vlm_jax import recipe as recipes
from vlm_jax.config import ConfigError, LoRAConfig
from vlm_jax.convert.manifest import read_manifest
from vlm_jax.convert.merge import merged, open_adapted, open_model
from vlm_jax.convert.read import open_checkpoint
from vlm_jax.generate.load import load_model
from vlm_jax.models import vlm
from vlm_jax.models.adapters import LORA_B
from vlm_jax.recipe import InitConfig
from vlm_jax.train.checkpoint import Checkpointer
from vlm_jax.train.command import run_recipe
from vlm_jax.train.export import convert, write
from vlm_jax.train.weights import open_tokenizer, open_weights


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The export of a stage-2 smoke run."""
    folder = tmp_path_factory.mktemp("base")
    run_recipe(changed(llava15("7b,stage2,smoke"), folder), progress=False)
    return folder / "export"


@pytest.fixture(scope="module", params=["lora", "qlora"])
def run(request, base, tmp_path_factory):
    """A smoke run that trained adapters on it."""
    folder = tmp_path_factory.mktemp(request.param)
    recipe = changed(llava15(f"7b,stage2,{request.param},smoke"), folder)
    train = dataclasses.replace(recipe.train, lr=1e-2, warmup_ratio=0.0, frozen_dtype="float32")
    init = dataclasses.replace(recipe.init, checkpoint=str(base), random=False)
    run_recipe(dataclasses.replace(recipe, train=train, init=init), progress=False)
    return folder


def logits(config, params):
    rng, features = np.random.default_rng(0), config.vision.features
    tokens = rng.integers(3, config.llm.vocab, (1, features + 6))
    slots = np.full(tokens.shape, -1, np.int32)
    slots[0, 2 : 2 + features] = np.arange(features)
    size = config.vision.image_size
    batch = {
        "tokens": tokens, "image_slots": slots, "segments": np.ones_like(slots),
        "positions": np.arange(tokens.shape[1], dtype=np.int32)[None],
        "images": rng.normal(size=(1, 1, size, size, 3)).astype(np.float32),
    }  # fmt: skip
    model = vlm.build(config, params)
    return np.asarray(jax.jit(lambda batch: model.logits(vlm.forward(model, batch)))(batch))


def logits_of(checkpoint):
    return logits(checkpoint.config, {path: leaf.read() for path, leaf in checkpoint.leaves.items()})


def test_a_run_exports_its_adapter(run, base):
    manifest = read_manifest(run / "export")
    assert manifest.kind == "adapter" and manifest.base_directory() == base.resolve()
    assert not list((run / "export").glob("model*"))
    checkpoint, adapter = open_adapted(run / "export")
    params, _ = Checkpointer(run / "checkpoints").params()
    trained = {path for path in params if path.endswith(f"/{LORA_B}")}
    assert trained and all(params[path].any() for path in trained)
    assert {path for path in adapter.extra} == {path for path in params if path.startswith("projector/")}
    for path in (*adapter.leaves, *adapter.extra):
        np.testing.assert_array_equal(checkpoint.read(path), params[path], err_msg=path)
    assert load_model(run / "export").config.lora  # generation finds the base by itself


def test_merged_it_is_the_model_that_was_trained(run, base, tmp_path):
    """A 4-bit base is merged as it was trained on; its adapter on the 16-bit base is a slightly other model."""
    assert convert(**convert_flags(run, tmp_path / "m", merge=True)) == 0
    checkpoints = Checkpointer(run / "checkpoints")
    params, meta = checkpoints.params()
    config = open_model(run / "export").config
    quantised = [path for path in params if path.endswith("/kernel_codes")]
    recipe_quant = llava15("7b,stage2,qlora,smoke").model.quant if quantised else None
    want = logits(dataclasses.replace(config, quant=recipe_quant), params)
    rows = want.shape[-1]
    np.testing.assert_allclose(logits_of(open_checkpoint(tmp_path / "m"))[..., :rows], want, atol=1e-4)
    beside = logits_of(merged(open_model(run / "export")))[..., :rows]
    assert np.abs(beside - want).max() < (1e-4 if not quantised else 1.0)
    assert convert(**convert_flags(run / "export", tmp_path / "n", merge=True)) == 0
    np.testing.assert_allclose(logits_of(open_checkpoint(tmp_path / "n"))[..., :rows], beside, atol=1e-4)


def test_parts_and_layouts_of_a_run(run, base, tmp_path):
    assert convert(**convert_flags(run, tmp_path / "p.bin", extract="projector")) == 0
    assert convert(**convert_flags(run, tmp_path / "llava", names="llava")) == 0
    assert {"adapter_config.json", "adapter_model.safetensors", "non_lora_trainables.bin", "config.json"} <= {
        p.name for p in (tmp_path / "llava").iterdir()
    }
    one, two = open_adapted(run / "export")[0], open_adapted(tmp_path / "llava", base=base)[0]
    for path in one.leaves:
        np.testing.assert_array_equal(one.read(path), two.read(path), err_msg=path)


@pytest.mark.long
def test_a_base_that_is_in_no_directory_gives_a_model(tmp_path, base):
    run_recipe(changed(llava15("7b,stage2,lora,smoke"), tmp_path / "random"), progress=False)
    assert read_manifest(tmp_path / "random" / "export").kind == "model"
    recipe = changed(llava15("7b,stage2,smoke"), tmp_path / "full")
    run_recipe(dataclasses.replace(recipe, export=False), progress=False)
    with pytest.raises(ConfigError, match="trained no adapter: --merge has no meaning for it"):
        convert(**convert_flags(tmp_path / "full", tmp_path / "x", merge=True))


def test_training_goes_on_from_an_adapter(run, base, tmp_path):
    """The adapter's directory is the checkpoint to start from; what comes out is an adapter of the same base again."""
    recipe = recipes.load(run / "config.json")
    recipe = dataclasses.replace(
        recipe,
        init=InitConfig(checkpoint=str(run / "export")),
        model=dataclasses.replace(recipe.model, lora=()),
        output=str(tmp_path / "more"),
    )
    tokenizer = open_tokenizer(recipe)
    model, source = open_weights(recipe, tokenizer)
    want, found = open_adapted(run / "export")[0], vlm.shapes(model)
    assert model.lora == want.config.lora and model.quant == recipe.model.quant
    for path in found:
        if "/lora_" in path or path.startswith("projector/"):
            np.testing.assert_array_equal(
                source.read(path, tuple(map(slice, found[path].shape))), want.read(path), err_msg=path
            )
    params, _ = Checkpointer(run / "checkpoints").params()
    write(dataclasses.replace(recipe, model=model), model, params, tmp_path / "again")
    assert read_manifest(tmp_path / "again").base_directory() == base.resolve()
    one, two = open_adapted(run / "export")[1], open_adapted(tmp_path / "again")[1]
    assert one.leaves.keys() == two.leaves.keys() and one.extra.keys() == two.extra.keys()
    other = (LoRAConfig(("^llm/blocks/",), rank=7),)
    with pytest.raises(
        ConfigError, match="has an adapter of rank 4 on llm/blocks/.*set its rank there, or leave model.lora empty"
    ):
        open_weights(dataclasses.replace(recipe, model=dataclasses.replace(model, lora=other)), tokenizer)

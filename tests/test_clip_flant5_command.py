"""CLIP-FlanT5 through the house: its recipes, both stages by the command `train`, the export, answers from it."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from vlm_jax import recipe as recipes
from vlm_jax.config import ConfigError, LLMConfig, T5Config, VLMConfig, from_dict, to_dict
from vlm_jax.convert import names
from vlm_jax.convert.read import open_checkpoint
from vlm_jax.data.image_source import ImageSource
from vlm_jax.generate.decode import Decoding
from vlm_jax.generate.load import load_model
from vlm_jax.models import vlm
from vlm_jax.train import flops
from vlm_jax.train.command import run_recipe
from vlm_jax.train.options import STAGE1, STAGE2
from vlm_jax.train.state import select

ROOT = Path(__file__).resolve().parent.parent


def recipe(words, config="clip_flant5"):
    spec = importlib.util.spec_from_file_location(config, ROOT / "configs" / f"{config}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return recipes.from_config(module.get_config(words))


def test_the_language_model_of_a_config_is_told_by_its_keys():
    for llm in (LLMConfig(), T5Config(), T5Config(gated=False, act="relu", tie=True)):
        config = VLMConfig(llm=llm)
        assert from_dict(VLMConfig, json.loads(json.dumps(to_dict(config)))) == config
    assert isinstance(from_dict(VLMConfig, {"llm": {"encoder_layers": 2}}).llm, T5Config)
    assert isinstance(from_dict(VLMConfig, {"llm": {"width": 64}}).llm, LLMConfig)
    with pytest.raises(ConfigError, match="unknown config key llm.decoder_layer"):
        from_dict(VLMConfig, {"llm": {"encoder_layers": 2, "decoder_layer": 2}})


@pytest.mark.parametrize("words", ["xl,stage1", "xxl,stage2", "t5_11b,stage1,unpacked,compat", "xl,stage1,whole_text"])
def test_a_recipe_survives_its_files(words, tmp_path):
    r = recipe(words)
    recipes.save(r, tmp_path / "config.json")
    assert recipes.load(tmp_path / "config.json") == r == recipes.from_config(recipes.config_dict(r))


def test_published_sizes_and_hyperparameters():
    """Parameters with CLIP and projector as published; 256 and 96 samples per update; what each stage trains."""
    assert vlm.count(recipe("xl,stage2").model) == 3_159_560_192
    assert vlm.count(recipe("xxl,stage2").model) == 11_459_819_520
    first, second = recipe("xl,stage1,unpacked").train, recipe("xl,stage2,unpacked").train
    assert (first.lr, first.global_batch, second.lr, second.global_batch) == (1e-2, 256, 2e-5, 96)
    shapes = vlm.shapes(recipe("xl,stage2").model)
    assert {path.split("/")[0] for path in select(first.trainable, shapes)} == {"projector"}
    assert {path.split("/")[0] for path in select(second.trainable, shapes)} == {"projector", "llm"}
    assert recipe("xl,stage2,compat").train.clip_norm is None
    with pytest.raises(ConfigError, match="exclude each other"):
        recipe("xl,stage2,whole_text")


def test_flops_of_an_encoder_decoder():
    """Six per parameter and token where all is trained, four behind a trained projector; cross keys are made of encoder slots."""
    config = recipe("xl,stage2").model
    shapes = {path: int(np.prod(like.shape)) for path, like in vlm.shapes(config).items() if path.endswith("/kernel")}

    def size(*parts):
        return sum(n for path, n in shapes.items() if path.startswith(parts))

    cross = size("llm/decoder/blocks/cross/k", "llm/decoder/blocks/cross/v")
    both = {stage: flops.training_cost(config, select(stage, vlm.shapes(config))) for stage in (STAGE1, STAGE2)}
    for stage, per_weight in ((STAGE1, 4), (STAGE2, 6)):
        assert both[stage].slot == per_weight * (size("llm/encoder/blocks") + cross)
        assert both[stage].answer == per_weight * (size("llm/decoder/blocks", "llm/head") - cross)
        assert both[stage].pair == 2 * both[stage].cross_pair == 2 * both[stage].answer_pair


def changed(r, output, **data):
    train = dataclasses.replace(r.train, steps=2)
    data = dataclasses.replace(r.data, generated_watches=24, **data)
    return dataclasses.replace(r, output=str(output), train=train, data=data)


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """Stage 1, and stage 2 that goes on from its export."""
    folder = tmp_path_factory.mktemp("runs")
    first = changed(recipe("xl,stage1,smoke"), folder / "first")
    run_recipe(first, progress=False)
    init = dataclasses.replace(first.init, checkpoint=str(folder / "first" / "export"))
    second = changed(recipe("xl,stage2,smoke"), folder / "second", tokenizer=str(folder / "first" / "data"))
    run_recipe(dataclasses.replace(second, init=init), progress=False)
    return folder


def test_both_stages_leave_metrics_and_an_export(stages):
    for stage in ("first", "second"):
        lines = [json.loads(line) for line in (stages / stage / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [1, 2]
        assert all(np.isfinite(line["loss"]) and line["tokens"] > 0 for line in lines)
        assert {"config.json", "model.safetensors", "generation_config.json", "chat_template.jinja"} <= {
            path.name for path in (stages / stage / "export").iterdir()
        }


def test_stage_1_moves_the_projector_alone(stages):
    first, second = (open_checkpoint(stages / stage / "export") for stage in ("first", "second"))
    assert first.naming == second.naming == "clip_t5"
    assert first.config.llm == second.config.llm == recipe("xl,stage1,smoke").model.llm
    same = {path for path in first.leaves if np.array_equal(first.read(path), second.read(path))}
    assert same == {path for path in first.leaves if path.startswith("tower/")}


def test_the_export_answers_questions(stages):
    loaded = load_model(stages / "second" / "export")
    assert loaded.eos == (1,) and loaded.stop == () and loaded.template.version == "t5_v1"
    picture = loaded.picture(ImageSource(str(next((stages / "second" / "data" / "images").iterdir()))))
    prompt = loaded.prompt("What time is it?", [picture])
    assert prompt.tokens[-1] == 1, "the question is closed"
    generator = loaded.generator()
    (alone,) = generator.tokens([prompt], Decoding(8))
    assert 1 <= len(alone) <= 8
    assert generator.tokens([loaded.prompt("Why?"), prompt], Decoding(8))[1] == alone


def test_templates_and_models_that_do_not_fit_are_refused(tmp_path):
    r = changed(recipe("xl,stage2,smoke"), tmp_path / "run")
    wrong = dataclasses.replace(r, data=dataclasses.replace(r.data, template="v1"))
    with pytest.raises(ConfigError, match="model.llm is an encoder-decoder: use one of t5_plain"):
        run_recipe(wrong, progress=False)
    wrong = dataclasses.replace(r, model=recipe("7b,stage2,smoke", "llava15").model, output=str(tmp_path / "other"))
    with pytest.raises(ConfigError, match="model.llm is a decoder: use a template such as v1"):
        run_recipe(wrong, progress=False)


def test_names_of_the_published_model():
    """Every tensor of the released checkpoint, its shape, and nothing else but the aliases of its embedding."""
    from tests.goldens import cases

    for path in cases("clip_flant5", "checkpoint_names_*.json"):
        published = json.loads(path.read_text())
        size = published["model"].rpartition("-")[2]
        config = recipe(f"{size},stage2").model
        ours = {names.key_of(entry, "clip_t5"): list(entry.shape) for entry in names.entries(config)}
        theirs = published["tensors"]
        theirs = theirs if isinstance(theirs, dict) else {t["name"]: t["shape"] for t in theirs}
        assert ours == {name: list(shape) for name, shape in theirs.items() if name not in names.ALIASES}
        assert set(published["aliases_of_shared"]) <= set(names.ALIASES)

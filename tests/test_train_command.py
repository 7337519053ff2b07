"""The command `train` on smoke recipes: what a run leaves behind, and what it refuses."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from vlm_jax import recipe as recipes
from vlm_jax.config import ConfigError, UserError
from vlm_jax.data.tokenizer import load_tokenizer
from vlm_jax.generate.load import load_model
from vlm_jax.train.command import run_recipe
from vlm_jax.train.export import convert
from vlm_jax.train.weights import open_weights

ROOT = Path(__file__).resolve().parent.parent


def llava15(words):
    spec = importlib.util.spec_from_file_location("llava15", ROOT / "configs" / "llava15.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return recipes.from_config(module.get_config(words))


def changed(recipe, output, **data):
    """The recipe with two updates, other data keys and another output folder."""
    train = dataclasses.replace(recipe.train, steps=2)
    return dataclasses.replace(recipe, output=str(output), train=train, data=dataclasses.replace(recipe.data, **data))


def convert_flags(source, target, **given):
    names = ("vision", "llm", "projector", "base", "extract", "delta", "tokenizer", "tower", "dtype")
    return {
        "from": str(source),
        "to": str(target),
        "names": "",
        "merge": False,
        "max_shard": "5GB",
        **dict.fromkeys(names, ""),
        **given,
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A stage-2 smoke run with tokens around images."""
    folder = tmp_path_factory.mktemp("run")
    run_recipe(changed(llava15("7b,stage2,smoke"), folder, im_start_end=True), progress=False)
    return folder


def test_a_run_leaves_config_metrics_checkpoints_and_an_export(run):
    assert {"config.json", "metrics.jsonl", "checkpoints", "export"} <= {p.name for p in run.iterdir()}
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [1, 2]
    assert recipes.load(run / "config.json").train.steps == 2


def test_tokens_around_images_survive_the_export(run):
    loaded = load_model(run / "export")
    assert loaded.start_end
    ids = [loaded.tokenizer.id_of(text) for text in ("<im_start>", "<im_end>", "<image>")]
    assert None not in ids and len(set(ids)) == 3
    trained = load_tokenizer(run / "data").with_tokens("<im_start>", "<im_end>")
    assert ids[:2] == [trained.id_of("<im_start>"), trained.id_of("<im_end>")]


def test_a_run_is_converted_from_its_newest_checkpoint(run, tmp_path):
    assert convert(**convert_flags(run, tmp_path / "hf")) == 0
    assert (tmp_path / "hf" / "model.safetensors").read_bytes() == (run / "export" / "model.safetensors").read_bytes()
    convert(**convert_flags(run, tmp_path / "mm_projector.bin", extract="projector"))
    assert (tmp_path / "mm_projector.bin").is_file()
    with pytest.raises(ConfigError, match="--vision cannot be used on the run"):
        convert(**convert_flags(run, tmp_path / "other", vision="clip"))


def test_stage_two_starts_from_the_export_of_stage_one(run, tmp_path):
    recipe = changed(llava15("7b,stage1,smoke"), tmp_path, im_start_end=True)
    recipe = dataclasses.replace(
        recipe, init=dataclasses.replace(recipe.init, checkpoint=str(run / "export"), random=False)
    )
    result = run_recipe(recipe, progress=False)
    assert result.status == "finished" and set(p.split("/")[0] for p in result.state.trainable) == {"projector"}


@pytest.mark.parametrize(
    "init, sentence",
    [
        ({"random": False}, "init.llm and init.checkpoint are empty"),
        ({"vision": "clip"}, "init.vision needs a language model to go with"),
        ({"llm": "vicuna", "random": False}, "init.vision is empty"),
    ],
)
def test_weights_that_do_not_come_together_are_refused(run, init, sentence):
    recipe = llava15("7b,stage2,smoke")
    recipe = dataclasses.replace(recipe, init=dataclasses.replace(recipe.init, **init))
    with pytest.raises(ConfigError, match=sentence):
        open_weights(recipe, load_tokenizer(run / "data"))


def test_bad_records_are_named_before_training_and_bounded(run, tmp_path, capsys):
    records = json.loads((run / "data" / "train.json").read_text())
    records[3]["image"] = "lost.png"
    (tmp_path / "mine.json").write_text(json.dumps(records))
    data = {
        "path": (str(tmp_path / "mine.json"),),
        "image_folder": str(run / "data" / "images"),
        "tokenizer": str(run / "data"),
    }
    recipe = changed(llava15("7b,stage2,smoke"), tmp_path / "run", generated_watches=0, **data)
    assert run_recipe(recipe, progress=False).status == "finished"
    said = capsys.readouterr().err
    assert f"1 of {len(records)} records" in said and "lost.png" in said and "does not exist" in said
    assert "not trained on: 1 missing" in said
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [lines[-1][key] for key in ("unusable_samples", "samples_without_loss", "cut_samples")] == [1, 0, 0]
    share = dataclasses.replace(recipe, output=str(tmp_path / "share"))
    share = dataclasses.replace(share, data=dataclasses.replace(share.data, max_bad_share=0.5 / len(records)))
    with pytest.raises(
        UserError, match=rf"^1 of {len(records)} records .*data.max_bad_share=.* 1 missing in mine.json"
    ):
        run_recipe(share, progress=False)
    strict = dataclasses.replace(
        recipe, output=str(tmp_path / "strict"), train=dataclasses.replace(recipe.train, max_bad_samples=0)
    )
    with pytest.raises(UserError, match="train.max_bad_samples"):
        run_recipe(strict, progress=False)


@pytest.mark.slow
@pytest.mark.long
def test_a_fake_mesh_trains_to_the_same_loss(tmp_path):
    """The command itself on eight devices, fsdp x tensor, against one device."""
    losses = []
    for flags, mesh in (
        ("", ()),
        ("--xla_force_host_platform_device_count=8", ("--config.mesh.fsdp=4", "--config.mesh.tensor=2")),
    ):
        out = tmp_path / str(len(losses))
        command = [
            sys.executable,
            "-m",
            "vlm_jax",
            "train",
            "--config=configs/llava15.py:7b,stage2,smoke",
            f"--config.output={out}",
        ]
        done = subprocess.run(
            [*command, "--config.train.steps=3", *mesh],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env={"PATH": "", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "HOME": str(tmp_path)},
        )
        assert done.returncode == 0, done.stderr
        losses.append([json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()])
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)


@pytest.mark.parametrize("status, code", [("stopped", 75), ("finished", 0), ("already finished", 0)])
def test_a_cluster_learns_that_a_stopped_run_is_not_done(monkeypatch, status, code):
    """What SIGTERM does to a run is a contract of its own; here only what the command makes of its status."""
    from vlm_jax.train import command
    from vlm_jax.train.loop import Result

    monkeypatch.setattr(command, "run_recipe", lambda recipe: Result(status, None, 3))
    config = recipes.config_dict(llava15("7b,stage1,smoke"))
    assert command.train(config, stopped_code=75) == code
    assert command.train(config) == 0

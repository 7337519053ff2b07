"""The command `train` for visual tokenizers: published recipes, what a run leaves behind, and what it refuses."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest

from tests.small_tokenizers import AUTOENCODER, SIZE, recipe, task
from tests.test_config import ROOT, get_config
from vlm_jax import recipe as recipes
from vlm_jax.config import ConfigError, UserError
from vlm_jax.convert.torch_pickle import save
from vlm_jax.convert.visual_tokenizer import load_tokenizer, save_tokenizer
from vlm_jax.data.image_options import ImageDataConfig
from vlm_jax.tokenizer_recipe import TokenizerInit, TokenizerRecipe
from vlm_jax.train import tokenizer_state as states
from vlm_jax.train.command import run_tokenizer_recipe
from vlm_jax.train.metrics import read_metrics
from vlm_jax.train.tokenizer_command import exported, perceptual_arrays, random_lpips, task_of, token_embeddings
from vlm_jax.train.tokenizer_task import usage_of
from vlm_jax.visual_tokenizers import names
from vlm_jax.visual_tokenizers.codebook import TABLE

KINDS = ("vq16", "vq8", "rq", "hq", "hq3", "unicode_hq", "unicode_rq")


def published(words):
    return recipes.from_config(get_config(ROOT / "configs" / "visual_tokenizer.py")(words))


@pytest.mark.parametrize("kind", KINDS)
def test_published_recipes(kind, tmp_path):
    full, small = published(kind), published(f"{kind},smoke")
    recipes.save(full, tmp_path / "config.json")
    assert recipes.load(tmp_path / "config.json") == full
    trained = {name: states.parts(made, {})["trainable"] for name, made in (("full", full), ("small", small))}

    def structure(paths):
        """Levels, attention and bottleneck, however many blocks a level has."""
        return {re.sub(r"(block|attention)_\d.*", r"\1", p) for p in paths if p.startswith("tokenizer/")}

    sizes = {name: sum(np.prod(s.shape, dtype=int) for s in leaves.values()) for name, leaves in trained.items()}
    assert sizes["small"] < 3_000_000 < 60_000_000 < sizes["full"]
    assert structure(trained["small"]) == structure(trained["full"])
    if kind.startswith("vq"):
        assert trained["full"]["codebooks/codebook/embedding"].shape == (16384, 8)
        critic = sum(np.prod(s.shape, dtype=int) for p, s in trained["full"].items() if p.startswith("critic/"))
        assert critic == 2_765_633
    else:
        assert not any(p.startswith("codebooks/") for p in trained["full"]), "tables follow moving averages"


@pytest.mark.parametrize("kind", ("watch_vq", "watch_rq", "watch_hq"))
def test_small_recipes_for_watches(kind):
    made = published(kind)
    trained = states.parts(made, perceptual_arrays(made))["trainable"]
    assert sum(np.prod(s.shape, dtype=int) for s in trained.values()) < 300_000
    assert not any(path.startswith("critic/") for path in trained) and made.data.generated_watches
    keys = [entry.key for entry in names.entries(made.tokenizer)]
    assert len(keys) == len(set(keys)), "every tensor has a name of its own in the export"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(recipe, folder, result) of two updates of a language-driven tokenizer with a random perceptual loss on smart-watches."""
    folder = tmp_path_factory.mktemp("tokenizer")
    made = recipe("unicode")
    made = dataclasses.replace(
        made,
        adversary=dataclasses.replace(made.adversary, perceptual_weight=0.1, fade=0.9),
        init=TokenizerInit(random=True),
        data=ImageDataConfig(size=SIZE, crop="centre", flip=0.0, generated_watches=20, threads=1),
        train=dataclasses.replace(made.train, steps=3, log_every=1),
        output=str(folder),
    )
    made = dataclasses.replace(
        made,
        tokenizer=dataclasses.replace(made.tokenizer, autoencoder=dataclasses.replace(AUTOENCODER, resolution=32)),
        data=dataclasses.replace(made.data, size=32),
    )  # the perceptual network halves pictures four times
    return made, folder, run_tokenizer_recipe(made, progress=False)


def test_a_run_leaves_config_metrics_checkpoints_and_an_export(run, capsys):
    made, folder, result = run
    assert recipes.load(folder / "config.json").train == made.train
    lines = read_metrics(folder)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[0]["ratio"] == 0 and lines[2]["ratio"] == pytest.approx(2 / 3)
    assert {"loss", "perceptual", "balance", "critic_loss", "psnr", "codebook/cosine_gap"} <= set(lines[2])
    assert lines[2]["codes_used"] > 0 and lines[2]["unusable_images"] == 0
    config, params, books = load_tokenizer(folder)
    assert config == made.tokenizer
    state = jax.device_get(result.state)
    for path, x in params.items():
        np.testing.assert_array_equal(x, state.moving[f"average/tokenizer/{path}"])
        assert x.ndim == 1 or not np.array_equal(x, state.trainable[f"tokenizer/{path}"])
    np.testing.assert_array_equal(books["top"][TABLE], state.moving["codebooks/top/embedding"])
    assert json.loads((folder / "export" / "config.json").read_text())["extra"]["averaged"] is True
    plain, _ = exported(dataclasses.replace(made, export_average=False), result.state)
    np.testing.assert_array_equal(plain["quant_conv/kernel"], state.trainable["tokenizer/quant_conv/kernel"])
    assert run_tokenizer_recipe(made, progress=False).status == "already finished"
    assert "all 3 steps are done" in capsys.readouterr().err


def test_a_run_starts_from_an_exported_tokenizer(run):
    made, folder, _ = run
    again = dataclasses.replace(made, init=dataclasses.replace(made.init, checkpoint=str(folder)))
    start, (_, params, books) = task_of(again).start, load_tokenizer(folder)
    np.testing.assert_array_equal(start["tokenizer/encoder/conv_in/kernel"], params["encoder/conv_in/kernel"])
    np.testing.assert_array_equal(start["codebooks/top/embedding"], books["top"][TABLE])
    wider = dataclasses.replace(AUTOENCODER, width=64)
    other = dataclasses.replace(again, tokenizer=dataclasses.replace(again.tokenizer, autoencoder=wider))
    with pytest.raises(ConfigError, match=r"is of another tokenizer: its tokenizer/.* is \[.*this recipe's is \["):
        task_of(other)


def test_files_that_the_losses_and_the_codebook_need(tmp_path):
    made = dataclasses.replace(recipe("unicode"), adversary=published("vq16").adversary)
    with pytest.raises(ConfigError, match="init.vgg is empty: .*init.lpips .*perceptual_weight=0.0"):
        perceptual_arrays(made)
    with pytest.raises(ConfigError, match="init.llm is empty: .*Llama-family"):
        token_embeddings(made)
    arrays = random_lpips(0)
    vgg = {}
    for path, x in arrays.items():
        layer, _, part = path.partition("/")
        if part:
            name = f"features.{layer.removeprefix('conv_')}.{'weight' if part == 'kernel' else 'bias'}"
            vgg[name] = np.ascontiguousarray(x.transpose(3, 2, 0, 1)) if part == "kernel" else x
    save(tmp_path / "vgg16.pth", vgg)
    save(tmp_path / "vgg.pth", {f"lin{k}.model.1.weight": arrays[f"lin_{k}"].reshape(1, -1, 1, 1) for k in range(5)})
    init = TokenizerInit(vgg=str(tmp_path / "vgg16.pth"), lpips=str(tmp_path / "vgg.pth"))
    read = perceptual_arrays(dataclasses.replace(made, init=init))
    assert read.keys() == arrays.keys() and all(np.array_equal(read[path], x) for path, x in arrays.items())
    with pytest.raises(UserError, match="lost.pth does not exist"):
        perceptual_arrays(dataclasses.replace(made, init=dataclasses.replace(init, vgg=str(tmp_path / "lost.pth"))))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"data": ImageDataConfig(size=250)}, "data.size=250 must be a multiple of 16"),
        ({"top_picture": True}, "needs tokenizer.quantizer.kind=two_level"),
    ],
)
def test_recipes_that_cannot_be_run(wrong, says):
    with pytest.raises(ConfigError, match=says):
        TokenizerRecipe(**wrong)


def test_other_commands_refuse_a_tokenizers_config():
    with pytest.raises(ConfigError, match="trains no vision-language model"):
        recipes.of_vlm(recipes.config_dict(published("rq")))


def test_usage_of_a_window_is_that_of_all_its_images():
    steps = [{"codes/codebook": np.array([2, 0, 2, 0])}, {"codes/codebook": np.array([0, 4, 0, 0])}]
    assert usage_of(steps[:1]) == {"codes_used": 0.5, "perplexity": pytest.approx(2)}
    assert usage_of(steps) == {"codes_used": 0.75, "perplexity": pytest.approx(np.exp(1.5 * np.log(2)))}


def test_states_start_from_what_is_given(tmp_path):
    of_run = task("rq_unshared")
    state = of_run.create()
    for path, x in of_run.start.items():
        np.testing.assert_array_equal(state.trainable[path], x)
    assert state.moving["codebooks/codebook/embedding"].shape == (2, 12, 8)
    for path in states.under("average/", state.moving):
        np.testing.assert_array_equal(state.moving[f"average/{path}"], state.trainable[path])
    params, books = exported(of_run.recipe, state)
    save_tokenizer(tmp_path / "out", of_run.recipe.tokenizer, params, books)
    assert load_tokenizer(tmp_path / "out").config == of_run.recipe.tokenizer

"""The command that draws pictures from a prior: files, order, sentences for what cannot be drawn."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from tests.convert.test_t5_checkpoints import FLAN, t5_alone
from tests.tiny_tokenizers import t5_directory
from tests.tiny_visual_tokenizers import TINY, tensors
from vlm_jax.__main__ import main
from vlm_jax.config import ConfigError
from vlm_jax.convert.prior import save_prior
from vlm_jax.convert.visual_tokenizer import save_tokenizer
from vlm_jax.generate.caption_features import caption_features
from vlm_jax.generate.imagine import ConditionError, conditions, features_of_file, tiled
from vlm_jax.visual_tokenizers import names
from vlm_jax.visual_tokenizers.priors.models import shapes
from vlm_jax.visual_tokenizers.priors.options import GPTConfig

CLASS = GPTConfig(layers=1, heads=2, kv_heads=2, width=16, mlp=24, codes=24, grid=2, classes=5)
CAPTION = dataclasses.replace(CLASS, condition="caption", classes=1000, caption_slots=4, caption_width=6)

BARE = dataclasses.replace(CLASS, condition_dropout=0.0)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folder with a tokenizer of 24 codes and a prior of each kind."""
    folder, rng = tmp_path_factory.mktemp("models"), np.random.RandomState(0)
    save_tokenizer(folder / "vq", TINY["vq"], *names.read(TINY["vq"], tensors(TINY["vq"])))
    save_tokenizer(folder / "rq", TINY["rq"], *names.read(TINY["rq"], tensors(TINY["rq"])))
    for name, config in (("class", CLASS), ("caption", CAPTION), ("bare", BARE)):
        params = {path: rng.normal(0, 0.5, s.shape).astype(np.float32) for path, s in shapes(config).items()}
        save_prior(folder / name, config, params)
    np.savez(folder / "t5.npz", captions=rng.normal(size=(2, 3, 6)), mask=[[1, 1, 0], [1, 1, 1]])
    return folder


def run(models, out, **flags):
    flags = {"prior": models / "class", "tokenizer": models / "vq", "out": out, "top_k": 10} | flags
    return main(["imagine", *(f"--{name}={value}" if value != "" else f"--{name}" for name, value in flags.items())])


def pictures(folder):
    return {file.name: np.asarray(Image.open(file)) for file in sorted(folder.glob("0*.png"))}


def test_pictures_of_classes(models, tmp_path):
    size = 2 * TINY["vq"].autoencoder.reduction
    assert run(models, tmp_path / "a", classes="3,1", count=2, batch=3) == 0
    found = pictures(tmp_path / "a")
    assert list(found) == ["00000_3.png", "00001_3.png", "00002_1.png", "00003_1.png"]
    assert {x.shape for x in found.values()} == {(size, size, 3)}
    about = json.loads((tmp_path / "a/samples.json").read_text())
    assert [one["class"] for one in about["images"]] == [3, 3, 1, 1] and about["sampling"]["scale"] == 4.0
    grid = np.asarray(Image.open(tmp_path / "a/grid.png"))
    assert grid.shape == (2 * size + 2, 2 * size + 2, 3) and (grid[:size, -size:] == found["00001_3.png"]).all()
    assert run(models, tmp_path / "b", classes="3,1", count=2, batch=2) == 0
    for name, picture in pictures(tmp_path / "b").items():
        np.testing.assert_array_equal(picture, found[name], err_msg="a picture does not depend on its batch")
    assert run(models, tmp_path / "c", classes="3,1", count=2, batch=2, seed=1) == 0
    assert any((picture != found[name]).any() for name, picture in pictures(tmp_path / "c").items())


def test_pictures_of_captions(models, tmp_path):
    """From a file of features, and from texts whose features are the same."""
    six_wide = dataclasses.replace(FLAN, width=6, vocab=300)
    t5 = t5_directory(t5_alone(tmp_path / "t5", six_wide))
    features, mask = caption_features(str(t5), ["a man", "is it sunny"], 4)
    np.savez(tmp_path / "t5.npz", captions=features, mask=mask)
    flags = {"prior": models / "caption", "dtype": "float32"}
    assert run(models, tmp_path / "a", captions=tmp_path / "t5.npz", **flags) == 0
    assert run(models, tmp_path / "b", **{"text=a man": "", "text=is it sunny": ""}, t5=t5, **flags) == 0
    found, again = pictures(tmp_path / "a"), pictures(tmp_path / "b")
    assert list(found) == list(again) == ["00000_0.png", "00001_1.png"]
    for name, picture in found.items():
        np.testing.assert_array_equal(again[name], picture)


def test_padding_of_captions_moves_to_the_left(models):
    found = features_of_file(CAPTION, models / "t5.npz")
    features = np.load(models / "t5.npz")["captions"].astype(np.float32)
    np.testing.assert_array_equal(found.mask, [[0, 0, 1, 1], [0, 1, 1, 1]])
    np.testing.assert_array_equal(found.values[0, 2:], features[0, :2])
    np.testing.assert_array_equal(found.values[1, 1:], features[1])
    assert not found.values[~found.mask].any()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"classes": "3,x"}, "--classes=3,x must be numbers"),
        ({"prior": "bare", "classes": "1", "scale": 2.0}, "cannot be guided"),
        ({"classes": "3,5"}, "--classes names 5, but this prior knows the classes 0 to 4"),
        ({}, "give --classes, e.g. 207,360"),
        ({"classes": "1", "count": 0}, "must be at least 1"),
        ({"classes": "1", "scale": 0.5}, "scale=0.5"),
        ({"classes": "1", "tokenizer": "rq"}, "rq has one of 24 codes at each of 3 depths"),
        ({"prior": "vq", "classes": "1"}, "is no prior"),
        ({"prior": "absent", "classes": "1"}, "neither a prior's directory"),
        ({"prior": "caption", "captions": "vq/config.json"}, "cannot be read as an npz"),
        ({"prior": "caption", "classes": "1"}, "give --text"),
        ({"prior": "caption", "text": "a cat"}, "with --t5 DIR"),
        ({"classes": "1", "t5": "x"}, "neither text nor captions"),
    ],
)
def test_what_cannot_be_drawn(models, tmp_path, capsys, flags, says):
    flags = {name: models / x if name in ("prior", "tokenizer", "captions") else x for name, x in flags.items()}
    assert run(models, tmp_path / "out", **flags) == 2
    message = capsys.readouterr().err
    assert says in message and message.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_features_that_do_not_fit(models, tmp_path):
    np.savez(tmp_path / "wide.npz", captions=np.zeros((1, 3, 7)), mask=np.ones((1, 3)))
    with pytest.raises(ConditionError, match="at most 4 features of 6 numbers"):
        features_of_file(CAPTION, tmp_path / "wide.npz")
    np.savez(tmp_path / "bare.npz", captions=np.zeros((1, 3, 6)))
    with pytest.raises(ConditionError, match="has no array 'mask'"):
        conditions(CAPTION, "", str(tmp_path / "bare.npz"))
    with pytest.raises(ConfigError):
        dataclasses.replace(CLASS, condition="both")


def test_a_grid_of_single_pictures_is_about_square():
    assert tiled([np.zeros((4, 4, 3), np.uint8)] * 9, 1).shape == (16, 16, 3)

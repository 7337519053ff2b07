"""Priors on images: published recipes, rows, the sentences for what cannot be, and the command."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from tests.test_config import ROOT, get_config
from tests.tiny_visual_tokenizers import TINY, tensors
from vlm_jax import recipe as recipes
from vlm_jax.__main__ import main
from vlm_jax.config import ConfigError
from vlm_jax.convert.prior import load_prior
from vlm_jax.convert.visual_tokenizer import Tokenizer, save_tokenizer
from vlm_jax.data.code_options import CodeDataConfig
from vlm_jax.data.code_rows import Captions, Labels
from vlm_jax.data.conditioned_images import ConditionedImages, Cut, find_images
from vlm_jax.data.draws import Draws
from vlm_jax.data.image_source import ImageSource
from vlm_jax.data.manifest import DataError
from vlm_jax.data.measuring import Limits
from vlm_jax.prior_recipe import PriorInit, PriorRecipe
from vlm_jax.train.prior_codes import ImageCoder, size_of
from vlm_jax.train.prior_command import run_prior_recipe
from vlm_jax.train.prior_options import PriorTrainConfig
from vlm_jax.visual_tokenizers import names
from vlm_jax.visual_tokenizers.options import PUBLISHED as TOKENIZERS
from vlm_jax.visual_tokenizers.priors.hierarchy_options import PUBLISHED_HQ, PUBLISHED_RQ


def recipe_of(words):
    return recipes.from_config(get_config(ROOT / "configs" / "prior.py")(words))


@pytest.mark.parametrize(
    ("words", "crop", "flip", "temperature", "drawn"),
    [
        ("rq,images", "random_place", 0.5, 0.5, True),
        ("rq_imagenet_3800m,images", "random_place", 0.5, 0.5, True),
        ("rq_ffhq_355m,images", "random_area", 0.5, 0.5, True),
        ("rq_church_370m,images", "centre", 0.0, 0.5, True),
        ("rq_lsun_612m,images", "centre", 0.0, 0.5, True),
        ("rq_cc3m_654m,images", "random_place", 0.0, 0.5, True),
        ("hq,images", "random_place", 0.0, 1.0, False),
        ("hq_imagenet_l,images", "random_place", 0.0, 1.0, False),
        ("hq_ffhq,images", "random_area", 0.5, 1.0, False),
        ("hq_cc15m,images", "random_place", 0.0, 1.0, False),
        ("hq_imagenet_top2bot,images", "random_place", 0.0, 0.0, False),
        ("hq_imagenet_level3,images", "random_place", 0.0, 0.0, False),
        ("gpt_b,c2i,images", "ten", 0.0, 0.0, False),
        ("gpt_xl,t2i,images", "centre_box", 0.0, 0.0, False),
    ],
)
def test_published_recipes_on_images(words, crop, flip, temperature, drawn):
    recipe, of_codes = recipe_of(words), recipe_of(words.replace(",images", ""))
    assert (recipe.data.crop, recipe.data.flip) == (crop, flip) and recipe.data.path == ("IMAGES",)
    assert (recipe.train.soft_temperature, recipe.train.stochastic_codes) == (temperature, drawn)
    hard = dataclasses.replace(recipe.train, soft_temperature=0.0, stochastic_codes=False)
    assert of_codes.train == hard and of_codes.prior == recipe.prior and not of_codes.data.path


def test_a_published_prior_fits_its_tokenizer():
    fits = {
        "rq": PUBLISHED_RQ["imagenet_480m"],
        "hq": PUBLISHED_HQ["imagenet_s"],
        "hq3": PUBLISHED_HQ["imagenet_level3"],
    }
    for name, prior in fits.items():
        assert size_of(TOKENIZERS[name], prior.levels_of_codes, name) == 256
    with pytest.raises(
        ConfigError, match="8 x 8 x 4 out of 16384 from images of 256 pixels, but .* 8 x 8 x 4 out of 2048"
    ):
        size_of(TOKENIZERS["rq"], PUBLISHED_RQ["ffhq_355m"].levels_of_codes, "rq")


def folder_of(place, count=6):
    """Images in two folders."""
    rng = np.random.default_rng(0)
    for number in range(count):
        file = place / ("ant" if number % 2 else "bee") / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 12, 3), np.uint8)).save(file)
    return CodeDataConfig(path=(str(place),), max_bad_share=0.5)


def test_rows_have_images_and_classes(tmp_path):
    """Another image takes the place of a broken one, with its own class; the name decides the class, not the place."""
    data = folder_of(tmp_path / "images")
    (tmp_path / "images/bee/2.png").write_bytes(b"no image")
    images, skipped = find_images(data, tmp_path / "cache")
    assert (
        list(images) == ["ant/1.png", "ant/3.png", "ant/5.png", "bee/0.png", "bee/2.png", "bee/4.png"] and not skipped
    )
    rows = ConditionedImages(images, Labels(list(images), "", 2), Cut("random_place", 8), epochs=2)
    pictures = {
        np.asarray(Image.open(tmp_path / "images" / n).convert("RGB")).tobytes(): n for n in images if "2" not in n
    }
    for epoch in range(2):
        assert sorted(int(rows.records_of(6 * epoch + k)[0]) for k in range(6)) == list(range(6))
    for k in range(12):
        shown, number = rows[k], int(rows.records_of(k)[0])
        kept = 5 if number == 4 else number
        whole = np.asarray(Image.open(tmp_path / "images" / list(images)[kept]).convert("RGB"))
        assert any((whole[:, x : x + 8] == shown["images"]).all() for x in range(5)) and shown["labels"] == (kept > 2)
    assert rows.counts() == {"unusable_images": 1} and len(pictures) == 5
    other = ConditionedImages(images, Labels(list(images), "", 2), Cut("random_place", 8, 0.5), epochs=2)
    assert rows.identity()["packing"] | {"data.flip": 0.5} == other.identity()["packing"] != rows.identity()["packing"]


def test_images_without_a_caption_are_left_out(tmp_path):
    data = folder_of(tmp_path / "images")
    data = dataclasses.replace(data, captions=str(tmp_path / "captions"))
    images, _ = find_images(data, tmp_path / "cache")
    for name in list(images)[1:4]:
        file = (tmp_path / "captions" / name).with_suffix(".npy")
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(file, np.full((1, 2), list(images).index(name), np.float32))
    known = Captions(list(images), data, 3, 2)
    rows = ConditionedImages(images, known, Cut("centre", 8))
    assert len(rows) == 3 and {int(rows.records_of(k)[0]) for k in range(3)} == {1, 2, 3}
    for k in range(3):
        number = int(rows.records_of(k)[0])
        whole = np.asarray(Image.open(tmp_path / "images" / list(images)[number]).convert("RGB"))
        np.testing.assert_array_equal(rows[k]["images"], whole[:, 2:10])
        assert rows[k]["captions"][-1, 0] == number
    assert rows.counts() == {"unusable_images": 3}
    with pytest.raises(DataError, match="3 of 6 records"):
        ConditionedImages(images, known, Cut("centre", 8), limits=Limits(None, 0.4))
    nothing = dataclasses.replace(data, captions=str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="none of the 6 images has a caption"):
        ConditionedImages(images, Captions(list(images), nothing, 3, 2), Cut("centre", 8))


def test_views_are_drawn_and_mirrored(tmp_path):
    """Five crops of `ten` and their mirror images; a share of the single view of `centre`."""
    folder_of(tmp_path, 1)
    source = ImageSource(str(tmp_path / "bee/0.png"))
    many = [Draws(0, epoch, 0) for epoch in range(120)]
    ten = {Cut("ten", 8, margin=1.25)(source, draws).tobytes() for draws in many}
    assert len(ten) == 10
    centre = [Cut("centre", 8, 0.25)(source, draws) for draws in many]
    plain = Cut("centre", 8)(source, many[0])
    mirrored = sum((one == plain[:, ::-1]).all() for one in centre)
    assert 15 <= mirrored <= 45 and sum((one == plain).all() for one in centre) == 120 - mirrored


def test_what_cannot_be():
    rq, tokenizer = PUBLISHED_RQ["ffhq_355m"], PriorInit(tokenizer="somewhere")
    for make, says in (
        (
            lambda: PriorRecipe(rq, tokenizer, CodeDataConfig(codes=("x",)), PriorTrainConfig(soft_temperature=0.5)),
            "train.soft_temperature=0.5 asks for soft labels, which need images, and data.codes has hard codes alone",
        ),
        (
            lambda: PriorRecipe(data=CodeDataConfig(path=("x",))),
            "init.tokenizer is empty: name the tokenizer that turns",
        ),
        (lambda: CodeDataConfig(codes=("x",), path=("y",)), "data.codes and data.path are both given"),
        (lambda: CodeDataConfig(crop="any"), "data.crop='any' is unknown"),
        (lambda: CodeDataConfig(margin=3.0), "data.margin=3.0 must be at least 1 and below 2"),
        (lambda: PriorTrainConfig(stochastic_codes=True), "draws codes from soft labels: give train.soft_temperature"),
        (lambda: PriorTrainConfig(soft_temperature=-1.0), "train.soft_temperature=-1.0 must be at least 0"),
        (lambda: PriorTrainConfig(tokenizer_dtype="int8"), "train.tokenizer_dtype='int8' is unknown"),
    ):
        with pytest.raises(ConfigError) as error:
            make()
        assert says in str(error.value)
    for kind, says in (("vq", "this one's is vq"), ("unicode_rq", "not one drawn towards a language model")):
        found = Tokenizer(TINY[kind], *names.read(TINY[kind], tensors(TINY[kind])))
        with pytest.raises(ConfigError, match=says):
            ImageCoder(found, PriorTrainConfig(soft_temperature=1.0))


def test_a_tokenizer_that_does_not_fit(tmp_path):
    save_tokenizer(tmp_path / "rq", TINY["rq"], *names.read(TINY["rq"], tensors(TINY["rq"])))
    smoke = recipe_of("hq,images,smoke")
    data = dataclasses.replace(folder_of(tmp_path / "images"), threads=1)
    recipe = dataclasses.replace(
        smoke, init=PriorInit(tokenizer=str(tmp_path / "rq")), data=data, output=str(tmp_path / "run")
    )
    with pytest.raises(
        ConfigError, match="makes codes of 4 x 4 x 3 out of 24 from images of 8 pixels, but this prior needs"
    ):
        run_prior_recipe(recipe, progress=False)


@pytest.mark.parametrize("words", ["hq_cc15m", *(pytest.param(w, marks=pytest.mark.long) for w in ("rq", "gpt_b"))])
def test_the_command_trains_on_made_up_images(tmp_path, words):
    flags = [f"--config.output={tmp_path}", "--config.train.steps=2", "--config.train.tokenizer_dtype=bfloat16"]
    assert main(["train", f"--config=configs/prior.py:{words},images,smoke", *flags]) == 0
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and load_prior(tmp_path).config == recipe_of(f"{words},images,smoke").prior

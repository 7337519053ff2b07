"""A prior that is trained on images sees the codes that `tokenize` makes of them, draws others anew at every step where it is told to, and
goes on bit for bit where it stopped."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image

from tests.tiny_visual_tokenizers import TINY, tensors
from vlm_jax.__main__ import main
from vlm_jax.convert.visual_tokenizer import Tokenizer, load_tokenizer, save_tokenizer
from vlm_jax.data.code_options import CodeDataConfig
from vlm_jax.data.code_records import open_codes
from vlm_jax.parallel.mesh_config import MeshConfig
from vlm_jax.prior_recipe import PriorInit, PriorRecipe, shrink
from vlm_jax.train.prior_codes import ImageCoder
from vlm_jax.train.prior_command import run_prior_recipe
from vlm_jax.train.prior_options import PriorTrainConfig
from vlm_jax.visual_tokenizers import names
from vlm_jax.visual_tokenizers.priors.hierarchy_options import HQTransformerConfig, RQTransformerConfig
from vlm_jax.visual_tokenizers.priors.options import GPTConfig

# pixels, crop, and what fits a tiny prior to the tiny tokenizer
KINDS = {
    "rq": (8, "centre", RQTransformerConfig(), {"codes": 24, "code_width": 8, "depth": 3, "conditions": 2}),
    "hq": (16, "centre", HQTransformerConfig(), {"codes": (24, 20), "classes": 2}),
    "vq": (8, "ten", GPTConfig(), {"codes": 24, "classes": 2}),
}
SPEEDS = {"seconds_per_step", "images_per_second", "tflops_per_second_per_device", "data_stall"}


@pytest.fixture(autouse=True)
def quick_compilation():
    """Programs here run once and are tiny: most of the time would go into optimising them."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def prepared(folder, kind, **train):
    """A recipe on eight images in two folders; the tokenizer is exported beside them."""
    size, crop, prior, fit = KINDS[kind]
    rng = np.random.default_rng(0)
    save_tokenizer(folder / kind, TINY[kind], *names.read(TINY[kind], tensors(TINY[kind])))
    for number in range(8):
        file = folder / "images" / ("ant" if number % 2 else "bee") / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (size, size + 4, 3), np.uint8)).save(file)
    made = shrink(PriorRecipe(prior, PriorInit(random=True)))
    return dataclasses.replace(
        made,
        prior=dataclasses.replace(made.prior, **fit),
        init=PriorInit(tokenizer=str(folder / kind)),
        data=CodeDataConfig(path=(str(folder / "images"),), crop=crop),
        train=dataclasses.replace(made.train, steps=4, lr=1e-2, **train),
        output=str(folder / "run"),
        export=False,
    )


def curve(run):
    """Every number of every line but the speeds."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in SPEEDS} for line in lines]


@pytest.mark.parametrize("kind", ["rq", *(pytest.param(k, marks=pytest.mark.long) for k in ("hq", "vq"))])
def test_hard_codes_of_images_train_as_those_of_a_file(tmp_path, kind):
    """The same images in the same order; with the crop `ten` the same of their ten views."""
    recipe, size = prepared(tmp_path, kind), KINDS[kind][0]
    codes = str(tmp_path / "codes.arrayrecord")
    what = [f"--model={tmp_path / kind}", f"--images={tmp_path / 'images'}", f"--crop={KINDS[kind][1]}"]
    assert not main(["tokenize", *what, f"--size={size}", f"--out={codes}", "--batch=8"])
    run_prior_recipe(recipe, progress=False)
    data = CodeDataConfig(codes=(codes,))
    run_prior_recipe(dataclasses.replace(recipe, data=data, output=str(tmp_path / "file")), progress=False)
    images, file = curve(tmp_path / "run"), curve(tmp_path / "file")
    assert len(images) == 4 and images[-1]["loss"] < images[0]["loss"]
    for one, other in zip(images, file, strict=True):
        assert one == pytest.approx(other, rel=1e-6)


@pytest.mark.parametrize("kind", ["rq", "unicode_hq"])
def test_codes_in_a_step_are_those_of_tokenize(tmp_path, kind):
    """UniCode's, whose scale is a mean over the batch, too."""
    rng, size = np.random.default_rng(1), 16
    save_tokenizer(tmp_path / kind, TINY[kind], *names.read(TINY[kind], tensors(TINY[kind])))
    pixels = rng.integers(0, 256, (5, size, size, 3), np.uint8)
    for number, picture in enumerate(pixels):
        Image.fromarray(picture).save(tmp_path / f"{number}.png")
    flags = [f"--model={tmp_path / kind}", f"--images={tmp_path}", f"--size={size}", "--batch=2"]
    assert not main(["tokenize", *flags, f"--out={tmp_path / 'codes.arrayrecord'}"])
    known = open_codes(tmp_path / "codes.arrayrecord")
    coder = ImageCoder(load_tokenizer(tmp_path / kind), PriorTrainConfig())
    batch = jax.jit(lambda leaves, key: coder(leaves, {"images": pixels}, key))(coder.leaves, jax.random.key(0))
    for level, found in enumerate(batch.values()):
        np.testing.assert_array_equal(found, [known[number].codes[level][0] for number in range(5)])


@pytest.mark.parametrize(("kind", "temperature"), [("rq", 0.5), ("hq", 0.5), ("hq3", 20.0)])
def test_codes_are_drawn_from_their_soft_labels(kind, temperature):
    """Anew with every key; the first depth or level as often as its labels say, the others from what the drawn ones left."""
    config = TINY[kind]
    how = PriorTrainConfig(soft_temperature=temperature, stochastic_codes=True)
    coder = ImageCoder(Tokenizer(config, *names.read(config, tensors(config))), how)
    pixels = np.random.default_rng(2).integers(0, 256, (1, 16, 16, 3), np.uint8).repeat(64, 0)
    run = jax.jit(lambda leaves, key: coder(leaves, {"images": pixels}, key))
    first, again, other = (run(coder.leaves, jax.random.key(seed)) for seed in (0, 0, 1))
    for key in first:
        np.testing.assert_array_equal(first[key], again[key])
    keys = [key for key in first if key.startswith("codes")]
    assert any((first[key] != other[key]).any() for key in keys)
    codes, soft = np.asarray(first[keys[0]]), np.asarray(first[keys[0].replace("codes", "soft")])
    if kind == "rq":
        codes, labels, rest = codes[..., 0], soft[..., 0, :], soft[..., 1, :]
    else:
        labels, rest = soft, np.asarray(first["soft_1"])
    assert np.ptp(labels, axis=0).max() < 1e-5 and np.ptp(rest, axis=0).max() > 1e-2
    said = labels.mean(0).reshape(-1, labels.shape[-1])
    drawn = np.eye(labels.shape[-1])[codes].mean(0).reshape(said.shape)
    spread = np.sqrt((said * (1 - said)).sum(0) / len(codes)) / len(said)
    assert (np.abs(drawn.mean(0) - said.mean(0)) < 5 * spread + 1e-3).all() and (drawn.max(-1) < 1).any()


def test_a_run_on_images_goes_on_bit_for_bit(tmp_path):
    """With drawn codes and soft labels; another mesh gives the same losses to rounding."""
    recipe = prepared(tmp_path, "rq", soft_temperature=0.5, stochastic_codes=True, save_every=2, accum=2)
    mesh = MeshConfig(data=2, fsdp=2, tensor=2)
    recipe = dataclasses.replace(
        recipe, mesh=mesh, data=dataclasses.replace(recipe.data, crop="random_place", flip=0.5)
    )
    whole = run_prior_recipe(recipe, progress=False)
    parts = dataclasses.replace(recipe, output=str(tmp_path / "parts"))
    run_prior_recipe(dataclasses.replace(parts, train=dataclasses.replace(parts.train, steps=2)), progress=False)
    rest = run_prior_recipe(parts, progress=False)
    assert whole.step == rest.step == 4
    for path, value in whole.state.trainable.items():
        np.testing.assert_array_equal(value, rest.state.trainable[path], err_msg=path)
    assert not whole.state.frozen["tokenizer/encoder/mid/block_1/conv1/kernel"].sharding.is_fully_replicated
    lines = curve(tmp_path / "run")
    elsewhere = dataclasses.replace(recipe, mesh=MeshConfig(data=4, tensor=2), output=str(tmp_path / "mesh"))
    run_prior_recipe(elsewhere, progress=False)
    for one, other in zip(lines, curve(tmp_path / "mesh"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)

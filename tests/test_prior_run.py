"""Training a prior with the training loop: a smoke run of each kind, resume, averaged export, codes and captions that do not fit."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.test_config import ROOT, get_config
from tests.tiny_visual_tokenizers import TINY, tensors
from vlm_jax import recipe as recipes
from vlm_jax.__main__ import main
from vlm_jax.config import ConfigError, to_dict
from vlm_jax.convert.prior import load_prior
from vlm_jax.convert.visual_tokenizer import save_tokenizer
from vlm_jax.data.code_options import CodeDataConfig
from vlm_jax.data.code_records import Coded, CodesError, write_shard
from vlm_jax.data.code_rows import Captions, CodeRows, Labels, Texts, make_codes, open_sets
from vlm_jax.data.draws import Draws
from vlm_jax.data.manifest import DataError
from vlm_jax.data.measuring import Limits
from vlm_jax.parallel import rules
from vlm_jax.parallel.mesh import make_mesh
from vlm_jax.parallel.mesh_config import MeshConfig
from vlm_jax.prior_recipe import PriorInit, PriorRecipe, shrink
from vlm_jax.train.prior_command import run_prior_recipe, task_of
from vlm_jax.train.prior_task import PriorTask, gradients, training_flops
from vlm_jax.visual_tokenizers import names
from vlm_jax.visual_tokenizers.priors.hierarchy_options import PUBLISHED_HQ, PUBLISHED_RQ
from vlm_jax.visual_tokenizers.priors.options import PUBLISHED, GPTConfig

SMOKE = shrink(PriorRecipe())
CAPTION = shrink(PriorRecipe(GPTConfig(condition="caption"), data=CodeDataConfig(captions="somewhere")))


def with_train(recipe, **changes):
    return dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, **changes))


def lines_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_learns_stops_and_goes_on(tmp_path):
    """Twelve updates at once, and six that go on to twelve, end in the same weights; the average follows them."""
    recipe = with_train(SMOKE, lr=1e-2, average=0.5, steps=12)
    mesh = MeshConfig(data=2, fsdp=2, tensor=2)
    whole = run_prior_recipe(dataclasses.replace(recipe, output=str(tmp_path / "a"), mesh=mesh), progress=False)
    parts = dataclasses.replace(recipe, output=str(tmp_path / "b"), mesh=mesh)
    run_prior_recipe(with_train(parts, steps=6), progress=False)
    rest = run_prior_recipe(parts, progress=False)
    assert whole.step == rest.step == 12
    for path, value in whole.state.trainable.items():
        np.testing.assert_array_equal(value, rest.state.trainable[path], err_msg=path)
    lines = lines_of(tmp_path / "a")
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.3 and lines[0]["loss"] == pytest.approx(np.log(64), abs=0.05)
    assert {"accuracy", "grad_norm", "images_per_second", "tflops_per_second_per_device"} <= lines[-1].keys()
    exported = load_prior(tmp_path / "b")
    assert exported.config == recipe.prior
    np.testing.assert_allclose(
        exported.params["embed/embedding"], rest.state.moving["average/embed/embedding"], rtol=1e-6
    )
    assert np.abs(exported.params["embed/embedding"] - rest.state.trainable["embed/embedding"]).max() > 1e-5


@pytest.mark.long
def test_the_command_trains_captions(tmp_path):
    arguments = [
        "train",
        "--config=configs/prior.py:gpt_l,t2i,smoke",
        f"--config.output={tmp_path}",
        "--config.train.steps=2",
    ]
    assert main(arguments) == 0
    found = load_prior(tmp_path)
    assert found.config.condition == "caption" and len(lines_of(tmp_path)) == 2
    again = dataclasses.replace(CAPTION, init=dataclasses.replace(CAPTION.init, checkpoint=str(tmp_path)))
    with rules.use(make_mesh(MeshConfig(fsdp=4, tensor=2))):
        state = task_of(again).create()
    assert set(state.frozen) == {"condition/unconditional"}
    for path, value in found.params.items():
        np.testing.assert_array_equal(state.params[path], value, err_msg=path)
    with pytest.raises(ConfigError, match="is of another prior"):
        task_of(dataclasses.replace(again, prior=dataclasses.replace(again.prior, classes=9, condition="class")))


@pytest.mark.parametrize(
    "words", ["rq_cc3m_654m,smoke", *(pytest.param(w, marks=pytest.mark.long) for w in ("hq_imagenet_level3,smoke",))]
)
def test_the_command_trains_hierarchies(tmp_path, words):
    """Of a text, whose loss is one of the lines; of three levels."""
    flags = ["--config.train.steps=2", "--config.train.global_batch=16", "--config.train.accum=2"]
    assert main(["train", f"--config=configs/prior.py:{words}", f"--config.output={tmp_path}", *flags]) == 0
    lines, config = lines_of(tmp_path), load_prior(tmp_path).config
    parts = [f"level_{i}" for i in range(3)] if words.startswith("hq") else [f"depth_{i}" for i in range(4)] + ["text"]
    assert len(lines) == 2 and set(parts) <= lines[0].keys()
    assert [n for n, _ in config.levels_of_codes] == ([64] * 3 if words.startswith("hq") else [64])


def test_what_a_hierarchy_needs(tmp_path):
    """The codebook that made the codes, of the right shape."""
    rq = shrink(PriorRecipe(PUBLISHED_RQ["ffhq_355m"], PriorInit(tokenizer="somewhere")))
    with pytest.raises(ConfigError, match="init.tokenizer is empty: this RQ-Transformer reads the codebook"):
        dataclasses.replace(rq, init=PriorInit())
    for kind, says in (
        ("rq", r"has a codebook \[24, 8\], but this prior needs prior.codes=64"),
        ("hq", "has no residual codebook"),
    ):
        save_tokenizer(tmp_path / kind, TINY[kind], *names.read(TINY[kind], tensors(TINY[kind])))
        with pytest.raises(ConfigError, match=says):
            task_of(dataclasses.replace(rq, init=PriorInit(tokenizer=str(tmp_path / kind))))
    with pytest.raises(ConfigError, match="prior.condition=text needs data.captions"):
        PriorRecipe(PUBLISHED_HQ["cc15m"])
    with pytest.raises(ConfigError, match="t2i, 384 and 512 are for LlamaGen's priors, not for hq"):
        get_config(ROOT / "configs" / "prior.py")("hq,t2i")


def test_texts_are_cut_and_padded(tmp_path):
    for name, tokens in zip(IDS, ([3, 1, 2, 4], [5], [9], [[1]])):
        file = (tmp_path / name).with_suffix(".npy")
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(file, np.array(tokens))
    known = Texts(IDS, CodeDataConfig(captions=str(tmp_path)), 3, 9)
    rows = [known.of(n, Draws(0, 0, n))["labels"].tolist() for n in range(2)]
    assert rows == [[3, 1, 2], [5, 0, 0]]
    with pytest.raises(DataError, match="tokens up to 9, but the prior's vocabulary is 0 to 8"):
        known.of(2, Draws(0, 0, 2))
    with pytest.raises(DataError, match="a text is integers"):
        known.of(3, Draws(0, 0, 3))


@pytest.mark.long
def test_micro_batches_give_the_gradient_of_the_batch():
    still = dataclasses.replace(SMOKE.prior, condition_dropout=0, token_dropout=0, residual_dropout=0, mlp_dropout=0)
    recipe, rng = dataclasses.replace(SMOKE, prior=still), np.random.RandomState(0)
    with rules.use(make_mesh(MeshConfig(), jax.devices()[:1])):
        state = PriorTask(recipe).create()
        state = dataclasses.replace(
            state,
            trainable=jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(1), x.shape), state.trainable),
        )
        codes, labels = rng.randint(0, 64, (1, 8, 16)), rng.randint(0, 8, (1, 8))
        batch = {"codes": jnp.asarray(codes), "labels": jnp.asarray(labels)}
        cut = {key: x.reshape(4, 2, *x.shape[2:]) for key, x in batch.items()}
        run = jax.jit(lambda state, batch: gradients(recipe, state, batch, jax.random.key(0)))
        (whole, said), (parts, again) = run(state, batch), run(state, cut)
    np.testing.assert_allclose(said["loss"], again["loss"], rtol=1e-5)
    for path, value in whole.items():
        np.testing.assert_allclose(parts[path], value, atol=1e-6, err_msg=path)


def test_flops_of_a_published_prior():
    """Six per parameter that multiplies, and slot, is the greater part."""
    config = PUBLISHED["gpt_b"]
    products = 12 * (4 * 768**2 + 3 * 768 * 2048) + 768 * 16384
    assert 1.0 < training_flops(config) / (6 * products * 256) < 1.06


def test_recipes_survive_json_and_overrides():
    for recipe in (SMOKE, CAPTION, PriorRecipe()):
        assert recipes.from_config(json.loads(json.dumps(to_dict(recipe)))) == recipe
        assert recipes.from_config(recipes.config_dict(recipe)) == recipe
    with pytest.raises(ConfigError, match="needs data.captions"):
        PriorRecipe(GPTConfig(condition="caption"))
    with pytest.raises(ConfigError, match="no meaning for prior.condition=class"):
        PriorRecipe(data=CodeDataConfig(captions="x"))


def codes_file(path, ids, grid=2, entries=9, job="a"):
    images = [
        Coded(name, (np.full((3, grid, grid), n, np.int32) + [[[0]], [[1]], [[2]]],), (8, 8))
        for n, name in enumerate(ids)
    ]
    about = {"levels": [{"entries": entries, "shape": [grid, grid]}], "dtype": "int32", "hash": "", "model": "x"}
    write_shard(path, images, job=job, broken=[], about=about)
    return str(path)


TWO = ((9, (2, 2)),)  # a table of 9 codes, 2 x 2 of them
IDS = ["cat/1.png", "ant/2.png", "cat/3.png", "bee/4.png"]


def test_rows_show_every_image_in_one_of_its_views(tmp_path):
    paths = [codes_file(tmp_path / f"{job}.arrayrecord", IDS, job=job) for job in "ab"]
    sets, ids = open_sets(paths, TWO)
    rows = CodeRows(sets, ids, Labels(ids, "", 3), epochs=40)
    assert len(rows) == 160
    for epoch in range(2):
        assert sorted(int(rows.records_of(4 * epoch + k)[0]) for k in range(4)) == [0, 1, 2, 3]
    found = [(int(rows.records_of(k)[0]), rows[k]) for k in range(160)]
    assert {(n, int(row["labels"])) for n, row in found} == {(0, 2), (1, 0), (2, 2), (3, 1)}
    assert {int(row["codes"][0, 0]) - n for n, row in found} == {0, 1, 2} and found[0][1]["codes"].shape == (2, 2)
    (tmp_path / "labels.json").write_text(json.dumps({"cat": 7, "ant": 1, "bee/4.png": 2}))
    np.testing.assert_array_equal(Labels(ids, str(tmp_path / "labels.json"), 8).numbers, [7, 1, 7, 2])


def test_captions_are_padded_on_the_left_and_sometimes_short(tmp_path):
    for folder, length in (("long", 4), ("short", 1)):
        for name in IDS[:2]:
            file = (tmp_path / folder / name).with_suffix(".npy")
            file.parent.mkdir(parents=True, exist_ok=True)
            np.save(file, np.arange(length * 2, dtype=np.float16).reshape(1, length, 2))
    data = CodeDataConfig(captions=str(tmp_path / "long"), short_captions=str(tmp_path / "short"), short_share=0.5)
    known = Captions(IDS, data, 5, 2)
    np.testing.assert_array_equal(known.usable, [0, 1])
    assert "cat/3.npy does not exist" in known.skipped[0]
    drawn = [known.of(0, Draws(0, epoch, 0)) for epoch in range(60)]
    lengths = [int(row["caption_mask"].sum()) for row in drawn]
    assert set(lengths) == {1, 4} and 15 < lengths.count(1) < 45
    long = drawn[lengths.index(4)]
    np.testing.assert_array_equal(long["caption_mask"], [0, 1, 1, 1, 1])
    np.testing.assert_array_equal(long["captions"][1:].reshape(-1), np.arange(8))
    np.testing.assert_array_equal(
        Captions(IDS, data, 3, 2).of(0, Draws(0, lengths.index(4), 0))["captions"].reshape(-1), np.arange(6)
    )
    with pytest.raises(DataError, match="features of a caption are"):
        Captions(IDS, data, 5, 3).of(0, Draws(0, 0, 0))
    with pytest.raises(DataError, match="2 of 4 records"):
        CodeRows([], IDS, known, limits=Limits(None, 0.4))


def test_codes_that_do_not_fit(tmp_path):
    a = codes_file(tmp_path / "a.arrayrecord", IDS)
    other = codes_file(tmp_path / "b.arrayrecord", ["dog/1.png", *IDS[1:]], job="b")
    bare = codes_file(tmp_path / "c.arrayrecord", ["1.png"], job="c")
    for how, says in (
        (((), TWO), "data.codes is empty"),
        (((a,), ((9, (3, 3)),)), "codes of 2 x 2, but this prior needs 3 x 3"),
        (((a,), ((10, (2, 2)),)), "a table of 9, but prior.codes is 10"),
        (((a, bare), TWO), "must be the same images"),
    ):
        with pytest.raises(ConfigError, match=says):
            open_sets(*how)
    sets, ids = open_sets((a, other), TWO)
    rows = CodeRows(sets, ids, Labels(ids, "", 9), epochs=9)
    with pytest.raises(CodesError, match="must be of the same images"):
        [rows[k] for k in range(len(rows))]
    with pytest.raises(ConfigError, match="class 2, but prior.classes=2"):
        Labels(ids, "", 2)
    with pytest.raises(DataError, match="1.png lies in no folder"):
        Labels(["1.png"], "", 2)
    (tmp_path / "labels.json").write_text(json.dumps({"cat": 7}))
    with pytest.raises(DataError, match="has neither the image ant/2.png nor its folder"):
        Labels(ids, str(tmp_path / "labels.json"), 9)
    (tmp_path / "labels.json").write_text(json.dumps({"cat": "7"}))
    with pytest.raises(DataError, match="must be a JSON object"):
        Labels(ids, str(tmp_path / "labels.json"), 9)


def test_made_up_codes_are_the_same_each_time(tmp_path):
    data = CodeDataConfig(generated=6)
    rows = []
    for folder in "ab":
        made = make_codes(tmp_path / folder, data, ((64, (4, 4)),), 8, None)
        sets, ids = open_sets(made.codes, ((64, (4, 4)),))
        rows.append(CodeRows(sets, ids, Labels(ids, "", 8)))
    assert rows[0].identity() == rows[1].identity()
    for k in range(6):
        np.testing.assert_array_equal(rows[0][k]["codes"], rows[1][k]["codes"])

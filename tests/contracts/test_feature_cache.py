"""Features of a frozen tower in place of images: the same losses, made once, for that tower and those images only."""

import dataclasses
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image

from tests.goldens import ROOT
from tests.small_runs import EXACT, MODEL, Weights
from tests.tiny_data import encode, make_records, write_images
from vlm_jax import recipe as recipes
from vlm_jax.config import ConfigError
from vlm_jax.data import feature_store
from vlm_jax.data.image_cache import Views
from vlm_jax.data.image_source import ImageError, ImageSource
from vlm_jax.data.images import Preprocess
from vlm_jax.data.manifest import DataError
from vlm_jax.data.pipeline import Batches, Packing, Rows
from vlm_jax.models import vlm
from vlm_jax.parallel.mesh import make_mesh
from vlm_jax.parallel.mesh_config import MeshConfig
from vlm_jax.train import flops
from vlm_jax.train.command import run_recipe
from vlm_jax.train.features import FeatureCache, check_frozen
from vlm_jax.train.loop import train
from vlm_jax.train.metrics import read_metrics
from vlm_jax.train.options import STAGE1

MODEL = dataclasses.replace(MODEL, llm=dataclasses.replace(MODEL.llm, vocab=256))
ANYRES = dataclasses.replace(
    MODEL, aspect="anyres", merge="spatial_unpad", image_newline=True, pinpoints=((28, 56), (56, 28), (56, 56))
)
FROZEN = dataclasses.replace(EXACT, trainable=STAGE1, steps=4, save_every=2, schedule="constant")


def cache_of(folder, model=MODEL, config=FROZEN, **options):
    return FeatureCache(folder, model, config, Views(Preprocess.of(model)), **options)


def run(folder, paths, cache=None, config=FROZEN, mesh=MeshConfig(2, 2, 2)):
    """Losses of a run; `cache`: a FeatureCache."""
    rows = Rows(make_records(paths, most_images=1), encode, MODEL, Packing(64, 6, epochs=20), load=cache)
    result = train(
        config,
        MODEL,
        lambda start, state: Batches(rows, config.global_batch, start, state=state),
        folder,
        mesh=make_mesh(mesh),
        source=Weights(MODEL),
        progress=False,
        prepare=cache and (lambda state: cache.fill(state, rows.images())),
    )
    assert result.status == "finished"
    return [line["loss"] for line in read_metrics(folder)]


def shards(folder):
    return sorted(folder.rglob("*.features"))


@pytest.mark.slow
def test_losses_are_the_same_in_float32_also_after_a_restart(tmp_path):
    paths = write_images(tmp_path)
    with_images = run(tmp_path / "a", paths)
    run(tmp_path / "b", paths, cache_of(tmp_path / "c"), config=dataclasses.replace(FROZEN, steps=2))
    before = {path: path.stat().st_mtime_ns for path in shards(tmp_path / "c")}
    with_features = run(tmp_path / "b", paths, cache_of(tmp_path / "c"))
    np.testing.assert_allclose(with_features, with_images, rtol=1e-5)
    assert before == {path: path.stat().st_mtime_ns for path in shards(tmp_path / "c")}, "nothing is computed again"


@pytest.mark.slow
def test_losses_agree_with_a_bfloat16_tower(tmp_path):
    paths, config = write_images(tmp_path), dataclasses.replace(FROZEN, vision_dtype="bfloat16")
    with_images = run(tmp_path / "a", paths, config=config, mesh=MeshConfig())
    with_features = run(tmp_path / "b", paths, cache_of(tmp_path / "c", config=config), config, MeshConfig())
    np.testing.assert_allclose(with_features, with_images, rtol=2e-3)


@pytest.mark.parametrize("model", [MODEL, ANYRES], ids=["pad", "anyres"])
def test_rows_hold_what_the_tower_makes_of_their_images(tmp_path, capsys, model):
    paths, weights, cache = write_images(tmp_path), Weights(model), cache_of(tmp_path / "c", model)
    fill(cache, paths, capsys, weights)
    how = Packing(row_length=120, view_budget=12)
    pixels, features = (
        list(Batches(Rows(make_records(paths), encode, model, how, load=load), 2)) for load in (None, cache)
    )
    tower = jax.jit(vlm.build(model, weights.arrays).tower.features, static_argnums=1)
    for (_, a), (_, b) in zip(pixels, features, strict=True):
        assert a.keys() - {"images"} == b.keys() - {"features"}
        assert all(np.array_equal(a[key], b[key]) for key in a if key != "images")
        want = np.asarray(tower(a["images"].reshape(-1, 28, 28, 3), np.float32)).reshape(b["features"].shape)
        used = a["images"].any((-1, -2, -3))
        np.testing.assert_allclose(b["features"][used], want[used], atol=1e-5)
        assert not b["features"][~used].any() and (want[used].std() > 0.1)


def fill(cache, paths, capsys, weights=None):
    """Fill a cache outside a run; returns what it says."""
    params = {path: value for path, value in (weights or Weights(MODEL)).arrays.items()}
    capsys.readouterr()
    cache.fill(dataclasses.make_dataclass("State", ["params"])(params), (ImageSource(path) for path in paths))
    return capsys.readouterr().err


def test_only_new_and_changed_images_are_computed(tmp_path, capsys):
    paths = write_images(tmp_path)
    said = fill(cache_of(tmp_path / "c"), paths[:4] + paths[:4], capsys)
    assert "features of 4 images take 0.0 MB" in said and "4 images (0.0 MB) are not there yet" in said
    assert "; 0 images" in fill(cache_of(tmp_path / "c"), paths[:4], capsys)
    Image.new("RGB", (40, 40), "red").save(paths[0])
    cache = cache_of(tmp_path / "c")
    said = fill(cache, paths, capsys)
    assert "features of 6 images" in said and "; 3 images" in said and "holds features of 7 images" in said
    fresh = cache_of(tmp_path / "d")
    fill(fresh, paths, capsys)
    for path in paths:
        got, want = cache(ImageSource(path)), fresh(ImageSource(path))
        assert got[1] == want[1] == Image.open(path).size
        np.testing.assert_allclose(got[0], want[0], atol=1e-6)


def test_another_tower_preprocessing_or_dtype_has_features_of_its_own(tmp_path, capsys):
    path = write_images(tmp_path, 1)
    other = Weights(MODEL)
    other.arrays["tower/patch/kernel"] = other.arrays["tower/patch/kernel"] * 1.01
    half = dataclasses.replace(FROZEN, vision_dtype="bfloat16")
    square = dataclasses.replace(MODEL, aspect="square")
    found = []
    for model, config, weights in (
        (MODEL, FROZEN, None),
        (MODEL, FROZEN, other),
        (MODEL, half, None),
        (square, FROZEN, None),
    ):
        cache = cache_of(tmp_path / "c", model, config)
        assert "; 1 images" in fill(cache, path, capsys, weights)
        found.append(cache(ImageSource(path[0]))[0].astype(np.float32))
    assert len({cache.parent for cache in shards(tmp_path / "c")}) == 4
    assert len({x.tobytes() for x in found}) == 4
    unused = Weights(MODEL)
    unused.arrays = {k: v + 1 if k.startswith("tower/unused/") else v for k, v in unused.arrays.items()}
    assert "; 0 images" in fill(cache_of(tmp_path / "c"), path, capsys, unused), (
        "what is never computed does not matter"
    )


@pytest.mark.parametrize("hurt", ["cut", "no index", "damaged index", "gone"])
def test_a_damaged_shard_is_computed_again(tmp_path, capsys, hurt):
    paths = write_images(tmp_path)
    fill(cache_of(tmp_path / "c"), paths, capsys)
    shard = shards(tmp_path / "c")[0]
    if hurt == "cut":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif hurt == "gone":
        shard.unlink()
    elif hurt == "no index":
        shard.with_suffix(".npz").unlink()
    else:
        shard.with_suffix(".npz").write_bytes(b"PK nonsense")
    assert "; 6 images" in fill(cache_of(tmp_path / "c"), paths, capsys)
    assert "; 0 images" in fill(cache_of(tmp_path / "c"), paths, capsys)


def test_what_killed_runs_left_is_deleted_after_an_hour(tmp_path, capsys, monkeypatch):
    paths, cache = write_images(tmp_path), cache_of(tmp_path / "c")
    fill(cache, paths[:3], capsys)
    (cache.folder / "dead.features").write_bytes(b"x")
    fill(cache_of(tmp_path / "c"), paths[:4], capsys)
    assert (cache.folder / "dead.features").exists(), "it may be alive"
    later = time.time() + 2 * feature_store.DEAD
    monkeypatch.setattr(feature_store.time, "time", lambda: later)
    fill(cache_of(tmp_path / "c"), paths[:5], capsys)
    assert not (cache.folder / "dead.features").exists() and len(shards(tmp_path / "c")) == 3


def test_shards_stay_small(tmp_path, capsys, monkeypatch):
    paths = write_images(tmp_path)
    monkeypatch.setattr(feature_store, "SHARD_BYTES", 2 * 4 * 16 * 4)
    cache = cache_of(tmp_path / "c", threads=1)
    assert "holds features of 6 images" in fill(cache, paths, capsys)
    assert len(shards(tmp_path / "c")) == 3
    whole = cache_of(tmp_path / "d")
    monkeypatch.undo()
    fill(whole, paths, capsys)
    for path in paths:
        np.testing.assert_array_equal(cache(ImageSource(path))[0], whole(ImageSource(path))[0])


def test_a_broken_image_is_counted_as_without_a_cache(tmp_path, capsys):
    paths = write_images(tmp_path)
    data = open(paths[2], "rb").read()
    open(paths[2], "wb").write(data[: len(data) // 2])
    plain = Rows(make_records(paths), encode, MODEL, Packing(64, 6))
    batches = list(Batches(plain, 2))
    cache = cache_of(tmp_path / "c")
    said = fill(cache, [*paths, str(tmp_path / "gone.png")], capsys)
    assert "1 images are broken" in said and "holds features of 5 images" in said
    rows = Rows(make_records(paths), encode, MODEL, Packing(64, 6), load=cache)
    for (_, a), (_, b) in zip(batches, Batches(rows, 2), strict=True):
        assert b["features"].shape == (2, 6, 4, 16) and "images" not in b
        assert all(np.array_equal(a[key], b[key]) for key in a if key != "images")
        assert (b["features"].any((-1, -2)) == a["images"].any((-1, -2, -3))).all()
    assert rows.broken == plain.broken and rows.broken
    with pytest.raises(ImageError, match="gone.png does not exist"):
        cache(ImageSource(str(tmp_path / "gone.png")))


def test_an_image_that_changes_under_a_run_is_noticed(tmp_path, capsys):
    paths, cache = write_images(tmp_path), cache_of(tmp_path / "c")
    fill(cache, paths, capsys)
    Image.new("RGB", (40, 40), "red").save(paths[0])
    with pytest.raises(DataError, match="0.png of record 7 has changed since its features were computed: restart"):
        cache(ImageSource(paths[0], "record 7"))


def test_a_trained_tower_is_refused(tmp_path):
    config = dataclasses.replace(FROZEN, trainable=("^projector/", "^tower/blocks/mlp"))
    with pytest.raises(ConfigError, match="train.trainable trains tower/blocks/mlp/.*leave data.feature_cache empty"):
        cache_of(tmp_path, config=config)
    check_frozen(MODEL, EXACT)


def test_a_disk_without_room_is_refused_before_anything_is_computed(tmp_path, capsys, monkeypatch):
    paths = write_images(tmp_path)
    usage = shutil.disk_usage(tmp_path)._replace(free=5 * 4 * 16 * 4)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ConfigError, match="features of 6 images take 0.0 MB, but .* has only 0.0 MB left.*pixel_cache"):
        fill(cache_of(tmp_path / "c"), paths, capsys)
    assert not shards(tmp_path / "c")
    fill(cache_of(tmp_path / "c"), paths[:5], capsys)


def test_a_disk_that_fills_up_is_one_sentence(tmp_path, capsys, monkeypatch):
    paths = write_images(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(feature_store.Writer, "add", full)
    with pytest.raises(ConfigError, match="cannot be written to: No space left on device"):
        fill(cache_of(tmp_path / "c"), paths, capsys)


def test_flops_count_no_tower_that_is_not_computed():
    trained = [path for path in vlm.shapes(MODEL) if path.startswith("projector/")]
    with_images, with_features = (flops.training_cost(MODEL, trained, cached) for cached in (False, True))
    assert with_features[:2] == with_images[:2]
    v, D = MODEL.vision, MODEL.llm.width
    assert with_features.view == v.features * (4 * (v.width * D + D * D) + 2 * (v.width * D + D * D))
    assert with_images.view > 2 * with_features.view


@pytest.mark.slow
def test_the_command_trains_with_both_caches_and_says_what_they_take(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("llava15", ROOT.parent / "configs" / "llava15.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config("7b,stage1,smoke")
    config.output, config.export = str(tmp_path / "run"), False
    config.data.pixel_cache, config.data.feature_cache = str(tmp_path / "pixels"), str(tmp_path / "features")
    said = []
    for steps in (2, 4):
        config.train.steps = steps
        assert run_recipe(recipes.from_config(config), progress=False).step == steps
        said.append(capsys.readouterr().err)
    count = len(list((tmp_path / "pixels").rglob("*.views")))
    assert f"{count} resized images take" in said[0] and f"0 resized images were read and {count} added" in said[0]
    assert f"features of {count} images take" in said[0] and f"; {count} images (" in said[0]
    assert f"features of {count} images take" in said[1] and "; 0 images (" in said[1]
    assert "0 resized images were read and 0 added" in said[1]


TWO = """
import os, sys
import jax
from tests.contracts.test_feature_cache import FROZEN, MODEL, Weights, cache_of
from vlm_jax.config import ConfigError
from vlm_jax.data.image_source import ImageSource
from vlm_jax.parallel import hosts, rules
from vlm_jax.parallel.mesh import make_mesh
from vlm_jax.train import state as states

hosts.initialise()
folder, *paths = sys.argv[1:]
with rules.use(make_mesh()):
    state = states.create(MODEL, FROZEN, Weights(MODEL))
    cache = cache_of(f"{folder}/shared")
    cache.fill(state, map(ImageSource, paths))
    print("found", len(cache._features), sum(float(abs(cache(ImageSource(p))[0]).sum()) for p in paths), flush=True)
    try:
        cache_of(f"{folder}/own-{jax.process_index()}").fill(state, map(ImageSource, paths))
    except ConfigError as error:
        print(error, flush=True)
os._exit(0)
"""


@pytest.mark.slow
def test_processes_share_the_work_in_a_folder_that_all_of_them_see(tmp_path):
    paths = write_images(tmp_path)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    env = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT.parent), "VLM_JAX_COORDINATOR": address}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", TWO, str(tmp_path), *paths],
            env=env | {"VLM_JAX_PROCESSES": "2", "VLM_JAX_PROCESS": str(index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    try:
        said = [p.communicate(timeout=300)[0] for p in running]
    finally:
        for p in running:
            p.kill()
    found = [next((line for line in text.splitlines() if line.startswith("found")), text) for text in said]
    assert found[0] == found[1] and found[0].startswith("found 6 "), said
    assert len(shards(tmp_path / "shared")) == 2, "each process computed a share"
    assert all("must be a folder that all hosts see" in text for text in said), said

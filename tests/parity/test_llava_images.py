"""Image preprocessing against LLaVA and HF processors: pixels (bit-equal) and anyres geometry."""

import json

import numpy as np
import pytest

from tests.goldens import SHARED, cases
from vlm_jax.config import SIGLIP_MEAN, SIGLIP_STD, VisionConfig, VLMConfig
from vlm_jax.convert.processor_files import preprocessor_config, with_processor
from vlm_jax.data.image_source import ImageSource
from vlm_jax.data.images import Preprocess, content_box, load_views
from vlm_jax.models.slots import select_best_resolution, unpad_box

PIXELS = cases("llava", "images/pixel_values*.npz") or sorted(
    (SHARED / "goldens/llava/images").glob("pixel_values*.npz")
)
GEOMETRY = cases("llava", "anyres_geometry*.json")


def normalise(views, mean, std):
    """uint8 [..., 3] -> float32 [..., 3] in HF's order: x * (1/255) in float64, cast, (x - mean) / std."""
    return ((views * (1 / 255)).astype(np.float32) - np.float32(mean)) / np.float32(std)


def parts(x):
    """What the files keep of pixel values x [3, S, S], or [V, 3, S, S] under anyres, by suffix of the key."""
    if x.ndim == 4:
        return {"": x, "sub": x[:, :, ::5, ::5]}
    exact = x.astype(np.float64)
    stats = [exact.mean(), exact.std(), exact.min(), exact.max(), np.abs(exact).sum() / 1e5]
    return {
        "": x,
        "sub": x[:, ::24, ::24],
        "row100": x[:, min(100, len(x[0]) - 1)],
        "col0": x[:, :, 0],
        "stats": np.array(stats),
    }


def index_of(path):
    names = (f"{path.stem}_index.json", path.stem.replace("pixel_values", "pixel_values_index") + ".json")
    return next(json.loads((path.parent / name).read_text()) for name in names if (path.parent / name).is_file())


@pytest.mark.skipif(
    not PIXELS,
    reason="the pictures belong to another project: set VLM_JAX_SHARED to the folder that has them",
)
@pytest.mark.parametrize("path", PIXELS, ids=lambda p: p.stem)
def test_pixel_values(path):
    kept, index = np.load(path), index_of(path)
    pinpoints = tuple(tuple(p) for p in index["grid_pinpoints"])
    compared = set()
    for case in index["cases"]:
        how = Preprocess(case["size"], case["mode"], "crop", tuple(index["mean"]), tuple(index["std"]), pinpoints)
        assert list(how.pad_colour) == index["pad_color"]
        views, _ = load_views(ImageSource(str(path.parent / case["image"])), how)
        x = normalise(views, how.mean, how.std).transpose(0, 3, 1, 2)
        x = x if case["mode"] == "anyres" else x[0]
        assert list(x.shape) == case["shape"]
        for suffix, ours in parts(x).items():
            name = "|".join(filter(None, (case["key"], suffix)))
            if name not in kept.files:
                continue
            compared.add(name)
            if suffix == "stats":
                np.testing.assert_allclose(ours, kept[name], rtol=2e-6, atol=1e-6, err_msg=name)
            else:
                np.testing.assert_array_equal(ours, kept[name], err_msg=name)
    assert compared == set(kept.files)


@pytest.mark.parametrize("path", GEOMETRY, ids=lambda p: p.stem)
def test_anyres_geometry(path):
    table = json.loads(path.read_text())
    for case in table["cases"]:
        best = select_best_resolution(*case["image_size"], table["possible_resolutions"])
        assert list(best) == case["best"]
        assert list(content_box(*case["image_size"], best)) == case["content_box"]
        columns, rows = best[0] // 14, best[1] // 14
        top, bottom, left, right = unpad_box(*case["image_size"], columns, rows)
        ramp = np.arange(rows * columns).reshape(rows, columns)[top:bottom, left:right]
        assert list(ramp.shape) == case["unpad_shape"]
        assert (ramp.flat[0] if ramp.size else None) == case["unpad_first"]


@pytest.mark.parity
def test_processors_of_transformers_give_the_same_pixels(tmp_path):
    """What an export writes, loaded by transformers, is bit-equal to what we compute ourselves."""
    from PIL import Image

    transformers = pytest.importorskip("transformers")
    rng = np.random.default_rng(0)
    clip = VisionConfig(image_size=56, width=8, heads=2)
    siglip = VisionConfig("siglip", 56, width=8, heads=2, select="full", mean=SIGLIP_MEAN, std=SIGLIP_STD)
    configs = [VLMConfig(clip, aspect="square"), VLMConfig(clip, aspect="pad")]
    configs += [VLMConfig(siglip, aspect="square"), VLMConfig(siglip, aspect="pad")]
    for number, config in enumerate(configs):
        folder, how = tmp_path / str(number), Preprocess.of(config)
        folder.mkdir()
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor_config(config)))
        processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
        processor.save_pretrained(folder / "again")
        for place in (folder, folder / "again"):
            written = json.loads((place / "preprocessor_config.json").read_text())
            assert with_processor(config.vision, written, "x") == config.vision
        for width, height in rng.integers(3, 200, (6, 2)):
            image = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
            theirs = processor(image, return_tensors="np")["pixel_values"]
            ours = normalise(how(image), how.mean, how.std).transpose(0, 3, 1, 2)
            np.testing.assert_array_equal(ours, theirs, err_msg=f"{how} {width}x{height}")

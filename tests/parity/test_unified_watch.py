"""The smart-watch generator against pictures and records of the original one (goldens/unified, see its README)."""

import hashlib
import json
import random

import numpy as np
import pytest
from PIL import Image, features

from tests.goldens import golden
from vlm_jax.data.smartwatch import hand_ends, render, sample_watch
from vlm_jax.data.smartwatch_text import published_records

needs_font = pytest.mark.skipif(
    not features.check("freetype2"), reason="this Pillow has no FreeType, and the battery text is in a TrueType font"
)


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def drawn(seed, count):
    """[(watch, records)] from random.Random(seed), which is what the notebook does after random.seed(seed)."""
    rng, out = random.Random(seed), []
    for i in range(count):
        watch = sample_watch(rng)
        out.append((watch, published_records(rng, watch, f"{i}.png")))
    return out


def assert_params(watch, params):
    for name, value in params.items():
        found = getattr(watch, name)
        assert (list(found) if isinstance(found, tuple) else found) == value, name


@golden("unified", "watch_seed*.json")
def test_attributes_records_and_hands(path):
    case = read(path)
    for (watch, records), sample in zip(drawn(case["seed"], len(case["samples"])), case["samples"], strict=True):
        assert_params(watch, sample["params"])
        assert records == sample["records"]
        for end, (line, _) in zip(hand_ends(watch), sample["hand_segments_xyxy_width"], strict=True):
            np.testing.assert_allclose(end, line[2:], rtol=0, atol=1e-9)


@golden("unified", "watch_seed*.json")
@needs_font
def test_pictures_outside_the_icon(path):
    case = read(path)
    for (watch, _), sample in zip(drawn(case["seed"], len(case["samples"])), case["samples"], strict=True):
        x0, y0, x1, y1 = sample["icon_bbox_xyxy"]
        ours, theirs = np.array(render(watch)), np.array(Image.open(path.parent / sample["image"]).convert("RGB"))
        for pixels in (ours, theirs):
            pixels[y0:y1, x0:x1] = 0
        np.testing.assert_array_equal(ours, theirs)
        assert hashlib.sha256(ours.tobytes()).hexdigest() == sample["sha256_rgb_icon_blanked"]


@golden("unified", "watch_text_seed*.json")
def test_attributes_and_records(path):
    case = read(path)
    made = drawn(case["seed"], len(case["params"]))
    for (watch, _), params in zip(made, case["params"], strict=True):
        assert_params(watch, params)
    assert [record for _, records in made for record in records] == case["records"]

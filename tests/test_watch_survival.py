"""Reading smart-watches back from pictures: right on originals, lost where it is lost, and nothing from a blur."""

import dataclasses
import io
import json
import random

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from vlm_jax.config import UserError
from vlm_jax.data.crops import Crop
from vlm_jax.data.smartwatch import CORNERS, render, sample_watch
from vlm_jax.data.smartwatch_files import WatchSet, draw_all, generate
from vlm_jax.evaluate.watch_survival import FACTS, Reader, Reading, survival, true_watches

READER = Reader(Crop(112, "squash"))


def watches(count, seed=1):
    rng = random.Random(seed)
    return [sample_watch(rng) for _ in range(count)]


def read(reader, found, change=lambda image: image):
    """Shares of facts that are right in changed pictures."""
    return survival((reader(np.asarray(change(Image.fromarray(reader.crop(render(w)))))) for w in found), found)


@pytest.mark.parametrize("size, rule, count", [(112, "squash", 110), (224, "centre", 40), (64, "centre_box", 40)])
def test_originals_are_read(size, rule, count):
    found = read(READER if size == 112 else Reader(Crop(size, rule)), watches(count))
    assert found["count"] == count and min(found.values()) >= 0.99


@pytest.mark.parametrize("size, radius", [(112, 5), (112, 8), (224, 10)])
def test_nothing_is_read_from_a_blur(size, radius):
    found = read(
        READER if size == 112 else Reader(Crop(size, "squash")),
        watches(30),
        lambda image: image.filter(ImageFilter.GaussianBlur(radius)),
    )
    assert max(found[fact] for fact in FACTS) <= 0.05


def test_what_is_weaker_or_coarser_but_visible_is_read():
    def jpeg(image):
        file = io.BytesIO()
        image.save(file, "JPEG", quality=60)
        return Image.open(file).convert("RGB")

    pale = lambda image: Image.blend(image, Image.new("RGB", image.size, (255, 255, 255)), 0.4)
    for change in (jpeg, pale):
        found = read(READER, watches(30), change)
        assert min(found[fact] for fact in FACTS) >= 0.85, found


def test_each_fact_is_lost_alone():
    watch = dataclasses.replace(watches(1)[0], hour=3, minute=10, second=40, material_color=(10, 60, 120))
    assert all(READER(READER.crop(render(watch))).right(watch).values())
    others = {"hour": 4, "minute": 12, "second": 41, "weather": "sunny" if watch.weather != "sunny" else "cloudy"}
    for fact, value in (others | {"battery": (watch.battery + 1) % 101}).items():
        right = READER(READER.crop(render(dataclasses.replace(watch, **{fact: value})))).right(watch)
        # the hour hand moves with the minutes: a drawing of another minute still shows the same hour
        assert [name for name in FACTS if not right[name]] == [fact]
    free = next(corner for corner in CORNERS if corner not in (watch.weather_pos, watch.battery_pos))
    for fact in ("weather", "battery"):
        moved = READER(READER.crop(render(dataclasses.replace(watch, **{f"{fact}_pos": free})))).right(watch)
        assert [name for name in FACTS if not moved[name]] == [fact]


def test_what_is_covered_is_not_legible():
    watch = dataclasses.replace(watches(1)[0], material_color=(90, 20, 20))
    picture = render(watch)
    draw = ImageDraw.Draw(picture)
    draw.ellipse([23, 23, 201, 201], fill=(90, 20, 20))
    for x, y in CORNERS.values():
        draw.rectangle([x, y - 2, x + 60, y + 30], fill=(200, 200, 200))
    assert READER(READER.crop(picture)) == Reading(None, None, None, None, None)
    assert READER(np.zeros((112, 112, 3), np.uint8)) == Reading(None, None, None, None, None)
    white = READER(READER.crop(render(dataclasses.replace(watch, material_color=(254, 255, 255)))))
    assert (white.hour, white.minute, white.second) == (None, None, None) and white.weather and white.battery


def test_hands_that_lie_on_each_other_are_read():
    for hour, minute, second in ((0, 0, 0), (6, 30, 30), (12, 0, 30), (3, 15, 15), (1, 5, 6)):
        watch = dataclasses.replace(watches(1)[0], hour=hour, minute=minute, second=second)
        assert all(READER(READER.crop(render(watch))).right(watch).values()), watch.time


def test_truth_comes_from_the_folder(tmp_path):
    generate(tmp_path / "set", WatchSet(count=3, seed=4), processes=1, progress=False)
    assert true_watches(tmp_path / "set") == draw_all(WatchSet(count=3, seed=4))[0]
    files = (tmp_path / "set" / "images" / f"{i}.png" for i in range(3))
    readings = [READER(READER.crop(Image.open(file).convert("RGB"))) for file in files]
    assert survival(readings, true_watches(tmp_path / "set"))["all"] == 1


def test_folders_and_pictures_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(UserError, match="settings.json does not say how smart-watches were drawn"):
        true_watches(tmp_path)
    for settings in ({"count": 2, "material": "mesh"}, {"count": 2, "hands": [[255, 0, 0]]}):
        (tmp_path / "settings.json").write_text(json.dumps(settings))
        with pytest.raises(UserError, match="only white hands on faces of one colour"):
            true_watches(tmp_path)
    with pytest.raises(UserError, match=r"shape \(64, 64, 3\) cannot be read as 112 x 112"):
        READER(np.zeros((64, 64, 3), np.uint8))
    with pytest.raises(UserError, match="rule random_place cannot be read"):
        Reader(Crop(112, "random_place"))
    with pytest.raises(UserError, match="no watches"):
        survival([], [])

"""Images for visual tokenizers: crops by rule, lists from anything, rows that any host and any restart gives alike."""

import json
import os
import tarfile

import numpy as np
import pytest
from PIL import Image

from vlm_jax.config import ConfigError
from vlm_jax.data.array_records import write
from vlm_jax.data.crops import Crop, load_crop
from vlm_jax.data.draws import Draws
from vlm_jax.data.image_lists import open_images
from vlm_jax.data.image_options import CROPS, ImageDataConfig
from vlm_jax.data.image_rows import ImageRows
from vlm_jax.data.image_source import ImageError, ImageSource
from vlm_jax.data.manifest import DataError
from vlm_jax.data.measuring import Limits
from vlm_jax.data.pipeline import Batches, total_steps
from vlm_jax.data.records import Records


def picture(number, size=(40, 30)):
    """Every pixel is told by its place: red grows to the right, green downwards, blue is the number."""
    w, h = size
    pixels = np.zeros((h, w, 3), np.uint8)
    pixels[..., 0], pixels[..., 1], pixels[..., 2] = np.arange(w) * 4, np.arange(h)[:, None] * 4, number
    return Image.fromarray(pixels)


@pytest.fixture
def folder(tmp_path):
    """Seven images, two of them in a folder of their own, and files that are none."""
    (tmp_path / "images" / "more").mkdir(parents=True)
    for k in range(7):
        picture(k).save(tmp_path / "images" / ("more" if k > 4 else "") / f"{k}.png")
    (tmp_path / "images" / "notes.txt").write_text("no image")
    (tmp_path / "images" / ".hidden.png").write_bytes(b"")
    return tmp_path / "images"


def numbers(images):
    return [int(load_crop(image, Crop(4))[0, 0, 2]) for image in images]


def rows_of(folder, **how):
    return ImageRows(open_images(ImageDataConfig(path=(str(folder),))), Crop(8, "random_place", 0.5), **how)


class Recorded:
    """Draws that are played back."""

    def __init__(self, uniform=0.0, **integers):
        self._uniform, self._integers = uniform, integers

    def uniform(self, k):
        return self._uniform

    def integer(self, k, low, high):
        return {"low": low, "high": high}[self._integers.get(f"k{k}", "low")]


def test_places_of_the_crops():
    wide = picture(9)
    centre = Crop(30, "centre")(wide)
    np.testing.assert_array_equal(centre, np.asarray(wide)[:, 5:35])
    np.testing.assert_array_equal(Crop(30, "centre_box")(wide), np.asarray(wide)[:, 5:35])
    left, right = (Crop(30, "random_place")(wide, Recorded(1.0, k3=end)) for end in ("low", "high"))
    np.testing.assert_array_equal(left, np.asarray(wide)[:, :30])
    np.testing.assert_array_equal(right, np.asarray(wide)[:, 10:])
    mirrored = Crop(30, "centre", 1.0)(wide, Draws(0, 0, 0))
    np.testing.assert_array_equal(mirrored, centre[:, ::-1])
    squashed = Crop(20, "squash")(wide)
    assert squashed.shape == (20, 20, 3) and squashed[0, 0, 0] < 8 and squashed[0, -1, 0] > 140
    whole = np.asarray(wide.crop((0, 0, 30, 30)).resize((10, 10), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(Crop(10, "random_area")(wide.crop((0, 0, 30, 30)), Recorded(1.0)), whole)
    tall = Crop(10, "random_area")(picture(1, (12, 60)), Recorded(1.0))  # no square of that area fits: the centre
    np.testing.assert_array_equal(tall[..., 2], 1)
    assert tall[0, 0, 1] >= 24 * 4 - 8 and tall[-1, 0, 1] <= 36 * 4 + 8


def test_large_images_are_halved_by_a_box_filter_first():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 80, 3)).astype(np.uint8))
    halved = noise.resize((40, 48), Image.Resampling.BOX).resize((20, 24), Image.Resampling.BOX)
    want = np.asarray(halved.resize((16, 19), Image.Resampling.BICUBIC))[1:17]
    np.testing.assert_array_equal(Crop(16, "centre_box")(noise), want)
    largest = Crop(16, "random_scale")(noise, Recorded(1.0, k1="high"))  # short side 1.25 x 16
    want = np.asarray(halved)[:16, :16]
    np.testing.assert_array_equal(largest, want)


@pytest.mark.parametrize("rule", CROPS)
def test_every_rule_takes_any_image(rule, tmp_path):
    for size in ((1, 1), (300, 20), (20, 300), (64, 64)):
        made = Crop(16, rule, 0.5)(picture(0, size), Draws(1, 2, 3))
        assert made.shape == (16, 16, 3) and made.dtype == np.uint8
    if rule in ("centre", "random_scale"):
        Image.new("RGB", (70000, 2)).save(tmp_path / "thin.png")
        with pytest.raises(ImageError, match="thin.png cannot be resized: .* too thin"):
            load_crop(ImageSource(str(tmp_path / "thin.png")), Crop(16, rule), Draws(0, 0, 0))
    with pytest.raises(ConfigError, match="crop='middle'"):
        Crop(16, "middle")


def test_images_from_anything(folder, tmp_path):
    found = open_images(ImageDataConfig(path=(str(folder),)))
    assert numbers(found) == list(range(7))
    assert numbers(open_images(ImageDataConfig(path=(f"{folder}/[12].png", f"{folder}/0.png")))) == [1, 2, 0]
    (tmp_path / "list.txt").write_text("images/3.png\n\nimages/more/5.png\n")
    listed = open_images(ImageDataConfig(path=(str(tmp_path / "list.txt"),)))
    assert numbers(listed) == [3, 5] and "line 3 of" in listed[1].label
    records = [
        {
            "id": str(k),
            "image": f"{k}.png",
            "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a"}],
        }
        for k in (4, 2, 4)
    ]
    (tmp_path / "records.json").write_text(json.dumps([*records[:1], {"id": "?"}, *records[1:]]))
    config = ImageDataConfig(path=(str(tmp_path / "records.json"),), image_folder=str(folder))
    of_records = open_images(config, tmp_path / "cache")
    assert numbers(of_records) == [4, 2] and len(of_records.skipped) == 1
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for name in ("2.png", "1.png"):
            tar.add(folder / name, name)
    assert numbers(open_images(ImageDataConfig(path=(str(tmp_path / "shard.tar"),)))) == [2, 1]
    (tmp_path / "plain.json").write_text(json.dumps(records))
    write(Records(tmp_path / "plain.json", folder), tmp_path / "shards", shards=1)
    assert numbers(open_images(ImageDataConfig(path=(str(tmp_path / "shards"),)))) == [4, 2]
    os.rename(folder, tmp_path / "elsewhere")
    moved = open_images(ImageDataConfig(path=(str(tmp_path / "elsewhere"),)))
    assert moved.fingerprint == found.fingerprint != listed.fingerprint


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ((), "set data.path"),
        (("nowhere",), "nowhere does not exist"),
        (("x.gif2",), "is of an unknown kind"),
        ((".",), "no images in"),
    ],
)
def test_no_images(path, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.gif2").write_text("?")
    with pytest.raises(DataError, match=says):
        open_images(ImageDataConfig(path=path))


def test_batches_are_the_same_after_a_restart_and_on_several_hosts(folder):
    rows = rows_of(folder, epochs=3, seed=5)
    assert total_steps(rows, 4) == 6  # 21 images and three of a fourth pass
    whole = [batch["images"] for _, batch in Batches(rows, 4)]
    assert len(whole) == 6 and whole[0].shape == (4, 8, 8, 3)
    first, second = ([int(i) for k in range(7) for i in rows.records_of(7 * e + k)] for e in (0, 1))
    assert sorted(first) == sorted(second) == list(range(7)) and first != second
    begun = Batches(rows, 4)
    for _ in range(2):
        next(begun)
    state = json.loads(json.dumps(begun.state()))
    assert begun.samples_of(1) == first[4:] + second[:1]
    again = [batch["images"] for _, batch in Batches(rows_of(folder, epochs=3, seed=5), 4, state=state)]
    np.testing.assert_array_equal(again, whole[2:])
    halves = [[batch["images"] for _, batch in Batches(rows, 4, 0, host, 2)] for host in (0, 1)]
    np.testing.assert_array_equal(np.concatenate(halves, axis=1), whole)
    assert not np.array_equal(whole[0], next(Batches(rows_of(folder, seed=6), 4))[1]["images"])


def test_changed_images_are_refused_by_name(folder):
    state = Batches(rows_of(folder), 4).state()
    (folder / "0.png").unlink()
    with pytest.raises(DataError, match="the number of images was 7 and is 6 now"):
        Batches(rows_of(folder), 4, state=state)


def test_broken_images_are_replaced_counted_and_limited(folder):
    (folder / "3.png").write_bytes(b"<html>not here</html>")
    rows = rows_of(folder, epochs=2, limits=Limits(None, 0.2))
    shown = [set(batch["images"][..., 2].flatten().tolist()) for _, batch in Batches(rows, 7)]
    assert shown == [{0, 1, 2, 4, 5, 6}] * 2, "the image after the broken one is shown twice"
    assert rows.counts() == {"unusable_images": 1} and "3.png is a web page" in rows.broken[3]
    strict = rows_of(folder, epochs=1, limits=Limits(None, 0.1))
    with pytest.raises(DataError, match="1 of 7 records .*data.max_bad_share=0.1.*3.png is a web page"):
        list(Batches(strict, 7))
    with pytest.raises(DataError, match="train.max_bad_samples=0"):
        list(Batches(rows_of(folder, limits=Limits(0)), 7))

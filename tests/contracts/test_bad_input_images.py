"""Contract 10, images: every broken file gives one sentence; a run skips and counts them up to a limit."""

import numpy as np
import pytest
from PIL import Image

from tests.tiny_data import ANYRES, TINY, encode, make_records, write_images
from vlm_jax.config import VisionConfig
from vlm_jax.convert.processor_files import with_processor
from vlm_jax.convert.tensors import CheckpointError
from vlm_jax.data.images import ImageError, ImageSource, Preprocess, image_size, load_views
from vlm_jax.data.manifest import BAD, DataError
from vlm_jax.data.pipeline import Batches, Packing, Rows

HOW = Preprocess(28, "pad")
SMALL = Packing(row_length=64, view_budget=4, max_bad=10)


def jpeg(path, width=80, height=60):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path, quality=90)
    return path


def truncate(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize("kind", ["missing", "folder", "truncated", "text", "empty", "truncated_png"])
def test_one_sentence_names_file_and_record(tmp_path, kind):
    path = tmp_path / ("x.png" if kind == "truncated_png" else "x.jpg")
    if kind == "folder":
        path.mkdir()
    elif kind.startswith("truncated"):
        truncate(jpeg(path))
    elif kind != "missing":
        path.write_bytes(b"not a picture" if kind == "text" else b"")
    source = ImageSource(str(path), record="a.json: record 7")
    with pytest.raises(ImageError) as error:
        load_views(source, HOW)
    words = {
        "missing": "does not exist",
        "folder": "does not exist",
        "truncated": "truncated",
        "truncated_png": "broken",
    }
    assert str(error.value).startswith(f"image {path} of a.json: record 7 ")
    assert words.get(kind, "not an image file") in str(error.value) and "\n" not in str(error.value)
    if not kind.startswith("truncated"):
        with pytest.raises(ImageError):
            image_size(source)


def test_images_of_every_mode_and_from_bytes(tmp_path):
    for mode in ("L", "P", "RGBA", "LA", "1", "CMYK", "I;16"):
        path = tmp_path / f"{mode.replace(';', '')}.{'jpg' if mode == 'CMYK' else 'png'}"
        Image.new(mode, (30, 17)).save(path)
        views, size = load_views(ImageSource(str(path)), HOW)
        assert views.shape == (1, 28, 28, 3) and views.dtype == np.uint8 and size == (30, 17)
        again, _ = load_views(ImageSource("name", data=path.read_bytes()), HOW)
        assert (views == again).all()


def test_a_thread_of_pixels_is_refused_instead_of_filling_the_memory(tmp_path):
    path = tmp_path / "thin.png"
    Image.new("RGB", (1, 60000)).save(path)
    with pytest.raises(ImageError, match="too thin"):
        load_views(ImageSource(str(path)), Preprocess(336, "square"))
    with pytest.raises(ImageError, match="too long"):
        load_views(ImageSource(str(path)), Preprocess(336, "pad"))


def test_missing_images_are_skipped_and_counted(tmp_path):
    paths = write_images(tmp_path)
    records = make_records(paths)
    (tmp_path / "2.png").unlink()
    hurt = [i for i, r in enumerate(records) if paths[2] in r["images"]]
    rows = Rows(records, encode, TINY, SMALL)
    assert rows.manifest.count(BAD) == rows.bad_count == len(hurt) > 1
    assert np.flatnonzero(rows.manifest.status == BAD).tolist() == hurt
    trained = {int(i) for row in range(len(rows)) for i in rows.records_of(row)}
    assert trained == set(range(len(records))) - set(hurt)
    with pytest.raises(
        DataError,
        match=rf"^{len(hurt)} samples .*max_bad_samples={len(hurt) - 1}; .*2.png of record .* does not exist",
    ):
        Rows(records, encode, TINY, Packing(row_length=64, view_budget=4, max_bad=len(hurt) - 1))


def test_a_truncated_jpeg_becomes_padding_and_the_limit_stops_the_run(tmp_path, caplog):
    paths = [*write_images(tmp_path), str(jpeg(tmp_path / "cut.jpg"))]
    records = make_records(paths)
    whole = {int(b["step"]): b for b in [{"step": s, **b} for s, b in Batches(Rows(records, encode, TINY, SMALL), 2)]}
    truncate(tmp_path / "cut.jpg")
    hurt = [i for i, r in enumerate(records) if paths[-1] in r["images"]]
    rows = Rows(records, encode, TINY, SMALL)
    assert rows.bad_count == 0, "found only when it is decoded"
    for step, batch in Batches(rows, 2):
        broken = (batch["segments"] == 0) & (whole[step]["segments"] > 0)
        assert (batch["weights"][broken] == 0).all() and (batch["image_slots"][broken] == -1).all()
        for name in ("tokens", "targets", "weights", "positions", "segments", "image_slots"):
            assert (batch[name][~broken] == whole[step][name][~broken]).all(), "its neighbours in the row are untouched"
    assert sorted(rows.broken) == hurt and rows.bad_count == len(hurt) > 1
    assert all("cut.jpg of record" in sentence for sentence in rows.broken.values())
    assert sum("cut.jpg" in m for m in caplog.messages) == len(hurt), "each is logged once, by name"
    strict = Rows(records, encode, TINY, Packing(row_length=64, view_budget=4, max_bad=len(hurt) - 1))
    with pytest.raises(DataError, match=rf"^{len(hurt)} samples are unusable, .*cut.jpg of record"):
        list(Batches(strict, 2))


def test_an_anyres_image_that_is_broken_keeps_its_slots(tmp_path):
    paths = [str(jpeg(tmp_path / f"{i}.jpg", 40 + 30 * i)) for i in range(3)]
    records = make_records(paths, 12, most_images=1)
    rows = Rows(records, encode, ANYRES, Packing(row_length=80, view_budget=10))
    before = list(Batches(rows, 1))
    truncate(tmp_path / "1.jpg")
    after = list(Batches(Rows(records, encode, ANYRES, Packing(row_length=80, view_budget=10)), 1))
    for (_, a), (_, b) in zip(before, after, strict=True):
        same = b["segments"] > 0
        assert (a["image_slots"][same] == b["image_slots"][same]).all() and (
            a["segments"][same] == b["segments"][same]
        ).all()


def test_a_malformed_record_is_skipped_and_counted(tmp_path):
    records = make_records(write_images(tmp_path))

    def picky(record):
        if record is records[5]:
            raise ValueError("data.json: record 5 has no conversations")
        return encode(record)

    assert Rows(records, picky, TINY, SMALL).manifest.notes == ((5, BAD, "data.json: record 5 has no conversations"),)
    with pytest.raises(DataError, match="max_bad_samples=0; .*record 5 has no conversations"):
        Rows(records, picky, TINY, Packing(row_length=64, view_budget=4, max_bad=0))
    with pytest.raises(DataError, match="none of the 1 records"):
        Rows(records[5:6], picky, TINY, SMALL)


def test_records_that_change_under_a_run_are_noticed(tmp_path):
    paths = write_images(tmp_path)
    records = make_records(paths)
    rows = Rows(records, encode, ANYRES, Packing(row_length=200, view_budget=20))
    number = next(i for i, r in enumerate(records) if r["images"])
    row = next(r for r in range(len(rows)) if number in rows.records_of(r))
    records[number]["tokens"][-1] += 1
    with pytest.raises(DataError, match=f"record {number} has changed since its length was measured"):
        rows[row]
    records[number]["tokens"][-1] -= 1
    Image.new("RGB", (99, 3)).save(records[number]["images"][0])
    with pytest.raises(DataError, match="has changed its size since it was measured"):
        rows[row]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"resample": 2}, "resample=2"),
        ({"crop_size": 20}, "crop_size=20"),
        ({"size": {"height": 3, "width": 4}}, "size=.*28 x 28 pixels"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor"),
        ({"do_center_crop": False}, "do_center_crop=False"),
        ({"image_mean": [0.5]}, "three numbers"),
    ],
)
def test_a_processor_that_we_do_not_compute_is_refused(change, words):
    vision = VisionConfig(image_size=28, width=8, heads=2)
    known = {"size": {"shortest_edge": 28, "longest_edge": None}, "crop_size": 28, "do_center_crop": True}
    assert with_processor(vision, known, "x.json") == vision == with_processor(vision, None, "x.json")
    with pytest.raises(CheckpointError, match=f"x.json has .*{words}"):
        with_processor(vision, known | change, "x.json")

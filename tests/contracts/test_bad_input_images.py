"""Contract 10, images: every broken file gives one sentence; a run skips and counts them up to a limit."""

import io
import pickle
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from tests.tiny_data import ANYRES, TINY, encode, make_records, write_images
from vlm_jax.config import VisionConfig
from vlm_jax.convert.processor_files import with_processor
from vlm_jax.convert.tensors import CheckpointError
from vlm_jax.data import images
from vlm_jax.data.image_source import ImageError, ImageSource
from vlm_jax.data.images import REASONS, Preprocess, image_size, load_views, open_image
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


def png_chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(width, height, depth=8, colour=2):
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header)


def png_of_16_bits(channels):
    """One row of the values 0, 255, 256, 32768, 65535 in every channel."""
    values = np.repeat(np.array([0, 255, 256, 32768, 65535], ">u2")[:, None], channels, 1)
    rows = zlib.compress(b"\0" + values.tobytes())
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    return png_header(5, 1, 16, colour) + png_chunk(b"IDAT", rows) + png_chunk(b"IEND", b"")


def saved(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def colours(data):
    """Pixels of the decoded image, uint8 [h, w, 3]."""
    return np.asarray(open_image(ImageSource("x", data=data)))


# what lies at the path -> (reason, words)
UNUSABLE = {
    "missing": ("missing", "does not exist"),
    "folder": ("folder", "is a folder"),
    "below_a_file": ("missing", "does not exist"),
    "empty": ("empty", "is empty"),
    "text": ("not_an_image", "is not an image file"),
    "web_page": ("not_an_image", "is a web page"),
    "cut_jpg": ("broken", "truncated"),
    "cut_png": ("broken", "broken"),
    "noise_png": ("broken", "broken"),
    "bomb": ("bomb", "too large"),
}


def place(folder, kind):
    """A file that cannot be used; returns its path."""
    path = folder / f"{kind}.jpg"
    if kind == "folder":
        path.mkdir()
    elif kind == "below_a_file":
        path.write_bytes(b"x")
        return path / "x.jpg"
    elif kind == "cut_jpg":
        truncate(jpeg(path))
    elif kind == "cut_png":
        path.write_bytes(saved(Image.effect_noise((80, 60), 50), "PNG")[:900])
    elif kind != "missing":
        page = b"\n<!DOCTYPE html><html>404</html>"
        noise = png_header(9, 9) + png_chunk(b"IDAT", b"nonsense") + png_chunk(b"IEND", b"")
        data = {"empty": b"", "text": b"not a picture", "web_page": page, "noise_png": noise}
        path.write_bytes(data.get(kind, png_header(20000, 20000) + png_chunk(b"IDAT", b"")))
    return path


@pytest.mark.parametrize("kind", UNUSABLE)
def test_one_sentence_names_file_and_record_and_has_a_reason(tmp_path, kind):
    path, (reason, words) = place(tmp_path, kind), UNUSABLE[kind]
    source = ImageSource(str(path), record="a.json: record 7")
    with pytest.raises(ImageError) as error:
        load_views(source, HOW)
    assert str(error.value).startswith(f"image {path} of a.json: record 7 ")
    assert words in str(error.value) and "\n" not in str(error.value)
    assert error.value.reason == reason and reason in REASONS
    assert pickle.loads(pickle.dumps(error.value)).reason == reason, "workers send it back"
    if reason != "broken":  # which a header does not show
        with pytest.raises(ImageError) as again:
            image_size(source)
        assert again.value.reason == reason
    if path.is_file():
        with pytest.raises(ImageError) as again:
            load_views(ImageSource("name", data=path.read_bytes()), HOW)
        assert again.value.reason == reason


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path):
    """Its pixels would take 1.2 GB; there are none in the file, so reading on would say that it is broken."""
    tracemalloc.start()
    with pytest.raises(ImageError, match="too large to be decoded: .*400000000 pixels"):
        load_views(ImageSource(str(place(tmp_path, "bomb"))), HOW)
    assert tracemalloc.get_traced_memory()[1] < 1e7
    tracemalloc.stop()


@pytest.mark.filterwarnings("ignore")  # Pillow's, about what it skips
def test_damaged_bytes_give_views_or_one_sentence():
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (24, 31, 3), np.uint8))
    kinds = {kind: saved(picture, kind) for kind in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM")}
    for kind, data in kinds.items():
        for _ in range(60):
            hurt = bytearray(data[: rng.integers(1, len(data) + 1)])
            for at in rng.integers(0, len(hurt), rng.integers(0, 8)):
                hurt[at] = rng.integers(0, 256)
            try:
                views, _ = load_views(ImageSource(kind, data=bytes(hurt)), HOW)
                assert views.shape == (1, 28, 28, 3)
            except ImageError as error:
                assert error.reason in REASONS and "\n" not in str(error)


def test_images_of_every_mode_and_from_bytes(tmp_path):
    for mode in ("L", "P", "RGBA", "LA", "1", "CMYK", "I;16"):
        path = tmp_path / f"{mode.replace(';', '')}.{'jpg' if mode == 'CMYK' else 'png'}"
        Image.new(mode, (30, 17)).save(path)
        views, size = load_views(ImageSource(str(path)), HOW)
        assert views.shape == (1, 28, 28, 3) and views.dtype == np.uint8 and size == (30, 17)
        again, _ = load_views(ImageSource("name", data=path.read_bytes()), HOW)
        assert (views == again).all()


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK", "YCbCr", "RGBA", "LA", "P", "1"])
def test_eight_bit_images_are_what_pillow_converts_them_to(mode):
    """The published pipelines call convert("RGB") on every image."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8)).convert(mode)
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.fromarray(rng.integers(0, 256, (20, 30), np.uint8)))
    data = saved(image, "TIFF" if mode in ("CMYK", "YCbCr") else "PNG")
    np.testing.assert_array_equal(colours(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_transparency_is_dropped_without_a_warning(recwarn):
    clear = Image.new("RGBA", (4, 4), (200, 100, 50, 0))
    assert (colours(saved(clear, "PNG")) == (200, 100, 50)).all()
    grey = Image.new("LA", (4, 4), (90, 0))
    assert (colours(saved(grey, "PNG")) == 90).all()
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([1, 2, 3, 10, 20, 30] + [0] * 762)
    for mark in (1, bytes([0, 0])):  # one clear colour, and an alpha for each
        assert (colours(saved(palette, "PNG", transparency=mark)) == (10, 20, 30)).all()
    assert (colours(saved(palette, "GIF", transparency=1)) == (10, 20, 30)).all()
    assert not recwarn.list


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_sixteen_bits_are_scaled_and_not_clipped(channels):
    assert colours(png_of_16_bits(channels))[0].tolist() == [[v] * 3 for v in (0, 0, 1, 128, 255)]


def test_sixteen_bits_of_other_files():
    values = np.array([[0, 255, 256, 32768, 65535]])
    for dtype in ("<u2", "<i4"):
        assert colours(saved(Image.fromarray(values.astype(dtype)), "TIFF"))[0, :, 0].tolist() == [0, 0, 1, 128, 255]
    big = Image.frombytes("I;16B", (5, 1), values.astype(">u2").tobytes())
    assert colours(saved(big, "TIFF"))[0, :, 0].tolist() == [0, 0, 1, 128, 255]
    floats = Image.fromarray(np.array([[-1, 0.5, 7, 300]], np.float32))
    assert colours(saved(floats, "TIFF"))[0, :, 0].tolist() == [0, 0, 7, 255], "floats are clipped, as Pillow does"


def test_of_an_animation_the_first_frame_is_seen():
    frames = [Image.new("RGB", (6, 5), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    for kind in ("GIF", "PNG", "WEBP", "TIFF"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = saved(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert (colours(data) == (255, 0, 0)).all(), kind


def test_exif_rotation_is_ignored_as_in_the_published_pipelines():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    turned = ImageSource("x", data=saved(image, "PNG", exif=exif))
    assert ImageOps.exif_transpose(Image.open(turned.open())).size == (20, 30), "a viewer would turn it"
    views, size = load_views(turned, HOW)
    assert size == (30, 20) == image_size(turned)
    np.testing.assert_array_equal(views, load_views(ImageSource("x", data=saved(image, "PNG")), HOW)[0])


@pytest.mark.parametrize("aspect", ["square", "pad", "anyres"])
def test_one_pixel_is_scaled_up(aspect):
    how = Preprocess(28, aspect, pinpoints=((28, 56), (56, 28), (56, 56)))
    views, size = load_views(ImageSource("x", data=saved(Image.new("RGB", (1, 1), (9, 8, 7)), "PNG")), how)
    assert size == (1, 1) and (views[0] == (9, 8, 7)).all(), "it is square: nothing is padded but the tiles of anyres"


@pytest.mark.parametrize("size", [(20000, 10), (10, 4000)])
def test_a_thin_image(size):
    """Padded, squashed and tiled like any other; what would be cropped to a small part of it is refused."""
    image = Image.new("RGB", size, (10, 20, 30))
    source = ImageSource("x", data=saved(image, "PNG"))
    views, size = load_views(source, HOW)
    assert (
        size == image.size and (views[0, 0, 0] == HOW.pad_colour).all() and (views[0, -1, -1] == HOW.pad_colour).all()
    )
    squashed, _ = load_views(source, Preprocess(28, "square", "squash"))
    assert (squashed == (10, 20, 30)).all()
    assert load_views(source, Preprocess(28, "anyres", pinpoints=((28, 56), (56, 28))))[0].shape == (3, 28, 28, 3)
    with pytest.raises(ImageError, match="too thin to be cropped") as error:
        load_views(source, Preprocess(336, "square"))
    assert error.value.reason == "too_thin"


@pytest.mark.parametrize("height", [60000, 1 << 17])
def test_a_thread_of_pixels_is_refused_instead_of_filling_the_memory(tmp_path, height):
    path = tmp_path / "thin.png"
    Image.new("RGB", (1, height)).save(path)
    for how, words in ((Preprocess(336, "square"), "too thin"), (Preprocess(336, "pad"), "too long")):
        with pytest.raises(ImageError, match=words) as error:
            load_views(ImageSource(str(path)), how)
        assert error.value.reason == "too_thin"


def whole_square(image, how):
    """Preprocess written out: the whole square is made, then resized in one call."""
    side = max(image.size)
    if how.aspect == "pad":
        canvas = Image.new("RGB", (side, side), how.pad_colour)
        canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = canvas
    short, long = sorted(image.size)
    size = (how.size, int(how.size * long / short))
    image = image.resize(size if image.width <= image.height else size[::-1], Image.Resampling.BICUBIC)
    left, top = (image.width - how.size) // 2, (image.height - how.size) // 2
    return np.asarray(image.crop((left, top, left + how.size, top + how.size)))


@pytest.mark.parametrize("aspect", ["square", "pad"])
@pytest.mark.parametrize("strip", [images.STRIP, 900])
def test_resizing_in_two_passes_is_bit_equal_to_one(monkeypatch, aspect, strip):
    monkeypatch.setattr(images, "STRIP", strip)
    rng = np.random.default_rng(0)
    for width, height in [*rng.integers(1, 260, (25, 2)), (56, 56), (56, 90), (640, 427), (427, 640)]:
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
        for size in (28, 56):
            how = Preprocess(size, aspect)
            np.testing.assert_array_equal(how(image)[0], whole_square(image, how), err_msg=f"{width}x{height} {size}")


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

    assert Rows(records, picky, TINY, SMALL).manifest.notes == (
        (5, BAD, "record", "data.json: record 5 has no conversations"),
    )
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

"""Images to codes and back: views, records, the commands, and every way they can be called wrongly."""

import json
import pickle

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from tests.tiny_visual_tokenizers import TINY, tensors
from vlm_jax.__main__ import main
from vlm_jax.config import ConfigError
from vlm_jax.convert.visual_tokenizer import Tokenizer, save_tokenizer
from vlm_jax.data import code_records
from vlm_jax.data.code_records import Coded, CodesError, open_codes
from vlm_jax.data.code_views import Views
from vlm_jax.data.image_source import ImageError, ImageSource
from vlm_jax.generate.tokenize import named_images
from vlm_jax.generate.visual_codes import VisualCoder
from vlm_jax.nn.params import merge, split
from vlm_jax.visual_tokenizers import names
from vlm_jax.visual_tokenizers.tokenizer import VisualTokenizer


def loaded(name):
    return Tokenizer(TINY[name], *names.read(TINY[name], tensors(TINY[name])))


def noise(count, size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), np.uint8)


@pytest.fixture(scope="module")
def coded(folder):
    """The folder, with the codes all.arrayrecord of its images."""
    assert run(folder, "all.arrayrecord") == 0
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two tokenizers and a folder of seven images of different shapes, one of them broken."""
    place = tmp_path_factory.mktemp("tokenize")
    for name in ("vq", "hq"):
        save_tokenizer(place / name, *loaded(name))
    (place / "images/cats").mkdir(parents=True)
    for k, shape in enumerate(((16, 16), (40, 20), (20, 40), (17, 31), (33, 32), (64, 64))):
        name = f"cats/{k}.png" if k % 2 else f"{k}.png"
        Image.fromarray(np.random.default_rng(k).integers(0, 256, (*shape, 3), np.uint8)).save(place / "images" / name)
    (place / "images/cats/broken.jpg").write_bytes(b"<html>")
    return place


def run(folder, out, *flags, model="vq", images="images"):
    at = ["--model", str(folder / model), "--images", str(folder / images), "--size", "16"]
    return main(["tokenize", *at, "--out", str(folder / out), *flags])


def picture(w, h):
    """Rows and columns can be read off the pixels."""
    x, y = np.meshgrid(np.arange(w), np.arange(h))
    return Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))


def test_ten_views_are_torchvisions():
    views = Views("ten", 20, margin=1.2)(picture(24, 24))
    assert views.shape == (10, 20, 20, 3)
    assert [tuple(v[0, 0, :2]) for v in views[:5]] == [(0, 0), (4, 0), (0, 4), (4, 4), (2, 2)]
    assert [tuple(v[0, 0, :2]) for v in views[5:]] == [(23, 0), (19, 0), (23, 4), (19, 4), (21, 2)]
    assert all(v[0, 1, 0] == v[0, 0, 0] - 1 for v in views[5:])
    odd = Views("ten", 20, margin=1.15)(picture(23, 23))  # 1.5 pixels in front of the centre: rounded to the even 2
    assert tuple(odd[4][0, 0, :2]) == (2, 2) and tuple(odd[9][0, 0, :2]) == (20, 2)


def test_mirrored_and_padded_views():
    two = Views("mirrored", 16)(picture(20, 16))
    np.testing.assert_array_equal(two[0][:, ::-1], two[1])
    assert tuple(two[0][0, 0, :2]) == (2, 0)
    (padded,) = Views("pad", 20)(picture(20, 11))
    assert (padded[:4] == 127).all() and (padded[15:] == 127).all() and tuple(padded[4, 7, :2]) == (7, 0)


def test_views_refuse():
    with pytest.raises(ConfigError, match="--crop='random_place' is unknown: use one of centre_box"):
        Views("random_place")
    with pytest.raises(ConfigError, match="--margin=0.9 must be at least 1"):
        Views("ten", 16, margin=0.9)


def test_an_image_too_thin_is_named(tmp_path):
    Image.new("RGB", (40000, 1)).save(tmp_path / "thin.png")
    for rule in ("pad", "centre_box"):
        with pytest.raises(ImageError, match=r"thin\.png cannot be resized: 40000x1 pixels is too") as error:
            Views(rule, 64).load(ImageSource(str(tmp_path / "thin.png")))
        assert error.value.reason == "too_thin"


@pytest.mark.parametrize("name", ["rq", "hq3"])
def test_codes_and_pictures_are_the_models(name):
    tokenizer, pixels = loaded(name), noise(5, 16)
    coder = VisualCoder(tokenizer, batch=2)
    codes = coder.encode(pixels)
    graph, _ = split(nnx.eval_shape(lambda: VisualTokenizer(tokenizer.config, nnx.Rngs(0))))

    @jax.jit
    def forward(params, books, pixels):
        out = merge(graph, params)((pixels / 255 - 0.5) / 0.5, books)
        return out.coded.codes, out.image

    wanted, images = forward(tokenizer.params, tokenizer.codebooks, pixels.astype(np.float32))
    assert len(codes) == len(wanted)
    for ours, theirs in zip(codes, wanted):
        np.testing.assert_array_equal(ours, theirs)
    pictures = np.clip(np.floor(127.5 * np.asarray(images) + 128), 0, 255)
    gap = np.abs(coder.decode(codes).astype(int) - pictures)
    assert gap.max() <= 1 and (gap == 0).mean() > 0.99  # what lies between two values of a byte


def test_the_batch_changes_nothing_even_for_a_language_driven_tokenizer():
    tokenizer, pixels = loaded("unicode_hq"), noise(5, 16)
    assert tokenizer.config.quantizer.language
    whole = VisualCoder(tokenizer, batch=5).encode(pixels)
    graph, _ = split(nnx.eval_shape(lambda: VisualTokenizer(tokenizer.config, nnx.Rngs(0))))
    alone = jax.jit(lambda params, books, x: merge(graph, params).encode(x, books))
    for k in range(len(pixels)):
        x = (pixels[k : k + 1].astype(np.float32) / 255 - 0.5) / 0.5
        for a, b in zip(whole, alone(tokenizer.params, tokenizer.codebooks, x)):
            np.testing.assert_array_equal(a[k], b[0])


def test_the_command_writes_codes_a_manifest_and_names_what_is_broken(coded, capsys):
    folder = coded
    assert run(folder, "all.arrayrecord") == 0
    said = capsys.readouterr().err
    assert "broken.jpg is a web page" in said and "1 of 7 images are broken" in said
    codes = open_codes(folder / "all.arrayrecord")
    assert [one.id for one in codes] == ["0.png", "2.png", "4.png", "cats/1.png", "cats/3.png", "cats/5.png"]
    assert codes[3].size == (20, 40) and codes[-1].size == (64, 64)
    assert [level.shape for level in codes[0].codes] == [(1, 8, 8)] and codes[0].codes[0].dtype == np.int32
    manifest = json.loads((folder / "all.json").read_text())
    assert manifest["about"]["crop"] == {"rule": "centre_box", "size": 16, "views": 1}
    assert manifest["about"]["levels"] == [{"entries": 24, "shape": [8, 8]}]
    assert [one["reason"] for one in manifest["broken"]] == ["not_an_image"]
    coder = VisualCoder(loaded("vq"), batch=3)
    for one in codes:
        views, size = Views("centre_box", 16).load(ImageSource(str(folder / "images" / one.id)))
        np.testing.assert_array_equal(one.codes[0], coder.encode(views)[0])
        assert one.size == size


def test_levels_and_views(folder):
    crop, views = "ten", 10
    assert run(folder, f"{crop}.arrayrecord", "--crop", crop, "--shard_images", "3", "--batch", "7", model="hq") == 0
    codes = open_codes(folder / f"{crop}.arrayrecord")
    assert len(codes.shards) == 3 and len(codes) == 6
    assert [level.shape for level in codes[2].codes] == [(views, 2, 2), (views, 4, 4)]
    assert [level["entries"] for level in codes.about["levels"]] == [24, 20]
    pixels, _ = Views(crop, 16).load(ImageSource(str(folder / "images" / codes[4].id)))
    for ours, theirs in zip(codes[4].codes, VisualCoder(loaded("hq"), batch=10).encode(pixels)):
        np.testing.assert_array_equal(ours, theirs)
    again = pickle.loads(pickle.dumps(codes))
    assert again[-1].id == codes[5].id
    with pytest.raises(IndexError, match="there is no number 6"):
        codes[6]
    for way in (f"{crop}.json", f"{crop}-00001-of-00003.arrayrecord", f"{crop}-*.arrayrecord"):
        assert [one.id for one in open_codes(folder / way)] == [one.id for one in codes]


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--size", "18"], "--size=18 must be a multiple of 8"),
        (["--crop", "middle"], "--crop='middle' is unknown"),
        (["--batch", "0"], "--batch=0 must be at least 1"),
        (["--dtype", "float16"], "--dtype='float16' is unknown"),
        (["--shard_images", "0"], "--shard_images=0"),
        (["--images", "nowhere"], "nowhere does not exist: check --images"),
        (["--model", "nowhere"], "nowhere does not exist"),
    ],
)
def test_wrong_flags(folder, capsys, flags, words):
    assert run(folder, "wrong.arrayrecord", *flags, model="hq") == 2
    assert words in capsys.readouterr().err
    assert not (folder / "wrong.arrayrecord").exists()


def test_another_run_is_not_mixed_in(coded, capsys):
    before = (coded / "all.arrayrecord").read_bytes()
    for flags in (["--crop", "squash"], ["--shard_images", "3"], ["--images", str(coded / "images/0.png")]):
        assert run(coded, "all.arrayrecord", *flags) == 2
        assert "all.arrayrecord was made by another run" in capsys.readouterr().err
    assert run(coded, "all.arrayrecord", model="hq") == 2
    assert (coded / "all.arrayrecord").read_bytes() == before


def test_nothing_that_can_be_used(folder, capsys):
    (folder / "empty").mkdir()
    (folder / "empty/a.png").write_bytes(b"")
    assert run(folder, "none.arrayrecord", images="empty") == 2
    assert "none of the 1 images can be used; the first: image" in capsys.readouterr().err
    assert not (folder / "none.arrayrecord").exists()


def made(file, job="a", count=2, ids="x"):
    images = [Coded(f"{ids}{k}", (np.full((1, 2, 2), 70000 + k),), (3, 4)) for k in range(count)]
    code_records.write_shard(file, images, job=job, broken=[], about={"dtype": code_records.number_type([80000])})


def test_large_codebooks(tmp_path):
    made(tmp_path / "codes.arrayrecord")
    assert open_codes(tmp_path / "codes.arrayrecord")[1].codes[0].tolist() == [[[70001] * 2] * 2]
    assert code_records.number_type([1 << 16]) == "uint16"


def test_shards_that_cannot_be_read(tmp_path):
    out = tmp_path / "codes.arrayrecord"
    with pytest.raises(CodesError, match=r"codes\.arrayrecord does not exist, nor do shards of it"):
        open_codes(out)
    first, second = code_records.shard_files(out, 2)
    made(first)
    with pytest.raises(CodesError, match="has 1 of its 2 shards: run `tokenize` again"):
        open_codes(out)
    made(second, job="b")
    with pytest.raises(CodesError, match="are of several runs"):
        open_codes(out)
    second.write_bytes(first.read_bytes()[:100])
    with pytest.raises(CodesError, match=r"codes-00001-of-00002\.arrayrecord .*make it again with `tokenize`"):
        open_codes(out)
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(tmp_path / "other.arrayrecord"), "group_size:1")
    writer.write(b'{"format": "something"}')
    writer.close()
    with pytest.raises(CodesError, match="not one that `tokenize` writes"):
        open_codes(tmp_path / "other.arrayrecord")


def psnr_of(folder, one):
    drawn = np.asarray(Image.open(folder / one["file"])).astype(float)
    left, right = drawn[:, :16], drawn[:, -16:]
    return 10 * np.log10(255**2 / ((left - right) ** 2).mean())


def reconstruct(folder, out, *flags, model="vq"):
    return main(["reconstruct", "--model", str(folder / model), "--out", str(folder / out), "--size", "16", *flags])


def test_pictures_side_by_side(folder, capsys):
    images = ["--images", str(folder / "images")]
    assert reconstruct(folder, "drawn", *images, "--coarse", "--batch", "4", "--crop", "centre_box", model="hq") == 0
    captured = capsys.readouterr()
    assert "broken.jpg is a web page" in captured.err and "6 images of 16 x 16 pixels" in captured.out
    metrics = json.loads((folder / "drawn/metrics.json").read_text())
    page = (folder / "drawn/index.html").read_text()
    assert [one["id"] for one in metrics["images"]][3] == "cats/1.png" and metrics["usage"].keys() == {"top", "bottom"}
    for one in metrics["images"]:
        assert np.asarray(Image.open(folder / "drawn" / one["file"])).shape == (16, 3 * 16 + 2 * 4, 3)
        np.testing.assert_allclose(one["psnr"], psnr_of(folder / "drawn", one), rtol=1e-5)
        assert one["file"] in page and f"{one['psnr']:.2f} dB" in page
    assert run(folder, "to_draw.arrayrecord", "--crop", "centre_box", model="hq") == 0
    codes = ["--codes", str(folder / "to_draw.arrayrecord")]
    assert reconstruct(folder, "again", *codes, *images, model="hq") == 0
    assert json.loads((folder / "again/metrics.json").read_text())["images"] == metrics["images"]
    assert reconstruct(folder, "alone", *codes, "--limit", "2", model="hq") == 0
    alone = json.loads((folder / "alone/metrics.json").read_text())["images"]
    assert [one["psnr"] for one in alone] == [None, None]
    assert np.asarray(Image.open(folder / "alone" / alone[0]["file"])).shape == (16, 16, 3)


def test_wrong_flags_of_reconstruct(coded, capsys):
    folder, codes = coded, ["--codes", str(coded / "all.arrayrecord")]
    for flags, words in (
        ([], "needs --images, --codes or both"),
        (codes, "was made by another tokenizer (vq)"),
        (["--images", str(folder / "images"), "--crop", "ten"], "gives 10 views of an image"),
        (["--images", str(folder / "empty_folder")], "does not exist: check --images"),
    ):
        assert reconstruct(folder, "wrong", *flags, model="hq") == 2
        assert words in capsys.readouterr().err
    assert reconstruct(folder, "wrong", *codes, "--images", str(folder / "images/cats/1.png")) == 2
    assert "0.png of the codes is not among --images" in capsys.readouterr().err


def test_images_given_twice_count_once(folder):
    (folder / "list.txt").write_text("images/0.png\nimages/2.png\nimages/0.png\n")
    assert [item.id.rpartition("/")[2] for item in named_images([str(folder / "list.txt")])] == ["0.png", "2.png"]

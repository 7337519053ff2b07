"""The cache of resized images: they come back bit-equal or are made again; nothing half-written is ever read."""

import concurrent.futures
import multiprocessing
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from tests.tiny_data import ANYRES, TINY, encode, make_records, write_images
from vlm_jax.data.image_cache import Views, cache_bytes, folder_name, gigabytes, identity
from vlm_jax.data.image_source import ImageError, ImageSource
from vlm_jax.data.images import Preprocess, load_views
from vlm_jax.data.pipeline import Batches, Packing, Rows

ALL = [Preprocess(28, "square"), Preprocess(28, "pad"), Preprocess.of(ANYRES), Preprocess(28, "square", "squash")]


def same(got, want):
    return got[1] == want[1] and got[0].dtype == np.uint8 and np.array_equal(got[0], want[0])


def entries(folder):
    return sorted(folder.rglob("*.views"))


@pytest.mark.parametrize("how", ALL, ids=folder_name)
def test_views_are_the_same_the_first_and_the_second_time(tmp_path, how):
    paths = write_images(tmp_path)
    views = Views(how, tmp_path / "cache")
    for turn in range(2):
        for path in paths:
            assert same(views(ImageSource(path)), load_views(ImageSource(path), how))
            assert (views.made, views.read) == ((paths.index(path) + 1, 0) if turn == 0 else (6, paths.index(path) + 1))
    sizes = [file.stat().st_size for file in entries(tmp_path / "cache")]
    assert views.stored() == (6, sum(sizes)) and sum(sizes) <= cache_bytes(6, how)
    assert how.aspect == "anyres" or sum(sizes) == cache_bytes(6, how), "the size is known before training"


def test_all_preprocessings_share_a_folder(tmp_path):
    path = write_images(tmp_path, 1)[0]
    several = [*ALL, Preprocess(56, "pad"), Preprocess(28, "pad", mean=(0.5, 0.5, 0.5))]
    for _ in range(2):
        for how in several:
            assert same(Views(how, tmp_path / "cache")(ImageSource(path)), load_views(ImageSource(path), how))
    assert len(entries(tmp_path / "cache")) == len(several) == len({folder_name(how) for how in several})


def test_without_a_folder_nothing_is_kept(tmp_path):
    path = write_images(tmp_path, 1)[0]
    views = Views(ALL[0])
    assert same(views(ImageSource(path)), load_views(ImageSource(path), ALL[0]))
    assert (views.made, views.read, views.stored()) == (0, 0, (0, 0)) and len(list(tmp_path.iterdir())) == 1


def test_a_changed_file_is_noticed(tmp_path):
    path = tmp_path / "x.png"
    views = Views(ALL[1], tmp_path / "cache")
    for number, (size, time) in enumerate([((30, 20), 5), ((30, 20), 6), ((31, 20), 6)]):
        Image.new("RGB", size, (number, 7, 7)).save(path, compress_level=0)
        os.utime(path, ns=(time, time))
        assert same(views(ImageSource(str(path))), load_views(ImageSource(str(path)), ALL[1])), number
    assert views.made == 3


def test_pieces_of_a_file_and_bytes_are_told_apart(tmp_path):
    pictures = [open(path, "rb").read() for path in write_images(tmp_path, 2)]
    (tmp_path / "shard.tar").write_bytes(b"".join(pictures))
    views, at = Views(ALL[1], tmp_path / "cache"), 0
    for _ in range(2):
        at = 0
        for data in pictures:
            piece = ImageSource(str(tmp_path / "shard.tar"), piece=(at, len(data)))
            want = load_views(ImageSource("x", data=data), ALL[1])
            assert same(views(piece), want) and same(views(ImageSource("any name", data=data)), want)
            at += len(data)
    assert views.made == 4 == views.read
    assert identity(ImageSource("a", "one", pictures[0])) == identity(ImageSource("b", "two", pictures[0]))


@pytest.mark.parametrize("hurt", ["cut", "empty", "grown", "pixel", "size", "text", "folder"])
def test_a_damaged_entry_is_made_again(tmp_path, hurt, caplog):
    source = ImageSource(write_images(tmp_path, 1)[0])
    how = ALL[1]
    want = Views(how, tmp_path / "cache")(source)
    entry = entries(tmp_path / "cache")[0]
    data = bytearray(entry.read_bytes())
    if hurt == "folder":
        entry.unlink()
        entry.mkdir()
        assert same(Views(how, tmp_path / "cache")(source), want), "it cannot be replaced, training goes on"
        return
    data[{"pixel": -5, "size": 20}.get(hurt, 0)] ^= 1
    changed = {
        "cut": data[:100],
        "empty": b"",
        "grown": data + b"x",
        "text": b"no entry at all, but as long as a header is",
    }
    entry.write_bytes(changed.get(hurt, data))
    views = Views(how, tmp_path / "cache")
    assert same(views(source), want) and views.made == 1 and "is damaged and is made again" in caplog.text
    assert same(views(source), want) and views.read == 1


def test_a_broken_image_leaves_no_entry(tmp_path):
    (tmp_path / "x.png").write_bytes(b"no picture")
    views = Views(ALL[0], tmp_path / "cache")
    for path, reason in ((tmp_path / "x.png", "not_an_image"), (tmp_path / "gone.png", "missing"), ("a\0b", "broken")):
        with pytest.raises(ImageError) as error:
            views(ImageSource(str(path)))
        assert error.value.reason == reason
    assert not entries(tmp_path)


def test_a_full_disk_stops_the_cache_and_not_the_run(tmp_path, monkeypatch, caplog):
    paths = write_images(tmp_path)
    views = Views(ALL[1], tmp_path / "cache")
    views(ImageSource(paths[0]))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    for path in paths[1:]:
        assert same(views(ImageSource(path)), load_views(ImageSource(path), ALL[1]))
    assert views.made == 1 and len(caplog.messages) == 1 and "No space left" in caplog.text
    assert [p for p in (tmp_path / "cache").rglob("*") if p.is_file()] == entries(tmp_path / "cache"), "no rest is left"
    views(ImageSource(paths[0]))
    assert views.read == 1, "what is there is still read"


def use_cache(folder, paths):
    views = Views(ALL[1], folder)
    return [int(views(ImageSource(path))[0].astype(np.int64).sum()) for path in paths * 3]


def test_threads_and_processes_share_a_folder(tmp_path):
    paths = write_images(tmp_path)
    want = use_cache(None, paths)
    shared = Views(ALL[1], tmp_path / "threads")
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        sums = list(pool.map(lambda path: int(shared(ImageSource(path))[0].astype(np.int64).sum()), paths * 3))
    assert sums == want and len(entries(tmp_path / "threads")) == 6
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        parts = pool.starmap(use_cache, [(tmp_path / "processes", paths)] * 2)
    assert parts == [want, want] and len(entries(tmp_path / "processes")) == 6


def test_rows_are_the_same_with_a_cache(tmp_path):
    records = make_records(write_images(tmp_path))
    how = Packing(row_length=64, view_budget=4)
    views = Views(Preprocess.of(TINY), tmp_path / "cache")
    plain, *cached = (
        list(Batches(Rows(records, encode, TINY, how, load=load), 2)) for load in (None, views, views, None)
    )
    for again in cached:
        for (_, a), (_, b) in zip(plain, again, strict=True):
            assert all(np.array_equal(a[key], b[key]) for key in a) and a.keys() == b.keys()
    assert len(entries(tmp_path)) == 6 and views.read > 6


def test_sizes_are_said_before_and_after(tmp_path, monkeypatch):
    paths, views = write_images(tmp_path), Views(ALL[1], tmp_path / "cache")
    assert "6 resized images take 0.0 MB in" in views.expect(6) and "; 0 (0.0 MB) are there already" in views.expect(6)
    for path in paths + paths[:2]:
        views(ImageSource(path))
    assert "; 6 (0.0 MB) are there already" in views.expect(6)
    assert "2 resized images were read and 6 added" in views.report() and "holds 6, 0.0 MB" in views.report()
    usage = shutil.disk_usage(tmp_path)._replace(free=cache_bytes(3, ALL[1]))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert "are free: those that do not fit are decoded in every epoch" in views.expect(10)
    assert "are free" not in views.expect(9), "six of them are there"
    assert "at most" in Views(ALL[2], tmp_path / "cache").expect(1)


def test_sizes_in_words():
    assert cache_bytes(558_128, Preprocess(336, "pad")) // 10**9 == 189
    assert [gigabytes(n) for n in (658_360_000_000, 1_200_000)] == ["658.4 GB", "1.2 MB"]

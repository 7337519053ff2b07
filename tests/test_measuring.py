"""Manifests: kept per source, looked at again where something was broken, and exactly as they were for a run that goes on."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from tests.tiny_data import ANYRES, TINY, encode, make_records, write_images
from vlm_jax.config import IGNORE
from vlm_jax.data import measuring
from vlm_jax.data.image_source import ImageError
from vlm_jax.data.manifest import BAD, COLUMNS, DECODE, EXISTS, HEADER, OK, DataError, Layout, Manifest, words_of
from vlm_jax.data.measuring import Limits, Means, load_or_measure, measure, measure_sources
from vlm_jax.data.records import Record
from vlm_jax.data.tasks import Sample


class Kept(list):
    """Records that say what they hold."""

    def __init__(self, records, fingerprint):
        super().__init__(records)
        self.fingerprint = fingerprint


@dataclasses.dataclass(frozen=True)
class Encode:
    """`tiny_data.encode` with a fingerprint; `calls` counts the records that were encoded."""

    fingerprint: str = "tiny"
    calls: list = dataclasses.field(default_factory=list)

    def __call__(self, record):
        self.calls.append(record)
        return encode(record)


@pytest.fixture
def paths(tmp_path):
    return write_images(tmp_path)


@pytest.fixture
def records(paths):
    return make_records(paths)


def same(a, b):
    for name in {*COLUMNS, "sizes"} - {"ids"}:  # records without id are told apart by their number in the source
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
    return a.notes == b.notes


def test_a_source_more_measures_only_that_source(records, tmp_path):
    cache, layout = Means(tmp_path / "cache"), Layout(Encode(), TINY, 64, 4)
    one = {"a": Kept(records[:25], "a")}
    first = measure_sources(one, layout, means=cache)
    assert len(layout.encode.calls) == 25
    both = measure_sources(one | {"b": Kept(records[25:], "b")}, layout, means=cache)
    assert len(layout.encode.calls) == 40 and same(both["a"], first["a"])
    assert same(Manifest.join(list(both.values())), measure(records, layout))
    other = dataclasses.replace(layout, encode=Encode("another tokenizer"))
    measure_sources(one, other, means=cache)
    assert len(other.encode.calls) == 25, "another encoder measures again"


@pytest.mark.parametrize("config", [TINY, ANYRES])
def test_what_is_read_is_what_was_measured(records, paths, tmp_path, config):
    records[3]["images"], records[3]["tokens"] = ["gone.png"], [1, 2, -200, 5]
    layout, means = Layout(Encode(), config, 40, 9), Means(tmp_path / "cache")
    first = load_or_measure(Kept(records, "x"), layout, means=means)
    count = len(layout.encode.calls)
    again = load_or_measure(Kept(records, "x"), layout, means=means)
    assert same(first, again) and len(layout.encode.calls) == count + 1, "only the broken record is looked at again"
    assert first.digest() == again.digest() and first.count(BAD) == 1 and first.notes[0].index == 3
    assert first.images.sum() == len(first.sizes)
    sizes = {path: Image.open(path).size if config is ANYRES else (0, 0) for path in paths}
    shown = [sizes[image] for i, record in enumerate(records) if first.status[i] == OK for image in record["images"]]
    assert first.sizes.tolist() == [list(size) for size in shown]


def test_a_damaged_manifest_is_measured_again(records, tmp_path, caplog):
    layout, means = Layout(Encode(), TINY, 40, 9), Means(tmp_path / "cache")
    first = load_or_measure(Kept(records, "x"), layout, means=means)
    (file,) = (tmp_path / "cache").iterdir()
    file.write_bytes(file.read_bytes()[:200])
    for wanted in ("", first.digest()):
        assert same(load_or_measure(Kept(records, "x"), layout, means=means, wanted=wanted), first)
    assert len(layout.encode.calls) == 80 and "damaged, its records are measured again" in caplog.text
    assert [path for path in (tmp_path / "cache").iterdir()] == [file], "and replaced"


def test_an_image_that_comes_back_counts_in_a_new_run_but_not_in_one_that_goes_on(records, paths, tmp_path):
    (tmp_path / "2.png").rename(tmp_path / "away.png")
    layout, means, kept = Layout(Encode(), ANYRES, 64, 20), Means(tmp_path / "cache"), Kept(records, "x")
    began = load_or_measure(kept, layout, means=means)
    assert began.count(BAD) > 1
    (tmp_path / "away.png").rename(tmp_path / "2.png")
    fresh = load_or_measure(kept, layout, means=means)
    assert fresh.count(BAD) == 0 and same(fresh, measure(records, layout))
    assert same(load_or_measure(kept, layout, means=means, wanted=began.digest()), began)
    assert same(load_or_measure(kept, layout, means=means), fresh), "the newest is taken"
    assert same(load_or_measure(kept, layout, means=means, wanted="of another cache"), fresh)


def test_a_closer_look_is_kept_for_training(records, paths, tmp_path):
    """`data check` decodes every image; training takes what it found and does not undo it by looking less closely."""
    data = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "4.png").write_bytes(b"no image")
    means, kept = Means(tmp_path / "cache"), Kept(records, "x")
    layout = Layout(Encode(), TINY, 64, 4)
    by_depth = {depth: measure(records, dataclasses.replace(layout, depth=depth)) for depth in (EXISTS, HEADER, DECODE)}
    assert [m.count(BAD) > 0 for m in by_depth.values()] == [False, True, True]
    assert by_depth[HEADER].count(BAD) < by_depth[DECODE].count(BAD)
    assert same(load_or_measure(kept, layout, means=means), by_depth[EXISTS])
    load_or_measure(kept, dataclasses.replace(layout, depth=DECODE), means=means)
    assert same(load_or_measure(kept, layout, means=means), by_depth[DECODE])
    (tmp_path / "4.png").write_bytes((tmp_path / "0.png").read_bytes())
    mended = load_or_measure(kept, layout, means=means)
    assert 0 < mended.count(BAD) < by_depth[DECODE].count(BAD)
    assert {n.reason for n in mended.notes} == {"broken"}


def test_a_caller_may_look_at_every_image_himself(records, tmp_path):
    seen = []

    def look(source):
        seen.append(source.path)
        if source.path.endswith("3.png"):
            raise ImageError(f"{source.label} is ugly", "ugly")
        return 0, 0

    for config in (TINY, ANYRES):
        seen.clear()
        layout = Layout(encode, config, 64, 20, look=look)
        found = measure(records, layout)
        assert set(seen) >= {image for record in records for image in record["images"]}
        assert found.reasons() == {"ugly": sum(any(i.endswith("3.png") for i in r["images"]) for r in records)}
        assert bool(found.sizes.all()) == (config is ANYRES), "sizes are looked up where slots depend on them"


def test_processes_and_threads_measure_alike(records, tmp_path):
    layout = Layout(encode, TINY, 24, 2)
    assert same(measure(records, layout, means=Means(processes=2)), measure(records, layout, means=Means(threads=3)))


def test_the_share_is_judged_as_soon_as_it_is_certain(records, monkeypatch):
    """A wrong image folder stops the run after the first records, not after all of them."""
    monkeypatch.setattr(measuring, "CHUNK", 4)
    asked = []

    def broken(record):
        asked.append(record)
        raise ValueError("lost.json: no such image")

    with pytest.raises(
        DataError, match=r"^4 of 40 records \(10.0%\) cannot .* 4 record in lost.json; the first: lost.json"
    ):
        measure(records, Layout(broken, TINY, 64, 4), Limits(max_share=0.05), "lost.json", Means(threads=1))
    assert len(asked) < 40


def test_a_kept_manifest_is_judged_by_the_limits_of_today(records, tmp_path):
    (tmp_path / "2.png").unlink()
    means, layout = Means(tmp_path / "cache"), Layout(Encode(), TINY, 64, 4)
    load_or_measure(Kept(records, "x"), layout, means=means)
    with pytest.raises(DataError, match="data.max_bad_share=0.01 allows; .* missing in mine; the first: image .*2.png"):
        load_or_measure(Kept(records, "x"), layout, Limits(max_share=0.01), "mine", means)
    with pytest.raises(DataError, match="more than train.max_bad_samples=0; .* missing in mine"):
        load_or_measure(Kept(records, "x"), layout, Limits(max_bad=0), "mine", means)


def test_hosts_take_turns(records):
    """The measurement is handed to `turn`, which says when this process may begin."""
    said = []

    def turn(function):
        said.append("before")
        return function()

    assert measure_sources({"a": records}, Layout(encode, TINY, 64, 4), turn=turn).keys() == {"a"} and said == [
        "before"
    ]


def test_replaced_lines_are_in_place(paths):
    """Splicing one line equals measuring everything."""
    records, layout = make_records(paths, 30), Layout(encode, ANYRES, 64, 20)
    hurt = [dict(r, tokens=[1]) if i in (0, 7, 8, 29) else r for i, r in enumerate(records)]
    lines = {i: layout.measure(records, i, i + 1) for i in (8, 0, 7)}
    mended = measure(hurt, layout).replaced(lines)
    assert same(mended, measure([*records[:29], hurt[29]], layout)) and [n.index for n in mended.notes] == [29]


def test_words_are_counted_as_the_sampler_counts_them():
    text = (("human", "What is <image> this?"), ("gpt", "A cat."))
    sample = Sample(np.arange(5), np.full(5, IGNORE))
    assert words_of(Record("1", text, ("a.jpg",)), sample) == 6 and words_of(Record("1", text), sample) == -6
    assert words_of(Record("1", (("human", ""), ("gpt", ""))), sample) == -1, "no word at all is one"

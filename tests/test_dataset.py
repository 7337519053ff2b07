"""The `data` part of a recipe, opened: names of sources, what is refused, and rows over several files."""

import dataclasses
import json

import pytest

from tests.tiny_data import TINY, write_images
from tests.tiny_tokenizers import llama_directory
from vlm_jax.config import ConfigError
from vlm_jax.data.dataset import named_sources, open_layout, open_rows, open_sources
from vlm_jax.data.manifest import DataError
from vlm_jax.data.options import DataConfig, Source
from vlm_jax.data.pipeline import Batches
from vlm_jax.data.tokenizer import load_tokenizer


def dialogues(first, count, image=None):
    """Records with ids first, first + 1, ..."""
    asked = "<image>\nWhat is shown?" if image else "What is two and two?"
    return [
        {"id": str(i), **({"image": image} if image else {}), "conversations": [
            {"from": "human", "value": asked}, {"from": "gpt", "value": "A cat. " * (1 + i % 5)}]}
        for i in range(first, first + count)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """one/train.json, two/train.json (text) and photos.jsonl with images, and a tokenizer."""
    folder = tmp_path_factory.mktemp("data")
    write_images(folder, 2)
    for name, first in (("one", 0), ("two", 100)):
        (folder / name).mkdir()
        (folder / name / "train.json").write_text(json.dumps(dialogues(first, 12)))
    (folder / "photos.jsonl").write_text("\n".join(map(json.dumps, dialogues(200, 9, "0.png"))))
    llama_directory(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


@pytest.fixture
def data(folder):
    return DataConfig(
        path=(str(folder / "one" / "train.json"), str(folder / "two" / "train.json")),
        sources={"photos": Source(str(folder / "photos.jsonl"), limit=5)},
        image_folder=str(folder),
        row_length=1024,
        sample_length=512,
        views_per_row=2,
        threads=2,
    )


def test_files_are_sources_named_after_themselves(data):
    assert list(named_sources(data)) == ["photos", "train.json", "train.json#2"]
    left_out = dataclasses.replace(data, sources={"photos": dataclasses.replace(data.sources["photos"], repeat=0)})
    assert list(open_sources(left_out)) == ["train.json", "train.json#2"]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"path": (), "sources": {}}, "data.path is empty and there are no data.sources: give LLaVA JSON files"),
        ({"sources": {"x": Source()}}, "data.sources.x.path is empty"),
        (
            {"sources": {"x": Source("x.json", weight=1.0)}},
            "train.json has no weight, but x has.*move them to data.sources",
        ),
        ({"epoch_samples": 5}, "data.epoch_samples=5 needs weights"),
    ],
)
def test_data_that_says_nothing_or_too_much_is_refused(data, change, words):
    with pytest.raises(ConfigError, match=words):
        named_sources(dataclasses.replace(data, **change))


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("max_bad_share", 5, "must lie between 0 and 1"),
        ("seed", -1, "data.seed=-1"),
        ("epoch_samples", -1, "not be negative"),
    ],
)
def test_numbers_out_of_range_are_refused(key, value, words):
    with pytest.raises(ConfigError, match=words):
        DataConfig(**{key: value})


def test_rows_over_several_files(data, tokenizer, tmp_path):
    rows = open_rows(data, TINY, tokenizer, cache=tmp_path, epochs=2)
    shown = [rows.source_of(int(n)) for r in range(len(rows)) for n in rows.records_of(r)]
    assert sorted(shown) == sorted(
        [(name, i) for name in ("train.json", "train.json#2") for i in range(12)] * 2
        + [pair for pair in shown if pair[0] == "photos"]
    )
    assert len([pair for pair in shown if pair[0] == "photos"]) == 10 and len(rows.epochs.mixture) == 29
    assert len(list(tmp_path.glob("manifest-*.npz"))) == 3
    layout = open_layout(data, TINY, tokenizer)
    record = open_sources(data)["photos"][3]
    assert layout.measure_one(record, 3)[0]["lengths"] == rows.manifests["photos"].lengths[3]


def test_a_run_goes_on_only_with_the_same_text(data, tokenizer, tmp_path):
    state = Batches(open_rows(data, TINY, tokenizer, cache=tmp_path), 2, num_threads=0).state()
    again = open_rows(data, TINY, tokenizer, cache=tmp_path, state=state, least_rows=100)
    assert len(again) >= 100
    Batches(again, 4, num_threads=0, state=state)
    for change, words in (
        ({"template": "llama_2"}, "data.template was 'v1' and is 'llama_2' now"),
        ({"views_per_row": 3}, "data.views_per_row was 2 and is 3 now"),
        ({"sources": {}}, "the source photos is not there any more"),
    ):
        rows = open_rows(dataclasses.replace(data, **change), TINY, tokenizer, cache=tmp_path, state=state)
        with pytest.raises(DataError, match=words):
            Batches(rows, 2, num_threads=0, state=state)
    other = open_rows(data, TINY, tokenizer.with_tokens("<im_start>"), cache=tmp_path, state=state)
    Batches(other, 2, num_threads=0, state=state)  # a token that no text has changes nothing


def test_every_order_shows_every_sample(data, tokenizer, tmp_path):
    shown = {}
    for order in ("packed", "shuffled", "modality_length"):
        how = dataclasses.replace(data, order=order)
        rows = open_rows(how, TINY, tokenizer, cache=tmp_path, global_batch=4)
        shown[order] = [rows.records_of(r).tolist() for r in range(len(rows))]
        if order != "packed":
            assert all(len(row) == 1 for row in shown[order])
    assert len({tuple(sorted(sum(rows, []))) for rows in shown.values()}) == 1
    has_image = [rows.manifest.images[row[0]] > 0 for row in shown["modality_length"]]
    steps = [has_image[k : k + 4] for k in range(0, len(has_image), 4)]
    mixed = [step for step in steps if len(set(step)) == 2]
    assert len(mixed) <= 2, "images and text are apart, but for the left-overs"

"""Dialogues of many turns as samples of two: which images go where, the index and its cache, what is left out."""

import json
import pickle

import pytest

from vlm_jax.config import ConfigError
from vlm_jax.data.flatten import Flattened, flatten
from vlm_jax.data.records import Record, RecordError, Records


def record(*turns, images=(), first="human"):
    roles = ("human", "gpt") if first == "human" else ("gpt", "human")
    return Record("7", tuple((roles[i % 2], text) for i, text in enumerate(turns)), images, "x.json: record 0")


class Listed(list):
    """Records with a fingerprint; those that are errors raise, and reads are counted."""

    fingerprint, reads = "abc", 0

    def __getitem__(self, index):
        self.reads += 1
        found = super().__getitem__(index)
        if isinstance(found, Exception):
            raise found
        return found


def questions(records, how="pairs"):
    return [(r.turns[0][1], r.turns[1][1] if len(r.turns) > 1 else None, r.images) for r in Flattened(records, how)]


def test_one_image_is_shown_with_every_question():
    shown = record("<image>\nIs it a dog?", "Yes", "Where?", "There", images=("a",))
    pairs = [("<image>\nIs it a dog?", "Yes", ("a",)), ("<image>\nWhere?", "There", ("a",))]
    assert questions([shown]) == questions([shown], "original") == pairs
    ids = [r.id for r in Flattened([shown, record("q", "a")])]
    assert ids == ["7#0", "7#1", "7"]
    assert Flattened([shown])[-1].where == "x.json: record 0, pair 1"


def test_text_only_dialogues_get_no_image_unless_as_the_original():
    spoken = record("q1", "a1", "q2", "a2")
    assert questions([spoken]) == [("q1", "a1", ()), ("q2", "a2", ())]
    assert questions([spoken], "original") == [("q1", "a1", ()), ("<image>\nq2", "a2", ())]


def test_an_image_that_is_named_later_is_not_shown_before():
    later = record("Hello", "Hi", "What is this? <image>", "A dog", "Sure?", "Yes", images=("a",))
    expected = [("Hello", "Hi", ()), ("What is this? <image>", "A dog", ("a",)), ("<image>\nSure?", "Yes", ("a",))]
    assert questions([later]) == expected


def test_several_images():
    many = record("<image>\n<image> same?", "No", "Why?", "Colour", "<image> and this?", "Blue", images=("a", "b", "c"))
    assert questions([many]) == [
        ("<image>\n<image> same?", "No", ("a", "b")),
        ("<image>\n<image>\nWhy?", "Colour", ("a", "b")),
        ("<image> and this?", "Blue", ("c",)),
    ]


def test_turns_without_a_partner():
    odd, started = record("q", "a", "q2"), record("hello", "q", "a", first="gpt")
    flat = Flattened([odd, started])
    assert [r.turns for r in flat] == [(("human", "q"), ("gpt", "a"))] * 2 and flat.dropped == 2
    assert questions([odd], "original") == [("q", "a", ()), ("<image>\nq2", None, ())]
    assert questions([started], "original") == [("hello", "q", ()), ("<image>\na", None, ())]


def test_records_that_cannot_be_used_stay_one_sample_each():
    flat = Flattened(Listed([record("q", "a", "q2", "a2"), RecordError("broken"), record("q", "a")]))
    assert len(flat) == 4
    with pytest.raises(RecordError, match="broken"):
        flat[2]
    assert flat[3].turns == flat[-1].turns == flat[0].turns
    with pytest.raises(IndexError):
        flat[4]


def test_the_index_is_kept(tmp_path):
    records = Listed([record("q", "a", "q2", "a2"), record("q", "a"), record("q", "a", "q")])
    flat, cache = Flattened(records, "pairs", tmp_path / "cache"), tmp_path / "cache"
    assert records.reads == 3 and len(list(cache.iterdir())) == 1
    again = Flattened(records, "pairs", cache)
    assert records.reads == 3 and (len(again), again.dropped) == (len(flat), flat.dropped) == (4, 1)
    original = Flattened(records, "original", cache)
    assert len(original) == 5 and len(list(cache.iterdir())) == 2
    assert flat.fingerprint == again.fingerprint != original.fingerprint
    records.fingerprint = "other"
    assert flat.fingerprint != original.fingerprint and len(Flattened(records, "pairs", cache)) == 4
    assert len(list(cache.iterdir())) == 3, "other records have another index"
    assert Flattened([record("q", "a")], cache=cache).fingerprint is None and len(list(cache.iterdir())) == 3


def test_pairs_of_a_record_in_a_row_read_it_once():
    records = Listed([record("q", "a", "q2", "a2"), record("q", "a")])
    flat, reads = Flattened(records), records.reads
    assert [r.id for r in flat] == ["7#0", "7#1", "7"] and records.reads == reads + 2
    assert [r.turns for r in pickle.loads(pickle.dumps(flat))] == [r.turns for r in flat]


def test_a_flattened_file_reads_as_the_flattened_records(tmp_path):
    turns = ["<image>\n<image> same?", "No", "Why?", "Colour", "and?"]
    named = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(turns)]
    raw = [
        {"id": 1, "image": ["a", "b"], "conversations": named, "model": "m"},
        {
            "id": 2,
            "image": "a",
            "conversations": [{"from": "human", "value": "<image> q"}, {"from": "gpt", "value": "a"}],
        },
        {"id": 3, "image": "a", "conversations": [*named[2:4], {"from": "human", "value": "<image>"}, named[3]]},
    ]
    before = json.dumps(raw)
    samples = flatten(raw)
    assert json.dumps(raw) == before and [s.get("model") for s in samples] == ["m", "m", None, None, None]
    assert [s.get("image") for s in samples] == [["a", "b"], ["a", "b"], "a", None, "a"]
    for name, content in (("raw", raw), ("flat", samples)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    ours = Flattened(Records(tmp_path / "raw.json"))
    assert [(r.turns, r.images) for r in ours] == [(r.turns, r.images) for r in Records(tmp_path / "flat.json")]
    with pytest.raises(RecordError, match="record 1 is no dialogue"):
        flatten([raw[0], {"id": 5}])
    with pytest.raises(ConfigError, match="pairs, original"):
        flatten(raw, "turns")

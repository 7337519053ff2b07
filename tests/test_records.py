"""Record files stay on disk: spans, caches, broken files, images in several places."""

import io
import json
import os
import pickle
import threading
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_jax.data import records as records_module
from vlm_jax.data import spans as spans_module
from vlm_jax.data.records import ImagePaths, RecordError, Records, record_of
from vlm_jax.data.spans import ListError, line_spans, list_spans

TEXT = st.text(st.sampled_from('"\\[]{},: \n\r\ta/é€😀\u2028') | st.characters(codec="utf-8"), max_size=12)
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)
LISTS = st.lists(VALUE, max_size=8)
CHUNKS = st.sampled_from([1, 2, 3, 7, 64, 1 << 20])
BOM = b"\xef\xbb\xbf"


def turns(*said):
    return [{"from": role, "value": value} for role, value in said]


def dialogue(k, image=None, **keys):
    mark = "" if image is None else "<image>\n" * (1 if isinstance(image, str) else len(image))
    record = {"id": f"r{k}", "conversations": turns(("human", f"{mark}What is {k}?"), ("gpt", f"It is {k}."))}
    return record | ({} if image is None else {"image": image}) | keys


def written(path, items, **style):
    path.write_text(json.dumps(items, **style), encoding="utf-8")
    return path


def parts(data, spans):
    return [json.loads(data[start:end].decode()) for start, end in spans.tolist()]


@settings(max_examples=300, deadline=None)
@given(LISTS, st.sampled_from([None, 0, 1, 4, "\t"]), st.booleans(), st.booleans(), st.booleans(), CHUNKS, st.data())
def test_spans_of_a_list_are_its_elements(items, indent, ascii, crlf, bom, chunk, data):
    text = json.dumps(items, indent=indent, ensure_ascii=ascii)
    text = data.draw(st.sampled_from(["", " \n", "\t"])) + text + data.draw(st.sampled_from(["", "\n\n ", "\r\n"]))
    content = BOM * bom + (text.replace("\n", "\r\n") if crlf else text).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spans_module, "CHUNK", chunk)
        assert parts(content, list_spans(io.BytesIO(content))) == items


@settings(max_examples=200, deadline=None)
@given(LISTS, st.booleans(), st.sampled_from(["\n", "\r\n", "\n\n", "\n \t\n"]), st.booleans(), st.booleans(), CHUNKS)
def test_spans_of_lines_are_its_elements(items, ascii, newline, last, bom, chunk):
    text = newline.join(json.dumps(item, ensure_ascii=ascii) for item in items) + newline * last
    content = BOM * bom + text.encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spans_module, "CHUNK", chunk)
        assert parts(content, line_spans(io.BytesIO(content))) == items


@settings(max_examples=150, deadline=None)
@given(LISTS, st.data(), CHUNKS)
def test_a_list_that_is_cut_short_never_passes(items, data, chunk):
    content = json.dumps(items).encode()
    cut = content[: data.draw(st.integers(1, len(content) - 1))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spans_module, "CHUNK", chunk)
        with pytest.raises(ListError) as caught:
            list_spans(io.BytesIO(cut))
    whole = caught.value.spans
    assert parts(content, whole) == items[: len(whole)]


def test_a_list_with_something_behind_it_is_refused(tmp_path):
    for rest, byte in ((" [", 8), ("]", 7), ("\n\n x", 10), ("\\", 7)):
        (tmp_path / "a.json").write_text("[{}, {}" + "]" + rest)
        with pytest.raises(RecordError, match=f"closed at byte 7 and something else follows at byte {byte + 1}"):
            Records(tmp_path / "a.json")


def test_the_first_record_that_breaks_the_list_is_named(tmp_path):
    items = [json.dumps(dialogue(k)) for k in range(5)]
    items[2] = items[2].replace('"What', "What")  # everything behind looks inside out
    (tmp_path / "a.json").write_text("[" + ",\n".join(items) + "]")
    with pytest.raises(RecordError, match=r"a.json: record 2 is not JSON, it begins at byte \d+: ") as caught:
        Records(tmp_path / "a.json")
    assert caught.value.reason == "not_json" and "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_bytes_that_are_no_text_leave_the_other_records_usable(tmp_path, suffix):
    items = [json.dumps(dialogue(k)).encode() for k in range(4)]
    items[1] = items[1].replace(b"What", b"Wh\xe4t")
    items[2] = items[2][:-1] + b" oops}"
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(b"[" + b",\n".join(items) + b"]" if suffix == "json" else b"\n".join(items))
    records = Records(path)
    with pytest.raises(
        RecordError, match=r"a.jsonl?: record 1 is not UTF-8 text \(byte (\d+) of the file is 0xe4\)"
    ) as caught:
        records[1]
    assert caught.value.reason == "encoding"
    assert path.read_bytes()[int(str(caught.value).split("byte ")[1].split()[0])] == 0xE4
    with pytest.raises(RecordError, match="record 2 is not") as caught:
        records[2]
    assert caught.value.reason == "not_json"
    assert [records[k].id for k in (0, 3, -1)] == ["r0", "r3", "r3"]


@pytest.mark.parametrize(
    "content, words, reason",
    [
        (b"\x1f\x8b\x08rest", "compressed with gzip: unpack it", "file"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "only the pointer of Git LFS", "file"),
        ('[{"id": 1}]'.encode("utf-16"), "UTF-16 text: save it as UTF-8", "encoding"),
        (b'{\n "id": 1,\n "conversations": []\n}', "is one object over several lines, not a list", "file"),
        (b"", "holds no records", "file"),
        (b"  [ \n ]  ", "holds no records", "file"),
    ],
)
def test_files_of_another_kind(tmp_path, content, words, reason):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(RecordError, match=words) as caught:
        Records(tmp_path / "a.json")
    assert str(caught.value).startswith(f"{tmp_path / 'a.json'} ") and caught.value.reason == reason


BROKEN = {
    "not_object": ["a list"],
    "no_conversations": {"id": 1},
    "roles": {"conversations": turns(("human", "a"), ("human", "b"))},
    "text": {"conversations": turns(("human", "a"), ("gpt", None))},
    "encoding": {"conversations": turns(("human", "a"), ("gpt", "\ud800"))},
    "no_answer": {"conversations": turns(("human", "a"))},
    "image_field": dialogue(1, "a.jpg") | {"image": 7},
    "image_count": dialogue(1) | {"image": "a.jpg"},
}


@pytest.mark.parametrize("reason", BROKEN)
def test_reasons(reason):
    with pytest.raises(RecordError) as caught:
        record_of(BROKEN[reason], 3, "a.json")
    assert caught.value.reason == reason
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.reason, str(again)) == (reason, str(caught.value))
    assert RecordError("anything").reason == "record"


def test_keys_that_are_not_read_and_ids_of_any_kind():
    odd = dialogue(1, "a.jpg", model="", source={"x": 1}, task="vqa", width=3)
    assert record_of(odd, 5).task == "vqa" and record_of(odd | {"task": 4}, 5).task == ""
    assert [record_of(odd | {"id": name}, 5).id for name in (12, "12", None)] == ["12", "12", "5"]
    assert record_of(odd | {"id": "two\nlines"}, 5, "a.json").where == "a.json: record 5 (id two lines)"
    said = turns(("gpt", "Hello."), ("human", "a"), ("gpt", "b"))
    assert [role for role, _ in record_of({"conversations": said}, 0).turns] == ["gpt", "human", "gpt"]


def test_images_in_several_places(tmp_path):
    roots = {"coco": "/disk/coco", "coco/val/": "/fast/val", "/old/place": "/new"}
    paths = ImagePaths("images", roots)
    assert paths("coco/train/1.jpg") == "/disk/coco/train/1.jpg"
    assert paths("coco/val/1.jpg") == "/fast/val/1.jpg"
    assert paths("coco2/1.jpg") == "images/coco2/1.jpg"  # a name that only begins alike
    assert (paths("/old/place/x/1.jpg"), paths("/other/1.jpg")) == ("/new/x/1.jpg", "/other/1.jpg")
    assert ImagePaths()("a/b.jpg") == "a/b.jpg"
    file = written(tmp_path / "a.json", [dialogue(0, ["coco/1.jpg", "b.jpg"])])
    assert Records(file, tmp_path, roots=roots)[0].images == ("/disk/coco/1.jpg", str(tmp_path / "b.jpg"))


def test_second_start_maps_the_spans_and_notices_every_change(tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    file = written(tmp_path / "a.json", [dialogue(k) for k in range(9)])
    first = Records(file, cache=cache)
    before = os.stat(file)
    with monkeypatch.context() as patch:
        patch.setattr(records_module, "list_spans", lambda file: pytest.fail("looked for the records again"))
        again = Records(file, cache=cache)
    assert [r.turns for r in again] == [r.turns for r in first] and again.fingerprint == first.fingerprint
    assert isinstance(again._spans.rows.base, np.memmap) and len(pickle.dumps(again)) < 1000
    assert [r.id for r in pickle.loads(pickle.dumps(again))] == [f"r{k}" for k in range(9)]
    swapped = [dialogue(k) for k in (1, 0, *range(2, 9))]  # as long, and of the same date
    written(file, swapped)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert os.stat(file).st_size == before.st_size
    changed = Records(file, cache=cache)
    assert changed[0].id == "r1" and changed.fingerprint != first.fingerprint
    assert Records(file, "elsewhere").fingerprint != changed.fingerprint != Records(file, roots={"a": "b"}).fingerprint


def test_a_cache_that_is_damaged_or_cannot_be_written_does_no_harm(tmp_path, caplog):
    file = written(tmp_path / "a.json", [dialogue(k) for k in range(3)])
    Records(file, cache=tmp_path / "cache")
    (kept,) = (tmp_path / "cache").iterdir()
    for damage in (b"", kept.read_bytes()[:-9]):
        kept.write_bytes(damage)
        assert len(Records(file, cache=tmp_path / "cache")) == 3 and "is damaged and is made again" in caplog.text
        assert list((tmp_path / "cache").iterdir()) == [kept] and np.load(kept).shape == (3, 2)
        caplog.clear()
    assert len(Records(file, cache=file / "below a file")) == 3 and "not kept for the next start" in caplog.text


def test_a_file_that_changes_under_a_run_is_noticed(tmp_path):
    file = written(tmp_path / "a.json", [dialogue(k) for k in range(3)])
    records = pickle.dumps(Records(file))
    written(file, [dialogue(k) for k in range(4)])
    with pytest.raises(RecordError, match="a.json has changed since this run began") as caught:
        pickle.loads(records)[0]
    assert caught.value.reason == "file"


def test_threads_share_a_file(tmp_path):
    records = Records(written(tmp_path / "a.json", [dialogue(k, text="x" * (k % 50)) for k in range(400)]))
    wrong, order = [], np.random.default_rng(0).integers(0, 400, (8, 400)).tolist()

    def read(numbers):
        wrong.extend(k for k in numbers if records[k].id != f"r{k}")

    threads = [threading.Thread(target=read, args=(numbers,)) for numbers in order]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_large_file_is_not_held_in_memory(tmp_path):
    file = written(tmp_path / "a.json", [dialogue(k, text="word, " * 1000) for k in range(4000)], indent=1)
    tracemalloc.start()
    records = Records(file)
    now, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(records) == 4000 and file.stat().st_size > 24e6
    assert now < 1e6 and most < 16e6

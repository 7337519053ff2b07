"""Sources of every kind: published files, tar shards, ArrayRecord, TFDS; the same data gives the same records."""

import dataclasses
import io
import json
import pickle
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from vlm_jax.config import ConfigError, UserError
from vlm_jax.data import array_records, tar_shards
from vlm_jax.data.image_source import ImageSource
from vlm_jax.data.images import check_exists, image_size, open_image
from vlm_jax.data.options import DataConfig, Source
from vlm_jax.data.records import RecordError
from vlm_jax.data.smartwatch_files import WatchSet, generate
from vlm_jax.data.sources import expand, open_source

pytest.importorskip("array_record")


def turns(*texts):
    return [{"from": ("human", "gpt")[k % 2], "value": text} for k, text in enumerate(texts)]


def jpeg(seed, width=12, height=9):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def opened(path, folder="", cache=None, **keys):
    source = Source(path=str(path), **{k: keys.pop(k) for k in ("task", "flatten") if k in keys})
    return open_source(source, DataConfig(image_folder=str(folder), **keys), cache)


def content(record):
    """What must not depend on the kind of the source."""
    return record.id, record.turns, record.task, [ImageSource.of(image).read() for image in record.images]


# The published files, in exactly their shapes (llava.md 1.1, 10; unified.md 1.3, 2; clip_flant5.md 3.4), cut to a record or two.
QUESTION, ANSWER = "Give a brief description of the given image.", "the cover of a book"
PUBLISHED = {
    "blip_laion_cc_sbu_558k.json": [
        {"id": "004539375", "image": "00453/004539375.jpg", "conversations": turns(f"{QUESTION}\n<image>", ANSWER)},
        {"id": "002239345", "image": "00223/002239345.jpg", "conversations": turns(f"<image>\n{QUESTION}", ANSWER)},
    ],
    "llava_v1_5_mix665k.json": [
        {"id": "000000033471", "image": "coco/train2017/000000033471.jpg",
         "conversations": turns("<image>\nWhat are the colors of the bus?", "White and red.", "Is it parked?", "No.")},
        {"id": "VG_100K_2/1", "image": "vg/VG_100K_2/1.jpg",
         "conversations": turns("<image>\nProvide a short description for this region.\n[0.1, 0.2, 0.33, 0.5]", "A cup")},
        {"id": "wgByO4Y_0", "model": "", "conversations": turns("Write a poem", "No.")},
    ],
    "chat.json": [
        {"id": "GCC_train_000000000", "image": "GCC_train_000000000.jpg", "conversations": turns("a\n<image>", "b")}
    ],
    "llava_instruct_150k.json": [{"id": "000000033471", "image": "000000033471.jpg", "conversations": turns("a\n<image>", "b")}],
    "sharegpt4v_instruct_gpt4-vision_cap100k.json": [
        {"id": "sa_10039", "image": "sam/images/sa_10039.jpg", "conversations": turns(f"{QUESTION}\n<image>", "Long.")},
        {"id": "000000000009", "image": "coco/train2017/000000000009.jpg", "conversations": turns("<image>\na", "b")},
    ],
    "share-captioner_coco_lcs_sam_1246k_1107.json": [
        {"id": "0", "image": "llava/llava_pretrain/images/00453/004539375.jpg", "conversations": turns("<image>\na", "b")}
    ],
    "sharegpt4v_mix665k_cap23k_coco-ap9k_lcs3k_sam9k_div2k.json": [
        {"id": "identity", "model": "", "conversations": turns("Who are you?", "A model.")},
        *({"id": k, "image": f"{name}/images/{k}.jpg", "conversations": turns("<image>\na", "b")}
          for k, name in enumerate(("web-celebrity", "web-landmark", "wikiart", "share_textvqa"))),
    ],
    "chat_llavar.json": [
        {"id": "GCC_train_x", "image": "GCC_train_x.jpg",
         "conversations": turns("Identify any text visible in the image provided.\n<image>", "THE BOOK")}
    ],
    "llava_instruct_150k_llavar_16k.json": [
        {"id": "7", "image": "000000000007.jpg", "conversations": turns("<image>\nWho wrote it?", "Me.", "When?", "1999")}
    ],
    "llava_v1_5_mix665k_flattened_multi_turn.json": [
        {"id": "x", "image": "gqa/images/1.jpg", "conversations": turns("<image>\nIs it a dog?", "Yes")},
        {"id": "x", "image": "gqa/images/1.jpg", "conversations": turns("<image>\nWhere?", "There")},
    ],
    "smart_watch_train.json": [
        {"task": "generation", "image": "0.png", "conversations": turns("Draw a watch at 10:10.", "Here it is. \n<image>")},
        {"task": "vqa", "image": "0.png", "conversations": turns("<image>\nWhat time is it?", "10:10:00")},
        {"task": "caption", "image": "0.png", "conversations": turns("<image>\nDescribe it.", "A watch.")},
    ],
}  # fmt: skip


@pytest.mark.parametrize("style", [{}, {"indent": 4}, {"indent": 2, "ensure_ascii": False}])
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files(tmp_path, name, style):
    items = PUBLISHED[name]
    (tmp_path / name).write_text(json.dumps(items, **style), encoding="utf-8")
    lines = tmp_path / f"{name}l"
    lines.write_text("\n".join(map(json.dumps, items)))
    roots = {"sam/images": "/sam", "coco": "/disk/coco", "vg/VG_100K_2": "/vg2"}
    records = list(opened(tmp_path / name, "/images", image_roots=roots))
    assert [[text for _, text in r.turns] for r in records] == [[t["value"] for t in i["conversations"]] for i in items]
    assert [r.task for r in records] == [i.get("task", "understanding") for i in items]
    assert [r.id for r in records] == [str(i.get("id", k)) for k, i in enumerate(items)]
    for record, item in zip(records, items, strict=True):
        wanted = item.get("image", "")
        head = next((key for key in roots if wanted.startswith(key)), "")
        assert record.images == (
            (roots.get(head, "/images") + "/" + wanted.removeprefix(head).strip("/"),) if wanted else ()
        )
    again = [dataclasses.replace(r, where="") for r in opened(lines, "/images", image_roots=roots)]
    assert again == [dataclasses.replace(r, where="") for r in records]


@pytest.fixture
def everything(tmp_path):
    """The same twelve records as JSON, JSONL, tar, ArrayRecord and TFDS: no, one or three images, several rounds, odd text."""
    images = tmp_path / "images"
    images.mkdir()
    for k in range(6):
        (images / f"{k}.jpg").write_bytes(jpeg(k))
    items = []
    for k in range(12):
        shown = [f"{k % 6}.jpg"] if k % 3 == 1 else [f"{(k + j) % 6}.jpg" for j in range(3)] if k % 3 == 2 else []
        said = turns("<image>\n" * len(shown) + f'é [{k}] "?"', "A\n{1}", *(["More?", "😀"] if k % 2 else []))
        item = {"id": f"r{k}", "conversations": said, "model": "", **({"task": "vqa"} if k == 4 else {})}
        items.append(item | ({"image": shown if k % 3 == 2 else shown[0]} if shown else {}))
    (tmp_path / "all.json").write_text(json.dumps(items, indent=2))
    (tmp_path / "all.jsonl").write_text("\n".join(map(json.dumps, items)))
    for shard in range(2):
        members = {}
        for k in range(6 * shard, 6 * shard + 6):
            members[f"{k:03d}.json"] = json.dumps(items[k]).encode()
            shown = items[k].get("image", [])
            for j, name in enumerate([shown] if isinstance(shown, str) else shown):
                members[f"{k:03d}.{j}.jpg"] = (images / name).read_bytes()
        write_tar(tmp_path / f"all-{shard:03d}.tar", members)
    return tmp_path


def write_tar(path, members, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_every_kind_gives_the_same_records(everything):
    expected = [content(r) for r in opened(everything / "all.json", everything / "images")]
    assert len(expected) == 12 and [len(e[3]) for e in expected[:3]] == [0, 1, 3] and expected[4][2] == "vqa"
    direct = opened(everything / "all.json", everything / "images")
    written = array_records.write(direct, everything / "shards", "mine", shards=3, threads=2)
    assert (written.records, written.skipped, len(written.files)) == (12, (), 3) and written.reasons == {}
    llava_mixture = pytest.importorskip("vlm_jax.data.llava_mixture")
    llava_mixture.build(direct, everything / "tfds", threads=2)
    kinds = {
        "all.jsonl": everything / "images",
        "all-*.tar": "",
        "all-{000..001}.tar": "",
        "shards": "",
        "shards/mine-*.array_record": "",
        "tfds": "",
        "tfds/llava_mixture/1.0.0": "",
    }
    for kind, folder in kinds.items():
        records = opened(everything / kind, folder, everything / "cache")
        for one in (
            records,
            pickle.loads(pickle.dumps(records)),
            opened(everything / kind, folder, everything / "cache"),
        ):
            assert [content(r) for r in one] == expected, kind
            assert one.fingerprint == records.fingerprint
        assert content(records[-1]) == expected[-1]
        with pytest.raises(IndexError):
            records[12]
        for image in records[1].images:
            source = ImageSource.of(image, "x")
            check_exists(source)
            assert image_size(source) == (12, 9) and open_image(source).size == (12, 9)
    assert "tensorflow" not in sys.modules


def test_tasks_and_flattening(everything):
    file, folder = everything / "all.json", everything / "images"
    assert {r.task for r in opened(file, folder, task="generation")} == {"generation"}
    pairs = opened(file, folder, flatten="pairs")
    assert len(pairs) == 18 and all(len(r.turns) == 2 for r in pairs)
    prints = {opened(file, folder, **keys).fingerprint for keys in ({}, {"task": "vqa"}, {"flatten": "pairs"})}
    prints |= {opened(file, "elsewhere").fingerprint, opened(file, folder, image_roots={"a": "b"}).fingerprint}
    assert len(prints) == 5


def test_a_source_has_its_own_image_folder(everything):
    data = DataConfig(image_folder="shared")
    own = open_source(Source(path=str(everything / "all.json"), image_folder="own"), data)
    assert own[1].images == ("own/1.jpg",)
    assert open_source(Source(path=str(everything / "all.json")), data)[1].images == ("shared/1.jpg",)


def test_a_folder_of_drawn_watches(tmp_path):
    generate(tmp_path / "watches", WatchSet(2, style="published"), progress=False)
    records = opened(tmp_path / "watches")
    assert [r.task for r in records] == ["generation", "vqa", "caption"] * 2
    assert open_image(ImageSource.of(records[5].images[0])).size == (224, 224)


def test_tar_captions_and_the_layout_of_img2dataset(tmp_path):
    members = {
        "a/000.jpg": jpeg(0),
        "a/000.txt": b"A cat.\n",
        "a/000.json": json.dumps({"url": "x", "caption": "no"}).encode(),
    }
    members |= {"a/001.jpg": jpeg(1), "a/001.json": json.dumps({"key": "001", "caption": "A dog."}).encode()}
    members |= {"a/.hidden": b"x", "a/002.cls": b"3", "a/002.PNG": jpeg(2), "a/002.txt": "Ein Häuschen".encode()}
    records = list(opened(write_tar(tmp_path / "x.tar", members)))
    assert [r.id for r in records] == ["000", "001", "002"]
    assert [r.turns for r in records] == [
        (("human", "<image>"), ("gpt", text)) for text in ("A cat.", "A dog.", "Ein Häuschen")
    ]
    assert [r.images[0].member for r in records] == ["a/000.jpg", "a/001.jpg", "a/002.PNG"]
    assert records[0].where == f"{tmp_path / 'x.tar'}: record 0 (id 000)"


def test_tar_images_by_name_and_by_number(tmp_path):
    said = turns("<image>" * 3, "x")
    record = {"conversations": said}
    eleven = {"conversations": turns("<image>" * 11, "x")}
    members = {f"a.{k}.jpg": jpeg(k) for k in (0, 1, 10, 2, 3, 4, 5, 6, 7, 8, 9)} | {
        "a.json": json.dumps(eleven).encode()
    }
    members |= {f"b.{name}.jpg": jpeg(20) for name in ("left", "right", "top")}
    members["b.json"] = json.dumps(record | {"image": ["top.jpg", "b.left.jpg", "b/b.right.jpg"]}).encode()
    members |= {f"c.{name}.jpg": jpeg(20) for name in ("left", "right", "top")}
    members["c.json"] = json.dumps(record | {"image": ["coco/1.jpg", "coco/2.jpg", "coco/3.jpg"]}).encode()
    records = opened(write_tar(tmp_path / "x.tar", members))
    shown = [[image.member for image in r.images] for r in records]
    assert shown[0] == [f"a.{k}.jpg" for k in range(11)]
    assert shown[1:] == [["b.top.jpg", "b.left.jpg", "b.right.jpg"], ["c.left.jpg", "c.right.jpg", "c.top.jpg"]]


def test_tar_records_that_cannot_be_used_leave_the_others(tmp_path):
    good = json.dumps({"conversations": turns("a", "b")}).encode()
    members = {"0.json": b"{", "1.json": b'{"caption": "\xe4"}', "2.jpg": jpeg(0), "3.txt": b"no image", "4.json": good}
    members |= {"5.json": b'{"url": "x"}', "5.jpg": jpeg(0), "6.json": b"[1]"}
    records, reasons = opened(write_tar(tmp_path / "x.tar", members)), []
    for k in range(len(records)):
        try:
            records[k]
            reasons.append("")
        except RecordError as error:
            assert str(error).startswith(f"{tmp_path / 'x.tar'}: record {k} ")
            reasons.append(error.reason)
    assert reasons == ["not_json", "encoding", "no_conversations", "image_count", "", "no_conversations", "not_object"]


def test_tar_headers_are_read_once_and_changes_are_noticed(tmp_path, monkeypatch):
    path, cache = tmp_path / "x.tar", tmp_path / "cache"
    write_tar(path, {f"{k}.txt": b"x" for k in range(5)} | {f"{k}.jpg": b"x" for k in range(5)})
    first = opened(path, cache=cache)
    with monkeypatch.context() as patch:
        patch.setattr(tar_shards, "_members", lambda path: pytest.fail("read the headers again"))
        assert opened(path, cache=cache).fingerprint == first.fingerprint
        assert len(pickle.dumps(opened(path, cache=cache))) < 2000
    write_tar(path, {"1.json": json.dumps({"conversations": turns("a", "b")}).encode()})
    changed = opened(path, cache=cache)
    assert len(changed) == 1 and changed.fingerprint != first.fingerprint


def test_tar_files_that_are_compressed_or_broken(tmp_path):
    members = {f"{k}.txt": b"x" * 3000 for k in range(5)}
    with pytest.raises(RecordError, match="x.tar.gz is compressed, .*: unpack it"):
        opened(write_tar(tmp_path / "x.tar.gz", members, "w:gz"))
    (tmp_path / "y.tar").write_bytes((tmp_path / "x.tar.gz").read_bytes())
    with pytest.raises(RecordError, match="y.tar is compressed, so its members cannot be read one by one: unpack it"):
        opened(tmp_path / "y.tar")
    whole = write_tar(tmp_path / "z.tar", members).read_bytes()
    for k, cut in enumerate(
        (whole[:9000], whole[:8400], whole[:3584] + b"garbage!" * 64 + whole[4096:], b"", b"no tar" * 200)
    ):
        (tmp_path / f"{k}.tar").write_bytes(cut)
        with pytest.raises(RecordError, match=rf"{k}.tar is not a whole tar file: .*; fetch it again"):
            opened(tmp_path / f"{k}.tar")
    write_tar(tmp_path / "no.tar", {"readme": b"x"})
    with pytest.raises(RecordError, match="no.tar holds no records: a shard needs members such as 7.json"):
        opened(tmp_path / "no.tar")


def test_patterns(tmp_path):
    assert expand("a-{0..2}-{x,y}") == [f"a-{k}-{c}" for k in range(3) for c in "xy"]
    assert expand("{002..000}") == ["002", "001", "000"] and expand("{a}.json") == ["{a}.json"]
    for k in (2, 0, 10):
        (tmp_path / f"p{k:02d}.json").write_text(json.dumps([{"id": k, "conversations": turns("a", "b")}]))
    (tmp_path / "p[1].json").write_text(json.dumps([{"id": "odd", "conversations": turns("a", "b")}]))
    assert [r.id for r in opened(tmp_path / "p??.json")] == ["0", "2", "10"]
    assert [r.id for r in opened(tmp_path / "p{10,02}.json")] == ["10", "2"]
    assert [r.id for r in opened(tmp_path / "p[1].json")] == ["odd"], "a file of that name goes before the pattern"


@pytest.mark.parametrize(
    "path, words",
    [
        ("", "a source has no path: set data.path, or data.sources.NAME.path"),
        ("nowhere-*.tar", "no file matches .*nowhere-\\*.tar: check data.path"),
        ("nowhere.json", "nowhere.json does not exist: check data.path"),
        ("nowhere-{0..1}.tar", "nowhere-0.tar does not exist"),
        ("nowhere", "nowhere does not exist"),
        ("notes.txt", "notes.txt is of an unknown kind: a source is a .json"),
        ("x.jsonl.gz", "x.jsonl.gz is compressed, so its records cannot be read one by one: unpack it"),
        ("empty", "empty is a folder without .array_record or .tar shards and no TFDS data set"),
        ("x-train.array_record-00000-of-00002", "is a file of a TFDS data set: name its folder"),
        (
            "lost-*.array_record",
            "lost lacks 2 of its 3 shards, the first is .*lost-00000-of-00003.array_record: fetch it",
        ),
        ("bad.array_record", "bad.array_record cannot be read as ArrayRecord .*: make it again"),
    ],
)
def test_sentences(tmp_path, path, words):
    (tmp_path / "empty").mkdir()
    for name in ("notes.txt", "x.jsonl.gz", "x-train.array_record-00000-of-00002", "lost-00001-of-00003.array_record"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "bad.array_record").write_bytes(b"no records" * 9000)
    with pytest.raises(UserError, match=words) as caught:
        opened(tmp_path / path if path else "")
    assert "\n" not in str(caught.value)


def test_writing_skips_and_counts_what_cannot_be_used(tmp_path):
    (tmp_path / "0.jpg").write_bytes(jpeg(0))
    (tmp_path / "cut.jpg").write_bytes(jpeg(1, 80, 60)[:900])
    (tmp_path / "page.jpg").write_bytes(b"<html></html>")
    names = ["0.jpg", "cut.jpg", "0.jpg", "page.jpg", "gone.jpg", "0.jpg", "cut.jpg"]
    items = [{"id": k, "image": n, "conversations": turns("<image>", str(k))} for k, n in enumerate(names)]
    items += [{"id": 7}, {"id": 8, "conversations": turns("text", "only")}]
    (tmp_path / "a.json").write_text(json.dumps(items))
    written = array_records.write(opened(tmp_path / "a.json", tmp_path), tmp_path / "out", shards=2, threads=2)
    assert (written.records, written.images) == (4, 2), "each image once in a shard"
    assert written.reasons == {"broken": 2, "not_an_image": 1, "missing": 1, "no_conversations": 1}
    assert [one.index for one in written.skipped] == [1, 3, 4, 6, 7]
    assert written.skipped[0].sentence.startswith(
        f"image {tmp_path / 'cut.jpg'} of {tmp_path / 'a.json'}: record 1 (id 1) "
    )
    assert [r.id for r in opened(tmp_path / "out")] == ["0", "2", "5", "8"]
    index = json.loads((tmp_path / "out" / "data.index.json").read_text())
    assert (index["records"], index["images"], index["skipped"]) == (4, 2, written.reasons)
    assert [shard["file"] for shard in index["shards"]] == [file.name for file in written.files]
    assert index["bytes"] == written.bytes == sum(file.stat().st_size for file in written.files)
    assert not list((tmp_path / "out").glob("*.partial"))
    with pytest.raises(ConfigError, match="data-00000-of-00002.array_record is there already"):
        array_records.write(opened(tmp_path / "a.json", tmp_path), tmp_path / "out")
    again = array_records.write(opened(tmp_path / "a.json", tmp_path), tmp_path / "again", shards=2)
    assert [a.read_bytes() == b.read_bytes() for a, b in zip(again.files, written.files)] == [True, True]
    assert opened(tmp_path / "out").fingerprint == opened(tmp_path / "again").fingerprint
    with pytest.raises(RecordError, match="none of the 1 records can be written to .*; the first: .*gone.jpg"):
        array_records.write([opened(tmp_path / "a.json", tmp_path)[4]], tmp_path / "none")
    assert not list((tmp_path / "none").glob("*.array_record"))


def test_an_array_record_of_others_or_damaged(everything):
    from array_record.python.array_record_module import ArrayRecordWriter

    other = everything / "other.array_record"
    writer = ArrayRecordWriter(str(other), "group_size:1")
    writer.write(b"[1]")
    writer.close()
    with pytest.raises(
        RecordError, match="other.array_record is an ArrayRecord file, but not one that `data build` writes"
    ):
        opened(other)
    records = opened(everything / "all.json", everything / "images")
    (file,) = array_records.write(records, everything / "x", shards=1).files
    data = bytearray(file.read_bytes())
    at = data.index(b"r7")
    data[at : at + 2] = b"??"
    file.write_bytes(data)
    damaged = opened(file)
    with pytest.raises(RecordError, match="record 7 cannot be read: .* is damaged") as caught:
        damaged[7]
    assert caught.value.reason == "file" and damaged[8].id == "r8"
    data[data.index(jpeg(1)) + 50] ^= 1
    file.write_bytes(data)
    with pytest.raises(OSError, match="damaged"):
        opened(file)[1].images[0].read()


def test_tfds_from_a_file_with_broken_images(tmp_path):
    llava_mixture = pytest.importorskip("vlm_jax.data.llava_mixture")
    (tmp_path / "0.jpg").write_bytes(jpeg(0))
    items = [{"id": k, "image": f"{k % 2}.jpg", "conversations": turns("<image>", str(k))} for k in range(4)]
    (tmp_path / "a.json").write_text(json.dumps(items))
    written = llava_mixture.build(opened(tmp_path / "a.json", tmp_path), tmp_path / "data", shards=2)
    assert (written.records, written.images, written.reasons, len(written.files)) == (2, 2, {"missing": 2}, 2)
    assert [r.id for r in opened(tmp_path / "data")] == ["0", "2"]
    with pytest.raises(ConfigError, match="is there already"):
        llava_mixture.build(opened(tmp_path / "a.json", tmp_path), tmp_path / "data")
    builder = llava_mixture.LlavaMixture(
        path=str(tmp_path / "a.json"), image_folder=str(tmp_path), data_dir=str(tmp_path / "other")
    )
    builder.download_and_prepare()
    assert [example["image_names"] for example in builder.as_data_source("train")] == [
        [str(tmp_path / "0.jpg").encode()]
    ] * 2
    assert builder.as_data_source("train")[0]["images"][0].shape == (9, 12, 3), "as TFDS decodes them"
    home = tmp_path / "data" / "llava_mixture"
    (home / "2.0.0").mkdir()
    (home / "2.0.0" / "dataset_info.json").write_text("{}")
    with pytest.raises(RecordError, match="holds 2 TFDS data sets: name the folder of one version, such as"):
        opened(tmp_path / "data")
    with pytest.raises(RecordError, match="2.0.0 cannot be read as a TFDS data set"):
        opened(home / "2.0.0")

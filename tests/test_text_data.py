"""Records, templates, prompts and the length-grouped order, apart from what recorded goldens say."""

import json
import pickle

import numpy as np
import pytest

from tests.tiny_tokenizers import llama_directory
from vlm_jax.config import IGNORE, IMAGE
from vlm_jax.data.records import Records, record_of
from vlm_jax.data.sampler import group_by_length, group_by_modality_length
from vlm_jax.data.tasks import TextFormat, place_images, prompt
from vlm_jax.data.templates import template, template_of_model
from vlm_jax.data.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(llama_directory(tmp_path_factory.mktemp("tokenizer"), legacy=False))


def raw(k, image=None, **keys):
    mark = "" if image is None else "<image>" * (len(image) if isinstance(image, list) else 1)
    turns = [{"from": "human", "value": f"{mark}\nWhat is {k}?"}, {"from": "gpt", "value": f"It is {k}."}]
    return {"id": k, "conversations": turns, **({} if image is None else {"image": image}), **keys}


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_records_of_both_kinds(tmp_path, suffix):
    items = [
        raw(1, "a/b.jpg", model="x", source="y"),
        raw("é"),
        raw(3, ["c.png", "d.png"]),
        raw(4, ""),
        raw(5, []),
    ]
    items[3]["conversations"][0]["value"] = items[4]["conversations"][0]["value"] = "text"
    file = tmp_path / f"data.{suffix}"
    text = (
        json.dumps(items, indent=1)
        if suffix == "json"
        else "\n\n".join(json.dumps(i, ensure_ascii=False) for i in items)
    )
    file.write_bytes(b"\xef\xbb\xbf" * (suffix == "json") + text.encode())
    records = pickle.loads(pickle.dumps(Records(file, tmp_path / "images")))
    assert [record.id for record in records] == ["1", "é", "3", "4", "5"]
    assert records[0].images == (str(tmp_path / "images" / "a/b.jpg"),) and records[-4].images == ()
    assert [len(record.images) for record in records] == [1, 0, 2, 0, 0]
    assert records[2].where == f"{file}: record 2 (id 3)"
    with pytest.raises(IndexError):
        records[5]


def test_roles_by_other_names_and_records_without_id():
    item = raw("x")
    del item["id"]
    for turn, name in zip(item["conversations"], ("user", "assistant")):
        turn["from"] = name
    record = record_of(item, 7)
    assert record.id == "7" and [role for role, _ in record.turns] == ["human", "gpt"]


def test_template_of_model_names():
    names = {
        "liuhaotian/llava-v1.5-7b": "llava_v1",
        "llava-llama-2-13b-chat": "llava_llama_2",
        "LLaVA-v1.6-Mistral-7b/": "mistral_instruct",
        "llava-v1.6-34b": "chatml_direct",
        "LLaVA-Lightning-MPT-7B-preview": "mpt",
        "llava-7b-delta-v0": "llava_v0",
        "SALT-NLP/LLaVAR-13b-v1": "llavar_llava_v1",
        "runs/llava-v1-x/checkpoint-200": "llava_v1",
    }
    assert {name: template_of_model(name) for name in names} == names
    assert all(template(chosen) for chosen in names.values())


def test_prompts(tokenizer):
    v1 = template("vicuna_v1")
    tokens = prompt("What is it?", tokenizer, v1, images=2)
    assert tokens.dtype == np.int32 and (tokens == IMAGE).sum() == 2
    shown = tokenizer.decode(tokens, skip_special=False)
    assert shown == f"{v1.system} USER: <image>\n<image>\nWhat is it? ASSISTANT:"
    same = prompt(["Look at <image-placeholder>.", "I do.", "And?"], tokenizer, v1, images=1, start_end=True)
    assert tokenizer.decode(same, skip_special=False) == (
        f"{v1.system} USER: Look at <im_start><image><im_end>. ASSISTANT: I do.</s>USER: And? ASSISTANT:"
    )
    assert prompt("ignored", tokenizer, template("plain"), images=1).tolist() == [tokenizer.bos_id, IMAGE]
    assert IMAGE not in prompt("no image", tokenizer, template("mpt"))


def test_image_tokens_stay_or_move(tokenizer):
    turns = [("human", "a <image> b"), ("gpt", "c")]
    assert place_images(turns, template("v1"))[0][1] == "<image>\na  b"
    assert place_images(turns, template("v1"), keep=True)[0][1] == "a <image> b"
    assert (
        place_images(turns, template("v1_mmtag"), start_end=True, keep=True)[0][1]
        == "a <Image><im_start><image><im_end></Image> b"
    )
    record = record_of({"image": "x.jpg", "conversations": [{"from": r, "value": t} for r, t in turns]}, 0)
    moved, kept = (TextFormat(tokenizer, template("v1"), keep_images=keep)(record) for keep in (None, True))
    assert np.argmax(moved.tokens == IMAGE) < np.argmax(kept.tokens == IMAGE)
    both = {
        "image": ["x.jpg", "y.jpg"],
        "conversations": [{"from": "human", "value": "<image> or <image>?"}, *record_turns("the first")],
    }
    assert (TextFormat(tokenizer, template("v1"))(record_of(both, 1)).tokens == IMAGE).sum() == 2


def record_turns(answer):
    return [{"from": "gpt", "value": answer}]


def test_text_only_dialogues_are_cut_and_images_never(tokenizer):
    long = record_of(raw("word " * 60), 0)
    whole, cut = (TextFormat(tokenizer, template("v1"), max_length=n)(long) for n in (None, 100))
    assert len(whole.tokens) > len(cut.tokens) == len(cut.labels) == 100
    assert (cut.tokens == whole.tokens[:100]).all() and (cut.labels == whole.labels[:100]).all()
    shown = record_of(raw("word " * 60, "a.jpg"), 0)
    assert len(TextFormat(tokenizer, template("v1"), max_length=100)(shown).tokens) > 100


def test_fingerprints_follow_what_samples_depend_on(tokenizer):
    forms = [
        TextFormat(tokenizer, template("v1")),
        TextFormat(tokenizer, template("llava_v1")),
        TextFormat(tokenizer, template("v1"), compat="llava"),
        TextFormat(tokenizer, template("v1"), max_length=9),
        TextFormat(tokenizer.with_tokens("<x>"), template("v1")),
    ]
    assert len({form.fingerprint for form in forms}) == len(forms)
    again = pickle.loads(pickle.dumps(forms[0]))
    assert again.fingerprint == forms[0].fingerprint
    assert (again(record_of(raw(1), 0)).labels != IGNORE).any()


@pytest.mark.parametrize("seed", range(6))
def test_length_grouping_takes_every_sample_once(seed):
    rng = np.random.default_rng(seed)
    lengths = [int(n) for n in rng.integers(1, 200, 97) * rng.choice([1, 1, -1], 97)]
    order = group_by_modality_length(lengths, 3, 4, rng.permutation)
    assert sorted(order) == list(range(97))
    for start in range(0, 97 - 24, 12):  # all but the left-overs of both kinds
        assert len({lengths[i] > 0 for i in order[start : start + 12]}) == 1
    assert sorted(group_by_length([abs(n) for n in lengths], 3, 4, rng.permutation)) == list(range(97))

"""Contract 10, text: broken records, unknown templates and foreign tokenizers each give one sentence that
names file and record.
"""

import json

import pytest

from tests.tiny_tokenizers import byte_level_directory, llama_directory
from vlm_jax.data.records import RecordError, Records
from vlm_jax.data.tasks import TextFormat, prompt
from vlm_jax.data.templates import TemplateError, template
from vlm_jax.data.tokenizer import TokenizerError, check_vocabulary, load_tokenizer

GOOD = {
    "id": "good",
    "image": "a.jpg",
    "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}],
}


def dialogue(*turns, **keys):
    return {"id": 17, "conversations": [{"from": role, "value": value} for role, value in turns], **keys}


BROKEN = {
    "no conversations": ({"id": 17, "image": "a.jpg"}, "has no `conversations`"),
    "empty conversations": (dialogue(), "has no `conversations`"),
    "conversations of another kind": ({"id": 17, "conversations": "hello"}, "has no `conversations`"),
    "roles out of order": (
        dialogue(("human", "a"), ("human", "b"), ("gpt", "c")),
        "roles out of order: turn 1 is again human",
    ),
    "roles out of order later": (
        dialogue(("human", "a"), ("gpt", "b"), ("gpt", "c")),
        "roles out of order: turn 2 is again gpt",
    ),
    "unknown role": (dialogue(("system", "a"), ("gpt", "b")), "from 'system': `from` must be human or gpt"),
    "no role": ({"id": 17, "conversations": [{"value": "a"}]}, "from None: `from` must be"),
    "turn of another kind": ({"id": 17, "conversations": ["a", "b"]}, "from None: `from` must be"),
    "value is a number": (dialogue(("human", "a"), ("gpt", 4)), "turn 1 whose value is int, not text"),
    "value is null": (dialogue(("human", None), ("gpt", "b")), "turn 0 whose value is NoneType, not text"),
    "half a character": (dialogue(("human", "\ud83d"), ("gpt", "b")), "an unpaired surrogate"),
    "no answer": (dialogue(("human", "a")), "has no answer to learn from"),
    "answer before the question only": (
        dialogue(("gpt", "a"), ("human", "b")),
        "has no answer to learn from",
    ),
    "image without a place": (
        dialogue(("human", "a"), ("gpt", "b"), image="a.jpg"),
        "1 image(s) but 0 <image>",
    ),
    "place without an image": (dialogue(("human", "<image>"), ("gpt", "b")), "0 image(s) but 1 <image>"),
    "one image for two turns": (
        dialogue(("human", "<image>"), ("gpt", "b"), ("human", "<image>"), ("gpt", "b"), image="a"),
        "1 image(s) but 2 <image>",
    ),
    "two images for three places": (
        dialogue(("human", "<image>" * 3), ("gpt", "b"), image=["a", "b"]),
        "2 image(s) but 3 <image>",
    ),
    "image of another kind": (
        dialogue(("human", "<image>"), ("gpt", "b"), image={"path": "a"}),
        "must be a path or a list of paths",
    ),
    "not an object": ([1, 2], "is list, not an object"),
}


def written(folder, raw, suffix):
    file = folder / f"data.{suffix}"
    file.write_text(
        json.dumps([GOOD, raw, GOOD]) if suffix == "json" else "\n".join(map(json.dumps, (GOOD, raw, GOOD))) + "\n\n"
    )
    return file


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
@pytest.mark.parametrize("kind", BROKEN)
def test_broken_record(tmp_path, kind, suffix):
    raw, complaint = BROKEN[kind]
    records = Records(written(tmp_path, raw, suffix), tmp_path)
    with pytest.raises(RecordError) as caught:
        records[1]
    message = str(caught.value)
    assert f"{records.path}: record 1" in message and complaint in message and "\n" not in message
    assert not isinstance(raw, dict) or "(id 17)" in message
    assert len(records) == 3 and records[0].turns == records[2].turns  # the others stay usable


def test_broken_line(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps(GOOD) + "\n" + json.dumps(GOOD)[:40] + "\n")
    records = Records(file)
    assert records[0].id == "good"
    with pytest.raises(RecordError, match="data.jsonl: record 1 is not a line of JSON"):
        records[1]


@pytest.mark.parametrize(
    "text,complaint",
    [
        ("[{]", "is not JSON"),
        ('[{"id": "1", "conv', "was it cut short"),
        ("", "holds no records"),
        ("[]", "holds no records"),
        (" \n\n", "holds no records"),
    ],
)
def test_broken_file(tmp_path, text, complaint):
    (tmp_path / "data.json").write_text(text)
    with pytest.raises(RecordError, match=complaint) as caught:
        Records(tmp_path / "data.json")
    assert str(tmp_path / "data.json") in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(RecordError, match="nowhere.json does not exist.*set data.path"):
        Records(tmp_path / "nowhere.json")


def test_record_that_the_template_cannot_take(tmp_path):
    tokenizer = load_tokenizer(llama_directory(tmp_path))
    two_rounds = dialogue(("human", "<image>"), ("gpt", "b"), ("human", "c"), ("gpt", "d"), image="a.jpg")
    record = Records(written(tmp_path, two_rounds, "json"))[1]
    assert TextFormat(tokenizer, template("vicuna_v1"))(record).images == ("a.jpg",)
    with pytest.raises(
        RecordError,
        match=r"data.json: record 1 \(id 17\) does not fit the template: a plain template takes one question",
    ):
        TextFormat(tokenizer, template("plain"))(record)


def test_image_in_a_turn_that_is_not_trained_on(tmp_path):
    raw = dialogue(("gpt", "<image>"), ("human", "b"), ("gpt", "c"), image="a.jpg")
    record = Records(written(tmp_path, raw, "json"))[1]
    with pytest.raises(RecordError, match=r"record 1 \(id 17\) has 1 image\(s\) but 0 <image>"):
        TextFormat(load_tokenizer(llama_directory(tmp_path)), template("vicuna_v1"))(record)


def test_unknown_template():
    with pytest.raises(TemplateError, match="template 'vicuna_v9' is unknown: use one of default, v0, v1, vicuna_v1"):
        template("vicuna_v9")


@pytest.mark.parametrize(
    "texts,images,complaint",
    [
        (["a", "b"], 0, "2 texts end on an answer"),
        ([], 0, "end on an answer"),
        ("<image> and <image>", 1, "1 image.* but the prompt has 2 <image>"),
        ("<image>", 0, "0 image.* but the prompt has 1 <image>"),
    ],
)
def test_bad_prompts(tmp_path, texts, images, complaint):
    with pytest.raises(TemplateError, match=complaint):
        prompt(texts, load_tokenizer(llama_directory(tmp_path)), template("vicuna_v1"), images)


@pytest.mark.parametrize("vocab", [64, 128256])
@pytest.mark.parametrize("directory", [llama_directory, byte_level_directory])
def test_tokenizer_of_another_model(tmp_path, vocab, directory):
    tokenizer = load_tokenizer(directory(tmp_path))
    check_vocabulary(tokenizer, tokenizer.size)
    check_vocabulary(tokenizer, -(-tokenizer.size // 64) * 64)
    with pytest.raises(TokenizerError) as caught:
        check_vocabulary(tokenizer, vocab, "the checkpoint")
    message = str(caught.value)
    assert str(tmp_path) in message and f"{tokenizer.size} tokens" in message and f"llm.vocab={vocab}" in message


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "tokenizer_config.json"])
def test_broken_tokenizer(tmp_path, name):
    directory = llama_directory(tmp_path)
    (directory / name).write_text("{ not a tokenizer")
    with pytest.raises(TokenizerError, match=f"{name} is not a tokenizer file that can be read"):
        load_tokenizer(directory)


def test_directory_without_a_tokenizer(tmp_path):
    with pytest.raises(TokenizerError, match="holds none of tokenizer.json, tokenizer.model"):
        load_tokenizer(tmp_path)
    with pytest.raises(TokenizerError, match="nowhere"):
        load_tokenizer(tmp_path / "nowhere")

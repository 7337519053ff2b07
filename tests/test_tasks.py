"""What a record becomes by its task: questions of the model, images to be generated, images inside the text."""

import dataclasses
import functools
import pickle
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny_tokenizers import byte_level_directory, llama_directory
from vlm_jax.config import GENERATED, IGNORE, IMAGE, ConfigError
from vlm_jax.data.draws import Draws
from vlm_jax.data.generation import REPLIES, REQUESTS, Generation, announcement, to_generation
from vlm_jax.data.options import DataConfig, Source
from vlm_jax.data.records import Record, RecordError, record_of
from vlm_jax.data.self_questioning import SelfQuestioning
from vlm_jax.data.tasks import TextFormat, encoder, prompt
from vlm_jax.data.templates import IMAGE_TEXT, template

KINDS = ("legacy", "not legacy", "bytes")
DIALOGUE = (
    ("human", "<image>\nWhat is shown?"),
    ("gpt", "A taxi."),
    ("human", "Is it sunny?"),
    ("gpt", "No."),
    ("human", "Why?"),
    ("gpt", "It is snowing."),
)


@functools.cache
def tokenizer_of(kind):
    from vlm_jax.data.tokenizer import load_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        if kind == "bytes":
            return load_tokenizer(byte_level_directory(Path(folder)))
        return load_tokenizer(llama_directory(Path(folder), legacy=kind == "legacy"))


def questioning(kind="legacy", share=0.5, **settings):
    return SelfQuestioning(TextFormat(tokenizer_of(kind), template("v1_sq"), **settings), share)


def generation(kind="legacy", slots=1, limit=None, **settings):
    return Generation(TextFormat(tokenizer_of(kind), template("v1"), **settings), slots, limit)


def record(*turns, images=1, **fields):
    return Record("1", tuple(turns), tuple(f"{k}.png" for k in range(images)), **fields)


def spelt(sample, tokenizer):
    """Supervised text, one string per stretch of it, without the spaces around."""
    at = np.flatnonzero(sample.labels != IGNORE)
    runs = [part for part in np.split(at, np.flatnonzero(np.diff(at) > 1) + 1) if len(part)]
    return [tokenizer.decode(sample.labels[run], skip_special=False).strip() for run in runs]


class Chosen:
    """Draws that make these turns questions of the model."""

    def __init__(self, *turns):
        self.turns = turns

    def uniform(self, k):
        return 0.0 if k in self.turns else 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_questions_of_the_model_have_loss(kind):
    encode = questioning(kind)
    drawn = spelt(encode(record(*DIALOGUE), Chosen(4)), encode.form.tokenizer)
    assert drawn == ["A taxi.</s>", "No.</s>", "Why?</s>", "It is snowing.</s>"]
    assert spelt(encode(record(*DIALOGUE)), encode.form.tokenizer)[1] == "Is it sunny?</s>"
    text_only = record(("human", "What?"), *DIALOGUE[1:], images=0)
    assert spelt(encode(text_only), encode.form.tokenizer) == ["A taxi.</s>", "No.</s>", "It is snowing.</s>"]


@pytest.mark.parametrize("compat", ["", "llava"])
def test_without_questions_it_is_an_ordinary_dialogue(compat):
    encode = questioning(share=0.0, compat=compat)
    ours, plain = encode(record(*DIALOGUE)), encode.form(record(*DIALOGUE))
    assert ours.tokens.tolist() == plain.tokens.tolist() and ours.labels.tolist() == plain.labels.tolist()


def test_odd_dialogues_keep_their_loss():
    encode = questioning()
    read = functools.partial(spelt, tokenizer=encode.form.tokenizer)
    opened = record(("gpt", "Hello!"), *DIALOGUE[:4], ("human", "and?"))
    assert read(encode(opened, Chosen(1, 3, 5))) == ["A taxi.</s>", "Is it sunny?</s>", "No.</s>"]
    marked = record(
        DIALOGUE[0], ("gpt", "<unk> ASSISTANT: no"), ("human", "Who said ASSISTANT: no?"), ("gpt", "USER: I")
    )
    assert read(encode(marked, Chosen())) == ["<unk> ASSISTANT: no</s>", "USER: I</s>"]
    with pytest.raises(RecordError, match="alternate"):
        encode(record(DIALOGUE[0], ("vuser", "Why?"), ("gpt", "So.")))
    with pytest.raises(RecordError, match="no answer"):
        encode(record(DIALOGUE[0], images=1))


def test_vuser_turns_of_the_data_are_asked_by_the_model():
    conversation = [
        {"from": "vuser", "value": "<image>\nWhat is shown?"},
        {"from": "gpt", "value": "A taxi."},
        {"from": "vuser", "value": "Why?"},
        {"from": "gpt", "value": "So."},
    ]
    read = record_of({"id": 1, "image": "a.png", "conversations": conversation}, 0)
    encode = questioning(share=0.0)
    assert spelt(encode(read), encode.form.tokenizer) == ["What is shown?</s>", "A taxi.</s>", "Why?</s>", "So.</s>"]
    with pytest.raises(RecordError, match="out of order"):
        TextFormat(tokenizer_of("legacy"), template("v1"))(read)


WORDS = st.sampled_from(
    ["a", "The cat", " ", "\n", "猫", "🐱", "USER:", "ASSISTANT: ", "VUSER", "</s>", "<unk>", "1.5", ""]
)
TEXTS = st.lists(WORDS, max_size=5).map("".join)


@st.composite
def dialogues(draw):
    turns = []
    for _ in range(draw(st.integers(1, 4))):
        turns += [("human", draw(TEXTS)), ("gpt", draw(TEXTS))]
    where = 2 * draw(st.integers(0, len(turns) // 2 - 1))
    turns[where] = ("human", f"{IMAGE_TEXT}\n{turns[where][1]}")
    return turns


@settings(max_examples=300, deadline=None)
@given(turns=dialogues(), kind=st.sampled_from(KINDS), seed=st.integers(0, 2**40), start_end=st.booleans())
def test_no_drawn_sample_is_longer_than_the_measured_one(turns, kind, seed, start_end):
    encode = questioning(kind, start_end=start_end)
    drawn, measured = (encode(record(*turns), draws) for draws in (Draws(seed, 0, 0), None))
    assert len(drawn.tokens) <= len(measured.tokens)
    assert (drawn.labels[drawn.tokens == IMAGE] == IGNORE).all()
    said = drawn.labels != IGNORE
    assert (drawn.labels[said] == drawn.tokens[said]).all()
    answers = [f"{text}</s>".strip() for role, text in turns if role == "gpt" and text.strip()]
    read = " ".join(spelt(drawn, encode.form.tokenizer))
    assert all(answer in read for answer in answers)


def test_draws_are_named_by_epoch_and_record():
    encode = questioning()
    assert encode.random and not questioning(share=0.0).random
    asked = [[len(encode(record(*DIALOGUE), Draws(7, epoch, k)).tokens) for k in range(100)] for epoch in (0, 1)]
    again = [len(encode(record(*DIALOGUE), Draws(7, 1, k)).tokens) for k in reversed(range(100))]
    assert asked[1] == again[::-1] and asked[0] != asked[1]
    lengths = sorted(set(asked[0]))
    assert len(lengths) == 3 and 30 < sum(n == lengths[1] for n in asked[0]) < 70  # none, one or both of two questions


def test_a_share_is_a_share():
    with pytest.raises(ConfigError, match="self_question"):
        questioning(share=1.5)
    with pytest.raises(ConfigError, match="v1_sq"):
        SelfQuestioning(TextFormat(tokenizer_of("legacy"), template("v1")))


def test_shown_and_generated_images_in_one_dialogue():
    encode = generation(start_end=True)
    tokenizer, said = encode.form.tokenizer, announcement(encode.form.tokenizer)
    sample = encode(
        record(
            ("human", "like <image> twice"),
            ("gpt", "one <image> two <image> done"),
            ("human", "ok"),
            ("gpt", "yes"),
            images=3,
        )
    )
    assert sample.images == ("0.png",) and sample.generated == ("1.png", "2.png")
    assert (sample.labels[sample.tokens < 0] == IGNORE).all()
    at = np.flatnonzero(sample.tokens == GENERATED)
    assert len(at) == 2 and all(sample.labels[k - len(said) : k].tolist() == said for k in at)
    assert spelt(sample, tokenizer) == ["one  <image>", "two  <image>", "done</s>", "yes</s>"]  # as LLaVA's pieces
    assert tokenizer.decode(sample.tokens, skip_special=False).count("<im_start>") == 1


def test_generation_without_images_is_text():
    sample = generation()(record(("human", "hi"), ("gpt", "say <image>"), images=0))
    assert not sample.images and not sample.generated and (sample.tokens >= 0).all()
    with pytest.raises(RecordError, match="1 image"):
        generation()(record(("human", "draw"), ("gpt", "no")))


def test_captions_are_shortened_from_their_end():
    request = record(("human", "look <image> draw a taxi on the back of a man"), ("gpt", "here <image>"), images=2)
    whole = generation(slots=9)(request)
    limit = len(whole.tokens) + 8 - 6
    sample = generation(slots=9, limit=limit)(request)
    text = tokenizer_of("legacy").decode(sample.tokens[sample.tokens >= 0])
    assert limit - 6 < len(sample.tokens) + 8 <= limit and "draw a ta" in text and "of a man" not in text
    assert sample.images == ("0.png",) and sample.generated == ("1.png",)
    with pytest.raises(RecordError, match="sample_length"):
        generation(slots=99, limit=50)(request)


def captioned(k, image="coco/1.jpg"):
    turns = [{"from": "human", "value": "<image>\nDescribe it."}, {"from": "gpt", "value": f"Caption {k}. "}]
    return {"id": str(k), "image": image, "conversations": turns}


def test_captions_become_requests():
    paths = ["sam/images/1.jpg", "coco/samples/2.jpg", "llava/images/3.jpg", "a/sam/4.jpg", "web/sam.jpg"]
    raw = [captioned(k, path) for k, path in enumerate(paths)]
    made = list(to_generation(raw, 10, seed=3))
    assert [item["id"] for item in made] == ["1", "2", "4"]
    assert [item["id"] for item in to_generation(raw, 10, seed=3, substring=True)] == ["2"]
    for item in made:
        question, answer = (turn["value"] for turn in item["conversations"])
        assert item["task"] == "generation" and answer in REPLIES and question.endswith(f" Caption {item['id']}. ")
        assert question.split(" Caption")[0] in REQUESTS
        assert len(generation()(record_of(item, 0)).generated) == 1
    with pytest.raises(RecordError, match="record 0"):
        list(to_generation([{"image": "a.jpg"}], 1, seed=0))


def test_a_part_of_a_conversion_equals_that_part_of_the_whole():
    raw = [captioned(k, "sam/1.jpg" if k % 3 == 0 else "coco/1.jpg") for k in range(90)]
    whole = list(to_generation(raw, 50, seed=3))
    assert list(to_generation(raw, 20, seed=3)) + list(to_generation(raw, 30, seed=3, start=20)) == whole
    assert len({item["conversations"][0]["value"].split(" Caption")[0] for item in whole}) == len(REQUESTS)
    assert list(to_generation(raw, 50, seed=4)) != whole


@pytest.mark.parametrize("kind", KINDS)
def test_llavar_keeps_images_where_they_are(kind):
    tokenizer, chosen = tokenizer_of(kind), template("llavar_llava_v1")
    for start_end, width in ((False, 1), (True, 3)):
        known = tokenizer.with_tokens("<im_start>", "<im_end>") if start_end else tokenizer
        sample = TextFormat(known, chosen, start_end=start_end)(
            record(("human", "Who wrote <image> it?"), ("gpt", "I."))
        )
        without = TextFormat(known, chosen)(record(("human", f"Who wrote {'</s>'} it?"), ("gpt", "I."), images=0))
        assert len(sample.tokens) == len(without.tokens) - 1 + width  # where a special token stands, the image's stand
    tokens = prompt("Who wrote it?", tokenizer, chosen, images=1)
    assert (tokens == IMAGE).sum() == 1
    before, behind = np.split(tokens, np.flatnonzero(tokens == IMAGE))
    assert "Who wrote it?" in tokenizer.decode(before) and "Who wrote" not in tokenizer.decode(behind[1:])


def test_tasks_are_dispatched_by_name():
    data = DataConfig(template="v1_sq")
    encode = encoder(data, tokenizer_of("legacy"), generated_slots=5)
    drawing = record(("human", "draw"), ("gpt", "Here: <image>"), task="generation")
    assert encode(drawing).generated == drawing.images
    asking = encode(record(*DIALOGUE, task="self_questioning"), Chosen(2))
    assert len(asking.tokens) == len(encode(record(*DIALOGUE), Chosen(2)).tokens)
    assert encode.random and encode.fingerprint != encoder(data, tokenizer_of("legacy")).fingerprint
    for task in ("vqa", "caption", "understanding", ""):
        assert (encode(record(*DIALOGUE, task=task), Chosen()).tokens == IMAGE).sum() == 1
    copy = pickle.loads(pickle.dumps(encode))
    assert copy.fingerprint == encode.fingerprint and copy(drawing).tokens.tolist() == encode(drawing).tokens.tolist()


def test_unknown_tasks_are_named():
    encode = encoder(DataConfig(), tokenizer_of("legacy"))
    assert not encode.random
    with pytest.raises(RecordError, match="'self_questioning'.*understanding, vqa, caption, generation") as caught:
        encode(record(*DIALOGUE, task="self_questioning"))
    assert caught.value.reason == "task"
    with pytest.raises(ConfigError, match=r"data.sources.watches.task='vqva'"):
        encoder(DataConfig(sources={"watches": Source("a.json", task="vqva")}), tokenizer_of("legacy"))


@pytest.mark.parametrize(
    "change", [{"self_question": 0.1}, {"compat": "llava"}, {"im_start_end": True}, {"keep_images": True}]
)
def test_fingerprints_follow_the_settings(change):
    data = DataConfig(template="v1_sq")
    ours, theirs = (encoder(d, tokenizer_of("legacy")).fingerprint for d in (data, dataclasses.replace(data, **change)))
    assert ours != theirs

"""Contract 3: the loss falls on token spans fixed while encoding, and equals the original's wherever that one
works.
"""

import functools
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.goldens import SHARED, needs_shared
from tests.tiny_tokenizers import CHATML, byte_level_directory, llama_directory
from vlm_jax.config import IGNORE, IMAGE
from vlm_jax.data.records import record_of
from vlm_jax.data.tasks import TextFormat, encode_dialogue, place_images, training_pieces
from vlm_jax.data.templates import TEMPLATES, render, template
from vlm_jax.data.tokenizer import Tokenizer, load_tokenizer

LLAMA = "tokenizers/llama2.model"
KINDS = ["tiny, legacy", "tiny", "bytes", "llama2, legacy", "llama2"]
HERE = KINDS if (SHARED / LLAMA).exists() else KINDS[:3]
CHECKED = [name for name, t in TEMPLATES.items() if t.style in ("TWO", "LLAMA_2") and t.origin == "llava"]
DIALOGUES = [
    [
        ("human", "<image>\nWhat is shown in the image?"),
        ("gpt", "A man ironing clothes on the back of a taxi."),
    ],
    [
        ("human", "Hello"),
        ("gpt", "Hi"),
        ("human", "<image> now?"),
        ("gpt", "A dog."),
        ("human", "Why?"),
        ("gpt", "\n1. a\n2. b\n"),
    ],
    [
        ("human", "<image>\n这张图片里有什么?"),
        ("gpt", "一只猫 🐱。"),
        ("human", "ありがとう"),
        ("gpt", "  two spaces before, two after  "),
    ],
    [("human", "<image> You said: ASSISTANT: yes?"), ("gpt", "He said ASSISTANT: no. USER: [/INST] ### so")],
]


@functools.cache
def tokenizer_of(kind: str) -> Tokenizer:
    if kind.startswith("llama2"):
        return load_tokenizer(needs_shared(LLAMA), legacy="legacy" in kind).with_tokens(*CHATML)
    with tempfile.TemporaryDirectory() as folder:
        if kind == "bytes":
            return load_tokenizer(byte_level_directory(Path(folder)))
        return load_tokenizer(llama_directory(Path(folder), legacy="legacy" in kind)).with_tokens(*CHATML)


def runs(tokens, labels):
    """Stretches of consecutive supervised tokens."""
    at = np.flatnonzero(labels != IGNORE)
    return [tokens[part] for part in np.split(at, np.flatnonzero(np.diff(at) > 1) + 1) if len(part)]


def answers(chosen, turns):
    """Supervised text, one string per answer."""
    joined = "".join(
        f"\x01{piece.text}\x02" if piece.answer else piece.text for piece in training_pieces(chosen, turns)
    )
    return [part.split("\x02")[0] for part in joined.replace("\x02\x01", "").split("\x01")[1:]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [n for n, t in TEMPLATES.items() if t.style != "PLAIN" and t.origin != "clip_flant5"])
def test_supervised_tokens_spell_the_answers(kind, name):
    tokenizer, chosen = tokenizer_of(kind), template(name)
    for turns in DIALOGUES:
        tokens, labels = encode_dialogue(turns, TextFormat(tokenizer, chosen), has_image=True)
        assert (labels[labels != IGNORE] == tokens[labels != IGNORE]).all()
        spelt = [tokenizer.decode(run, skip_special=False) for run in runs(tokens, labels)]
        expected = answers(chosen, turns)
        assert len(expected) == len(turns) // 2
        assert [text.lstrip(" ") for text in spelt] == [text.lstrip(" ") for text in expected]
        said = [text for role, text in turns if role == "gpt"]
        assert all(text.strip() in answer for text, answer in zip(said, expected))


@pytest.mark.parametrize("kind", KINDS)
def test_caption_training_supervises_all_but_the_image(kind):
    tokenizer = tokenizer_of(kind)
    turns = [("human", "Describe it.\n<image>"), ("gpt", "a grey watch")]
    tokens, labels = encode_dialogue(turns, TextFormat(tokenizer, template("plain")), has_image=True)
    head = len(tokenizer.encode_images("<image>"))
    assert tokens[:head].tolist() == tokenizer.encode_images("<image>")
    assert (labels[:head] == IGNORE).all() and (labels[head:] == tokens[head:]).all()
    assert tokenizer.decode(tokens[head:]) == "a grey watch\n"


@pytest.mark.parametrize(
    "name", ["vicuna_v1", "llava_llama_2", "mistral_instruct", "mpt"]
)  # v0 trains on "### Human: ", generates from "###Human: "
def test_supervision_starts_where_an_open_prompt_ends(name):
    """What generation is asked to continue with is what training has taught."""
    tokenizer, chosen = tokenizer_of("tiny"), template(name)
    tokens, labels = encode_dialogue(DIALOGUES[0], TextFormat(tokenizer, chosen), has_image=True)
    messages = [(chosen.roles[0], DIALOGUES[0][0][1]), (chosen.roles[1], None)]
    opened = tokenizer.encode_images(render(chosen, messages))
    assert tokens[: len(opened)].tolist() == opened
    assert (labels[: len(opened)] == IGNORE).all() and labels[len(opened)] != IGNORE


WORDS = st.sampled_from(
    [
        "a",
        "The cat",
        " ",
        "  ",
        "\n",
        "\n\n",
        ".",
        "1.5",
        "[0.12, 0.34]",
        "猫",
        "🐱",
        "é",
        "▁",
        "<",
        ">",
        "</",
        "\t",
        "USER:",
        "ASSISTANT",
        "ASSISTANT:",
        "[INST]",
        "[/INST]",
        "</s>",
        "<s>",
        "###",
        "<image",
        "\x00",
    ]
)
TEXTS = st.lists(WORDS, max_size=6).map("".join)


@st.composite
def dialogues(draw):
    """Human or gpt first, any number of rounds, perhaps open at the end, images in some human turns."""
    first = draw(st.integers(0, 1))
    turns = []
    for k in range(draw(st.integers(1, 7))):
        role = ("human", "gpt")[(first + k) % 2]
        image = role == "human" and draw(st.booleans())
        turns.append((role, draw(TEXTS) + ("<image>" if image else "") + draw(TEXTS)))
    return turns


@settings(max_examples=400, deadline=None)
@given(turns=dialogues(), name=st.sampled_from(CHECKED), kind=st.sampled_from(HERE), image=st.booleans())
def test_exact_masks_equal_the_originals_where_those_count_right(turns, name, kind, image):
    tokenizer, chosen = tokenizer_of(kind), template(name)
    assume(len(turns) > 1 or turns[0][0] == "human")
    assume(chosen.style != "LLAMA_2" or next(text for role, text in turns if role == "human"))
    # Where a text holds the marker that the original looks for, it may split at the wrong one and still count
    # right.
    marker = f"{chosen.roles[1]}:" if chosen.style == "TWO" else "[/INST]"
    assume(not any(marker in text for _, text in turns))
    turns = place_images(turns, chosen) if image else turns
    tokens, exact = encode_dialogue(turns, TextFormat(tokenizer, chosen), image)
    same, original = encode_dialogue(turns, TextFormat(tokenizer, chosen, compat="llava"), image)
    assert (tokens == same).all()
    assert not (exact == IMAGE).any()
    if (original != IGNORE).any():  # the original masks everything where its counts do not add up
        np.testing.assert_array_equal(exact, original)


def test_samples_that_the_original_loses_are_kept():
    tokenizer, chosen = tokenizer_of("tiny"), template("vicuna_v1")
    original, exact = (
        [
            encode_dialogue(turns, TextFormat(tokenizer, chosen, compat=compat), False)[1]
            for turns in (
                [("human", "hi"), ("gpt", "He said ASSISTANT: no.")],
                [("human", "What does </s> do?"), ("gpt", "It ends a sequence.")],
                [("human", "a"), ("gpt", "b"), ("human", "and then?")],
            )
        ]
        for compat in ("llava", "")
    )
    assert all((labels == IGNORE).all() for labels in original)
    assert all((labels != IGNORE).any() for labels in exact)


def test_nothing_is_tokenised_twice():
    tokenizer, calls = tokenizer_of("tiny"), []

    class Counting(Tokenizer):
        def encode_spans(self, text, images, special=True):
            calls.append(text)
            return super().encode_spans(text, images, special)

    counting = Counting(tokenizer.model, tokenizer.names, tokenizer.prefix)
    encode_dialogue(DIALOGUES[1], TextFormat(counting, template("vicuna_v1")), True)
    assert len(calls) == 1


def test_images_in_answers_and_several_images_per_turn():
    tokenizer = tokenizer_of("tiny")
    conversation = [
        {"from": "human", "value": "Here <image> and there <image>?"},
        {"from": "gpt", "value": "see <image> it"},
    ]
    record = record_of({"id": 1, "image": ["a.png", "b.png", "c.png"], "conversations": conversation}, 0)
    sample = TextFormat(tokenizer, template("vicuna_v1"))(record)
    assert (sample.tokens == IMAGE).sum() == len(sample.images) == 3
    assert (sample.labels[sample.tokens == IMAGE] == IGNORE).all()
    assert [tokenizer.decode(run, False) for run in runs(sample.tokens, sample.labels)] == ["see ", " it</s>"]


def test_a_dialogue_that_the_assistant_opens_is_trained_from_its_second_turn():
    form = TextFormat(tokenizer_of("tiny"), template("vicuna_v1"))
    turns = [("gpt", "I speak first."), ("human", "ok"), ("gpt", "good")]
    for ours, theirs in zip(encode_dialogue(turns, form, False), encode_dialogue(turns[1:], form, False)):
        np.testing.assert_array_equal(ours, theirs)

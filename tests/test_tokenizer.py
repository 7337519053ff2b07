"""Tokenizers of model directories: what they read from the files, round trips, spans, streaming, saving."""

import json
import pickle
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.goldens import SHARED
from tests.tiny_tokenizers import CHATML, byte_level_directory, llama_directory, sentencepiece_model
from vlm_jax.config import IMAGE
from vlm_jax.data.tokenizer import AddedToken, Tokenizer, expand_images, load_tokenizer

SPECIAL = ["</s>", "<s>", "<unk>", "<image>", *CHATML]
CHARACTERS = ["a", "The", " ", "  ", "\n", "é", "猫", "🐱", "▁", "<", "0.5", "\x00", "\t", "ASSISTANT:"]
TEXTS = st.lists(st.sampled_from(CHARACTERS), max_size=8).map("".join)
MARKED = st.lists(st.sampled_from(CHARACTERS + SPECIAL), max_size=8).map("".join)
KINDS = ["tiny, legacy", "tiny", "bytes"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = {kind: tmp_path_factory.mktemp("tokenizer") for kind in KINDS}
    return {
        "tiny, legacy": load_tokenizer(llama_directory(folder["tiny, legacy"], True)).with_tokens(*CHATML),
        "tiny": load_tokenizer(llama_directory(folder["tiny"], False)).with_tokens(*CHATML),
        "bytes": load_tokenizer(byte_level_directory(folder["bytes"])),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_special_ids(made, kind):
    tokenizer = made[kind]
    assert [tokenizer.id_of(t) for t in ("<unk>", "<s>", "</s>")] == [
        tokenizer.unk_id,
        tokenizer.bos_id,
        tokenizer.eos_id,
    ]
    assert tokenizer.pad_id == tokenizer.unk_id
    assert tokenizer.encode("") == [tokenizer.bos_id] and tokenizer.encode("", special=False) == []
    assert tokenizer.encode("a</s>")[-1] == tokenizer.eos_id
    assert tokenizer.id_of("no such token") is None


@settings(max_examples=200, deadline=None)
@given(text=MARKED, kind=st.sampled_from(KINDS))
def test_decoding_is_the_inverse(made, text, kind):
    tokenizer = made[kind]
    exact = text.replace("▁", " ") if kind != "bytes" else text  # SentencePiece writes a space as this character
    assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == exact
    assert tokenizer.decode(tokenizer.encode_images(text), skip_special=False) == exact
    for special in SPECIAL:
        exact = exact.replace(special, "") if special != "<image>" else exact
    assert tokenizer.decode(tokenizer.encode(text)) == exact


@settings(max_examples=200, deadline=None)
@given(text=MARKED, kind=st.sampled_from(KINDS))
def test_spans_cover_the_text_in_order(made, text, kind):
    ids, spans = made[kind].encode_spans(text, images=True)
    assert len(ids) == len(spans)
    assert [text[a:b] for i, (a, b) in zip(ids, spans) if i == IMAGE] == ["<image>"] * text.count("<image>")
    covered = 0
    for start, end in spans[1:]:
        assert start <= covered <= max(end, covered), "no character is skipped"
        covered = max(covered, end)
    assert covered == len(text) and spans[0] == (-1, -1)


@settings(max_examples=200, deadline=None)
@given(text=MARKED, kind=st.sampled_from(KINDS), skip=st.integers(0, 4))
def test_streaming_joins_to_the_whole(made, text, kind, skip):
    tokenizer = made[kind]
    ids = tokenizer.encode(text)[skip:]
    pieces = list(tokenizer.stream(ids))
    assert "".join(pieces) == tokenizer.decode(ids)
    if skip == 0:
        assert not any("\ufffd" in piece for piece in pieces), "half a character was let out"


def test_streaming_gives_text_as_soon_as_it_is_whole(made):
    tokenizer = made["tiny"]
    ids = tokenizer.encode("猫 a", special=False)
    pieces = list(tokenizer.stream(ids))
    assert [piece for piece in pieces if piece] == ["猫", " a"] and pieces[-1] == ""


def test_legacy_tokenizers_begin_every_chunk_with_a_space(made):
    old, new = made["tiny, legacy"], made["tiny"]
    assert old.legacy and new.legacy is False and made["bytes"].legacy is None
    alone = old.encode("USER", special=False)
    assert alone == new.encode("USER", special=False)
    assert old.encode("USER</s>USER") == [old.bos_id, *alone, old.eos_id, *alone]
    start = [new.bos_id, *alone, new.eos_id]
    ids = new.encode("USER</s>USER")
    assert ids[: len(start)] == start and ids[len(start) :] != alone
    assert new.decode(ids) == old.decode(old.encode("USER</s>USER")) == "USERUSER"


def test_ids_without_a_token_are_passed_over(made):
    for tokenizer in made.values():
        assert tokenizer.decode([*tokenizer.encode("a"), tokenizer.size, 10**6, -1]) == "a"


@pytest.mark.parametrize("kind", KINDS)
def test_added_tokens(made, kind):
    tokenizer = made[kind].with_tokens("<im_start>", "</s>", "<im_start>", "<im_end>")
    size = made[kind].size
    assert tokenizer.size == size + 2
    assert tokenizer.encode("a<im_start>b<im_end>")[-1] == size + 1 and size in tokenizer.encode("a<im_start>")
    assert tokenizer.fingerprint != made[kind].fingerprint == pickle.loads(pickle.dumps(made[kind])).fingerprint


@pytest.mark.parametrize("kind", KINDS)
def test_saved_tokenizers_read_back_equal(made, kind, tmp_path):
    tokenizer = made[kind].with_tokens("<image>", "<pad>")
    tokenizer = Tokenizer(
        tokenizer.model, {**tokenizer.names, "pad": "<pad>"}, tokenizer.prefix, source=tokenizer.source
    )
    tokenizer.save(tmp_path / "out")
    again = load_tokenizer(tmp_path / "out")
    assert again.fingerprint == tokenizer.fingerprint
    assert again.pad_id == tokenizer.pad_id == tokenizer.size - 1 and again.names == tokenizer.names
    text = "USER: <image>\nHi</s>USER: 猫"
    assert again.encode(text) == tokenizer.encode(text)


def test_settings_of_a_directory(tmp_path):
    described = {"content": "<pad>", "special": True, "lstrip": False, "rstrip": True}
    llama_directory(tmp_path, False, add_eos_token=True, added_tokens_decoder={"500": described}, pad_token="<pad>")
    (tmp_path / "added_tokens.json").write_text('{"<image>": 501}')
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.pad_id == 500 and tokenizer.id_of("<image>") == 501 and tokenizer.size == 502
    assert tokenizer.encode("")[-1] == tokenizer.eos_id
    assert tokenizer.encode("<pad>  <image>", special=False) == [500, 501], "rstrip swallows white space"
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert load_tokenizer(tmp_path).legacy is True, "transformers' default"
    byte_level_directory(tmp_path)
    assert load_tokenizer(tmp_path).legacy is None, "tokenizer.json goes first, and this one is byte-level"


def test_words_as_a_vocabulary(tmp_path):
    """A word-level tokenizer.json without an unknown token still shows what it puts around a text."""
    model = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"<s>": 0, "</s>": 1, "snowy": 2, "sunny": 3}, unk_token="<s>")
    )
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model.post_processor = tokenizers.processors.TemplateProcessing(
        "<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    model.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.prefix, tokenizer.suffix) == ((0,), (1,))
    assert tokenizer.encode_images("snowy<image>sunny") == [0, 2, IMAGE, 3, 1]


def test_expansion_of_images():
    assert expand_images([1, IMAGE, 5, 9, 6], [2, 3], 9) == [1, 9, 9, 5, 9, 9, 9, 6]


@pytest.mark.skipif(not (SHARED / "tokenizers/llama2.model").exists(), reason="llama2.model is another project's")
def test_double_spaces_of_llama():
    """What transformers 5 gets wrong when it reads a bare tokenizer.model."""
    for legacy in (True, False):
        tokenizer = load_tokenizer(SHARED / "tokenizers/llama2.model", legacy=legacy)
        assert tokenizer.encode("a  b") == [1, 263, 29871, 289] and tokenizer.encode(" lead") == [
            1,
            29871,
            3275,
        ]
        assert tokenizer.encode("hi</s>USER") == [1, 7251, 2, *([3148, 1001] if legacy else [11889])]


def test_tokens_given_by_the_caller(tmp_path):
    file = Path(tmp_path) / "llama.model"
    file.write_bytes(sentencepiece_model())
    tokenizer = load_tokenizer(file, legacy=False, added=[AddedToken("<image>", 600)], pad="<image>")
    assert (
        tokenizer.pad_id == 600
        and tokenizer.prefix == (1,)
        and json.loads(json.dumps(tokenizer.encode("<image>"))) == [1, 600]
    )

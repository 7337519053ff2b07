"""Tokenizer files of an export: ids unchanged, `<image>` and `<pad>` added, SentencePiece turned into an
exact tokenizer.json.
"""

import json
import random
import shutil

import pytest

from tests.goldens import needs_shared
from vlm_jax.convert.tensors import CheckpointError
from vlm_jax.convert.tokenizer_files import for_export
from vlm_jax.data.new_tokenizer import word_level
from vlm_jax.data.tokenizer import AddedToken, load_tokenizer

TEXTS = ["USER: what is this? ASSISTANT: a cat."]


def install(files, directory):
    directory.mkdir()
    for name, content in files.items():
        (directory / name).write_bytes(content)
    return directory


def test_new_tokens_follow_the_old(tmp_path):
    word_level(TEXTS, tmp_path / "old")
    made = for_export(tmp_path / "old")
    old, new = load_tokenizer(tmp_path / "old"), load_tokenizer(install(made.files, tmp_path / "new"))
    assert made.image_token == old.size == new.size - 1
    assert made.tokens == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    assert new.encode(TEXTS[0]) == old.encode(TEXTS[0])
    again = for_export(tmp_path / "new")
    assert (again.image_token, again.tokens) == (made.image_token, made.tokens)
    assert json.loads(again.files["tokenizer.json"]) == json.loads(made.files["tokenizer.json"])


def test_padding_with_unk_gets_a_pad_token(tmp_path):
    word_level(TEXTS, tmp_path / "old")
    settings = json.loads((tmp_path / "old" / "tokenizer_config.json").read_text())
    (tmp_path / "old" / "tokenizer_config.json").write_text(json.dumps({**settings, "pad_token": "<unk>"}))
    document = json.loads((tmp_path / "old" / "tokenizer.json").read_text())
    document["added_tokens"] = [token for token in document["added_tokens"] if token["content"] != "<pad>"]
    document["model"]["vocab"]["<filler>"] = document["model"]["vocab"].pop("<pad>")
    (tmp_path / "old" / "tokenizer.json").write_text(json.dumps(document))
    made = for_export(tmp_path / "old")
    assert made.tokens["pad_token_id"] == made.image_token + 1
    assert json.loads(made.files["tokenizer_config.json"])["pad_token"] == "<pad>"


def test_without_a_tokenizer(tmp_path):
    with pytest.raises(CheckpointError, match="has no tokenizer: it needs"):
        for_export(tmp_path)


@pytest.mark.parametrize("legacy", [True, False])
def test_sentencepiece_becomes_an_exact_tokenizer_json(tmp_path, legacy):
    model = needs_shared("tokenizers/llama2.model")
    (tmp_path / "old").mkdir()
    shutil.copy(model, tmp_path / "old" / "tokenizer.model")
    (tmp_path / "old" / "tokenizer_config.json").write_text(
        json.dumps({"legacy": legacy, "pad_token": "<unk>", "unk_token": "<unk>"})
    )
    made = for_export(tmp_path / "old")
    assert (made.image_token, made.tokens) == (
        32000,
        {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 32001},
    )
    new = load_tokenizer(install(made.files, tmp_path / "new"))
    added = [AddedToken("<image>", 32000), AddedToken("<pad>", 32001)]
    old = load_tokenizer(model, legacy=legacy, added=added, pad="<pad>")
    assert new.legacy is old.legacy is legacy
    rng = random.Random(0)
    words = [
        "USER",
        ":",
        " ",
        "  ",
        "\n",
        "\t",
        "wörd",
        "日本",
        "😀",
        "it's",
        "3.14",
        "\u00a0",
        "</s>",
        "<image>",
        "e\u0301",
        "ASSISTANT:",
    ]
    for _ in range(300):
        text = "".join(rng.choices(words, k=rng.randrange(12)))
        assert new.encode(text) == old.encode(text), text

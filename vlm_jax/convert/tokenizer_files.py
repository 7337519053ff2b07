"""The tokenizer files of an HF export: those of the model, with `<image>` and `<pad>` added, as a
tokenizer.json that every version reads.

A SentencePiece BPE model without tokenizer.json gets one: its merges are, for every piece in order of rank,
all ways to cut it into two pieces. transformers 5 would build its own from `tokenizer.model`, and that one
collapses double spaces.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from vlm_jax.convert.files import read_json
from vlm_jax.convert.tensors import CheckpointError

MODELS = ("tokenizer.json", "tokenizer.model", "spiece.model")  # a directory with one of them has a tokenizer
COPIED = (
    *MODELS,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
IMAGE_TEXT, PAD_TEXT = "<image>", "<pad>"
SPACE = "\u2581"  # SentencePiece's visible space


@dataclasses.dataclass(frozen=True)
class TokenizerFiles:
    """Files to write (name -> bytes), the id of the image token, and those of config.json (bos_token_id,
    eos_token_id, pad_token_id).
    """

    files: dict[str, bytes]
    image_token: int
    tokens: dict[str, int]


def for_export(directory: Path) -> TokenizerFiles:
    """The tokenizer of `directory` with `<image>`, and `<pad>` unless it pads with a token of its own.

    Tokens that are there keep their ids, new ones follow the largest id.
    """
    settings = read_json(directory / "tokenizer_config.json") if (directory / "tokenizer_config.json").is_file() else {}
    if (directory / "tokenizer.json").is_file():
        document = read_json(directory / "tokenizer.json")
    elif (directory / "tokenizer.model").is_file():
        document = from_sentencepiece((directory / "tokenizer.model").read_bytes(), directory, settings)
    else:
        raise CheckpointError(f"{directory} has no tokenizer: it needs tokenizer.json or tokenizer.model")
    image = _add(document, IMAGE_TEXT)
    pad_text = _text(settings.get("pad_token"))
    if pad_text is None or pad_text == _text(settings.get("unk_token")) or _find(document, pad_text) is None:
        pad_text = PAD_TEXT
    _add(document, pad_text)
    files = {name: (directory / name).read_bytes() for name in ("tokenizer.model",) if (directory / name).is_file()}
    files["tokenizer.json"] = _json(document)
    made = _settings(settings, document, pad_text)
    files["tokenizer_config.json"] = _json(made)
    tokens = {
        f"{kind}_token_id": _find(document, made[f"{kind}_token"])
        for kind in ("bos", "eos", "pad")
        if f"{kind}_token" in made
    }
    return TokenizerFiles(files, image, tokens)


def _settings(old: dict[str, Any], document: dict, pad_text: str) -> dict[str, Any]:
    """tokenizer_config.json: the plain fast class, because the Llama classes of transformers 5 rebuild what
    tokenizer.json says.
    """
    special = {token["content"] for token in document["added_tokens"]}
    named = {
        name: _text(old.get(name)) or text
        for name, text in (("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>"))
    }
    kept = {k: v for k, v in old.items() if k in ("model_max_length", "clean_up_tokenization_spaces", "chat_template")}
    return {
        "clean_up_tokenization_spaces": False,
        **kept,
        **{name: text for name, text in named.items() if text in special},
        "added_tokens_decoder": {
            str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in document["added_tokens"]
        },
        "extra_special_tokens": {"image_token": IMAGE_TEXT},
        "image_token": IMAGE_TEXT,
        "pad_token": pad_text,
        "padding_side": "left",
        "processor_class": "LlavaProcessor",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def _text(token: Any) -> str | None:
    """A token of tokenizer_config.json, which may be a string or a description."""
    return token.get("content") if isinstance(token, dict) else token


def _ids(document: dict) -> dict[str, int]:
    """Every token of a tokenizer.json and its id (only a Unigram vocabulary is a list)."""
    vocab = document["model"].get("vocab", {})
    known = {piece: i for i, (piece, _) in enumerate(vocab)} if isinstance(vocab, list) else dict(vocab)
    return known | {token["content"]: token["id"] for token in document.setdefault("added_tokens", [])}


def _find(document: dict, text: str) -> int | None:
    return _ids(document).get(text)


def _add(document: dict, text: str) -> int:
    """Make `text` a special token of the document and return its id."""
    ids = _ids(document)
    number = ids.get(text, max(ids.values(), default=-1) + 1)
    if all(token["content"] != text for token in document["added_tokens"]):
        document["added_tokens"].append(_added(number, text))
        document["added_tokens"].sort(key=lambda token: token["id"])
    return number


def _added(number: int, text: str) -> dict[str, Any]:
    return {
        "id": number,
        "content": text,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }


def _json(value: Any) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode()


def from_sentencepiece(model: bytes, where: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """tokenizer.json of a SentencePiece BPE model (Llama 1 and 2, Vicuna, Mistral).

    `legacy` of tokenizer_config.json decides whether every piece of text after a special token gets the
    invisible space again (True, the default) or only the start of the text does.
    """
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    count = pieces.get_piece_size()
    plain = [
        i
        for i in range(count)
        if not (pieces.is_control(i) or pieces.is_unknown(i) or pieces.is_byte(i) or pieces.is_unused(i))
    ]
    ranks = {pieces.id_to_piece(i): pieces.get_score(i) for i in plain}
    if any(score > 0 or score != int(score) for score in ranks.values()):
        raise CheckpointError(f"{where / 'tokenizer.model'} is not a BPE model: give a directory with a tokenizer.json")
    legacy = settings.get("legacy", True) is not False
    unknown = pieces.id_to_piece(pieces.unk_id())
    added = [_added(i, pieces.id_to_piece(i)) for i in range(count) if pieces.is_control(i) or pieces.is_unknown(i)]
    stated = {int(number): token for number, token in settings.get("added_tokens_decoder", {}).items()}
    if (where / "added_tokens.json").is_file():
        stated = {number: {"content": text} for text, number in read_json(where / "added_tokens.json").items()} | stated
    for number, token in sorted(stated.items()):
        if all(known["id"] != number for known in added):
            added.append(
                {
                    **_added(number, token["content"]),
                    **{k: token[k] for k in ("lstrip", "rstrip", "special") if k in token},
                }
            )
    bos = pieces.id_to_piece(pieces.bos_id())
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        **_spaces(legacy),
        "post_processor": _starts_with(bos, pieces.bos_id()),
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": unknown, "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True, "byte_fallback": any(map(pieces.is_byte, range(count))), "ignore_merges": False,
            "vocab": {pieces.id_to_piece(i): i for i in range(count)}, "merges": _merges(ranks),
        },
    }  # fmt: skip


def _spaces(legacy: bool) -> dict[str, Any]:
    """Spaces made visible and the invisible space put in front: of every piece of text (legacy), or of the
    text alone.

    Metaspace leaves a text alone that starts with its replacement; with a blank as replacement, when every
    blank is visible already, it never does.
    """
    visible = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    if legacy:
        prepend = {"type": "Prepend", "prepend": SPACE}
        return {"normalizer": {"type": "Sequence", "normalizers": [prepend, visible]}, "pre_tokenizer": None}
    steps = [
        {"type": "Metaspace", "replacement": replacement, "prepend_scheme": scheme, "split": False}
        for replacement, scheme in ((" ", "first"), (SPACE, "never"))
    ]
    return {"normalizer": visible, "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}


def _merges(ranks: dict[str, float]) -> list[list[str]]:
    """Pairs to be joined, best first: pieces by falling score, ties between the cuts of one piece by the
    scores of their halves.
    """
    merges = []
    for piece in sorted(ranks, key=lambda p: -ranks[p]):
        cuts = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        known = [cut for cut in cuts if cut[0] in ranks and cut[1] in ranks]
        merges += sorted(known, key=lambda cut: (-ranks[cut[0]], -ranks[cut[1]]))
    return [list(pair) for pair in merges]


def _starts_with(bos: str, number: int) -> dict[str, Any]:
    """The post-processor that puts BOS in front of every sequence."""
    first, second = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    special = [{"SpecialToken": {"id": bos, "type_id": i}} for i in range(2)]
    return {
        "type": "TemplateProcessing",
        "single": [special[0], first],
        "pair": [special[0], first, special[1], second],
        "special_tokens": {bos: {"id": bos, "ids": [number], "tokens": [bos]}},
    }

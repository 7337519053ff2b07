"""Text to token ids and back, with the characters that every token stands for.

    "USER: <image>\\nHi</s>"  --cut at <image>-->  strings  --tokenizer model-->  ids and spans

A model is SentencePiece or a `tokenizer.json` (`data.tokenizer_models`). Each string between two images is
tokenised afresh, as LLaVA does (`tokenizer_image_token`); HF's processor keeps `<image>` inside one string,
which is what `encode` does when `<image>` is an added token. Where no token opens a text (T5), EOS closes
every string, before images too, as CLIP-FlanT5 was trained. A span is (start, end) in characters of the
whole text; tokens that stand for no text (BOS, EOS) have NOWHERE.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_jax.config import IMAGE, UserError
from vlm_jax.data.templates import IMAGE_TEXT
from vlm_jax.data.tokenizer_models import AddedToken, SentencePieceModel, Span, TokenizersModel

NOWHERE = (-1, -1)
FILES = ("tokenizer.json", "tokenizer.model", "spiece.model")  # the first that a directory holds is read
SENTINELS = 100  # of a model without BOS: what T5 marks the gaps of a text with, `<extra_id_0>` being the last id
_PADDING_ROWS = 1024  # how many more rows than tokens an embedding may have (they are padded to round sizes)


class TokenizerError(UserError):
    """Tokenizer files that cannot be used, or that do not belong to the model."""


class Tokenizer:
    """A model and its special ids bos_id, eos_id, unk_id, pad_id (None without; pad falls back on unk, then
    eos).

    prefix, suffix: ids put around a whole text, for Llama (BOS,) and (), for T5 () and (EOS,). names: texts of
    the special tokens. source: where it was read from. settings: the rest of tokenizer_config.json, kept for `save`.
    """

    def __init__(
        self,
        model: SentencePieceModel | TokenizersModel,
        names: Mapping[str, str | None],
        prefix: Sequence[int] = (),
        suffix: Sequence[int] = (),
        source: str | Path | None = None,
        settings: Mapping[str, Any] | None = None,
    ):
        self.model, self.names, self.source, self.settings = model, dict(names), source, dict(settings or {})
        self.prefix, self.suffix = tuple(prefix), tuple(suffix)
        self.bos_id, self.eos_id, self.unk_id, pad = (
            None if names.get(kind) is None else model.id_of(names[kind]) for kind in ("bos", "eos", "unk", "pad")
        )
        self.pad_id = next((i for i in (pad, self.unk_id, self.eos_id) if i is not None), None)

    @property
    def size(self) -> int:
        """Ids go from 0 to size - 1."""
        return self.model.size

    @property
    def legacy(self) -> bool | None:
        """Do chunks behind a special token begin with an invisible space? None where no chunk ever does."""
        return self.model.legacy

    @property
    def closes_strings(self) -> bool:
        """Is every string between images closed by `suffix`, not only the last? So it is where nothing opens a text."""
        return not self.prefix

    @property
    def fingerprint(self) -> str:
        """Hash of all that ids depend on."""
        return hashlib.sha256(
            self.model.content + repr((self.model.added, self.legacy, self.prefix, self.suffix)).encode()
        ).hexdigest()

    def id_of(self, text: str) -> int | None:
        """Id of a piece or added token, None if there is no such token."""
        return self.model.id_of(text)

    def with_tokens(self, *texts: str) -> Tokenizer:
        """A tokenizer that knows these special tokens too, numbered from `size` on; known ones keep their
        ids.
        """
        new = [text for text in dict.fromkeys(texts) if self.id_of(text) is None]
        model = self.model.with_tokens([AddedToken(text, self.size + k) for k, text in enumerate(new)])
        return Tokenizer(model, self.names, self.prefix, self.suffix, self.source, self.settings)

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Ids of one string; `special` puts prefix and suffix around."""
        return self.encode_spans(text, images=False, special=special)[0]

    def encode_images(self, text: str) -> list[int]:
        """Ids with IMAGE for every `<image>`; what stands between is tokenised as strings of their own."""
        return self.encode_spans(text, images=True)[0]

    def encode_spans(self, text: str, images: bool, special: bool = True) -> tuple[list[int], list[Span]]:
        """Ids [n] and spans [n] in characters of `text`; `images`: `<image>` becomes IMAGE or stays text."""
        ids = list(self.prefix) if special else []
        spans, cursor = [NOWHERE] * len(ids), 0
        suffix, strings = self.suffix if special else (), text.split(IMAGE_TEXT) if images else [text]
        for k, string in enumerate(strings):
            if k:
                ids.append(IMAGE)
                spans.append((cursor, cursor + len(IMAGE_TEXT)))
                cursor += len(IMAGE_TEXT)
            more, where = self.model.encode(string)
            ids += more
            spans += [(cursor + a, cursor + b) for a, b in where]
            cursor += len(string)
            if self.closes_strings or k == len(strings) - 1:
                ids += suffix
                spans += [NOWHERE] * len(suffix)
        return ids, spans

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of ids. A leading prefix is no text; IMAGE reads `<image>` unless skipped; ids that no token
        has are passed over.
        """
        ids = [int(i) for i in ids]
        return self._text(ids[self._lead(ids) :], skip_special)

    def _lead(self, ids: list[int]) -> int:
        return len(self.prefix) if tuple(ids[: len(self.prefix)]) == self.prefix else 0

    def _text(self, ids: list[int], skip_special: bool = True) -> str:
        out, start = [], 0
        for k in [k for k, i in enumerate(ids) if i == IMAGE] + [len(ids)]:
            out.append(self.model.decode([i for i in ids[start:k] if 0 <= i < self.size], skip_special))
            start = k + 1
        return ("" if skip_special else IMAGE_TEXT).join(out)

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The text that each id adds, as it comes, and what is left at the end; joined they are
        `decode(ids)`.

        Bytes of an unfinished character wait for the rest. Only the last few ids are decoded again.
        """
        seen, start, done = [], 0, 0
        for i in ids:
            seen.append(int(i))
            if len(seen) == self._lead(seen) and self.prefix:
                start = done = len(seen)
            before, after = self._text(seen[start:done]), self._text(seen[start:])
            if len(after) > len(before) and not after.endswith("\ufffd"):
                start, done = done, len(seen)
                yield after[len(before) :]
            else:
                yield ""
        yield self._text(seen[start:])[len(self._text(seen[start:done])) :]

    def save(self, directory: str | Path) -> None:
        """Write the model's file and tokenizer_config.json, as HF and `load_tokenizer` read them."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / self.model.file).write_bytes(self.model.content)
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", **self.settings}
        if isinstance(self.model, SentencePieceModel):
            family = "LlamaTokenizer" if self.model.has_bos else "T5Tokenizer"
            settings = {"tokenizer_class": family, **self.settings, "legacy": self.legacy}
            settings |= {"add_bos_token": bool(self.prefix), "add_eos_token": bool(self.suffix)}
        settings |= {f"{kind}_token": name for kind, name in self.names.items()}
        settings["added_tokens_decoder"] = {str(token.id): token.settings for token in self.model.added}
        text = json.dumps(settings, indent=2, ensure_ascii=False)
        (directory / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def load_tokenizer(
    path: str | Path,
    *,
    legacy: bool | None = None,
    sentinels: int | None = None,
    added: Sequence[AddedToken] = (),
    bos: str | None = None,
    eos: str | None = None,
    unk: str | None = None,
    pad: str | None = None,
) -> Tokenizer:
    """The tokenizer of a model directory (the first of FILES that it holds) or of one such file.

    Special tokens, `legacy`, the BOS and EOS habits and the number of `sentinels` (extra_ids) come from
    tokenizer_config.json, special_tokens_map.json and added_tokens.json where they are, else they are Llama's,
    or T5's for a SentencePiece model without BOS; an argument that is given (the token's text) goes before them.
    """
    path = Path(path)
    files = [path / name for name in FILES] if path.is_dir() else [path]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise TokenizerError(f"{path} holds none of {', '.join(FILES)}: copy the tokenizer of the model there")
    settings = _settings(path) if path.is_dir() else {}
    if file.suffix == ".json":
        model = _parsed(file, lambda: TokenizersModel(file.read_text(encoding="utf-8")))
        model = model.with_tokens(added) if added else model
    else:
        legacy = settings.get("legacy") if legacy is None else legacy
        tokens = [*_added_tokens(path, settings), *added]
        model = _parsed(file, lambda: SentencePieceModel(file.read_bytes(), tokens, legacy is not False))
        if not model.has_bos:
            count = settings.get("extra_ids", SENTINELS) if sentinels is None else sentinels
            model, settings = _with_sentinels(model, count), {**settings, "extra_ids": count}
    given = {"bos": bos, "eos": eos, "unk": unk, "pad": pad}
    usual = _usual_names(model)
    names = {kind: given[kind] or _content(settings.get(f"{kind}_token", usual[kind])) for kind in usual}
    if file.suffix == ".json":
        return Tokenizer(model, names, model.prefix, model.suffix, path, settings)
    bos_id, eos_id = (model.id_of(names[kind]) if names[kind] else None for kind in ("bos", "eos"))
    prefix = [bos_id] if bos_id is not None and settings.get("add_bos_token", True) else []
    suffix = [eos_id] if eos_id is not None and settings.get("add_eos_token", not model.has_bos) else []
    return Tokenizer(model, names, prefix, suffix, path, settings)


def check_vocabulary(tokenizer: Tokenizer, llm_vocab: int, where: str = "the model") -> None:
    """TokenizerError unless every id has one of `llm_vocab` embeddings, and hardly more of them exist."""
    if not tokenizer.size <= llm_vocab <= tokenizer.size + _PADDING_ROWS:
        raise TokenizerError(
            f"the tokenizer of {tokenizer.source or 'this run'} has {tokenizer.size} tokens but {where} has "
            f"llm.vocab={llm_vocab} embeddings: use the tokenizer that the model came with"
        )


def expand_images(tokens: Sequence[int], slots: Sequence[int], token: int) -> list[int]:
    """Ids as HF's processor gives them: the k-th `token` or IMAGE is written slots[k] times, as `token`."""
    out, counts = [], iter(slots)
    for i in tokens:
        out += [token] * next(counts) if i in (token, IMAGE) else [int(i)]
    return out


def _parsed(file: Path, read):
    try:
        return read()
    except Exception as error:  # sentencepiece and tokenizers raise bare RuntimeError / Exception
        raise TokenizerError(f"{file} is not a tokenizer file that can be read: {error}") from error


def _settings(directory: Path) -> dict:
    """tokenizer_config.json over special_tokens_map.json, one dict."""
    merged = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (directory / name).is_file():
            document = _object(directory / name)
            merged.update({key: value for key, value in document.items() if value is not None})
    return merged


def _usual_names(model: SentencePieceModel | TokenizersModel) -> dict[str, str | None]:
    """Special tokens of a model that comes without settings; a model with BOS pads with something else."""
    names = {"bos": "<s>", "eos": "</s>", "unk": "<unk>", "pad": "<pad>" if model.id_of("<s>") is None else None}
    return {kind: name if name and model.id_of(name) is not None else None for kind, name in names.items()}


def _with_sentinels(model: SentencePieceModel, count: int) -> SentencePieceModel:
    """The model with `<extra_id_0>` ... behind its pieces, numbered from the end, unless it knows them already."""
    tokens = [AddedToken(f"<extra_id_{k}>", model.pieces + count - 1 - k) for k in range(count)]
    return model.with_tokens([token for token in tokens if model.id_of(token.text) is None])


def _content(token: str | dict | None) -> str | None:
    return token["content"] if isinstance(token, dict) else token


def _added_tokens(directory: Path, settings: dict) -> list[AddedToken]:
    """Tokens of added_tokens.json {text: id}, then of tokenizer_config's added_tokens_decoder {id: {...}}."""
    tokens = {}
    if (directory / "added_tokens.json").is_file():
        tokens = {text: AddedToken(text, i) for text, i in _object(directory / "added_tokens.json").items()}
    for i, t in settings.get("added_tokens_decoder", {}).items():
        tokens[t["content"]] = AddedToken(
            t["content"], int(i), t.get("special", True), t.get("lstrip", False), t.get("rstrip", False)
        )
    return list(tokens.values())


def _object(file: Path) -> dict[str, Any]:
    """A JSON object in a file."""
    return _parsed(file, lambda: dict(json.loads(file.read_text(encoding="utf-8"))))

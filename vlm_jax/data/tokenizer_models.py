"""The two kinds of tokenizer model behind `data.tokenizer`: text -> ids and what they stand for.

    SentencePieceModel   tokenizer.model, spiece.model; we cut the special tokens out of the text and encode what is between
    TokenizersModel      tokenizer.json through the `tokenizers` library

The span of an id is (start, end) in characters of the text; bytes of one character share it, that of the
invisible space before a text is empty.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Sequence

# Protobuf merges a message that is appended to another: this is {normalizer_spec: {add_dummy_prefix: false}}.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"

Span = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class AddedToken:
    """A token cut out of the text before the model sees it; lstrip, rstrip swallow white space beside."""

    text: str
    id: int
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False

    @property
    def settings(self) -> dict:
        """The token as HF's files describe it."""
        fields = {"content": self.text, "lstrip": self.lstrip, "rstrip": self.rstrip, "special": self.special}
        return {**fields, "normalized": False, "single_word": False}


class SentencePieceModel:
    """A SentencePiece model with its special tokens split out of the text, nothing stripped around them.

    legacy: every chunk begins with the invisible space (Vicuna <= 1.3); not legacy: only a chunk at the very
    start of the text does (Vicuna 1.5). As transformers 4.37's slow LlamaTokenizer. The control pieces of the
    model (BOS, EOS, unknown, padding, as far as it has them) are special tokens.
    """

    def __init__(self, model: bytes, added: Iterable[AddedToken] = (), legacy: bool = True):
        import sentencepiece  # here, because --help must not wait for it

        self.legacy = legacy
        self._first = sentencepiece.SentencePieceProcessor(model_proto=model)
        self._inner = self._first
        if not legacy:
            self._inner = sentencepiece.SentencePieceProcessor(model_proto=model + _NO_DUMMY_PREFIX)
        self.pieces = self._first.get_piece_size()
        controls = (self._first.bos_id(), self._first.eos_id(), self._first.unk_id(), self._first.pad_id())
        controls = [AddedToken(self._first.id_to_piece(i), i) for i in controls if i >= 0]
        known = {token.text: token for token in (*controls, *added)}
        self.added = tuple(sorted(known.values(), key=lambda token: token.id))
        self._by_text = {token.text: token for token in self.added}
        self._by_id = {token.id: token for token in self.added}
        longest_first = sorted(self.added, key=lambda token: -len(token.text))
        self._cut = re.compile("|".join(map(_pattern, longest_first)) or "(?!)")

    @property
    def has_bos(self) -> bool:
        """Can a text be opened by a piece of the model? Llama's can, T5's cannot."""
        return self._first.bos_id() >= 0

    @property
    def file(self) -> str:
        """Where transformers looks for such a model."""
        return "tokenizer.model" if self.has_bos else "spiece.model"

    @property
    def content(self) -> bytes:
        """The bytes of `file`."""
        return self._first.serialized_model_proto()

    @property
    def size(self) -> int:
        """Ids go from 0 to size - 1."""
        return max([self.pieces - 1, *self._by_id]) + 1

    def with_tokens(self, tokens: Sequence[AddedToken]) -> SentencePieceModel:
        """The model with more added tokens."""
        return SentencePieceModel(self.content, (*self.added, *tokens), self.legacy)

    def id_of(self, text: str) -> int | None:
        """Id of an added token or a piece."""
        if text in self._by_text:
            return self._by_text[text].id
        found = self._first.piece_to_id(text)
        return found if self._first.id_to_piece(found) == text else None

    def encode(self, text: str) -> tuple[list[int], list[Span]]:
        """Ids [n] and spans [n] of one string, nothing around it."""
        ids, spans, cursor = [], [], 0
        for found in self._cut.finditer(text):
            self._chunk(text, cursor, found.start(), ids, spans)
            ids.append(self._by_text[found[found.lastindex or 0]].id)
            spans.append(found.span())
            cursor = found.end()
        self._chunk(text, cursor, len(text), ids, spans)
        return ids, spans

    def _chunk(self, text: str, start: int, end: int, ids: list[int], spans: list[Span]) -> None:
        if start < end:
            model = self._first if start == 0 else self._inner
            coded = model.encode(text[start:end], out_type="offset_mapping")
            ids += coded["ids"]
            spans += [(start + a, start + b) for a, b in coded["offsets"]]

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        """Inverse of `encode`: the invisible space is taken off where encoding put it."""
        text, run, at_start = [], [], True

        def flush() -> None:
            if run:
                text.append((self._first if at_start else self._inner).decode(run))
                run.clear()

        for i in ids:
            token = self._by_id.get(i)
            if token is None:
                run.append(i)
                continue
            flush()
            at_start = False
            text.append("" if token.special and skip_special else token.text)
        flush()
        return "".join(text)


class TokenizersModel:
    """A tokenizer.json through the `tokenizers` library; `prefix` and `suffix` are the ids its post-processor
    adds.
    """

    file = "tokenizer.json"

    def __init__(self, document: str):
        import tokenizers

        self._document = document
        self._model = tokenizers.Tokenizer.from_str(document)
        self._model.no_padding()
        self._model.no_truncation()
        self.prefix, self.suffix = self._around()
        self._model.post_processor = None  # byte-level ones also trim the spaces off the offsets
        self.added = tuple(
            AddedToken(t.content, i, t.special, t.lstrip, t.rstrip)
            for i, t in sorted(self._model.get_added_tokens_decoder().items())
        )
        self.legacy = self._is_legacy()

    def _is_legacy(self) -> bool | None:
        """As SentencePieceModel.legacy, seen on what follows a special token; None where nothing puts a space before words."""
        mark = next((token.text for token in self.added if token.special), None)
        alone = self._model.encode("a", add_special_tokens=False).tokens
        if mark is None or not alone or not alone[0].startswith("\u2581"):
            return None
        return self._model.encode(f"{mark}a", add_special_tokens=False).tokens[1:] == alone

    def _around(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What is put around a text, seen on the first one that is not empty in this vocabulary."""
        for text in ("a", "0", *self._model.get_vocab()):
            coded = self._model.encode(text)
            own = [k for k, sequence in enumerate(coded.sequence_ids) if sequence is not None]
            if own:
                return tuple(coded.ids[: own[0]]), tuple(coded.ids[own[-1] + 1 :])
        return (), ()

    @property
    def content(self) -> bytes:
        """The bytes of `file`."""
        return self._document.encode()

    @property
    def size(self) -> int:
        """Ids go from 0 to size - 1."""
        return max(self._model.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def with_tokens(self, tokens: Sequence[AddedToken]) -> TokenizersModel:
        """The model with more added tokens."""
        document = json.loads(self._document)
        new = [{"id": token.id, **token.settings} for token in tokens]
        document["added_tokens"] = [*(document.get("added_tokens") or []), *new]
        return TokenizersModel(json.dumps(document))

    def id_of(self, text: str) -> int | None:
        """Id of a token."""
        return self._model.token_to_id(text)

    def encode(self, text: str) -> tuple[list[int], list[Span]]:
        """Ids [n] and spans [n] of one string, nothing put around it."""
        coded = self._model.encode(text, add_special_tokens=False)
        return coded.ids, coded.offsets

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        """Inverse of `encode`."""
        return self._model.decode(ids, skip_special_tokens=skip_special)


def _pattern(token: AddedToken) -> str:
    """No group where the match is the token: a hundred groups make the search twenty times slower."""
    if not (token.lstrip or token.rstrip):
        return re.escape(token.text)
    space = r"\s*"
    return f"{space if token.lstrip else ''}({re.escape(token.text)}){space if token.rstrip else ''}"

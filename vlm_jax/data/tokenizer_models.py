"""The two kinds of tokenizer model behind `data.tokenizer`: text -> ids and the span (start, end) of
characters each stands for.

    SentencePieceModel   tokenizer.model; special tokens are cut out of the text by us, the chunks between them are encoded
    TokenizersModel      tokenizer.json through the `tokenizers` library

Bytes of one character share its span, the invisible space before a text is empty.
"""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Iterable, Sequence

# A protobuf message appended to another is merged into it: this one is {normalizer_spec: {add_dummy_prefix:
# false}}.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"

Span = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class AddedToken:
    """A token that is cut out of the text before the model sees it; lstrip / rstrip swallow the white space
    beside it.
    """

    text: str
    id: int
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False


class SentencePieceModel:
    """A SentencePiece model with its special tokens split out of the text, nothing stripped around them.

    legacy: every chunk begins with the invisible space (transformers before the Llama fix, Vicuna <= 1.3);
    not legacy: only a chunk at the very start of the text does. Measured against transformers 4.37's
    LlamaTokenizer.
    """

    def __init__(self, model: bytes, added: Iterable[AddedToken] = (), legacy: bool = True):
        import sentencepiece  # here, because --help must not wait for it

        self.legacy = legacy
        self._first = sentencepiece.SentencePieceProcessor(model_proto=model)
        self._inner = (
            self._first
            if legacy
            else sentencepiece.SentencePieceProcessor(model_proto=model + _NO_DUMMY_PREFIX)
        )
        self.pieces = self._first.get_piece_size()
        controls = (self._first.bos_id(), self._first.eos_id(), self._first.unk_id())
        known = {
            self._first.id_to_piece(i): AddedToken(self._first.id_to_piece(i), i) for i in controls if i >= 0
        }
        known.update({token.text: token for token in added})
        self.added = tuple(sorted(known.values(), key=lambda token: token.id))
        self._by_text = {token.text: token for token in self.added}
        self._by_id = {token.id: token for token in self.added}
        self._cut = re.compile(
            "|".join(map(_pattern, sorted(self.added, key=lambda t: -len(t.text)))) or "(?!)"
        )

    @property
    def content(self) -> bytes:
        return self._first.serialized_model_proto()

    @property
    def size(self) -> int:
        """Ids go from 0 to size - 1."""
        return max([self.pieces - 1, *self._by_id]) + 1

    def with_tokens(self, tokens: Sequence[AddedToken]) -> "SentencePieceModel":
        return SentencePieceModel(self.content, (*self.added, *tokens), self.legacy)

    def id_of(self, text: str) -> int | None:
        if text in self._by_text:
            return self._by_text[text].id
        found = self._first.piece_to_id(text)
        return found if self._first.id_to_piece(found) == text else None

    def encode(self, text: str) -> tuple[list[int], list[Span]]:
        ids, spans, cursor = [], [], 0
        for found in self._cut.finditer(text):
            self._chunk(text, cursor, found.start(), ids, spans)
            ids.append(self._by_text[found[found.lastindex]].id)
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
    """A tokenizer.json through the `tokenizers` library, without what its post-processor adds (`prefix` and
    `suffix` keep that).
    """

    legacy = None

    def __init__(self, document: str):
        import tokenizers

        self._document = document
        self._model = tokenizers.Tokenizer.from_str(document)
        self._model.no_padding()
        self._model.no_truncation()
        whole, bare = (self._model.encode("a", add_special_tokens=add).ids for add in (True, False))
        at = next((k for k in range(len(whole)) if whole[k : k + len(bare)] == bare), 0)
        self.prefix, self.suffix = tuple(whole[:at]), tuple(whole[at + len(bare) :])
        self._model.post_processor = None  # byte-level ones also trim the spaces off the offsets
        self.added = tuple(
            AddedToken(t.content, i, t.special, t.lstrip, t.rstrip)
            for i, t in sorted(self._model.get_added_tokens_decoder().items())
        )

    @property
    def content(self) -> bytes:
        return self._document.encode()

    @property
    def size(self) -> int:
        return max(self._model.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def with_tokens(self, tokens: Sequence[AddedToken]) -> "TokenizersModel":
        document = json.loads(self._document)
        document["added_tokens"] += [
            {
                "id": t.id,
                "content": t.text,
                "single_word": False,
                "lstrip": t.lstrip,
                "rstrip": t.rstrip,
                "normalized": False,
                "special": t.special,
            }
            for t in tokens
        ]
        return TokenizersModel(json.dumps(document))

    def id_of(self, text: str) -> int | None:
        return self._model.token_to_id(text)

    def encode(self, text: str) -> tuple[list[int], list[Span]]:
        coded = self._model.encode(text, add_special_tokens=False)
        return coded.ids, coded.offsets

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        return self._model.decode(ids, skip_special_tokens=skip_special)


def _pattern(token: AddedToken) -> str:
    space = r"\s*"
    return f"{space if token.lstrip else ''}({re.escape(token.text)}){space if token.rstrip else ''}"

"""Where the records of a JSON list or of JSON lines lie in their file, found without building Python objects.

    [ {"id": 1, "t": "a, [b"} , {"id": 2} ]
     ^-----------------------^ ^---------^        spans (start, end) in bytes: from comma to comma at depth 1

Only quotes, commas and brackets matter, and they are one byte each in UTF-8 and in no other character. Escaped quotes are blanked
first; what stands between an odd and an even quote is text; a running sum of the brackets outside it is the depth. A piece of the file
is looked at as one array, so a GB takes seconds. What lies inside a record is not judged here: it may be no JSON.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import BinaryIO

import numpy as np

CHUNK = 1 << 20  # bytes looked at together: fits the processor's cache
QUOTE, COMMA, OPEN, CLOSE = 1, 2, 3, 4
_MARKS = np.zeros(256, np.uint8)  # mark of a byte, 0: none
for _characters, _mark in ((b'"', QUOTE), (b",", COMMA), (b"[{", OPEN), (b"]}", CLOSE)):
    _MARKS[list(_characters)] = _mark
_MARKED = (_MARKS > 0).tobytes()
_STEP = np.array([0, 0, 0, 1, -1], np.int64)  # change of depth by mark
_SPACE = np.zeros(256, bool)
_SPACE[list(b" \t\r\n")] = True


class ListError(ValueError):
    """A list that does not end, or not with its file. spans: of its whole elements, int64 [n, 2]; end: the byte behind them."""

    def __init__(self, message: str, spans: np.ndarray, end: int):
        super().__init__(message)
        self.spans, self.end = spans, end


def list_spans(file: BinaryIO) -> np.ndarray:
    """Spans of the elements of the JSON list that a file consists of, int64 [N, 2]; ListError.

    A missing element between two commas has a blank span.
    """
    commas, opening, depth, inside, end = [np.zeros(0, np.int64)], None, 0, 0, None
    for base, piece in _pieces(file, lambda piece: len(piece.rstrip(b"\\"))):
        clean = piece.replace(b"\\\\", b"__").replace(b'\\"', b"__") if b"\\" in piece else piece
        at = np.flatnonzero(np.frombuffer(clean.translate(_MARKED), bool))
        if not len(at):
            continue
        opening = base + int(at[0]) if opening is None else opening
        marks = _MARKS[np.frombuffer(clean, np.uint8)[at]]
        quotes = np.cumsum(marks == QUOTE) + inside
        outside = (marks != QUOTE) & (quotes & 1 == 0)
        at, marks, inside = at[outside], marks[outside], int(quotes[-1]) & 1
        depths = np.cumsum(_STEP[marks]) + depth
        closed = np.flatnonzero(depths <= 0)
        stop = int(closed[0]) if len(closed) else len(at)
        commas.append(base + at[:stop][(marks[:stop] == COMMA) & (depths[:stop] == 1)])
        depth = int(depths[-1]) if len(depths) else depth
        if len(closed):
            end = base + int(at[stop])
            break
    cut = np.concatenate(commas)
    size = file.seek(0, 2)
    spans = np.stack([np.append((opening or 0) + 1, cut + 1), np.append(cut, size if end is None else end)], axis=1)
    if end is None:
        raise ListError(f"it is still open at byte {size}, where the file ends", spans[:-1], int(spans[-1, 0]))
    after = _first_word(file, end + 1)
    if after is not None:
        raise ListError(f"it is closed at byte {end} and something else follows at byte {after}", spans, size)
    return spans[:0] if len(spans) == 1 and _first_word(file, opening + 1) == end else spans


def line_spans(file: BinaryIO) -> np.ndarray:
    """Spans of the lines of a file that are not blank, int64 [N, 2]; a byte order mark belongs to no line."""
    spans = [np.zeros((0, 2), np.int64)]
    for base, piece in _pieces(file, lambda piece: piece.rfind(b"\n") + 1):
        codes = np.frombuffer(piece, np.uint8)
        ends = np.flatnonzero(codes == 10)
        if not piece.endswith(b"\n"):
            ends = np.append(ends, len(piece))
        starts = np.append(0, ends[:-1] + 1)
        starts[0] += 3 if base == 0 and piece.startswith(b"\xef\xbb\xbf") else 0
        kept = starts < ends
        starts, ends = starts[kept], ends[kept]
        suspects = np.flatnonzero(_SPACE[codes[starts]])  # few: most lines begin with a brace
        blank = [k for k in suspects if not piece[starts[k] : ends[k]].strip()]
        spans.append(base + np.delete(np.stack([starts, ends], axis=1), blank, axis=0))
    return np.concatenate(spans)


def _pieces(file: BinaryIO, whole: Callable[[bytes], int]) -> Iterator[tuple[int, bytes]]:
    """(offset, bytes) of a file in order; whole(bytes): how many can be looked at without those that follow (not at the end)."""
    file.seek(0)
    base, rest = 0, b""
    while fresh := file.read(CHUNK):
        piece = rest + fresh
        size = whole(piece)
        if size:
            yield base, piece[:size]
        base, rest = base + size, piece[size:]
    if rest:
        yield base, rest


def _first_word(file: BinaryIO, offset: int) -> int | None:
    """Where the next byte that is no white space stands; None if there is none."""
    file.seek(offset)
    while piece := file.read(CHUNK):
        if piece.strip():
            return offset + len(piece) - len(piece.lstrip())
        offset += len(piece)
    return None

"""LLaVA training files: dialogues about images as JSON (one list) or JSONL (one record per line).

    {"id": "7", "image": "coco/7.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
                                                         {"from": "gpt", "value": "A cat."}]}

`image` is absent for text-only records, a path below the image folder, or a list of paths. Other keys
(`model`, `source` ...) are not read, ids may be numbers, a dialogue may begin with the assistant (that turn
is not trained on).
"""

from __future__ import annotations

import array
import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from vlm_jax.config import UserError
from vlm_jax.data.templates import IMAGE_TEXT

ROLES = {"human": "human", "gpt": "gpt", "user": "human", "assistant": "gpt"}
Turn = tuple[str, str]  # ("human" | "gpt", text)


class RecordError(UserError):
    """A record or data file that cannot be used; the message names file and record."""


@dataclasses.dataclass(frozen=True)
class Record:
    """A dialogue: turns, human and gpt alternating; full image paths in order; `where` for messages."""

    id: str
    turns: tuple[Turn, ...]
    images: tuple[str, ...] = ()
    where: str = "record"


class Records(Sequence[Record]):
    """A file of records, random access: JSONL by byte offsets found once, a JSON list held in memory.

    A record is checked when it is asked for, so that a RecordError leaves the others usable.
    """

    def __init__(self, path: str | Path, image_folder: str | Path | None = None):
        self.path = Path(path)
        self.image_folder = Path(image_folder) if image_folder is not None else None
        if not self.path.is_file():
            raise RecordError(
                f"{self.path} does not exist or is not a file: set data.path to a LLaVA .json or .jsonl file"
            )
        self._offsets = self._items = None
        with open(self.path, "rb") as file:
            if _first_character(file) == b"[":
                self._items = self._list(file)
            else:
                self._offsets = array.array("q", _line_offsets(file))
        if len(self) == 0:
            raise RecordError(
                f"{self.path} holds no records: a LLaVA file is a list of dialogues, or one dialogue per line"
            )

    def __len__(self) -> int:
        return len(self._offsets if self._items is None else self._items)

    def __getitem__(self, index: int) -> Record:
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.path} has {len(self)} records, there is no number {index}")
        index %= len(self)
        return record_of(self._raw(index), index, self.path, self.image_folder)

    def __iter__(self) -> Iterator[Record]:
        return (self[i] for i in range(len(self)))

    def _raw(self, index: int):
        if self._items is not None:
            return self._items[index]
        with open(self.path, "rb") as file:
            file.seek(self._offsets[index])
            line = file.readline()
        try:
            return json.loads(line)
        except ValueError as error:
            raise RecordError(f"{self.path}: record {index} is not a line of JSON: {error}") from error

    def _list(self, file) -> list:
        try:
            return json.load(file)
        except ValueError as error:
            raise RecordError(f"{self.path} is not JSON: {error}; was it cut short?") from error


def record_of(raw, index: int, path: str | Path = "data", image_folder: str | Path | None = None) -> Record:
    """A parsed record, checked: RecordError says in one sentence what is wrong where."""
    if not isinstance(raw, dict):
        raise RecordError(f"{path}: record {index} is {type(raw).__name__}, not an object with `conversations`")
    where = f"{path}: record {index}" + (f" (id {raw['id']})" if "id" in raw else "")
    turns = _turns(raw.get("conversations"), where)
    images = _images(raw.get("image"), where)
    shown = [text.count(IMAGE_TEXT) for _, text in turns if IMAGE_TEXT in text]
    # LLaVA makes one image of several <image> in a turn, so a single image may be named more than once there.
    if len(images) != (len(shown) if len(images) == 1 else sum(shown)):
        raise RecordError(
            f"{where} has {len(images)} image(s) but {sum(shown)} {IMAGE_TEXT} in its conversations: "
            "each image needs exactly one"
        )
    folder = os.fspath(image_folder) if image_folder is not None else ""
    return Record(str(raw.get("id", index)), turns, tuple(os.path.join(folder, image) for image in images), where)


def _turns(conversations, where: str) -> tuple[Turn, ...]:
    if not isinstance(conversations, list) or not conversations:
        raise RecordError(f"{where} has no `conversations`: give it a list of turns {{from, value}}")
    turns = []
    for k, turn in enumerate(conversations):
        speaker = turn.get("from") if isinstance(turn, dict) else None
        if not isinstance(speaker, str) or speaker not in ROLES:
            raise RecordError(f"{where} has a turn {k} from {speaker!r}: `from` must be human or gpt")
        if not isinstance(turn.get("value"), str):
            raise RecordError(f"{where} has a turn {k} whose value is {type(turn.get('value')).__name__}, not text")
        if turns and turns[-1][0] == ROLES[speaker]:
            raise RecordError(
                f"{where} has its roles out of order: turn {k} is again {speaker}, but they must alternate"
            )
        try:
            turn["value"].encode()
        except UnicodeEncodeError:
            raise RecordError(
                f"{where} has a turn {k} with half a character (an unpaired surrogate): repair its text"
            ) from None
        turns.append((ROLES[speaker], turn["value"]))
    if turns[-1][0] == "human" and len(turns) < 3 or len(turns) == 1:
        raise RecordError(
            f"{where} has no answer to learn from: give it at least one human turn and one gpt turn after it"
        )
    return tuple(turns)


def _images(image, where: str) -> list[str]:
    images = [image] if isinstance(image, str) else image
    if images is None or images == "" or images == [""]:
        return []
    if not isinstance(images, list) or not all(isinstance(path, str) and path for path in images):
        raise RecordError(f"{where} has image={image!r}: `image` must be a path or a list of paths")
    return images


def _first_character(file) -> bytes:
    """First byte that is no white space (and no byte order mark), the file rewound."""
    head = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    file.seek(0)
    return head[:1]


def _line_offsets(file) -> Iterator[int]:
    offset = 0
    for line in file:
        if line.strip():
            yield offset
        offset += len(line)

"""LLaVA training files: dialogues about images as JSON (one list) or JSONL (one record per line).

    {"id": "7", "image": "coco/7.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
                                                         {"from": "gpt", "value": "A cat."}]}

`image` is absent for text-only records, a path below the image folder, or a list of paths; `task` may name what is made of the
record. Other keys (`model`, `source` ...) are not read, ids may be numbers, a dialogue may begin with the assistant (that turn is not
trained on). A file stays on disk: where its records lie is found once (`data.spans`), one is read when it is asked for.

A record that cannot be used raises RecordError with a `reason`:

    not_json          the record is no JSON            no_answer     no human turn with a gpt turn after it
    encoding          bytes that are not UTF-8, half   image_field   `image` is neither a path nor a list of paths
                      a character                      image_count   not one <image> for each image (several in one turn
    not_object        JSON, but no {...}                             may mean the same single image), an image without
    no_conversations  no list of turns                               <image>, <image> without image
    roles             a speaker we do not know, or     file          the whole file: missing, empty, cut short, changed
                      the same one twice in a row      template      a dialogue that the template cannot take
    text              a turn that is no text           task          a task that is not known (data.tasks)
    record            anything else                    too_long      no room for a generated image
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from vlm_jax.config import UserError
from vlm_jax.data.image_source import ImageSource
from vlm_jax.data.kept_arrays import Kept, content_hash, hash_of, kept_array, read_at
from vlm_jax.data.spans import ListError, line_spans, list_spans
from vlm_jax.data.templates import IMAGE_TEXT

ROLES = {"human": "human", "gpt": "gpt", "user": "human", "assistant": "gpt", "vuser": "vuser"}
VERSION = 1  # of the kept spans
ENOUGH = 1 << 24  # bytes in which a broken record shows that it is broken
FOREIGN = {  # beginnings of files that are no JSON
    b"\x1f\x8b": ("compressed with gzip: unpack it", "file"),
    b"\x28\xb5\x2f\xfd": ("compressed with zstd: unpack it", "file"),
    b"PK\x03\x04": ("a zip archive: unpack it", "file"),
    b"version https://git-lfs": ("only the pointer of Git LFS: fetch the file itself with git lfs pull", "file"),
    b"\xff\xfe": ("UTF-16 text: save it as UTF-8", "encoding"),
    b"\xfe\xff": ("UTF-16 text: save it as UTF-8", "encoding"),
}
# ("human" | "gpt" | "vuser", text); vuser: a question that the model asks (data.self_questioning)
Turn = tuple[str, str]
Image = str | ImageSource


class RecordError(UserError):
    """A record or data file that cannot be used; the message names file and record, `reason` is a word of the module's table."""

    def __init__(self, message: str, reason: str = "record"):
        super().__init__(message)
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class Record:
    """A dialogue: turns, human and gpt alternating; images in order (full paths, or where their bytes are).

    task: what is made of it (data.tasks), its own or set by its source. where: file and number, for messages.
    """

    id: str
    turns: tuple[Turn, ...]
    images: tuple[Image, ...] = ()
    where: str = "record"
    task: str = ""


@dataclasses.dataclass(frozen=True)
class ImagePaths:
    """Where images lie: a path that begins with a key of `roots` lies in that folder instead (the longest key counts), any other
    below `folder` unless it is absolute.

    >>> ImagePaths("images", {"coco": "/disk/coco", "coco/val": "/tmp/val"})("coco/val/1.jpg")
    '/tmp/val/1.jpg'
    """

    folder: str = ""
    roots: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __call__(self, path: str) -> str:
        """The full path of an image."""
        for key in sorted(self.roots, key=len, reverse=True):
            beginning = key.rstrip("/") + "/"
            if path.startswith(beginning):
                return os.path.join(self.roots[key], path.removeprefix(beginning))
        return os.path.join(self.folder, path)


class Records(Sequence[Record]):
    """A file of records, random access; threads and processes may share it.

    cache: folder where the spans of the records are kept for the next start, which then only hashes the file. A record is checked
    when it is asked for, so that a RecordError leaves the others usable; a file that cannot be used at all raises at once.
    """

    def __init__(
        self,
        path: str | Path,
        image_folder: str | Path | None = None,
        *,
        roots: Mapping[str, str] | None = None,
        cache: str | Path | None = None,
    ):
        self.path = Path(path)
        self.images = ImagePaths(os.fspath(image_folder or ""), dict(roots or {}))
        self._descriptor: int | None = None
        if not self.path.is_file():
            raise RecordError(
                f"{self.path} does not exist or is not a file: set data.path to a LLaVA .json or .jsonl file", "file"
            )
        with open(self.path, "rb") as file:
            self._state = _state(file.fileno())
            self._is_list = _first_character(file, self.path) == b"["
            key = "" if cache is None else f"records-{hash_of(VERSION, self.content)[:24]}"
            self._spans = kept_array(cache, key, lambda: self._found(file))
        if len(self) == 0:
            raise RecordError(
                f"{self.path} holds no records: a LLaVA file is a list of dialogues, or one dialogue per line", "file"
            )

    @functools.cached_property
    def content(self) -> str:
        """Hash of the file."""
        return content_hash(self.path)

    @property
    def fingerprint(self) -> str:
        """Hash of the file and of where its images lie."""
        return hash_of(self.content, self.images.folder, *sorted(self.images.roots.items()))

    def __len__(self) -> int:
        return len(self._spans.rows)

    def __getitem__(self, index: int) -> Record:
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.path} has {len(self)} records, there is no number {index}")
        index %= len(self)
        return record_of(self._raw(index), index, self.path, place=lambda paths: map(self.images, paths))

    def __iter__(self) -> Iterator[Record]:
        return (self[i] for i in range(len(self)))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptor": None}

    def _found(self, file: BinaryIO) -> np.ndarray:
        try:
            return list_spans(file) if self._is_list else line_spans(file)
        except ListError as error:
            self._spans = Kept(error.spans)
            for index in range(len(self)):  # a quote or bracket that is missing makes all that follows look wrong
                self._raw(index)
            _check_open_end(file, error, self.path)
            raise RecordError(
                f"{self.path} is not JSON: the list holds {len(self)} whole records, but {error}; was it cut short?",
                "file",
            ) from error

    def _raw(self, index: int) -> Any:
        start, end = self._spans.rows[index].tolist()
        data = read_at(self._open(), start, end - start)
        try:
            return json.loads(data.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise RecordError(
                f"{self.path}: record {index} is not UTF-8 text (byte {start + error.start} of the file is "
                f"0x{data[error.start]:02x}): save the file as UTF-8",
                "encoding",
            ) from error
        except (ValueError, RecursionError) as error:
            kind = "JSON" if self._is_list else "a line of JSON"
            raise RecordError(
                f"{self.path}: record {index} is not {kind}, it begins at byte {start}: {error}", "not_json"
            ) from error

    def _open(self) -> int:
        """The file's descriptor in this process."""
        descriptor = self._descriptor
        if descriptor is None:
            descriptor = os.open(self.path, os.O_RDONLY)
            weakref.finalize(self, os.close, descriptor)
            if _state(descriptor) != self._state:
                raise RecordError(f"{self.path} has changed since this run began: start again", "file")
            self._descriptor = descriptor
        return descriptor


def record_of(
    raw: Any,
    index: int,
    path: str | Path = "data",
    image_folder: str | Path | None = None,
    *,
    place: Callable[[list[str]], Iterable[Image]] | None = None,
) -> Record:
    """A parsed record, checked: RecordError says in one sentence what is wrong where.

    place: from the paths in `image` to the images, if they do not simply lie in image_folder.
    """
    if not isinstance(raw, dict):
        raise RecordError(
            f"{path}: record {index} is {type(raw).__name__}, not an object with `conversations`", "not_object"
        )
    name = str(index if raw.get("id") is None else raw["id"]).encode("utf-8", "backslashreplace").decode()
    where = f"{path}: record {index}" + (f" (id {' '.join(name.split())})" if raw.get("id") is not None else "")
    turns = _turns(raw.get("conversations"), where)
    paths = _paths(raw.get("image"), where)
    images = tuple(place(paths) if place else map(ImagePaths(os.fspath(image_folder or "")), paths))
    shown = [text.count(IMAGE_TEXT) for _, text in turns if IMAGE_TEXT in text]
    # LLaVA makes one image of several <image> in a turn, so a single image may be named more than once there.
    if len(images) != (len(shown) if len(images) == 1 else sum(shown)):
        raise RecordError(
            f"{where} has {len(images)} image(s) but {sum(shown)} {IMAGE_TEXT} in its conversations: "
            "each image needs exactly one",
            "image_count",
        )
    task = raw.get("task")
    return Record(name, turns, images, where, task if isinstance(task, str) else "")


def _turns(conversations: Any, where: str) -> tuple[Turn, ...]:
    if not isinstance(conversations, list) or not conversations:
        raise RecordError(
            f"{where} has no `conversations`: give it a list of turns {{from, value}}", "no_conversations"
        )
    turns = []
    for k, turn in enumerate(conversations):
        speaker, text = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None)
        if not isinstance(speaker, str) or speaker not in ROLES:
            raise RecordError(f"{where} has a turn {k} from {speaker!r}: `from` must be human or gpt", "roles")
        if not isinstance(text, str):
            raise RecordError(f"{where} has a turn {k} whose value is {type(text).__name__}, not text", "text")
        if turns and turns[-1][0] == ROLES[speaker]:
            raise RecordError(
                f"{where} has its roles out of order: turn {k} is again {speaker}, but they must alternate", "roles"
            )
        try:
            text.encode()
        except UnicodeEncodeError:
            raise RecordError(
                f"{where} has a turn {k} with half a character (an unpaired surrogate): repair its text", "encoding"
            ) from None
        turns.append((ROLES[speaker], text))
    if turns[-1][0] == "human" and len(turns) < 3 or len(turns) == 1:
        raise RecordError(
            f"{where} has no answer to learn from: give it at least one human turn and one gpt turn after it",
            "no_answer",
        )
    return tuple(turns)


def _paths(image: Any, where: str) -> list[str]:
    paths = [image] if isinstance(image, str) else image
    if paths is None or paths == "" or paths == [""]:
        return []
    if not isinstance(paths, list) or not all(isinstance(path, str) and path for path in paths):
        raise RecordError(f"{where} has image={image!r}: `image` must be a path or a list of paths", "image_field")
    return paths


def _first_character(file: BinaryIO, path: Path) -> bytes:
    """First byte that is no white space and no byte order mark; RecordError for a file of another kind."""
    head = file.read(4096)
    for beginning, (what, reason) in FOREIGN.items():
        if head.startswith(beginning):
            raise RecordError(f"{path} is {what}", reason)
    body = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if body.split(b"\n", 1)[0].strip() == b"{":
        raise RecordError(
            f"{path} is one object over several lines, not a list of records: put [ and ] around it, or each record "
            "on a line of its own",
            "file",
        )
    return body[:1]


def _check_open_end(file: BinaryIO, error: ListError, path: Path) -> None:
    """Raise if the last record of a list that does not end breaks off before the end of the file: then it is the broken one."""
    file.seek(error.end)
    text = file.read(ENOUGH).decode("utf-8", "replace")
    try:
        json.JSONDecoder().raw_decode(text.lstrip())
    except json.JSONDecodeError as broken:
        if not broken.msg.startswith("Unterminated string") and broken.pos < len(text.strip()) - len("\\ud83d"):
            raise RecordError(
                f"{path}: record {len(error.spans)} is not JSON, it begins at byte {error.end}: {broken}", "not_json"
            ) from broken


def _state(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_size, status.st_mtime_ns

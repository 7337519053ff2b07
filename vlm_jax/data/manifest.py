"""What every record takes in a row, as a table with a line per record: packing plans and exact resume rest on it.

lengths    slots after cutting to the limit; 0 = unusable       checks     crc32 of tokens, labels and answer, so that a
views      image views                                                     changed record is noticed
answers    answer slots (encoder-decoder models), else 0        images     images that are shown
words      words, negative without an image (data.sampler)      generated  images that are to be generated
cut        slots that were cut off: 0 = the sample is whole     status     OK, REJECTED (images do not fit, nothing
supervised tokens with loss                                                supervised) or BAD (broken record or image)
ids        64-bit hash of the record's id                       shown      64-bit hash of the images that are shown, 0
                                                                           without any (data.sharing)
sizes      [all images, 2] (w, h), one record after another; (0, 0) where only the file's existence was looked at
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vlm_jax.config import ConfigError, UserError, VLMConfig
from vlm_jax.data import images, sampler
from vlm_jax.data.image_source import ImageError, ImageSource
from vlm_jax.data.packing import Slots, expand, truncate
from vlm_jax.data.records import Record
from vlm_jax.data.sharing import alike, hash_of_images
from vlm_jax.data.tasks import Sample
from vlm_jax.models.slots import slots_of_image, views_of_image

OK, REJECTED, BAD = 0, 1, 2
# how closely images are looked at: is there a file, what size is it, can all of it be decoded
EXISTS, HEADER, DECODE = 0, 1, 2
COLUMNS = {
    **dict.fromkeys(("lengths", "views", "answers", "words", "cut", "supervised", "images", "generated"), np.int32),
    "ids": np.uint64,
    "shown": np.uint64,
    "checks": np.uint32,
    "status": np.int8,
}
# what the order of samples and their slots depend on
ORDERING = ("lengths", "views", "answers", "words", "checks", "status")
WITHOUT_LOSS = ("too_long", "nothing_to_learn")  # reasons of samples with nothing supervised
Size = tuple[int, int]  # (width, height)


class DataError(UserError):
    """The data cannot be trained on; the message names the record and says what to do."""


class TooLong(UserError):
    """A sample is rejected; reason: "too_long" or "too_many_images" for a row, or "nothing_to_learn": nothing in it is supervised."""

    def __init__(self, message: str, reason: str = "too_long"):
        super().__init__(message)
        self.reason = reason


class Note(NamedTuple):
    """Why a record is unusable: its number, REJECTED or BAD, a slug to count by, and the sentence."""

    index: int
    status: int
    reason: str
    sentence: str


@dataclasses.dataclass(frozen=True)
class Room:
    """What is reserved in a row: slots, image views, answer slots."""

    slots: int
    views: int
    answers: int = 0


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one record becomes slots: `encode`, the image geometry of the model, and the limits of a sample.

    depth: how closely measuring looks at images (EXISTS, HEADER, DECODE); headers are read anyway where slots depend on sizes.
    look(source) -> (w, h), (0, 0) if it does not know, or ImageError: does it instead, for a caller that wants to see every image.
    """

    encode: Callable[..., Sample]
    config: VLMConfig
    limit: int
    view_budget: int
    answer_limit: int = 1024
    depth: int = EXISTS
    look: Callable[[ImageSource], Size] | None = None

    def place(
        self, sample: Sample, sizes: Sequence[Size], name: str, room: Room | None = None
    ) -> tuple[Slots, int, int]:
        """(slots, images kept, their views) of a sample with images of `sizes` (w, h), cut to `room` (default: the limits).

        Raises TooLong if a row cannot hold its views or nothing that is supervised is left.
        """
        room = room or Room(self.limit, self.view_budget, self.answer_limit)
        slots = [slots_of_image(*size, self.config) for size in sizes]
        kept = truncate(sample, [len(s) for s in slots], room.slots, room.answers)
        takes = len(sample.tokens) + sum(len(s) - 1 for s in slots)
        if kept is None:
            if truncate(sample, [len(s) for s in slots], takes, None) is None:
                raise TooLong(f"{name} has nothing to learn from: its answers are empty or masked", "nothing_to_learn")
            raise TooLong(f"{name} takes {takes} slots and nothing in the first {room.slots} is trained on")
        count = len(kept.images)
        views = [views_of_image(*size, self.config) for size in sizes[:count]]
        if sum(views) > room.views:
            raise TooLong(
                f"{name} has {sum(views)} image views, but data.views_per_row={self.view_budget}: raise it",
                "too_many_images",
            )
        made = expand(kept, slots[:count], views, self.config.vision.features)
        lost = takes - len(made) + (0 if sample.answer is None else len(sample.answer) - len(kept.answer))
        return dataclasses.replace(made, cut=lost), count, sum(views)

    def sizes(self, sources: Sequence[ImageSource]) -> list[Size]:
        """(w, h) of images, (0, 0) where nothing depends on it and only the files' existence was looked at."""
        look = self.look or (_exists, images.image_size, _decoded)[self.depth]
        found = [look(source) for source in sources]
        if self.config.aspect != "anyres":
            return found
        return [size if all(size) else images.image_size(source) for size, source in zip(found, sources)]

    def measure(self, records: Sequence[Any], start: int, stop: int) -> Manifest:
        """Records start..stop as a manifest of their own, its notes numbered from 0."""
        table = {name: np.zeros(stop - start, kind) for name, kind in COLUMNS.items()}
        sizes, notes = [], []
        for line, index in enumerate(range(start, stop)):
            try:
                found, of_images = self.measure_one(records[index], index)
                sizes += of_images
            except ConfigError:
                raise
            except (ValueError, OSError) as error:
                note = note_of(error, line)
                found = {"status": note.status}
                notes.append(note)
            for name, value in found.items():
                table[name][line] = value
        return Manifest(**table, sizes=np.array(sizes, np.int32).reshape(-1, 2), notes=tuple(notes))

    def measure_one(self, record: Any, index: int) -> tuple[dict[str, int], list[Size]]:
        """(columns of the record, sizes of its images); raises what makes it unusable."""
        sample, name = self.encode(record), name_of(record, index)
        sources = sources_of(sample, name)
        sizes = self.sizes(sources)
        self.sizes([ImageSource.of(image, name) for image in sample.generated])
        placed, count, views = self.place(sample, sizes, name)
        return {
            "lengths": len(placed),
            "views": views,
            "answers": 0 if placed.answer is None else len(placed.answer),
            "words": words_of(record, sample),
            "cut": placed.cut,
            "supervised": np.count_nonzero(placed.weights) if placed.answer is None else len(placed.answer),
            "images": len(sizes),
            "generated": len(sample.generated),
            "ids": hash_of_id(record, index),
            "shown": hash_of_images(sources[:count], views),
            "checks": checksum(sample),
        }, sizes


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The module's table: arrays [N], sizes [M, 2], and a note for every unusable record, in order."""

    lengths: np.ndarray
    views: np.ndarray
    answers: np.ndarray
    words: np.ndarray
    cut: np.ndarray
    supervised: np.ndarray
    images: np.ndarray
    generated: np.ndarray
    ids: np.ndarray
    shown: np.ndarray
    checks: np.ndarray
    status: np.ndarray
    sizes: np.ndarray
    notes: tuple[Note, ...] = ()

    @classmethod
    def join(cls, parts: Sequence[Manifest]) -> Manifest:
        """One table of several, one after another, the notes renumbered."""
        notes, start = [], 0
        for part in parts:
            notes += [note._replace(index=note.index + start) for note in part.notes]
            start += len(part)
        empty = {name: np.zeros(0, kind) for name, kind in COLUMNS.items()} | {"sizes": np.zeros((0, 2), np.int32)}
        table = {name: np.concatenate([none, *(getattr(p, name) for p in parts)]) for name, none in empty.items()}
        return cls(**table, notes=tuple(notes))

    def replaced(self, lines: Mapping[int, Manifest]) -> Manifest:
        """The table with other lines (number -> manifest of that one record) in place of unusable ones."""
        lines = dict(sorted(lines.items()))
        table = {name: getattr(self, name).copy() for name in COLUMNS}
        for index, line in lines.items():
            for name, column in table.items():
                column[index] = getattr(line, name)[0]
        ends = np.cumsum(self.images)
        where = np.repeat([int(ends[index]) for index in lines], [len(line.sizes) for line in lines.values()])
        sizes = np.insert(self.sizes, where, np.concatenate([line.sizes for line in lines.values()]), axis=0)
        notes = {note.index: note for note in self.notes if note.index not in lines}
        notes |= {index: note._replace(index=index) for index, line in lines.items() for note in line.notes}
        return Manifest(**table, sizes=sizes, notes=tuple(notes[index] for index in sorted(notes)))

    def __len__(self) -> int:
        return len(self.status)

    @property
    def usable(self) -> np.ndarray:
        """Indices of the records that are trained on, int64 [n]."""
        return np.flatnonzero(self.status == OK)

    def count(self, status: int) -> int:
        """Number of records with this status."""
        return int((self.status == status).sum())

    def reasons(self) -> dict[str, int]:
        """Why records are unusable -> how many, the most frequent first."""
        return dict(collections.Counter(note.reason for note in self.notes).most_common())

    @property
    def cut_count(self) -> int:
        """Usable samples that were longer than the limit and lost their end."""
        return int((self.cut > 0).sum())

    @property
    def without_loss(self) -> int:
        """Samples in which, whole or cut to the limit, nothing is supervised; they are not trained on."""
        reasons = self.reasons()
        return sum(reasons.get(reason, 0) for reason in WITHOUT_LOSS)

    def digest(self) -> str:
        """Hash of everything in the data that the order of samples and their slots depend on."""
        digest = hashlib.sha256()
        for name in ORDERING:
            digest.update(np.ascontiguousarray(getattr(self, name)).tobytes())
        return digest.hexdigest()[:32]

    def summary(self, shared: bool = False) -> dict[str, Any]:
        """What a checkpoint keeps of the manifest (JSON), to tell later what has changed; shared: the order depends on equal images."""
        totals = {name: int(getattr(self, name).sum()) for name in ("lengths", "views", "answers")}
        totals |= {"alike": hashlib.sha256(self.alike().tobytes()).hexdigest()[:32]} if shared else {}
        return {"records": len(self), "usable": self.count(OK), **totals, "digest": self.digest()}

    def alike(self) -> np.ndarray:
        """The first record that shows the same images as each, int64 [N]; its own number where there are none."""
        return alike(self.shown)


def _exists(source: ImageSource) -> Size:
    images.check_exists(source)
    return 0, 0


def _decoded(source: ImageSource) -> Size:
    return images.open_image(source).size


def name_of(record: Any, index: int) -> str:
    """Words for messages: the record's own `where` (file and number) if it has one."""
    return getattr(record, "where", f"record {index}")


def sources_of(sample: Sample, name: str) -> list[ImageSource]:
    """Images of a sample in order; paths are given the name of their record."""
    return [ImageSource.of(image, name) for image in sample.images]


def hash_of_id(record: Any, index: int) -> int:
    """64 bits of the record's own id; of its number if it has none."""
    name = str(getattr(record, "id", index))
    return int.from_bytes(hashlib.blake2b(name.encode(errors="replace"), digest_size=8).digest(), "little")


def words_of(record: Any, sample: Sample) -> int:
    """`sampler.modality_length` of a record, at least one word; tokens are counted where it has no turns."""
    if not isinstance(record, Record):
        return len(sample.tokens) if sample.images else -len(sample.tokens)
    return sampler.modality_length(record) or (1 if record.images else -1)


def checksum(sample: Sample) -> int:
    """crc32 of the tokens, labels and answer of a sample."""
    answer = np.zeros(0) if sample.answer is None else sample.answer
    check = 0
    for array in (sample.tokens, sample.labels, answer):
        check = zlib.crc32(np.asarray(array, np.int32).tobytes(), check)
    return check


def note_of(error: Exception, index: int) -> Note:
    """The note of record `index` that failed with `error`; the reason is the error's own `reason` if it has one."""
    reason = getattr(error, "reason", "")
    if not reason:
        reason = "image" if isinstance(error, ImageError) else "unreadable" if isinstance(error, OSError) else "record"
    return Note(index, REJECTED if isinstance(error, TooLong) else BAD, reason, str(error))

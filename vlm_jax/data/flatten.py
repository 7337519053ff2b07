"""One sample of every question and its answer: dialogues of many turns become many of two.

    human <image>\\nIs it a dog?  gpt Yes  human Where?  gpt By the river
    ->  human <image>\\nIs it a dog?  gpt Yes
        human <image>\\nWhere?        gpt By the river

"pairs"     a question is asked with the images it names, else with those shown before it (none in text-only
            dialogues); turns without a partner are left out
"original"  linzhiqiu/CLIP-FlanT5's file: every question but the first gets an `<image>`, text-only dialogues too, and
            a last turn without a partner is a sample of its own (which no template takes)
What earlier turns said is lost in both.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vlm_jax.config import UserError, one_of
from vlm_jax.data.kept_arrays import hash_of, kept_array
from vlm_jax.data.records import ROLES, Record, RecordError, Turn
from vlm_jax.data.templates import IMAGE_TEXT

log = logging.getLogger(__name__)

WAYS = ("pairs", "original")
VERSION = 1  # of the index: one that was written by another version is built again


class Cut(NamedTuple):
    """One sample of a dialogue: turns start:stop, images first:last of the record, `<image>` lines put in front."""

    start: int
    stop: int
    first: int
    last: int
    put: int


def cuts(turns: Sequence[Turn], images: int, how: str) -> list[Cut]:
    """The samples of a dialogue [(human or gpt, text)] with so many images (see the module)."""
    n = len(turns)
    if how == "original":
        return [Cut(i, min(i + 2, n), 0, images, int(i > 0)) for i in range(0, max(n, 1), 2)]
    named = [text.count(IMAGE_TEXT) if images else 0 for _, text in turns]
    out = []
    for i in range(n - 1):
        if (turns[i][0], turns[i + 1][0]) == ("human", "gpt"):
            before, here = sum(named[:i]), sum(named[i : i + 2])
            if images == 1:  # which several `<image>` may name
                first, last = 0, int(before + here > 0)
            else:
                first, last = (before, before + here) if here else (0, before)
            out.append(Cut(i, i + 2, min(first, images), min(last, images), 0 if here else min(last, images)))
    return out


def flatten(raw: Sequence[dict], how: str = "pairs") -> list[dict]:
    """The samples of LLaVA records as they stand in a JSON file, every other field copied; to write a flattened file."""
    one_of("flatten", how, WAYS)
    out = []
    for number, record in enumerate(raw):
        try:
            turns = [(ROLES.get(turn["from"], turn["from"]), turn["value"]) for turn in record["conversations"]]
        except (KeyError, TypeError) as error:
            raise RecordError(f"record {number} is no dialogue of turns with `from` and `value`: {error}") from error
        images = [record["image"]] if isinstance(record.get("image"), str) else record.get("image") or []
        for cut in cuts(turns, len(images), how):
            sample = copy.deepcopy({**record, "conversations": record["conversations"][cut.start : cut.stop]})
            if cut.put:
                sample["conversations"][0]["value"] = _put(cut.put) + sample["conversations"][0]["value"]
            if (cut.first, cut.last) != (0, len(images)):
                sample["image"] = images[cut.first : cut.last]
                if not sample["image"]:
                    del sample["image"]
            out.append(sample)
    return out


class Flattened(Sequence[Record]):
    """`records` one pair of turns at a time; how: "pairs" or "original".

    The index (which record, which pair) comes from one pass over the records, kept under `cache` for the next start if
    the records have a `fingerprint`. A record that cannot be used is one sample, and raises when that is asked for.
    Pairs of one dialogue are told apart by their ids, "7#0" and "7#1". dropped: turns that no sample has.
    """

    def __init__(self, records: Sequence[Record], how: str = "pairs", cache: str | Path | None = None):
        one_of("data.sources.*.flatten", how, WAYS)
        self.records, self.how = records, how
        mark = self.fingerprint
        counted = kept_array((mark and cache) or None, f"flattened-{mark}", self._counted).rows
        # the number of every record's first sample
        self._starts = np.concatenate([[0], np.cumsum(counted[:, 0], dtype=np.int64)])
        self.dropped = int(counted[:, 1].sum())
        self._latest: tuple[int, Record | None] = (-1, None)  # pairs of one record are mostly asked for in a row
        if self.dropped:
            log.info("%d turns have no partner and are left out", self.dropped)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Record:
        if not -len(self) <= index < len(self):
            raise IndexError(f"there are {len(self)} samples, there is no number {index}")
        index %= len(self)
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        seen, record = self._latest
        if seen != number:
            record = self.records[number]
            self._latest = number, record
        found = cuts(record.turns, len(record.images), self.how)
        k = index - int(self._starts[number])
        return _sample(record, found[k], k, len(found))

    def __iter__(self) -> Iterator[Record]:
        return (self[i] for i in range(len(self)))

    @property
    def fingerprint(self) -> str | None:
        """Hash of what the samples depend on, None if the records have none."""
        mark = getattr(self.records, "fingerprint", None)
        return mark and hash_of("flatten", VERSION, self.how, mark)

    def _counted(self) -> np.ndarray:
        """Samples and left-out turns of every record, int32 [records, 2]."""
        table = np.zeros((len(self.records), 2), np.int32)
        for number in range(len(self.records)):
            try:
                turns = self.records[number].turns
            except UserError:
                table[number] = 1, 0
                continue
            found = cuts(turns, 0, self.how)
            table[number] = len(found), len(turns) - sum(cut.stop - cut.start for cut in found)
        return table


def _sample(record: Record, cut: Cut, k: int, of: int) -> Record:
    turns: list[Any] = list(record.turns[cut.start : cut.stop])
    if cut.put and turns:
        turns[0] = (turns[0][0], _put(cut.put) + turns[0][1])
    name, where = (record.id, record.where) if of == 1 else (f"{record.id}#{k}", f"{record.where}, pair {k}")
    return dataclasses.replace(
        record, id=name, turns=tuple(turns), images=record.images[cut.first : cut.last], where=where
    )


def _put(images: int) -> str:
    return f"{IMAGE_TEXT}\n" * images

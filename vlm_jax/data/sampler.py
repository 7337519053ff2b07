"""LLaVA's `group_by_modality_length`: mega-batches of samples of like length, images and text-only apart.

    lengths   +words of a record with an image, -words of one without (all turns, split at white space)
    world     devices x gradient accumulation steps;  mega = world * batch samples are one optimizer step
    epoch     [mega of images] [mega of text] ... shuffled, then the left-overs of both;
              inside a mega-batch longest first, dealt to `world` chunks of equal count and about equal length

From haotian-liu/LLaVA v1.2.2 (`llava/train/llava_trainer.py`); CLIP-FlanT5 was trained with an earlier revision,
which treats the left-overs otherwise (`left_over="front"`). Packing makes this order unnecessary; it
serves runs that are to be reproduced. Random permutations come from outside, so that recorded ones can be
played back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from vlm_jax.config import one_of
from vlm_jax.data.records import Record

IMAGE_WORDS = 128  # what the original counts for an image in `lengths`

Permute = Callable[[int], Iterable[int]]


def modality_length(record: Record) -> int:
    """Words of all turns, negative without an image."""
    words = sum(len(text.split()) for _, text in record.turns)
    return words if record.images else -words


def length(record: Record) -> int:
    """Words of all turns, and 128 for an image."""
    return abs(modality_length(record)) + (IMAGE_WORDS if record.images else 0)


def group_by_modality_length(
    lengths: Sequence[int], batch: int, world: int, permute: Permute, left_over: str = "sorted"
) -> list[int]:
    """Every index of `lengths` (signed, see the module) once, in training order; `permute(n)` draws a
    permutation of n.

    Drawn in this order: images, text, mega-batches; one draw if all samples are of one kind. left_over: "sorted"
    puts the left-overs of both kinds last, by number; "front" puts as many as fill a mega-batch first and the
    rest last, as they come.
    """
    one_of("left_over", left_over, ("sorted", "front"))
    if 0 in lengths:
        raise ValueError(
            f"record {list(lengths).index(0)} has no words, its length cannot tell text from images: drop it"
        )
    if all(n > 0 for n in lengths) or all(n < 0 for n in lengths):
        return group_by_length(lengths, batch, world, permute)
    kinds = []
    for sign in (1, -1):
        chosen = [i for i, n in enumerate(lengths) if n * sign > 0]
        order = group_by_length([lengths[i] * sign for i in chosen], batch, world, permute)
        kinds.append(_cut([chosen[i] for i in order], world * batch))
    full = [mega for kind in kinds for mega in kind[:-1]]
    rest = kinds[0][-1] + kinds[1][-1]
    first = world * batch if left_over == "front" and len(rest) >= world * batch else 0
    order = rest[:first] + [i for k in permute(len(full)) for i in full[k]]
    return order + (sorted(rest) if left_over == "sorted" else rest[first:])


def group_by_length(lengths: Sequence[int], batch: int, world: int, permute: Permute) -> list[int]:
    """Every index once: a random order, sorted by length (longest first) inside each mega-batch and dealt out
    evenly.
    """
    order = []
    for mega in _cut([int(i) for i in permute(len(lengths))], world * batch):
        longest_first = sorted(mega, key=lambda i: -lengths[i])
        order += [i for chunk in _deal(longest_first, lengths, world) for i in chunk]
    return order


def _cut(items: list[int], size: int) -> list[list[int]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _deal(indices: list[int], lengths: Sequence[int], world: int) -> list[list[int]]:
    """`world` chunks: each index to the chunk that is shortest so far and not full; strided where they cannot
    be equal.
    """
    if len(indices) % world:
        return [indices[k::world] for k in range(world)]
    room = len(indices) // world
    chunks, totals = [[] for _ in range(world)], [0.0] * world
    for i in indices:
        k = totals.index(min(totals))
        chunks[k].append(i)
        totals[k] = totals[k] + lengths[i] if len(chunks[k]) < room else math.inf
    return chunks

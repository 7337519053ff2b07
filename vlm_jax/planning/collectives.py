"""Collectives of a compiled program, read from its HLO: how often each kind runs and what a chip sends, loops counted by their turns.

bytes that leave a chip, in a group of n, on a ring:
    all-gather        (n-1)/n of the result        all-reduce          2 (n-1)/n of the operand
    reduce-scatter    (n-1)/n of the operand       all-to-all          (n-1)/n     collective-permute   all of it
Between TPU slices a host sends what the compiled program of one slice hands over; a group there has one chip of each slice.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_WIDTHS = {
    "pred": 1,
    "s4": 0.5,
    "u4": 0.5,
    "s8": 1,
    "u8": 1,
    "s16": 2,
    "u16": 2,
    "bf16": 2,
    "f16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
}
_WIDTHS |= {"s64": 8, "u64": 8, "f64": 8}
# what leaves a slice is a `send` to the runtime that joins slices, named after the collective that it is part of
_BETWEEN = re.compile(r'_xla_megascale_target="\{([\d,:]+)\}.*?_xla_megascale_transfer_type="(\w+)"')
_TRANSFERS = {kind.replace("-", "_").upper(): kind for kind in KINDS} | {"ONE_TO_ONE": "collective-permute"}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\([^\n]*\)|\([^\n]*) -> .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_ARRAY = re.compile(r"\b(" + "|".join(sorted(_WIDTHS, key=len, reverse=True)) + r")\[([\d,]*)\]")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|branch_computations|called_computations)=\{?(%[\w.\-]+(?:, %[\w.\-]+)*)"
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One instruction: how often a step runs it, group size, bytes of its result in one run, and bytes that leave a chip in all runs.

    inside: whether it is in a loop; between: whether it joins slices.
    """

    kind: str
    name: str
    runs: int
    group: int
    result: float
    sent: float
    inside: bool
    between: bool = False


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    type: str
    op: str
    rest: str


def collectives(hlo: str, devices: int) -> list[Collective]:
    """Every collective of the module `hlo` (compiled.as_text()) that a step reaches."""
    computations, entry = _parse(hlo)
    found: list[Collective] = []

    def walk(name: str, runs: int, inside: bool) -> None:
        for one in computations.get(name, ()):
            kind = next((k for k in KINDS if one.op in (k, f"{k}-start")), None)
            if kind:
                group, result = _group(one.rest, devices), _result_bytes(one, kind)
                if group > 1:  # sums over axes of one device stay in programs that are compiled fast
                    sent = runs * _sent(kind, result, group)
                    found.append(Collective(kind, one.name, runs, group, result, sent, inside))
                continue
            if one.op == "send" and (across := _between(one)):
                kind, group, result = across
                found.append(
                    Collective(kind, one.name, runs, group, result, runs * _sent(kind, result, group), inside, True)
                )
                continue
            turns = _turns(one, computations) if one.op == "while" else 1
            for called in _called(one):
                if one.op == "fusion" and called.startswith("all-reduce-scatter"):  # how TPUs name a reduce-scatter
                    inner = next(x for x in computations[called] if x.op == "all-reduce")
                    group, result = _group(inner.rest, devices), sum(_arrays(one.type))
                    sent = runs * _sent("reduce-scatter", result, group)
                    found.append(Collective("reduce-scatter", one.name, runs, group, result, sent, inside))
                elif called in computations:
                    walk(called, runs * turns, inside or one.op == "while")

    walk(entry, 1, False)
    return found


def _parse(hlo: str) -> tuple[dict[str, list[_Instruction]], str]:
    """({computation: its instructions}, name of the entry)."""
    computations: dict[str, list[_Instruction]] = {}
    entry, current = "", None
    for line in hlo.splitlines():
        head = None if line.startswith(" ") else _COMPUTATION.match(line)
        if head:
            current = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif current is not None and (found := _INSTRUCTION.match(line)):
            current.append(_Instruction(*found.groups()))
    return computations, entry


def _called(one: _Instruction) -> Iterator[str]:
    """Computations that an instruction runs; those of reductions hold no collectives."""
    for found in _CALLED.finditer(one.rest):
        for name in found[1].split(", "):
            yield name.strip("%")


def _turns(loop: _Instruction, computations: dict[str, list[_Instruction]]) -> int:
    """How often a loop runs: as noted, or else (TPU) the number that its condition compares the counter with; 1 where neither is there."""
    noted = re.search(r'"known_trip_count":\s*\{"n":"(\d+)"', loop.rest)
    if noted:
        return int(noted[1])
    condition = computations.get(re.search(r"condition=%([\w.\-]+)", loop.rest)[1], ())
    limits = [int(found[1]) for one in condition if one.op == "constant" and (found := re.match(r"(\d+)\)", one.rest))]
    return limits[0] if len(limits) == 1 else 1


def _group(rest: str, devices: int) -> int:
    """Chips that take part together."""
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", rest)
    if listed:
        return len(listed[1].split(","))
    shaped = re.search(r"replica_groups=\[(\d+),(\d+)\]", rest)
    if shaped:
        return int(shaped[2])
    named = re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", rest)
    if named:  # mesh['a'=4,'b'=2] {'b'}
        sizes = {axis: int(n) for axis, n in re.findall(r"'(\w+)'=(\d+)", named[1])}
        return math.prod(sizes[axis] for axis in re.findall(r"'(\w+)'", named[2]))
    return 2 if "source_target_pairs" in rest else devices


def _between(one: _Instruction) -> tuple[str, int, float] | None:
    """(kind, slices, bytes of the result) of a `send` that leaves the slice; None for others."""
    named = _BETWEEN.search(one.rest)
    if not named:
        return None
    kind, slices = _TRANSFERS[named[2]], 0
    for part in named[1].split(","):  # {1,2}x{0:7}: slices by number or first:last, and the chips of each
        first, _, last = part.partition(":")
        slices += int(last or first) - int(first) + 1
    operand = _arrays(one.type)[0]
    return kind, slices, operand * {"all-gather": slices, "reduce-scatter": 1 / slices}.get(kind, 1.0)


def _arrays(text: str) -> list[float]:
    return [_WIDTHS[kind] * math.prod(int(n) for n in dims.split(",") if n) for kind, dims in _ARRAY.findall(text)]


def _result_bytes(one: _Instruction, kind: str) -> float:
    """Bytes of what comes out; the tuple of an asynchronous start also holds the operands and, on TPUs, synchronisation flags."""
    sizes, plain = _arrays(one.type), re.sub(r"\{[^{}]*\}", "", one.type)  # without layouts, which have brackets too
    if not one.op.endswith("-start") or not plain.startswith("(") or kind == "all-reduce":
        return sum(sizes)  # the start of an all-reduce gives the results alone
    nested = re.match(r"\(\((.*?)\), (\(.*?\)|[^()]*?\])", plain)
    if nested:  # ((operands), (results), flags)
        return sum(_arrays(nested[2]))
    return sizes[1] if len(sizes) > 1 else sum(sizes)


def _sent(kind: str, result: float, group: int) -> float:
    share = (group - 1) / group
    if kind == "collective-permute":
        return result
    if kind == "all-reduce":
        return 2 * share * result
    return share * (result * group if kind == "reduce-scatter" else result)

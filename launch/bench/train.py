"""Training in real tokens per second, ours against transformers' LlavaForConditionalGeneration, in one run on one machine.

    python launch/bench/train.py --streams mixed            the packed rows of the recipes against padded batches, CPU, under 4 minutes
    python launch/bench/train.py --streams equal            rows of one sample each, all as long: nobody pads
    python launch/bench/train.py --size 7b --mode lora --rows 8 --updates 8 --rank 128 --out lora.json        on a GPU, bfloat16

Each side has a process of its own, with as many cores, and they take turns (on a GPU: one after the other, so that each has all of its
memory). Both make the same updates: of the same samples, with the same weights (exported by us and loaded by transformers), the same
clipping and AdamW; the loss and the gradient's norm of the first update must agree, or nothing is measured. What counts is real
tokens: text and image features, no padding.

Ours is the step, the rows and the reader of `python -m vlm_jax train`; of --micro (rows at a time) and --remat the best is taken. The
peer adds up gradients over micro-batches padded to their longest, with SDPA; the best is taken of --peer_batch, samples in the order
they were drawn or sorted by length inside the update, --peer_checkpoint and --peer_compile. A line of its own says what it does with
batches of 16 as they are drawn, which is how LLaVA was trained. "Read" is with images opened and processed while it trains.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

from referee import ACCELERATED, CORES, Failed, Side, alternate, sides, write_results
from stream import SIZES, Case

GAPS = {"float32": {"loss": 1e-4, "grad_norm": 2e-3}, "bfloat16": {"loss": 1e-2, "grad_norm": 5e-2}}  # relative
PUBLISHED = 16  # samples of a device in LLaVA-1.5's stage 2
SWITCH = {"off": (False,), "on": (True,), "both": (False, True)}

Way = dict[str, Any]


class Bench:
    """The sides of one case, their ways and what was found."""

    def __init__(self, case: Case, both: dict[str, Side], gaps: dict[str, float]):
        self.case, self.sides, self.gaps = case, both, gaps
        self._ready: dict[str, tuple] = {}
        self._others: dict[str, list[list[int]]] = {}
        self.first: dict[str, dict[str, float]] = {}

    def plan(self, kind: str) -> dict[str, Any]:
        """Our plan of a stream, which the peer follows."""
        plan = self.sides["ours"].ask("plan", kind=kind)
        self._others[kind] = plan["updates"]
        return plan

    def visit(self, name: str, kind: str, way: Way, loading: bool = False) -> dict[str, Any]:
        """All updates of a stream on one side; on an accelerator the other side gives its memory back first."""
        for other in self.sides.values() if ACCELERATED else ():
            if other.name != name:
                other.stop()
                self._ready.pop(other.name, None)
        wanted, told = (kind, tuple(way.items())), {}
        if self._ready.get(name) != wanted:
            self._ready.pop(name, None)
            order = {} if name == "ours" else {"updates": self._others[kind]}
            told = self.sides[name].ask("prepare", kind=kind, way=way, **order)
            self._agree(name, kind, way, told)
            self._ready[name] = wanted
        return told | self.sides[name].ask("run", loading=loading)

    def best(self, name: str, kind: str, ways: list[Way]) -> tuple[Way, list[dict[str, Any]]]:
        """The way with the fewest seconds, of one visit each, and all that was tried. A larger batch than one that failed is not."""
        tried: list[dict[str, Any]] = []
        size = "micro" if name == "ours" else "batch"
        for way in ways:
            alike = [t for t in tried if "failed" in t and same_but(t["way"], way, size)]
            if any(t["way"].get(size, 0) <= way.get(size, 0) for t in alike):
                continue
            try:
                tried.append({"way": way} | self.visit(name, kind, way))
            except Failed as error:
                self.sides[name].stop()
                self._ready.pop(name, None)
                tried.append({"way": way, "failed": str(error)})
            print(f"  {kind}, {name}, {words(way)}: {outcome(tried[-1])}", flush=True)
        able = [t for t in tried if "failed" not in t]
        if not able:
            raise SystemExit(f"{name} can do {kind} in no way that was tried")
        return min(able, key=lambda t: t["seconds"])["way"], tried

    def _agree(self, name: str, kind: str, way: Way, told: dict[str, float]) -> None:
        """SystemExit unless the first update's loss and gradient norm are those of ours."""
        first = self.first.setdefault(kind, told)
        for key, most in self.gaps.items():
            gap = abs(told[key] / first[key] - 1)
            if not gap <= most:
                raise SystemExit(
                    f"{name} ({words(way)}) has {key} {told[key]:.6g} in the first update of {kind}, not {first[key]:.6g}: "
                    f"it does other work (gap {gap:.1e}, {most:.0e} allowed)"
                )


def same_but(a: Way, b: Way, key: str) -> bool:
    """Whether two ways differ in `key` alone."""
    return {k: v for k, v in a.items() if k != key} == {k: v for k, v in b.items() if k != key}


def words(way: Way) -> str:
    """A way in words."""
    said = []
    for key, value in way.items():
        if value is True or isinstance(value, str):
            said.append(key if value is True else value if key == "order" else f"{key} {value}")
        elif value is not False:
            said.append(f"{key} {value}")
    return ", ".join(said)


def outcome(found: dict[str, Any]) -> str:
    """Seconds of a visit, or why there are none."""
    return found.get("failed") or f"{found['seconds']:.2f} s, {found['cpu']:.2f} CPU s"


def ways_of(a: argparse.Namespace, kind: str) -> tuple[list[Way], list[Way]]:
    """(ours, the peer's) to try."""
    ours = [{"remat": remat, "micro": micro} for remat in a.remat.split(",") for micro in map(int, a.micro.split(","))]
    orders = ("drawn", "by length") if kind == "mixed" else ("drawn",)
    switches = itertools.product(SWITCH[a.peer_checkpoint], SWITCH[a.peer_compile], a.peer_masters.split(","))
    peer = [
        {"batch": batch, "order": order, "checkpoint": checkpoint, "compile": compiled, "masters": masters}
        for checkpoint, compiled, masters in switches
        for batch in map(int, a.peer_batch.split(","))
        for order in (orders if batch > 1 else orders[:1])
    ]
    return ours, peer


def measure(bench: Bench, kind: str, a: argparse.Namespace, peak: float | None) -> dict[str, Any]:
    """Everything about one stream."""
    plan, (ours, peer) = bench.plan(kind), ways_of(a, kind)
    print(
        f"\n{kind}: {plan['slots']:,} real tokens in {a.updates} updates of {plan['rows']} rows, {plan['full']:.1%} full; "
        f"{sum(map(len, plan['updates']))} samples",
        flush=True,
    )
    found = {name: bench.best(name, kind, ways) for name, ways in (("ours", ours), ("peer", peer))}
    chosen = {"ours": ("ours", found["ours"][0]), "peer": ("peer", found["peer"][0])}
    published = {**found["peer"][0], "batch": PUBLISHED, "order": "drawn"}
    if kind == "mixed" and any(t["way"] == published and "failed" not in t for t in found["peer"][1]):
        chosen[f"peer, batches of {PUBLISHED} as drawn"] = ("peer", published)
    visits = {
        f"{name}{', read' * loading}": (
            lambda side=side, way=way, loading=loading: bench.visit(side, kind, way, loading)
        )
        for name, (side, way) in chosen.items()
        for loading in ((False, True) if a.loading else (False,))
    }
    spent = alternate(visits, a.rounds)
    print("\n" + "\n".join(table(kind, plan, spent, chosen, peak)), flush=True)
    return {
        "plan": {k: v for k, v in plan.items() if k != "updates"},
        "tried": found,
        "spent": spent,
        "first": bench.first,
    }


def table(kind: str, plan: dict, spent: dict[str, dict], chosen: dict, peak: float | None) -> Iterator[str]:
    """Markdown lines; the ratios are ours over the line's, with and without reading each for itself."""
    yield "| stream | side | how | real tokens/s | CPU s per 1000 | ours is faster | in CPU time |" + " MFU |" * bool(
        peak
    )
    yield "|---|---|---|---|---|---|---|" + "---|" * bool(peak)
    for name, found in spent.items():
        own, way = name.removesuffix(", read"), ""
        way = words(chosen[own][1])
        if "failed" in found:
            yield f"| {kind} | {name} | {way} | {found['failed']} | | | |" + " |" * bool(peak)
            continue
        ours = spent["ours, read" if name.endswith(", read") else "ours"]
        cells = [
            kind,
            name,
            way,
            f"{plan['slots'] / found['seconds']:,.0f}",
            f"{1000 * found['cpu'] / plan['slots']:.3f}",
        ]
        cells += [f"{found['seconds'] / ours['seconds']:.2f}x", f"{found['cpu'] / ours['cpu']:.2f}x"]
        cells += [f"{plan['flops'] / found['seconds'] / peak:.1%}"] if peak else []
        yield f"| {' | '.join(cells)} |"


def flags() -> argparse.ArgumentParser:
    """The command line."""
    gpu, made = ACCELERATED, argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--size", choices=SIZES, default="7b" if gpu else "small")
    made.add_argument("--mode", choices=("full", "lora"), default="full")
    made.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16" if gpu else "float32")
    made.add_argument("--streams", default="mixed,equal")
    made.add_argument("--rows", type=int, default=4, help="packed rows of an update")
    made.add_argument("--updates", type=int, default=10 if gpu else 1)
    made.add_argument(
        "--equal", type=int, default=0, help="slots of the samples of equal length (default: a quarter of a row)"
    )
    made.add_argument("--rank", type=int, default=128)
    made.add_argument("--rounds", type=int, default=1 if gpu else 3)
    made.add_argument(
        "--threads",
        type=int,
        default=CORES,
    )
    made.add_argument("--loading", action=argparse.BooleanOptionalAction, default=True)
    made.add_argument("--micro", default="1,2,4" if gpu else "2,4", help="our rows at a time")
    made.add_argument("--remat", default="linears,full" if gpu else "linears")
    made.add_argument("--peer_batch", default="1,2,4,8,16")
    made.add_argument("--peer_checkpoint", choices=SWITCH, default="both" if gpu else "off")
    made.add_argument("--peer_compile", choices=SWITCH, default="both" if gpu else "off")
    made.add_argument(
        "--peer_masters", default="float32", help="dtypes of what the peer trains, beside its bfloat16 autocast"
    )
    made.add_argument("--out", default="", help="JSON of everything")
    return made  # fmt: skip


def main() -> None:
    """Print the tables."""
    a = flags().parse_args()
    case = Case(a.size, a.mode, a.dtype, a.rows, a.updates, a.rank, a.equal or SIZES[a.size].slots // 4, a.threads)
    results: dict[str, Any] = {"case": dataclasses.asdict(case)}
    with sides(case, ours="train_ours.py", peer="train_torch.py") as both:
        ours, peer = both["ours"].ask("write"), both["peer"].ask("text")
        print(f"{a.size}, {a.mode}, {a.dtype}, {a.threads} threads each\nours: {ours['text']}\npeer: {peer['text']}")
        bench = Bench(case, both, GAPS[a.dtype])
        results |= {"ours": ours, "peer": peer}
        for kind in a.streams.split(","):
            results[kind] = measure(bench, kind, a, ours["peak"])
    write_results(a.out, results)


if __name__ == "__main__":
    main()

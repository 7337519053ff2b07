"""New tokens per second of ours and of transformers' generate with a static cache, in one run, greedy, with the same random weights.

    python launch/bench/decode.py [--size small] [--batches 1,8] [--prompt 256] [--new 64] [--rounds 3]         CPU, under 3 minutes
    python launch/bench/decode.py --size 7b --batches 1,64 --prompt 1024 --new 256 --out decode.json            on a GPU, bfloat16

Every prompt has an image and as many slots; both sides must say the same (in float32; in bfloat16 the share of equal tokens is
printed). "New" is with reading the prompts, "steps" without: n - 1 steps take the seconds of n new tokens less those of one. On a GPU
the roofline is the memory's bandwidth over the bytes of weights, keys and values that a step must read. transformers' default, a
cache that grows, is measured too; on a GPU it compiles the step of its static cache by itself.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from referee import ACCELERATED, CORES, Side, alternate, sides, write_results
from stream import SIZES, AnswerCase


def equal(a: list[list[int]], b: list[list[int]]) -> float:
    """Share of tokens before the first difference of their rows."""
    same = [next((i for i, (x, y) in enumerate(zip(p, q)) if x != y), min(len(p), len(q))) for p, q in zip(a, b)]
    return sum(same) / max(1, sum(max(len(p), len(q)) for p, q in zip(a, b)))


def check(found: dict[str, dict[str, Any]], case: AnswerCase) -> float:
    """The smallest share of tokens as ours; SystemExit in float32 if any differs."""
    shares = [equal(one["ids"], found["ours"]["ids"]) for one in found.values() if "failed" not in one]
    if case.dtype == "float32" and min(shares) < 1:
        raise SystemExit(f"only {min(shares):.1%} of the tokens are those of ours: the sides do not say the same")
    return min(shares)


def measure(both: dict[str, Side], case: AnswerCase, batch: int, a: argparse.Namespace, facts: dict) -> dict[str, Any]:
    """Table of one batch size."""
    texts = [a.prompt - case.shape.model.vision.features] * batch
    ways = {"ours": {}, "peer, static cache": {"cache": "static"}, "peer, growing cache": {"cache": "dynamic"}}

    def visits(new: int) -> dict[str, Any]:
        def one(name: str, way: dict):
            return lambda: both[name.split(",")[0]].ask("answer", texts=texts, batch=batch, new=new, **way)

        return {name: one(name, way) for name, way in ways.items()}

    def release() -> None:
        if ACCELERATED:
            for side in both.values():
                side.stop()

    first, whole = alternate(visits(1), a.rounds, release), alternate(visits(a.new), a.rounds, release)
    share, rows = check(whole, case), {}
    for name, found in whole.items():
        if "failed" in found or "failed" in first[name]:
            rows[name] = {"failed": found.get("failed", first[name].get("failed"))}
            continue
        steps = {key: (found[key] - first[name][key]) / (a.new - 1) for key in ("seconds", "cpu")}
        rows[name] = {"new": batch * a.new / found["seconds"], "steps": batch / steps["seconds"], "cpu": steps["cpu"]}
        if facts["bandwidth"]:
            read = facts["weights"] + batch * facts["slot"] * (a.prompt + a.new / 2)
            rows[name]["roofline"] = read / facts["bandwidth"] / steps["seconds"]
    for name, row in rows.items():
        print(line(batch, name, row, rows["ours"]), flush=True)
    return {"rows": rows, "equal": share}


def line(batch: int, name: str, row: dict[str, Any], ours: dict[str, Any]) -> str:
    """A line of the table."""
    if "failed" in row:
        return f"| {batch} | {name} | {row['failed']} | | | | |"
    faster, less = ours["steps"] / row["steps"], row["cpu"] / ours["cpu"]
    roofline = f"{row['roofline']:.1%}" if "roofline" in row else ""
    return f"| {batch} | {name} | {row['new']:.1f} | {row['steps']:.1f} | {faster:.2f}x | {less:.2f}x | {roofline} |"


def main() -> None:
    """Print the table."""
    gpu, parser = ACCELERATED, argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="7b" if gpu else "small")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16" if gpu else "float32")
    parser.add_argument("--batches", default="1,64" if gpu else "1,8")
    for name, default in (
        ("prompt", 1024 if gpu else 256),
        ("new", 256 if gpu else 64),
        ("rounds", 1 if gpu else 3),
        ("threads", CORES),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", default="", help="JSON of everything")
    a = parser.parse_args()
    case = AnswerCase(a.size, a.dtype, 0, a.threads)
    with sides(case, ours="answer_ours.py", peer="answer_torch.py") as both:
        facts, peer = both["ours"].ask("write"), both["peer"].ask("text")
        print(f"{a.size}, {a.dtype}, {a.threads} threads each, prompts of {a.prompt} slots, {a.new} new tokens")
        print(f"ours: {facts['text']}\npeer: {peer['text']}\n")
        print(
            "| batch | side | new tokens/s | steps: tokens/s | ours is faster | in CPU time | of the roofline |\n"
            + "|---" * 7
            + "|"
        )
        results = {str(batch): measure(both, case, batch, a, facts) for batch in map(int, a.batches.split(","))}
        for batch, found in results.items():
            print(f"(batch {batch}: {found['equal']:.2%} of the tokens are the same on both sides)")
    write_results(a.out, {"case": dataclasses.asdict(case), "flags": vars(a), "ours": facts, "peer": peer} | results)


if __name__ == "__main__":
    main()

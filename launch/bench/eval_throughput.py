"""Questions per second of an evaluation: transformers' loop with one question at a time against our batches, in one run, same text.

    python launch/bench/eval_throughput.py [--size small] [--questions 24] [--batch 8] [--new 32] [--rounds 3]     CPU, under 3 minutes
    python launch/bench/eval_throughput.py --size 7b --questions 256 --batch 32 --new 64 --out eval.json           on a GPU, bfloat16

Questions have an image and 16 to 96 text tokens (divided by the size's `shrink`, at least 6); answers end by themselves, after a quarter
of --new on average (random weights: one id in so many ends an answer), or at --new. The peer is what evaluation scripts of LLaVA do: a
Python loop of `generate` with batch 1, greedy, here with pixels and ids at hand. Ours sorts the questions by length and answers --batch
at a time.
"""

from __future__ import annotations

import argparse
import dataclasses

import numpy as np
from decode import check
from referee import ACCELERATED, CORES, alternate, sides, write_results
from stream import SIZES, AnswerCase


def main() -> None:
    """Print the table."""
    gpu, parser = ACCELERATED, argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="7b" if gpu else "small")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16" if gpu else "float32")
    defaults = {"questions": 256 if gpu else 24, "batch": 32 if gpu else 8, "new": 64 if gpu else 32}
    for name, default in {**defaults, "rounds": 1 if gpu else 3, "threads": CORES}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", default="", help="JSON of everything")
    a = parser.parse_args()
    case = AnswerCase(a.size, a.dtype, max(2, a.new // 4), a.threads)
    lengths = np.random.default_rng(0).integers(16, 97, a.questions) // case.shape.shrink
    texts = [max(6, int(n)) for n in lengths]
    with sides(case, ours="answer_ours.py", peer="answer_torch.py") as both:
        facts, peer = both["ours"].ask("write"), both["peer"].ask("text")
        print(
            f"{a.size}, {a.dtype}, {a.threads} threads each, {a.questions} questions\nours: {facts['text']}\npeer: {peer['text']}\n"
        )
        visits = {
            "peer, one at a time": lambda: both["peer"].ask("answer", texts=texts, batch=1, new=a.new, cache="dynamic"),
            "ours": lambda: both["ours"].ask("answer", texts=texts, batch=a.batch, new=a.new),
        }  # fmt: skip
        release = [side.stop for side in both.values()] if ACCELERATED else []
        found = alternate(visits, a.rounds, lambda: [stop() for stop in release])
    for name, one in found.items():
        if "failed" in one:
            raise SystemExit(f"{name}: {one['failed']}")
    share, ours = check(found, case), found["ours"]
    print("| side | questions/s | CPU s per question | ours is faster | in CPU time |\n|---|---|---|---|---|")
    for name, one in found.items():
        faster, less = (one[key] / ours[key] for key in ("seconds", "cpu"))
        rate, cpu = a.questions / one["seconds"], one["cpu"] / a.questions
        print(f"| {name} | {rate:.2f} | {cpu:.3f} | {faster:.2f}x | {less:.2f}x |")
    ends = np.array([len(ids) for ids in ours["ids"]])
    lengths = f"answers of {ends.min()} to {ends.max()} tokens, {ends.mean():.1f} on average"
    print(f"\n{share:.2%} of the tokens are the same on both sides; {lengths}")
    write_results(
        a.out, {"case": dataclasses.asdict(case), "flags": vars(a), "ours": facts, "peer": peer, "found": found}
    )


if __name__ == "__main__":
    main()

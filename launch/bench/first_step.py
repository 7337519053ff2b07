"""How long does a run take from the process's start to its first finished update, with an empty and with a full compile cache.

    python launch/bench/first_step.py [--config configs/llava15.py:7b,stage2,smoke] [--folder DIR] [--rounds 1] [--config.any.key=value ...]

The command `train` itself in a process of its own, stopped after one update. Data and measured lengths are there before, from an untimed
start. "cold" begins without compiled programs, "warm" with those of the start before (`train.compile_cache`). Columns are seconds of each
stretch: imports; tokenizer, data and mesh; weights (read, or drawn, which compiles too); the first batch and the compiled step; the update.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

STRETCHES = ("import", "data", "weights", "compile", "update")


class Reached(Exception):
    """The first update is done."""


def measure(flags: list[str], started: float) -> dict[str, float]:
    """{stretch: seconds since `started` (Unix time) at its end}, up to the first update in this process."""
    import jax

    from vlm_jax.__main__ import parse
    from vlm_jax.train import command, loop

    ends: dict[str, float] = {}

    def end(name: str) -> None:
        ends[name] = time.time() - started

    end("import")
    start, open_, advance = loop._start, loop.Loop.open, loop.Loop._advance

    def timed_start(*arguments: Any) -> Any:
        end("data")
        found = jax.block_until_ready(start(*arguments))
        end("weights")
        return found

    def timed_open(self: loop.Loop, *arguments: Any) -> None:
        open_(self, *arguments)
        end("compile")

    def timed_advance(self: loop.Loop) -> None:
        advance(self)
        jax.block_until_ready(self.state)
        end("update")
        raise Reached

    loop._start, loop.Loop.open, loop.Loop._advance = timed_start, timed_open, timed_advance
    try:
        command.train(**parse("train", flags))
    except Reached:
        return ends
    raise SystemExit("the run ended before its first update: give a folder without checkpoints")


def start(flags: list[str]) -> dict[str, float]:
    """`measure` in a new process."""
    env = os.environ | {"STARTED": str(time.time())}
    command = [sys.executable, __file__, "--measure", *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main(config: str, folder: Path, rounds: int, more: list[str]) -> None:
    """Prepare, start cold and warm, print the table."""
    run = folder / "run"
    flags = [f"--config={config}", f"--config.output={run}", *more]
    start([*flags, "--config.train.compile_cache="])
    print(f"{config}, {os.cpu_count()} cores\n")
    print("| compile cache | " + " | ".join(STRETCHES) + " | in all, s |\n|---" + "|---" * (len(STRETCHES) + 1) + "|")
    for _ in range(rounds):
        shutil.rmtree(run / "cache" / "compiled", ignore_errors=True)
        for name in ("cold", "warm"):
            ends = start(flags)
            times = [0.0, *(ends[s] for s in STRETCHES)]
            cells = [f"{after - before:.1f}" for before, after in zip(times, times[1:])]
            print(f"| {name} | " + " | ".join(cells) + f" | {times[-1]:.1f} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/llava15.py:7b,stage2,smoke")
    parser.add_argument(
        "--folder", type=Path, help="where the run's data is written and left (default: a temporary folder)"
    )
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    chosen, rest = parser.parse_known_args()
    if chosen.measure:
        print(json.dumps(measure([f"--config={chosen.config}", *rest], float(os.environ["STARTED"]))))
    elif chosen.folder:
        main(chosen.config, chosen.folder, chosen.rounds, rest)
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(chosen.config, Path(temporary), chosen.rounds, rest)

"""What every published recipe takes on slices of v5e, v6e and v5p: `plan` for each, one after another, as the README's table.

    python launch/bench/plan_table.py --out runs/plan_table [--only 7b] [--chips v5e,v5p] [--limit 4] [--print]

Each row is compiled by a process of its own (7B: a minute on an idle core) and kept as OUT/NAME.json with its command; started again the
script makes the rows that are absent. --print makes none and prints those there are. Only the extra tpu is needed, no TPU.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30
AXES = ("data", "fsdp", "tensor", "seq")
HEAD = (
    "| recipe | chips | mesh | batch, accum, remat | parameters | optimizer | activations | peak, of GiB | compute s | links s "
    "| memory s | MFU at most | compile s |\n|" + "---|" * 13
)


class Row(NamedTuple):
    """One plan: config words behind `configs/`, topology, and further flags."""

    recipe: str
    topology: str
    flags: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Of its file."""
        return re.sub(r"[^\w.]+", "_", f"{self.recipe}_{self.topology}")

    def command(self) -> list[str]:
        """As a user types it."""
        return [
            "python",
            "-m",
            "vlm_jax",
            "plan",
            "--config",
            f"configs/{self.recipe}",
            "--topology",
            self.topology,
            *self.flags,
        ]


def accum(n: int) -> tuple[str, ...]:
    """Flags for n micro-batches."""
    return (f"--config.train.accum={n}",)


# sizes at which the recipe's batch fits; the accumulation is the smallest that does
ROWS = (
    Row("llava15.py:7b,stage2", "v5e:4x8"),
    Row("llava15.py:7b,stage2", "2xv5e:4x4", ("--mesh=data=2",)),
    Row("llava15.py:7b,stage2,lora", "v5e:4x4"),
    Row("llava15.py:7b,stage1", "v5e:2x4", accum(2)),
    Row("llava15.py:7b,stage2", "v5p:2x2x1"),
    Row("llava15.py:7b,stage2", "v6e:2x4", accum(2)),
    Row("llava15.py:7b,stage2,lora", "v6e:2x2", accum(2)),
    Row("llava15.py:7b,stage2,lora", "v5p:2x2x1"),
    Row("llava15.py:7b,stage1", "v6e:2x2", accum(2)),
    Row("llava15.py:7b,stage1", "v5p:2x2x1"),
    Row("clip_flant5.py:xl,stage2", "v5e:2x4", accum(3)),
    Row("llava15.py:13b,stage2", "v5e:4x8"),
    Row("clip_flant5.py:xxl,stage2", "v5e:4x8", ("--mesh=fsdp=8,tensor=4", *accum(3))),
    Row("visual_tokenizer.py:vq16", "v5e:2x4"),
    Row("visual_tokenizer.py:unicode_hq", "v5e:4x8"),
    Row("visual_tokenizer.py:unicode_rq", "v5e:4x8"),
    Row("clip_flant5.py:xl,stage1", "v5e:2x4", accum(4)),
    Row("clip_flant5.py:xxl,stage1", "v5e:4x4", accum(2)),
    Row("llava15.py:13b,stage1", "v5e:4x4"),
    Row("llava15.py:13b,stage2,lora", "v5e:4x4", accum(2)),
    Row("llava15.py:13b,stage2", "v5p:2x2x1", accum(2)),
    Row("llava15.py:13b,stage2", "v6e:4x4"),
    Row("clip_flant5.py:xl,stage2", "v5p:2x2x1"),
    Row("clip_flant5.py:xxl,stage2", "v5p:2x2x1", accum(2)),
    Row("clip_flant5.py:xl,stage2", "v6e:2x2", accum(3)),
    Row("clip_flant5.py:xxl,stage2", "v6e:4x4", ("--mesh=fsdp=8,tensor=2",)),
    Row("visual_tokenizer.py:vq16", "v5p:2x2x1"),
    Row("visual_tokenizer.py:vq16", "v6e:2x2"),
    Row("visual_tokenizer.py:unicode_hq", "v5p:2x2x1"),
    Row("visual_tokenizer.py:unicode_hq", "v6e:4x4"),
    Row("visual_tokenizer.py:unicode_rq", "v5p:2x2x2"),
    Row("visual_tokenizer.py:unicode_rq", "v6e:4x4"),
    Row("llava15.py:13b,stage1", "v5p:2x2x1"),
    Row("llava15.py:13b,stage2,lora", "v5p:2x2x1"),
    Row("clip_flant5.py:xl,stage1", "v5p:2x2x1"),
    Row("clip_flant5.py:xxl,stage1", "v5p:2x2x1"),
    Row("llava15.py:13b,stage1", "v6e:2x4", accum(2)),
    Row("llava15.py:13b,stage2,lora", "v6e:2x4", accum(2)),
    Row("clip_flant5.py:xl,stage1", "v6e:2x2", accum(2)),
    Row("clip_flant5.py:xxl,stage1", "v6e:2x4", accum(2)),
)


def chosen(only: str, chips: str) -> Iterator[Row]:
    """Rows whose recipe matches `only`, on these chips; all of them for empty strings."""
    wanted = chips.split(",") if chips else ()
    chip = lambda row: re.search(r"v\d\w+", row.topology)[0]
    return (r for r in ROWS if re.search(only, r.recipe) and (not wanted or chip(r) in wanted))


def make(row: Row, out: Path) -> str:
    """Compile a row and write its file; "" or, where the command failed, its last line."""
    part, goal = out / f"{row.name}.part", out / f"{row.name}.json"
    command = [sys.executable, *row.command()[1:], f"--out={part}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if not part.exists():  # 3 is "does not fit", which is a result too
        return (done.stderr or done.stdout).strip().splitlines()[-1]
    (found,) = json.loads(part.read_text())
    part.write_text(json.dumps(found | {"recipe": row.recipe, "command": shlex.join(row.command())}, indent=1) + "\n")
    part.rename(goal)
    return ""


def gib(size: float) -> str:
    """Bytes as GiB."""
    return f"{size / GIB:.2f}"


def cells(plan: dict[str, Any]) -> list[str]:
    """A plan as the cells of its row."""
    mesh = " x ".join(f"{axis} {n}" for axis, n in plan["mesh"].items() if n > 1) or "-"
    held, fits = plan["held_bytes"], plan["fits"]
    peak = f"{'' if fits else 'does not fit: '}{gib(plan['peak_bytes'] or float('inf'))} of {gib(plan['memory_bytes'])}"
    times = [f"{plan['seconds'][key]:.3f}" if fits else "" for key in ("compute", "links", "memory")]
    if fits and "between slices" in plan["seconds"]:
        times[1] += f", {plan['seconds']['between slices']:.3f} between slices"
    batch = f"{plan['global_batch']}, {plan['accum']}, {plan.get('remat', 'none')}"
    share = f"{100 * plan['mfu_at_most']:.0f} %" if fits else ""
    parameters = held.get("parameters", 0) + held.get("frozen", 0) + held.get("moving", 0)
    # of what autodiff saves, compilers compute some again
    kept = min(plan["saved_bytes"], plan["temporary_bytes"]) if fits else plan["saved_bytes"]
    sizes = [gib(parameters), gib(held.get("optimizer", 0)), gib(kept)]
    name = plan["recipe"].replace(".py:", " ").replace(",", " ")
    return [name, plan["topology"], mesh, batch, *sizes, peak, *times, share, f"{plan['compile_seconds']:.0f}"]


def table(rows: list[Row], out: Path) -> str:
    """The markdown table of the rows that there are, in the order of recipes, and the commands below it."""
    order = {recipe: i for i, recipe in enumerate(dict.fromkeys(sorted(r.recipe for r in rows)))}
    there = [r for r in sorted(rows, key=lambda r: (order[r.recipe], r.topology)) if (out / f"{r.name}.json").exists()]
    plans = [json.loads((out / f"{r.name}.json").read_text()) for r in there]
    lines = ["| " + " | ".join(cells(p)) + " |" for p in plans]
    return "\n".join([HEAD, *lines, "", "```bash", *(p["command"] for p in plans), "```"])


def main() -> None:
    """Make what is absent, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder of the rows' JSON files")
    parser.add_argument("--only", default="", help="pattern of recipes, e.g. 7b or stage2$")
    parser.add_argument("--chips", default="", help="e.g. v5e,v5p; default: all")
    parser.add_argument("--limit", type=int, default=0, help="make at most so many rows; 0 is all")
    parser.add_argument("--print", action="store_true", dest="show", help="only print the rows that there are")
    args = parser.parse_args()
    out, rows = Path(args.out), list(chosen(args.only, args.chips))
    out.mkdir(parents=True, exist_ok=True)
    absent = [] if args.show else [r for r in rows if not (out / f"{r.name}.json").exists()]
    for row in absent[: args.limit or None]:
        failed = make(row, out)
        print(f"{row.name}: {failed or 'done'}", file=sys.stderr, flush=True)
    print(table(rows, out))


if __name__ == "__main__":
    main()

"""A process of a pod to be stopped: python run_pod.py SECONDS_PER_BATCH FOLDER flags of `python -m vlm_jax train`.

It is the command itself on a recipe of some thousand parameters, one device, slowed down so that it can be hit between two updates.
rows.PROCESS.jsonl in FOLDER gets a line for every batch that this process reads: {"step", "rows": [checksum of the tokens, ...]}.
"""

import json
import os
import sys
import time
import zlib
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    "--xla_backend_optimization_level=0"  # the program is compiled for every process and runs for seconds
)
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax  # noqa: E402

from vlm_jax.__main__ import main  # noqa: E402
from vlm_jax.data.pipeline import Batches  # noqa: E402

SLOW, FOLDER, FLAGS = float(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
read = Batches.__next__


def slowly(batches):
    """As Batches.__next__, with a line about what was read."""
    time.sleep(SLOW)
    step, rows = read(batches)
    checksums = [zlib.crc32(row.tobytes()) for row in rows["tokens"]]
    with open(FOLDER / f"rows.{jax.process_index()}.jsonl", "a") as file:
        file.write(json.dumps({"step": step, "rows": checksums}) + "\n")
    return step, rows


if __name__ == "__main__":  # workers that measure the data read this file too
    Batches.__next__ = slowly
    sys.exit(main(["train", *FLAGS]))

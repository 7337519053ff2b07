"""Training of a tokenizer against a critic, to be killed: python run_tokenizer_training.py FOLDER STEPS."""

import dataclasses
import os
import sys
import time
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.small_tokenizers import TRAIN, Batches, task  # noqa: E402
from vlm_jax.train.loop import run_task  # noqa: E402

SLOW = float(os.environ.get("SECONDS_PER_BATCH", "0"))


class SlowBatches(Batches):
    """Leaves time to be killed between two updates."""

    def __next__(self):
        time.sleep(SLOW)
        return super().__next__()


def main(folder: str, steps: str) -> None:
    train = dataclasses.replace(TRAIN, steps=int(steps), save_every=3, log_every=2, keep=1)
    of_run = task("rq", train=train)  # whose unused codes restart at random
    result = run_task(of_run, lambda start, state: SlowBatches(start), folder, progress=False)
    print(f"ended: {result.status} at {result.step}")


if __name__ == "__main__":
    main(*sys.argv[1:])

"""A training run to be killed: python run_training.py FOLDER STEPS [most bytes in a file]; ENCODER_DECODER=1: of T5, with dropout."""

import dataclasses
import os
import resource
import sys
import time
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.small_runs import EXACT, MODEL, Batches, Weights  # noqa: E402
from vlm_jax.train.loop import train  # noqa: E402
from vlm_jax.train.options import STAGE1  # noqa: E402

SLOW = float(os.environ.get("SECONDS_PER_BATCH", "0"))
ENCODER_DECODER = bool(os.environ.get("ENCODER_DECODER"))
if ENCODER_DECODER:
    from tests.contracts.test_encoder_decoder import MODEL, with_answers  # noqa: F811


class SlowBatches(Batches):
    """Leaves time to be killed between two updates."""

    def __next__(self):
        time.sleep(SLOW)
        step, rows = super().__next__()
        return step, with_answers(rows, step) if ENCODER_DECODER else rows


def main(folder: str, steps: str, limit: str = "") -> None:
    config = dataclasses.replace(
        EXACT, trainable=STAGE1, global_batch=2, steps=int(steps), save_every=3, log_every=2, keep=1
    )
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
    result = train(
        config,
        MODEL,
        lambda start, state: SlowBatches(start, rows=2),
        folder,
        source=Weights(MODEL),
        progress=False,
    )
    print(f"ended: {result.status} at {result.step}")


if __name__ == "__main__":
    main(*sys.argv[1:])

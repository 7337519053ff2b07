"""The body of `python -m vlm_jax convert`: one model directory in, another out, streaming.

    convert --from LLAVA_DIR --to HF_DIR [--dtype bf16] [--names hf|source|llava] [--max_shard 5GB]
    convert --from VICUNA_DIR --vision CLIP_DIR --projector mm_projector.bin --to HF_DIR
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Callable

from vlm_jax.convert.read import Checkpoint, open_checkpoint
from vlm_jax.convert.tensors import CheckpointError
from vlm_jax.convert.write import export, export_projector

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def main(
    source: str,
    target: str,
    *,
    vision: str | None = None,
    llm: str | None = None,
    projector: str | None = None,
    tokenizer: str | None = None,
    dtype: str | None = None,
    names: str = "hf",
    max_shard: str | int = "5GB",
    tower: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Checkpoint:
    """Convert `source` (--from) to `target` (--to); a target ending in .bin takes the projector alone.

    Parts given apart replace those of `source`. Returns the checkpoint that was read; errors are CheckpointError, one sentence each.
    """
    if os.path.realpath(source) == os.path.realpath(target):
        raise CheckpointError(f"--from and --to are both {source}: a checkpoint is not converted onto itself, give another directory")
    checkpoint = open_checkpoint(source, vision=vision, llm=llm, projector=projector)
    if Path(target).suffix == ".bin":
        export_projector(target, checkpoint.config, checkpoint.leaves, dtype)
        return checkpoint
    export(
        target,
        checkpoint.config,
        checkpoint.leaves,
        names=names,
        dtype=dtype,
        max_shard=parse_size(max_shard),
        source=checkpoint,
        tokenizer=tokenizer,
        tower=tower or (checkpoint.raw.get("mm_vision_tower") if checkpoint.kind == "llava" else vision),
        progress=progress,
    )
    return checkpoint


def parse_size(text: str | int) -> int:
    """Bytes of `5GB`, `500MB`, `2GiB` or a plain number."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    if not found or found[2].upper() not in UNITS or float(found[1]) <= 0:
        raise CheckpointError(f"--max_shard={text} is not a size: write it like 5GB, 500MB or 2GiB")
    return int(float(found[1]) * UNITS[found[2].upper()])

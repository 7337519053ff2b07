"""The body of `python -m vlm_jax convert`: one model directory in, another out, streaming.

convert --from LLAVA_DIR --to HF_DIR [--dtype bfloat16] [--names hf|source|llava] [--max_shard 5GB]
convert --from VICUNA_DIR --vision CLIP_DIR --projector mm_projector.bin --to HF_DIR
convert --from LLAVA_DIR --to mm_projector.bin
"""

from __future__ import annotations

import math
import os
import re
import sys
from pathlib import Path

from tqdm import tqdm

from vlm_jax.convert.read import Checkpoint, model_directory, open_checkpoint
from vlm_jax.convert.tensors import DTYPES, CheckpointError
from vlm_jax.convert.write import export, export_projector

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
LONG_NAMES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


def convert(**flags: str) -> int:
    """The command, called with its flags (`from`, `to`, ...; "" = not given); returns the exit code."""
    flags = {name: value for name, value in flags.items() if value not in ("", None)}
    if "from" not in flags:
        raise CheckpointError(
            "convert needs --from: the LLaVA directory, or the language model of one put together with --vision"
        )
    source, target = flags.pop("from"), flags.pop("to")
    checkpoint = convert_model(source, target, **flags)
    print(
        f"{target}: {checkpoint.kind} model of {source}, "
        f"{sum(math.prod(leaf.shape) for leaf in checkpoint.leaves.values()) / 1e6:.1f} M parameters"
    )
    return 0


def convert_model(
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
) -> Checkpoint:
    """Convert directory `source` to `target`; a target ending in .bin takes the projector alone.

    Parts given apart replace those of `source`; `tower` is what an original config.json names as
    mm_vision_tower. Returns the checkpoint that was read; errors are CheckpointError, one sentence each.
    """
    source = model_directory(source)
    if os.path.realpath(source) == os.path.realpath(target):
        raise CheckpointError(
            f"--from and --to are both {source}: a checkpoint is not converted onto itself, give another directory"
        )
    dtype = parse_dtype(dtype)
    checkpoint = open_checkpoint(source, vision=vision, llm=llm, projector=projector)
    if Path(target).suffix == ".bin":
        export_projector(target, checkpoint.config, checkpoint.leaves, dtype)
        return checkpoint
    named = checkpoint.raw.get("mm_vision_tower") if checkpoint.kind == "llava" else None
    with tqdm(unit="B", unit_scale=True, desc="writing", disable=not sys.stderr.isatty()) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        export(
            target,
            checkpoint.config,
            checkpoint.leaves,
            names=names,
            dtype=dtype,
            max_shard=parse_size(max_shard),
            source=checkpoint,
            tokenizer=tokenizer,
            tower=tower or vision or named,
            progress=progress,
        )
    return checkpoint


def parse_dtype(text: str | None) -> str | None:
    """Short name of `bfloat16` or `bf16`; None where nothing was asked for."""
    dtype = LONG_NAMES.get(text, text) or None
    if dtype is not None and dtype not in DTYPES:
        raise CheckpointError(f"--dtype={text} is unknown: use {', '.join(LONG_NAMES)}")
    return dtype


def parse_size(text: str | int) -> int:
    """Bytes of `5GB`, `500MB`, `2GiB` or a plain number."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    if not found or found[2].upper() not in UNITS or float(found[1]) <= 0:
        raise CheckpointError(f"--max_shard={text} is not a size: write it like 5GB, 500MB or 2GiB")
    return int(float(found[1]) * UNITS[found[2].upper()])

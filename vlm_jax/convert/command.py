"""The body of `python -m vlm_jax convert`: one model or adapter directory in, another out, streaming.

convert --from LLAVA_DIR --to HF_DIR [--dtype bfloat16] [--names hf|source|llava|parts] [--max_shard 5GB]
convert --from VICUNA_DIR --vision CLIP_DIR --projector mm_projector.bin --to HF_DIR
convert --from LLAVA_DIR --extract projector --to mm_projector.bin
convert --from ADAPTER_DIR --base BASE_DIR --merge --to HF_DIR
convert --from ADAPTER_DIR --base BASE_DIR --to ADAPTER_DIR [--names hf|llava|sq_llava]
convert --from DELTA_DIR --base BASE_DIR --delta apply --to LLAVA_DIR        (and --delta make)
convert --from vq_ds16_c2i.pt --to DIR [--config_name vq16]                   (visual tokenizers)
convert --from c2i_B_256.pt --grid 16 --to DIR                                (priors over their codes)
convert --from HQ_TRANSFORMER_DIR --extract prior --to DIR                    (which also holds its tokenizer)
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from vlm_jax.config import one_of
from vlm_jax.convert import prior, visual_tokenizer
from vlm_jax.convert.delta import SIGNS, convert_delta
from vlm_jax.convert.manifest import read_manifest
from vlm_jax.convert.merge import merged, open_adapted
from vlm_jax.convert.peft import Adapter
from vlm_jax.convert.read import Checkpoint, model_directory, open_checkpoint
from vlm_jax.convert.tensors import DTYPES, CheckpointError
from vlm_jax.convert.tokenizer_files import MODELS
from vlm_jax.convert.write import export, export_projector
from vlm_jax.convert.write_adapter import export_adapter

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
LONG_NAMES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
PARTS = ("vision", "llm", "projector")


def convert(**flags: str) -> int:
    """The command, called with its flags (`from`, `to`, ...; "" = not given); returns the exit code."""
    flags = {name: value for name, value in flags.items() if value not in ("", None, False)}
    if "from" not in flags:
        raise CheckpointError(
            "convert needs --from: the LLaVA directory, or the language model of one put together with --vision"
        )
    source, target = flags.pop("from"), flags.pop("to")
    wanted = flags.get("extract")
    if wanted == "prior" or prior.is_prior(source):
        return prior.convert_prior(
            source, target, **{name: x for name, x in flags.items() if (name, x) != ("extract", "prior")}
        )
    useless = next((name for name in ("grid", "heads") if flags.pop(name, 0)), None)
    if useless:
        raise CheckpointError(f"{source} is no prior over codes: --{useless} has no meaning for it")
    if visual_tokenizer.is_tokenizer(source):
        return visual_tokenizer.convert_tokenizer(source, target, **flags)
    if "config_name" in flags:
        raise CheckpointError(f"{source} is no visual tokenizer: --config_name has no meaning for it")
    if "delta" in flags:
        return _delta(source, target, **flags)
    checkpoint = convert_model(source, target, **flags)
    written = flags.get("extract") or read_manifest(target).kind
    wanted = {"model": r"^(?!.*/lora_)", "adapter": "/lora_[ab]$", "projector": "^projector/"}[written]
    size = sum(math.prod(leaf.shape) for path, leaf in checkpoint.leaves.items() if re.search(wanted, path))
    print(f"{target}: {checkpoint.kind} {written} of {source}, {size / 1e6:.1f} M parameters")
    return 0


def convert_model(
    source: str,
    target: str,
    *,
    base: str | None = None,
    merge: bool = False,
    extract: str | None = None,
    dtype: str | None = None,
    names: str | None = None,
    max_shard: str | int = "5GB",
    tokenizer: str | None = None,
    tower: str | None = None,
    **parts: str | None,
) -> Checkpoint:
    """Convert directory `source` to `target`: a model, or an adapter to another layout, or (merge) with its base to a model.

    base: of an adapter, if not the one that it names. extract="projector": write only that, as the torch file `target`. parts:
    vision, llm, projector replace those of `source`; tower: what an original config.json names as mm_vision_tower. Returns what
    was read, an adapter unmerged; errors are CheckpointError, one sentence each.
    """
    source = model_directory(source)
    dtype = parse_dtype(dtype)
    _refuse_onto_itself(source, target)
    check_target(target, extract)
    adapter = None
    if read_manifest(source).kind == "adapter":
        checkpoint, adapter = open_adapted(source, base=base, **parts)
    elif base or merge:
        raise CheckpointError(f"{source} is no adapter: {'--base' if base else '--merge'} has no meaning for it")
    else:
        checkpoint = open_checkpoint(source, **parts)
    names = names or "hf"
    named = checkpoint.raw.get("mm_vision_tower") if checkpoint.kind == "llava" else None
    tower = tower or (os.fspath(parts["vision"]) if parts.get("vision") else named)
    if extract:
        export_projector(target, checkpoint.config, checkpoint.leaves, dtype)
    elif adapter and not merge:
        _rewrite(target, checkpoint, adapter, names=names, dtype=dtype, base=base, tower=tower, tokenizer=tokenizer)
    else:
        with progress() as count:
            export(
                target,
                checkpoint.config,
                checkpoint.leaves,
                names=names,
                dtype=dtype,
                max_shard=parse_size(max_shard),
                source=merged(checkpoint),
                tokenizer=tokenizer or (adapter and _tokenizer(source)),
                chat_template=_chat_template(source) if adapter else None,
                tower=tower,
                progress=count,
            )
    return checkpoint


def _rewrite(
    target: str, checkpoint: Checkpoint, adapter: Adapter, tokenizer: str | None, base: str | None, **options
) -> None:
    """The adapter in another layout, with what was trained whole."""
    export_adapter(
        target,
        checkpoint.config,
        checkpoint.leaves,
        trained={path: mine.keys() - {None} or None for path, mine in adapter.extra.items()},
        base=base or read_manifest(adapter.directory).base_directory() or read_manifest(adapter.directory).base,
        tokens=checkpoint.tokens,
        start_end=bool(checkpoint.raw.get("mm_use_im_start_end")),
        tokenizer=tokenizer or _tokenizer(adapter.directory),
        chat_template=_chat_template(adapter.directory),
        **options,
    )


def _tokenizer(directory: Path) -> Path | None:
    """`directory` if it has a tokenizer."""
    return directory if any((directory / name).is_file() for name in MODELS) else None


def _chat_template(directory: Path) -> str | None:
    file = directory / "chat_template.jinja"
    return file.read_text(encoding="utf-8") if file.is_file() else None


def _delta(
    source: str, target: str, *, delta: str, base: str = "", dtype: str = "", max_shard: str = "5GB", **other
) -> int:
    """`convert --delta make` and `--delta apply`."""
    one_of("--delta", delta, tuple(SIGNS))
    useless = [name for name in other if name != "names"]
    if useless or not base:
        what = f"--{useless[0]} has no meaning for it" if useless else "give the directory of the base with --base"
        raise CheckpointError(f"convert --delta {delta}: {what}")
    _refuse_onto_itself(source, target)
    _refuse_onto_itself(base, target)
    with progress() as count:
        size = convert_delta(
            delta, source, base, target, dtype=parse_dtype(dtype), max_shard=parse_size(max_shard), progress=count
        )
    print(f"{target}: {'delta' if delta == 'make' else 'model'} of {source} and {base}, {size / 1e6:.1f} M parameters")
    return 0


@contextmanager
def progress() -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal: call what it gives with (bytes written, bytes in all)."""
    with tqdm(unit="B", unit_scale=True, desc="writing", disable=not sys.stderr.isatty()) as bar:

        def count(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield count


def _refuse_onto_itself(source: str | os.PathLike, target: str | os.PathLike) -> None:
    if os.path.realpath(source) == os.path.realpath(target):
        raise CheckpointError(
            f"--from and --to are both {source}: a checkpoint is not converted onto itself, give another directory"
        )


def check_target(target: str | os.PathLike, extract: str | None) -> None:
    """Raise unless `target` is a torch file exactly where a part is extracted."""
    if extract:
        one_of("--extract", extract, ("projector",))
    if (Path(target).suffix == ".bin") != bool(extract):
        raise CheckpointError(f"--to={target}: --extract projector writes a .bin file, and nothing else does")


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

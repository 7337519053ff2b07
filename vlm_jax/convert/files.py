"""Writing a directory so that a full disk or a crash never leaves half a file in place of a good one.

DIR/.partial-<process>/...   everything is written here first
DIR/...                      then renamed, file by file, config files last
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlm_jax.convert.tensors import CheckpointError

# files that say what the weights beside them are; those of an earlier export would say something else
ANNOUNCING = ("config.json", "adapter_config.json", "vlm_jax.json")
ADAPTER_PARTS = ("non_lora_trainables.bin", "Vit-lora")


@contextlib.contextmanager
def _or_nothing(target: Path) -> Iterator[None]:
    """An OSError (disk full, no permission) becomes one CheckpointError that names `target`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise CheckpointError(
            f"{target} could not be written ({reason}): nothing that was there before has changed"
        ) from error


@contextlib.contextmanager
def staging(directory: str | os.PathLike) -> Iterator[Path]:
    """A folder to write into; on success its files replace those of `directory`, on failure nothing there
    changes.

    Weight files of an earlier export that the new one does not hold (other shards, other format, an adapter in
    place of a model) are removed with the files that announce them, so that no reader mixes the two.
    """
    target = Path(directory)
    existed = target.is_dir()
    stage = target / f".partial-{os.getpid()}"
    try:
        with _or_nothing(target):
            stage.mkdir(parents=True)
            yield stage
            _install(stage, target)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        if not existed and target.is_dir() and not any(target.iterdir()):
            target.rmdir()


def _install(stage: Path, target: Path) -> None:
    """Rename every staged file into `target`: weights first, then their index, then the configs that announce
    them.
    """
    files = sorted(stage.iterdir(), key=lambda f: (f.suffix == ".json", f.name in ANNOUNCING, f.name))
    new, parts = {f.name for f in files}, _parts(target)
    for file in files:
        there = target / file.name
        if file.is_dir() and there.is_dir() and any(there.iterdir()) and not _written(there, parts):
            raise CheckpointError(f"{there} is in the way: no earlier export wrote this folder, give another directory")
    for file in files:
        _remove_folder(target / file.name, parts)
        os.replace(file, target / file.name)
    if any(is_weights(name) for name in new) or _parts(target):
        for old in list(target.iterdir()):
            if old.name in new or not (is_weights(old.name) or old.name in (*ANNOUNCING, *ADAPTER_PARTS, *parts)):
                continue
            _remove_folder(old, parts) if old.is_dir() else old.unlink()


def _parts(directory: Path) -> set[str]:
    """Folders and files of a model in parts that an export wrote to `directory`, as its manifest says."""
    manifest = directory / "vlm_jax.json"
    return set((read_json(manifest).get("parts") or {}).values()) if manifest.is_file() else set()


def _written(folder: Path, parts: set[str]) -> bool:
    """Whether an export wrote this folder: for an adapter, or as one of `parts`."""
    return (folder / "adapter_config.json").is_file() or folder.name in parts


def _remove_folder(folder: Path, parts: set[str]) -> None:
    """Remove a folder that an export wrote; a rename does not replace it."""
    if folder.is_dir() and _written(folder, parts):
        shutil.rmtree(folder)


def is_weights(name: str) -> bool:
    """Whether `name` is a model weight file or index that transformers would pick up, or the weights of an adapter."""
    stem = name.removesuffix(".index.json")
    return (
        (name.startswith("model") and stem.endswith(".safetensors"))
        or (name.startswith("pytorch_model") and stem.endswith(".bin"))
        or name in ("adapter_model.safetensors", "adapter_model.bin")
    )


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary name beside `path` to write to; renamed over `path` on success, removed on failure."""
    target = Path(path)
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        with _or_nothing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            os.replace(partial, target)
    finally:
        with contextlib.suppress(OSError):  # its folder may not even exist
            partial.unlink()


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """Parsed JSON object; a missing or broken file, or another value in it, raises one sentence naming it."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not readable JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def write_json(path: str | os.PathLike, value: Any) -> None:
    """`value` as indented JSON with sorted keys and a final newline."""
    Path(path).write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")

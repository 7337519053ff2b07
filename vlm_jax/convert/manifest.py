"""vlm_jax.json, the manifest of a directory that we wrote: what it holds, and for which base.

    {"format": 1, "kind": "model"}
    {"format": 1, "kind": "model", "parts": {"llm": "t5", ...}, "tensors": {...}}                       see convert.parts
    {"format": 1, "kind": "adapter", "base": "../llava-7b", "names": "hf", "image": {"aspect": "pad", ...}, "mark": [0.02, ...]}
    {"format": 1, "kind": "delta", "base": "../vicuna-13b"}

In a directory of others adapter_config.json (also that in Vit-lora/) tells an adapter from a model. A directory's name says nothing.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlm_jax.config import VLMConfig
from vlm_jax.convert.files import read_json, write_json
from vlm_jax.convert.tensors import CheckpointError

FILE, FORMAT = "vlm_jax.json", 1
KINDS = ("model", "adapter", "delta")
PEFT_CONFIG = "adapter_config.json"
VIT_FOLDER = "Vit-lora"  # where SQ-LLaVA keeps the tower's adapter, beside the one of the language model

MARKED = "llm/embed/embedding"

# settings that no tensor's shape tells: how images become slots, and which features are read
IMAGE = ("aspect", "merge", "image_newline", "pinpoints")
FEATURES = ("feature_layers", "select")


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What `directory` holds: `kind` is model, adapter or delta.

    base: directory or Hub name of the model that an adapter or delta belongs to, "" if not said; written: whether the
    manifest is ours; image: the settings of `image_settings`, {} if not said; mark: some weights of the base, () if not said;
    parts: of a model in parts, {"llm" | "vision" | "projector": folder or file in `directory`}.
    """

    directory: Path
    kind: str
    base: str = ""
    written: bool = False
    image: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    mark: tuple[float, ...] = ()
    parts: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def base_directory(self) -> Path | None:
        """The base's directory where it is here: as written, or relative to this directory."""
        places = (self.directory / self.base, Path(self.base)) if self.base else ()
        return next((place.resolve() for place in places if (place / "config.json").is_file()), None)


def read_manifest(directory: str | os.PathLike) -> Manifest:
    """The manifest of a directory, made from the files in it if it is not ours."""
    directory = Path(directory)
    if (directory / FILE).is_file():
        raw = read_json(directory / FILE)
        if raw.get("format") != FORMAT or raw.get("kind") not in KINDS:
            raise CheckpointError(
                f"{directory / FILE} has format {raw.get('format')!r} and kind {raw.get('kind')!r}: this version reads "
                f"format {FORMAT} and the kinds {', '.join(KINDS)}"
            )
        more = raw.get("image") or {}, tuple(raw.get("mark") or ()), raw.get("parts") or {}
        return Manifest(directory, raw["kind"], raw.get("base") or "", True, *more)
    for file in (directory / PEFT_CONFIG, directory / VIT_FOLDER / PEFT_CONFIG):
        if file.is_file():
            return Manifest(directory, "adapter", read_json(file).get("base_model_name_or_path") or "")
    return Manifest(directory, "model")


def write_manifest(
    stage: Path, kind: str, base: str | os.PathLike | None = None, target: Path | None = None, **more: Any
) -> None:
    """Write the manifest into `stage`. A base that is a directory is named relative to `target`, so that both may move."""
    raw: dict[str, Any] = {"format": FORMAT, "kind": kind, **more}
    if base:
        here = Path(base).is_dir()
        raw["base"] = Path(os.path.relpath(base, target or stage)).as_posix() if here else str(base)
    write_json(stage / FILE, raw)


def image_settings(config: VLMConfig) -> dict[str, Any]:
    """The settings of `config` that a base of the same shapes may have otherwise."""
    return {name: getattr(config, name) for name in IMAGE} | {name: getattr(config.vision, name) for name in FEATURES}


def with_image_settings(config: VLMConfig, settings: Mapping[str, Any]) -> VLMConfig:
    """`config` with what `image_settings` gave (read back from JSON)."""
    known = {name: _tuples(value) for name, value in settings.items() if name in IMAGE + FEATURES}
    vision = dataclasses.replace(config.vision, **{k: v for k, v in known.items() if k in FEATURES})
    return dataclasses.replace(config, vision=vision, **{k: v for k, v in known.items() if k in IMAGE})


def mark_of(leaves: Mapping[str, Any]) -> tuple[float, ...]:
    """A few of the weights that no adapter changes, to tell bases of the same sizes apart; () where they are not at hand."""
    if MARKED not in leaves:
        return ()
    values = np.asarray(leaves[MARKED].read((slice(1, 2), slice(0, 16))), np.float32)
    return tuple(float(value) for value in values[0])


def same_mark(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether two marks are of one model, perhaps stored in different types."""
    return len(one) == len(other) and np.allclose(one, other, rtol=2**-6, atol=1e-6)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def refuse_other(directory: Path) -> None:
    """CheckpointError if `directory` is not a model that can be opened by itself."""
    manifest = read_manifest(directory)
    if manifest.kind == "adapter":
        base = f" (made for {manifest.base})" if manifest.base else ""
        raise CheckpointError(f"{directory} is an adapter and no model: it is opened together with its base{base}")
    if manifest.kind == "delta":
        raise CheckpointError(
            f"{directory} holds delta weights: add them to their base with convert --delta apply --base DIR first"
        )

"""The config of a model put together from a LLaVA directory and parts given apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm_jax.config import ProjectorConfig, VisionConfig, VLMConfig
from vlm_jax.convert import names
from vlm_jax.convert.files import read_json
from vlm_jax.convert.hf_config import llm_from_hf, vlm_from_hf
from vlm_jax.convert.llava_config import feature_settings, read_vision_directory, vlm_from_llava
from vlm_jax.convert.tensors import CheckpointError


def combined_config(
    kind: str,
    raw: dict,
    main: Path,
    sources: Mapping[str, Path | None],
    found: Mapping[str, list[str]],
    partial: bool,
) -> VLMConfig:
    """The config of the combined model; a tower that is nowhere has the default sizes if `partial`."""
    where = str(main / "config.json")
    tower = read_vision_directory(sources["tower"]) if sources["tower"] else None
    if kind == "llm":
        if tower is None and not partial:
            raise CheckpointError(
                f"{main} is a language model: give a vision tower with --vision, and a projector with --projector, to "
                "python -m vlm_jax convert"
            )
        config = VLMConfig(vision=tower or VisionConfig(), llm=llm_from_hf(raw, where))
    elif kind == "llava":
        config = vlm_from_llava(raw, where, tower, main)
    else:
        config = vlm_from_hf(raw, where, processor_settings(main))
        if tower is not None:
            config = dataclasses.replace(
                config, vision=_with_features(tower, config.vision.feature_layers, config.vision.select)
            )
    if sources["llm"]:
        config = dataclasses.replace(
            config,
            llm=llm_from_hf(read_json(sources["llm"] / "config.json"), str(sources["llm"] / "config.json")),
        )
    if sources["projector"]:
        config = _with_projector(config, sources["projector"], found["projector"])
    return config


def _with_projector(config: VLMConfig, source: Path, found: list[str]) -> VLMConfig:
    """The projector as its tensors say, reading the features that the config.json beside it says."""
    kind = names.projector_kind(found)
    config = dataclasses.replace(
        config,
        projector=ProjectorConfig(kind, bias=any(n.endswith("bias") for n in found if "projector" in n)),
    )
    beside = (source if source.is_dir() else source.parent) / "config.json"
    settings = read_json(beside) if beside.is_file() else {}
    if "mm_vision_select_layer" in settings:
        config = dataclasses.replace(
            config,
            vision=_with_features(config.vision, **feature_settings(settings, str(beside))),
            aspect=settings.get("image_aspect_ratio")
            if settings.get("image_aspect_ratio") in ("square", "pad")
            else config.aspect,
        )
    return config


def _with_features(vision: VisionConfig, feature_layers: tuple[int, ...], select: str) -> VisionConfig:
    """A tower read at other layers; SigLIP has no class token to drop."""
    return dataclasses.replace(
        vision, feature_layers=feature_layers, select="full" if vision.kind == "siglip" else select
    )


def processor_settings(directory: Path) -> dict[str, Any] | None:
    """Image processor settings of an HF directory: preprocessor_config.json, or nested in
    processor_config.json (transformers 5).
    """
    if (directory / "preprocessor_config.json").is_file():
        return read_json(directory / "preprocessor_config.json")
    if (directory / "processor_config.json").is_file():
        return read_json(directory / "processor_config.json").get("image_processor")
    return None

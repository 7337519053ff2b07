"""config.json of the original LLaVA program (haotian-liu/LLaVA: model_type llava, llava_llama, llava_mistral)
<-> `VLMConfig`.

The decoder's keys are those of a Llama config at the top level; the tower is only named (`mm_vision_tower`),
its own config lies in its own directory, or is known for the two CLIP towers that LLaVA used.
"""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path
from typing import Any

from vlm_jax.config import ProjectorConfig, VisionConfig, VLMConfig
from vlm_jax.convert.files import read_json
from vlm_jax.convert.hf_config import (
    CLIP_L_336,
    Raw,
    checked,
    llm_from_hf,
    llm_to_hf,
    vision_from_hf,
    vision_to_hf,
)
from vlm_jax.convert.processor_files import with_processor
from vlm_jax.convert.tensors import CheckpointError

KNOWN_TOWERS = {
    "clip-vit-large-patch14-336": CLIP_L_336,
    "clip-vit-large-patch14": {**CLIP_L_336, "image_size": 224},
    "siglip-so400m-patch14-384": {
        "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16, "image_size": 384, "patch_size": 14,
    },
}  # fmt: skip


CLASSES = {
    "llama": "LlavaLlamaForCausalLM",
    "mistral": "LlavaMistralForCausalLM",
    "t5": "CLIPT5ForConditionalGeneration",
}
STATISTICS = ("image_mean", "image_std")  # as in preprocessor_config.json
T5_LENGTH = 2048  # tokens of a text that CLIP-FlanT5 was trained with; its positions are relative and have no end


def vlm_from_llava(
    raw: Raw, where: str, vision: VisionConfig | None = None, directory: Path | None = None
) -> VLMConfig:
    """An original LLaVA config.json; `vision` is the tower's config when it was given apart.

    Otherwise the tower is found by `mm_vision_tower`: a directory (also relative to `directory`), or the name
    of a known CLIP tower.
    """
    if "mpt" in raw.get("model_type", ""):
        raise CheckpointError(f"{where}: LLaVA on MPT is not supported: use a Llama or Mistral based model")
    features = feature_settings(raw, where)
    if vision is None and "vision_config" in raw:  # written by `vlm_to_llava` for a tower without a public name
        described = raw["vision_config"]
        statistics = {key: described.get(key) for key in STATISTICS}
        vision = with_processor(vision_from_hf(described, where, select="full"), statistics, where)
    elif vision is None:
        vision = tower_config(str(raw.get("mm_vision_tower") or raw.get("vision_tower") or ""), where, directory)
    if vision.kind == "siglip":  # "patch" drops the class token, and there is none
        features["select"] = "full"
    vision = checked(where, lambda: dataclasses.replace(vision, **features))
    merge = raw.get("mm_patch_merge_type") or "flat"
    aspect = raw.get("image_aspect_ratio") or "square"
    points = raw.get("image_grid_pinpoints") or ()
    points = ast.literal_eval(points) if isinstance(points, str) else points
    config = checked(
        where,
        lambda: VLMConfig(
            vision, projector_from_llava(raw), llm_from_hf(raw, where), aspect=aspect, merge=merge,
            image_newline="unpad" in merge,
            pinpoints=tuple(tuple(p) for p in points),
        ),
    )  # fmt: skip
    width = raw.get("mm_hidden_size")
    if width and width != config.vision.feature_width:
        raise CheckpointError(
            f"{where}: mm_hidden_size={width}, but the vision tower gives {config.vision.feature_width} "
            "channels: give the tower it was "
            "trained with"
        )
    return config


def feature_settings(raw: Raw, where: str) -> dict[str, Any]:
    """`feature_layers` and `select` of a VisionConfig from mm_vision_select_layer and
    mm_vision_select_feature.
    """
    select = raw.get("mm_vision_select_feature", "patch")
    if select not in ("patch", "cls_patch"):
        raise CheckpointError(f"{where}: mm_vision_select_feature={select!r} is unknown: it must be patch or cls_patch")
    return {
        "feature_layers": (int(raw.get("mm_vision_select_layer", -2)),),
        "select": "patch" if select == "patch" else "full",
    }


def projector_from_llava(raw: Raw) -> ProjectorConfig:
    """mm_projector_type; LLaVA reads a missing key as linear."""
    return ProjectorConfig(raw.get("mm_projector_type") or "linear")


def tower_directory(name: str, directory: Path | None) -> Path | None:
    """The directory that `mm_vision_tower` names, as it is or relative to the checkpoint's, if it is here."""
    places = (Path(name), (directory or Path()) / name) if name else ()
    return next((place for place in places if (place / "config.json").is_file()), None)


def tower_config(name: str, where: str, directory: Path | None) -> VisionConfig:
    """Config of the tower called `name`: from its directory if that is here, else from the table of known
    towers.
    """
    here = tower_directory(name, directory)
    if here is not None:
        return read_vision_directory(here)
    known = KNOWN_TOWERS.get(name.rstrip("/").rpartition("/")[2])
    if known is None:
        raise CheckpointError(f"{where}: the vision tower {name!r} is unknown here: give its directory with --vision")
    return vision_from_hf(known, where, select="patch" if "clip" in known["model_type"] else "full")


def read_vision_directory(directory: Path) -> VisionConfig:
    """Tower config of a CLIP or SigLIP directory, with the mean and deviation of its
    preprocessor_config.json.
    """
    raw = read_json(directory / "config.json")
    siglip = "siglip" in str(raw.get("model_type", ""))
    vision = vision_from_hf(raw, str(directory / "config.json"), select="full" if siglip else "patch")
    processor = directory / "preprocessor_config.json"
    return with_processor(vision, read_json(processor) if processor.is_file() else None, str(processor))


def vlm_to_llava(
    config: VLMConfig, tokens: Raw, dtype: str, tower: str | None, start_end: bool = False
) -> dict[str, Any]:
    """An original LLaVA config.json; `tower` (a Hub name or a directory) goes to mm_vision_tower; `start_end`: `<im_start>`
    and `<im_end>` stand around images.

    Without it the name is that of the known tower with these sizes; a tower that has none is described under
    `vision_config`.
    """
    if config.projector.act != "gelu" or not config.projector.bias:
        raise CheckpointError("LLaVA's own projector has erf GELU and biases, this model has not: export with names=hf")
    if len(config.vision.feature_layers) != 1:
        raise CheckpointError("LLaVA's own config has one feature layer, this model has several: export with names=hf")
    llm, named = llm_to_hf(config.llm), tower or known_tower(config.vision)
    return {
        **llm,
        **tokens,
        "architectures": [CLASSES[llm["model_type"]]],
        "model_type": "clip_t5" if config.encoder_decoder else "llava_" + llm["model_type"],
        "torch_dtype": dtype,
        "image_aspect_ratio": config.aspect,
        "image_grid_pinpoints": [list(p) for p in config.pinpoints] or None,
        "mm_hidden_size": config.vision.feature_width,
        "mm_patch_merge_type": config.merge,
        "mm_projector_type": config.projector.kind,
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": start_end,
        "mm_vision_select_feature": "patch" if config.vision.select == "patch" else "cls_patch",
        "mm_vision_select_layer": config.vision.feature_layers[0],
        "mm_vision_tower": named,
        "tokenizer_model_max_length": T5_LENGTH if config.encoder_decoder else config.llm.max_position,
        "tokenizer_padding_side": "right",
        "use_mm_proj": True,
        **({} if named else {"vision_config": describe_tower(config.vision)}),
    }


def describe_tower(vision: VisionConfig) -> dict[str, Any]:
    """`vision_config` of an original config.json: the tower's own, and what pixels are normalised with."""
    return vision_to_hf(vision) | dict(zip(STATISTICS, (list(vision.mean), list(vision.std))))


def known_tower(vision: VisionConfig) -> str | None:
    """Hub name of the known tower with the sizes of `vision`, if there is one."""
    for name, raw in KNOWN_TOWERS.items():
        known = vision_from_hf(raw, name, vision.feature_layers, "full")
        same = ("kind", "image_size", "patch_size", "width", "layers", "heads", "mlp", "act", "eps", "mean", "std")
        if all(getattr(known, field) == getattr(vision, field) for field in same):
            return ("openai/" if vision.kind == "clip" else "google/") + name
    return None

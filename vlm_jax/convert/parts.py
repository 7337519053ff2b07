"""A model as parts that other programs load on their own, in one directory.

    DIR/config.json, generation_config.json, preprocessor_config.json, tokenizer    of the whole, as CLIP-FlanT5 and LLaVA have them
    DIR/vlm_jax.json                {"parts": {"llm": "t5", "vision": "vision_tower", "projector": "mm_projector.safetensors"},
                                     "tensors": {"llm/encoder/blocks/attn/q/kernel": {"part": "llm", "layout": "transpose",
                                     "names": ["encoder.block.0.layer.0.SelfAttention.q.weight", ...]}, ...}}
    DIR/t5/                         T5ForConditionalGeneration with its tokenizer; of a decoder DIR/llm/, LlamaForCausalLM
    DIR/vision_tower/               CLIPVisionModel or SiglipVisionModel with its image processor
    DIR/mm_projector.safetensors    mm_projector.0.weight ... and image_newline where there is one

"tensors" says of every parameter of ours which tensors it is made of, one per layer, and how they lie (see convert.tensors).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from vlm_jax.config import VLMConfig
from vlm_jax.convert import names as naming
from vlm_jax.convert.files import write_json
from vlm_jax.convert.hf_config import llm_to_hf, vision_to_hf
from vlm_jax.convert.processor_files import preprocessor_config
from vlm_jax.convert.shards import Planned, write_directory, write_file
from vlm_jax.convert.tokenizer_files import COPIED

ROOMS = {"llm": ("llm", "head"), "vision": ("tower",), "projector": ("projector", "newline")}
VISION, PROJECTOR = "vision_tower", "mm_projector.safetensors"
CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "t5": "T5ForConditionalGeneration",
    "clip_vision_model": "CLIPVisionModel",
    "siglip_vision_model": "SiglipVisionModel",
}


def naming_of_parts(config: VLMConfig) -> str:
    """Which of names.PART_NAMINGS the parts of a model have."""
    return "parts_t5" if config.encoder_decoder else "parts"


def write_parts(
    stage: Path,
    config: VLMConfig,
    plan: Callable[[Iterable[naming.Entry]], list[Planned]],
    tokens: Mapping[str, Any],
    dtype: str,
    max_shard: int,
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """Write the parts into `stage`; returns "parts" and "tensors" of the manifest. plan: the tensors of some entries."""
    planned = {part: plan(naming.entries(config, rooms)) for part, rooms in ROOMS.items()}
    total = sum(tensor.size for tensors in planned.values() for tensor in tensors)
    places = {"llm": "t5" if config.encoder_decoder else "llm", "vision": VISION, "projector": PROJECTOR}
    described = {"llm": {**llm_to_hf(config.llm), **tokens}, "vision": vision_to_hf(config.vision)}
    before = 0
    for part, raw in described.items():
        folder = stage / places[part]
        folder.mkdir()
        write_directory(folder, planned[part], max_shard, lambda done, _, start=before: progress(start + done, total))
        before += sum(tensor.size for tensor in planned[part])
        write_json(folder / "config.json", {**raw, "architectures": [CLASSES[raw["model_type"]]], "torch_dtype": dtype})
    made = {**preprocessor_config(config), "processor_class": None}
    write_json(stage / VISION / "preprocessor_config.json", {k: v for k, v in made.items() if v is not None})
    if planned["projector"]:
        write_file(stage / PROJECTOR, planned["projector"], lambda size: progress(total, total))
    else:
        del places["projector"]
    return {"parts": places, "tensors": _table(config)}


def complete_parts(stage: Path, said: Mapping[str, Any]) -> None:
    """Give the language model's folder the tokenizer and the generation settings that lie in `stage`; said: by `write_parts`."""
    for name in (*COPIED, "generation_config.json") if said else ():
        if (stage / name).is_file():
            shutil.copyfile(stage / name, stage / said["parts"]["llm"] / name)


def _table(config: VLMConfig) -> dict[str, Any]:
    """{path: {"part", "layout", "names"}}; see the module."""
    table: dict[str, Any] = {}
    for part, rooms in ROOMS.items():
        for entry in naming.entries(config, rooms):
            made = {"part": part, "layout": entry.layout.kind, "names": []}
            key = naming.key_of(entry, naming_of_parts(config), config.projector.kind)
            table.setdefault(entry.path, made)["names"].append(key)
    return table

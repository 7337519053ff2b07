"""preprocessor_config.json, processor_config.json and the chat template of a LlavaProcessor.

The image processor is CLIPImageProcessor (short side to S, centre crop), LlavaImageProcessor with `do_pad`
(LLaVA's aspect "pad"), or SiglipImageProcessor (straight to S x S). `<image>` becomes patches + additional -
(1 if strategy default) tokens, which is `VisionConfig.features`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from vlm_jax.config import VisionConfig, VLMConfig
from vlm_jax.convert.tensors import CheckpointError

BICUBIC = 3  # PIL's number

# what the published LLaVA-1.5 checkpoints prompt with: "USER: <image>\nquestion ASSISTANT: answer</s>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'] | upper }}: {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}"
    "{{ eos_token if message['role'] == 'assistant' else ' ' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


START_END = "<im_start><image><im_end>"  # what LLaVA models with mm_use_im_start_end see in place of `<image>`


def preprocessor_config(config: VLMConfig) -> dict[str, Any]:
    """Settings of the image processor that makes the pixels this model was trained on."""
    vision, side = config.vision, config.vision.image_size
    raw = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(vision.mean),
        "image_std": list(vision.std),
        "processor_class": "LlavaProcessor",
        "resample": BICUBIC,
        "rescale_factor": 1 / 255,
    }
    square = {"height": side, "width": side}
    if config.aspect == "pad":
        cropped = {"do_center_crop": True, "crop_size": square, "size": {"shortest_edge": side}}
        return {**raw, **cropped, "do_pad": True, "image_processor_type": "LlavaImageProcessor"}
    if vision.kind == "siglip":
        return {**raw, "image_processor_type": "SiglipImageProcessor", "size": square}
    cropped = {"do_center_crop": True, "crop_size": square, "size": {"shortest_edge": side}}
    return {**raw, **cropped, "image_processor_type": "CLIPImageProcessor"}


def processor_config(vision: VisionConfig) -> dict[str, Any]:
    """How many tokens `<image>` stands for."""
    return {
        "image_token": "<image>",
        "num_additional_image_tokens": int(vision.kind == "clip"),
        "patch_size": vision.patch_size,
        "processor_class": "LlavaProcessor",
        "vision_feature_select_strategy": "default" if vision.select == "patch" else "full",
    }


def with_processor(vision: VisionConfig, raw: Mapping[str, Any] | None, where: str) -> VisionConfig:
    """The tower with the mean and deviation of an image processor's settings `raw` (None: there are none).

    CheckpointError names the file `where` if that processor makes other pixels than ours: what is stated must be what
    `preprocessor_config` writes for this tower.
    """
    raw = {key: value for key, value in (raw or {}).items() if value is not None}
    for key, wanted in (("resample", BICUBIC), ("do_resize", True), ("do_rescale", True), ("do_normalize", True)):
        if raw.get(key, wanted) != wanted:
            raise CheckpointError(f"{where} has {key}={raw[key]!r}, but only {wanted!r} is supported")
    if not math.isclose(raw.get("rescale_factor", 1 / 255), 1 / 255, rel_tol=1e-6):
        raise CheckpointError(f"{where} has rescale_factor={raw['rescale_factor']!r}, but only 1/255 is supported")
    crops = raw.get("do_center_crop", vision.kind == "clip")
    for key in ("size", "crop_size") if crops else ("size",):
        if key in raw and _sides(raw[key]) != {vision.image_size}:
            raise CheckpointError(
                f"{where} has {key}={raw[key]!r}, but the tower takes {vision.image_size} x {vision.image_size} pixels"
            )
    if not raw.get("do_pad") and crops != (vision.kind == "clip"):  # a padded image is square: there is nothing to crop
        raise CheckpointError(
            f"{where} has do_center_crop={crops}, but only {not crops} is supported for a {vision.kind} tower"
        )
    mean, std = tuple(raw.get("image_mean") or vision.mean), tuple(raw.get("image_std") or vision.std)
    if len(mean) != 3 or len(std) != 3:
        raise CheckpointError(
            f"{where} has image_mean={list(mean)} and image_std={list(std)}: each needs three numbers"
        )
    return dataclasses.replace(vision, mean=tuple(map(float, mean)), std=tuple(map(float, std)))


def _sides(size: Any) -> set[int]:
    """The lengths in `size` or `crop_size`: a number, or numbers by name."""
    return {n for n in size.values() if n} if isinstance(size, Mapping) else {size}

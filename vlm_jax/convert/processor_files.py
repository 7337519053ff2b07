"""preprocessor_config.json, processor_config.json and the chat template of a LlavaProcessor.

The image processor is CLIPImageProcessor (short side to S, centre crop), LlavaImageProcessor with `do_pad`
(LLaVA's aspect "pad"), or SiglipImageProcessor (straight to S x S). `<image>` becomes patches + additional -
(1 if strategy default) tokens, which is `VisionConfig.features`.
"""

from __future__ import annotations

from typing import Any

from vlm_jax.config import VisionConfig, VLMConfig

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

"""config.json of Hugging Face models <-> `VLMConfig`: LlavaForConditionalGeneration, and towers and decoders
on their own.

Keys of every transformers version are read (`rope_theta` + `rope_scaling` and `rope_parameters`,
`torch_dtype` and `dtype`, `image_token_index` and `image_token_id`); keys left out have the defaults of the
transformers config class. Written are the older keys, which 4.36 and every later version understand.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from vlm_jax.config import (
    SIGLIP_MEAN,
    SIGLIP_STD,
    ConfigError,
    LLMConfig,
    ProjectorConfig,
    RopeConfig,
    T5Config,
    VisionConfig,
    VLMConfig,
)  # fmt: skip
from vlm_jax.convert import t5_config
from vlm_jax.convert.processor_files import with_processor
from vlm_jax.convert.tensors import CheckpointError

Raw = Mapping[str, Any]

ACTIVATIONS = {
    "quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu", "silu": "silu", "swish": "silu",
}  # fmt: skip
HF_ACTIVATIONS = {
    "quick_gelu": "quick_gelu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "relu": "relu",
    "silu": "silu",
}

# defaults of LlamaConfig, MistralConfig, CLIPVisionConfig, SiglipVisionConfig, and LlavaConfig's tower
TEXT_DEFAULTS = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu", "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "initializer_range": 0.02,
}  # fmt: skip
MISTRAL_DEFAULTS = {
    **TEXT_DEFAULTS, "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072,
    "sliding_window": 4096,
}  # fmt: skip
CLIP_DEFAULTS = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "initializer_range": 0.02,
}  # fmt: skip
SIGLIP_DEFAULTS = {
    **CLIP_DEFAULTS,
    "patch_size": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
CLIP_L_336 = {
    "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "patch_size": 14,
    "image_size": 336,
    "num_hidden_layers": 24, "num_attention_heads": 16, "projection_dim": 768,
}  # fmt: skip


def vlm_from_hf(raw: Raw, where: str, processor: Raw | None = None) -> VLMConfig:
    """LlavaForConditionalGeneration's config.json, and its image processor's settings when there are any.

    `where` names the file in errors. `do_pad` of the processor is LLaVA's aspect "pad"; without it images are
    cropped to a square.
    """
    select = raw.get("vision_feature_select_strategy", "default")
    if select not in ("default", "full"):
        raise CheckpointError(
            f"{where}: vision_feature_select_strategy={select!r} is unknown: it must be default or full"
        )
    layers = raw.get("vision_feature_layer", -2)
    vision = vision_from_hf(
        raw.get("vision_config") or CLIP_L_336,
        where,
        feature_layers=tuple(layers) if isinstance(layers, (list, tuple)) else (layers,),
        select="patch" if select == "default" else "full",
    )
    llm = llm_from_hf(raw.get("text_config") or {}, where)
    with_tie = dataclasses.replace(llm, tie=llm.tie or bool(raw.get("tie_word_embeddings", False)))
    projector = ProjectorConfig(
        "mlp2x_gelu",
        activation(raw.get("projector_hidden_act", "gelu"), where),
        bool(raw.get("multimodal_projector_bias", True)),
    )
    aspect = "pad" if (processor or {}).get("do_pad") else "square"
    return VLMConfig(
        with_processor(vision, processor, f"the image processor beside {where}"), projector, with_tie, aspect=aspect
    )


def vision_from_hf(
    raw: Raw, where: str, feature_layers: tuple[int, ...] = (-2,), select: str = "patch"
) -> VisionConfig:
    """A CLIP or SigLIP tower's config (also the vision half of a full CLIP or SigLIP model's config.json)."""
    if raw.get("model_type") in ("clip", "siglip") or ("vision_config" in raw and "text_config" in raw):
        raw = {
            "model_type": f"{raw.get('model_type', 'clip')}_vision_model",
            **(raw.get("vision_config") or {}),
        }
    kind = {"clip_vision_model": "clip", "siglip_vision_model": "siglip"}.get(
        raw.get("model_type", "clip_vision_model")
    )
    if kind is None:
        raise CheckpointError(
            f"{where}: a vision tower of type {raw['model_type']!r} is not supported: use a CLIP or SigLIP tower"
        )
    get = {**(SIGLIP_DEFAULTS if kind == "siglip" else CLIP_DEFAULTS), **raw}
    if get.get("num_channels", 3) != 3:
        raise CheckpointError(
            f"{where}: num_channels={get['num_channels']} is not supported: the tower must take RGB images"
        )
    statistics = {"mean": SIGLIP_MEAN, "std": SIGLIP_STD} if kind == "siglip" else {}
    return checked(
        where,
        lambda: VisionConfig(
            kind, get["image_size"], get["patch_size"], get["hidden_size"], get["num_hidden_layers"],
            get["num_attention_heads"],
            get["intermediate_size"], activation(get["hidden_act"], where), float(get["layer_norm_eps"]),
            tuple(feature_layers), select,
            init_std=float(get["initializer_range"]), **statistics,
        ),
    )  # fmt: skip


def llm_from_hf(raw: Raw, where: str) -> LLMConfig | T5Config:
    """A Llama, Mistral or T5 config.json (or `text_config`)."""
    kind = raw.get("model_type", "llama").removeprefix("llava_")
    if kind in t5_config.TYPES:
        return checked(where, lambda: t5_config.t5_from_hf(raw))
    if kind not in ("llama", "mistral", "llava"):
        raise CheckpointError(
            f"{where}: a language model of type {kind!r} is not supported: use a Llama, Mistral or T5 model"
        )
    get = {**(MISTRAL_DEFAULTS if kind == "mistral" else TEXT_DEFAULTS), **raw}
    heads = get["num_attention_heads"]
    return checked(
        where,
        lambda: LLMConfig(
            vocab=get["vocab_size"],
            width=get["hidden_size"],
            mlp=get["intermediate_size"],
            layers=get["num_hidden_layers"],
            heads=heads,
            kv_heads=get.get("num_key_value_heads") or heads,
            head_dim=get.get("head_dim") or get["hidden_size"] // heads,
            max_position=get["max_position_embeddings"],
            rope=rope_from_hf(get, where),
            eps=float(get["rms_norm_eps"]),
            window=get.get("sliding_window") if kind == "mistral" else None,
            tie=bool(get.get("tie_word_embeddings", False)),
            attention_bias=bool(get.get("attention_bias", False)),
            mlp_bias=bool(get.get("mlp_bias", False)),
            act=activation(get["hidden_act"], where),
            init_std=float(get["initializer_range"]),
        ),
    )


def rope_from_hf(raw: Raw, where: str) -> RopeConfig:
    """`rope_parameters` (new) or `rope_theta` with `rope_scaling` (old); `type` and `rope_type` are the same
    key.
    """
    got = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    kind = got.get("rope_type") or got.get("type") or "default"
    if kind not in ("default", "linear", "dynamic", "yarn", "llama3"):
        raise CheckpointError(
            f"{where}: rope type {kind!r} is not supported: use default, linear, dynamic, yarn or llama3"
        )
    if (
        got.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0)) != 1.0
        or got.get("truncate", True) is not True
    ):
        raise CheckpointError(
            f"{where}: partial_rotary_factor and truncate=false of the rope parameters are not supported"
        )
    factor = float(got.get("factor") or 1.0)
    attention = got.get("attention_factor")
    if kind == "yarn" and attention is None and got.get("mscale") and got.get("mscale_all_dim"):
        attention = _mscale(factor, got["mscale"]) / _mscale(factor, got["mscale_all_dim"])
    original = raw.get("original_max_position_embeddings") or got.get("original_max_position_embeddings")
    return RopeConfig(
        kind=kind,
        theta=float(got.get("rope_theta") or raw.get("rope_theta") or 10000.0),
        factor=factor,
        original_max_position=original if kind in ("yarn", "llama3") else None,
        low_freq_factor=float(got.get("low_freq_factor", 1.0)),
        high_freq_factor=float(got.get("high_freq_factor", 4.0)),
        beta_fast=float(got.get("beta_fast") or 32.0),
        beta_slow=float(got.get("beta_slow") or 1.0),
        attention_factor=None if attention is None else float(attention),
    )


def _mscale(factor: float, scale: float) -> float:
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def activation(name: str, where: str) -> str:
    """Our name of an HF activation."""
    if name not in ACTIVATIONS:
        raise CheckpointError(
            f"{where}: activation {name!r} is not supported: use one of {', '.join(sorted(ACTIVATIONS))}"
        )
    return ACTIVATIONS[name]


def checked(where: str, make: Any) -> Any:
    """A config whose own checks name the file too."""
    try:
        return make()
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{where}: {error}") from error


def vlm_to_hf(config: VLMConfig, image_token: int, tokens: Raw, dtype: str) -> dict[str, Any]:
    """config.json of LlavaForConditionalGeneration.

    tokens: bos_token_id, eos_token_id, pad_token_id (those that exist); dtype: float32, bfloat16, float16.
    Raises for a model that class cannot express (another projector, image_newline), with the way out.
    """
    if config.projector.kind != "mlp2x_gelu":
        raise CheckpointError(
            "LlavaForConditionalGeneration has a two-layer projector, this model has "
            f"{config.projector.kind}: export with names=llava"
        )
    if config.image_newline or config.merge != "flat" or config.aspect == "anyres":
        raise CheckpointError(
            f"LlavaForConditionalGeneration sees one view per image, this model has aspect={config.aspect}, "
            f"merge={config.merge}: "
            "export with names=llava"
        )
    layers = config.vision.feature_layers
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "ignore_index": -100,
        "image_seq_length": config.vision.features,
        "image_token_index": image_token,
        "multimodal_projector_bias": config.projector.bias,
        "pad_token_id": tokens.get("pad_token_id"),
        "projector_hidden_act": HF_ACTIVATIONS[config.projector.act],
        "text_config": {**llm_to_hf(config.llm), **tokens},
        "tie_word_embeddings": config.llm.tie,
        "torch_dtype": dtype,
        "vision_config": vision_to_hf(config.vision),
        "vision_feature_layer": layers[0] if len(layers) == 1 else list(layers),
        "vision_feature_select_strategy": "default" if config.vision.select == "patch" else "full",
        "vocab_size": config.llm.vocab,
    }


def vision_to_hf(vision: VisionConfig) -> dict[str, Any]:
    """`vision_config` of a tower."""
    raw = {
        "model_type": f"{vision.kind}_vision_model",
        "hidden_act": HF_ACTIVATIONS[vision.act],
        "hidden_size": vision.width,
        "image_size": vision.image_size,
        "initializer_range": vision.init_std,
        "intermediate_size": vision.mlp,
        "layer_norm_eps": vision.eps,
        "num_attention_heads": vision.heads,
        "num_hidden_layers": vision.layers,
        "patch_size": vision.patch_size,
    }
    # transformers builds SigLIP's pooling head unless told not to, and then misses its weights
    return {**raw, "vision_use_head": vision.pooler_head} if vision.kind == "siglip" else {**raw, "projection_dim": 768}


def llm_to_hf(llm: LLMConfig | T5Config) -> dict[str, Any]:
    """`text_config` (or a top-level config): T5, Mistral if a decoder has a window, else Llama."""
    if isinstance(llm, T5Config):
        return t5_config.t5_to_hf(llm)
    if llm.window is not None and (llm.attention_bias or llm.mlp_bias):
        raise CheckpointError(
            "a decoder with both a window and biases is neither transformers' Llama nor its Mistral: it "
            "cannot be exported"
        )
    raw = {
        "model_type": "llama" if llm.window is None else "mistral",
        "head_dim": llm.head_dim,
        "hidden_act": HF_ACTIVATIONS[llm.act],
        "hidden_size": llm.width,
        "initializer_range": llm.init_std,
        "intermediate_size": llm.mlp,
        "max_position_embeddings": llm.max_position,
        "num_attention_heads": llm.heads,
        "num_hidden_layers": llm.layers,
        "num_key_value_heads": llm.kv_heads,
        "rms_norm_eps": llm.eps,
        "rope_scaling": rope_to_hf(llm.rope),
        "rope_theta": llm.rope.theta,
        "tie_word_embeddings": llm.tie,
        "vocab_size": llm.vocab,
    }
    if llm.window is not None:
        return {**raw, "sliding_window": llm.window}
    return {**raw, "attention_bias": llm.attention_bias, "mlp_bias": llm.mlp_bias}


def rope_to_hf(rope: RopeConfig) -> dict[str, Any] | None:
    """`rope_scaling`. Linear and dynamic have exactly the two keys that old versions insist on."""
    if rope.kind == "default":
        return None
    if rope.kind in ("linear", "dynamic"):
        return {"type": rope.kind, "factor": rope.factor}
    raw: dict[str, Any] = {"rope_type": rope.kind, "factor": rope.factor}
    if rope.original_max_position is not None:
        raw["original_max_position_embeddings"] = rope.original_max_position
    if rope.kind == "llama3":
        return {**raw, "low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    raw |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
    return raw if rope.attention_factor is None else {**raw, "attention_factor": rope.attention_factor}

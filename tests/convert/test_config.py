"""config.json of HF and of original LLaVA: defaults, old and new keys, round trips, refusals."""

import dataclasses

import pytest

from tests.convert.models import CLIP, SIGLIP, TINY, VARIANTS
from vlm_jax.config import LLMConfig, ProjectorConfig, RopeConfig, VisionConfig, VLMConfig
from vlm_jax.convert.hf_config import llm_from_hf, rope_from_hf, vision_from_hf, vlm_from_hf, vlm_to_hf
from vlm_jax.convert.llava_config import vlm_from_llava, vlm_to_llava
from vlm_jax.convert.processor_files import preprocessor_config
from vlm_jax.convert.tensors import CheckpointError


@pytest.mark.parametrize("variant", VARIANTS)
def test_hf_round_trip(variant):
    config = VARIANTS[variant]
    raw = vlm_to_hf(config, 100, {"bos_token_id": 1}, "float32")
    back = vlm_from_hf(raw, "config.json", preprocessor_config(config))
    assert (
        dataclasses.replace(back, vision=dataclasses.replace(back.vision, pooler_head=config.vision.pooler_head))
        == config
    )


def test_published_llava_15_is_the_default_model():
    """What llava-1.5-7b-hf states; everything else is a default of the transformers classes."""
    raw = {
        "model_type": "llava", "image_token_index": 32000, "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "text_config": {"max_position_embeddings": 4096, "model_type": "llama", "rms_norm_eps": 1e-05,
                        "vocab_size": 32064},
        "vision_config": {
            "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096,
            "model_type": "clip_vision_model", "num_attention_heads": 16,
            "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768, "vocab_size": 32000,
        },
    }  # fmt: skip
    want = VLMConfig(aspect="square", llm=dataclasses.replace(LLMConfig(), vocab=32064))
    assert vlm_from_hf(raw, "x") == want
    assert vlm_from_hf({k: v for k, v in raw.items() if k != "vision_config"}, "x") == want
    assert vlm_from_hf({}, "x").llm == dataclasses.replace(LLMConfig(), max_position=2048, eps=1e-6)


def test_old_and_new_keys_agree():
    old = {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    new = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}}
    assert rope_from_hf(old, "x") == rope_from_hf(new, "x") == RopeConfig("linear", 5e5, 2.0)
    assert rope_from_hf({"rope_theta": 1e4, "rope_scaling": None}, "x") == RopeConfig()
    yarn = {
        "rope_type": "yarn",
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 0.5,
        "original_max_position_embeddings": 64,
    }
    assert rope_from_hf({"rope_parameters": yarn}, "x").attention_factor == pytest.approx(
        (0.1 * 3.6888794 + 1) / (0.05 * 3.6888794 + 1)
    )


def test_mistral_defaults():
    llm = llm_from_hf({"model_type": "mistral"}, "x")
    assert (llm.mlp, llm.kv_heads, llm.window, llm.max_position) == (14336, 8, 4096, 131072)
    assert llm_from_hf({"model_type": "mistral", "sliding_window": None}, "x").window is None


def test_vision_half_of_a_full_clip():
    assert vision_from_hf({"model_type": "clip", "vision_config": {"hidden_size": 96}}, "x").width == 96
    siglip = vision_from_hf({"model_type": "siglip_vision_model"}, "x", (-1,), "full")
    assert (siglip.act, siglip.eps, siglip.patch_size, siglip.mean) == (
        "gelu_tanh",
        1e-6,
        16,
        (0.5, 0.5, 0.5),
    )


LLAVA = {
    "model_type": "llava_llama", "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch", "mm_hidden_size": 1024,
    "image_aspect_ratio": "pad",
    "hidden_size": 4096, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
}  # fmt: skip


def test_original_llava_15_is_the_default_model():
    assert vlm_from_llava(LLAVA, "x") == VLMConfig()


def test_original_llava_choices():
    old = {k: v for k, v in LLAVA.items() if not k.startswith(("mm_projector", "image_aspect"))}
    config = vlm_from_llava(
        {**old, "mm_vision_tower": "openai/clip-vit-large-patch14", "mm_vision_select_feature": "cls_patch"},
        "x",
    )
    assert (config.projector.kind, config.aspect, config.vision.image_size, config.vision.select) == (
        "linear",
        "square",
        224,
        "full",
    )
    anyres = {
        "image_aspect_ratio": "anyres",
        "mm_patch_merge_type": "spatial_unpad",
        "image_grid_pinpoints": "[(336, 672), [672, 336]]",
    }
    config = vlm_from_llava({**LLAVA, **anyres}, "x")
    assert config.image_newline and config.pinpoints == ((336, 672), (672, 336))


@pytest.mark.parametrize("variant", ["plain", "mistral_window", "yarn"])
@pytest.mark.parametrize("tower", [None, "/models/clip"])
def test_llava_round_trip(variant, tower):
    config = VARIANTS[variant]
    raw = vlm_to_llava(config, {}, "float32", tower)
    assert vlm_from_llava(raw, "x", vision=CLIP if tower else None) == config
    anyres = dataclasses.replace(
        config, aspect="anyres", merge="spatial_unpad", image_newline=True, pinpoints=((28, 56), (56, 28))
    )
    assert vlm_from_llava(vlm_to_llava(anyres, {}, "float32", None), "x") == anyres
    assert vlm_to_llava(VLMConfig(), {}, "float32", None)["mm_vision_tower"] == "openai/clip-vit-large-patch14-336"


@pytest.mark.parametrize("raw, sentence", [
    ({"text_config": {"model_type": "qwen2"}}, "language model of type 'qwen2' is not supported"),
    ({"vision_config": {"model_type": "dinov2"}}, "vision tower of type 'dinov2' is not supported"),
    ({"text_config": {"rope_scaling": {"rope_type": "longrope"}}}, "rope type 'longrope' is not supported"),
    ({"text_config": {"hidden_act": "gelu_10"}}, "activation 'gelu_10' is not supported"),
    ({"vision_feature_select_strategy": "cls"}, "vision_feature_select_strategy='cls' is unknown"),
    ({"vision_config": {"model_type": "siglip_vision_model"}}, "SigLIP has no class token"),
    ({"text_config": {"num_attention_heads": 32, "num_key_value_heads": 5}},
     "not a multiple of llm.kv_heads=5"),
    ({"vision_feature_layer": 30}, "feature_layers=30 does not exist"),
])  # fmt: skip
def test_refusals_name_the_file(raw, sentence):
    with pytest.raises(CheckpointError, match=f"model/config.json: .*{sentence}"):
        vlm_from_hf(raw, "model/config.json")


def test_what_a_format_cannot_say():
    with pytest.raises(CheckpointError, match="export with names=llava"):
        vlm_to_hf(dataclasses.replace(TINY, projector=ProjectorConfig("linear")), 1, {}, "float32")
    with pytest.raises(CheckpointError, match="export with names=llava"):
        vlm_to_hf(dataclasses.replace(TINY, image_newline=True), 1, {}, "float32")
    with pytest.raises(CheckpointError, match="export with names=hf"):
        vlm_to_llava(VARIANTS["full_two_layers"], {}, "float32", None)
    with pytest.raises(CheckpointError, match="--vision"):
        vlm_from_llava({**LLAVA, "mm_vision_tower": "somewhere/own-tower"}, "x")
    with pytest.raises(CheckpointError, match="mm_hidden_size=1024, but the vision tower gives 24"):
        vlm_from_llava(LLAVA, "x", vision=SIGLIP)
    assert isinstance(vlm_from_llava({**LLAVA, "mm_hidden_size": 24}, "x", vision=SIGLIP).vision, VisionConfig)

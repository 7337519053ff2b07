"""CLIP-FlanT5 (Lin et al. 2024, "Evaluating Text-to-Visual Generation with Image-to-Text Generation"): the models behind VQAScore.

    python -m vlm_jax train --config configs/clip_flant5.py:xl,stage1 \\
        --config.init.llm=DIR/flan-t5-xl --config.init.vision=DIR/clip-vit-large-patch14-336 \\
        --config.data.path="('blip_laion_cc_sbu_558k.json',)" --config.data.image_folder=DIR/images

Words: xl | xxl | t5_11b (their ablation, on the original T5); stage1 | stage2; whole_text (stage 1 without splitting captions, another
ablation); unpacked (one sample per row, as published); compat (their loss average, schedule, bfloat16 logits and no clipping); smoke
(seconds on a CPU, generated data, random weights). Stage 2 reads llava_v1_5_mix665k_flattened_multi_turn.json, or LLaVA's mix665k as a
source with flatten="pairs"; there, data.shared_images=True with data.views_per_row=2 encodes an image once for all its questions.
"""

import dataclasses

from vlm_jax.config import ConfigError, T5Config, VLMConfig
from vlm_jax.data.options import DataConfig
from vlm_jax.recipe import Recipe, config_dict
from vlm_jax.smoke import shrink
from vlm_jax.train.options import STAGE1, STAGE2, Compat, TrainConfig
from vlm_jax.words import read_words

SIZES = {
    "xl": T5Config(),  # google/flan-t5-xl
    "xxl": T5Config(width=4096, mlp=10240, heads=64),  # google/flan-t5-xxl
    "t5_11b": T5Config(width=1024, mlp=65536, heads=128, head_dim=128, gated=False, act="relu", tie=True),  # t5-11b
}


def stage1() -> tuple[DataConfig, TrainConfig]:
    """Projector only, 558K captions, each split at a random character into what is read and what is said."""
    data = DataConfig(
        template="t5_plain_split_text",  # --version t5_plain_split_text
        row_length=4864,
        views_per_row=8,  # eight captions share a row
        answer_length=512,
        sample_length=2048,  # --model_max_length 2048
    )
    train = TrainConfig(
        trainable=STAGE1,  # --tune_mm_mlp_adapter True
        global_batch=32,  # 32 rows of 8 samples = --per_device_train_batch_size 32 on 8 GPUs
        lr=1e-2,  # --learning_rate 1e-2
        epochs=1,  # --num_train_epochs 1
        warmup_ratio=0.03,
        schedule="cosine",
        weight_decay=0.0,  # --warmup_ratio 0.03 --lr_scheduler_type cosine --weight_decay 0.
    )
    return data, train


def stage2() -> tuple[DataConfig, TrainConfig]:
    """T5 and projector, one sample for every question and answer of the 665K instructions."""
    data = DataConfig(
        template="t5_v1",  # --version t5_v1
        row_length=4096,
        views_per_row=6,
        answer_length=1024,
        sample_length=2048,  # --model_max_length 2048
    )
    train = TrainConfig(
        trainable=STAGE2,  # everything but the tower
        global_batch=24,  # 24 rows of about 4 samples; published: 6 x 2 steps of accumulation x 8 GPUs = 96
        lr=2e-5,  # --learning_rate 2e-5
        epochs=1,
        warmup_ratio=0.03,
        schedule="cosine",
        weight_decay=0.0,  # as stage 1
    )
    return data, train


def get_config(words: str = ""):
    """The recipe named by comma-separated words (default: xl,stage2)."""
    chosen = read_words(
        words, flags=("whole_text", "unpacked", "compat", "smoke"), size=tuple(SIZES), stage=("stage2", "stage1")
    )
    first = chosen["stage"] == "stage1"
    data, train = (stage1 if first else stage2)()
    if "whole_text" in chosen:
        if not first:
            raise ConfigError("config words 'stage2' and 'whole_text' exclude each other: only stage 1 splits its text")
        data = dataclasses.replace(data, template="t5_plain")
    if "unpacked" in chosen:
        data = dataclasses.replace(data, row_length=2048, views_per_row=1, max_samples=1)
        train = dataclasses.replace(train, global_batch=256 if first else 96)
    if "compat" in chosen:
        share = (8 if first else 16) if "unpacked" in chosen else 1  # means over the micro-batches of 8 GPUs
        compat = Compat(loss_normalisation="per_microbatch", zero_first_lr=True, logits_dtype="bfloat16")
        # the trainer left clipping to DeepSpeed, whose settings had none
        train = dataclasses.replace(train, accum=share, clip_norm=None, compat=compat)
    recipe = Recipe(
        # --image_aspect_ratio: stage 1 leaves the default (square), stage 2 says pad
        model=VLMConfig(llm=SIZES[chosen["size"]], aspect="square" if first else "pad"),
        data=data,
        train=train,
        output=f"runs/clip_flant5_{chosen['size']}_{chosen['stage']}",
    )
    return config_dict(shrink(recipe) if "smoke" in chosen else recipe)

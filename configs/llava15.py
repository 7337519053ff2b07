"""LLaVA-1.5 (Liu et al. 2023, "Improved Baselines with Visual Instruction Tuning"), as its scripts/v1_5 train it.

    python -m vlm_jax train --config configs/llava15.py:7b,stage1 \\
        --config.init.llm=DIR/vicuna-7b-v1.5 --config.init.vision=DIR/clip-vit-large-patch14-336 \\
        --config.data.path="('blip_laion_cc_sbu_558k.json',)" --config.data.image_folder=DIR/images

Words: 7b | 13b; stage1 | stage2; full | lora | qlora (stage 2 by adapters, on a frozen base of bfloat16 or of 4 bits); unpacked (one
sample per row, as published); compat (their loss average, schedule and masks); smoke (seconds on a CPU, generated data, random weights).
"""

import dataclasses

from vlm_jax.config import ConfigError, LLMConfig, LoRAConfig, QuantConfig, VLMConfig
from vlm_jax.data.options import DataConfig
from vlm_jax.recipe import Recipe, config_dict
from vlm_jax.smoke import shrink
from vlm_jax.train.options import LORA, STAGE1, STAGE2, Compat, TrainConfig
from vlm_jax.words import read_words

SIZES = {
    "7b": LLMConfig(),  # lmsys/vicuna-7b-v1.5
    "13b": LLMConfig(width=5120, mlp=13824, layers=40, heads=40, kv_heads=40),  # lmsys/vicuna-13b-v1.5
}


def stage1() -> tuple[DataConfig, TrainConfig]:
    """scripts/v1_5/pretrain.sh: projector only, 558K captions, plain template."""
    data = DataConfig(
        template="plain",  # --version plain
        row_length=4864,
        views_per_row=8,  # eight captions of at most 608 slots each share a row
        sample_length=2048,  # --model_max_length 2048
    )
    train = TrainConfig(
        trainable=STAGE1,  # --tune_mm_mlp_adapter True
        global_batch=32,  # 32 rows of 8 samples = --per_device_train_batch_size 32 on 8 GPUs
        lr=1e-3,  # --learning_rate 1e-3
        epochs=1,  # --num_train_epochs 1
        warmup_ratio=0.03,
        schedule="cosine",
        weight_decay=0.0,  # --warmup_ratio 0.03 --lr_scheduler_type cosine --weight_decay 0.
    )
    return data, train


def stage2() -> tuple[DataConfig, TrainConfig]:
    """scripts/v1_5/finetune.sh: LLM and projector, 665K instructions, Vicuna v1 template."""
    data = DataConfig(
        template="v1",  # --version v1
        row_length=4096,
        views_per_row=6,  # about 4.3 samples per row at the mix665k length distribution
        sample_length=2048,  # --model_max_length 2048
    )
    train = TrainConfig(
        trainable=STAGE2,  # everything but the tower
        global_batch=32,  # 32 rows, about 138 samples; published: --per_device_train_batch_size 16 on 8 GPUs = 128
        lr=2e-5,  # --learning_rate 2e-5
        epochs=1,
        warmup_ratio=0.03,
        schedule="cosine",
        weight_decay=0.0,  # as stage 1
    )
    return data, train


def adapted(train: TrainConfig) -> TrainConfig:
    """scripts/v1_5/finetune_lora.sh: adapters on every linear of the LLM's blocks, and the whole projector."""
    return dataclasses.replace(
        train,
        trainable=LORA,
        lr=2e-4,  # --learning_rate 2e-4
        group_lrs=((r"^projector/", 2e-5),),  # --mm_projector_lr 2e-5
    )


def get_config(words: str = ""):
    """The recipe named by comma-separated words (default: 7b,stage2)."""
    choices = {"size": tuple(SIZES), "stage": ("stage2", "stage1"), "tuning": ("full", "lora", "qlora")}
    chosen = read_words(words, flags=("unpacked", "compat", "smoke"), **choices)
    first, adapters = chosen["stage"] == "stage1", chosen["tuning"] != "full"
    data, train = (stage1 if first else stage2)()
    if first and adapters:
        raise ConfigError(
            f"config words 'stage1' and {chosen['tuning']!r} exclude each other: stage 1 trains the projector alone"
        )
    if adapters:
        train = adapted(train)
    if "unpacked" in chosen:
        data = dataclasses.replace(data, row_length=2048, views_per_row=1, max_samples=1)
        train = dataclasses.replace(train, global_batch=256 if first else 128)
    if "compat" in chosen:
        data = dataclasses.replace(data, compat="llava")
        share = (
            8 if "unpacked" in chosen else 1
        )  # they average the means of 8 GPUs; a packed batch is too small for that
        train = dataclasses.replace(
            train, accum=share, compat=Compat(loss_normalisation="per_microbatch", zero_first_lr=True)
        )
    recipe = Recipe(
        # --image_aspect_ratio: stage 1 leaves the default (square), stage 2 says pad
        model=VLMConfig(
            llm=SIZES[chosen["size"]],
            aspect="square" if first else "pad",
            lora=(LoRAConfig(("^llm/blocks/",), rank=128, alpha=256.0, dropout=0.05),) if adapters else (),
            quant=QuantConfig()
            if chosen["tuning"] == "qlora"
            else None,  # --bits 4 --quant_type nf4 --double_quant True
        ),
        data=data,
        train=train,
        output=f"runs/llava15_{chosen['size']}_{chosen['stage']}" + (f"_{chosen['tuning']}" if adapters else ""),
    )
    return config_dict(shrink(recipe) if "smoke" in chosen else recipe)

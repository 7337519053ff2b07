"""LlamaGen's priors over the codes of a VQ-16 tokenizer (arXiv 2406.06525).

    python -m vlm_jax tokenize --model vq_ds16_c2i.pt --images IMAGENET/train --crop ten --out codes.arrayrecord
    python -m vlm_jax train --config configs/prior.py:gpt_b,c2i --config.data.codes="('codes.arrayrecord',)"
    python -m vlm_jax imagine --prior runs/prior_gpt_b_c2i --tokenizer vq_ds16_c2i.pt --classes 207,360 --out pictures

Words: gpt_b, gpt_l, gpt_xl, gpt_xxl, gpt_xxxl, gpt_1b, gpt_3b, gpt_7b; c2i or t2i (classes, captions); 256, 384 or 512 pixels.
t2i also needs --config.data.captions=FOLDER with T5 features. `smoke` makes any of them a tiny one on made-up codes.
"""

import dataclasses

from vlm_jax.data.code_options import CodeDataConfig
from vlm_jax.prior_recipe import PriorRecipe, shrink
from vlm_jax.recipe import config_dict
from vlm_jax.train.prior_options import PriorTrainConfig
from vlm_jax.visual_tokenizers.priors.options import PUBLISHED
from vlm_jax.words import read_words

CAPTIONS = "T5_FEATURES"  # stands for the folder until data.captions is set


def llamagen() -> PriorTrainConfig:
    """The defaults of autoregressive/train/train_c2i.py and train_t2i.py, which their scripts keep."""
    return PriorTrainConfig(
        epochs=300,  # --epochs 300
        global_batch=256,  # --global-batch-size 256
        lr=1e-4, beta1=0.9, beta2=0.95, weight_decay=5e-2,  # --lr 1e-4 --beta1 0.9 --beta2 0.95 --weight-decay 5e-2
        clip_norm=1.0,  # --max-grad-norm 1.0
        dtype="bfloat16",  # --mixed-precision bf16
    )  # fmt: skip


def get_config(words: str = ""):
    """The recipe named by a size, a condition and an image size (default: gpt_b, c2i, 256)."""
    chosen = read_words(
        words, flags=("smoke",), size=tuple(PUBLISHED), condition=("c2i", "t2i"), pixels=("256", "384", "512")
    )
    text = chosen["condition"] == "t2i"
    prior = dataclasses.replace(
        PUBLISHED[chosen["size"]], condition="caption" if text else "class", grid=int(chosen["pixels"]) // 16
    )
    recipe = PriorRecipe(
        prior=prior,
        data=CodeDataConfig(captions=CAPTIONS if text else ""),
        train=llamagen(),
        output=f"runs/prior_{chosen['size']}_{chosen['condition']}",
    )
    return config_dict(shrink(recipe) if "smoke" in chosen else recipe)

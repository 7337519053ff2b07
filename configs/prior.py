"""Priors over the codes of visual tokenizers: LlamaGen's (arXiv 2406.06525), RQ- and HQ-Transformers (2203.01941, 2206.04452).

    python -m vlm_jax tokenize --model vq_ds16_c2i.pt --images IMAGENET/train --crop ten --out codes.arrayrecord
    python -m vlm_jax train --config configs/prior.py:gpt_b,c2i --config.data.codes="('codes.arrayrecord',)"
    python -m vlm_jax imagine --prior runs/prior_gpt_b_c2i --tokenizer vq_ds16_c2i.pt --classes 207,360 --out pictures

Words of LlamaGen's: gpt_b, gpt_l, gpt_xl, gpt_xxl, gpt_xxxl, gpt_1b, gpt_3b, gpt_7b; c2i or t2i (classes, captions); 256, 384 or 512
pixels. t2i also needs --config.data.captions=FOLDER with T5 features.
RQ-Transformers: rq (ImageNet, 480 M), rq_imagenet_821m ..., rq_ffhq_355m, rq_cc3m_654m ...; they read the codebook of the tokenizer
that made the codes: --config.init.tokenizer=DIR. HQ-Transformers: hq (ImageNet, S), hq_imagenet_l, hq_imagenet_level3 ..., hq_cc15m.
Those of texts need --config.data.captions=FOLDER with their tokens (.npy).

`images` trains any of them on images, which the frozen tokenizer encodes anew at every step, with the crops, drawn codes and soft labels
of the original programs:

    python -m vlm_jax train --config configs/prior.py:rq,images --config.data.path="('IMAGENET/train',)" --config.init.tokenizer=DIR

`smoke` makes any of them a tiny one on made-up codes, or images.
"""

import dataclasses
from typing import Any

from vlm_jax.config import ConfigError
from vlm_jax.data.code_options import CodeDataConfig
from vlm_jax.prior_recipe import PriorInit, PriorRecipe, shrink
from vlm_jax.recipe import config_dict
from vlm_jax.train.prior_options import PriorTrainConfig
from vlm_jax.visual_tokenizers.priors.hierarchy_options import (
    PUBLISHED_HQ,
    PUBLISHED_RQ,
    RQTransformerConfig,
)
from vlm_jax.visual_tokenizers.priors.options import PUBLISHED
from vlm_jax.words import read_words

CAPTIONS = "CAPTIONS"  # stands for the folder until data.captions is set
TOKENIZER = "TOKENIZER"  # stands for the tokenizer until init.tokenizer is set
IMAGES = "IMAGES"  # stands for the folder until data.path is set


def llamagen() -> PriorTrainConfig:
    """The defaults of autoregressive/train/train_c2i.py and train_t2i.py, which their scripts keep."""
    return PriorTrainConfig(
        epochs=300,  # --epochs 300
        global_batch=256,  # --global-batch-size 256
        lr=1e-4, beta1=0.9, beta2=0.95, weight_decay=5e-2,  # --lr 1e-4 --beta1 0.9 --beta2 0.95 --weight-decay 5e-2
        clip_norm=1.0,  # --max-grad-norm 1.0
        dtype="bfloat16",  # --mixed-precision bf16
    )  # fmt: skip


def rq_transformer(batch: int = 2048, epochs: int = 100) -> PriorTrainConfig:
    """stage2 configs of rq-vae-transformer; of codes in a file, which are hard targets, unless `images` says otherwise."""
    return PriorTrainConfig(
        epochs=epochs, global_batch=batch,
        lr=5e-4, beta1=0.9, beta2=0.95, weight_decay=1e-4, no_decay=(),  # AdamW over all parameters
        schedule="cosine",  # to 0, no warm-up
        clip_norm=1.0,
        dtype="bfloat16",  # amp
    )  # fmt: skip


def hq_transformer(batch: int = 512, epochs: int = 100, lr: float = 5e-4) -> PriorTrainConfig:
    """stage2 configs of hqtransformer, whose training script was never published."""
    return PriorTrainConfig(
        epochs=epochs, global_batch=batch,
        lr=lr, beta1=0.9, beta2=0.95, weight_decay=1e-4,
        no_decay=(r"(^|/)(bias|scale|embedding)$", "^(start|head_start|child_scale)$"),  # linear weights alone decay
        schedule="cosine", warmup_ratio=1 / epochs,  # warmup_epoch 1
        dtype="bfloat16",
    )  # fmt: skip


RQ = {"rq": PUBLISHED_RQ["imagenet_480m"]} | {f"rq_{name}": config for name, config in PUBLISHED_RQ.items()}
HQ = {"hq": PUBLISHED_HQ["imagenet_s"]} | {f"hq_{name}": config for name, config in PUBLISHED_HQ.items()}
TRAINED = {
    "rq_ffhq_355m": rq_transformer(128, 200),
    "rq_church_370m": rq_transformer(256, 300),
    "hq_ffhq": hq_transformer(128, 200),
    "hq_cc15m": hq_transformer(512, 20, 3e-4),
}


CUTS = {  # part of a name -> crop, mirrored share
    "ffhq": ("random_area", 0.5),  # RandomResizedCrop of 75 to 100 %, RandomHorizontalFlip
    "church": ("centre", 0.0), "lsun": ("centre", 0.0),  # LSUN: CenterCrop
    "cc": ("random_place", 0.0),  # Resize, RandomCrop; the RQ-Transformer's of cc3m lie nearer to the middle
    "rq": ("random_place", 0.5),  # imagenet256x256: Resize, RandomCrop, RandomHorizontalFlip
    "hq": ("random_place", 0.0),  # Resize, RandomCrop
}  # fmt: skip
# whose config.yaml has temp_soft_labels 1.0; the others of hqtransformer have none
SOFT_HQ = ("hq", "hq_imagenet_s", "hq_imagenet_m", "hq_imagenet_l", "hq_ffhq", "hq_cc15m")


def on_images(size: str, text: bool) -> tuple[CodeDataConfig, dict[str, Any]]:
    """(images as the program of a prior cuts them, train.* that say what it takes for their codes)."""
    if size in PUBLISHED:  # extract_codes_t2i.py; extract_codes_c2i.py --ten-crop --crop-range 1.1
        return CodeDataConfig(path=(IMAGES,), crop="centre_box" if text else "ten", margin=1.1), {}
    crop, flip = next(cut for part, cut in CUTS.items() if part in size)
    soft = {"soft_temperature": 1.0} if size in SOFT_HQ else {}
    if size in RQ:  # loss: soft_target_cross_entropy, stochastic_codes true, temp 0.5
        soft = {"soft_temperature": 0.5, "stochastic_codes": True}
    return CodeDataConfig(path=(IMAGES,), crop=crop, flip=flip), soft


def get_config(words: str = ""):
    """The recipe named by a size, and for LlamaGen's a condition and an image size (default: gpt_b, c2i, 256)."""
    sizes = {**PUBLISHED, **RQ, **HQ}
    chosen = read_words(
        words, flags=("smoke", "images"), size=tuple(sizes), condition=("c2i", "t2i"), pixels=("256", "384", "512")
    )
    size = chosen["size"]
    prior, output = sizes[size], f"runs/prior_{size}"
    if size in PUBLISHED:
        text = chosen["condition"] == "t2i"
        grid = int(chosen["pixels"]) // 16
        prior = dataclasses.replace(prior, condition="caption" if text else "class", grid=grid)
        output, train = f"{output}_{chosen['condition']}", llamagen()
    else:
        if (chosen["condition"], chosen["pixels"]) != ("c2i", "256"):
            raise ConfigError(f"the config words t2i, 384 and 512 are for LlamaGen's priors, not for {size}")
        train = TRAINED.get(size, rq_transformer() if size in RQ else hq_transformer())
    data, images = CodeDataConfig(), "images" in chosen
    if images:
        data, soft = on_images(size, prior.condition == "caption")
        train, output = dataclasses.replace(train, **soft), f"{output}_images"
    recipe = PriorRecipe(
        prior=prior,
        init=PriorInit(tokenizer=TOKENIZER if images or isinstance(prior, RQTransformerConfig) else ""),
        data=dataclasses.replace(data, captions=CAPTIONS if prior.condition in ("caption", "text") else ""),
        train=train,
        output=output,
    )
    return config_dict(shrink(recipe) if "smoke" in chosen else recipe)

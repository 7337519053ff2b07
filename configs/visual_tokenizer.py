"""Visual tokenizers as published: LlamaGen (arXiv 2406.06525), RQ-VAE (2203.01941), HQ-VAE (2206.04452), UniCode (2403.09072).

    python -m vlm_jax train --config configs/visual_tokenizer.py:vq16 --config.data.path="('IMAGENET/train',)" \
        --config.init.vgg=vgg16-397923af.pth --config.init.lpips=vgg.pth

One word says which: vq16, vq8, rq, hq, hq3, unicode_hq, unicode_rq. `smoke` makes any of them a tiny one on generated
watches, with a random VGG-16. UniCode's also need --config.init.llm=VICUNA, the folder whose token embeddings become the codebook.
watch_vq, watch_rq, watch_hq are small ones for smart-watches on two CPU cores; they need no file.
"""

import dataclasses

from vlm_jax.data.image_options import ImageDataConfig
from vlm_jax.recipe import config_dict
from vlm_jax.tokenizer_recipe import TokenizerInit, TokenizerRecipe, shrink
from vlm_jax.train.tokenizer_options import TokenizerTrainConfig
from vlm_jax.visual_tokenizers.options import (
    PUBLISHED,
    AdversaryConfig,
    AutoencoderConfig,
    CriticConfig,
    QuantizerConfig,
    TokenizerConfig,
)
from vlm_jax.words import read_words


def llamagen() -> TokenizerRecipe:
    """scripts/tokenizer/train_vq.sh and the defaults of tokenizer/tokenizer_image/vq_train.py."""
    return TokenizerRecipe(
        data=ImageDataConfig(size=256, crop="random_scale", flip=0.5),  # --image-size 256, random_crop_arr, RandomHorizontalFlip
        critic=CriticConfig("patch", width=64, layers=3, norm="batch"),  # --disc-type patchgan
        adversary=AdversaryConfig(
            reconstruction="l2",  # --reconstruction-loss l2, --reconstruction-weight 1.0
            perceptual_weight=1.0,  # --perceptual-weight 1.0
            weight=0.5,  # --disc-weight 0.5
            start=20000,  # --disc-start 20000
            critic="hinge", adversarial="hinge",  # --disc-loss hinge, --gen-loss hinge
            adaptive=False,  # --disc-adaptive-weight is off
            weigh_critic=True,
        ),
        train=TokenizerTrainConfig(
            epochs=40,  # --epochs 40
            global_batch=128,  # --global-batch-size 128
            lr=1e-4, beta1=0.9, beta2=0.95,  # --lr 1e-4 --beta1 0.9 --beta2 0.95; --weight-decay is never applied
            clip_norm=1.0,  # --max-grad-norm 1.0, each network
            average=0.9999,  # update_ema's decay; --ema
            dtype="bfloat16",  # --mixed-precision bf16
        ),
    )  # fmt: skip


def rq_vae() -> TokenizerRecipe:
    """configs/imagenet256/stage1/in256-rqvae-8x8x4.yaml of rq-vae-transformer."""
    return TokenizerRecipe(
        data=ImageDataConfig(size=256, crop="random_place", flip=0.5),  # Resize, RandomCrop, RandomHorizontalFlip
        critic=CriticConfig("patch", width=64, layers=2, norm="batch"),  # num_layers 2, ndf 64, norm_type bn
        adversary=AdversaryConfig(weight=0.75, start=0, limit=1e4, weigh_critic=True),  # disc_weight .75, disc_start 0
        train=TokenizerTrainConfig(
            epochs=10,  # epochs 10 (50 for the best)
            global_batch=128,  # batch_size 32 on 4 GPUs
            lr=4e-5, beta1=0.5, beta2=0.9,  # init_lr 4e-5, betas [.5, .9], weight_decay 0
            schedule="cosine", min_lr=4e-5,  # warmup.min_lr = init_lr: constant behind the warm-up
            warmup_ratio=0.5 / 10,  # warmup.epoch 0.5 of 10
        ),
    )  # fmt: skip


def hq_vae(min_lr: float = 0.0) -> TokenizerRecipe:
    """configs/imagenet256 of hqtransformer: pixel-shuffle two levels, or three levels (min_lr 4e-5)."""
    return TokenizerRecipe(
        data=ImageDataConfig(size=256, crop="random_place", flip=0.0),  # Resize(256), RandomCrop(256), no flip
        critic=CriticConfig("patch", width=64, layers=2, norm="group"),  # disc_num_layers 2, norm_type gn
        adversary=AdversaryConfig(weight=0.75, start=0, limit=1e4),  # disc_weight .75, disc_start 0; d_weight up to 1e4
        train=TokenizerTrainConfig(
            epochs=15,
            global_batch=128,  # total_batch_size 128
            lr=4e-5, beta1=0.5, beta2=0.9,  # base_lr 4e-5, betas [.5, .9], grad_clip_norm 0 is none
            schedule="cosine", min_lr=min_lr,
            warmup_ratio=0.5 / 15,  # warmup_epoch 0.5
        ),
    )  # fmt: skip


def unicode() -> TokenizerRecipe:
    """UniCode's tokenizers; its config files were never published, so batch, epochs and norms are inferred from the names of its runs."""
    return TokenizerRecipe(
        data=ImageDataConfig(size=256, crop="random_place", flip=0.0),
        critic=CriticConfig("patch", width=64, layers=2, norm="group"),  # inferred
        adversary=AdversaryConfig(weight=0.75, start=0, limit=500.0, fade=0.9),  # d_weight up to 500, g (1 - 0.9 ratio)
        train=TokenizerTrainConfig(
            epochs=50,  # "epo45+5"
            tail=5 / 50,  # the last 5 epochs have the language model's rows
            global_batch=384,  # "bsz384"
            lr=4e-5, beta1=0.5, beta2=0.9,
            schedule="cosine", min_lr=4e-5, warmup_ratio=0.5 / 50,  # inferred
        ),
    )  # fmt: skip


def watch(kind: str) -> TokenizerRecipe:
    """Smart-watches of 168 pixels in a quarter of an hour on two CPU cores: pixels alone, no critic, no perceptual loss, no file."""
    quantizer = {
        # moving averages, whose unused codes restart: a table trained by gradients came to use 23 % of 4096 codes
        "vq": QuantizerConfig(kind="rq", codes=(8192,), width=16, depth=1, restart=True),
        "rq": QuantizerConfig(kind="rq", codes=(512,), width=16, depth=4, shared=True, restart=True),
        "hq": QuantizerConfig(kind="two_level", codes=(512, 4096), width=16, restart=True),
    }[kind]
    autoencoder = AutoencoderConfig(
        width=32,
        multipliers=(1,),  # 84 x 84 codes, of hq 42 x 42 top codes too: digits are 6 pixels wide
        blocks=1,
        attention=(),
        resolution=168,
        latent=32,
        init_downsample=True,  # the encoder never works at full resolution
        middle_attention=False,
        groups=1,  # 32 groups of one channel would take the mean, and with it the flat colours, out of each
    )
    return TokenizerRecipe(
        tokenizer=TokenizerConfig(autoencoder, quantizer, "taming"),
        critic=CriticConfig("none"),
        adversary=AdversaryConfig(perceptual_weight=0.0, top_reconstruction=False),
        init=TokenizerInit(kernels="lecun"),
        data=ImageDataConfig(size=168, crop="centre", flip=0.0, generated_watches=2000, threads=1),
        train=TokenizerTrainConfig(
            steps=2400,
            global_batch=4,
            lr=2e-3,
            clip_norm=1.0,
            schedule="cosine",
            warmup_steps=20,
            log_every=10,
            save_every=400,
        ),
    )


RECIPES = {
    "vq16": llamagen(),
    "vq8": llamagen(),
    "rq": rq_vae(),
    "hq": hq_vae(),
    "hq3": hq_vae(min_lr=4e-5),
    "unicode_hq": unicode(),
    "unicode_rq": unicode(),
    "watch_vq": watch("vq"),
    "watch_rq": watch("rq"),
    "watch_hq": watch("hq"),
}


def get_config(words: str = ""):
    """The recipe named by one word (default: vq16)."""
    chosen = read_words(words, flags=("smoke",), kind=tuple(RECIPES))
    kind = chosen["kind"]
    tokenizer = PUBLISHED.get(kind, RECIPES[kind].tokenizer)
    recipe = dataclasses.replace(RECIPES[kind], tokenizer=tokenizer, output=f"runs/visual_tokenizer_{kind}")
    return config_dict(shrink(recipe) if "smoke" in chosen else recipe)

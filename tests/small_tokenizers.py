"""Visual tokenizers of a few thousand parameters with critics, and generated images, for tests of training."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from vlm_jax.data.image_options import ImageDataConfig
from vlm_jax.tokenizer_recipe import TokenizerRecipe
from vlm_jax.train.tokenizer_options import TokenizerTrainConfig
from vlm_jax.train.tokenizer_state import CRITIC, TOKENIZER, networks
from vlm_jax.train.tokenizer_task import TokenizerTask
from vlm_jax.visual_tokenizers.options import (
    AdversaryConfig,
    AutoencoderConfig,
    CriticConfig,
    QuantizerConfig,
    TokenizerConfig,
)

SIZE = 8
AUTOENCODER = AutoencoderConfig(width=32, multipliers=(1,), blocks=1, attention=(), resolution=SIZE, latent=8)
QUANTIZERS = {
    "vq": QuantizerConfig(codes=(12,), width=4, normalise=True, tile=8),
    "rq": QuantizerConfig(kind="rq", codes=(12,), width=8, depth=2, shared=True, restart=True, tile=8),
    "rq_unshared": QuantizerConfig(kind="rq", codes=(12,), width=8, depth=2, tile=8),
    "hq": QuantizerConfig(kind="two_level", codes=(12, 16), width=8, tile=8),
    "hq3": QuantizerConfig(kind="levels", codes=(12, 8, 16), width=8, tile=8),
    "unicode": QuantizerConfig(kind="two_level", codes=(16,), width=16, shared=True, language=True, length=3.0, tile=8),
}
TRAIN = TokenizerTrainConfig(
    steps=6, global_batch=8, lr=1e-3, beta1=0.5, beta2=0.9, clip_norm=1.0, average=0.9, log_every=2, save_every=2
)
ADVERSARY = AdversaryConfig(perceptual_weight=0.0, weight=0.75, start=2, weigh_critic=True)  # adaptive too


def recipe(kind: str, **changes: Any) -> TokenizerRecipe:
    """A recipe with the quantiser of that name, a PatchGAN with batch norm and no perceptual loss."""
    made = TokenizerRecipe(
        tokenizer=TokenizerConfig(AUTOENCODER, QUANTIZERS[kind], "llamagen" if kind == "vq" else "taming"),
        adversary=ADVERSARY,
        critic=CriticConfig(width=16, layers=1, norm="batch"),
        data=ImageDataConfig(size=SIZE),
        train=TRAIN,
    )
    return dataclasses.replace(made, **changes)


def table(made: TokenizerRecipe) -> np.ndarray | None:
    """Token embeddings for a language-driven codebook."""
    q = made.tokenizer.quantizer
    return 2 * np.random.default_rng(1).standard_normal((40, q.width)).astype(np.float32) if q.language else None


def batch(seed: int, images: int = 8) -> dict[str, np.ndarray]:
    """Smooth coloured images: rows {"images": uint8 [B, S, S, 3]}."""
    coarse = np.random.default_rng(seed).integers(0, 256, (images, 4, 4, 3))
    return {"images": coarse.repeat(SIZE // 4, 1).repeat(SIZE // 4, 2).astype(np.uint8)}


@dataclasses.dataclass
class Batches:
    """Endless generated batches, each a function of its step."""

    step: int

    def __iter__(self) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        return self

    def __next__(self) -> tuple[int, dict[str, np.ndarray]]:
        self.step += 1
        return self.step - 1, batch(self.step - 1)

    def state(self) -> dict[str, Any]:
        """Where the next batch is."""
        return {"step": self.step}


def start(made: TokenizerRecipe) -> dict[str, np.ndarray]:
    """Initial weights from numpy, which spares a run the compilation of random initialisers."""
    rng, nets, found = np.random.default_rng(0), networks(made), {}
    for prefix, (_, shapes) in ((TOKENIZER, nets.tokenizer), (CRITIC, nets.critic)):
        for path, like in shapes.items():
            fan = np.prod(like.shape[:-1]) if len(like.shape) > 1 else 100.0
            noise = rng.uniform(-1, 1, like.shape) / np.sqrt(fan)
            found[prefix + path] = (noise + path.endswith("scale")).astype(np.float32)
    return found


def task(kind: str, **changes: Any) -> TokenizerTask:
    """The task of `recipe`."""
    made = recipe(kind, **changes)
    return TokenizerTask(made, table=table(made), start=start(made))

"""A whole run that trains a visual tokenizer, as one frozen value: tokenizer, critic, losses, images, training, mesh, output."""

from __future__ import annotations

import dataclasses

from vlm_jax.config import ConfigError, one_of
from vlm_jax.data.image_options import ImageDataConfig
from vlm_jax.parallel.mesh_config import MeshConfig
from vlm_jax.train.tokenizer_options import TokenizerTrainConfig
from vlm_jax.visual_tokenizers.options import AdversaryConfig, CriticConfig, TokenizerConfig

KERNELS = ("torch", "lecun")


@dataclasses.dataclass(frozen=True)
class TokenizerInit:
    """What a run starts from, all optional but the networks that its losses and codebook need.

    checkpoint: an exported tokenizer, whose weights and codebooks go on. vgg: torchvision's VGG-16 (.pth or .safetensors), and lpips: the
    five linear heads of LPIPS v0.1, for the perceptual loss. llm: Llama-family directory whose token embeddings a language-driven
    codebook approaches. random: random numbers stand in for a VGG-16 (of a sixteenth of its width) and for token embeddings that
    are not given, for smoke runs: such a perceptual loss measures nothing.
    """

    checkpoint: str = ""
    vgg: str = ""
    lpips: str = ""
    llm: str = ""
    random: bool = False
    kernels: str = "torch"

    def __post_init__(self):
        one_of("init.kernels", self.kernels, KERNELS)


@dataclasses.dataclass(frozen=True)
class TokenizerRecipe:
    """Everything that decides a run.

    top_picture: losses also see the picture that the top codes alone give (two_level; HQ-VAE with bottom_start 0, see adversary.top_*).
    output: folder for checkpoints, metrics and the export; export: write it at the end, of the averaged weights where train.average
    keeps them and export_average is true.
    """

    tokenizer: TokenizerConfig = TokenizerConfig()
    adversary: AdversaryConfig = AdversaryConfig()
    critic: CriticConfig = CriticConfig()
    init: TokenizerInit = TokenizerInit()
    data: ImageDataConfig = ImageDataConfig()
    train: TokenizerTrainConfig = TokenizerTrainConfig()
    mesh: MeshConfig = MeshConfig()
    top_picture: bool = False
    output: str = "runs/tokenizer"
    export: bool = True
    export_average: bool = True

    def __post_init__(self):
        reduction, size = self.tokenizer.autoencoder.reduction, self.data.size
        coarsest = reduction * self.tokenizer.quantizer.coarsening
        if size % coarsest:
            raise ConfigError(f"data.size={size} must be a multiple of {coarsest}, the pixels of the coarsest code")
        if self.top_picture and self.tokenizer.quantizer.kind != "two_level":
            raise ConfigError("top_picture=True needs tokenizer.quantizer.kind=two_level, which has top codes")
        if self.critic.kind == "style" and (size < 8 or size & (size - 1)):
            raise ConfigError(f"critic.kind=style needs a data.size that is a power of two from 8 on, not {size}")


def shrink(recipe: TokenizerRecipe) -> TokenizerRecipe:
    """Same structure (quantiser, levels, critic, losses, schedule), smoke sizes, six updates on generated smart-watches.

    The perceptual loss is that of a narrow random VGG-16, and the token embeddings of a language-driven codebook are random.
    """
    a, q = recipe.tokenizer.autoencoder, recipe.tokenizer.quantizer
    size = max(4 * a.reduction if a.reduction < 16 else 2 * a.reduction, a.reduction * q.coarsening)
    autoencoder = dataclasses.replace(
        a,
        width=32,
        multipliers=(1,) * a.levels,
        blocks=1,
        attention=tuple(max(1, x * size // a.resolution) for x in a.attention),
        resolution=size,
        latent=32,
    )
    quantizer = dataclasses.replace(q, codes=tuple(min(64, n) for n in q.codes), width=min(16, q.width), tile=16)
    train = dataclasses.replace(recipe.train, steps=6, global_batch=8, log_every=1, save_every=3, dtype="float32")
    return dataclasses.replace(
        recipe,
        tokenizer=dataclasses.replace(recipe.tokenizer, autoencoder=autoencoder, quantizer=quantizer),
        critic=dataclasses.replace(recipe.critic, width=16),
        adversary=dataclasses.replace(recipe.adversary, start=min(recipe.adversary.start, 3)),
        init=TokenizerInit(random=True),
        data=dataclasses.replace(recipe.data, path=(), generated_watches=32, size=size, threads=2),
        train=train,
        output=f"{recipe.output}_smoke",
    )

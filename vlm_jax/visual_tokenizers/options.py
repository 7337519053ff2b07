"""What a visual tokenizer and its critic are: frozen dataclasses, free of jax, and the published tokenizers by name.

image -> encoder -> quant_conv -> bottleneck (codes) -> post_quant_conv -> decoder -> image
"""

from __future__ import annotations

import dataclasses

from vlm_jax.config import ConfigError, at_least_one, one_of

BOTTLENECKS = ("vq", "rq", "two_level", "levels")
UPSAMPLES = ("pixelshuffle", "nearest", "conv")


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """The convolutional encoder and decoder (taming-transformers' lineage); resolutions halve between levels.

    attention: resolutions that have attention after every residual block, counted from `resolution`. With `init_downsample`, conv_in
    halves the image; the encoder's count ignores that, as in the published HQ-VAE weights, which therefore have attention at
    (16,) in the decoder only. middle_attention: whether the coarsest level has attention between its two blocks, as everything
    published has; over many positions it costs more than all convolutions. groups: of the group norms, 32 in everything published; with
    as many as `width` each channel loses its mean, and flat colours are lost.
    """

    width: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks: int = 2
    attention: tuple[int, ...] = (16,)
    resolution: int = 256
    latent: int = 256
    init_downsample: bool = False
    middle_attention: bool = True
    groups: int = 32

    def __post_init__(self):
        at_least_one("autoencoder", self, ("width", "blocks", "resolution", "latent", "groups"))
        if not self.multipliers or min(self.multipliers) < 1:
            raise ConfigError(f"autoencoder.multipliers={self.multipliers} needs one positive width factor per level")
        if any(self.width * m % self.groups for m in self.multipliers):
            raise ConfigError(f"autoencoder.width={self.width} must be a multiple of autoencoder.groups={self.groups}")

    @property
    def levels(self) -> int:
        """Number of resolutions."""
        return len(self.multipliers)

    @property
    def reduction(self) -> int:
        """Image pixels per latent position and side."""
        return 2 ** (self.levels - 1 + self.init_downsample)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of every level, finest first."""
        return tuple(self.width * m for m in self.multipliers)

    def attends(self, level: int, decoder: bool) -> bool:
        """Whether the blocks of `level` (0 = finest) are followed by attention."""
        return self.resolution >> level + (self.init_downsample and decoder) in self.attention


@dataclasses.dataclass(frozen=True)
class QuantizerConfig:
    """Codebooks: `codes` entries each (one number per codebook of `two_level` and `levels`, or one for all).

    vq         one table trained by gradients (LlamaGen): normalise, beta, entropy
    rq         `depth` residual passes, EMA tables (RQ-VAE): shared, restart
    two_level  top and bottom, joined by concatenation (HQ-VAE): upsample, factor, shared
    levels     as many tables as `codes` has numbers, summed (HQ-VAE with three levels): upsample, factor
    language   the tables are drawn towards the token embeddings of a language model (UniCode): length, relative, normalise

    first_commitment: only the first residual pass has a commitment gradient, as in UniCode's program.
    tile: codes compared at a time in the nearest-code search.
    """

    kind: str = "vq"
    codes: tuple[int, ...] = (16384,)
    width: int = 8
    beta: float = 0.25
    normalise: bool = False
    entropy: float = 0.0
    entropy_temperature: float = 0.01
    decay: float = 0.99
    eps: float = 1e-5
    restart: bool = False
    shared: bool = False
    depth: int = 4
    first_commitment: bool = False
    upsample: str = "pixelshuffle"
    factor: int = 2
    language: bool = False
    length: float = 30.0
    relative: bool = True
    tile: int = 1024

    def __post_init__(self):
        one_of("quantizer.kind", self.kind, BOTTLENECKS)
        one_of("quantizer.upsample", self.upsample, UPSAMPLES)
        at_least_one("quantizer", self, ("width", "depth", "factor", "tile"))
        if not self.codes or min(self.codes) < 1:
            raise ConfigError(f"quantizer.codes={self.codes} needs one positive number per codebook")
        if self.kind == "levels" and len(self.codes) < 2:
            raise ConfigError("quantizer.codes needs one number per level, e.g. (8192, 8192, 8192), for kind=levels")
        if self.language and self.kind == "two_level" and (self.upsample != "pixelshuffle" or not self.shared):
            raise ConfigError(
                "quantizer.language with kind=two_level has one table for both levels: use shared=True, pixelshuffle"
            )
        if self.language and self.kind in ("vq", "levels"):
            raise ConfigError(f"quantizer.language needs kind=rq or kind=two_level, not {self.kind}")
        if self.shared and not self.language and self.kind == "two_level" and self.upsample == "pixelshuffle":
            raise ConfigError("quantizer.shared needs both levels equally wide: use upsample=nearest or conv")

    def codes_of(self, book: int) -> int:
        """Entries of the codebook number `book`."""
        return self.codes[book] if len(self.codes) > 1 else self.codes[0]

    @property
    def latent_width(self) -> int:
        """Channels of the finest latent, behind quant_conv: UniCode's two levels divide the table's width by factor^2."""
        split = self.language and self.kind == "two_level"
        return self.width // self.factor**2 if split else self.width

    @property
    def books(self) -> tuple[str, ...]:
        """Name of the codebook of every level of codes, coarsest first."""
        if self.kind == "levels":
            return tuple(f"level_{level}" for level in range(len(self.codes)))
        return ("top", "top" if self.shared else "bottom") if self.kind == "two_level" else ("codebook",)

    @property
    def coarsening(self) -> int:
        """Positions of the finest code per position and side of the coarsest."""
        return {"two_level": self.factor, "levels": self.factor ** (len(self.codes) - 1)}.get(self.kind, 1)

    @property
    def decoded_width(self) -> int:
        """Channels in front of post_quant_conv."""
        return self.latent_width * (2 if self.kind == "two_level" else 1)


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """An autoencoder and its quantiser; `names` says how the original program called the tensors of the convolutions."""

    autoencoder: AutoencoderConfig = AutoencoderConfig()
    quantizer: QuantizerConfig = QuantizerConfig(normalise=True)
    names: str = "llamagen"

    def __post_init__(self):
        one_of("tokenizer.names", self.names, ("llamagen", "taming"))


@dataclasses.dataclass(frozen=True)
class AdversaryConfig:
    """Weights and schedule. start: first step with a critic; `limit`: of the balance (500 in UniCode, whose `fade` is 0.9).

    adversarial: hinge (-mean fake) or non_saturating; swapped: LlamaGen's program passes BCE its arguments the wrong way round.
    top_*: whether a picture of the top codes alone counts too.
    weigh_critic: the critic's loss is multiplied by `weight` too (LlamaGen, RQ-VAE).
    """

    reconstruction: str = "l2"
    reconstruction_weight: float = 1.0
    perceptual_weight: float = 1.0
    weight: float = 0.75
    start: int = 0
    critic: str = "hinge"
    adversarial: str = "hinge"
    swapped: bool = False
    adaptive: bool = True
    limit: float = 1e4
    fade: float = 0.0
    top_reconstruction: bool = True
    top_perceptual: bool = False
    top_adversarial: bool = False
    weigh_critic: bool = False

    def __post_init__(self):
        one_of("adversary.reconstruction", self.reconstruction, ("l1", "l2"))
        one_of("adversary.critic", self.critic, ("hinge", "vanilla", "non_saturating"))
        one_of("adversary.adversarial", self.adversarial, ("hinge", "non_saturating"))


@dataclasses.dataclass(frozen=True)
class CriticConfig:
    """The discriminator: "patch" (PatchGAN: width, layers, norm), "style" (StyleGAN's, for images of a power of two), or "none".

    norm: batch, over the images of all devices, or group (whose 32 groups need width to be a multiple of 16).
    """

    kind: str = "patch"
    width: int = 64
    layers: int = 3
    norm: str = "batch"

    def __post_init__(self):
        one_of("critic.kind", self.kind, ("patch", "style", "none"))
        one_of("critic.norm", self.norm, ("batch", "group"))
        at_least_one("critic", self, ("width", "layers"))
        if self.kind == "patch" and self.norm == "group" and self.width % 16:
            raise ConfigError(
                f"critic.width={self.width} must be a multiple of 16: its norms have 32 groups of 2 x width"
            )


def _taming(multipliers: tuple[int, ...], attention: int, init_downsample: bool, **quantizer) -> TokenizerConfig:
    return TokenizerConfig(
        AutoencoderConfig(multipliers=multipliers, attention=(attention,), init_downsample=init_downsample),
        QuantizerConfig(**quantizer),
        "taming",
    )


PUBLISHED = {
    "vq16": TokenizerConfig(),
    "vq8": TokenizerConfig(AutoencoderConfig(multipliers=(1, 2, 2, 4), attention=(32,))),
    "rq": _taming((1, 1, 2, 2, 4, 4), 8, False, kind="rq", width=256, shared=True, restart=True),
    "rq_ffhq": _taming((1, 1, 2, 2, 4, 4), 16, False, kind="rq", codes=(2048,), width=256, shared=True, restart=True),
    "hq": _taming((1, 2, 4, 4), 16, True, kind="two_level", codes=(8192,), width=256),
    "hq_nearest": _taming((1, 2, 4, 4), 16, True, kind="two_level", codes=(8192,), width=256, upsample="nearest"),
    "hq_conv": _taming((1, 2, 4, 4), 16, True, kind="two_level", codes=(8192,), width=256, upsample="conv"),
    "hq_top4": _taming((1, 2, 4, 4, 4), 8, True, kind="two_level", codes=(8192,), width=256),
    "hq3": _taming((1, 2, 4), 32, True, kind="levels", codes=(8192,) * 3, width=256),
    "hq3_top4": _taming((1, 2, 4, 4), 16, True, kind="levels", codes=(4096,) * 3, width=256),
    "unicode_hq": _taming(
        (1, 2, 4, 4), 16, True, kind="two_level", codes=(32000,), width=4096, shared=True, language=True
    ),
    "unicode_rq": _taming(
        (1, 1, 2, 2, 4, 4), 8, False, kind="rq", codes=(32000,), width=4096, shared=True, restart=True, language=True
    ),
}

"""What a prior over the codes of a visual tokenizer is, and how codes are drawn from it: frozen dataclasses, the published ones by name.

condition (a class, a caption) -> prior -> codes [grid, grid] -> tokenizer's decoder -> image
"""

from __future__ import annotations

import dataclasses

from vlm_jax.config import ConfigError, at_least_one, one_of

CONDITIONS = ("class", "caption")


@dataclasses.dataclass(frozen=True)
class GPTConfig:
    """LlamaGen's transformer: `slots` of a condition, then the grid x grid codes of one image in raster order (Sun et al. 2024).

    condition: "class", one slot for one of `classes` labels, or "caption", `caption_slots` features of `caption_width` numbers.
    codes: entries of the tokenizer's codebook. condition_dropout: share of the samples whose condition training takes away, for
    guidance. drop_path: share of the rows that skip the last block, rising linearly from 0 at the first (published with the other
    dropouts 0).
    """

    layers: int = 12
    heads: int = 12
    kv_heads: int = 12
    width: int = 768
    mlp: int = 2048
    codes: int = 16384
    grid: int = 16
    condition: str = "class"
    classes: int = 1000
    caption_slots: int = 120
    caption_width: int = 2048
    condition_dropout: float = 0.1
    token_dropout: float = 0.1
    attention_dropout: float = 0.0
    residual_dropout: float = 0.1
    mlp_dropout: float = 0.1
    drop_path: float = 0.0
    theta: float = 10000.0
    eps: float = 1e-5
    init_std: float = 0.02

    def __post_init__(self):
        one_of("prior.condition", self.condition, CONDITIONS)
        whole = (
            "layers",
            "heads",
            "kv_heads",
            "width",
            "mlp",
            "codes",
            "grid",
            "classes",
            "caption_slots",
            "caption_width",
        )
        at_least_one("prior", self, whole)
        if self.width % (4 * self.heads):
            raise ConfigError(
                f"prior.width={self.width} must be a multiple of 4 x prior.heads={self.heads}: every head turns pairs by row and column"
            )
        if self.heads % self.kv_heads:
            raise ConfigError(f"prior.heads={self.heads} must be a multiple of prior.kv_heads={self.kv_heads}")
        rates = (
            "condition_dropout",
            "token_dropout",
            "attention_dropout",
            "residual_dropout",
            "mlp_dropout",
            "drop_path",
        )
        for name in rates:
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"prior.{name}={getattr(self, name)} must be at least 0 and below 1")

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.width // self.heads

    @property
    def slots(self) -> int:
        """Slots of the condition."""
        return 1 if self.condition == "class" else self.caption_slots

    @property
    def length(self) -> int:
        """Codes of an image."""
        return self.grid**2

    @property
    def numbers(self) -> int:
        """Classes."""
        return self.classes

    @property
    def guidable(self) -> bool:
        """Whether the model has a condition that means nothing."""
        return self.condition == "caption" or self.condition_dropout > 0

    @property
    def levels_of_codes(self) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """(entries of the codebook, shape of an image's codes) of every array of codes."""
        return ((self.codes, (self.grid, self.grid)),)


def mlp_width(width: int, multiple: int = 256, factor: float | None = None) -> int:
    """Inner width of LlamaGen's SwiGLU: 8/3 of the model's, times `factor`, rounded up to a multiple."""
    inner = int(2 * (4 * width) / 3)
    inner = inner if factor is None else int(factor * inner)
    return -(-inner // multiple) * multiple


def _sized(layers: int, heads: int, width: int) -> GPTConfig:
    return GPTConfig(layers, heads, heads, width, mlp_width(width))


PUBLISHED = {
    "gpt_b": _sized(12, 12, 768),
    "gpt_l": _sized(24, 16, 1024),
    "gpt_xl": _sized(36, 20, 1280),
    "gpt_xxl": _sized(48, 24, 1536),
    "gpt_xxxl": _sized(48, 40, 2560),
    "gpt_1b": _sized(22, 32, 2048),
    "gpt_3b": _sized(24, 32, 3200),
    "gpt_7b": _sized(32, 32, 4096),
}


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How codes are drawn; see priors.sampling.

    scale: guidance away from no condition, 1 is off. interval: the first `interval` + 2 codes (of RQ- and HQ-Transformers: positions)
    are guided and the others drawn from the conditional logits alone, counted as LlamaGen does; -1 guides all. temperature: 0 takes
    the most probable code. top_k: 0 and top_p: 1 keep all codes.
    """

    scale: float = 1.0
    interval: int = -1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if self.scale < 1 or self.interval < -1:
            raise ConfigError(
                f"scale={self.scale}, interval={self.interval} cannot be used: they need scale >= 1 and interval >= -1"
            )
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ConfigError(
                f"temperature={self.temperature}, top_k={self.top_k}, top_p={self.top_p} cannot be used: they need "
                "temperature >= 0, top_k >= 0 and 0 < top_p <= 1"
            )

    @property
    def guided(self) -> bool:
        """Whether the unconditional logits matter."""
        return self.scale > 1

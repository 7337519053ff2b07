"""What an RQ-Transformer and an HQ-Transformer are: frozen dataclasses, and the published ones by name.

A body reads one vector per position of the coarsest grid; a small head draws the codes of that position one after another.

    RQ   grid x depth codes of residual quantisation, all from codebooks of the same size
    HQ   codes of two or three grids, each twice as fine as the one before
"""

from __future__ import annotations

import dataclasses
from typing import Any

from vlm_jax.config import ConfigError, at_least_one, one_of

ORDERS = ("parallel", "top2bot", "bidirectional")
EMBEDDINGS = ("transformer", "bidirectional", "reduce", "multiple")
CONDITIONS = ("none", "class", "text")
CHILDREN = 4  # codes of a level for one code of the level above it


def _rates(config: Any, keys: tuple[str, ...]) -> None:
    for key in keys:
        if not 0 <= getattr(config, key) < 1:
            raise ConfigError(f"prior.{key}={getattr(config, key)} must be at least 0 and below 1")


@dataclasses.dataclass(frozen=True)
class StackConfig:
    """GPT blocks: pre-norm with LayerNorm, an inner width of 4 times the width, learned positions outside of them."""

    layers: int = 12
    width: int = 1536
    heads: int = 24
    act: str = "gelu"
    attention_bias: bool = True
    mlp_bias: bool = True
    dropout: float = 0.1
    attention_dropout: float = 0.0
    eps: float = 1e-5
    init_std: float = 0.02

    def __post_init__(self):
        at_least_one("prior", self, ("width", "heads"))
        one_of("prior.act", self.act, ("gelu", "quick_gelu"))
        if self.layers < 0:
            raise ConfigError(f"prior.layers={self.layers} must be at least 0")
        if self.width % self.heads:
            raise ConfigError(f"prior.width={self.width} must be a multiple of prior.heads={self.heads}")
        _rates(self, ("dropout", "attention_dropout"))


def _same_width(key: str, body: StackConfig, head: StackConfig) -> None:
    if min(body.layers, head.layers) < 1:
        raise ConfigError(f"prior.body.layers={body.layers} and {key}.layers={head.layers} must be at least 1")
    if head.width != body.width:
        raise ConfigError(f"{key}.width={head.width} must be prior.body.width={body.width}: the head reads its states")


def _only_classes(config: Any) -> None:
    if config.condition_dropout and config.condition != "class":
        raise ConfigError(
            f"prior.condition_dropout={config.condition_dropout} takes classes away, but this prior has none (condition "
            f"{config.condition}): set it to 0.0"
        )


@dataclasses.dataclass(frozen=True)
class RQTransformerConfig:
    """RQ-Transformer (Lee et al. 2022): `depth` codes out of `codes` at each of grid = (rows, columns) positions.

    conditions, condition_tokens: a condition is `condition_tokens` numbers below `conditions` (1 and 1: none; a class; a text, whose
    tokens are predicted too). condition_dropout: share of the classes that training takes away, for guidance; the table has a row more
    then, which published models do not have. codebook_body, codebook_head: the body, the head read rows of the tokenizer's table (of
    `code_width` numbers) and not a table of their own; cumulative: the head reads sums over the depths so far. shared_tokens,
    shared_head: one table, one classifier for all depths. image_weight, text_weight: of the losses where there is a text.
    """

    grid: tuple[int, int] = (8, 8)
    depth: int = 4
    codes: int = 16384
    code_width: int = 256
    body: StackConfig = StackConfig()
    head: StackConfig = StackConfig(layers=4)
    conditions: int = 1000
    condition_tokens: int = 1
    codebook_body: bool = True
    codebook_head: bool = True
    cumulative: bool = True
    shared_tokens: bool = True
    shared_head: bool = True
    dropout: float = 0.0
    condition_dropout: float = 0.0
    image_weight: float = 0.9
    text_weight: float = 0.1

    def __post_init__(self):
        at_least_one("prior", self, ("depth", "codes", "code_width", "conditions", "condition_tokens"))
        _same_width("prior.head", self.body, self.head)
        if min(self.grid) < 1:
            raise ConfigError(f"prior.grid={self.grid} needs a positive number of rows and of columns")
        if self.condition_tokens > 1 and self.conditions == 1:
            raise ConfigError("prior.condition_tokens > 1 needs prior.conditions, the size of the text's vocabulary")
        _rates(self, ("dropout", "condition_dropout"))
        _only_classes(self)

    @property
    def condition(self) -> str:
        """What an image is drawn from: "none", a "class", or a "text"."""
        return "text" if self.condition_tokens > 1 else "class" if self.conditions > 1 else "none"

    @property
    def numbers(self) -> int:
        """Classes, or tokens of the text's vocabulary."""
        return self.conditions

    @property
    def guidable(self) -> bool:
        """Whether the model has a condition that means nothing."""
        return self.condition_dropout > 0

    @property
    def levels_of_codes(self) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """(entries of the codebook, shape of an image's codes) of every array of codes."""
        return ((self.codes, (*self.grid, self.depth)),)

    @property
    def positions(self) -> int:
        """Positions of an image."""
        return self.grid[0] * self.grid[1]

    @property
    def reads_codebook(self) -> bool:
        """Whether the tokenizer's table is needed."""
        return self.codebook_body or self.codebook_head

    @property
    def draws(self) -> int:
        """Levels that each may be drawn in a way of its own."""
        return self.depth


@dataclasses.dataclass(frozen=True)
class HQTransformerConfig:
    """HQ-Transformer (You et al. 2022) over grids of `grid`, 2 grid (and 4 grid) codes to a side, coarsest first.

    order: the codes below a top code are drawn at once from it ("parallel"), one after another ("top2bot") or with it
    ("bidirectional"). embedding, embedding_layers: how the codes of a position become one vector; the published "transformer" with 1
    layer is a mean. positions: rows of the table of positions, which published models have more of than they use; axes: a table of
    rows and one of columns in its place. condition: "none", "class" (one of `classes`) or "text" (`text_tokens` out of `text_codes`,
    which are predicted too). condition_dropout: as in RQTransformerConfig. weights: of the levels' losses.
    """

    grid: int = 8
    codes: tuple[int, ...] = (8192, 8192)
    order: str = "parallel"
    embedding: str = "transformer"
    embedding_layers: int = 1
    positions: int = 256
    axes: bool = False
    condition: str = "class"
    classes: int = 1000
    text_codes: int = 16384
    text_tokens: int = 64
    body: StackConfig = StackConfig()
    head: StackConfig = StackConfig(layers=4)
    dropout: float = 0.0
    condition_dropout: float = 0.0
    weights: tuple[float, ...] = (1.0, 4.0)
    image_weight: float = 0.9
    text_weight: float = 0.1

    def __post_init__(self):
        one_of("prior.order", self.order, ORDERS)
        one_of("prior.embedding", self.embedding, EMBEDDINGS)
        one_of("prior.condition", self.condition, CONDITIONS)
        whole = ("grid", "embedding_layers", "positions", "classes", "text_codes", "text_tokens")
        at_least_one("prior", self, whole)
        _same_width("prior.head", self.body, self.head)
        _rates(self, ("dropout", "condition_dropout"))
        _only_classes(self)
        if len(self.codes) not in (2, 3) or min(self.codes) < 1:
            raise ConfigError(f"prior.codes={self.codes} needs two or three positive numbers, one per level")
        if len(self.weights) != len(self.codes):
            raise ConfigError(f"prior.weights={self.weights} needs one number per level of prior.codes={self.codes}")
        if len(self.codes) == 3 and (self.order, self.embedding) != ("parallel", "transformer"):
            raise ConfigError("three levels of prior.codes need prior.order=parallel and prior.embedding=transformer")
        if self.grid**2 > self.positions:
            raise ConfigError(f"prior.positions={self.positions} must be at least prior.grid^2={self.grid**2}")
        if self.axes and int(self.positions**0.5) ** 2 != self.positions:
            raise ConfigError(f"prior.positions={self.positions} must be a square with prior.axes=True")
        if self.embedding == "reduce" and self.body.width % CHILDREN:
            raise ConfigError(f"prior.body.width={self.body.width} must be a multiple of 4 with prior.embedding=reduce")

    @property
    def levels(self) -> int:
        """Number of grids."""
        return len(self.codes)

    @property
    def draws(self) -> int:
        """Levels that each may be drawn in a way of its own."""
        return self.levels

    @property
    def condition_tokens(self) -> int:
        """Slots of the condition."""
        return self.text_tokens if self.condition == "text" else 1

    @property
    def numbers(self) -> int:
        """Classes, or tokens of the text's vocabulary; 1 where there is no condition."""
        return {"class": self.classes, "text": self.text_codes, "none": 1}[self.condition]

    @property
    def guidable(self) -> bool:
        """Whether the model has a condition that means nothing."""
        return self.condition_dropout > 0

    @property
    def levels_of_codes(self) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """(entries of the codebook, shape of an image's codes) of every array of codes."""
        sides = (self.grid * 2**level for level in range(self.levels))
        return tuple((codes, (side, side)) for codes, side in zip(self.codes, sides))

    @property
    def local(self) -> tuple[int, ...]:
        """Codes of each level that belong to one top code: 1, 4, (16)."""
        return tuple(CHILDREN**level for level in range(self.levels))

    @property
    def embedder(self) -> StackConfig:
        """The blocks behind the embedding: one fewer than `embedding_layers`."""
        deep = self.embedding_layers - 1 if self.embedding in ("transformer", "bidirectional") else 0
        return dataclasses.replace(self.body, layers=deep)


def _stacks(body: int, head: int, width: int, heads: int) -> dict[str, StackConfig]:
    return {"body": StackConfig(body, width, heads), "head": StackConfig(head, width, heads)}


_LSUN = {"conditions": 1}
PUBLISHED_RQ = {
    "imagenet_480m": RQTransformerConfig(**_stacks(12, 4, 1536, 24)),
    "imagenet_821m": RQTransformerConfig(**_stacks(24, 4, 1536, 24)),
    "imagenet_1400m": RQTransformerConfig(**_stacks(42, 6, 1536, 24)),
    "imagenet_3800m": RQTransformerConfig(**_stacks(42, 6, 2560, 40)),
    "ffhq_355m": RQTransformerConfig(codes=2048, **_LSUN, **_stacks(24, 4, 1024, 16)),
    "church_370m": RQTransformerConfig(**_LSUN, **_stacks(24, 4, 1024, 16)),
    "lsun_612m": RQTransformerConfig(**_LSUN, **_stacks(26, 4, 1280, 20)),
    "cc3m_654m": RQTransformerConfig(conditions=16384, condition_tokens=32, **_stacks(26, 4, 1280, 20)),
}
_THREE = {"codes": (8192,) * 3, "weights": (1.0, 4.0, 16.0)}
PUBLISHED_HQ = {
    "imagenet_s": HQTransformerConfig(),
    "imagenet_m": HQTransformerConfig(**_stacks(24, 4, 1536, 24)),
    "imagenet_l": HQTransformerConfig(**_stacks(42, 6, 1536, 24)),
    "imagenet_top2bot": HQTransformerConfig(order="top2bot"),
    "imagenet_bidirectional": HQTransformerConfig(order="bidirectional"),
    "imagenet_top4": HQTransformerConfig(grid=4, positions=25),
    "imagenet_level3": HQTransformerConfig(**_THREE),
    "imagenet_level3_top4": HQTransformerConfig(grid=4, **_THREE),
    "ffhq": HQTransformerConfig(embedding="reduce", condition="none", **_stacks(24, 4, 1024, 16)),
    "cc15m": HQTransformerConfig(positions=64, condition="text"),
}

"""What a model is: frozen dataclasses, made once from an ml_collections ConfigDict or an HF config and hashable.

The defaults are LLaVA-1.5 7B (CLIP-L/14-336, two-layer GELU MLP, Vicuna-7B v1.5). Letters used everywhere in the code:
B rows, T row slots, S key slots, I image views per row, P patch features per view, D model width, F hidden width, N query heads,
K key/value heads, H head width, V vocabulary, L layers, C colour channels.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import math
import re
import types
import typing
from collections.abc import Mapping
from typing import Any

IMAGE = -200  # stands in `Sample.tokens` where an image is (LLaVA's IMAGE_TOKEN_INDEX)
GENERATED = -300  # stands in `Sample.tokens` where an image is to be generated
IGNORE = -100  # label that carries no loss

# implementations in nn.attention
ATTENTIONS = tuple("auto dense chunked blocked context cudnn splash flash".split())
REMATS = ("none", "full", "linears", "attention")  # what is kept for the backward pass, see nn.remat

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SIGLIP_MEAN, SIGLIP_STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


ACTIVATIONS = ("quick_gelu", "gelu", "gelu_tanh", "relu", "silu")  # what `nn.layers` computes


class UserError(ValueError):
    """Something that the person at the keyboard can mend: the message is one sentence with the file, record or key and what to do."""


class ConfigError(UserError):
    """A config that cannot be run; the message names the key."""


def one_of(key: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise ConfigError naming `key` unless `value` is among `allowed`."""
    if value not in allowed:
        raise ConfigError(f"{key}={value!r} is unknown: use one of {', '.join(allowed)}")


def at_least_one(part: str, config: Any, keys: tuple[str, ...]) -> None:
    """Raise ConfigError naming the key under `part` that is not positive."""
    for key in keys:
        if getattr(config, key) < 1:
            raise ConfigError(f"{part}.{key}={getattr(config, key)} must be at least 1")


def check_patterns(key: str, patterns: tuple[str, ...]) -> None:
    """Raise ConfigError naming `key` if there is no pattern, or one is no regular expression."""
    if not patterns:
        raise ConfigError(f"{key} is empty: name at least one regular expression")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"{key} has {pattern!r}, which is not a regular expression: {error}") from None


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """A CLIP or SigLIP vision transformer and which of its hidden states are read.

    `feature_layers` are indices into HF's `hidden_states` (0 = embeddings, i = output of block i; negative from the end); several
    are concatenated on channels. `select="patch"` drops the class token, "full" keeps every token.
    """

    kind: str = "clip"
    image_size: int = 336
    patch_size: int = 14
    width: int = 1024
    layers: int = 24
    heads: int = 16
    mlp: int = 4096
    act: str = "quick_gelu"
    eps: float = 1e-5
    feature_layers: tuple[int, ...] = (-2,)
    select: str = "patch"
    pooler_head: bool = False
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    init_std: float = 0.02

    def __post_init__(self):
        one_of("vision.kind", self.kind, ("clip", "siglip"))
        one_of("vision.act", self.act, ACTIVATIONS)
        at_least_one("vision", self, ("image_size", "patch_size", "width", "layers", "heads", "mlp"))
        if not self.feature_layers:
            raise ConfigError("vision.feature_layers is empty: name at least one hidden state, e.g. (-2,)")
        one_of("vision.select", self.select, ("patch", "full"))
        if self.kind == "siglip" and self.select == "patch":
            raise ConfigError(
                "vision.select=patch drops the first token, but SigLIP has no class token: use vision.select=full"
            )
        if self.width % self.heads:
            raise ConfigError(f"vision.width={self.width} is not a multiple of vision.heads={self.heads}")
        for i in self.feature_layers:
            if not -self.layers - 1 <= i <= self.layers:
                raise ConfigError(f"vision.feature_layers={i} does not exist in a tower of {self.layers} layers")

    @property
    def hidden_indices(self) -> tuple[int, ...]:
        """`feature_layers` as non-negative hidden-state indices."""
        return tuple(i % (self.layers + 1) for i in self.feature_layers)

    @property
    def used_layers(self) -> int:
        """Number of blocks that the features need; later ones are stored for export and never computed."""
        return max(self.hidden_indices)

    @property
    def grid(self) -> int:
        """Patches per side."""
        return self.image_size // self.patch_size

    @property
    def tokens(self) -> int:
        """Tokens inside the tower (patches and, for CLIP, the class token)."""
        return self.grid**2 + (self.kind == "clip")

    @property
    def features(self) -> int:
        """P: features per view that reach the projector."""
        return self.tokens - (1 if self.select == "patch" else 0)

    @property
    def feature_width(self) -> int:
        """Channels of one feature."""
        return self.width * len(self.feature_layers)


@dataclasses.dataclass(frozen=True)
class ProjectorConfig:
    """`identity`, `linear`, or `mlpNx_gelu` (N linear layers with an activation between them)."""

    kind: str = "mlp2x_gelu"
    act: str = "gelu"
    bias: bool = True

    def __post_init__(self):
        _ = self.depth  # raises on an unknown kind
        one_of("projector.act", self.act, ACTIVATIONS)

    @property
    def depth(self) -> int:
        """Number of linear layers."""
        if self.kind in ("identity", "linear"):
            return int(self.kind == "linear")
        middle = self.kind.removeprefix("mlp").removesuffix("x_gelu")
        if f"mlp{middle}x_gelu" != self.kind or not middle.isdigit() or int(middle) < 1:
            raise ConfigError(f"projector.kind={self.kind!r} is unknown: use identity, linear or mlpNx_gelu (N >= 1)")
        return int(middle)


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding and its long-context variants (HF `rope_scaling` / `rope_parameters`)."""

    kind: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_max_position: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None

    def __post_init__(self):
        one_of("llm.rope.kind", self.kind, ("default", "linear", "dynamic", "yarn", "llama3"))


@dataclasses.dataclass(frozen=True)
class LLMConfig:
    """A Llama-family decoder: Llama 1/2/3, Vicuna, Mistral (window), GQA, tied head, biases, explicit head width."""

    vocab: int = 32000
    width: int = 4096
    mlp: int = 11008
    layers: int = 32
    heads: int = 32
    kv_heads: int = 32
    head_dim: int = 128
    max_position: int = 4096
    rope: RopeConfig = RopeConfig()
    eps: float = 1e-5
    window: int | None = None
    tie: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    act: str = "silu"
    init_std: float = 0.02

    def __post_init__(self):
        one_of("llm.act", self.act, ACTIVATIONS)
        at_least_one("llm", self, ("vocab", "width", "mlp", "layers", "heads", "kv_heads", "head_dim", "max_position"))
        if self.heads % self.kv_heads:
            raise ConfigError(f"llm.heads={self.heads} is not a multiple of llm.kv_heads={self.kv_heads}")
        if self.head_dim % 2:
            raise ConfigError(f"llm.head_dim={self.head_dim} must be even for rotary embeddings")


@dataclasses.dataclass(frozen=True)
class T5Config:
    """A T5 encoder and decoder (Raffel et al. 2020), the defaults being FLAN-T5 XL: gated tanh-GELU and an untied head (T5 v1.1).

    The original T5 has gated=False, act="relu", tie=True. buckets, max_distance: of the relative positions, see nn.relative_position.
    dropout: rate at T5's sites while training, also where T5 is frozen (as CLIP-FlanT5 was trained); 0 is without.
    """

    vocab: int = 32128
    width: int = 2048
    mlp: int = 5120
    encoder_layers: int = 24
    decoder_layers: int = 24
    heads: int = 32
    head_dim: int = 64
    buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6
    dropout: float = 0.1
    gated: bool = True
    act: str = "gelu_tanh"
    tie: bool = False

    def __post_init__(self):
        one_of("llm.act", self.act, ACTIVATIONS)
        at_least_one("llm", self, ("vocab", "width", "mlp", "encoder_layers", "decoder_layers", "heads", "head_dim"))
        if self.buckets < 4 or self.buckets % 4:
            raise ConfigError(
                f"llm.buckets={self.buckets} must be a multiple of 4: half of them are for each direction"
            )
        if self.max_distance <= self.buckets // 2:
            raise ConfigError(f"llm.max_distance={self.max_distance} must be above half of llm.buckets={self.buckets}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"llm.dropout={self.dropout} must be at least 0 and below 1")


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters of some linears (Hu et al. 2021): y = x W + s dropout(x) A B, A [in, rank], B [rank, out].

    targets: regular expressions over paths of linears ("llm/blocks/attn/q"). s = alpha / rank, with rslora alpha / sqrt(rank)
    (Kalajdzievski 2023). dropout: share of the adapter's inputs that is zeroed while training.
    """

    targets: tuple[str, ...] = ("^llm/blocks/",)
    rank: int = 128
    alpha: float = 256.0
    dropout: float = 0.0
    rslora: bool = False

    def __post_init__(self):
        at_least_one("model.lora", self, ("rank",))
        check_patterns("model.lora.targets", self.targets)
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"model.lora.dropout={self.dropout} must be at least 0 and below 1")

    @property
    def scale(self) -> float:
        """s of the class docstring."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


@dataclasses.dataclass(frozen=True)
class QuantConfig:
    """Kernels that are stored in few bits and never trained; see nn.quantise.

    kind: "nf4" (4 bits, `block` weights share a scale; double: scales in 8 bits) or "int8" (a scale per output). targets: regular
    expressions over paths of linears.
    """

    kind: str = "nf4"
    targets: tuple[str, ...] = ("^llm/blocks/",)
    block: int = 64
    double: bool = True

    def __post_init__(self):
        one_of("model.quant.kind", self.kind, ("nf4", "int8"))
        check_patterns("model.quant.targets", self.targets)
        if self.block < 2 or self.block % 2:
            raise ConfigError(f"model.quant.block={self.block} must be even: two 4-bit weights share a byte")


@dataclasses.dataclass(frozen=True)
class VLMConfig:
    """Tower + projector + language model, and how an image becomes slots (`aspect`, `merge`, `pinpoints`).

    `init`: random weights where no checkpoint has any; "normal" is N(0, init_std^2), "scratch" that of models.scratch. `lora`:
    groups of adapters, the first that matches a linear is its own. `quant`: frozen kernels in 4 or 8 bits.
    """

    vision: VisionConfig = VisionConfig()
    projector: ProjectorConfig = ProjectorConfig()
    llm: LLMConfig | T5Config = LLMConfig()
    aspect: str = "pad"
    merge: str = "flat"
    image_newline: bool = False
    pinpoints: tuple[tuple[int, int], ...] = ()
    init: str = "normal"
    lora: tuple[LoRAConfig, ...] = ()
    quant: QuantConfig | None = None

    def __post_init__(self):
        one_of("model.init", self.init, ("normal", "scratch"))
        one_of("model.aspect", self.aspect, ("square", "pad", "anyres"))
        one_of("model.merge", self.merge, ("flat", "spatial", "spatial_unpad"))
        if self.merge == "spatial_unpad" and not self.image_newline:
            raise ConfigError(
                "model.merge=spatial_unpad ends every row with the image_newline embedding: set model.image_newline=True"
            )
        if self.aspect == "anyres" and not self.pinpoints:
            raise ConfigError("model.aspect=anyres needs model.pinpoints, the (width, height) grids to choose from")

    @property
    def encoder_decoder(self) -> bool:
        """Whether images and questions are read by an encoder, and answers written by a decoder of their own."""
        return isinstance(self.llm, T5Config)

    @property
    def drops(self) -> bool:
        """Whether training draws dropout."""
        return any(group.dropout for group in self.lora) or (self.encoder_decoder and self.llm.dropout > 0)


def from_dict(cls: type, values: Mapping[str, Any], where: str = "") -> Any:
    """Build dataclass `cls` from nested mappings (a ConfigDict, parsed JSON); unknown or ill-typed keys raise by name."""
    hints = typing.get_type_hints(cls)
    fields = {f.name for f in dataclasses.fields(cls) if f.init}
    made = {}
    for name, value in values.items():
        key = f"{where}{name}"
        if name not in fields:
            raise ConfigError(f"unknown config key {key}: {cls.__name__} has {', '.join(sorted(fields))}")
        made[name] = _coerce(hints[name], value, key)
    return cls(**made)


def to_dict(config: Any) -> dict[str, Any]:
    """Dataclass to plain nested dict with lists for tuples, ready for JSON or a ConfigDict."""
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    if isinstance(value, Mapping):
        return {name: _plain(v) for name, v in value.items()}
    return value


def _member(hints: list[Any], value: Any) -> Any:
    """The type among `hints` that `value` is meant for: the dataclass that knows most of its keys, the first of several."""
    if len(hints) == 1 or not all(map(dataclasses.is_dataclass, hints)):
        return hints[0]
    if dataclasses.is_dataclass(value):
        return next((hint for hint in hints if isinstance(value, hint)), hints[0])
    known = [{field.name for field in dataclasses.fields(hint)} for hint in hints]
    return hints[max(range(len(hints)), key=lambda i: (len(known[i] & set(value)), -i))]


def _coerce(hint: Any, value: Any, key: str) -> Any:
    """`value` as the annotated type; ints pass for floats, lists for tuples, nothing else is converted."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _coerce(_member([a for a in args if a is not type(None)], value), value, key)
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_dict(hint, value, key + ".")
    if origin is tuple:
        if not isinstance(value, (tuple, list)):
            raise ConfigError(f"config key {key} must be a sequence, not {value!r}")
        inner = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        if len(inner) != len(value):
            raise ConfigError(f"config key {key} needs {len(inner)} values, not {len(value)}")
        return tuple(_coerce(h, v, f"{key}[{i}]") for i, (h, v) in enumerate(zip(inner, value)))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if origin in (dict, collections.abc.Mapping):
        if not isinstance(value, Mapping):
            raise ConfigError(f"config key {key} must be a mapping from names, not {value!r}")
        return {name: _coerce(args[1], item, f"{key}.{name}") for name, item in value.items()}
    if hint is Any:
        return value
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(f"config key {key} must be of type {hint.__name__}, not {value!r}")
    return value

"""What a model is: frozen dataclasses, made once from an ml_collections ConfigDict or an HF config and hashable.

The defaults are LLaVA-1.5 7B (CLIP-L/14-336, two-layer GELU MLP, Vicuna-7B v1.5). Letters used everywhere in the code:
B rows, T row slots, S key slots, I image views per row, P patch features per view, D model width, F hidden width, N query heads,
K key/value heads, H head width, V vocabulary, L layers, C colour channels.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

IMAGE = -200  # stands in `Sample.tokens` where an image is (LLaVA's IMAGE_TOKEN_INDEX)
IGNORE = -100  # label that carries no loss

ATTENTIONS = ("auto", "dense", "chunked", "cudnn", "splash")  # implementations in nn.attention
REMATS = ("none", "full", "linears", "attention")  # what is kept for the backward pass, see models.llama

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
class VLMConfig:
    """Tower + projector + decoder, and how an image becomes slots (`aspect`, `merge`, `pinpoints`).

    `init`: random weights where no checkpoint has any; "normal" is N(0, init_std^2), "scratch" that of models.scratch.
    """

    vision: VisionConfig = VisionConfig()
    projector: ProjectorConfig = ProjectorConfig()
    llm: LLMConfig = LLMConfig()
    aspect: str = "pad"
    merge: str = "flat"
    image_newline: bool = False
    pinpoints: tuple[tuple[int, int], ...] = ()
    init: str = "normal"

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
    return value


def _coerce(hint: Any, value: Any, key: str) -> Any:
    """`value` as the annotated type; ints pass for floats, lists for tuples, nothing else is converted."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _coerce(next(a for a in args if a is not type(None)), value, key)
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
    if origin is dict or hint is dict:
        return dict(value)
    if hint is Any:
        return value
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(f"config key {key} must be of type {hint.__name__}, not {value!r}")
    return value

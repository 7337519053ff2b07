"""What an original tokenizer checkpoint is: told by the shapes of its tensors, and by its program's settings where shapes are silent.

    shapes say     widths, levels, blocks, attention, latent, kind of quantiser, tables, upsampling, language-driven or not
    settings say   resolution, decay, beta, restart, cosine distance, depth and length of language-driven tables
    config.yaml    RQ-VAE: arch.{hparams, ddconfig};  HQ-VAE, UniCode: stage1.{hparams, hparams_aux}
    args           LlamaGen: the command line that its training program saves in the checkpoint

Where both say something the tensors are believed. What nobody says is as published.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from vlm_jax.config import ConfigError
from vlm_jax.visual_tokenizers.options import AutoencoderConfig, QuantizerConfig, TokenizerConfig

Shapes = Mapping[str, tuple[int, ...]]

RESOLUTION = 256  # what attention resolutions are counted from where nobody says it


def config_of(
    shapes: Shapes, repeated: frozenset[str] = frozenset(), settings: Mapping[str, Any] | None = None
) -> TokenizerConfig:
    """The TokenizerConfig of a checkpoint's {name: shape}; ConfigError in one sentence if it is none that is known.

    repeated: prefixes of the tables that repeat the first one, or were never used (the program shares its first table). settings:
    a parsed config.yaml, or LlamaGen's args.
    """
    settings = settings or {}
    autoencoder, names = _autoencoder(shapes, _resolution(settings))
    return TokenizerConfig(autoencoder, _with_settings(_quantizer(shapes, repeated), settings), names)


def known_settings(raw: Mapping[str, Any]) -> bool:
    """Whether a parsed config.yaml is one of RQ-VAE, HQ-VAE or UniCode."""
    return any(isinstance(raw.get(part), Mapping) for part in ("arch", "stage1"))


def _autoencoder(shapes: Shapes, resolution: int) -> tuple[AutoencoderConfig, str]:
    """(config of the convolutions, how their tensors are called)."""
    if "encoder.conv_blocks.0.res.0.conv1.weight" in shapes:
        names, down, up, block = "llamagen", "encoder.conv_blocks", "decoder.conv_blocks", "res"
    elif "encoder.down.0.block.0.conv1.weight" in shapes:
        names, down, up, block = "taming", "encoder.down", "decoder.up", "block"
    else:
        raise ConfigError(
            "it is not a visual tokenizer that is known: it has neither encoder.conv_blocks.0 (LlamaGen) nor encoder.down.0 "
            "(RQ-VAE, HQ-VAE, UniCode)"
        )
    width, _, kernel, _ = _shape(shapes, "encoder.conv_in.weight", 4)
    levels, blocks = (
        _count(shapes, f"{down}.{{}}.{block}.0.conv1.weight"),
        _count(shapes, f"{down}.0.{block}.{{}}.conv1.weight"),
    )
    widths = [_shape(shapes, f"{down}.{i}.{block}.0.conv1.weight", 4)[0] for i in range(levels)]
    odd = next((w for w in widths if w % width), None)
    if odd:
        raise ConfigError(
            f"a level of its encoder is {odd} wide, which is no multiple of the {width} channels of encoder.conv_in"
        )
    halves = kernel == 4
    finest = (lambda i: levels - 1 - i) if names == "llamagen" else (lambda i: i)
    encoder = {i for i in range(levels) if f"{down}.{i}.attn.0.q.weight" in shapes}
    decoder = {i for i in range(levels) if f"{up}.{finest(i)}.attn.0.q.weight" in shapes}
    attention = {resolution >> i for i in encoder} | {resolution >> i + halves for i in decoder}
    config = AutoencoderConfig(
        width=width,
        multipliers=tuple(w // width for w in widths),
        blocks=blocks,
        attention=tuple(sorted(attention)),
        resolution=resolution,
        latent=_shape(shapes, "encoder.conv_out.weight", 4)[0],
        init_downsample=halves,
    )
    for side, levels_with in ((False, encoder), (True, decoder)):
        if {i for i in range(levels) if config.attends(i, side)} != levels_with:
            raise ConfigError(
                f"its encoder has attention at the levels {sorted(encoder)} and its decoder at {sorted(decoder)}, "
                "which no list of attention resolutions gives"
            )
    return config, names


def _quantizer(shapes: Shapes, repeated: frozenset[str]) -> QuantizerConfig:
    if "quantize.embedding.weight" in shapes:
        codes, width = _shape(shapes, "quantize.embedding.weight", 2)
        return QuantizerConfig(codes=(codes,), width=width, normalise=True)
    if "quantizer.codebooks.0.weight" in shapes:
        rows, width = _shape(shapes, "quantizer.codebooks.0.weight", 2)
        depth = _count(shapes, "quantizer.codebooks.{}.weight")
        shared = all(f"quantizer.codebooks.{d}" in repeated for d in range(1, depth))
        return QuantizerConfig(kind="rq", codes=(rows - 1,), width=width, depth=depth, shared=shared, restart=True)
    if "quantize_t.embedding" in shapes:
        return _two_level(shapes, repeated)
    if "quantizers.0.embedding" in shapes:
        tables = [
            _shape(shapes, f"quantizers.{i}.embedding", 2) for i in range(_count(shapes, "quantizers.{}.embedding"))
        ]
        widths = [width for _, width in tables]
        upsample, factor = _upsampling(shapes, "downsamples.0.weight", widths[-2:])
        codes = tuple(count for count, _ in tables)
        return QuantizerConfig(kind="levels", codes=codes, width=widths[-1], upsample=upsample, factor=factor)
    if "quantize.llmcodebook" in shapes:
        codes, width = _shape(shapes, "quantize.embedding", 2)
        return QuantizerConfig(kind="rq", codes=(codes,), width=width, shared=True, restart=True, language=True)
    raise ConfigError(
        "its encoder is known but its quantiser is not: it has none of quantize.embedding.weight (LlamaGen), "
        "quantizer.codebooks.0 (RQ-VAE), quantize_t, quantizers.0 (HQ-VAE) and quantize.llmcodebook (UniCode)"
    )


def _two_level(shapes: Shapes, repeated: frozenset[str]) -> QuantizerConfig:
    """HQ-VAE and UniCode; their programs keep quantize_b as it was made where the table of quantize_t is shared."""
    (top, coarse), (bottom, _) = (_shape(shapes, f"quantize_{x}.embedding", 2) for x in "tb")
    latent = _shape(shapes, "quant_conv_b.weight", 4)[0]
    if "quantize_t.llmcodebook" in shapes:
        factor = math.isqrt(coarse // latent)
        return QuantizerConfig(kind="two_level", codes=(top,), width=coarse, factor=factor, shared=True, language=True)
    upsample, factor = _upsampling(shapes, "down_t.weight", [coarse, latent])
    shared = upsample != "pixelshuffle" and "quantize_b" in repeated
    codes = (top,) if top == bottom else (top, bottom)
    return QuantizerConfig(kind="two_level", codes=codes, width=latent, upsample=upsample, factor=factor, shared=shared)


def _upsampling(shapes: Shapes, kernel: str, widths: list[int]) -> tuple[str, int]:
    """(way, factor) between two levels of these widths; nearest neighbours leave no trace of their factor, which is 2 as published."""
    if kernel in shapes:
        return "conv", _shape(shapes, kernel, 4)[-1]
    coarse, fine = widths
    return ("nearest", 2) if coarse == fine else ("pixelshuffle", math.isqrt(coarse // fine))


def _resolution(settings: Mapping[str, Any]) -> int:
    arch, stage1 = settings.get("arch") or {}, settings.get("stage1") or {}
    said = (arch.get("ddconfig") or {}).get("resolution") or (stage1.get("hparams") or {}).get("resolution")
    return int(said or RESOLUTION)


def _with_settings(q: QuantizerConfig, settings: Mapping[str, Any]) -> QuantizerConfig:
    """`q` with what tensors do not tell."""
    arch, stage1 = settings.get("arch") or {}, settings.get("stage1") or {}
    rq, aux = arch.get("hparams") or {}, stage1.get("hparams_aux") or {}
    said: dict[str, Any] = {}
    if q.kind == "vq":
        said = {
            "normalise": settings.get("codebook_l2_norm"),
            "beta": settings.get("commit_loss_beta"),
            "entropy": settings.get("entropy_loss_ratio"),
        }
    elif q.language:
        kind = aux.get("norm_type")
        said = {
            "length": aux.get("fix_len_l2norm"),
            "normalise": aux.get("use_l2_norm"),
            "relative": None if kind is None else kind == "rela_llm",
        }
        said |= {"depth": aux.get("num_quant_layer")} if q.kind == "rq" else {}
    elif q.kind == "rq":
        decay = rq.get("decay")
        said = {
            "shared": rq.get("shared_codebook"),
            "restart": rq.get("restart_unused_codes"),
            "beta": rq.get("latent_loss_weight"),
            "decay": decay[0] if isinstance(decay, list) else decay,
        }
    else:
        nearest = isinstance(aux.get("upsample"), str) and aux["upsample"].removeprefix("nearest")
        said = {
            "restart": aux.get("restart_unused_codes"),
            "factor": int(nearest) if q.upsample == "nearest" and str(nearest).isdigit() else None,
        }
        if q.kind == "two_level" and q.upsample != "pixelshuffle":
            said["shared"] = aux.get("shared_codebook")
    fields = {f.name: f.type for f in dataclasses.fields(q)}
    made = {name: float(v) if fields[name] == "float" else v for name, v in said.items() if v is not None}
    return dataclasses.replace(q, **made)


def _shape(shapes: Shapes, key: str, rank: int) -> tuple[int, ...]:
    if key not in shapes:
        raise ConfigError(
            f"it has no tensor {key}, so its sizes cannot be told: is it cut short, or another program's?"
        )
    if len(shapes[key]) != rank:
        raise ConfigError(f"its tensor {key} has shape {tuple(shapes[key])}, but {rank} dimensions are needed")
    return tuple(shapes[key])


def _count(shapes: Shapes, pattern: str) -> int:
    """How many of pattern.format(0), pattern.format(1) ... there are without a gap."""
    return next(i for i in range(len(shapes) + 1) if pattern.format(i) not in shapes)

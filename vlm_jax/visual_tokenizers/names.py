"""Which tensor of an original tokenizer checkpoint is which of our arrays, and both ways between them.

    ours                           llamagen                     taming (RQ-VAE, HQ-VAE, UniCode)
    encoder/level_i                encoder.conv_blocks.i        encoder.down.i
    decoder/level_i                decoder.conv_blocks.(L-1-i)  decoder.up.i             L levels, 0 the finest
    .../block_j, .../attention_j   .res.j, .attn.j              .block.j, .attn.j
    .../resample                   .downsample.conv, .upsample.conv
    mid/block_1 attention block_2  mid.0 1 2                    mid.block_1 attn_1 block_2
    codebooks                      quantize.embedding           quantizer.codebooks.d, quantize_t, quantize_b, quantizers.l, quantize
    kernel [k, k, in, out]         weight [out, in, k, k]; a transposed convolution's is [in, out, k, k]
Original tables of a shared codebook are repeated; ours is one array. RQ-VAE's tables end with a row of zeros that ours lack.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from flax import nnx

from vlm_jax.config import ConfigError
from vlm_jax.nn.params import Params, split
from vlm_jax.visual_tokenizers.codebook import COUNT, SUM, TABLE
from vlm_jax.visual_tokenizers.language import LENGTHS, POST, ROWS, TOKENS
from vlm_jax.visual_tokenizers.options import TokenizerConfig
from vlm_jax.visual_tokenizers.tokenizer import VisualTokenizer

USED = "quantize.codebook_used"  # LlamaGen's queue of recent codes: written as zeros, never read
QUEUE = 65536

_PLAIN = (("shortcut", "nin_shortcut"), ("scale", "weight"), ("kernel", "weight"))
_TOP = {  # convolutions of the bottleneck
    "bottleneck.down_conv": "down_t",
    "bottleneck.up_conv": "upsample_t",
    "bottleneck.wide": "up_conv",
    "bottleneck.narrow": "down_conv",
}
_AVERAGED = {TABLE: "embedding", COUNT: "cluster_size", SUM: "embedding_avg"}
_LANGUAGE = _AVERAGED | {ROWS: "llmcodebook", LENGTHS: "llm_len_l2norm", TOKENS: "selected_llm_indices"}
_RESIDUAL = {TABLE: "weight", COUNT: "cluster_size_ema", SUM: "embed_ema"}


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor of a checkpoint, its shape there, and where it is with us: a parameter, or (`book`) a field of a codebook.

    depth: index on the leading axis of ours. again: a repetition of a shared table, which is written and not read.
    """

    key: str
    shape: tuple[int, ...]
    path: str
    layout: str = "as_is"
    book: str = ""
    depth: int | None = None
    again: bool = False

    def read(self, theirs: np.ndarray) -> np.ndarray:
        """Our array of a tensor of the checkpoint."""
        if self.layout == "conv":
            return theirs.transpose(2, 3, 1, 0)
        if self.layout == "transposed":
            return theirs.transpose(2, 3, 0, 1)
        return theirs[:-1] if self.layout == "padded" else theirs

    def write(self, ours: np.ndarray) -> np.ndarray:
        """The checkpoint's tensor of our array."""
        if self.layout == "conv":
            return np.ascontiguousarray(ours.transpose(3, 2, 0, 1))
        if self.layout == "transposed":
            return np.ascontiguousarray(ours.transpose(2, 3, 0, 1))
        return np.concatenate([ours, np.zeros_like(ours[:1])]) if self.layout == "padded" else ours


def shapes(config: TokenizerConfig) -> Params:
    """{"path": abstract array} of the parameters of a config, without making any."""
    return split(nnx.eval_shape(lambda: VisualTokenizer(config, nnx.Rngs(0))))[1]


@functools.cache
def entries(config: TokenizerConfig) -> tuple[Entry, ...]:
    """Every tensor of a checkpoint of `config`: convolutions, then codebooks."""
    found = []
    for path, value in shapes(config).items():
        layout, shape = "as_is", tuple(value.shape)
        if path.endswith("/kernel"):
            turned = path == "bottleneck/up_conv/kernel" or re.fullmatch(r"bottleneck/up_\d+/kernel", path)
            layout = "transposed" if turned else "conv"
            k1, k2, din, dout = shape
            shape = (din, dout, k1, k2) if turned else (dout, din, k1, k2)
        found.append(Entry(_key(path, config), shape, path, layout))
    return (*found, *_codebooks(config))


def _key(path: str, config: TokenizerConfig) -> str:
    parts = path.replace("/", ".")
    for ours, theirs in _PLAIN:
        parts = re.sub(rf"\b{ours}\b", theirs, parts)
    for ours, theirs in _TOP.items():
        parts = re.sub(rf"^{ours}\b", theirs, parts)
    parts = re.sub(r"^bottleneck\.(down|up)_(\d+)\b", lambda m: f"{m[1]}samples.{m[2]}", parts)
    parts = re.sub(r"^(encoder|decoder)\.level_(\d+)", lambda m: _level(m, config), parts)
    parts = parts.replace(".resample.", ".downsample.conv." if path.startswith("encoder") else ".upsample.conv.")
    parts = re.sub(r"\.out\.(weight|bias)$", r".proj_out.\1", parts)
    if config.names == "llamagen":
        middle = {"block_1": "0", "attention": "1", "block_2": "2"}
        parts = re.sub(r"\.mid\.(block_1|attention|block_2)\b", lambda m: f".mid.{middle[m[1]]}", parts)
        return re.sub(r"\bblock_(\d+)", r"res.\1", re.sub(r"\battention_(\d+)", r"attn.\1", parts))
    parts = parts.replace(".mid.attention.", ".mid.attn_1.")
    if ".mid." not in parts:
        parts = re.sub(r"\bblock_(\d+)", r"block.\1", re.sub(r"\battention_(\d+)", r"attn.\1", parts))
    two = config.quantizer.kind in ("two_level", "levels")
    return re.sub(r"^((?:post_)?quant_conv)\.", r"\1_b.", parts) if two else parts


def _level(found: re.Match, config: TokenizerConfig) -> str:
    side, level = found[1], int(found[2])
    if config.names == "taming":
        return f"{side}.{'down' if side == 'encoder' else 'up'}.{level}"
    return f"{side}.conv_blocks.{level if side == 'encoder' else config.autoencoder.levels - 1 - level}"


def _codebooks(config: TokenizerConfig) -> Iterator[Entry]:
    q = config.quantizer
    if q.kind == "vq":
        yield Entry("quantize.embedding.weight", (q.codes_of(0), q.width), TABLE, book="codebook")
        yield Entry(USED, (QUEUE,), "", again=True)
    elif q.kind == "rq" and not q.language:
        k = q.codes_of(0)
        for d in range(q.depth):
            for path, key in _RESIDUAL.items():
                shape = {TABLE: (k + 1, q.width), COUNT: (k,), SUM: (k, q.width)}[path]
                layout = "padded" if path == TABLE else "as_is"
                depth, again = (None, d > 0) if q.shared else (d, False)
                yield Entry(f"quantizer.codebooks.{d}.{key}", shape, path, layout, "codebook", depth, again)
    elif q.kind == "rq":
        yield from _language("quantize", "codebook", q.codes_of(0), q.width, False)
    elif q.kind == "two_level":
        coarse = q.latent_width * (q.factor**2 if q.upsample == "pixelshuffle" else 1)
        if q.language:
            yield from _language("quantize_t", "top", q.codes_of(0), q.width, False)
            yield from _language("quantize_b", "top", q.codes_of(0), q.width, True)
        else:
            yield from _averaged("quantize_t", "top", q.codes_of(0), coarse, False)
            bottom = (q.codes_of(0), "top") if q.shared else (q.codes_of(1), "bottom")
            yield from _averaged("quantize_b", bottom[1], bottom[0], q.latent_width, q.shared)
    else:
        grow = q.factor**2 if q.upsample == "pixelshuffle" else 1
        for level, codes in enumerate(q.codes):
            width = q.width * grow ** (len(q.codes) - 1 - level)
            yield from _averaged(f"quantizers.{level}", f"level_{level}", codes, width, False)


def _averaged(prefix: str, book: str, k: int, width: int, again: bool) -> Iterator[Entry]:
    for path, key in _AVERAGED.items():
        yield Entry(f"{prefix}.{key}", (k,) if path == COUNT else (k, width), path, book=book, again=again)


def _language(prefix: str, book: str, k: int, width: int, again: bool) -> Iterator[Entry]:
    for path, key in _LANGUAGE.items():
        shape = (k, width) if path in (TABLE, SUM, ROWS) else (k,)
        yield Entry(f"{prefix}.{key}", shape, path, book=book, again=again)
    yield Entry(f"{prefix}.post_len_l2norm", (), POST, book=book, again=again)


def read(
    config: TokenizerConfig, tensors: Mapping[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], dict[str, dict[str, np.ndarray]]]:
    """(parameters, codebooks) of a checkpoint of `config`; raises ConfigError naming a tensor that is absent or of another shape.

    Tensors of other parts (losses, discriminators) are left alone.
    """
    params: dict[str, np.ndarray] = {}
    books: dict[str, dict[str, np.ndarray]] = {}
    stacked: dict[tuple[str, str], list[np.ndarray]] = {}
    for entry in entries(config):
        if entry.again:
            continue
        if entry.key not in tensors:
            raise ConfigError(f"the checkpoint has no tensor {entry.key}: it is not of this tokenizer's config")
        theirs = np.asarray(tensors[entry.key])
        if theirs.shape != entry.shape:
            raise ConfigError(f"{entry.key} has shape {theirs.shape}, but this tokenizer's config needs {entry.shape}")
        ours = entry.read(theirs)
        ours = ours.astype(np.int32 if entry.path == TOKENS else np.float32)
        if not entry.book:
            params[entry.path] = ours
        elif entry.depth is None:
            books.setdefault(entry.book, {})[entry.path] = ours
        else:
            stacked.setdefault((entry.book, entry.path), []).append(ours)
    for (book, path), arrays in stacked.items():
        books.setdefault(book, {})[path] = np.stack(arrays)
    return params, books


def write(
    config: TokenizerConfig, params: Mapping[str, jax.Array], books: Mapping[str, Mapping[str, jax.Array]]
) -> dict[str, np.ndarray]:
    """The original checkpoint's tensors of our arrays: inverse of `read`, with repeated tables and LlamaGen's empty queue."""
    out = {}
    for entry in entries(config):
        if entry.key == USED:
            out[entry.key] = np.zeros(entry.shape, np.float32)
            continue
        ours = np.asarray(books[entry.book][entry.path] if entry.book else params[entry.path])
        ours = ours if entry.depth is None else ours[entry.depth]
        out[entry.key] = entry.write(ours.astype(np.int64) if entry.path == TOKENS else ours)
    return out

"""A visual tokenizer at work: pixels -> codes and codes -> pictures, in batches of one static shape on the devices of this process.

encode   x = (u / 255 - 1/2) / (1/2)                  uint8 [N, S, S, 3] -> int32 [N, h, w(, depth)] per level, coarsest first
decode   u = floor(clip(127.5 x + 128, 0, 255))       LlamaGen's rounding

float32 means float32; see visual_tokenizers.encoding.
"""

from __future__ import annotations

import collections
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vlm_jax.config import ConfigError, one_of
from vlm_jax.convert.visual_tokenizer import Tokenizer, load_tokenizer
from vlm_jax.nn.params import merge, split
from vlm_jax.parallel import rules
from vlm_jax.parallel.mesh_config import AXES
from vlm_jax.visual_tokenizers import encoding
from vlm_jax.visual_tokenizers.options import TokenizerConfig
from vlm_jax.visual_tokenizers.tokenizer import VisualTokenizer

IN_FLIGHT = 2  # batches that are computed while the host reads the next images

Levels = tuple[np.ndarray, ...]


def check_size(config: TokenizerConfig, size: int) -> None:
    """Raise ConfigError unless images of `size` pixels have whole codes at every level."""
    cells = config.autoencoder.reduction * config.quantizer.coarsening
    if size < cells or size % cells:
        raise ConfigError(
            f"--size={size} must be a multiple of {cells}, the pixels that a code of this tokenizer's coarsest level covers"
        )


def to_pixels(images: jax.Array) -> jax.Array:
    """[-1, 1], and what lies beside it -> uint8."""
    return jnp.clip(127.5 * images.astype(jnp.float32) + 128, 0, 255).astype(jnp.uint8)


class VisualCoder:
    """Encoder and decoder of a tokenizer. batch: images at a time, rounded up to a multiple of this process's devices.

    dtype: of the convolutions, float32 or bfloat16, which is faster and changes some codes. hash: see `fingerprint`.
    """

    def __init__(self, tokenizer: Tokenizer, *, batch: int = 32, dtype: str = "float32"):
        one_of("--dtype", dtype, ("float32", "bfloat16"))
        if batch < 1:
            raise ConfigError(f"--batch={batch} must be at least 1")
        self.config, self.dtype, self.hash = tokenizer.config, dtype, fingerprint(tokenizer)
        devices = np.array(jax.local_devices()).reshape(-1, 1, 1, 1)
        self.batch = -(-batch // len(devices)) * len(devices)
        self._mesh = Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))
        self._rows, everywhere = (NamedSharding(self._mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
        self._weights = jax.device_put((tokenizer.params, tokenizer.codebooks), everywhere)
        graph, _ = split(nnx.eval_shape(lambda: VisualTokenizer(self.config, nnx.Rngs(0))))

        def encode(weights, pixels):
            return encoding.encode(merge(graph, weights[0]), pixels, weights[1], dtype)

        def decode(weights, codes):
            finer = (None,) * (encoding.levels_of(self.config) - len(codes))
            with encoding.exact(dtype):
                return to_pixels(merge(graph, weights[0]).decode((*codes, *finer), weights[1]))

        self._encode, self._decode = (jax.jit(f, out_shardings=self._rows) for f in (encode, decode))

    @classmethod
    def open(cls, model: str, **options: Any) -> VisualCoder:
        """The tokenizer of a directory or of an original checkpoint; CheckpointError in one sentence."""
        return cls(load_tokenizer(model), **options)

    def encode(self, pixels: np.ndarray) -> Levels:
        """Codes of uint8 [N, S, S, 3], any N."""
        return next(self.encode_each([pixels]))

    def decode(self, codes: Sequence[np.ndarray]) -> np.ndarray:
        """Pictures uint8 [N, S, S, 3] of the codes of N images; the finest levels, or depths, may be left out."""
        return next(self.decode_each([codes]))[0]

    def encode_each(self, items: Iterable[np.ndarray]) -> Iterator[Levels]:
        """Codes of each item, uint8 [V, S, S, 3], in order; batches are filled across items."""
        return self._each(self._encode, ((item,) for item in items), lambda arrays: arrays[0])

    def decode_each(self, items: Iterable[Sequence[np.ndarray]]) -> Iterator[Levels]:
        """(pictures uint8 [V, S, S, 3],) of each item's codes, one array [V, ...] per level, in order."""
        return self._each(lambda weights, codes: (self._decode(weights, codes),), map(tuple, items), tuple)

    def _each(self, run: Callable, items: Iterable[Levels], argument: Callable[[Levels], object]) -> Iterator[Levels]:
        """`run` over rows of the items in full batches, and its rows put together again item by item."""
        counts: collections.deque[int] = collections.deque()

        def rows() -> Iterator[Levels]:
            for item in items:
                counts.append(len(item[0]))
                yield from zip(*item)

        group: list[Levels] = []
        for row in self._batched(run, rows(), argument):
            group.append(row)
            if len(group) == counts[0]:
                counts.popleft()
                yield tuple(np.stack(level) for level in zip(*group))
                group = []

    def _batched(self, run: Callable, rows: Iterator[Levels], argument: Callable[[Levels], object]) -> Iterator[Levels]:
        waiting: collections.deque[tuple[int, Levels]] = collections.deque()

        def finished() -> Iterator[Levels]:
            count, levels = waiting.popleft()
            return zip(*(np.asarray(level)[:count] for level in levels))

        while batch := list(itertools.islice(rows, self.batch)):
            empty = [batch[-1]] * (self.batch - len(batch))
            arrays = tuple(np.stack(part) for part in zip(*batch, *empty))
            with rules.use(self._mesh):
                waiting.append((len(batch), run(self._weights, argument(jax.device_put(arrays, self._rows)))))
            if len(waiting) > IN_FLIGHT:
                yield from finished()
        while waiting:
            yield from finished()


def fingerprint(tokenizer: Tokenizer) -> str:
    """Hash of a tokenizer's config and numbers."""
    digest = hashlib.blake2b(repr(tokenizer.config).encode(), digest_size=16)
    books = {f"{book}/{field}": x for book, fields in tokenizer.codebooks.items() for field, x in fields.items()}
    for path, x in sorted((tokenizer.params | books).items()):
        x = np.ascontiguousarray(x)
        digest.update(f"{path} {x.dtype} {x.shape}".encode())
        digest.update(x.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()

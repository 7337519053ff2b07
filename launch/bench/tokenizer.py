"""A VQ tokenizer of LlamaGen's layers, ours and one in torch with the same weights, in one run: images per second of encoding, decoding
and training, and what the search in the codebook takes in memory.

    python launch/bench/tokenizer.py [--width 32] [--size 128] [--images 2] [--rounds 5]            CPU, under 3 minutes
    python launch/bench/tokenizer.py --width 128 --size 256 --images 32 --dtype bfloat16            GPU, as published

First both must give the same codes, pictures, loss and gradients in float32: where they do not, nothing is measured. Then they take
turns. Training is the squared error, the losses of the codebook, backward and Adam; ours is the step of `train`, metrics and all. In torch
bfloat16 is autocast, and on a GPU torch.compile is used and TF32 allowed for what stays float32.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import torch
from tokenizer_torch import VQ

from vlm_jax.parallel import rules
from vlm_jax.parallel.mesh import make_mesh
from vlm_jax.parallel.mesh_config import MeshConfig
from vlm_jax.tokenizer_recipe import TokenizerRecipe
from vlm_jax.train.step import batch_shardings
from vlm_jax.train.tokenizer_options import TokenizerTrainConfig
from vlm_jax.train.tokenizer_state import TOKENIZER, books_of, create, networks, under
from vlm_jax.train.tokenizer_step import IMAGE_AXES, generator_gradients, make_step, scaled
from vlm_jax.visual_tokenizers import names
from vlm_jax.visual_tokenizers.codebook import distances, nearest
from vlm_jax.visual_tokenizers.options import (
    AdversaryConfig,
    AutoencoderConfig,
    CriticConfig,
    QuantizerConfig,
    TokenizerConfig,
)

RATE, BETAS = 1e-4, (0.9, 0.95)
GAPS = {"latents": 1e-4, "pictures": 1e-3, "loss": 1e-5, "gradients": 1e-3}  # relative to the largest number
BLOCKS, LATENT, CODE_WIDTH = 2, 256, 8
MULTIPLIERS = {"vq16": (1, 1, 2, 2, 4), "vq8": (1, 2, 2, 4)}


class Ours:
    """The tokenizer and the training step of this repository; images uint8 [B, H, W, 3]."""

    def __init__(self, args: argparse.Namespace, config: TokenizerConfig):
        self.recipe = TokenizerRecipe(
            tokenizer=config,
            critic=CriticConfig("none"),
            adversary=AdversaryConfig(reconstruction="l2", perceptual_weight=0.0),
            train=TokenizerTrainConfig(
                steps=1, global_batch=args.images, lr=RATE, beta1=BETAS[0], beta2=BETAS[1], dtype=args.dtype
            ),
        )
        self.config, self.nets = config, networks(self.recipe)
        self.mesh = make_mesh(MeshConfig(data=args.devices, fsdp=1), jax.devices()[: args.devices])
        shape = (1, args.images, args.size, args.size, 3)
        with rules.use(self.mesh):
            self.state = create(self.recipe, {})
            self.update = make_step(self.recipe, {}, {"images": shape})
            self.where = batch_shardings({"images": shape}, IMAGE_AXES)
        self.encode, self.decode, self.latents, self.loss = map(
            self._jitted, (self._encode, self._decode, self._latents, self._gradients)
        )
        self.given = {"rate": np.float32(1), "ratio": np.float32(0), "ratio_after": np.float32(0)}

    def _jitted(self, function: Callable) -> Callable:
        """`function` of (state, arrays), traced and run under the mesh."""
        jitted = jax.jit(function)

        def run(*args):
            with rules.use(self.mesh):
                return jitted(self.state, *args)

        return run

    def _model(self, state):
        return self.nets.tokenize(state.trainable), books_of({**state.trainable, **state.moving})

    def _pixels(self, images):
        return scaled(images[0]).astype(self.recipe.train.dtype)

    def _encode(self, state, images):
        model, books = self._model(state)
        return model.encode(self._pixels(images), books)[0]

    def _latents(self, state, images):
        return self._model(state)[0].latents(self._pixels(images))

    def _decode(self, state, codes):
        model, books = self._model(state)
        latents = model.bottleneck.decode((codes,), books).astype(self.recipe.train.dtype)
        return model.decoder(model.post_quant_conv(latents))

    def _gradients(self, state, images):
        key = jax.random.key(0)
        grads, results, *_ = generator_gradients(self.nets, state, scaled(images[0]), key, jnp.float32(0))
        return results["loss"], under(TOKENIZER, grads), books_of(grads)

    def place(self, images: np.ndarray) -> dict[str, jax.Array]:
        return {"images": jax.device_put(images[None], self.where["images"])}

    def train(self, batch: dict[str, jax.Array]) -> None:
        with rules.use(self.mesh):
            self.state, results = self.update(self.state, batch, self.given)
        jax.block_until_ready(results)

    def jobs(self, images: np.ndarray) -> dict[str, Callable[[], object]]:
        """{name: one round}."""
        batch = self.place(images)
        codes = self.encode(batch["images"])
        return {
            "encode": lambda: jax.block_until_ready(self.encode(batch["images"])),
            "decode": lambda: jax.block_until_ready(self.decode(codes)),
            "train": lambda: self.train(batch),
        }


class Theirs:
    """The network in torch; images float32 [B, 3, H, W]."""

    def __init__(self, args: argparse.Namespace, config: TokenizerConfig, weights: dict[str, np.ndarray]):
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        a, q = config.autoencoder, config.quantizer
        self.model = VQ(a.width, a.multipliers, a.blocks, a.latent, q.codes_of(0), q.width)
        self.model.load_state_dict({k: torch.tensor(v) for k, v in weights.items() if k != names.USED})
        self.format = torch.channels_last if args.channels_last else torch.contiguous_format
        self.model.to(self.device, memory_format=self.format)
        self.optimizer = torch.optim.Adam(self.model.parameters(), RATE, BETAS)
        self.cast = functools.partial(torch.autocast, self.device, torch.bfloat16, enabled=args.dtype == "bfloat16")
        compiled = self.device == "cuda" and not args.eager
        self.compile = torch.compile if compiled else lambda function: function
        self.name = f"torch {torch.__version__} {self.device}{', compiled' if compiled else ''}"

    def place(self, images: np.ndarray) -> torch.Tensor:
        x = torch.tensor(images.transpose(0, 3, 1, 2) / np.float32(127.5) - 1).contiguous()
        return x.to(self.device, memory_format=self.format)

    def _synchronised(self, function: Callable, *args) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad(), self.cast():
                function(*args)
            self.wait()

        return run

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def jobs(self, images: np.ndarray) -> dict[str, Callable[[], object]]:
        """{name: one round}."""
        x = self.place(images)
        with torch.no_grad():
            codes = self.model.encode(x)
        encode, decode, loss = map(self.compile, (self.model.encode, self.model.decode, self.model.loss))

        def train() -> None:
            self.optimizer.zero_grad(set_to_none=True)
            with self.cast():
                value = loss(x)
            value.backward()
            self.optimizer.step()
            self.wait()

        return {"encode": self._synchronised(encode, x), "decode": self._synchronised(decode, codes), "train": train}


def gap(ours, theirs) -> float:
    """Largest difference over the largest number."""
    ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
    return float(np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 1e-12))


def check(ours: Ours, theirs: Theirs, images: np.ndarray) -> str:
    """Both networks agree in float32, or SystemExit says where they do not."""
    x, t = ours.place(images)["images"], theirs.place(images)
    with jax.default_matmul_precision("highest"):
        mine = ours.encode(x), ours.latents(x)
        picture = ours.decode(mine[0])
        loss, *gradients = ours.loss(x)
    with torch.no_grad():
        other = theirs.model.encode(t).cpu().numpy(), theirs.model.latents(t).permute(0, 2, 3, 1).cpu().numpy()
        shown = theirs.model.decode(torch.tensor(np.array(mine[0], np.int64), device=t.device)).permute(0, 2, 3, 1)
    total = theirs.model.loss(t)
    total.backward()
    written = names.write(ours.config, *gradients)
    named = {k: p.grad.cpu().numpy() for k, p in theirs.model.named_parameters()}
    largest = max(
        np.linalg.norm(g) for g in named.values()
    )  # some are 0 but for rounding, as those of the keys' biases
    gaps = [np.linalg.norm(written[k] - g) / max(np.linalg.norm(g), 1e-3 * largest) for k, g in named.items()]
    theirs.optimizer.zero_grad(set_to_none=True)
    found = {
        "latents": gap(mine[1], other[1]),
        "pictures": gap(picture, shown.cpu().numpy()),
        "loss": abs(float(loss) - float(total.detach())) / float(total.detach()),
        "gradients": float(max(gaps)),
    }
    same = float((np.asarray(mine[0]) == other[0]).mean())
    wrong = [f"{k} differ by {v:.1e}, more than {GAPS[k]:.0e}" for k, v in found.items() if not v <= GAPS[k]]
    if wrong or same < 0.999:
        raise SystemExit(
            f"the two networks are not the same: {'; '.join(wrong) or f'only {same:.2%} of the codes agree'}"
        )
    return f"{same:.2%} of the codes equal; largest gaps: " + ", ".join(f"{k} {v:.1e}" for k, v in found.items())


def measure(jobs: dict[str, dict[str, Callable[[], object]]], rounds: int) -> dict[str, dict[str, tuple[float, float]]]:
    """{work: {side: (seconds, processor seconds of all threads)}}: medians of rounds in which the sides take turns, after one that
    counts for nothing."""
    seconds = {}
    for work in ("encode", "decode", "train"):
        times = {side: [] for side in jobs}
        for number in range(rounds + 1):
            for side, mine in jobs.items():
                began = time.perf_counter(), time.process_time()
                mine[work]()
                times[side] += [(time.perf_counter() - began[0], time.process_time() - began[1])] * (number > 0)
        seconds[work] = {side: tuple(np.median(values, axis=0)) for side, values in times.items()}
    return seconds


def search_memory(vectors: int, codes: int, width: int) -> dict[str, int]:
    """{way: bytes of temporary arrays} of the search, compiled and not run."""
    like = jax.ShapeDtypeStruct((vectors, width), jnp.float32), jax.ShapeDtypeStruct((codes, width), jnp.float32)
    ways = {"all distances": lambda z, table: distances(z, table).argmin(1), "tiled": nearest}
    return {
        name: jax.jit(way).lower(*like).compile().memory_analysis().temp_size_in_bytes for name, way in ways.items()
    }


def main() -> None:
    jax.config.update("jax_num_cpu_devices", os.cpu_count())
    accelerated = jax.default_backend() != "cpu"
    flags = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    flags.add_argument("--model", choices=MULTIPLIERS, default="vq16")
    flags.add_argument("--width", type=int, default=128 if accelerated else 32, help="channels of the finest level")
    flags.add_argument("--size", type=int, default=256 if accelerated else 128)
    flags.add_argument("--images", type=int, default=32 if accelerated else 2)
    flags.add_argument("--codes", type=int, default=16384)
    flags.add_argument("--rounds", type=int, default=20 if accelerated else 5)
    flags.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16" if accelerated else "float32")
    flags.add_argument("--search", type=int, default=128 * 256, help="vectors of the search whose memory is looked at")
    flags.add_argument("--channels_last", action="store_true", help="torch in the layout that its GPU kernels prefer")
    flags.add_argument("--devices", type=int, help="of ours; default: 1, on a CPU one for each core that gets images")
    flags.add_argument("--eager", action="store_true", help="no torch.compile on a GPU")
    args = flags.parse_args()
    args.devices = args.devices or (1 if accelerated else math.gcd(args.images, os.cpu_count()))

    multipliers = MULTIPLIERS[args.model]
    config = TokenizerConfig(
        AutoencoderConfig(args.width, multipliers, BLOCKS, (256 >> len(multipliers) - 1,), latent=LATENT),
        QuantizerConfig(codes=(args.codes,), width=CODE_WIDTH, normalise=True),
    )
    images = np.random.default_rng(0).integers(0, 256, (args.images, args.size, args.size, 3), np.uint8)
    exact = Ours(argparse.Namespace(**vars(args) | {"dtype": "float32"}), config)
    leaves = exact.state.trainable
    theirs = Theirs(args, config, names.write(config, under(TOKENIZER, leaves), books_of(leaves)))
    print(check(exact, theirs, images))
    if args.dtype == "bfloat16":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    ours = exact if args.dtype == "float32" else Ours(args, config)
    size = sum(x.size for x in ours.state.trainable.values()) / 1e6
    print(f"{size:.1f} M parameters, {args.images} images of {args.size} x {args.size}, {args.dtype}; jax {jax.__version__} "
          f"{args.devices} {jax.devices()[0].device_kind}; {theirs.name}")  # fmt: skip
    sides = {"ours": ours.jobs(images), "torch": theirs.jobs(images)}
    on_cpu = theirs.device == "cpu" and jax.default_backend() == "cpu"
    for work, found in measure(sides, args.rounds).items():
        speed = {side: args.images / seconds for side, (seconds, _) in found.items()}
        line = f"{work:7} ours {speed['ours']:9.2f} images/s   torch {speed['torch']:9.2f} images/s   "
        line += f"{speed['ours'] / speed['torch']:.2f} x"
        busy = {side: seconds for side, (_, seconds) in found.items()}  # what other programs on the machine change less
        line += (
            f"   processor time {busy['ours']:.2f} s, {busy['torch']:.2f} s: {busy['torch'] / busy['ours']:.2f} x"
            * on_cpu
        )
        print(line, flush=True)
    for name, size in search_memory(args.search, args.codes, CODE_WIDTH).items():
        print(f"search of {args.search:,} vectors among {args.codes:,} codes, {name}: {size / 2**20:,.0f} MiB")


if __name__ == "__main__":
    main()

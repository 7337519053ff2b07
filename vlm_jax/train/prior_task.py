"""A prior over codes as a task of the training loop: state, step, lines of metrics and speeds.

trainable  <path>            but the features of no caption, which stay frozen
frozen     codebook          the tokenizer's table, which an RQ-Transformer reads
           tokenizer/<path>, codebooks/<book>/<field>            what encodes images, where a run is on those
moving     average/<path>    moving average of what is trained
loss       mean over the codes of the batch, gradients of the micro-batches averaged by a scan
line       {"step", "lr", "loss", "accuracy", ("depth_0", "level_0" ...), "grad_norm", "update_norm", "param_norm", "images"}
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from vlm_jax.config import to_dict
from vlm_jax.data.code_rows import code_keys
from vlm_jax.nn.params import Params, merge
from vlm_jax.parallel import rules
from vlm_jax.prior_recipe import PriorRecipe
from vlm_jax.train import optimizer
from vlm_jax.train.flops import peak_flops
from vlm_jax.train.metrics import median_of
from vlm_jax.train.prior_codes import ImageCoder
from vlm_jax.train.prior_loss import CODES, prior_loss
from vlm_jax.train.prior_options import PriorTrainConfig
from vlm_jax.train.state import TrainState
from vlm_jax.train.step import Axes, batch_shardings
from vlm_jax.train.task import Shapes
from vlm_jax.train.tokenizer_state import AVERAGE, below
from vlm_jax.visual_tokenizers.priors import models
from vlm_jax.visual_tokenizers.priors.hierarchy_options import StackConfig
from vlm_jax.visual_tokenizers.priors.models import Config
from vlm_jax.visual_tokenizers.priors.options import GPTConfig

FROZEN = ("condition/unconditional",)
CODEBOOK = "codebook"

Results = dict[str, jax.Array]


def axes_of(config: Config, images: bool = False) -> Axes:
    """Logical axes of the arrays of a batch, of codes or of images, behind the accumulation axis."""
    levels = config.levels_of_codes
    axes = {key: ("batch", *(None for _ in shape)) for key, (_, shape) in zip(code_keys(len(levels)), levels)}
    axes = {"images": ("batch", None, None, None)} if images else axes
    if isinstance(config, GPTConfig) and config.condition == "caption":
        return axes | {"captions": ("batch", None, None), "caption_mask": ("batch", None)}
    labels = {"class": ("batch",), "text": ("batch", None)}
    return axes | ({"labels": labels[config.condition]} if config.condition in labels else {})


def parts(recipe: PriorRecipe, leaves: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """{"trainable", "frozen", "moving": {path: leaf}} of the leaves of a prior; others: what is frozen beside it."""
    trainable = {path: x for path, x in leaves.items() if path not in FROZEN}
    frozen = {path: x for path, x in leaves.items() if path in FROZEN} | dict(others)
    return {
        "trainable": trainable,
        "frozen": frozen,
        "moving": below(AVERAGE, trainable) if recipe.train.average else {},
    }


def shardings(recipe: PriorRecipe, table: bool = False, coder: ImageCoder | None = None) -> TrainState | None:
    """NamedSharding of every array of the state under the mesh in use, None without one; table: whether the prior reads one."""
    where = models.shardings(recipe.prior)
    if where is None:
        return None
    whole = NamedSharding(rules.current()[0], PartitionSpec())
    others = ({CODEBOOK: whole} if table else {}) | ({} if coder is None else coder.shardings())
    made = parts(recipe, where, others)
    shapes = parts(recipe, models.shapes(recipe.prior), {})["trainable"]
    moments = optimizer.state_shardings(recipe.train, shapes, made["trainable"], whole)
    return TrainState(whole, made["trainable"], made["frozen"], moments, whole, made["moving"])


def gradients(
    recipe: PriorRecipe,
    state: TrainState,
    batch: Mapping[str, jax.Array],
    key: jax.Array,
    coder: ImageCoder | None = None,
) -> tuple[Params, Results]:
    """(gradients laid out like their parameters, {"loss", "accuracy" ...}) of a batch [A, B, ...] of codes, or with a coder of images."""
    c, where, graph = recipe.train, models.shardings(recipe.prior), models.structure(recipe.prior)
    micros = len(next(iter(batch.values())))
    frozen = {path: state.frozen[path] for path in FROZEN if path in state.frozen}
    how = {"dtype": c.dtype, "impl": c.attention, "remat": c.remat, "chunk": c.loss_chunk}

    def loss(trainable: Params, micro: Mapping[str, jax.Array], key: jax.Array) -> tuple[jax.Array, Any]:
        return prior_loss(merge(graph, {**frozen, **trainable}), micro, key, state.frozen.get(CODEBOOK), **how)

    def gradient(micro: Mapping[str, jax.Array], key: jax.Array) -> tuple[Params, Any]:
        if coder is not None:
            micro = coder(state.frozen, micro, jax.random.fold_in(key, CODES))
        return jax.grad(loss, has_aux=True)(state.trainable, micro, key)

    def laid_out(grads: Params) -> Params:
        """Without it they would come back replicated."""
        if where is None:
            return grads
        return {path: jax.lax.with_sharding_constraint(x, where[path]) for path, x in grads.items()}

    def accumulate(total: Params, inputs: tuple) -> tuple[Params, Any]:
        grads, said = gradient(*inputs)
        return laid_out(jax.tree.map(lambda sum, g: sum + g / micros, total, grads)), said

    if micros == 1:
        grads, said = gradient({k: x[0] for k, x in batch.items()}, key)
        grads = laid_out(grads)
    else:
        zeros = laid_out(jax.tree.map(jnp.zeros_like, state.trainable))
        grads, said = jax.lax.scan(accumulate, zeros, (dict(batch), jax.random.split(key, micros)))
    return grads, {name: jnp.mean(x) for name, x in said.items()}


def update(
    recipe: PriorRecipe,
    coder: ImageCoder | None,
    state: TrainState,
    batch: Mapping[str, jax.Array],
    rate: jax.Array,
) -> tuple[TrainState, Results]:
    """One update."""
    key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
    grads, results = gradients(recipe, state, batch, key, coder)
    steps, opt_state, norm = optimizer.updates(recipe.train, grads, state.opt_state, state.trainable, rate)
    trainable = {path: p + steps[path] for path, p in state.trainable.items()}
    results |= {
        "grad_norm": norm,
        "update_norm": optimizer.global_norm(steps),
        "param_norm": optimizer.global_norm(trainable),
    }
    kept = recipe.train.average
    moving = {path: kept * x + (1 - kept) * trainable[path.removeprefix(AVERAGE)] for path, x in state.moving.items()}
    return TrainState(state.step + 1, trainable, state.frozen, opt_state, state.rng, moving), results


@dataclasses.dataclass(frozen=True)
class PriorTask:
    """A recipe; start: parameters that replace random ones; table: the tokenizer's, where the prior reads it; coder: of images."""

    recipe: PriorRecipe
    start: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    table: np.ndarray | None = None
    coder: ImageCoder | None = None
    unit = "images"

    @property
    def axes(self) -> Axes:
        """See axes_of."""
        return axes_of(self.recipe.prior, self.coder is not None)

    @property
    def others(self) -> dict[str, np.ndarray]:
        """What the state has of the tokenizer."""
        return ({} if self.table is None else {CODEBOOK: self.table}) | (
            {} if self.coder is None else self.coder.leaves
        )

    def shardings(self) -> TrainState | None:
        """See the function."""
        return shardings(self.recipe, self.table is not None, self.coder)

    @property
    def config(self) -> PriorTrainConfig:
        """The hyperparameters."""
        return self.recipe.train

    def saved_config(self) -> dict[str, Any]:
        """The whole recipe."""
        return to_dict(self.recipe)

    def abstract(self) -> TrainState:
        """Shapes, dtypes and (under a mesh) shardings of the state; nothing is allocated."""
        others = {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in self.others.items()}
        made = parts(self.recipe, models.shapes(self.recipe.prior), others)
        moments = jax.eval_shape(optimizer.moments(self.config).init, made["trainable"])
        scalar, key = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((2,), jnp.uint32)
        state = TrainState(scalar, made["trainable"], made["frozen"], moments, key, made["moving"])
        where = self.shardings()
        if where is None:
            return state
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, where)

    def create(self) -> TrainState:
        """The state at step 0, every array created where it will live."""
        places, seed = models.shardings(self.recipe.prior), self.config.seed
        if self.start:
            params = {
                path: _place(np.asarray(x, np.float32), places and places[path]) for path, x in self.start.items()
            }
        else:
            params = models.init(self.recipe.prior, seed)

        def rest(trainable: Params) -> tuple:
            average = below(AVERAGE, jax.tree.map(jnp.copy, trainable)) if self.config.average else {}
            key = jax.random.key_data(jax.random.key(seed))
            return jnp.zeros((), jnp.int32), optimizer.moments(self.config).init(trainable), key, average

        where = self.shardings()
        others = {path: _place(x, where and where.frozen[path]) for path, x in self.others.items()}
        made = parts(self.recipe, params, others)
        goal = where and (where.step, where.opt_state, where.rng, where.moving)
        step, moments, key, average = jax.jit(rest, out_shardings=goal)(made["trainable"])
        return TrainState(step, made["trainable"], made["frozen"], moments, key, average)

    def step(self, shapes: Shapes) -> Any:
        """The jitted step for batches of `shapes`; the state is donated."""
        run, where = functools.partial(update, self.recipe, self.coder), self.shardings()
        if where is None:
            return jax.jit(run, donate_argnums=0)
        # results come back replicated, so that every process can read them
        ins = where, batch_shardings(shapes, self.axes), where.step
        return jax.jit(run, donate_argnums=0, in_shardings=ins, out_shardings=(where, where.step))

    def given(self, update: int, total: int) -> float:
        """What multiplies the learning rate; neither the first nor the last update is void."""
        c = self.config
        return optimizer.schedule(update + 1, total + 1, c.warmup(total), c.schedule)

    def line(self, step: int, given: float, results: Mapping[str, np.ndarray], shapes: Shapes) -> dict[str, Any]:
        """See the module."""
        said = {key: float(value) for key, value in results.items()}
        return {"step": step, "lr": self.config.lr * given} | said | {"images": images_of(shapes)}

    def rates(self, state: TrainState, shapes: Shapes) -> CodeRates:
        """Images per second and FLOPs."""
        return CodeRates(images_of(shapes), training_flops(self.recipe.prior), jax.device_count())

    def size(self, state: TrainState) -> str:
        """Parameters."""
        trained, frozen = (sum(x.size for x in leaves.values()) for leaves in (state.trainable, state.frozen))
        return f"{trained:,} parameters trained" + (f", {frozen:,} of the tokenizer frozen" if self.coder else "")


def images_of(shapes: Shapes) -> int:
    """Images of a batch."""
    return int(np.prod(next(iter(shapes.values()))[:2]))


def training_flops(c: Config) -> float:
    """FLOPs that one image's forward and backward pass need: 6 per weight and slot, 12 D per pair of slots that attention looks at.

    Those of a tokenizer that makes its codes are not among them.
    """
    if not isinstance(c, GPTConfig):
        shapes = c.levels_of_codes
        codes = sum(n * math.prod(shape) for n, shape in shapes)
        positions = math.prod(shapes[0][1][:2])
        local = sum(math.prod(shape) for _, shape in shapes) // positions
        head = positions * _flops_of(c.head, local)
        return _flops_of(c.body, c.condition_tokens + positions - 1) + head + 6.0 * c.body.width * codes
    slots = c.slots + c.length - 1
    kv = c.kv_heads * c.head_dim
    block = 2 * c.width * (c.width + kv) + 3 * c.width * c.mlp
    return 6.0 * (c.layers * block * slots + c.width * c.codes * c.length) + 12.0 * c.width * c.layers * slots**2 / 2


def _flops_of(c: StackConfig, slots: int) -> float:
    """Of a stack of blocks."""
    return c.layers * (6.0 * 12 * c.width**2 * slots + 12.0 * c.width * slots**2 / 2)


class CodeRates:
    """Speeds over logging windows, time spent waiting for data included."""

    def __init__(self, images: int, flops: float, devices: int):
        self._images, self._flops, self._devices = images, flops, devices
        self._peak = peak_flops(jax.devices()[0].device_kind)
        self._rates: collections.deque[dict[str, float]] = collections.deque(maxlen=1000)

    def window(self, steps: list[Mapping[str, np.ndarray]], seconds: float, waited: float) -> dict[str, float]:
        """See task.Rates."""
        speed = self._images * len(steps) / seconds
        rates = {
            "seconds_per_step": seconds / len(steps),
            "images_per_second": speed,
            "tflops_per_second_per_device": speed * self._flops / self._devices / 1e12,
            "data_stall": waited / seconds,
        }
        rates |= {"mfu": speed * self._flops / self._devices / self._peak} if self._peak else {}
        self._rates.append(rates)
        return rates

    def median(self) -> dict[str, float]:
        """Median of each rate over the windows after the first, which holds the warm-up."""
        return median_of(self._rates)

    def words(self, line: Mapping[str, Any]) -> str:
        """For the progress bar."""
        rate, stall = f"{line['images_per_second']:,.1f} images/s", f"data stall {line['data_stall']:.0%}"
        return f"loss {line['loss']:.4f}, {line['accuracy']:.1%} right, {rate}, {stall}"


def _place(value: np.ndarray, where: NamedSharding | None) -> jax.Array:
    """A given array where it will live; each device reads only its slice."""
    return jnp.array(value) if where is None else jax.make_array_from_callback(value.shape, where, value.__getitem__)

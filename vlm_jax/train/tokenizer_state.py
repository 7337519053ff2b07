"""The train state of a visual tokenizer and its critic: which of its parts are trained, which follow, which stay.

trainable  tokenizer/<path>, critic/<path>           and codebooks/codebook/embedding of a VQ, whose table has gradients
moving     codebooks/<book>/<field>                  tables, counts and sums that follow moving averages
           average/<path>                            moving average of what the tokenizer trains
           statistics/<path>                         running statistics of the critic's batch norms
frozen     lpips/<path>, codebooks/<book>/<field>    VGG-16 and its heads; token embeddings that a codebook approaches
opt_state  {"generator": Adam, "critic": Adam}
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from vlm_jax.nn.params import Params, logical_axes, merge, split
from vlm_jax.parallel import rules
from vlm_jax.tokenizer_recipe import TokenizerRecipe
from vlm_jax.train import optimizer
from vlm_jax.train.state import TrainState
from vlm_jax.visual_tokenizers import language
from vlm_jax.visual_tokenizers.codebook import State
from vlm_jax.visual_tokenizers.critics import PatchCritic, Stats, StyleCritic
from vlm_jax.visual_tokenizers.tokenizer import VisualTokenizer

TOKENIZER, CRITIC, BOOKS, AVERAGE, STATISTICS, LPIPS = (
    "tokenizer/",
    "critic/",
    "codebooks/",
    "average/",
    "statistics/",
    "lpips/",
)
CONSTANT = (language.ROWS, language.LENGTHS, language.TOKENS)  # fields of a codebook that never change
NETWORKS = ("generator", "critic")


def under(prefix: str, leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves below `prefix`, without it."""
    return {path.removeprefix(prefix): x for path, x in leaves.items() if path.startswith(prefix)}


def below(prefix: str, leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves with `prefix` in front: inverse of `under`."""
    return {prefix + path: x for path, x in leaves.items()}


def of_critic(path: str) -> bool:
    """Whether the second optimizer trains the parameter at `path`."""
    return path.startswith(CRITIC)


def network(leaves: Mapping[str, Any], critic: bool) -> dict[str, Any]:
    """The trainable leaves of the critic, or of the generator."""
    return {path: x for path, x in leaves.items() if of_critic(path) == critic}


def books_of(leaves: Mapping[str, Any]) -> dict[str, State]:
    """Codebooks as the tokenizer takes them, from the leaves codebooks/<book>/<field> of any part of a state."""
    books: dict[str, State] = {}
    for path, x in under(BOOKS, leaves).items():
        book, field = path.split("/")
        books.setdefault(book, {})[field] = x
    return books


def leaves_of_books(books: Mapping[str, State]) -> dict[str, Any]:
    """Inverse of `books_of`."""
    return {f"{BOOKS}{book}/{field}": x for book, state in books.items() for field, x in state.items()}


@dataclasses.dataclass(frozen=True)
class Networks:
    """The static structures of a recipe's networks; `critic` is None where there is none."""

    recipe: TokenizerRecipe

    @functools.cached_property
    def tokenizer(self) -> tuple[nnx.GraphDef, Params]:
        """(graph, abstract parameters)."""
        return split(nnx.eval_shape(lambda: VisualTokenizer(self.recipe.tokenizer, nnx.Rngs(0))))

    @functools.cached_property
    def critic(self) -> tuple[nnx.GraphDef, Params] | None:
        """(graph, abstract parameters)."""
        return None if self.recipe.critic.kind == "none" else split(nnx.eval_shape(lambda: self.new_critic(0)))

    def new_critic(self, seed: int) -> PatchCritic | StyleCritic:
        """A critic with random parameters."""
        c = self.recipe.critic
        if c.kind == "style":
            return StyleCritic(nnx.Rngs(seed), size=self.recipe.data.size)
        return PatchCritic(nnx.Rngs(seed), width=c.width, layers=c.layers, norm=c.norm)

    def tokenize(self, leaves: Mapping[str, jax.Array]) -> VisualTokenizer:
        """The tokenizer with the parameters among `leaves`."""
        return merge(self.tokenizer[0], under(TOKENIZER, leaves))

    def judge(self, leaves: Mapping[str, jax.Array], images: jax.Array, stats: Stats) -> tuple[jax.Array, Stats]:
        """(float32 logits of images, running statistics after them) of the critic with the parameters among `leaves`."""
        critic = merge(self.critic[0], under(CRITIC, leaves))
        if self.recipe.critic.kind == "style":
            return critic(images).astype(jnp.float32), stats
        logits, stats = critic(images, stats, train=True)
        return logits.astype(jnp.float32), stats

    def initial_books(self, key: jax.Array, table: np.ndarray | None = None) -> dict[str, Any]:
        """Leaves of the codebooks before training."""
        module = merge(
            self.tokenizer[0], jax.tree.map(lambda s: np.broadcast_to(np.float32(0), s.shape), self.tokenizer[1])
        )
        return leaves_of_books(module.initial(key, table))

    def initial_statistics(self) -> dict[str, Any]:
        """Leaves of the critic's running statistics before training."""
        if self.recipe.critic.kind != "patch":
            return {}
        module = merge(self.critic[0], jax.tree.map(lambda s: np.broadcast_to(np.float32(0), s.shape), self.critic[1]))
        return below(STATISTICS, module.initial())


@functools.cache
def networks(recipe: TokenizerRecipe) -> Networks:
    """The networks of a recipe, put together once."""
    return Networks(recipe)


def has_gradient(recipe: TokenizerRecipe, path: str) -> bool:
    """Whether a codebook's leaf is trained and not moved: the table of a VQ."""
    return path.startswith(BOOKS) and recipe.tokenizer.quantizer.kind == "vq"


def parts(recipe: TokenizerRecipe, lpips: Mapping[str, Any]) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    """{"trainable", "frozen", "moving": {path: shape and dtype}}; lpips: arrays of the perceptual loss, {} for none."""
    nets = networks(recipe)
    books = jax.eval_shape(nets.initial_books, jax.random.key(0))
    trainable = below(TOKENIZER, nets.tokenizer[1]) | {p: s for p, s in books.items() if has_gradient(recipe, p)}
    average = below(AVERAGE, trainable) if recipe.train.average else {}
    if nets.critic is not None:
        trainable |= below(CRITIC, nets.critic[1])
    constant = {p: s for p, s in books.items() if p.rpartition("/")[2] in CONSTANT}
    frozen = constant | below(LPIPS, {p: jax.ShapeDtypeStruct(x.shape, np.float32) for p, x in lpips.items()})
    moving = {p: s for p, s in books.items() if p not in trainable and p not in frozen}
    statistics = jax.eval_shape(nets.initial_statistics) if nets.critic is not None else {}
    made = {"trainable": trainable, "frozen": frozen, "moving": moving | average | statistics}
    plain = lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype)
    return {name: {p: plain(s) for p, s in leaves.items()} for name, leaves in made.items()}


def shardings(recipe: TokenizerRecipe, lpips: Mapping[str, Any]) -> TrainState | None:
    """NamedSharding of every array of the state under the mesh in use, None without one."""
    current = rules.current()
    if current is None:
        return None
    mesh, table = current
    nets, whole = networks(recipe), NamedSharding(mesh, PartitionSpec())
    axes = below(TOKENIZER, _axes(lambda: VisualTokenizer(recipe.tokenizer, nnx.Rngs(0))))
    if nets.critic is not None:
        axes |= below(CRITIC, _axes(lambda: nets.new_critic(0)))

    def place(path: str, like: jax.ShapeDtypeStruct) -> NamedSharding:
        path = path.removeprefix(AVERAGE)
        names = language.AXES.get(path.rpartition("/")[2], ()) if path.startswith(BOOKS) else axes.get(path)
        if names is None:
            return whole  # statistics, VGG-16
        return rules.sharding((None,) * (len(like.shape) - len(names)) + tuple(names), like.shape, mesh, table)

    where = {name: {p: place(p, s) for p, s in leaves.items()} for name, leaves in parts(recipe, lpips).items()}
    shapes = parts(recipe, lpips)["trainable"]
    moments = {}
    for name, critic in zip(NETWORKS, (False, True)):
        if chosen := network(shapes, critic):
            moments[name] = optimizer.state_shardings(recipe.train, chosen, network(where["trainable"], critic), whole)
    return TrainState(whole, where["trainable"], where["frozen"], moments, whole, where["moving"])


def _axes(make: Callable[[], nnx.Module]) -> dict[str, tuple[str | None, ...]]:
    return logical_axes(nnx.eval_shape(make))


def first_moments(recipe: TokenizerRecipe, trainable: Mapping[str, Any]) -> dict[str, Any]:
    """Adam's state before the first update, by network."""
    chosen = {name: network(trainable, critic) for name, critic in zip(NETWORKS, (False, True))}
    return {name: optimizer.moments(recipe.train).init(leaves) for name, leaves in chosen.items() if leaves}


def abstract(recipe: TokenizerRecipe, lpips: Mapping[str, Any]) -> TrainState:
    """Shapes, dtypes and (under a mesh) shardings of the state; nothing is allocated."""
    made = parts(recipe, lpips)
    moments = jax.eval_shape(functools.partial(first_moments, recipe), made["trainable"])
    scalar, key = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((2,), jnp.uint32)
    state = TrainState(scalar, made["trainable"], made["frozen"], moments, key, made["moving"])
    where = shardings(recipe, lpips)
    if where is None:
        return state
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, where)


def create(
    recipe: TokenizerRecipe,
    lpips: Mapping[str, np.ndarray],
    table: np.ndarray | None = None,
    start: Mapping[str, np.ndarray] | None = None,
) -> TrainState:
    """The state at step 0, every array created where it will live.

    table [V, D]: token embeddings of a language-driven codebook. start: leaves (tokenizer/..., codebooks/...) that replace random ones.
    """
    nets, where, seed = networks(recipe), shardings(recipe, lpips), recipe.train.seed
    names = parts(recipe, lpips)
    given = dict(start or {}) | below(LPIPS, lpips)
    if table is not None:  # whose rows are chosen by their lengths, with numpy
        chosen = nets.initial_books(jax.random.key(seed + 1), table)
        given = {p: x for p, x in chosen.items() if p in names["frozen"]} | given

    def make() -> dict[str, dict[str, jax.Array]]:
        drawn = split(VisualTokenizer(recipe.tokenizer, nnx.Rngs(seed)))[1]
        made = below(TOKENIZER, lecun(drawn) if recipe.init.kernels == "lecun" else drawn)
        made |= nets.initial_books(jax.random.key(seed + 1))
        if nets.critic is not None:
            made |= below(CRITIC, split(nets.new_critic(seed + 2))[1]) | nets.initial_statistics()
        return {name: {p: made[p] for p in names[name] if p in made and p not in given} for name in names}

    made = jax.jit(make, out_shardings=where and _like(jax.eval_shape(make), where))()
    leaves = {
        name: made[name]
        | {p: _place(given[p], s, where and getattr(where, name)[p]) for p, s in names[name].items() if p in given}
        for name in names
    }
    followed = [path for path in names["moving"] if path.startswith(AVERAGE)]
    copy = jax.jit(
        lambda params: {path: jnp.copy(params[path.removeprefix(AVERAGE)]) for path in followed},
        out_shardings=where and {path: where.moving[path] for path in followed},
    )
    leaves["moving"] |= copy(leaves["trainable"]) if followed else {}
    moments = jax.jit(functools.partial(first_moments, recipe), out_shardings=where and where.opt_state)
    rest = jax.jit(
        lambda: (jnp.zeros((), jnp.int32), jax.random.key_data(jax.random.key(seed))),
        out_shardings=where and (where.step, where.rng),
    )
    step, rng = rest()
    return TrainState(step, leaves["trainable"], leaves["frozen"], moments(leaves["trainable"]), rng, leaves["moving"])


def lecun(params: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Parameters as torch draws them, with kernels of variance 1 / inputs (LeCun et al., Efficient BackProp) and biases 0."""
    scale = {"kernel": math.sqrt(3.0), "bias": 0.0}
    return {path: x * scale.get(path.rpartition("/")[2], 1.0) for path, x in params.items()}


def _like(made: Mapping[str, Mapping[str, Any]], where: TrainState) -> dict[str, dict[str, NamedSharding]]:
    return {name: {p: getattr(where, name)[p] for p in leaves} for name, leaves in made.items()}


def _place(value: Any, like: jax.ShapeDtypeStruct, where: NamedSharding | None) -> jax.Array:
    """A given array where it will live; each device reads only its slice."""
    array = np.asarray(value, like.dtype)
    return jnp.array(array) if where is None else jax.make_array_from_callback(like.shape, where, array.__getitem__)

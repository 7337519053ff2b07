"""Text from prompts: batches of a few fixed shapes through the compiled programs, answers in the order of the questions.

    prompts --sort by size--> batches of at most `batch_size` rows --prefill, decode--> ids up to EOS or stop string --> text
A row attends only to itself, its positions restart at its prompt and its random key is its own: neither greedy nor sampled text of a
prompt depends on what else is in the batch (in float32; bfloat16 rounds differently in differently shaped matrix products).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vlm_jax.config import ConfigError, VLMConfig
from vlm_jax.generate import stop
from vlm_jax.generate.adapters import Switch, Weights, switch_of
from vlm_jax.generate.beam import beam_search
from vlm_jax.generate.programs import Programs, programs
from vlm_jax.generate.rows import Placed, Prompt, batch_of, bucket, place, power_of_two
from vlm_jax.generate.sampling import Settings
from vlm_jax.models import vlm
from vlm_jax.models.vlm import Compute
from vlm_jax.parallel import rules

STOP_CHUNK = 16  # new tokens between two looks for stop strings
STREAM_CHUNK = 4  # new tokens between two pieces of a stream
PROMPT_BUCKET, NEW_BUCKET = 64, 16  # smallest row length and smallest room for new tokens
FIRST_ROOM = 64  # new tokens that the cache has room for at first; doubled when they are used up


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How to choose tokens and when to end. Sampling iff temperature > 0; top_k=0 keeps all (transformers' own default is 50).

    repetition_penalty divides the positive logits of tokens that were there before, prompt included; `stop` strings end the text
    and are cut off; beams > 1 searches greedily for the best sum of log-probabilities / length**length_penalty.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    beams: int = 1
    length_penalty: float = 1.0

    def __post_init__(self):
        if self.max_new_tokens < 1 or self.beams < 1:
            raise ConfigError(f"max_new_tokens={self.max_new_tokens} and beams={self.beams} must be at least 1")
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0 or self.repetition_penalty <= 0:
            raise ConfigError(
                f"temperature={self.temperature}, top_p={self.top_p}, top_k={self.top_k}, repetition_penalty={self.repetition_penalty} "
                "cannot be used: they need temperature >= 0, 0 < top_p <= 1, top_k >= 0 and repetition_penalty > 0"
            )
        if self.beams > 1 and not self.plain:
            raise ConfigError(
                f"beams={self.beams} searches without sampling: set temperature=0 and repetition_penalty=1"
            )
        if "" in self.stop:
            raise ConfigError("an empty stop string ends every text at once: remove it")

    @property
    def plain(self) -> bool:
        """Whether every step takes the largest logit."""
        return self.temperature == 0 and self.repetition_penalty == 1


class Generator:
    """A model ready to answer.

    params: {"path": array} of `config`; they are placed on `mesh` if one is given. tokenizer: needed for text, anything with
    encode/decode as in data.tokenizer. eos: ids that end an answer (default: the tokenizer's). batch_size: rows computed together.
    adapters: those that `use` chooses among.
    """

    def __init__(
        self, config: VLMConfig, params: Mapping[str, Any], tokenizer: Any = None, *, compute: Compute = Compute(),
        mesh: Mesh | None = None, eos: Sequence[int] | None = None, batch_size: int = 8,
        adapters: Switch | None = None,
    ):  # fmt: skip
        if batch_size < 1:
            raise ConfigError(f"batch_size={batch_size} must be at least 1")
        if eos is None:
            eos = () if tokenizer is None or tokenizer.eos_id is None else (tokenizer.eos_id,)
        self.config, self.tokenizer, self.compute, self.mesh = config, tokenizer, compute, mesh
        self.eos, self.batch_size, self.adapters = tuple(int(i) for i in eos), batch_size, adapters
        with self.place():
            placing = vlm.shardings(config)
            self.params = jax.device_put(dict(params), placing) if placing else jax.tree.map(jnp.asarray, dict(params))

    def use(self, weights: Weights) -> None:
        """Answer with the adapters mixed by {name: weight} from now on; {} is the base. Nothing is compiled again."""
        self.params = self.params | switch_of(self.adapters).values(weights)

    def place(self) -> contextlib.AbstractContextManager:
        """Context in which the programs run."""
        return contextlib.nullcontext() if self.mesh is None else rules.use(self.mesh)

    @property
    def programs(self) -> Programs:
        return programs(self.config, self.compute, self.mesh)

    def tokens(
        self, prompts: Sequence[Prompt], how: Decoding = Decoding(), seeds: Sequence[int] | None = None
    ) -> list[list[int]]:
        """New ids of every prompt, in order, the EOS included where one ended it. seeds: one per prompt (default: all 0)."""
        seeds = [0] * len(prompts) if seeds is None else list(seeds)
        if len(seeds) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts need as many seeds, not {len(seeds)}")
        placed = [place(prompt, self.config, f"prompt {i}") for i, prompt in enumerate(prompts)]
        order = sorted(range(len(placed)), key=lambda i: (placed[i].prompt.views, len(placed[i])))
        rows = self._rows_together(placed, how)
        answers: list[list[int]] = [[]] * len(placed)
        for start in range(0, len(order), rows):
            chosen = order[start : start + rows]
            batch = [placed[i] for i in chosen]
            if how.beams > 1:
                found = beam_search(self, batch, how)
            else:
                *_, found = self._advance(
                    batch, how, [seeds[i] for i in chosen], STOP_CHUNK if how.stop else how.max_new_tokens
                )
            for i, ids in zip(chosen, found):
                answers[i] = ids
        return answers

    def text(
        self, prompts: Sequence[Prompt], how: Decoding = Decoding(), seeds: Sequence[int] | None = None
    ) -> list[str]:
        """Decoded answers without special tokens, stop strings and white space at the ends."""
        return [stop.cut(self.tokenizer.decode(ids), how.stop) for ids in self.tokens(prompts, how, seeds)]

    def stream(self, prompt: Prompt, how: Decoding = Decoding(), seed: int = 0) -> Iterator[str]:
        """Pieces of the answer as they come; together they are what `text` gives."""
        if how.beams > 1:
            raise ConfigError(f"beams={how.beams} knows its text only at the end: stream with beams=1")
        shown = ""
        for (ids,) in self._advance([place(prompt, self.config)], how, [seed], STREAM_CHUNK):
            text = stop.settled(stop.cut(self.tokenizer.decode(ids), how.stop), how.stop)
            if text.startswith(shown) and text != shown:
                yield text[len(shown) :]
                shown = text
        rest = stop.cut(self.tokenizer.decode(ids), how.stop)
        if rest.startswith(shown) and rest != shown:
            yield rest[len(shown) :]

    def shapes(self, placed: Sequence[Placed]) -> dict[str, int]:
        """Rows, slots and views of the batch for some prompts."""
        rows = min(power_of_two(len(placed)), max(self.batch_size, len(placed)))
        if self.mesh is not None:
            whole = math.prod(self.mesh.shape[axis] for axis in rules.DEFAULT_RULES["batch"])
            rows = -(-rows // whole) * whole
        slots = bucket(max(map(len, placed)), PROMPT_BUCKET)
        views = power_of_two(max(p.prompt.views for p in placed))
        return {"rows": rows, "slots": slots, "views": views}

    def _rows_together(self, placed: Sequence[Placed], how: Decoding) -> int:
        """batch_size, or 1 where dynamic rope would stretch every row by the longest of the batch (as transformers does)."""
        longest = max(map(len, placed), default=0) + how.max_new_tokens
        llm = self.config.llm
        dynamic = not self.config.encoder_decoder and llm.rope.kind == "dynamic"
        stretched = dynamic and longest > llm.max_position
        return 1 if stretched else max(1, self.batch_size // how.beams)

    def on_device(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """Rows over the batch axes of the mesh."""
        current = rules.current()
        if current is None:
            return jax.device_put(batch)
        return {
            k: jax.device_put(x, rules.sharding(("batch",) + (None,) * (x.ndim - 1), x.shape, *current))
            for k, x in batch.items()
        }

    def _advance(
        self, placed: Sequence[Placed], how: Decoding, seeds: Sequence[int], every: int
    ) -> Iterator[list[list[int]]]:
        """Decode one batch; yields the new ids of every prompt so far, after `every` tokens or fewer and at the end."""
        shape, most = self.shapes(placed), bucket(how.max_new_tokens, NEW_BUCKET)
        rows, n, room = shape["rows"], len(placed), min(most, FIRST_ROOM)
        ended: list[list[int] | None] = [None] * n
        with self.place():
            batch = self.on_device(batch_of(placed, self.config, **shape))
            settings = Settings(
                jnp.full(rows, how.temperature, jnp.float32), jnp.full(rows, how.top_k, jnp.int32),
                jnp.full(rows, how.top_p, jnp.float32), jnp.full(rows, how.repetition_penalty, jnp.float32),
            )  # fmt: skip
            eos = jnp.asarray(self.eos or (-1,), jnp.int32)
            keys = jax.vmap(jax.random.key)(jnp.asarray([s % 2**31 for s in seeds] + [0] * (rows - n), jnp.uint32))
            state = self.programs.prefill(self.params, batch, keys, settings, eos, new=room, plain=how.plain)
        checked, upto = 0, 0
        while True:
            upto = min(upto + every, how.max_new_tokens, room)
            with self.place():
                state = self.programs.decode(self.params, state, settings, eos, jnp.int32(upto), plain=how.plain)
            step, out = int(state.step), np.asarray(state.out)
            answers = [self._until_eos(out[r, :step]) for r in range(n)]
            for r in range(n):
                ended[r] = ended[r] or stop.shortest(answers[r], self.tokenizer, how.stop, checked)
            checked = step
            over = step >= how.max_new_tokens or bool(np.asarray(state.done).all())
            stopped = np.asarray([e is not None for e in ended] + [False] * (rows - n))
            yield [e or a for e, a in zip(ended, answers)]
            if over or (stopped | np.asarray(state.done)).all():
                return
            if stopped.any():
                state = state._replace(done=jnp.asarray(stopped) | state.done)
            if upto == room:
                room = min(2 * room, most)
                with self.place():
                    state = self.programs.grow(state, new=room)

    def _until_eos(self, ids: np.ndarray) -> list[int]:
        """`ids` up to and including the first EOS."""
        ends = np.flatnonzero(np.isin(ids, self.eos))
        return [int(i) for i in (ids[: ends[0] + 1] if len(ends) else ids)]

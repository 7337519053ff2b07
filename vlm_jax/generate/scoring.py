"""How probable an answer is after a question about an image: one forward pass per pair, no decoding.

    decoder-only   tokens   . . . 1 <image> ... ASSISTANT : Yes </s>    rows end at the same slot, so answers stand in the last K
                   hidden   . . . . . . . . . . .  .     a   b   .     slots, and what predicts them one slot earlier
    with encoder   tokens   . . . <image> ... ASSISTANT : </s>          the K slots of the decoder hold the answers
                   hidden   a b                                         a -> log P(Yes | ...), b -> log P(</s> | ... Yes)
    every image is encoded once, for all texts about it:    views --tower, projector--> table [views, P, D] --a row takes its views
A row attends only to itself: what comes out for a pair does not depend on the others (in float32; bfloat16 rounds differently in
differently shaped matrix products).
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vlm_jax.config import IGNORE, VLMConfig, one_of
from vlm_jax.data.image_source import ImageSource
from vlm_jax.data.t5_text import answer_slots
from vlm_jax.data.tasks import TextFormat, encode_pieces
from vlm_jax.data.templates import (
    IMAGE_TEXT,
    PLACEHOLDER_TEXT,
    TEMPLATES,
    Piece,
    messages_of,
    pieces,
    with_images,
)
from vlm_jax.data.tokenizer import Tokenizer
from vlm_jax.generate.decode import PROMPT_BUCKET, Generator
from vlm_jax.generate.load import Loaded
from vlm_jax.generate.programs import exact
from vlm_jax.generate.rows import Picture, Placed, Prompt, PromptError, batch_of, bucket, place, power_of_two
from vlm_jax.models import vlm
from vlm_jax.models.t5_short import SHORT, decode_short
from vlm_jax.models.vlm import Compute
from vlm_jax.parallel import rules
from vlm_jax.parallel.rules import shard

CONTEXT = (
    2048  # ids of a question or an answer that CLIP-FlanT5 is given, an image being one; it was trained with as many
)
ANSWER_BUCKET = 2  # smallest K
FINE = 1024  # rows of up to so many slots, whose attention any length suits, are padded to a multiple of GRAIN alone
GRAIN = {"tpu": 128}
AHEAD = 2  # batches that wait on the device while the next one is made
# how linzhiqiu/t2v_metrics writes questions for models with an encoder; t5_chat is what CLIP-FlanT5 was trained with
ENCODER_PROMPTS = {
    "t5_chat": TEMPLATES["v1"].system + " USER: <image>\n{} ASSISTANT: ",
    "t5_chat_no_system": "USER: <image>\n{} ASSISTANT: ",
    "t5_chat_no_system_no_user": "<image>\n{} : ",
    "t5_plain": "<image>{}",
}


class Scorer(Protocol):
    """What a model must be able to do to be asked how probable answers are."""

    def picture(self, image: ImageSource) -> Picture:
        """An image file as the model sees it; ImageError names it if it is broken."""

    def score_answers(
        self, pictures: Sequence[Picture], questions: Sequence[str], answers: Sequence[str]
    ) -> list[np.ndarray]:
        """For pair i the log-probabilities, float32 [tokens], of the tokens of answers[i] and of what closes it, each given
        pictures[i], questions[i] and the tokens before it. Questions and answers are plain text: the model's template goes around."""


class Pair(NamedTuple):
    """A question in slots, which of a decoder-only model holds the answer too, and the answer's ids int32 [m]."""

    placed: Placed
    answer: np.ndarray


class Shown(NamedTuple):
    """Projected features [views, P, D] of some pictures, and the first view of each by the picture's id()."""

    table: jax.Array
    first: dict[int, int]


@dataclasses.dataclass(frozen=True)
class AnswerScorer:
    """The Scorer of a loaded model: question and answer are written as in training.

    generator: whose parameters, mesh and batch size are used. prompt: of ENCODER_PROMPTS, for models with an encoder; others have
    their template. whole_vocabulary: probabilities over all rows of the embedding, not only over those that are tokens.
    """

    loaded: Loaded
    generator: Generator
    prompt: str = "t5_chat"
    whole_vocabulary: bool = False

    def __post_init__(self):
        one_of("--template", self.prompt, tuple(ENCODER_PROMPTS))

    def picture(self, image: ImageSource) -> Picture:
        """An image file as the model sees it; ImageError names it if it is broken."""
        return self.loaded.picture(image)

    def score_answers(
        self, pictures: Sequence[Picture], questions: Sequence[str], answers: Sequence[str]
    ) -> list[np.ndarray]:
        """See Scorer. PromptError names a pair with `<image>` in its text, or an answer without tokens."""
        config = self.generator.config
        pairs = [self._pair(*each) for each in zip(pictures, questions, answers, strict=True)]
        if not pairs:
            return []
        shown, waiting = self._shown(pictures), collections.deque()
        order = sorted(range(len(pairs)), key=lambda i: (pairs[i].placed.prompt.views, len(pairs[i].placed)))
        # dynamic rope stretches every row by the longest of the batch
        alone = not config.encoder_decoder and config.llm.rope.kind == "dynamic"
        rows = 1 if alone else self.generator.batch_size
        found: list[np.ndarray] = [np.zeros(0, np.float32)] * len(pairs)

        def fetch() -> None:
            batch, values, where = waiting.popleft()
            for i, row, at in zip(batch, np.asarray(values), where):
                found[i] = row[at]

        for start in range(0, len(order), rows):
            chosen = order[start : start + rows]
            # a last batch that is not full has as many rows as the others: the program is there already
            waiting.append((chosen, *self._batch([pairs[i] for i in chosen], min(rows, len(order)), shown)))
            if len(waiting) > AHEAD:
                fetch()
        while waiting:
            fetch()
        return found

    def _shown(self, pictures: Sequence[Picture]) -> Shown:
        """Every picture, once each, through tower and projector."""
        g = self.generator
        first, views = {}, []
        for picture in {id(picture): picture for picture in pictures}.values():
            first[id(picture)] = len(views)
            views += list(picture.views)
        if len({view.dtype == np.uint8 for view in views}) > 1:
            raise PromptError(
                "one call has images in uint8 pixels and in normalised floats: give all of them in one way"
            )
        rows, tables = self._whole(min(power_of_two(len(views)), g.batch_size)), []
        with g.place():
            encode = image_program(g.config, g.compute, g.mesh)
            for start in range(0, len(views), rows):
                some = np.stack(views[start : start + rows])
                some = np.concatenate([some, np.zeros((rows - len(some), *some.shape[1:]), some.dtype)])
                tables.append(encode(g.params, g.on_device({"images": some[:, None]})["images"]))
            return Shown(jnp.concatenate(tables) if len(tables) > 1 else tables[0], first)

    def _whole(self, rows: int) -> int:
        """`rows`, or more so that the mesh can split them."""
        mesh = self.generator.mesh
        split = 1 if mesh is None else math.prod(mesh.shape[axis] for axis in rules.DEFAULT_RULES["batch"])
        return -(-rows // split) * split

    def _pair(self, picture: Picture, question: str, answer: str) -> Pair:
        loaded, config = self.loaded, self.generator.config
        if config.encoder_decoder:
            tokens, said = encode_apart(loaded.tokenizer, self.prompt, question, answer)
        else:
            tokens, said = encode_pair(
                TextFormat(loaded.tokenizer, loaded.template), question, answer, loaded.start_end
            )
        return Pair(place(Prompt(tokens, (picture,)), config, f"question {question!r}"), said)

    def _batch(self, pairs: Sequence[Pair], rows_together: int, shown: Shown) -> tuple[jax.Array, list[slice]]:
        """Log-probabilities float32 [rows, K], and where in its row the answer of each pair is."""
        g, placed = self.generator, [pair.placed for pair in pairs]
        shape = g.shapes(placed) | {"rows": g.shapes([placed[0]] * rows_together)["rows"]}
        room = bucket(max(len(pair.answer) for pair in pairs), ANSWER_BUCKET)
        longest = max(map(len, placed))
        if not g.config.encoder_decoder:
            longest += 1  # a slot before the first one that is scored
            room = min(room, longest - 1)
        shape["slots"] = slots_for(longest)
        rows, where = batch_of(placed, g.config, **shape, pixels=False), []
        views = np.zeros((shape["rows"], shape["views"]), np.int32)
        for r, one in enumerate(placed):
            seen = [shown.first[id(p)] + v for p in one.prompt.images for v in range(len(p.views))]
            views[r, : len(seen)] = seen
        for key in ("answer_tokens", "answer_segments", "answer_targets"):
            rows[key] = np.zeros((shape["rows"], room), np.int32)
        for r, (_, answer) in enumerate(pairs):
            at = slice(0, len(answer)) if g.config.encoder_decoder else slice(room - len(answer), room)
            rows["answer_tokens"][r, at], rows["answer_targets"][r, at], _ = answer_slots(answer)
            rows["answer_segments"][r, at] = 1
            where.append(at)
        vocab = g.config.llm.vocab
        known = vocab if self.whole_vocabulary else min(self.loaded.tokenizer.size, vocab)
        with g.place():
            score, arrays = program(g.config, g.compute, g.mesh), g.on_device(rows)
            features = _take(shown.table, jnp.asarray(views))
            return score(g.params, features, arrays, jnp.int32(known)), where


def slots_for(longest: int) -> int:
    """Slots of rows whose longest prompt has `longest`: hardly more where any number will do, else of a few that attention likes."""
    fine = 64 if longest <= 256 else 32  # compiling for one more length of short rows costs more than their slots
    grain = GRAIN.get(jax.default_backend(), fine)
    return -(-longest // grain) * grain if longest <= FINE else bucket(longest, PROMPT_BUCKET)


def encode_pair(form: TextFormat, question: str, answer: str, start_end: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """(tokens int32 [n], those of them at the end that are the answer), as linzhiqiu/t2v_metrics has them for LLaVA-1.5.

    The image stands in front of the question; what closes the answer belongs to it, and so does a token for the space before it.
    """
    _check(question, answer)
    template = form.template
    if template.style == "PLAIN":
        parts = [Piece(with_images("", 1, start_end).rstrip("\n") + question), Piece(answer + template.sep, True)]
    else:
        shown = with_images(question, 1, start_end, behind=template.origin == "llavar")
        parts = pieces(template, messages_of(template, [shown, answer]))
    tokens, labels = encode_pieces(parts, form, has_image=True)
    said = np.flatnonzero(labels != IGNORE)
    tokens = tokens[: said[-1] + 1]
    return tokens, tokens[len(tokens) - len(said) :]


def encode_apart(tokenizer: Tokenizer, prompt: str, question: str, answer: str) -> tuple[np.ndarray, np.ndarray]:
    """(tokens int32 [n] of the question, tokens int32 [m] of the answer with its EOS); prompt: of ENCODER_PROMPTS."""
    _check(question, answer)
    before, after = ENCODER_PROMPTS[prompt].split("{}")
    tokens = tokenizer.encode_images(before + question + after)
    said = [*tokenizer.encode(answer, special=False), tokenizer.eos_id]
    return np.asarray(tokens[:CONTEXT], np.int32), np.asarray(said[:CONTEXT], np.int32)


def _check(question: str, answer: str) -> None:
    if not answer.strip():
        raise PromptError(f"the answer {answer!r} to {question!r} is empty: there is nothing to be probable")
    if any(mark in text for mark in (IMAGE_TEXT, PLACEHOLDER_TEXT) for text in (question, answer)):
        raise PromptError(
            f"{question!r} with the answer {answer!r} holds {IMAGE_TEXT}, which stands for the image: take it out"
        )


@functools.lru_cache(maxsize=16)
def program(config: VLMConfig, compute: Compute, mesh: Mesh | None) -> Callable[..., jax.Array]:
    """Compiled code shared by every scorer of the same model; `mesh` only keeps programs of different meshes apart."""
    return jax.jit(functools.partial(_log_probabilities, config, compute))


@functools.lru_cache(maxsize=16)
def image_program(config: VLMConfig, compute: Compute, mesh: Mesh | None) -> Callable[..., jax.Array]:
    """Compiled code from images [n, 1, S, S, 3] to their projected features [n, P, D]."""

    def encode(params: dict, images: jax.Array) -> jax.Array:
        with exact(compute):
            return vlm.build(config, params).encode_images(images, compute)

    return jax.jit(encode)


@jax.jit
def _take(table: jax.Array, views: jax.Array) -> jax.Array:
    """table [n, P, D], views [B, I] -> [B, I * P, D]."""
    rows = table[views].reshape(len(views), -1, table.shape[-1])
    return shard(rows, "batch", None, None)


def _log_probabilities(
    config: VLMConfig, compute: Compute, params: dict, features: jax.Array, batch: dict, known: jax.Array
) -> jax.Array:
    """float32 [B, K]: log P of each of batch["answer_targets"] [B, K] given what is before it, among the first `known` ids.

    features: projected, [B, I * P, D].
    """
    targets = batch["answer_targets"]
    with exact(compute):
        model = vlm.build(config, params)
        x = model.embed(batch["tokens"], batch["image_slots"], features, compute)
        logits = model.logits(_answered(model, x, batch, compute))
    ids = jnp.arange(logits.shape[-1])
    # rows of the embedding that no token has are no answers; published scores leave them out as well
    logits = jnp.where(ids < known, logits, -jnp.inf)
    # a masked sum and not a gather: it stays local where the vocabulary is sharded
    return jnp.sum(jnp.where(ids == targets[..., None], logits, 0.0), axis=-1) - jax.nn.logsumexp(logits, axis=-1)


def _answered(model: vlm.VLM, x: jax.Array, batch: dict, compute: Compute) -> jax.Array:
    """Hidden states [B, K, D] that predict the answers, of rows x [B, T, D]."""
    how, slots = (compute.attention, compute.remat), batch["answer_targets"].shape[1]
    if not model.config.encoder_decoder:
        return model.llm(x, batch["positions"], batch["segments"], None, *how)[0][:, -slots - 1 : -1]
    memory = model.llm.encode(x, batch["segments"], *how)
    rows = batch["answer_tokens"], batch["answer_segments"], memory, batch["segments"]
    return decode_short(model.llm, *rows, compute.attention) if slots <= SHORT else model.llm.decode(*rows, *how)

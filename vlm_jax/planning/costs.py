"""What a step of a recipe must compute and move at least: FLOPs by train.flops with every slot filled, bytes of weights and activations."""

from __future__ import annotations

from vlm_jax.planning.programs import Program
from vlm_jax.recipe import Recipe
from vlm_jax.tokenizer_recipe import TokenizerRecipe
from vlm_jax.train import state as states
from vlm_jax.train.flops import Cost, training_cost


def full_counts(recipe: Recipe) -> dict[str, float]:
    """What a batch holds when every slot is filled by samples of data.sample_length (of a row's length where that is shorter)."""
    d, batch = recipe.data, recipe.train.global_batch
    slots, sample = batch * d.row_length, min(d.sample_length or d.row_length, d.row_length)
    samples = batch * min(d.views_per_row, d.max_samples or d.views_per_row)
    sample = min(sample, d.row_length / min(d.views_per_row, d.max_samples or d.views_per_row))
    counts = {"slots": slots, "pairs": slots * sample / 2, "views": batch * d.views_per_row}
    if recipe.model.encoder_decoder:
        answers = batch * d.answer_length
        each = answers / samples
        counts |= {"answers": answers, "answer_pairs": answers * each / 2, "cross_pairs": answers * sample}
    return counts


def training_flops(recipe: Recipe) -> tuple[float, float]:
    """(useful, with recomputation) FLOPs of one update."""
    cost = training_cost(recipe.model, states.chosen(recipe.model, recipe.train), bool(recipe.data.feature_cache))
    counts = full_counts(recipe)
    useful = cost.total(**counts)
    if recipe.train.remat == "none":
        return useful, useful
    forward = training_cost(recipe.model, (), bool(recipe.data.feature_cache))
    again = Cost(
        *(f if c > f else 0.0 for f, c in zip(forward, cost))
    )  # only what gradients pass through is computed again
    if recipe.train.remat == "linears":
        again = again._replace(slot=0.0, view=0.0, answer=0.0)
    if recipe.train.remat == "attention":
        again = again._replace(pair=0.0, answer_pair=0.0, cross_pair=0.0)
    return useful, useful + again.total(**counts)


def reading_flops(recipe: Recipe, step: str, rows: int, slots: int) -> tuple[float, float]:
    """FLOPs of a prefill, or of one token for every row; an encoder-decoder's prefill also writes the first token of an answer."""
    forward = training_cost(recipe.model, ())
    token = forward.answer + forward.cross_pair * slots
    if step == "prefill":
        one = forward.total(slots, slots * slots / 2, 1) + token
    else:
        one = token if recipe.model.encoder_decoder else forward.slot + forward.pair * slots
    return rows * one, rows * one


def bytes_moved(recipe: Recipe | TokenizerRecipe, made: Program, step: str) -> float:
    """Bytes of weights, moments, cache and saved activations that one chip must move in a step."""
    if step in ("prefill", "decode"):
        return made.held["parameters"] - made.unread + made.held.get("cache", 0.0)
    passes = 2 + (getattr(recipe.train, "remat", "none") != "none")
    weights = (made.held["parameters"] + made.held["frozen"]) * passes * recipe.train.accum
    update = (
        2 * made.held["optimizer"] + 3 * made.held["parameters"]
    )  # moments in and out; gradients in, parameters in and out
    update += 2 * made.held.get("moving", 0.0)
    return weights + update + 2 * made.saved * recipe.train.accum

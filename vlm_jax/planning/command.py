"""The body of `python -m vlm_jax plan`: what a recipe takes on chips that are not there, as a table and as JSON."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vlm_jax import recipe as recipes
from vlm_jax.config import ConfigError, one_of
from vlm_jax.parallel import hosts
from vlm_jax.parallel.mesh_config import AXES, MeshConfig
from vlm_jax.planning.chips import Topology
from vlm_jax.planning.chips import topology as parse_topology
from vlm_jax.planning.plan import Plan, describe, gib, mesh_of
from vlm_jax.planning.plan import plan as make_plan
from vlm_jax.recipe import AnyRecipe, Recipe
from vlm_jax.tokenizer_recipe import TokenizerRecipe

STEPS = ("train", "tokenizer", "prefill", "decode")
DOES_NOT_FIT = 3  # exit code
Planned = Recipe | TokenizerRecipe


def plan(
    config: Any, topology: str, mesh: str = "", step: str = "train", search: bool = False, rows: int = 8, slots: int = 1024,
    new: int = 256, out: str = "",
) -> int:  # fmt: skip
    """Compile, print, and write JSON to `out`; returns 0 if the step fits, else DOES_NOT_FIT.

    step train is the training step of whatever the recipe trains; tokenizer is the same and insists on a visual tokenizer.
    """
    recipe, where = planned(recipes.from_config(config), step), parse_topology(topology)
    recipe = dataclasses.replace(recipe, mesh=mesh_of(mesh, recipe.mesh))
    step = "train" if step == "tokenizer" else step
    if search:
        if step != "train":
            raise ConfigError("--search tries train.accum, train.remat and mesh: it needs --step train")
        found = _search(recipe, where)
    else:
        found = [(recipe, make_plan(recipe, where, step, rows, slots, new))]
        print(page(*found[0]))
    if out:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text(json.dumps([as_json(*one) for one in found], indent=1) + "\n")
    return 0 if any(p.fits for _, p in found) else DOES_NOT_FIT


def planned(recipe: AnyRecipe, step: str) -> Planned:
    """The recipe, if `step` means something for what it trains; else ConfigError says what does."""
    one_of("--step", step, STEPS)
    kinds = {Recipe: "a vision-language model", TokenizerRecipe: "a visual tokenizer"}
    of = kinds.get(type(recipe), "a prior over codes")
    if type(recipe) not in kinds:
        raise ConfigError(
            f"this config is of {of}, and plan knows {' and '.join(kinds.values())}: name a config of one of them"
        )
    if step == "tokenizer" and isinstance(recipe, Recipe):
        raise ConfigError(
            f"--step tokenizer is the training step of a visual tokenizer, and this config is of {of}: use --step train, prefill or "
            "decode, or name a config such as configs/visual_tokenizer.py:vq16"
        )
    if step in ("prefill", "decode") and isinstance(recipe, TokenizerRecipe):
        raise ConfigError(f"--step {step} answers prompts, and this config is of {of}: use --step train")
    return recipe


def batch_of(recipe: Planned) -> str:
    """What a training step reads, in words."""
    t = recipe.train
    if isinstance(recipe, TokenizerRecipe):
        return f"{t.global_batch} images of {recipe.data.size} pixels, {t.dtype}"
    return f"{t.global_batch} rows of {recipe.data.row_length} slots, accum {t.accum}, remat {t.remat}"


def page(recipe: Planned, p: Plan) -> str:
    """Everything about one plan, as text."""
    chip = p.topology.chip
    mesh = ", ".join(f"{axis} {n}" for axis, n in zip(AXES, p.mesh) if n > 1) or "one chip"
    what = batch_of(recipe) if p.step == "train" else p.step
    lines = [
        f"{describe(recipe)} on {p.topology} ({p.topology.count} chips: {mesh}), {what}; compiled in {p.seconds:.0f} s",
        "",
    ]
    lines += ["| per chip | GiB |", "|---|---|"]
    lines += [f"| {kind} | {gib(size)} |" for kind, size in p.held.items() if size]
    if p.fits or p.temporaries:
        kept = (
            min(p.saved, p.temporaries) if p.fits else p.saved
        )  # of what autodiff saves, compilers compute some again
        lines += [f"| activations kept for the backward pass | {gib(kept)} |"] if kept else []
        lines += [f"| other temporaries | {gib(max(0.0, p.temporaries - kept))} |"]
    lines += [f"| peak, of {gib(chip.memory)} | {gib(p.needed)} |", ""]
    if chip.platform == "gpu":
        lines += [
            "attention is compiled in chunks here: cuDNN, which a GPU has, makes its kernels on the GPU itself",
            "",
        ]
    if not p.fits:
        return "\n".join([*lines, too_large(recipe, p)])
    lines += ["| collective | runs per step | GiB sent by a chip |", "|---|---|---|"]
    lines += [f"| {kind} | {runs} | {gib(sent)} |" for kind, (runs, sent) in sorted(p.by_kind().items())]
    lines += ["", "| least time of a step | s |", "|---|---|"]
    lines += [f"| {name} | {seconds:.4f} |" for name, seconds in p.times.items()]
    lines += [
        "",
        f"{p.flops / 1e12:.2f} useful TFLOP per chip and step; MFU at most {100 * p.mfu:.0f} % (every slot filled, perfect overlap)",
    ]
    return "\n".join(lines)


def too_large(recipe: Planned, p: Plan) -> str:
    """One sentence: how much is missing and what helps."""
    needs = "more than there is" if math.isinf(p.needed) else f"{gib(p.needed)} GiB"
    helps = "a larger mesh.fsdp, mesh.tensor or, for long rows, mesh.seq, train.remat=full, a larger train.accum, or let --search try"
    if isinstance(recipe, TokenizerRecipe):
        helps = "a smaller train.global_batch, or train.dtype=bfloat16"
    elif p.step != "train":
        helps = "a larger mesh.tensor, or fewer --rows or --slots"
    return f"does not fit: a chip needs {needs} and has {gib(p.topology.chip.memory)} GiB; take more chips, {helps}"


def as_json(recipe: Planned, p: Plan) -> dict[str, Any]:
    """A plan as numbers: bytes, seconds, FLOPs per chip."""
    t, images = recipe.train, isinstance(recipe, TokenizerRecipe)
    unit = {"image_size": recipe.data.size} if images else {"row_length": recipe.data.row_length, "remat": t.remat}
    return {
        "topology": str(p.topology), "mesh": dict(zip(AXES, p.mesh)), "step": p.step, "model": describe(recipe),
        "global_batch": t.global_batch, "accum": t.accum, **unit, "fits": p.fits,
        "peak_bytes": None if math.isinf(p.needed) else p.needed, "memory_bytes": p.topology.chip.memory, "held_bytes": p.held,
        "saved_bytes": p.saved, "temporary_bytes": p.temporaries,
        "collectives": {k: {"runs": n, "sent_bytes": s} for k, (n, s) in p.by_kind().items()},
        "flops": p.flops, "hardware_flops": p.hardware_flops, "seconds": p.times, "mfu_at_most": p.mfu if p.fits else None,
        "compile_seconds": p.seconds, "message": p.message,
    }  # fmt: skip


def row(recipe: Planned, p: Plan) -> str:
    """A plan as a row of the table that --search prints."""
    mesh = " x ".join(f"{axis} {n}" for axis, n in zip(AXES, p.mesh) if n > 1) or "-"
    peak = "too much" if math.isinf(p.needed) else gib(p.needed)
    least, mfu = (f"{p.least_seconds:.3f}", f"{100 * p.mfu:.0f} %") if p.fits else ("", "")
    cells = (
        mesh,
        recipe.train.accum,
        getattr(recipe.train, "remat", "none"),
        peak,
        "yes" if p.fits else "no",
        least,
        mfu,
        f"{p.seconds:.0f}",
    )
    return "| " + " | ".join(map(str, cells)) + " |"


def _search(recipe: Planned, where: Topology) -> list[tuple[Planned, Plan]]:
    """Plans of every candidate, the best that fits printed at the end."""
    print(f"{describe(recipe)} on {where} ({gib(where.chip.memory)} GiB a chip), {batch_of(recipe)}\n")
    print("| mesh | accum | remat | peak GiB | fits | least s | MFU at most | compile s |\n|" + "---|" * 8, flush=True)
    found: list[tuple[Planned, Plan]] = []
    for candidates in tried(recipe, where):
        for candidate in candidates:
            one = make_plan(candidate, where)
            found.append((candidate, one))
            print(row(candidate, one), flush=True)
            if one.fits:
                break  # a smaller micro-batch only gathers the weights more often
    fitting = [one for one in found if one[1].fits]
    if not fitting:
        less = (
            "a smaller train.global_batch"
            if isinstance(recipe, TokenizerRecipe)
            else "shorter rows (data.row_length), or adapters (lora)"
        )
        hosts.say(f"nothing that was tried fits {where}: take more chips, {less}")
        return found
    best = min(fitting, key=lambda one: one[1].least_seconds)
    print("\nThe fastest that fits:\n\n" + page(*best) + "\n\n" + overrides(*best))
    return [best, *(one for one in found if one is not best)]


def tried(recipe: Planned, where: Topology) -> Iterator[list[Planned]]:
    """Candidates of --search, those that differ in train.accum alone together, the smallest first."""
    if isinstance(recipe, TokenizerRecipe):  # batch norms and codebooks follow whole batches
        if recipe.train.global_batch % where.count == 0:
            inside = MeshConfig(data=where.slices, fsdp=where.count // where.slices)
            for mesh in (inside, MeshConfig(data=where.count, fsdp=1)):
                yield [dataclasses.replace(recipe, mesh=mesh)]
        return
    for mesh, remat in itertools.product(meshes(recipe, where), ("none", "linears", "full")):
        trains = [dataclasses.replace(recipe.train, remat=remat, accum=n) for n in accumulations(recipe, where, mesh)]
        yield [dataclasses.replace(recipe, mesh=mesh, train=train) for train in trains]


def overrides(recipe: Planned, p: Plan) -> str:
    """Flags that give this plan on the command line of train."""
    mesh = " ".join(f"--config.mesh.{axis}={n}" for axis, n in zip(AXES, p.mesh))
    if isinstance(recipe, TokenizerRecipe):
        return mesh
    return f"{mesh} --config.train.accum={recipe.train.accum} --config.train.remat={recipe.train.remat}"


def meshes(recipe: Recipe, where: Topology) -> Iterator[MeshConfig]:
    """data over slices and fsdp over the chips of one, then with more and more of them along tensor, as far as rows and heads divide."""
    llm = recipe.model.llm
    for tensor in (1, 2, 4, 8):
        fsdp, rest = divmod(where.count // where.slices, tensor)
        heads = getattr(llm, "kv_heads", llm.heads)
        if rest or heads % tensor or recipe.train.global_batch % (where.slices * fsdp):
            continue
        yield MeshConfig(data=where.slices, fsdp=fsdp, tensor=tensor)


def accumulations(recipe: Recipe, where: Topology, mesh: MeshConfig) -> Sequence[int]:
    """Numbers of micro-batches, fewest first, that leave a row for every shard of the batch."""
    data, fsdp, *_ = mesh.resolve(where.count)
    most = recipe.train.global_batch // (data * fsdp)
    return [n for n in range(1, most + 1) if most % n == 0]

"""Compile one program of a recipe for a topology and say what it takes: bytes, collectives, FLOPs, and the least time of a step.

peak bytes   = arguments + temporaries of the compiled program (XLA's own plan), per chip
least time   = max(FLOPs with recomputation / peak FLOP/s,  bytes sent / link bandwidth,  bytes of weights and cache / memory bandwidth,
                   bytes sent to other slices / the chip's share of the network between them)
MFU at most  = useful FLOPs / (least time x peak FLOP/s)       useful: no recomputation, train.flops, every slot filled
"""

from __future__ import annotations

import collections
import dataclasses
import re
import time
from typing import Any

import jax

from vlm_jax.config import ConfigError, LLMConfig
from vlm_jax.parallel import rules
from vlm_jax.parallel.compiling import compile_step
from vlm_jax.parallel.mesh import make_mesh
from vlm_jax.parallel.mesh_config import AXES, MeshConfig
from vlm_jax.planning import costs, programs, tokenizer_programs
from vlm_jax.planning.chips import GIB, Topology
from vlm_jax.planning.collectives import Collective, collectives
from vlm_jax.planning.devices import devices
from vlm_jax.planning.programs import Program
from vlm_jax.recipe import Recipe
from vlm_jax.tokenizer_recipe import TokenizerRecipe

# XLA's effort to make the program fast: at -1 it compiles several times faster, and memory comes out alike
EFFORT = {"exec_time_optimization_effort": -1.0}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one program takes on one chip of `topology`; bytes. needed: peak, as the compiler states it where it does not fit.

    held: arguments by kind; saved: what the backward pass keeps (part of temporaries); seconds: of compilation.
    """

    topology: Topology
    mesh: tuple[int, ...]
    step: str
    fits: bool
    needed: float
    held: dict[str, float]
    saved: float
    temporaries: float
    collectives: tuple[Collective, ...]
    flops: float
    hardware_flops: float
    read: float
    seconds: float
    message: str = ""

    @property
    def times(self) -> dict[str, float]:
        """Seconds that each resource needs at its peak."""
        chip = self.topology.chip
        inside, across = (sum(c.sent for c in self.collectives if c.between == x) for x in (False, True))
        times = {
            "compute": self.hardware_flops / chip.flops,
            "links": inside / chip.links,
            "memory": self.read / chip.bandwidth,
        }
        return times | ({"between slices": across / chip.between} if self.topology.slices > 1 else {})

    @property
    def least_seconds(self) -> float:
        """The roofline: no resource can be faster."""
        return max(self.times.values())

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation at the roofline."""
        return self.flops / (self.least_seconds * self.topology.chip.flops) if self.least_seconds else 0.0

    def by_kind(self) -> dict[str, tuple[int, float]]:
        """{collective: (runs, bytes sent)} of a step; those that join slices apart."""
        found: dict[str, list[float]] = collections.defaultdict(lambda: [0, 0.0])
        for c in self.collectives:
            kind = f"{c.kind} between slices" if c.between else c.kind
            found[kind][0] += c.runs
            found[kind][1] += c.sent
        return {kind: (int(n), sent) for kind, (n, sent) in found.items()}


def plan(
    recipe: Recipe | TokenizerRecipe,
    topology: Topology,
    step: str = "train",
    rows: int = 8,
    slots: int = 1024,
    new: int = 256,
) -> Plan:
    """Compile `step` of a recipe; rows, slots, new: of prefill and decode. A program that does not fit gives a Plan with fits=False."""
    mesh = make_mesh(recipe.mesh, devices(topology))
    began = time.perf_counter()
    useful, hardware = (x / topology.count for x in _flops(recipe, step, rows, slots))
    with rules.use(mesh):
        made = _program(recipe, _platform(topology), step, rows, slots, new)
        common: dict[str, Any] = {"topology": topology, "mesh": recipe.mesh.resolve(topology.count), "step": step}
        common |= {"held": made.held, "saved": made.saved, "flops": useful, "hardware_flops": hardware}
        common |= {"read": costs.bytes_moved(recipe, made, step)}
        try:
            compiled = _compile(made.lowered, _platform(topology), step)
        except jax.errors.JaxRuntimeError as error:
            needed = out_of_memory(str(error))
            if needed is None:
                raise
            if "temporaries" in str(error):
                needed += sum(made.held.values())
            seconds = time.perf_counter() - began
            return Plan(**common, fits=False, needed=needed, temporaries=0.0, collectives=(), seconds=seconds,
                        message=" ".join(str(error).split())[:400])  # fmt: skip
    memory = compiled.memory_analysis()
    arguments = memory.argument_size_in_bytes
    needed = arguments + memory.output_size_in_bytes - memory.alias_size_in_bytes + memory.temp_size_in_bytes
    found = tuple(collectives(compiled.as_text(), topology.count))
    return Plan(**common, fits=needed <= topology.chip.memory, needed=needed, temporaries=memory.temp_size_in_bytes,
                collectives=found, seconds=time.perf_counter() - began)  # fmt: skip


def _compile(lowered: jax.stages.Lowered, platform: str, step: str) -> jax.stages.Compiled:
    """As a run compiles it, but with less effort."""
    effort = EFFORT if platform == "tpu" else {}
    return (
        lowered.compile(effort or None) if step in ("prefill", "decode") else compile_step(lowered, platform, **effort)
    )


def _flops(recipe: Recipe | TokenizerRecipe, step: str, rows: int, slots: int) -> tuple[float, float]:
    """(useful, computed) FLOPs of a step on all chips."""
    if isinstance(recipe, TokenizerRecipe):
        return tokenizer_programs.tokenizer_flops(recipe)
    return costs.training_flops(recipe) if step == "train" else costs.reading_flops(recipe, step, rows, slots)


def _program(recipe: Recipe | TokenizerRecipe, platform: str, step: str, rows: int, slots: int, new: int) -> Program:
    if isinstance(recipe, TokenizerRecipe):
        return tokenizer_programs.tokenizer_program(recipe, platform)
    if step == "train":
        return programs.train_program(recipe, platform)
    return programs.decode_program(recipe, platform, step, rows, slots, new)


def out_of_memory(message: str) -> float | None:
    """Bytes that a program needs, from the compiler's refusal ("Used 28.33G of 15.75G hbm", "required for HLO temporaries (25.96G)");
    None for another error."""
    found = re.search(r"(?:Used |temporaries \()([\d.]+)([KMGT])", message)
    if found:
        return float(found[1]) * 1024 ** ("KMGT".index(found[2]) + 1)
    return float("inf") if "RESOURCE_EXHAUSTED" in message else None


def _platform(topology: Topology) -> str:
    return "tpu" if topology.chip.platform == "tpu" else "cuda"


def mesh_of(text: str, default: MeshConfig) -> MeshConfig:
    """ "fsdp=64,tensor=4" -> MeshConfig; empty: the recipe's."""
    if not text:
        return default
    sizes = {}
    for part in text.split(","):
        axis, equals, count = part.partition("=")
        if axis not in AXES or not equals or not re.fullmatch(r"-?\d+", count):
            raise ConfigError(f"--mesh {text!r}: give axes as fsdp=64,tensor=4, of {', '.join(AXES)}")
        sizes[axis] = int(count)
    sizes.setdefault("fsdp", 1 if -1 in sizes.values() else -1)
    return MeshConfig(**sizes)


def describe(recipe: Recipe | TokenizerRecipe) -> str:
    """A model in a word, e.g. "4096 x 32" (width x layers), or "vq tokenizer 128 x 5" (width x levels)."""
    if isinstance(recipe, TokenizerRecipe):
        t = recipe.tokenizer
        return f"{t.quantizer.kind} tokenizer {t.autoencoder.width} x {t.autoencoder.levels}"
    llm = recipe.model.llm
    layers = llm.layers if isinstance(llm, LLMConfig) else llm.encoder_layers + llm.decoder_layers
    return f"{llm.width} x {layers}"


def gib(x: float) -> str:
    """Bytes as GiB."""
    return f"{x / GIB:.2f}"

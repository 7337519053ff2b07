"""Collectives are read from compiled programs with the counts that the program was written with."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from vlm_jax.parallel.mesh import make_mesh
from vlm_jax.planning.collectives import collectives

MESH = make_mesh()  # fsdp over eight fake devices
N, LAYERS = 64, 5


def compiled(function, *specs, out=PartitionSpec()):
    """The program's text for float32 [N, N] arguments (a stack of LAYERS where the spec has three entries)."""
    arguments = [
        jax.ShapeDtypeStruct((LAYERS,) * (len(s) == 3) + (N, N), jnp.float32, sharding=NamedSharding(MESH, s))
        for s in specs
    ]
    return jax.jit(function, out_shardings=NamedSharding(MESH, out)).lower(*arguments).compile().as_text()


def test_a_gather_leaves_seven_eighths_of_its_result():
    (found,) = collectives(compiled(lambda x: x + 1.0, PartitionSpec("fsdp", None)), 8)
    assert (found.kind, found.runs, found.group, found.inside) == ("all-gather", 1, 8, False)
    assert found.result == 4 * N * N and found.sent == pytest.approx(4 * N * N * 7 / 8)


def test_a_sum_over_chips_sends_twice_as_much():
    (found,) = collectives(compiled(lambda x: jnp.sum(x, 0), PartitionSpec("fsdp", None)), 8)
    assert found.kind == "all-reduce" and found.sent == pytest.approx(2 * 4 * N * 7 / 8)


def test_a_loop_counts_as_often_as_it_turns():
    def stack(x, weights):
        def layer(x, w):
            whole = jax.lax.with_sharding_constraint(w, NamedSharding(MESH, PartitionSpec()))
            return jnp.tanh(x @ whole), None

        return jax.lax.scan(layer, x, weights)[0]

    rows = PartitionSpec("fsdp", None)
    found = collectives(compiled(stack, rows, PartitionSpec(None, "fsdp", None), out=rows), 8)
    gathers = [one for one in found if one.kind == "all-gather"]
    assert sum(one.runs for one in gathers) == LAYERS and all(one.inside for one in gathers)
    assert sum(one.sent for one in gathers) == pytest.approx(LAYERS * 4 * N * N * 7 / 8)


BETWEEN = (
    'is_host_transfer=true, frontend_attributes={{_xla_host_transfer_handler_name="xla_megascale_runtime",'
    '_xla_megascale_target="{}x{{0:7}}",_xla_megascale_transfer_type="{}"}}'
)
TEXTS = {
    # asynchronous starts hold their operands too; layouts have brackets; a TPU names a reduce-scatter as a fusion
    "  %a = (bf16[8,128]{1,0:T(8,128)(2,1)}, bf16[64,128]{1,0:T(8,128)(2,1)}) all-gather-start(%x), replica_groups=[4,8]<=[32]": (
        "all-gather", 8, 2 * 64 * 128, 2 * 64 * 128 * 7 / 8),
    "  %p = (f32[16]{0}, f32[16]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}": (
        "collective-permute", 2, 64, 64),
    "  %r = f32[16]{0} reduce-scatter(%x), replica_groups={{0,1,2,3}}, to_apply=%add": ("reduce-scatter", 4, 64, 4 * 64 * 3 / 4),
    "  %f = bf16[32]{0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1": ("reduce-scatter", 4, 64, 4 * 64 * 3 / 4),
    "  ROOT %b = ((f32[4]{0}, f32[4]{0}), (f32[8]{0}, f32[8]{0})) all-gather-start(%x, %y), replica_groups={{0,1}}": (
        "all-gather", 2, 64, 32),
    # between TPU slices, 1-based: what one slice hands over, and which chips of each take part
    f"  %s = (f32[16]{{0:T(128)}}, u32[], token[]) send(%x, %t), channel_id=2, {BETWEEN.format('{1,2}', 'ALL_REDUCE')}": (
        "all-reduce", 2, 64, 64),
    f"  %s = (f32[16]{{0:T(128)}}, u32[], token[]) send(%x, %t), channel_id=2, {BETWEEN.format('{1:4}', 'ALL_GATHER')}": (
        "all-gather", 4, 4 * 64, 3 * 64),
    f"  %s = (f32[16]{{0:T(128)}}, u32[], token[]) send(%x, %t), channel_id=2, {BETWEEN.format('{1,2,3,4}', 'REDUCE_SCATTER')}": (
        "reduce-scatter", 4, 16, 48),
}  # fmt: skip


@pytest.mark.parametrize("line", TEXTS, ids=lambda line: line.split("(%x")[0].split()[-1])
def test_forms_of_other_compilers(line):
    module = (
        "%all-reduce-scatter.1 (p: bf16[128]) -> bf16[32] {\n"
        "  %i = bf16[128]{0} all-reduce(%p), replica_groups={{0,1,2,3}}, to_apply=%add\n}\n\n"
        f"ENTRY %main (x: f32[8]) -> f32[8] {{\n{line}\n}}\n"
    )
    (found,) = collectives(module, 32)
    assert (found.kind, found.group, found.result, found.sent) == TEXTS[line]
    assert found.between == (" send(" in line)


def test_what_a_program_sends_to_its_own_host_is_no_collective():
    line = "  %s = (f32[16]{0}, u32[], token[]) send(%x, %t), channel_id=2, is_host_transfer=true"
    assert collectives(f"ENTRY %main (x: f32[16]) -> f32[16] {{\n{line}\n}}\n", 2) == []


def test_a_sum_over_one_device_is_none():
    line = "  ROOT %r = f32[16]{0} all-reduce(%x), replica_groups={{0},{1}}, to_apply=%add"
    assert collectives(f"ENTRY %main (x: f32[16]) -> f32[16] {{\n{line}\n}}\n", 2) == []


def test_a_loop_whose_turns_only_its_condition_knows():
    module = (
        "%body (p: (u32[], f32[8])) -> (u32[], f32[8]) {\n  %g = f32[8]{0} all-gather(%x), replica_groups={{0,1}}\n}\n\n"
        "%condition (p: (u32[], f32[8])) -> pred[] {\n  %four = u32[]{:T(128)} constant(4), metadata={}\n"
        "  ROOT %c = pred[]{:T(512)} compare(%i, %four), direction=LT\n}\n\n"
        "ENTRY %main (x: f32[8]) -> f32[8] {\n  %w = (u32[], f32[8]{0}) while(%t), condition=%condition, body=%body\n}\n"
    )
    (found,) = collectives(module, 2)
    assert (found.runs, found.inside, found.sent) == (4, True, 4 * 16)

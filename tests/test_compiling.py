"""What a training step is compiled with."""

import jax
import jax.numpy as jnp
import pytest

from vlm_jax.parallel.compiling import NO_RINGS, compile_step


class Lowered:
    """Stands for a program whose compiler knows some options."""

    def __init__(self, known, message="INVALID_ARGUMENT: No such compile option: 'x'"):
        self.known, self.message, self.asked = known, message, []

    def compile(self, options=None):
        self.asked.append(options)
        if set(options or ()) - self.known:
            raise jax.errors.JaxRuntimeError(self.message)
        return "compiled"


def test_tpus_are_told_to_make_no_rings_and_others_are_not():
    tpu, cpu = Lowered({*NO_RINGS, "effort"}), Lowered({"effort"})
    assert compile_step(tpu, "tpu", effort=-1.0) == compile_step(cpu, "cpu", effort=-1.0) == "compiled"
    assert tpu.asked == [{**NO_RINGS, "effort": -1.0}] and cpu.asked == [{"effort": -1.0}]


def test_a_compiler_without_the_option_goes_without():
    tpu = Lowered(set())
    assert compile_step(tpu, "tpu") == "compiled" and tpu.asked == [NO_RINGS, None]


def test_other_refusals_are_not_hidden():
    with pytest.raises(jax.errors.JaxRuntimeError, match="Ran out of memory"):
        compile_step(Lowered(set(), "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm"), "tpu")


def test_a_program_is_compiled_on_the_platform_there_is():
    lowered = jax.jit(lambda x: x @ x).lower(jnp.ones((4, 4)))
    assert compile_step(lowered, jax.default_backend())(jnp.ones((4, 4)))[0, 0] == 4

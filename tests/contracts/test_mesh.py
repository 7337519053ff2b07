"""One computation, any mesh: equal loss and gradients, and nothing whole that should be sharded."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest

from tests.small_runs import EXACT, LLM, MODEL, Weights, batch
from vlm_jax.config import ConfigError, LoRAConfig, QuantConfig, VLMConfig
from vlm_jax.models import vlm
from vlm_jax.models.quantised import quantised
from vlm_jax.parallel import hosts, rules
from vlm_jax.parallel.mesh import MeshConfig, make_mesh
from vlm_jax.train import optimizer
from vlm_jax.train import state as states
from vlm_jax.train.options import LORA, STAGE1, TrainConfig
from vlm_jax.train.step import batch_shardings, loss_and_gradients, make_step, split_micro_batches

MESHES = {
    "fsdp8": MeshConfig(fsdp=8),
    "fsdp4_tensor2": MeshConfig(fsdp=4, tensor=2),
    "data2_fsdp2_tensor2": MeshConfig(data=2, fsdp=2, tensor=2),
    "fsdp2_tensor2_seq2": MeshConfig(fsdp=2, tensor=2, seq=2),
    "data4_seq2": MeshConfig(data=4, fsdp=1, seq=2),
}


def mesh_of(config: MeshConfig, devices: int = 8):
    return make_mesh(config, jax.devices()[:devices])


def run_on(mesh, config=EXACT):
    """(loss, gradients as jax arrays) of the same batch and parameters on `mesh`."""
    with rules.use(mesh):
        where = vlm.shardings(MODEL)
        params = {k: jax.device_put(v, where[k]) for k, v in Weights().arrays.items()}
        chosen = states.select(config.trainable, params)
        trainable, frozen = ({k: v for k, v in params.items() if (k in chosen) == side} for side in (True, False))
        rows = split_micro_batches(batch(0), config.accum)
        arrays = hosts.to_devices(rows, batch_shardings({k: v.shape for k, v in rows.items()}))
        grads, sums = jax.jit(functools.partial(loss_and_gradients, MODEL, config))(trainable, frozen, arrays)
        return float(sums["loss"]), grads, where


@functools.cache
def one_device():
    loss, grads, _ = run_on(mesh_of(MeshConfig(fsdp=1), 1))
    return loss, {k: np.asarray(g) for k, g in grads.items()}


@pytest.mark.parametrize("name", MESHES)
def test_loss_and_gradients_do_not_depend_on_the_mesh(name):
    loss, grads, where = run_on(mesh_of(MESHES[name]))
    wanted_loss, wanted = one_device()
    assert abs(loss - wanted_loss) < 1e-5
    for path, gradient in grads.items():
        np.testing.assert_allclose(np.asarray(gradient), wanted[path], atol=1e-5, err_msg=path)
        assert gradient.sharding.is_equivalent_to(where[path], gradient.ndim), (
            f"the gradient of {path} is not sharded like it"
        )


ADAPTED = dataclasses.replace(
    MODEL,
    lora=(
        LoRAConfig(("^llm/blocks/(attn/q|mlp/down)$",), 4, dropout=0.3),
        LoRAConfig(("^(llm|tower)/blocks/", "^projector/"), 2),
    ),
    quant=QuantConfig(block=16),
)


def run_adapted(mesh):
    """As `run_on`, of a model with adapters, dropout and a base in 4 bits."""
    config = dataclasses.replace(EXACT, trainable=LORA[:1])
    source, rng = quantised(Weights(), ADAPTED), np.random.default_rng(0)
    with rules.use(mesh):
        where, params = vlm.shardings(ADAPTED), {}
        for path, like in vlm.shapes(ADAPTED).items():
            noise = rng.normal(0, 0.2, like.shape).astype(np.float32)
            value = source.read(path, tuple(map(slice, like.shape))) if path in source else noise
            params[path] = jax.device_put(value, where[path])
        chosen = states.select(config.trainable, params)
        trainable, frozen = ({k: v for k, v in params.items() if (k in chosen) == side} for side in (True, False))
        rows = split_micro_batches(batch(0), 1)
        arrays = hosts.to_devices(rows, batch_shardings({k: v.shape for k, v in rows.items()}))
        step = jax.jit(functools.partial(loss_and_gradients, ADAPTED, config))
        grads, sums = step(trainable, frozen, arrays, jax.random.key(5))
        return float(sums["loss"]), grads, where


@functools.cache
def adapted_on_one_device():
    loss, grads, _ = run_adapted(mesh_of(MeshConfig(fsdp=1), 1))
    return loss, {k: np.asarray(g) for k, g in grads.items()}


@pytest.mark.parametrize("name", [pytest.param("fsdp4_tensor2", marks=pytest.mark.long), "fsdp2_tensor2_seq2"])
def test_adapters_dropout_and_codes_do_not_depend_on_the_mesh(name):
    loss, grads, where = run_adapted(mesh_of(MESHES[name]))
    wanted_loss, wanted = adapted_on_one_device()
    assert abs(loss - wanted_loss) < 1e-5
    assert grads.keys() == wanted.keys() == {p for p in where if p.endswith(("lora_a", "lora_b")) and "unused" not in p}
    for path, gradient in grads.items():
        np.testing.assert_allclose(np.asarray(gradient), wanted[path], atol=1e-5, err_msg=path)
        assert gradient.sharding.is_equivalent_to(where[path], gradient.ndim), path


def test_adapters_and_codes_are_sharded_like_their_base():
    large = VLMConfig(lora=(LoRAConfig(("^llm/blocks/",)),))
    with rules.use(mesh_of(MESHES["fsdp4_tensor2"])):
        base = {path: s.spec for path, s in vlm.shardings(large).items()}
        codes = {path: s.spec for path, s in vlm.shardings(dataclasses.replace(large, quant=QuantConfig())).items()}
    for linear in ("llm/blocks/attn/q", "llm/blocks/attn/o", "llm/blocks/mlp/down"):
        _, rows, columns = base[f"{linear}/kernel"]
        assert {rows, columns} == {"fsdp", "tensor"}
        # each factor is cut over fsdp too, by its ranks where the base's axis is cut over tensor
        ranks = {"fsdp": None, "tensor": "fsdp"}
        assert base[f"{linear}/lora_a"] == jax.P(None, rows, ranks[rows])
        assert base[f"{linear}/lora_b"] == jax.P(None, ranks[columns], columns)
        assert codes[f"{linear}/kernel_codes"] == codes[f"{linear}/kernel_absmax"] == base[f"{linear}/kernel"]


def test_accumulated_gradients_equal_those_of_the_whole_batch():
    loss, grads, _ = run_on(mesh_of(MeshConfig(fsdp=1), 1), dataclasses.replace(EXACT, accum=4))
    wanted_loss, wanted = one_device()
    assert abs(loss - wanted_loss) < 1e-5
    for path, gradient in grads.items():
        np.testing.assert_allclose(np.asarray(gradient), wanted[path], atol=1e-5, err_msg=path)


def test_seven_billion_parameters_start_sharded():
    """Compiled, not run: what each device would get of parameters and optimizer state of LLaVA-1.5 7B."""
    model, config = VLMConfig(), TrainConfig()
    with rules.use(mesh_of(MeshConfig(fsdp=4, tensor=2))):
        goal = states.abstract(model, config)
        init = states.initialiser(model, config).lower().compile()
        start = jax.jit(optimizer.moments(config).init, out_shardings=states.shardings(model, config).opt_state)
        compiled = start.lower(goal.trainable).compile()
    for path, sharding in init.output_shardings.items():
        assert sharding.is_equivalent_to(goal.params[path].sharding, len(goal.params[path].shape)), path
    whole = sum(s.size * s.dtype.itemsize for s in goal.params.values())
    assert init.memory_analysis().output_size_in_bytes < 1.01 * whole / 8
    moments = sum(s.size * s.dtype.itemsize for s in jax.tree.leaves(goal.opt_state))
    assert moments > 2 * 4 * 6.7e9
    assert compiled.memory_analysis().output_size_in_bytes < 1.01 * moments / 8


def test_every_array_of_the_state_keeps_its_sharding_through_a_step():
    with rules.use(mesh_of(MESHES["data2_fsdp2_tensor2"])):
        state, where = states.create(MODEL, EXACT), states.shardings(MODEL, EXACT)
        rows = split_micro_batches(batch(0), 1)
        shapes = {k: v.shape for k, v in rows.items()}
        step = make_step(MODEL, EXACT, shapes)
        for _ in range(2):
            jax.tree.map(lambda x, s: np.testing.assert_(x.sharding.is_equivalent_to(s, x.ndim)), state, where)
            state, _ = step(state, hosts.to_devices(rows, batch_shardings(shapes)), np.float32(1))
        assert int(state.step) == 2
        kernel = state.opt_state.mu["llm/blocks/mlp/up/kernel"]
        assert kernel.addressable_shards[0].data.size == kernel.size // 4  # fsdp x tensor


def test_frozen_parameters_have_neither_gradient_nor_moments():
    config = dataclasses.replace(EXACT, trainable=STAGE1, frozen_dtype="bfloat16")
    state = states.abstract(MODEL, config)
    assert set(state.trainable) == {p for p in vlm.shapes(MODEL) if p.startswith("projector/")}
    assert set(state.opt_state.mu) == set(state.opt_state.nu) == set(state.trainable)
    assert {str(s.dtype) for s in state.frozen.values()} == {"bfloat16"}
    assert {str(s.dtype) for s in state.trainable.values()} == {"float32"}


@pytest.mark.parametrize(
    "config, devices",
    [(MeshConfig(fsdp=3), 8), (MeshConfig(data=2, tensor=3), 8), (MeshConfig(tensor=16), 8)],
)
def test_a_mesh_that_does_not_divide_the_devices(config, devices):
    with pytest.raises(ConfigError, match=r"mesh \(data=.*\) does not divide the 8 devices"):
        mesh_of(config, devices)


def test_rows_that_do_not_divide_among_the_devices():
    with (
        rules.use(mesh_of(MESHES["fsdp8"])),
        pytest.raises(ConfigError, match="6 rows cannot be divided among the 8 devices of mesh axes fsdp"),
    ):
        batch_shardings({"tokens": (1, 6, 24)})


def test_a_pattern_that_trains_nothing():
    with pytest.raises(ConfigError, match=r"'\^projektor/', which matches no parameter: there are .*projector"):
        states.select(("^projektor/",), vlm.shapes(MODEL))


def test_adam_is_the_published_one():
    """Two updates against a plain transcription of decoupled AdamW with clipping."""
    config = dataclasses.replace(EXACT, weight_decay=0.1, clip_norm=0.5, group_lrs=((r"^projector/", 1e-2),))
    paths = {"projector/layer_0/kernel": (3, 2), "projector/layer_0/bias": (2,), "llm/norm/scale": (4,)}
    rng = np.random.default_rng(0)
    params = {p: rng.normal(size=s) for p, s in paths.items()}
    ours = {p: np.float32(x) for p, x in params.items()}
    state = optimizer.moments(config).init(ours)
    m, v = ({p: np.zeros(s) for p, s in paths.items()} for _ in range(2))
    for t in (1, 2):
        grads = {p: rng.normal(size=s) for p, s in paths.items()}
        steps, state, norm = optimizer.updates(config, {p: np.float32(g) for p, g in grads.items()}, state, ours, 0.7)
        ours = optax.apply_updates(ours, steps)
        whole = np.sqrt(sum((g**2).sum() for g in grads.values()))
        assert abs(float(norm) - whole) < 1e-5
        for p, g in grads.items():
            g = g * min(1, 0.5 / (whole + 1e-6))
            m[p], v[p] = 0.9 * m[p] + 0.1 * g, 0.999 * v[p] + 0.001 * g * g
            lr = 0.7 * (1e-2 if p.startswith("projector") else config.lr)
            params[p] = params[p] * (1 - lr * (0.1 if p.endswith("kernel") else 0))
            params[p] -= lr * (m[p] / (1 - 0.9**t)) / (np.sqrt(v[p] / (1 - 0.999**t)) + 1e-8)
            np.testing.assert_allclose(ours[p], params[p], atol=1e-6)


@pytest.mark.parametrize(
    "axes, size, wanted",
    [("embed", 12, ("fsdp", "seq")), ("embed", 6, ("fsdp",)), ("embed", 5, None), ("batch", 4, ("data", "fsdp")), ("batch", 2, ("data",))],
)  # fmt: skip
def test_axes_that_do_not_divide_are_left_out_from_the_end(axes, size, wanted):
    assert rules.spec((axes,), (size,), mesh_of(MeshConfig(data=2, fsdp=2, seq=2))) == jax.P(wanted)


def test_tied_heads_shard_too():
    tied = dataclasses.replace(MODEL, llm=dataclasses.replace(LLM, tie=True))
    with rules.use(mesh_of(MESHES["fsdp4_tensor2"])):
        assert states.abstract(tied, EXACT).trainable["llm/embed/embedding"].sharding.spec == jax.P(
            ("tensor",), ("fsdp",)
        )

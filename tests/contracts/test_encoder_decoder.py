"""The contracts for an encoder-decoder: any mesh, any attention, one compilation, resumption bit for bit, files there and back."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.contracts.test_one_compile import compilations
from tests.small_runs import EXACT, VISION, Weights, batch
from vlm_jax.config import LoRAConfig, T5Config, VLMConfig
from vlm_jax.convert import names
from vlm_jax.convert.read import open_checkpoint
from vlm_jax.convert.shards import read_directory
from vlm_jax.convert.tensors import full
from vlm_jax.convert.write import export
from vlm_jax.models import vlm
from vlm_jax.models.vlm import Compute
from vlm_jax.nn import attention_plain
from vlm_jax.nn.attention import Mask, attention, refusal
from vlm_jax.nn.dropout import dropout_key
from vlm_jax.parallel import hosts, rules
from vlm_jax.parallel.mesh import MeshConfig, make_mesh
from vlm_jax.train import state as states
from vlm_jax.train.loop import train
from vlm_jax.train.metrics import read_metrics
from vlm_jax.train.options import LORA, STAGE1
from vlm_jax.train.step import batch_shardings, loss_and_gradients, split_micro_batches

T5 = T5Config(
    vocab=64, width=32, mlp=64, encoder_layers=2, decoder_layers=2, heads=4, head_dim=12, buckets=8, max_distance=16
)
MODEL = VLMConfig(vision=VISION, llm=T5)
ORIGINAL = dataclasses.replace(MODEL, llm=dataclasses.replace(T5, gated=False, act="relu", tie=True))
ANSWERS = 16  # answer slots of a row


def with_answers(rows, seed=0):
    """Rows of small_runs, every sample with an answer of one to four tokens, the last of which is T5's EOS."""
    rng, made = np.random.default_rng(seed), dict(rows)
    n = len(rows["segments"])
    for key in ("tokens", "targets", "segments", "positions"):
        made[f"answer_{key}"] = np.zeros((n, ANSWERS), np.int32)
    made["answer_weights"] = np.zeros((n, ANSWERS), np.float32)
    for r, segments in enumerate(rows["segments"]):
        at = 0
        for number in range(1, segments.max() + 1):
            said = np.append(rng.integers(2, T5.vocab, rng.integers(0, 4)), 1)
            here = slice(at, at + len(said))
            made["answer_tokens"][r, here], made["answer_targets"][r, here] = np.append(0, said[:-1]), said
            made["answer_segments"][r, here], made["answer_positions"][r, here] = number, np.arange(len(said))
            made["answer_weights"][r, here] = 1
            at += len(said)
    return made


def run_on(mesh, model=MODEL, key=None):
    """(loss, gradients, shardings) of one batch on `mesh`."""
    with rules.use(mesh):
        where = vlm.shardings(model)
        params = {k: jax.device_put(v, where[k]) for k, v in Weights(model).arrays.items()}
        chosen = states.select(EXACT.trainable, params)
        trainable, frozen = ({k: v for k, v in params.items() if (k in chosen) == side} for side in (True, False))
        rows = split_micro_batches(with_answers(batch(0)), 1)
        arrays = hosts.to_devices(rows, batch_shardings({k: v.shape for k, v in rows.items()}))
        step = jax.jit(functools.partial(loss_and_gradients, model, EXACT))
        grads, sums = step(trainable, frozen, arrays, key)
        return float(sums["loss"]), grads, where


@functools.cache
def one_device(drops):
    loss, grads, _ = run_on(make_mesh(MeshConfig(fsdp=1), jax.devices()[:1]), key=jax.random.key(1) if drops else None)
    return loss, {k: np.asarray(g) for k, g in grads.items()}


@pytest.mark.parametrize("drops", [pytest.param(False, marks=pytest.mark.long), True], ids=["plain", "dropout"])
@pytest.mark.parametrize(
    "mesh",
    [pytest.param(MeshConfig(fsdp=4, tensor=2), marks=pytest.mark.long), MeshConfig(fsdp=2, tensor=2, seq=2)],
    ids=["fsdp4_tensor2", "seq2"],
)
def test_loss_and_gradients_do_not_depend_on_the_mesh(mesh, drops):
    loss, grads, where = run_on(make_mesh(mesh, jax.devices()[:8]), key=jax.random.key(1) if drops else None)
    wanted_loss, wanted = one_device(drops)
    assert abs(loss - wanted_loss) < 1e-5
    for path, gradient in grads.items():
        np.testing.assert_allclose(np.asarray(gradient), wanted[path], atol=2e-5, err_msg=path)
        assert gradient.sharding.is_equivalent_to(where[path], gradient.ndim), path
    assert drops == (abs(one_device(True)[0] - loss) < 1e-5), "dropout changes the loss"


def test_chunked_attention_with_diagonals_equals_dense(monkeypatch):
    """The bias by diagonals against the same bias written out, and its gradient."""
    monkeypatch.setattr(attention_plain, "CHUNK", 8)
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v = (jax.random.normal(key, (2, n, 4, 8)) for key, n in zip(keys, (24, 40, 40)))
    diagonals = jax.random.normal(keys[3], (4, 24 + 40 - 1))
    index = np.arange(40)[None, :] - np.arange(24)[:, None] + 23
    segments = jnp.ones((2, 24), int), jnp.asarray(np.repeat([[1] * 30 + [0] * 10], 2, 0))

    def run(impl, diagonals, spread):
        mask = Mask(False, None, *segments, bias=spread, diagonals=diagonals)
        return (attention(q, k, v, mask, impl, scale=1.0) ** 2).sum()

    wanted = run("dense", None, diagonals[:, index][None])
    for impl in ("dense", "chunked"):
        np.testing.assert_allclose(run(impl, diagonals, None), wanted, rtol=1e-5)
    by_hand = jax.grad(lambda d: run("dense", None, d[:, index][None]))(diagonals)
    np.testing.assert_allclose(jax.grad(lambda d: run("chunked", d, None))(diagonals), by_hand, atol=1e-4)
    for impl in ("cudnn", "splash"):
        half = tuple(jnp.bfloat16(x) for x in (q, k, v))
        assert "diagonals" in refusal(impl, *half[:2], Mask(diagonals=diagonals))


@pytest.mark.parametrize("impl", ["dense", "chunked"])
def test_dropped_weights_keep_their_mean(impl, monkeypatch):
    """With every value 1 a row gives the kept share over 1 - rate: 1 on average, and not 1 where something is dropped."""
    monkeypatch.setattr(attention_plain, "CHUNK", 16)
    q, ones = jax.random.normal(jax.random.key(0), (4, 64, 2, 8)), jnp.ones((4, 64, 2, 8))
    mask = Mask(drop=0.25, place=3)
    np.testing.assert_allclose(attention(q, q, ones, mask, impl), 1, rtol=1e-5)
    with dropout_key(jax.random.key(0)):
        out = np.asarray(attention(q, q, ones, mask, impl))[..., 0]
    assert abs(out.mean() - 1) < 0.05 and out.std() > 0.05
    assert len(np.unique(out[:, ::16].round(6))) > 16, "parts of a row must draw differently"


@pytest.mark.long
def test_remat_does_not_change_what_is_dropped():
    key = jax.random.key(3)
    model = dataclasses.replace(MODEL, llm=dataclasses.replace(T5, dropout=0.2))
    params = {k: jnp.asarray(v) for k, v in Weights(model).arrays.items()}
    rows = split_micro_batches(with_answers(batch(1, rows=2)), 1)
    chosen = states.select(STAGE1, params)
    trainable, frozen = ({k: v for k, v in params.items() if (k in chosen) == side} for side in (True, False))
    found = []
    for remat in ("none", "full"):
        config = dataclasses.replace(EXACT, remat=remat)
        found.append(jax.jit(functools.partial(loss_and_gradients, model, config))(trainable, frozen, rows, key))
    assert float(found[0][1]["loss"]) == pytest.approx(float(found[1][1]["loss"]), abs=1e-6)
    for path, gradient in found[0][0].items():
        np.testing.assert_allclose(gradient, found[1][0][path], atol=1e-5, err_msg=path)


class Rows:
    """Batches of a few rows, each a function of its step, with the state that a checkpoint keeps."""

    def __init__(self, start, state):
        assert state is None or state["step"] == start
        self.step, self.seen = start, []

    def __iter__(self):
        return self

    def __next__(self):
        self.step += 1
        return self.step - 1, with_answers(batch(self.step - 1, rows=2), self.step)

    def state(self):
        return {"step": self.step}


@pytest.mark.long
def test_a_run_that_goes_on_is_the_run_that_was_not_stopped(tmp_path):
    """Dropout included: its masks depend on the step alone. Rows of different contents compile the step once."""
    config = dataclasses.replace(EXACT, trainable=STAGE1, global_batch=2, save_every=3, log_every=1)
    asked = []

    def watched(start, state):
        for item in Rows(start, state):
            asked.append(len(found))
            yield item

    def run(folder, steps, batches):
        mesh = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
        how = dataclasses.replace(config, steps=steps, schedule="constant", warmup_steps=0)
        return train(how, MODEL, batches, folder, mesh=mesh, source=Weights(MODEL), progress=False)

    with compilations() as found:
        run(tmp_path / "whole", 9, watched)
    assert 0 < asked[5] == asked[-1]
    run(tmp_path / "parts", 3, Rows)
    run(tmp_path / "parts", 9, Rows)
    curves = [
        [(m["step"], m["loss"], m["grad_norm"]) for m in read_metrics(tmp_path / part)] for part in ("whole", "parts")
    ]
    assert curves[0] == curves[1] and len(curves[0]) == 9


def contents(directory):
    """{key: (dtype, shape, bytes)} of a model directory."""
    found = read_directory(directory)
    return {name: (str(t.dtype), t.shape, t.read(full(t.shape)).tobytes()) for name, t in found.items()}


@pytest.mark.parametrize("model", [MODEL, ORIGINAL], ids=["flan", "original"])
def test_files_there_and_back(model, tmp_path):
    """Byte for byte, in one file and in several; aliases of the embedding may be there, or one of them in its place."""
    params = Weights(model).arrays
    export(tmp_path / "a", model, params, max_shard=30_000)
    read = open_checkpoint(tmp_path / "a")
    assert dataclasses.replace(read.config, vision=model.vision) == model and read.naming == "clip_t5"
    for path, value in params.items():
        np.testing.assert_array_equal(read.read(path), value, err_msg=path)
    export(tmp_path / "b", read.config, read.leaves, names="source", source=read)
    export(tmp_path / "c", read.config, read.leaves, source=read)
    assert contents(tmp_path / "a") == contents(tmp_path / "b") == contents(tmp_path / "c")

    from safetensors.numpy import load_file, save_file

    tensors = load_file(tmp_path / "b" / "model.safetensors")
    save_file(
        {**tensors, **dict.fromkeys(names.ALIASES, tensors["shared.weight"])}, tmp_path / "b" / "model.safetensors"
    )
    tensors["encoder.embed_tokens.weight"] = tensors.pop("shared.weight")
    save_file(tensors, tmp_path / "c" / "model.safetensors")
    for copy in ("b", "c"):
        again = open_checkpoint(tmp_path / copy)
        assert set(again.leaves) == set(params)
        np.testing.assert_array_equal(again.read("llm/embed/embedding"), params["llm/embed/embedding"])


@pytest.mark.parametrize("model", [MODEL, ORIGINAL], ids=["flan", "original"])
def test_transformers_loads_the_t5_of_an_export(model, tmp_path):
    """With equal logits, although its config classes would tie the head; a FLAN-T5 that it saves again is read as it is."""
    torch = pytest.importorskip("torch")
    from transformers import T5ForConditionalGeneration

    params = Weights(model).arrays
    export(tmp_path / "ours", model, params)
    theirs = T5ForConditionalGeneration.from_pretrained(tmp_path / "ours").eval()
    rng = np.random.default_rng(0)
    ids, said = rng.integers(2, T5.vocab, (2, 40)), rng.integers(2, T5.vocab, (2, 9))
    with torch.no_grad():
        wanted = theirs(input_ids=torch.tensor(ids), decoder_input_ids=torch.tensor(said)).logits.numpy()
    rows = {"tokens": ids, "segments": np.ones_like(ids), "answer_tokens": said, "answer_segments": np.ones_like(said)}

    def logits(params):
        net = vlm.build(model, params)
        return net.logits(vlm.forward(net, rows, Compute()))

    np.testing.assert_allclose(jax.jit(logits)(params), wanted, atol=2e-4)
    theirs.save_pretrained(tmp_path / "theirs")
    again = open_checkpoint(tmp_path / "theirs", partial=True)
    assert again.config.llm == model.llm
    for path in (path for path in params if path.startswith("llm/")):
        np.testing.assert_array_equal(again.read(path), params[path], err_msg=path)


def test_adapters_reach_every_linear_of_t5():
    """Seven in an encoder block and eleven in a decoder block, both halves trained; an adapter that is still zero changes nothing."""
    adapted = dataclasses.replace(MODEL, lora=(LoRAConfig(("^llm/(encoder|decoder)/blocks/",), 2),))
    base, params = Weights(MODEL).arrays, Weights(adapted).arrays
    params = {path: 0 * value if path.endswith("lora_b") else base.get(path, value) for path, value in params.items()}
    assert len(states.select(LORA[:1], params)) == 2 * (7 + 11)
    rows = with_answers(batch(0, rows=2))
    plain, same = (
        jax.jit(lambda p, c=config: vlm.forward(vlm.build(c, p), rows))(p)
        for config, p in ((MODEL, base), (adapted, params))
    )
    np.testing.assert_allclose(plain, same, atol=1e-6)

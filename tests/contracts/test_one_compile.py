"""An epoch of rows with and without images, packed and not, compiles the step once; switching adapters compiles nothing."""

import contextlib
import dataclasses

import jax
import numpy as np
from jax import monitoring

from tests import tiny_adapters
from tests.small_runs import EXACT, MODEL, Weights, batch
from vlm_jax.generate.decode import Decoding
from vlm_jax.generate.load import load_model
from vlm_jax.parallel.mesh import MeshConfig, make_mesh
from vlm_jax.train.loop import train
from vlm_jax.train.metrics import read_metrics
from vlm_jax.train.options import STAGE1


@contextlib.contextmanager
def compilations():
    """List that grows by one name per XLA compilation."""
    found = []

    def note(event, duration, **_):
        if "backend_compile" in event:
            found.append(event)

    monitoring.register_event_duration_secs_listener(note)
    try:
        yield found
    finally:
        monitoring.unregister_event_duration_listener(note)


def test_an_epoch_of_mixed_rows_compiles_once(tmp_path):
    made = [batch(step, rows=2) for step in range(12)]
    contents = {(m["segments"].max(), np.count_nonzero(m["image_slots"] >= 0)) for m in made}
    assert len(contents) > 4, "the batches of this test must differ in what they hold"
    config = dataclasses.replace(EXACT, trainable=STAGE1, global_batch=2, steps=12, log_every=3, save_every=100)
    asked = []  # compilations so far, each time a batch is read

    def watched(start, state):
        for step, rows in enumerate(made):
            asked.append(len(found))
            yield step, rows

    with compilations() as found:
        mesh = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
        result = train(config, MODEL, watched, tmp_path, mesh=mesh, source=Weights(), progress=False)
    assert result.status == "finished" and result.step == 12
    # two batches are read ahead of the first update, so the sixth is read when the step has long been
    # compiled
    assert 0 < asked[5] == asked[-1]


def test_a_profile_and_one_line_per_update(tmp_path):
    config = dataclasses.replace(EXACT, trainable=STAGE1, global_batch=2, steps=5, log_every=4, profile=(2, 3))
    mesh = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    made = [(step, batch(step, rows=2)) for step in range(5)]
    result = train(
        config, MODEL, lambda start, state: iter(made), tmp_path, mesh=mesh, source=Weights(), progress=False
    )
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert ["tokens_per_second" in line for line in lines] == [
        False,
        True,
        False,
        True,
        True,
    ]  # save_every and log_every
    assert result.rates["tokens_per_second"] > 0 and "mfu" not in result.rates
    assert sum(line["tokens"] for line in lines) == sum(rows["weights"].sum() for _, rows in made)


def test_switching_adapters_compiles_nothing(tmp_path):
    where, _ = tiny_adapters.write(tmp_path)
    loaded = load_model(where["model"], adapters={name: str(where[name]) for name in ("a", "b")})
    generator, how = loaded.generator(batch_size=2), Decoding(4)
    prompts = [loaded.prompt("What is it?"), loaded.prompt("Is it a cat?")]
    mixtures = [{"a": 1.0}, {"a": 0.5, "b": 0.5}, {}, {"b": 1.0}, {"b": 0.5, "a": 1.5}]
    for weights in mixtures[:2]:  # a first answer compiles the programs, a first mixture the sums over the projector
        generator.use(weights)
        generator.tokens(prompts, how)
    with compilations() as found:
        answers = []
        for weights in mixtures:
            generator.use(weights)
            answers.append(generator.tokens(prompts, how))
    assert not found, "choosing another adapter must only change values"
    assert len({str(answer) for answer in answers}) > 2

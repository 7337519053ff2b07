"""Several adapters on one base at generation: each alone, mixed, none; on a quantised base; by flags; and wrong names."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny_adapters
from vlm_jax.__main__ import main
from vlm_jax.config import ConfigError, LoRAConfig, UserError
from vlm_jax.convert.write_adapter import export_adapter
from vlm_jax.generate.adapters import adapter_flags, named_weights
from vlm_jax.generate.chat import Conversation
from vlm_jax.generate.decode import Decoding
from vlm_jax.generate.load import load_model
from vlm_jax.models import vlm
from vlm_jax.models.adapters import side_by_side
from vlm_jax.nn import quantise


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return tiny_adapters.write(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def loaded(folders):
    where, _ = folders
    return load_model(where["model"], adapters={name: str(where[name]) for name in ("a", "b")})


def logits(config, params):
    """Of a row with an image, [T, V]."""
    rng, features = np.random.default_rng(0), config.vision.features
    slots = np.full((1, features + 12), -1)
    slots[0, 3 : 3 + features] = np.arange(features)
    rows = {
        "tokens": rng.integers(3, 20, slots.shape), "image_slots": slots, "segments": np.ones_like(slots),
        "positions": np.arange(slots.shape[1])[None],
    }  # fmt: skip
    rows = {key: jnp.asarray(x, jnp.int32) for key, x in rows.items()}
    rows["images"] = jnp.asarray(rng.integers(0, 256, (1, 1, 12, 12, 3)), jnp.uint8)
    return np.asarray(program(config)(params, rows)[0])


@functools.cache
def program(config):
    def run(params, rows):
        model = vlm.build(config, params)
        return model.logits(vlm.forward(model, rows))

    return jax.jit(run)


@pytest.mark.parametrize(
    "weights", [{}, {"a": 1.0}, {"b": 1.0}, {"a": 0.5, "b": 0.5}, {"a": 2.0, "b": -1.0}, {"b": 0.3}], ids=str
)
def test_a_mixture_is_the_sum_of_the_merged_adapters(loaded, folders, weights):
    _, made = folders
    base = dataclasses.replace(loaded.config, lora=())
    wanted = logits(base, {path: jnp.asarray(x) for path, x in tiny_adapters.merged(made, weights).items()})
    mixed = loaded.use(weights)
    np.testing.assert_allclose(logits(mixed.config, mixed.params), wanted, atol=1e-4, rtol=1e-4)


def test_the_first_adapter_is_used_unless_said_otherwise(loaded, folders):
    where, _ = folders
    alone = load_model(where["a"])  # an adapter directory is opened on the base that it names
    assert alone.config.lora and alone.adapters is None
    np.testing.assert_allclose(logits(loaded.config, loaded.params), logits(alone.config, alone.params), atol=1e-5)
    assert loaded.adapters.names == ("a", "b")
    bare = load_model(where["model"], adapters={"a": str(where["a"])}, use={})
    plain = load_model(where["model"])
    np.testing.assert_array_equal(logits(bare.config, bare.params), logits(plain.config, plain.params))
    for path, value in plain.params.items():
        np.testing.assert_array_equal(bare.params[path], value, err_msg=path)


def test_a_quantised_base_answers_with_adapters(folders):
    where, made = folders
    found = load_model(where["model"], adapters={"a": str(where["a"])}, quant="int8")
    assert found.params["llm/blocks/attn/q/kernel_int8"].dtype == jnp.int8
    params = tiny_adapters.merged(made, {"a": 1.0})
    quant, base = found.config.quant, made["b"][1]
    for path in base:
        if path.startswith("llm/blocks/") and path.endswith("/kernel"):
            codes = quantise.quantise(base[path][0], quant)
            params[path] = params[path] - base[path] + quantise.dequantise(codes, quant, np.float32, np)[None]
    wanted = logits(
        dataclasses.replace(found.config, lora=(), quant=None), {p: jnp.asarray(x) for p, x in params.items()}
    )
    np.testing.assert_allclose(logits(found.config, found.params), wanted, atol=1e-4, rtol=1e-4)


def test_the_command_line_and_the_conversation(folders, loaded, capsys):
    where, _ = folders
    flags = ["--model", str(where["model"]), "--prompt", "What is it?", "--max_new_tokens", "6"]
    adapters = [f"--adapter={name}={where[name]}" for name in ("a", "b")]
    said = []
    for more in ([], adapters, [*adapters, "--use=b"], [*adapters, "--use=base"]):
        assert main(["generate", *flags, *more]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[3] != said[1] and said[1] != said[2]
    talk = Conversation(loaded, loaded.generator(batch_size=1), Decoding(6))
    for use, wanted in (([], said[1]), (["b"], said[2]), (["base"], said[0])):
        talk.clear()
        talk.use(use)
        assert talk.ask("What is it?", lambda piece: None).strip() == wanted.strip()


def test_flags():
    assert adapter_flags([], []) == {"adapters": {}, "use": {}}
    assert adapter_flags(["a=x", "b=y=z"], ["b", "a:0.25"]) == {
        "adapters": {"a": "x", "b": "y=z"},
        "use": {"b": 1.0, "a": 0.25},
    }
    assert adapter_flags(["a=x", "b=y"], [])["use"] == {"a": 1.0} and named_weights(["base"], ("a",)) == {}
    for wrong in ("a", "=x", "a=", "base=x"):
        with pytest.raises(ConfigError, match=f"--adapter={wrong} must be NAME=DIR"):
            adapter_flags([wrong], [])
    with pytest.raises(ConfigError, match="'c' is no adapter: there are a, and --adapter NAME=DIR adds one"):
        adapter_flags(["a=x"], ["c"])
    with pytest.raises(ConfigError, match="a:much has no number after the colon"):
        adapter_flags(["a=x"], ["a:much"])


def test_wrong_names_and_wrong_bases(loaded, folders, tmp_path):
    where, made = folders
    with pytest.raises(ConfigError, match="there is no adapter 'c': there are a, b"):
        loaded.use({"c": 1.0})
    with pytest.raises(ConfigError, match="loaded without adapters"):
        load_model(where["model"]).use({"a": 1.0})
    with pytest.raises(UserError, match="is an adapter too"):
        load_model(where["a"], adapters={"b": str(where["b"])})
    other = dataclasses.replace(made["b"][0], aspect="square")
    export_adapter(tmp_path / "square", other, made["b"][1], base=where["model"])
    with pytest.raises(UserError, match="a and c were trained with other image settings .*aspect 'pad' and 'square'"):
        load_model(where["model"], adapters={"a": str(where["a"]), "c": str(tmp_path / "square")})


def test_side_by_side():
    groups = side_by_side({"llm/blocks/attn/q": 5, "llm/blocks/attn/k": 3, "tower/blocks/attn/q": 5})
    assert groups == (
        LoRAConfig(("^llm/blocks/attn/k$",), 3, 3.0),
        LoRAConfig(("^llm/blocks/attn/q$", "^tower/blocks/attn/q$"), 5, 5.0),
    )
    assert all(group.scale == 1 for group in groups)

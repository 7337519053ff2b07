"""RQ- and HQ-Transformers in files: every kind back as it came, containers, config.yaml, and files that are none."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import yaml

from tests.tiny_hierarchies import KINDS, params_of
from vlm_jax.config import ConfigError
from vlm_jax.convert import torch_pickle
from vlm_jax.convert.hierarchical_prior import config_of, load_prior
from vlm_jax.convert.tensors import CheckpointError
from vlm_jax.visual_tokenizers.priors import hierarchy_names
from vlm_jax.visual_tokenizers.priors.hierarchy_options import PUBLISHED_HQ, PUBLISHED_RQ

BLOCK = {"n_head": 24}
RQ = {
    "dataset": {"vocab_size": 16384},
    "arch": {
        "type": "rq-transformer", "block_size": [8, 8, 4], "embed_dim": 1536, "input_embed_dim": 256, "shared_tok_emb": True,
        "shared_cls_emb": True, "input_emb_vqvae": True, "head_emb_vqvae": True, "cumsum_depth_ctx": True,
        "vocab_size_cond": 1000, "block_size_cond": 1, "body": {"n_layer": 12, "block": BLOCK}, "head": {"n_layer": 4, "block": BLOCK},
    },
}  # fmt: skip
HPARAMS = {
    "embed_dim": 1536, "embedding_type": "transformer1", "n_layers": 12, "n_heads": 24, "ctx_len_img": 256, "resid_pdrop": 0.1,
    "n_classes": 1000,
}  # fmt: skip
HQ = {
    "dataset": {"image_resolution": 256},
    "stage1": {"type": "simrqgan2", "hparams": {"ch_mult": [1, 2, 4, 4], "use_init_downsample": True}},
    "stage2": {"type": "hq-transformer/parallel", "use_cls_cond": True, "vocab_size_img": 8192, "hparams": HPARAMS},
}


def stage2(**changes):
    return {**HQ, "stage2": {**HQ["stage2"], **changes}}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_comes_back_under_names_of_its_own(kind):
    config, params = KINDS[kind], params_of(KINDS[kind])
    written = hierarchy_names.write(config, params)
    keys = [entry.key for entry in hierarchy_names.entries(config)]
    assert len(keys) == len(set(keys)) == len(written.keys() - {hierarchy_names.OFFSETS})
    again = hierarchy_names.read(config, written)
    assert again.keys() == params.keys()
    for path, value in params.items():
        np.testing.assert_array_equal(again[path], value, err_msg=path)


def test_names_of_three_levels_and_of_heads_per_depth():
    three = {entry.key: entry.shape for entry in hierarchy_names.entries(PUBLISHED_HQ["imagenet_level3"])}
    assert three["tok_emb_levels.2.weight"] == (8192, 1536) == three["tok_emb_depth_levels.2.weight"]
    assert (three["pos_emb_depths.0.weight"][0], three["pos_emb_depths.1.weight"][0]) == (4, 16)
    assert three["sos_depth"] == (1, 1, 1536) and three["head_levels.0.weight"] == (8192, 1536)
    apart = hierarchy_names.write(KINDS["rq_apart"], params_of(KINDS["rq_apart"]))
    assert apart["classifier.linear.weight"].shape == (2, 16, 12) and apart["tok_emb.weight"].shape == (24, 16)
    np.testing.assert_array_equal(apart[hierarchy_names.OFFSETS], [0, 12])


@pytest.mark.parametrize(("settings", "name"), [(RQ, "imagenet_480m"), (HQ, "imagenet_s")])
def test_published_settings_give_the_published_configs(settings, name):
    assert config_of(settings) == (PUBLISHED_RQ | PUBLISHED_HQ)[name]


def test_other_published_settings():
    deep = {**HPARAMS, "n_layers": 6}
    assert config_of(stage2(hparams={**HPARAMS, "n_layers": 42}, hparams_dec=deep)) == PUBLISHED_HQ["imagenet_l"]
    assert config_of(stage2(type="hq-transformer")) == PUBLISHED_HQ["imagenet_top2bot"]
    assert config_of(stage2(type="hq-transformer/bidirectional4")) == PUBLISHED_HQ["imagenet_bidirectional"]
    three = stage2(type="multilevel-hq", decoding_type="parallel-add", vocab_sizes_img=[8192] * 3)
    three["stage1"] = {"hparams": {"ch_mult": [1, 2, 4], "use_init_downsample": True}}
    assert config_of(three) == PUBLISHED_HQ["imagenet_level3"]
    text = {"use_cls_cond": False, "use_txt_cond": True, "weight_txt": 0.1, "weight_img": 0.9}
    found = config_of(stage2(**text, hparams={**HPARAMS, "ctx_len_img": 64}))
    assert found == PUBLISHED_HQ["cc15m"]


def _save(path, value):
    torch = pytest.importorskip("torch")
    torch.save({k: {n: torch.from_numpy(x.copy()) for n, x in v.items()} for k, v in value.items()}, path)


def test_rq_with_its_moving_average(tmp_path):
    config = KINDS["rq"]
    tensors = hierarchy_names.write(config, params_of(config))
    _save(tmp_path / "model.pt", {"state_dict": tensors, "state_dict_ema": {k: v + 1 for k, v in tensors.items()}})
    for averaged in (False, True):
        found, params = load_prior(tmp_path / "model.pt", config, averaged)
        assert found == config
        for path, value in params_of(config).items():
            np.testing.assert_array_equal(params[path], np.asarray(value) + averaged, err_msg=path)


def test_hq_beside_its_tokenizer_with_settings_above(tmp_path):
    config = KINDS["hq_three"]
    tensors = hierarchy_names.write(config, params_of(config))
    state = {f"stage2.{k}": v for k, v in tensors.items()} | {
        "stage1.encoder.conv_in.weight": np.zeros((2, 3), np.float32)
    }
    (tmp_path / "ckpt").mkdir()
    _save(tmp_path / "ckpt/last.ckpt", {"state_dict": state})
    h = {"embed_dim": 16, "n_heads": 2, "n_layers": 1, "embedding_type": "transformer1", "ctx_len_img": 4}
    h |= {"resid_pdrop": 0.1, "n_classes": 5}
    settings = {
        "dataset": {"image_resolution": 32},
        "stage1": {"hparams": {"ch_mult": [1, 2, 4]}},
        "stage2": {
            "type": "multilevel-hq", "decoding_type": "parallel-add", "use_cls_cond": True, "vocab_sizes_img": [9, 12, 10],
            "hparams": h, "hparams_dec": {**h, "n_heads": 4},
        },
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    found, params = load_prior(tmp_path / "ckpt/last.ckpt")
    assert found == config
    np.testing.assert_array_equal(params["head_position_1/embedding"], params_of(config)["head_position_1/embedding"])


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, "it is of no RQ-Transformer (arch.type: rq-transformer) and of no HQ-Transformer (stage2)"),
        (stage2(type="top"), "stage2.type=top is of no HQ-Transformer that is known"),
        (stage2(type="hq-transformer/parallel16"), "stage2.type=hq-transformer/parallel16 is of no HQ-Transformer"),
        (stage2(type="multilevel-hq", decoding_type="tree"), "stage2.decoding_type=tree cannot be read"),
        (stage2(ratio_bot2top=16), "stage2.ratio_bot2top=16 cannot be read"),
        (stage2(hparams={**HPARAMS, "use_random_order": True}), "stage2.hparams.use_random_order cannot be read"),
        (
            {"arch": {**RQ["arch"], "vocab_size": [4, 5, 6, 7]}},
            "codebooks of different sizes ([4, 5, 6, 7]) cannot be read",
        ),
    ],
)
def test_settings_that_cannot_be_read(settings, says):
    with pytest.raises(ConfigError) as error:
        config_of(settings)
    assert says in str(error.value)


class Evil:
    def __reduce__(self):
        return exec, ("raise SystemExit",)


def test_files_that_are_none(tmp_path):
    config, file = KINDS["rq"], tmp_path / "model.pt"
    tensors = hierarchy_names.write(config, params_of(config))

    def says(value, sentence, config=config, averaged=False):
        if value is not None:
            torch_pickle.save(file, value)
        with pytest.raises(CheckpointError) as error:
            load_prior(file, config, averaged)
        assert sentence in str(error.value) and "\n" not in str(error.value)

    says(None, "model.pt does not exist")
    says({k: v for k, v in tensors.items() if k != "pos_emb_d"}, "model.pt: the checkpoint has no tensor pos_emb_d")
    says(
        {**tensors, "pos_emb_d": np.zeros((2, 16), np.float32)},
        "pos_emb_d has shape (2, 16), but this prior's config needs (1, 2, 16)",
    )
    says(tensors, "has no averaged weights (state_dict_ema)", averaged=True)
    says(tensors, "model.pt has no config.yaml in its folder or the one above", None)
    (tmp_path / "config.yaml").write_text("arch: {type: rq-transformer, block_size: [2, 3, 2]}")
    says(tensors, "config.yaml does not say vocab_size, which the config of a prior needs", None)
    (tmp_path / "config.yaml").write_text("arch: [")
    says(tensors, "config.yaml is not readable YAML", None)
    file.write_bytes(pickle.dumps({"state_dict": Evil()}))
    says(None, "model.pt holds the Python object builtins.exec, not only tensors")

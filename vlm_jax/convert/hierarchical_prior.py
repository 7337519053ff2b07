"""RQ- and HQ-Transformers of their original programs: a weight file, and the config.yaml that their training left beside it.

    RQ   model.pt        {"state_dict": {...}, "state_dict_ema": {...}}     arch: {type: rq-transformer, block_size, body, head ...}
    HQ   ckpt/last.ckpt  {"state_dict": {"stage1.*", "stage2.*"}}           stage1: {...}, stage2: {type, hparams, hparams_dec ...}

Torch files are read without torch, and no code in them is run. What config.yaml does not say is as in the original programs.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from vlm_jax.config import ConfigError
from vlm_jax.convert.tensors import CheckpointError, Tensor, full
from vlm_jax.convert.torch_pickle import load
from vlm_jax.visual_tokenizers.priors import hierarchy_names
from vlm_jax.visual_tokenizers.priors.hierarchy_options import HQTransformerConfig, RQTransformerConfig, StackConfig
from vlm_jax.visual_tokenizers.priors.models import Config

Settings = Mapping[str, Any]


def load_prior(
    path: str | os.PathLike, config: Config | None = None, averaged: bool = False
) -> tuple[Config, dict[str, np.ndarray]]:
    """(config, float32 parameters) of a weight file. config: where there is no config.yaml in its folder or the one above.

    averaged: RQ's moving average of the weights. CheckpointError in one sentence: no prior, an absent tensor or one of another
    shape, a file that would run code.
    """
    path = Path(path)
    if config is None:
        config = _config_beside(path)
    found = load(path, objects=True)
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{path} is not the checkpoint of a prior: it holds no state dict")
    try:
        state = hierarchy_names.unwrapped(found, config, averaged)
        wanted = {entry.key for entry in hierarchy_names.entries(config)}
        tensors = {key: x.read(full(x.shape)) for key, x in state.items() if key in wanted and isinstance(x, Tensor)}
        return config, hierarchy_names.read(config, tensors)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error


def weight_file(folder: Path) -> Path | None:
    """The weight file of an original program's folder, told by its config.yaml; None where there is none."""
    if not (folder / "config.yaml").is_file():
        return None
    names = ("model.pt", "ckpt/state_dict.ckpt", "ckpt/last.ckpt")
    return next((folder / name for name in names if (folder / name).is_file()), None)


def is_one(tensors: Mapping[str, Any]) -> bool:
    """Whether a state dict is of an RQ- or HQ-Transformer, by its names."""
    names = {key.removeprefix("stage2.") for key in tensors}
    return "head_transformer.blocks.0.ln1.weight" in names or {"sos_depth", "depths.0.ln1.weight"} <= names


def _config_beside(path: Path) -> Config:
    for file in (folder / "config.yaml" for folder in (path.parent, path.parent.parent)):
        if file.is_file():
            try:
                return config_of(yaml.safe_load(file.read_text(encoding="utf-8")) or {})
            except (yaml.YAMLError, ValueError, OSError) as error:
                line = " ".join(str(error).split())
                raise CheckpointError(f"{file} is not readable YAML ({line})") from error
            except KeyError as error:
                raise CheckpointError(
                    f"{file} does not say {error.args[0]}, which the config of a prior needs"
                ) from error
            except ConfigError as error:
                raise CheckpointError(f"{file}: {error}") from error
    raise CheckpointError(
        f"{path} has no config.yaml in its folder or the one above: put that of its training there, which says what it is"
    )


def config_of(settings: Settings) -> Config:
    """The config of a parsed config.yaml; KeyError of what it lacks, ConfigError in one sentence if it is of no such prior."""
    arch, stage2 = settings.get("arch"), settings.get("stage2")
    if isinstance(arch, Mapping) and arch.get("type") == "rq-transformer":
        dataset = settings.get("dataset", {})
        return rq_config({**{key: dataset[key] for key in ("vocab_size",) if key in dataset}, **arch})
    if not isinstance(stage2, Mapping):
        raise ConfigError("it is of no RQ-Transformer (arch.type: rq-transformer) and of no HQ-Transformer (stage2)")
    stage1 = settings["stage1"]["hparams"]
    halvings = len(stage1["ch_mult"]) - 1 + bool(stage1.get("use_init_downsample"))
    finest = settings.get("dataset", {}).get("image_resolution", 256) >> halvings
    if str(stage2["type"]).startswith("multilevel-hq"):
        codes = tuple(stage2.get("vocab_sizes_img", (8192,) * 3))
    else:
        codes = (stage2.get("vocab_size_img", 16384),) * 2
    return hq_config(stage2, finest >> (len(codes) - 1), codes)


def rq_config(arch: Settings) -> RQTransformerConfig:
    """RQTransformerConfig of RQ's `arch`."""
    codes = arch["vocab_size"]
    if isinstance(codes, list):
        if len(set(codes)) != 1:
            raise ConfigError(
                f"codebooks of different sizes ({codes}) cannot be read: the original samples from equal ones only"
            )
        codes = codes[0]
    stacks = {}
    for name in ("body", "head"):
        block = arch[name].get("block", {})
        gelu = {"v1": "gelu", "v2": "quick_gelu"}[block.get("gelu", "v1")]
        stacks[name] = _stack(arch["embed_dim"], block["n_head"], arch[name]["n_layer"], block, gelu, 0.1)
    *grid, depth = arch["block_size"]
    return RQTransformerConfig(
        grid=tuple(grid),
        depth=depth,
        codes=codes,
        code_width=arch.get("input_embed_dim") or arch["embed_dim"],
        conditions=max(arch.get("vocab_size_cond", 0), 1),
        condition_tokens=max(arch.get("block_size_cond", 0), 1),
        codebook_body=arch.get("input_emb_vqvae", False),
        codebook_head=arch.get("head_emb_vqvae", False),
        cumulative=arch.get("cumsum_depth_ctx", False),
        shared_tokens=arch.get("shared_tok_emb", False),
        shared_head=arch.get("shared_cls_emb", False),
        dropout=arch.get("embd_pdrop", 0.0),
        **stacks,
    )


def hq_config(stage2: Settings, grid: int, codes: tuple[int, ...]) -> HQTransformerConfig:
    """HQTransformerConfig of HQ's `stage2` for a top grid of `grid` positions to a side and codebooks of `codes` entries."""
    h = stage2["hparams"]
    deep = stage2.get("hparams_dec") or {**h, "n_layers": 4}
    kind = h["embedding_type"].rstrip("0123456789")
    if h.get("use_random_order"):
        raise ConfigError("stage2.hparams.use_random_order cannot be read: priors here draw in raster order")
    if stage2.get("ratio_bot2top", 4) != 4:
        raise ConfigError(
            f"stage2.ratio_bot2top={stage2['ratio_bot2top']} cannot be read: 4 codes lie below each top code here"
        )
    bottom = stage2.get("weight_bottom", 4.0) or 1.0
    condition = "class" if stage2.get("use_cls_cond") else "text" if stage2.get("use_txt_cond") else "none"
    stacks = {
        name: _stack(part["embed_dim"], part["n_heads"], part["n_layers"], part, _gelu(part), 0.0)
        for name, part in (("body", h), ("head", deep))
    }
    return HQTransformerConfig(
        grid=grid,
        codes=codes,
        order=_order(stage2),
        embedding=kind,
        embedding_layers=int(h["embedding_type"].removeprefix(kind) or 1),
        positions=h.get("ctx_len_img", 256),
        axes=h.get("position_embedding", "1d") == "2d",
        condition=condition,
        classes=h.get("n_classes") or 1,
        text_codes=stage2.get("vocab_size_txt", 16384),
        text_tokens=h.get("ctx_len_txt", 64),
        dropout=h.get("embd_pdrop", 0.0),
        weights=(1.0, bottom) if len(codes) == 2 else tuple(4.0**level for level in range(len(codes))),
        image_weight=stage2.get("weight_img") or 0.9,
        text_weight=stage2.get("weight_txt") or 0.1,
        **stacks,
    )


def _order(stage2: Settings) -> str:
    kind, _, mode = str(stage2["type"]).partition("/")
    if kind == "multilevel-hq":
        if stage2.get("decoding_type") != "parallel-add":
            raise ConfigError(
                f"stage2.decoding_type={stage2.get('decoding_type')} cannot be read: only parallel-add can"
            )
        return "parallel"
    found = {"": "top2bot", "top2bot": "top2bot"}.get(mode) or mode.removesuffix("4")
    if kind != "hq-transformer" or found not in ("top2bot", "parallel", "bidirectional"):
        raise ConfigError(f"stage2.type={stage2['type']} is of no HQ-Transformer that is known")
    return found


def _gelu(h: Settings) -> str:
    return "quick_gelu" if h.get("gelu_use_approx") else "gelu"


def _stack(width: int, heads: int, layers: int, block: Settings, act: str, drop: float) -> StackConfig:
    return StackConfig(
        layers,
        width,
        heads,
        act=act,
        attention_bias=block.get("attn_bias", True),
        mlp_bias=block.get("mlp_bias", True),
        dropout=block.get("resid_pdrop", drop),
        attention_dropout=block.get("attn_pdrop", 0.0),
    )

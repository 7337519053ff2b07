"""A model directory as everything that answering needs: config, parameters on their devices, tokenizer, preprocessing, template.

HF LLaVA directory, original LLaVA directory   config.json + weights + tokenizer files
adapter directory                              the adapter on the base that it names, as it was trained
run directory of ours                          the export in it

`adapters` puts several adapters on one base, to be chosen by `use`; `quant` keeps the kernels of the decoder in 4 or 8 bits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vlm_jax.config import QuantConfig, VLMConfig, one_of
from vlm_jax.convert.files import read_json
from vlm_jax.convert.merge import open_model
from vlm_jax.convert.processor_files import START_END
from vlm_jax.convert.read import Checkpoint, model_directory
from vlm_jax.convert.tokenizer_files import COPIED
from vlm_jax.data.chat_template import named_template
from vlm_jax.data.image_source import ImageSource
from vlm_jax.data.images import Preprocess, load_views
from vlm_jax.data.tasks import prompt
from vlm_jax.data.templates import Template, template, template_of_model
from vlm_jax.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from vlm_jax.generate.adapters import Switch, Weights, open_adapters, switch_of
from vlm_jax.generate.decode import Generator
from vlm_jax.generate.rows import Picture, Prompt
from vlm_jax.models import vlm
from vlm_jax.models.adapters import stored_dtype
from vlm_jax.models.placing import place
from vlm_jax.models.quantised import quantised
from vlm_jax.models.vlm import Compute
from vlm_jax.nn.quantise import is_quantised
from vlm_jax.parallel import rules
from vlm_jax.parallel.mesh import MeshConfig, make_mesh

# what a chat template says tells which of our templates it is; the order matters
_OF_CHAT_TEMPLATE = (
    ("<|im_start|>", "chatml_direct"), ("<<SYS>>", "llama_2"), ("[INST]", "mistral_instruct"), ("ASSISTANT", "v1"), ("###", "llava_v0")
)  # fmt: skip


class Loaded(NamedTuple):
    """A model directory, read: `template` is how dialogues are written for it, `eos` the ids that end an answer.

    start_end: `<im_start>` and `<im_end>` stand around images. adapters: those that `use` chooses among, None without any.
    """

    config: VLMConfig
    params: dict[str, jax.Array]
    tokenizer: Tokenizer
    preprocess: Preprocess
    template: Template
    eos: tuple[int, ...]
    start_end: bool = False
    adapters: Switch | None = None

    def use(self, weights: Weights) -> Loaded:
        """The same model with its adapters mixed by {name: weight}; {} is the base. Programs compiled for it are kept."""
        return self._replace(params=self.params | switch_of(self.adapters).values(weights))

    def picture(self, image: ImageSource) -> Picture:
        """An image file as the model sees it; ImageError names it if it is broken."""
        return Picture(*load_views(image, self.preprocess))

    def prompt(self, texts: str | Sequence[str], pictures: Sequence[Picture] = ()) -> Prompt:
        """A question, or a dialogue question, answer, ..., question; images in front of it unless the texts place `<image>`."""
        tokens = prompt(texts, self.tokenizer, self.template, images=len(pictures), start_end=self.start_end)
        return Prompt(tokens, tuple(pictures))

    @property
    def stop(self) -> tuple[str, ...]:
        """The template's separator after answers, unless it is an EOS token anyway. A T5 answer is closed by its EOS alone."""
        if self.config.encoder_decoder:
            return ()
        end = self.template.sep2 if self.template.style in ("TWO", "LLAMA_2") else self.template.sep
        return (end,) if end and self.tokenizer.id_of(end) not in self.eos else ()

    def generator(self, *, dtype: str = "", mesh: Mesh | None = None, batch_size: int = 8) -> Generator:
        """A Generator that computes in `dtype` (default: `usual_dtype`)."""
        compute = Compute(dtype=dtype or usual_dtype(), vision_dtype=dtype or usual_dtype())
        return Generator(
            self.config, self.params, self.tokenizer, compute=compute, mesh=mesh, eos=self.eos, batch_size=batch_size,
            adapters=self.adapters,
        )  # fmt: skip


def usual_dtype() -> str:
    """bfloat16 on accelerators, float32 on CPU."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def usual_mesh() -> Mesh | None:
    """All accelerators along the tensor axis, so that a decoding step moves activations and not weights; None for one device."""
    if jax.default_backend() == "cpu" or jax.device_count() == 1:
        return None
    return make_mesh(MeshConfig(data=1, fsdp=1, tensor=-1))


def load_model(
    directory: str | Path, *, dtype: str = "", mesh: Mesh | None = None, template_name: str = "", quant: str | QuantConfig = "",
    adapters: Mapping[str, str] | None = None, use: Weights | None = None,
) -> Loaded:  # fmt: skip
    """Read a model directory. dtype: of the parameters on the devices (default: `usual_dtype`); template_name: default `template_for`.

    quant: "nf4" or "int8" quantises the decoder's blocks while they are read, a QuantConfig what it names. adapters: {name: directory}
    for this model; use: which of them count, {name: weight} (default: the first). Under a mesh every device reads only its slice of
    each parameter.
    """
    one_of("--dtype", dtype or usual_dtype(), ("float32", "bfloat16"))
    directory = model_directory(directory)
    opened = open_adapters(directory, adapters) if adapters else None
    checkpoint = opened.base if opened else open_model(directory)
    config = opened.config if opened else checkpoint.config
    named = QuantConfig(quant) if isinstance(quant, str) and quant else quant
    config = dataclasses.replace(config, quant=named or None)
    home = directory if any((directory / name).is_file() for name in COPIED) else checkpoint.directory
    tokenizer = load_tokenizer(home)
    check_vocabulary(tokenizer, config.llm.vocab, str(home))
    written = template(template_name or template_for(home))
    stored = jnp.dtype(dtype or usual_dtype())
    params = place_all(checkpoint, stored, mesh, config)
    start_end = bool(checkpoint.raw.get("mm_use_im_start_end")) or START_END in _chat_template(home)
    loaded = Loaded(
        config, params, tokenizer, Preprocess.of(config), written, eos_of(checkpoint, tokenizer.eos_id), start_end
    )
    if opened is None:
        return loaded

    goals = goals_of(config, stored, mesh)

    def put(path: str, value: np.ndarray) -> jax.Array:
        return jax.device_put(np.asarray(value).astype(goals[path].dtype), goals[path].sharding)

    params |= {path: put(path, value) for path, value in opened.leaves().items()}
    switch = Switch(opened, put)
    return loaded._replace(adapters=switch).use({switch.names[0]: 1.0} if use is None else use)


def goals_of(config: VLMConfig, dtype: Any, mesh: Mesh | None) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape, dtype and sharding of every parameter on `mesh` (None: the default device), in `dtype` unless it has a type of its own."""
    with contextlib.nullcontext() if mesh is None else rules.use(mesh):
        shardings = vlm.shardings(config) or {}
    return {
        path: jax.ShapeDtypeStruct(like.shape, stored_dtype(path, dtype, like.dtype), sharding=shardings.get(path))
        for path, like in vlm.shapes(config).items()
    }


def place_all(
    checkpoint: Checkpoint, dtype: Any, mesh: Mesh | None, config: VLMConfig | None = None
) -> dict[str, jax.Array]:
    """Every parameter of an open checkpoint in `dtype` on `mesh`. config: the model it is for (default: its own), which may quantise
    kernels; adapters of that model which are not in the checkpoint are left out."""
    config = config or checkpoint.config
    source = quantised(checkpoint, config)
    return {
        path: place(source, path, goal)
        for path, goal in goals_of(config, dtype, mesh).items()
        if path in checkpoint.leaves or is_quantised(path)
    }


def template_for(directory: Path) -> str:
    """Template of a model directory: told by its chat template if it has one, else by its name as LLaVA does, else v1."""
    found = _chat_template(directory)
    told = named_template(found) or next((name for mark, name in _OF_CHAT_TEMPLATE if mark in found), None)
    by_name = template_of_model(directory.resolve().as_posix())
    return told or ("v1" if by_name == "llava_v0" else by_name)


def _chat_template(directory: Path) -> str:
    """Text of the HF chat template, "" without one."""
    if (directory / "chat_template.jinja").is_file():
        return (directory / "chat_template.jinja").read_text(encoding="utf-8")
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        if (directory / name).is_file():
            found = read_json(directory / name).get("chat_template")
            if found:
                return found if isinstance(found, str) else json.dumps(found)
    return ""


def eos_of(checkpoint: Checkpoint, tokenizer_eos: int | None = None) -> tuple[int, ...]:
    """Ids that end an answer: of generation_config.json, else config.json, else the tokenizer's."""
    file = checkpoint.directory / "generation_config.json"
    stated = read_json(file).get("eos_token_id") if file.is_file() else None
    for ids in (stated, checkpoint.tokens.get("eos_token_id"), tokenizer_eos):
        if ids is not None:
            return tuple(ids) if isinstance(ids, list) else (int(ids),)
    return ()

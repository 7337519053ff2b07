"""A model directory as everything that answering needs: config, parameters on their devices, tokenizer, preprocessing, template.

HF LLaVA directory, original LLaVA directory   config.json + weights + tokenizer files
run directory of ours                          the export in it
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from vlm_jax.config import VLMConfig, one_of
from vlm_jax.convert.files import read_json
from vlm_jax.convert.processor_files import START_END
from vlm_jax.convert.read import Checkpoint, model_directory, open_checkpoint
from vlm_jax.convert.read import load as read_parameters
from vlm_jax.data.chat_template import named_template
from vlm_jax.data.images import ImageSource, Preprocess, load_views
from vlm_jax.data.tasks import prompt
from vlm_jax.data.templates import Template, template, template_of_model
from vlm_jax.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from vlm_jax.generate.decode import Generator
from vlm_jax.generate.rows import Picture, Prompt
from vlm_jax.models import vlm
from vlm_jax.models.vlm import Compute
from vlm_jax.parallel import rules
from vlm_jax.parallel.mesh import MeshConfig, make_mesh

# what a chat template says tells which of our templates it is; the order matters
_OF_CHAT_TEMPLATE = (
    ("<|im_start|>", "chatml_direct"), ("<<SYS>>", "llama_2"), ("[INST]", "mistral_instruct"), ("ASSISTANT", "v1"), ("###", "llava_v0")
)  # fmt: skip


class Loaded(NamedTuple):
    """A model directory, read: `template` is how dialogues are written for it, `eos` the ids that end an answer.

    start_end: `<im_start>` and `<im_end>` stand around images.
    """

    config: VLMConfig
    params: dict[str, jax.Array]
    tokenizer: Tokenizer
    preprocess: Preprocess
    template: Template
    eos: tuple[int, ...]
    start_end: bool = False

    def picture(self, image: ImageSource) -> Picture:
        """An image file as the model sees it; ImageError names it if it is broken."""
        return Picture(*load_views(image, self.preprocess))

    def prompt(self, texts: str | Sequence[str], pictures: Sequence[Picture] = ()) -> Prompt:
        """A question, or a dialogue question, answer, ..., question; images in front of it unless the texts place `<image>`."""
        tokens = prompt(texts, self.tokenizer, self.template, images=len(pictures), start_end=self.start_end)
        return Prompt(tokens, tuple(pictures))

    @property
    def stop(self) -> tuple[str, ...]:
        """The template's separator after answers, unless it is an EOS token anyway."""
        end = self.template.sep2 if self.template.style in ("TWO", "LLAMA_2") else self.template.sep
        return (end,) if end and self.tokenizer.id_of(end) not in self.eos else ()

    def generator(self, *, dtype: str = "", mesh: Mesh | None = None, batch_size: int = 8) -> Generator:
        """A Generator that computes in `dtype` (default: `usual_dtype`)."""
        compute = Compute(dtype=dtype or usual_dtype(), vision_dtype=dtype or usual_dtype())
        return Generator(
            self.config, self.params, self.tokenizer, compute=compute, mesh=mesh, eos=self.eos, batch_size=batch_size
        )


def usual_dtype() -> str:
    """bfloat16 on accelerators, float32 on CPU."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def usual_mesh() -> Mesh | None:
    """All accelerators along the tensor axis, so that a decoding step moves activations and not weights; None for one device."""
    if jax.default_backend() == "cpu" or jax.device_count() == 1:
        return None
    return make_mesh(MeshConfig(data=1, fsdp=1, tensor=-1))


def load_model(directory: str | Path, *, dtype: str = "", mesh: Mesh | None = None, template_name: str = "") -> Loaded:
    """Read a model directory. dtype: of the parameters on the devices (default: `usual_dtype`); template_name: default `template_for`.

    Under a mesh every device reads only its slice of each parameter.
    """
    one_of("--dtype", dtype or usual_dtype(), ("float32", "bfloat16"))
    directory = model_directory(directory)
    checkpoint = open_checkpoint(directory)
    tokenizer = load_tokenizer(directory)
    check_vocabulary(tokenizer, checkpoint.config.llm.vocab, str(directory))
    written = template(template_name or template_for(directory))
    params = place(checkpoint, jnp.dtype(dtype or usual_dtype()), mesh)
    start_end = bool(checkpoint.raw.get("mm_use_im_start_end")) or START_END in _chat_template(directory)
    config = checkpoint.config
    return Loaded(
        config, params, tokenizer, Preprocess.of(config), written, eos_of(checkpoint, tokenizer.eos_id), start_end
    )


def place(checkpoint: Checkpoint, dtype: Any, mesh: Mesh | None) -> dict[str, jax.Array]:
    """Every parameter of an open checkpoint as `dtype` on `mesh` (or the default device)."""
    with contextlib.nullcontext() if mesh is None else rules.use(mesh):
        shardings = vlm.shardings(checkpoint.config)
    alone = SingleDeviceSharding(jax.devices()[0])

    def put(path: str, shape: tuple[int, ...], stored: np.dtype, read: Any) -> jax.Array:
        sharding = shardings[path] if shardings else alone
        return jax.make_array_from_callback(shape, sharding, lambda index: read(index).astype(dtype))

    return read_parameters(checkpoint, put)


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

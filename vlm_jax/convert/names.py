"""Which tensor of a checkpoint is which of our parameters: one table of rules, and every naming's prefixes.

    checkpoint key = prefix of its room in that naming + key of the rule
                     model.language_model.                 layers.3.mlp.up_proj.weight
    our path       = path of the rule, the layer apart     llm/blocks/mlp/up/kernel, 3

    naming     llm                   lm_head           tower and projector
    hf         language_model.model  language_model.   vision_tower.vision_model,
                                                       multi_modal_projector.linear_1
    hf_4.52    model.language_model                    the same under model.
    hf_5       model.language_model                    model.vision_tower,
                                                       model.multi_modal_projector.linear_1
    hf_5_saved language_model.model  language_model.   vision_tower, multi_modal_projector.linear_1
    llava      model                                   model.vision_tower.vision_tower.vision_model,
                                                       model.mm_projector.0
    clip_t5    (none)                lm_head.          vision_tower.vision_tower.vision_model, mm_projector.0
    parts      model, of T5 (none)   lm_head.          vision_model, mm_projector.0: see convert.parts

`hf` is what transformers 4.36 to 4.51 published and what every version since reads. Towers and language
models on their own are read too: their prefixes are those above with the leading parts left out.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from vlm_jax.config import LLMConfig, ProjectorConfig, T5Config, VisionConfig, VLMConfig
from vlm_jax.convert.tensors import AS_IS, PATCH, TRANSPOSE, VECTOR, CheckpointError, Layout

NAMINGS = {
    "hf": (
        "language_model.model.",
        "language_model.lm_head.",
        "vision_tower.vision_model.",
        "multi_modal_projector.",
        "",
    ),
    "hf_4.52": (
        "model.language_model.",
        "lm_head.",
        "model.vision_tower.vision_model.",
        "model.multi_modal_projector.",
        "model.",
    ),
    "hf_5": (
        "model.language_model.",
        "lm_head.",
        "model.vision_tower.",
        "model.multi_modal_projector.",
        "model.",
    ),
    "hf_5_saved": (
        "language_model.model.",
        "language_model.lm_head.",
        "vision_tower.",
        "multi_modal_projector.",
        "",
    ),
    "llava": (
        "model.",
        "lm_head.",
        "model.vision_tower.vision_tower.vision_model.",
        "model.mm_projector",
        "model.",
    ),
}
# of models on T5, whose table of rules is another one
T5_NAMINGS = {"clip_t5": ("", "lm_head.", "vision_tower.vision_tower.vision_model.", "mm_projector", "")}
# every part as it is named on its own, of a decoder and of T5
PART_NAMINGS = {
    "parts": ("model.", "lm_head.", "vision_model.", "mm_projector", ""),
    "parts_t5": ("", "lm_head.", "vision_model.", "mm_projector", ""),
}
ORIGINAL = ("llava", "clip_t5", *PART_NAMINGS)  # the original programs' layers of the projector: 0, 2, 4 ...
ROOMS = ("llm", "head", "tower", "projector", "newline")

# what stands before a rule's key, in any naming; `head` before `llm`, whose prefix may be empty
PREFIXES = {
    "head": re.compile(r"(?:language_model\.)?lm_head\."),
    "projector": re.compile(r"(?:base_model\.model\.)?(?:model\.){0,2}(?:multi_modal_projector|mm_projector)\.?"),
    "newline": re.compile(r"(?:model\.)?(?=image_newline$)"),
    "tower": re.compile(
        r"(?:(?:model\.)?vision_tower\.(?:vision_tower\.)?)?(?:vision_model\.)?"
        r"(?=(?:embeddings|encoder\.layers|pre_layrnorm|post_layernorm|head)\.)"
    ),
    "llm": re.compile(
        r"(?:language_model\.model\.|model\.language_model\.|model\.)?(?=(?:embed_tokens|layers|norm)\.)"
        r"|(?=(?:shared|encoder\.(?:block|final_layer_norm|embed_tokens)|decoder)\.)"
    ),
}
# buffers that old versions saved, the text half of a CLIP or SigLIP checkpoint, and a table that the first T5 had and never used
IGNORED = re.compile(
    r".*(?:position_ids|rotary_emb\.inv_freq|cos_cached|sin_cached|EncDecAttention\.relative_attention_bias\.weight)"
    r"|(?:text_model|text_projection|visual_projection)\..*|logit_.*"
)


class Rule(NamedTuple):
    """Key under its room's prefix, our path, layout, shape in letters of `sizes`, and the feature that must
    be on.
    """

    key: str
    path: str
    layout: Layout
    shape: str
    needs: str = ""


def _linear(key: str, path: str, shape: str, bias: str = "") -> tuple[Rule, Rule]:
    """A torch Linear: weight (out, in) and bias (out,); `bias` names the feature that gives it a bias ("" =
    always).
    """
    out = shape.split()[0]
    return Rule(f"{key}.weight", f"{path}/kernel", TRANSPOSE, shape, ""), Rule(
        f"{key}.bias", f"{path}/bias", AS_IS, out, bias
    )


def _norm(key: str, path: str, needs: str = "") -> tuple[Rule, Rule]:
    """A LayerNorm: weight and bias (D,)."""
    return Rule(f"{key}.weight", f"{path}/scale", AS_IS, "D", needs), Rule(
        f"{key}.bias", f"{path}/bias", AS_IS, "D", needs
    )


LAYER = "encoder.layers.{i}."
TOWER = (
    Rule("embeddings.class_embedding", "tower/cls", AS_IS, "D", "clip"),
    Rule("embeddings.patch_embedding.weight", "tower/patch/kernel", PATCH, "D C p p"),
    Rule("embeddings.patch_embedding.bias", "tower/patch/bias", AS_IS, "D", "siglip"),
    Rule("embeddings.position_embedding.weight", "tower/position", AS_IS, "N D"),
    *_norm("pre_layrnorm", "tower/pre_norm", "clip"),
    *_norm(LAYER + "layer_norm1", "tower/blocks/norm1"),
    *_linear(LAYER + "self_attn.q_proj", "tower/blocks/attn/q", "D D"),
    *_linear(LAYER + "self_attn.k_proj", "tower/blocks/attn/k", "D D"),
    *_linear(LAYER + "self_attn.v_proj", "tower/blocks/attn/v", "D D"),
    *_linear(LAYER + "self_attn.out_proj", "tower/blocks/attn/o", "D D"),
    *_norm(LAYER + "layer_norm2", "tower/blocks/norm2"),
    *_linear(LAYER + "mlp.fc1", "tower/blocks/mlp/up", "F D"),
    *_linear(LAYER + "mlp.fc2", "tower/blocks/mlp/down", "D F"),
    *_norm("post_layernorm", "tower/unused/post_norm"),
    Rule("head.probe", "tower/unused/head/probe", VECTOR, "1 1 D", "head"),
    Rule("head.attention.in_proj_weight", "tower/unused/head/attn/in/kernel", TRANSPOSE, "3D D", "head"),
    Rule("head.attention.in_proj_bias", "tower/unused/head/attn/in/bias", AS_IS, "3D", "head"),
    *(r._replace(needs="head") for r in _linear("head.attention.out_proj", "tower/unused/head/attn/out", "D D")),
    *_norm("head.layernorm", "tower/unused/head/norm", "head"),
    *(r._replace(needs="head") for r in _linear("head.mlp.fc1", "tower/unused/head/mlp/up", "F D")),
    *(r._replace(needs="head") for r in _linear("head.mlp.fc2", "tower/unused/head/mlp/down", "D F")),
)
LLM = (
    Rule("embed_tokens.weight", "llm/embed/embedding", AS_IS, "V D"),
    Rule("layers.{i}.input_layernorm.weight", "llm/blocks/norm1/scale", AS_IS, "D"),
    *_linear("layers.{i}.self_attn.q_proj", "llm/blocks/attn/q", "A D", "attention_bias"),
    *_linear("layers.{i}.self_attn.k_proj", "llm/blocks/attn/k", "K D", "attention_bias"),
    *_linear("layers.{i}.self_attn.v_proj", "llm/blocks/attn/v", "K D", "attention_bias"),
    *_linear("layers.{i}.self_attn.o_proj", "llm/blocks/attn/o", "D A", "attention_bias"),
    Rule("layers.{i}.post_attention_layernorm.weight", "llm/blocks/norm2/scale", AS_IS, "D"),
    *_linear("layers.{i}.mlp.gate_proj", "llm/blocks/mlp/gate", "F D", "mlp_bias"),
    *_linear("layers.{i}.mlp.up_proj", "llm/blocks/mlp/up", "F D", "mlp_bias"),
    *_linear("layers.{i}.mlp.down_proj", "llm/blocks/mlp/down", "D F", "mlp_bias"),
    Rule("norm.weight", "llm/norm/scale", AS_IS, "D"),
)


def _t5_attention(layer: str, name: str, path: str, norm: str) -> tuple[Rule, ...]:
    """The four projections of an attention of T5 and the norm before it."""
    projections = [(x, "A D") for x in "qkv"] + [("o", "D A")]
    return (
        *(Rule(f"{layer}.{name}.{x}.weight", f"{path}/{x}/kernel", TRANSPOSE, shape) for x, shape in projections),
        Rule(f"{layer}.layer_norm.weight", norm, AS_IS, "D"),
    )


def _t5(side: str) -> tuple[Rule, ...]:
    """The encoder or the decoder of T5."""
    blocks, block, both = f"llm/{side}/blocks", f"{side}.block.{{i}}.layer", side == "decoder"
    cross = _t5_attention(f"{block}.1", "EncDecAttention", f"{blocks}/cross", f"{blocks}/norm2/scale") if both else ()
    last, norm = (f"{block}.2", "norm3") if both else (f"{block}.1", "norm2")
    table = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    return (
        Rule(table, f"llm/{side}/relative", AS_IS, "R N"),
        *_t5_attention(f"{block}.0", "SelfAttention", f"{blocks}/attn", f"{blocks}/norm1/scale"),
        *cross,
        Rule(f"{last}.DenseReluDense.wi_0.weight", f"{blocks}/mlp/gate/kernel", TRANSPOSE, "F D", "gated"),
        Rule(f"{last}.DenseReluDense.wi_1.weight", f"{blocks}/mlp/up/kernel", TRANSPOSE, "F D", "gated"),
        Rule(f"{last}.DenseReluDense.wi.weight", f"{blocks}/mlp/up/kernel", TRANSPOSE, "F D", "ungated"),
        Rule(f"{last}.DenseReluDense.wo.weight", f"{blocks}/mlp/down/kernel", TRANSPOSE, "D F"),
        Rule(f"{last}.layer_norm.weight", f"{blocks}/{norm}/scale", AS_IS, "D"),
        Rule(f"{side}.final_layer_norm.weight", f"llm/{side}/norm/scale", AS_IS, "D"),
    )


SHARED = Rule("shared.weight", "llm/embed/embedding", AS_IS, "V D")
# other names of the same table, all of which some checkpoints have
ALIASES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "embed_tokens.weight")
T5_ENCODER, T5_DECODER = (SHARED, *_t5("encoder")), _t5("decoder")
HEAD = (Rule("weight", "llm/head/kernel", TRANSPOSE, "V D", "untied"),)
NEWLINE = (Rule("image_newline", "image_newline", AS_IS, "D", "newline"),)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor that a model of a given config has: where it lies with them (`room`, `key`, `shape`) and
    with us.
    """

    room: str
    key: str
    shape: tuple[int, ...]
    path: str
    layer: int | None
    layout: Layout

    @property
    def optional(self) -> bool:
        """Whether no computation needs it, so that a checkpoint may lack it."""
        return self.path.startswith("tower/unused/")


def entries(config: VLMConfig, rooms: Iterable[str] = ROOMS) -> list[Entry]:
    """Every tensor of a model of `config`, in the order in which it is written."""
    v, m = config.vision, config.llm
    tower = {"D": v.width, "F": v.mlp, "N": v.tokens, "C": 3, "p": v.patch_size, "3D": 3 * v.width, "1": 1}
    llm = {"V": m.vocab, "D": m.width, "F": m.mlp, "A": m.heads * m.head_dim}
    on = {"", v.kind, *(["head"] if v.pooler_head else []), *([] if m.tie else ["untied"])}
    on |= {name for name in ("attention_bias", "mlp_bias", "gated") if getattr(m, name, False)} | (
        {"newline"} if config.image_newline else set()
    )
    made = {
        "llm": lambda: _t5_entries(m, llm, on) if config.encoder_decoder else _llama_entries(m, llm, on),
        "head": lambda: _expand("head", HEAD, llm, on, 0),
        "tower": lambda: (_place(entry, v.used_layers) for entry in _expand("tower", TOWER, tower, on, v.layers)),
        "projector": lambda: _projector(config.projector, v, m),
        "newline": lambda: _expand("newline", NEWLINE, llm, on, 0),
    }
    return [entry for room in rooms for entry in made[room]()]


def _llama_entries(llm: LLMConfig, sizes: dict[str, int], on: set[str]) -> Iterator[Entry]:
    return _expand("llm", LLM, sizes | {"K": llm.kv_heads * llm.head_dim}, on, llm.layers)


def _t5_entries(llm: T5Config, sizes: dict[str, int], on: set[str]) -> Iterator[Entry]:
    sizes, on = sizes | {"R": llm.buckets, "N": llm.heads}, on | (set() if llm.gated else {"ungated"})
    yield from _expand("llm", T5_ENCODER, sizes, on, llm.encoder_layers)
    yield from _expand("llm", T5_DECODER, sizes, on, llm.decoder_layers)


def _expand(room: str, rules: Iterable[Rule], sizes: dict[str, int], on: set[str], layers: int) -> Iterator[Entry]:
    """Rules whose feature is on, layered ones once per layer."""
    for rule in rules:
        if rule.needs in on:
            shape = tuple(sizes[letter] for letter in rule.shape.split())
            layered = "{i}" in rule.key
            for i in range(layers) if layered else (None,):
                yield Entry(room, rule.key.replace("{i}", str(i)), shape, rule.path, i, rule.layout)


def _place(entry: Entry, used: int) -> Entry:
    """A tower block behind the last feature layer belongs to `tower/unused/blocks`, counted from there."""
    if entry.layer is None or entry.layer < used:
        return entry
    return dataclasses.replace(entry, path=entry.path.replace("tower/", "tower/unused/", 1), layer=entry.layer - used)


def _projector(projector: ProjectorConfig, vision: VisionConfig, llm: LLMConfig | T5Config) -> Iterator[Entry]:
    """The N linear layers; their key is `0.weight`, `1.weight`, ... and gets its naming in `key_of`."""
    for n in range(projector.depth):
        width = vision.feature_width if n == 0 else llm.width
        yield Entry("projector", f"{n}.weight", (llm.width, width), f"projector/layer_{n}/kernel", None, TRANSPOSE)
        if projector.bias:
            yield Entry("projector", f"{n}.bias", (llm.width,), f"projector/layer_{n}/bias", None, AS_IS)


def key_of(entry: Entry, naming: str, projector: str = "mlp2x_gelu") -> str:
    """The checkpoint key of an entry in `naming`; `projector` is its kind, on which LLaVA's names depend."""
    prefix = (NAMINGS | T5_NAMINGS | PART_NAMINGS)[naming][ROOMS.index(entry.room)]
    if entry.room != "projector":
        return prefix + entry.key
    n, _, rest = entry.key.partition(".")
    if naming in ORIGINAL:
        return f"{prefix}.{rest}" if projector == "linear" else f"{prefix}.{2 * int(n)}.{rest}"
    return f"{prefix}linear_{int(n) + 1}.{rest}"


def room_and_key(name: str) -> tuple[str, str] | None:
    """(room, key of the table) of a checkpoint key in any naming; None when it belongs to no room.

    >>> room_and_key("model.vision_tower.encoder.layers.0.mlp.fc1.bias")
    ('tower', 'encoder.layers.0.mlp.fc1.bias')
    >>> room_and_key("model.mm_projector.2.weight"), room_and_key("multi_modal_projector.linear_2.weight")
    (('projector', '1.weight'), ('projector', '1.weight'))
    """
    for room, prefix in PREFIXES.items():
        found = prefix.match(name)
        if found:
            rest = name[found.end() :]
            return room, _projector_key(found[0], rest) if room == "projector" else rest
    return None


def _projector_key(prefix: str, rest: str) -> str:
    """`linear_2.weight`, `2.weight` (LLaVA counts activations) or `weight` as `<layer>.<weight or bias>`."""
    if "multi_modal" in prefix:
        number = re.fullmatch(r"linear_(\d+)\.(.*)", rest)
        return f"{int(number[1]) - 1}.{number[2]}" if number else rest
    number = re.fullmatch(r"(\d+)\.(.*)", rest)
    if not number:
        return f"0.{rest}"
    return f"{int(number[1]) // 2}.{number[2]}" if int(number[1]) % 2 == 0 else rest


def naming_of(names: Iterable[str]) -> str | None:
    """Which of `NAMINGS` all of `names` agree with, None for towers or language models on their own and for
    mixtures.
    """
    seen: dict[str, set[str]] = {}
    for name in names:
        found = None if IGNORED.fullmatch(name) else room_and_key(name)
        if found:
            seen.setdefault(found[0], set()).add(PREFIXES[found[0]].match(name)[0].removesuffix("."))
    for naming, prefixes in (NAMINGS | T5_NAMINGS).items():
        expected = dict(zip(ROOMS, (prefix.removesuffix(".") for prefix in prefixes)))
        if {"llm", "projector"} <= seen.keys() and all(found == {expected[room]} for room, found in seen.items()):
            return naming
    return None


def projector_kind(names: Iterable[str]) -> str:
    """`linear` or `mlpNx_gelu`, from the keys of the projector's tensors in any naming."""
    keys = {name: key for name in names for room, key in [room_and_key(name) or ("", "")] if room == "projector"}
    depth = len({key.split(".")[0] for key in keys.values() if key.endswith(".weight")})
    if not depth:
        raise CheckpointError("there is no tensor of a projector (mm_projector or multi_modal_projector)")
    return "linear" if any(name.endswith("mm_projector.weight") for name in keys) else f"mlp{depth}x_gelu"

"""Flags of `imagine`, and those that say what a LlamaGen checkpoint does not."""

from __future__ import annotations

from vlm_jax.flag_kinds import Define, many, number, text

CHECKPOINT: tuple[Define, ...] = (
    number("grid", 0, "of a LlamaGen prior: codes per side, which its checkpoint does not tell: 16, 24, 32"),
    number("heads", 0, "of a LlamaGen prior: heads, where its size is not a published one"),
)

DRAWING: tuple[Define, ...] = (
    text(
        "prior", None, "a prior's directory, a training run of one, or an original checkpoint (LlamaGen's with --grid)"
    ),
    text("tokenizer", None, "the visual tokenizer whose codes it draws: a directory or an original checkpoint"),
    text("out", None, "folder for the pictures, grid.png and samples.json"),
    text("classes", "", "numbers of classes, e.g. 207,360"),
    many("text", "caption, for a LlamaGen prior of captions; repeat for several"),
    text("t5", "", "directory of the T5 that makes features of --text: FLAN-T5 XL for LlamaGen's"),
    text(
        "captions",
        "",
        "instead of --text: npz file with `captions` [N, S, C] and `mask` [N, S], or for RQ- and HQ-Transformers `tokens` [N, S]",
    ),
    number("count", 1, "pictures of every class or caption"),
    number(
        "scale", 0.0, "guidance away from no condition; 1 is off; default: 4 where the prior was trained for it, else 1"
    ),
    number("interval", -1, "guide only the first INTERVAL + 2 codes or positions; -1 guides all"),
    number("temperature", 1.0, "0 takes the most probable code"),
    number("top_k", 2000, "keep the k most probable codes; 0 keeps all"),
    number("top_p", 1.0, "keep the smallest set of codes with this probability"),
    number("seed", 0, "random seed"),
    number("batch", 8, "pictures drawn together"),
    text("dtype", "", "float32 or bfloat16; default: bfloat16 on accelerators, float32 on CPU"),
    *CHECKPOINT,
)

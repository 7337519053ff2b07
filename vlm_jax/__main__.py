"""The command line: `python -m vlm_jax COMMAND --flags`.

A command is a row of COMMANDS: what it does, its flags, and the function that does it, imported only when it runs, so that `--help`
answers without loading jax. Errors that a person can mend end in one sentence on stderr and exit code 2.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from ml_collections import config_flags

from vlm_jax.evaluate.image_flags import COMPARING
from vlm_jax.flag_kinds import Define, many, number, several, switch, text
from vlm_jax.generate.imagine_flags import CHECKPOINT, DRAWING

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


class Command(NamedTuple):
    """Help line, flag definitions, and "module:function" called with the flags as keyword arguments."""

    help: str
    flags: tuple[Define, ...]
    run: str


def config(f: flags.FlagValues, arguments: list[str]) -> None:
    """--config FILE.py:words and --config.any.key=value."""
    help = "recipe, e.g. configs/llava15.py:7b,stage1; any key can be overridden: --config.train.lr=1e-4"
    config_flags.DEFINE_config_file("config", None, help, flag_values=f, sys_argv=["vlm_jax", *arguments])


MODEL = text("model", None, "a LLaVA directory in HF format, or the output directory of a training run")
DTYPE = text("dtype", "", "float32 or bfloat16; default: bfloat16 on accelerators, float32 on CPU")
ADAPTERS = (
    text("quant", "", "nf4 or int8: keep the kernels of the LLM's blocks in 4 or 8 bits"),
    many("adapter", "NAME=DIR: a LoRA adapter of --model; repeat for several"),
    many("use", "adapter to answer with, NAME or NAME:WEIGHT; repeat to mix, base for none; default: the first"),
)
SAMPLING = (
    number("temperature", 0.0, "0 is greedy"),
    number("top_p", 1.0, "nucleus sampling: keep the smallest set of tokens with this probability"),
    number("top_k", 0, "keep the k most probable tokens; 0 keeps all"),
    number("max_new_tokens", 512, "longest answer"),
    number("repetition_penalty", 1.0, "above 1 makes tokens that were said less probable"),
    number("seed", 0, "random seed of sampling"),
    many("stop", "stop string; repeat for several"),
    text("template", "", "conversation template, e.g. v1; default: the one of the model"),
)

SCORING = (
    text("question", 'Does this figure show "{}"? Please answer yes or no.', "what is asked about a text {}"),
    text("answer", "Yes", "the answer whose probability is the score, as VQAScore was published"),
    text("mode", "original", "original (answer and what closes it, per token), first_token, or yes_no (against No)"),
)

PICTURES = (
    text("model", None, "a visual tokenizer: a directory that `convert` or training wrote, or an original checkpoint"),
    many("images", "folder, image file, pattern, .txt list or shards; repeat for several"),
    text(
        "crop", "", "centre_box, centre, squash, pad, or for codes also mirrored and ten; default: the tokenizer's own"
    ),
    number("size", 0, "pixels per side; default: the tokenizer's resolution"),
    number("batch", 32, "images computed at once"),
    text("dtype", "float32", "float32, or bfloat16, which is faster and changes some codes"),
)

COMMANDS: dict[str, Command] = {
    "train": Command(
        "train a model from a recipe; resumes by itself from the last checkpoint in its output directory",
        (
            config,
            text("coordinator", "", "HOST:PORT of process 0, for clusters that jax.distributed does not recognise"),
            number("process_id", -1, "index of this process, with --coordinator"),
            number("process_count", -1, "number of processes, with --coordinator"),
            number("stopped_code", 0, "exit code after SIGTERM; clusters start a job again that does not end with 0"),
            number("connect_seconds", 0.0, "how long processes wait for each other at the start; 0: 300"),
            number("heartbeat_seconds", 0.0, "how long a process may be silent before the others stop; 0: 100"),
        ),
        "vlm_jax.train.command:train",
    ),
    "imagine": Command(
        "draw pictures from a prior over the codes of a visual tokenizer, for classes or captions",
        DRAWING,
        "vlm_jax.generate.imagine:imagine",
    ),
    "plan": Command(
        "compile a recipe for chips that are not there: bytes per chip, collectives, FLOPs, the least time of a step",
        (
            config,
            text("topology", None, "v5e:16x16, v5p:2x2x4, 2xv5e:16x16 (two slices), h100:8, h200:1, ..."),
            text("mesh", "", "e.g. fsdp=64,tensor=4; default: config.mesh"),
            text(
                "step",
                "train",
                "train (of whatever the recipe trains), tokenizer (the same, of a visual tokenizer), prefill or decode",
            ),
            switch("search", "try mesh, train.accum and train.remat, and print the fastest that fits"),
            number("rows", 8, "with prefill or decode: prompts at once"),
            number("slots", 1024, "with prefill or decode: slots of a prompt"),
            number("new", 256, "with prefill or decode: room for new tokens"),
            text("out", "", "JSON file for the numbers"),
        ),
        "vlm_jax.planning.command:plan",
    ),
    "generate": Command(
        "answer prompts about images, from the command line or a LLaVA question file",
        (
            MODEL,
            DTYPE,
            *ADAPTERS,
            *SAMPLING,
            many("image", "image file; repeat for several images in one prompt"),
            text("prompt", "", "the question"),
            text("questions", "", "JSONL file of {question_id, image, text} instead of --image and --prompt"),
            text("image_folder", "", "folder of the images in --questions"),
            text("out", "", "JSONL file for the answers to --questions"),
            number("batch", 8, "questions answered at once"),
            number("beams", 1, "beam search width"),
        ),
        "vlm_jax.generate.command:generate",
    ),
    "chat": Command(
        "talk about an image in the terminal",
        (MODEL, DTYPE, *ADAPTERS, *SAMPLING, many("image", "image to talk about")),
        "vlm_jax.generate.chat:chat",
    ),
    "convert": Command(
        "read any LLaVA checkpoint, parts of one, or an adapter, and write it in another format",
        (
            text("from", "", "LLaVA checkpoint directory (HF or original), adapter directory, or training run"),
            text("to", None, "directory to write, or with --extract a file"),
            text("vision", "", "CLIP or SigLIP directory that replaces the tower"),
            text("llm", "", "Llama-family directory that replaces the LLM"),
            text("projector", "", "mm_projector.bin or safetensors that replaces the projector"),
            text("base", "", "model that the adapter or the delta weights in --from belong to"),
            switch("merge", "put the adapter into its base and write a model; without it an adapter stays one"),
            text(
                "extract",
                "",
                "projector: write only that, as a torch file; prior: that of a checkpoint with its tokenizer",
            ),
            text("delta", "", "make: write the difference of --from from --base; apply: add it to --base again"),
            text("dtype", "", "bfloat16, float16 or float32; default: as read"),
            text(
                "names",
                "",
                "tensor names to write: hf, llava (original), source (as read), parts (tower, language model and projector apart) "
                "or, for adapters, sq_llava; default: hf, and for the adapter of a run the format of its base",
            ),
            text("max_shard", "5GB", "largest weight file"),
            text("tokenizer", "", "folder whose tokenizer is written instead of the one read"),
            text("tower", "", "what an original LLaVA config.json shall name as mm_vision_tower"),
            text("config_name", "", "of a visual tokenizer: vq16, rq, hq ...; default: told by its tensors"),
            *CHECKPOINT,
        ),
        "vlm_jax.train.export:convert",
    ),
    "tokenize": Command(
        "turn images into the codes of a visual tokenizer; started again after a kill it goes on",
        (
            *PICTURES,
            text(
                "out",
                None,
                "ArrayRecord file for the codes, e.g. codes.arrayrecord; many images become numbered shards",
            ),
            number("margin", 1.1, "with --crop ten: the square that the views are cut out of, in sizes"),
            number("shard_images", 4096, "images of a shard"),
            number("threads", 8, "image readers"),
        ),
        "vlm_jax.generate.tokenize:tokenize",
    ),
    "reconstruct": Command(
        "draw images beside what a visual tokenizer's codes keep of them, with PSNR and SSIM",
        (
            *PICTURES,
            text("out", None, "folder for the pictures, index.html and metrics.json"),
            text("codes", "", "codes that `tokenize` wrote, instead of images or with the images that they are of"),
            number("limit", 64, "first images only; 0 is all"),
            switch("coarse", "also draw what the coarser levels, or the first depths, give alone"),
        ),
        "vlm_jax.evaluate.reconstruct:reconstruct",
    ),
    "evaluate": Command(
        "score a model on a benchmark, images by FID, or a visual tokenizer by its reconstructions",
        (
            text("model", "", "a LLaVA directory, a training run, or with reconstruction a visual tokenizer"),
            DTYPE,
            *ADAPTERS,
            text("task", None, "smartwatch, winoground, ..., fid or reconstruction; a wrong name lists them"),
            text("data", "", "file or folder of the benchmark; with reconstruction: smart-watches to be read back"),
            text("out", "", "JSON file for scores and answers"),
            number("batch", 16, "questions answered, or images computed, at once"),
            number("limit", 0, "first records or images only; 0 is all"),
            text(
                "history",
                "true",
                "before the later questions of a dialogue: the true answers, the model's own, or none",
            ),
            text("template", "", "conversation template; default: the one of the model"),
            *SCORING,
            *COMPARING,
        ),
        "vlm_jax.evaluate.command:evaluate",
    ),
    "score": Command(
        "score how well texts fit images (VQAScore), every text against every image",
        (
            MODEL,
            DTYPE,
            *ADAPTERS,
            many("images", "image files"),
            many("texts", "texts"),
            many("image", "the same as --images"),
            many("text", "the same as --texts"),
            *SCORING,
            text("template", "", "conversation template; default: the one of the model"),
            number("batch", 16, "pairs scored at once"),
            text("out", "", "file for the scores, .json or .csv"),
        ),
        "vlm_jax.evaluate.score_command:score",
    ),
    "data check": Command(
        "read all training data once: what is unusable and why, tokens per epoch, how full rows get",
        (
            config,
            text("out", "", "folder for check.json, bad.jsonl, lengths.png and images.png; default: OUTPUT/data"),
            text("images", "decode", "decode every image, read every header, or skip images"),
        ),
        "vlm_jax.train.data_command:check",
    ),
    "data build": Command(
        "write the usable records with their images as ArrayRecord shards, or captions as a generation task",
        (
            config,
            text("out", None, "folder to write (a .json file with --task generation)"),
            number("shards", 0, "files per source; 0 is one for every 8192 records"),
            text("format", "array_record", "array_record, or tfds for a TensorFlow Datasets folder"),
            text("flatten", "", "pairs: one record of every question and answer"),
            text("task", "", "generation: caption records become requests to draw the image"),
            number("start", 0, "with --task: first record that is taken"),
            number("count", 0, "with --task: records that are taken; 0 is all"),
            number("seed", 0, "with --task: seed of the wordings"),
            text("skip", "sam", "with --task: images below a folder of this name are left out"),
        ),
        "vlm_jax.train.data_command:build",
    ),
    "data show": Command(
        "draw samples as an HTML page: images, text, and which tokens carry loss",
        (
            config,
            number("n", 8, "samples"),
            text("out", "", "page to write; default: OUTPUT/data/show.html"),
            text("source", "", "only samples of this source"),
            number("seed", 0, "which samples"),
        ),
        "vlm_jax.train.data_command:show",
    ),
    "quickstart": Command(
        "make the smart-watch data, train a small model from nothing, evaluate, export and write a report",
        (text("out", "", "folder for everything; default: config.output"), config),
        "vlm_jax.quickstart:quickstart",
    ),
}


def usage(group: str = "") -> str:
    """The commands, a line each; group: only those of this first word."""
    listed = {name: c for name, c in COMMANDS.items() if not group or name.split()[0] == group}
    width = max(map(len, listed))
    lines = [f"  {name:<{width}}  {c.help}" for name, c in listed.items()]
    form = f"{group} COMMAND" if group else "COMMAND"
    return f"usage: python -m vlm_jax {form} [--flags]      (COMMAND --help shows its flags)\n\n" + "\n".join(lines)


def command_help(name: str, f: flags.FlagValues) -> str:
    """One command and its flags."""
    rows = []
    for flag in sorted(set(f[n] for n in f), key=lambda x: x.name):
        default = "" if flag.default in (None, "", []) else f" (default: {flag.default})"
        rows.append(f"  --{flag.name:<16} {flag.help.splitlines()[0].rstrip(';')}{default}")
    return f"python -m vlm_jax {name}: {COMMANDS[name].help}\n\n" + "\n".join(rows)


def find_config(arguments: list[str]) -> list[str]:
    """`--config configs/x.py:words` works from any folder: a file that is not here is looked for beside the package."""
    out = []
    for i, a in enumerate(arguments):
        is_value = i > 0 and arguments[i - 1] in ("--config", "-config")
        prefix, value = (
            ("", a) if is_value else a.split("=", 1) if a.startswith(("--config=", "-config=")) else ("", "")
        )
        path, _, words = value.partition(":")
        if path and not os.path.exists(path) and (CONFIGS / Path(path).name).exists():
            value = f"{CONFIGS / Path(path).name}" + (f":{words}" if words else "")
        elif path and not os.path.exists(path):
            known = ", ".join(sorted(p.name for p in CONFIGS.glob("*.py")))
            raise ValueError(f"config file {path} does not exist: there are {known} in configs")
        out.append(value if is_value else f"{prefix}={value}" if prefix else a)
    return out


def unknown_key(message: str, arguments: list[str]) -> str:
    """One sentence from ml_collections' message, with the argument that it is about."""
    words = message.replace("\\n", " ").replace("\\'", "'").replace('"', " ").split()
    key = words[0].strip("'") if words else ""
    given = next((a.split("=")[0] for a in arguments if key in a.split("=")[0].split(".")), key)
    hint = " ".join(words[1:]).strip("' ")
    return f"unknown config key {given.lstrip('-')}" + (f": {hint}" if hint else "")


def parse(name: str, arguments: list[str]) -> dict[str, Any]:
    """Flag values of a command as keyword arguments; problems raise ValueError with one sentence."""
    f = flags.FlagValues()
    arguments = find_config(arguments)
    for define in COMMANDS[name].flags:
        define(f, arguments)
    if {"--help", "-h", "-help"} & set(arguments):
        print(command_help(name, f))
        raise SystemExit(0)
    try:
        rest = f(["vlm_jax", *several(arguments, f)])[1:]
    except (AttributeError, KeyError) as error:  # how ml_collections refuses an unknown key, or one of an unknown group
        raise ValueError(unknown_key(str(error), arguments)) from None
    except (flags.Error, TypeError) as error:
        # the error of a config file comes as a traceback in text, whose last line is what went wrong
        last = str(error).strip().splitlines()[-1]
        raise ValueError(f"bad flag: {last.removeprefix('vlm_jax.config.ConfigError: ')}") from None
    if rest:
        raise ValueError(f"unexpected argument {rest[0]!r}: flags begin with --")
    values = {n: f[n].value for n in f if "." not in n}
    required = [n for n in values if f[n].default is None and values[n] is None and n != "config"]
    if required:
        raise ValueError(f"{name} needs --{required[0]}: {f[required[0]].help}")
    if name == "quickstart" and values["config"] is None:
        return parse(name, ["--config=configs/quickstart.py", *arguments])
    if "config" in values and values["config"] is None:
        raise ValueError(f"{name} needs --config, e.g. --config configs/llava15.py:7b,stage1")
    return values


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        print(usage())
        return 0
    words = 2 if any(name.startswith(arguments[0] + " ") for name in COMMANDS) else 1
    if words == 2 and (len(arguments) == 1 or arguments[1] in ("--help", "-h", "help")):
        print(usage(arguments[0]))
        return 0
    name = " ".join(arguments[:words])
    try:
        if name not in COMMANDS:
            raise ValueError(f"{name!r} is no command: use one of {', '.join(COMMANDS)}")
        values = parse(name, arguments[words:])
    except ValueError as error:
        print(f"vlm_jax: {error}", file=sys.stderr)
        return 2
    flags.FLAGS(["vlm_jax"])  # libraries below read absl's global flags
    module, function = COMMANDS[name].run.split(":")
    run = getattr(importlib.import_module(module), function)
    from vlm_jax.config import UserError

    try:
        return run(**values) or 0
    except UserError as error:
        print(f"vlm_jax: {error}", file=sys.stderr)
        return 2
    except (
        OSError
    ) as error:  # a folder that cannot be written, a full disk; without a file name it is none of the user's
        if error.filename is None:
            raise
        print(f"vlm_jax: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("vlm_jax: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

"""The command line: `python -m vlm_jax COMMAND --flags`.

A command is a row of COMMANDS: what it does, its flags, and the function that does it, imported only when it runs, so that `--help`
answers without loading jax. Errors that a person can mend end in one sentence on stderr and exit code 2.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from ml_collections import config_flags

Define = Callable[[flags.FlagValues, list[str]], None]  # (values to define in, the arguments of the command)
CONFIGS = Path(__file__).resolve().parent.parent / "configs"


class Command(NamedTuple):
    """Help line, flag definitions, and "module:function" called with the flags as keyword arguments."""

    help: str
    flags: tuple[Define, ...]
    run: str


def text(name: str, default: str | None, help: str) -> Define:
    """A string flag."""
    return lambda f, _: flags.DEFINE_string(name, default, help, flag_values=f)


def number(name: str, default: float | int | None, help: str) -> Define:
    """An int or float flag, by the type of its default."""
    define = flags.DEFINE_integer if isinstance(default, int) else flags.DEFINE_float
    return lambda f, _: define(name, default, help, flag_values=f)


def many(name: str, help: str) -> Define:
    """A flag that may be repeated."""
    return lambda f, _: flags.DEFINE_multi_string(name, [], help, flag_values=f)


def config(f: flags.FlagValues, arguments: list[str]) -> None:
    """--config FILE.py:words and --config.any.key=value."""
    help = "recipe, e.g. configs/llava15.py:7b,stage1; any key can be overridden: --config.train.lr=1e-4"
    config_flags.DEFINE_config_file("config", None, help, flag_values=f, sys_argv=["vlm_jax", *arguments])


MODEL = text("model", None, "a LLaVA directory in HF format, or the output directory of a training run")
DTYPE = text("dtype", "", "float32 or bfloat16; default: bfloat16 on accelerators, float32 on CPU")
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

COMMANDS: dict[str, Command] = {
    "train": Command(
        "train a model from a recipe; resumes by itself from the last checkpoint in its output directory",
        (
            config,
            text("coordinator", "", "HOST:PORT of process 0, for clusters that jax.distributed does not recognise"),
            number("process_id", -1, "index of this process, with --coordinator"),
            number("process_count", -1, "number of processes, with --coordinator"),
        ),
        "vlm_jax.train.command:train",
    ),
    "generate": Command(
        "answer prompts about images, from the command line or a LLaVA question file",
        (
            MODEL,
            DTYPE,
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
        (MODEL, DTYPE, *SAMPLING, many("image", "image to talk about")),
        "vlm_jax.generate.chat:chat",
    ),
    "convert": Command(
        "read any LLaVA checkpoint, or parts of one, and write a Hugging Face or original LLaVA directory",
        (
            text("from", "", "LLaVA checkpoint directory (HF or original) or training run"),
            text("to", None, "directory to write"),
            text("vision", "", "CLIP or SigLIP directory that replaces the tower"),
            text("llm", "", "Llama-family directory that replaces the LLM"),
            text("projector", "", "mm_projector.bin or safetensors that replaces the projector"),
            text("dtype", "", "bfloat16, float16 or float32; default: as read"),
            text("names", "hf", "tensor names to write: hf, llava (original) or source (as read)"),
            text("max_shard", "5GB", "largest weight file"),
            text("tokenizer", "", "folder whose tokenizer is written instead of the one read"),
            text("tower", "", "what an original LLaVA config.json shall name as mm_vision_tower"),
        ),
        "vlm_jax.train.export:convert",
    ),
    "evaluate": Command(
        "score a model on a benchmark",
        (
            MODEL,
            DTYPE,
            text("task", None, "benchmark, e.g. smartwatch"),
            text("data", None, "file or folder of the benchmark"),
            text("out", "", "JSON file for scores and answers"),
            number("batch", 16, "questions answered at once"),
            number("limit", 0, "first records only; 0 is all"),
            text(
                "history",
                "true",
                "before the later questions of a dialogue: the true answers, the model's own, or none",
            ),
            text("template", "", "conversation template; default: the one of the model"),
        ),
        "vlm_jax.evaluate.command:evaluate",
    ),
    "quickstart": Command(
        "make the smart-watch data, train a small model from nothing, evaluate, export and write a report",
        (text("out", "", "folder for everything; default: config.output"), config),
        "vlm_jax.quickstart:quickstart",
    ),
}


def usage() -> str:
    """The commands, a line each."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {c.help}" for name, c in COMMANDS.items()]
    return "usage: python -m vlm_jax COMMAND [--flags]      (COMMAND --help shows its flags)\n\n" + "\n".join(lines)


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
    given = next((a.split("=")[0] for a in arguments if a.split("=")[0].endswith(f".{key}")), key)
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
        rest = f(["vlm_jax", *arguments])[1:]
    except AttributeError as error:  # how ml_collections refuses an unknown key
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
    if name == "train" and values["config"] is None:
        raise ValueError("train needs --config, e.g. --config configs/llava15.py:7b,stage1")
    return values


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        print(usage())
        return 0
    name = arguments[0]
    try:
        if name not in COMMANDS:
            raise ValueError(f"{name!r} is no command: use one of {', '.join(COMMANDS)}")
        values = parse(name, arguments[1:])
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
    ) as error:  # a folder that cannot be written, a disk that is full; without a file name it is none of the user's
        if error.filename is None:
            raise
        print(f"vlm_jax: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("vlm_jax: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

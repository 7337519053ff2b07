"""Kinds of command-line flags: functions that define one in absl's FlagValues, so that a command is a row of a table."""

from __future__ import annotations

from collections.abc import Callable

from absl import flags

Define = Callable[[flags.FlagValues, list[str]], None]  # (values to define in, the arguments of the command)


def text(name: str, default: str | None, help: str) -> Define:
    """A string flag."""
    return lambda f, _: flags.DEFINE_string(name, default, help, flag_values=f)


def number(name: str, default: float | int | None, help: str) -> Define:
    """An int or float flag, by the type of its default."""
    define = flags.DEFINE_integer if isinstance(default, int) else flags.DEFINE_float
    return lambda f, _: define(name, default, help, flag_values=f)


def switch(name: str, help: str) -> Define:
    """A flag that is given or not."""
    return lambda f, _: flags.DEFINE_boolean(name, False, help, flag_values=f)


def many(name: str, help: str) -> Define:
    """A flag that may be repeated, or have several words; see `several`."""
    return lambda f, _: flags.DEFINE_multi_string(name, [], help, flag_values=f)


def several(arguments: list[str], f: flags.FlagValues) -> list[str]:
    """`--images a.png b.png` as `--images=a.png --images=b.png`: a flag of `many` takes all words up to the next flag."""
    out, current = [], ""
    for word in arguments:
        name, equals, _ = word.lstrip("-").partition("=")
        if word.startswith("--") or (word.startswith("-") and name in f):
            current = name if name in f and isinstance(f[name], flags.MultiFlag) else ""
            out += [word] if equals or not current else []
        else:
            out.append(f"--{current}={word}" if current else word)
    return out

"""The words after the colon of `--config FILE.py:word,word`."""

from __future__ import annotations

from vlm_jax.config import ConfigError


def read_words(text: str, flags: tuple[str, ...] = (), **choices: tuple[str, ...]) -> dict[str, str]:
    """ "13b,smoke" -> {"size": "13b", "stage": its first choice, "smoke": "smoke"}; ConfigError names a word that means nothing.

    choices: name=(first is the default, ...), of which at most one word may be given; flags: words that may be present or not.
    """
    chosen = {name: words[0] for name, words in choices.items()}
    given: dict[str, str] = {}
    for word in filter(None, (w.strip() for w in text.split(","))):
        name = next((n for n, words in choices.items() if word in words), word if word in flags else None)
        if name is None:
            known = " | ".join([*(", ".join(w) for w in choices.values()), *flags])
            raise ConfigError(f"config word {word!r} is unknown: use {known}")
        if name in given and given[name] != word:
            raise ConfigError(f"config words {given[name]!r} and {word!r} exclude each other")
        given[name] = word
    return chosen | given

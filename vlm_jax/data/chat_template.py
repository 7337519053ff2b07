"""Our conversation templates as the Jinja text that transformers' `apply_chat_template` renders.

The first line is a comment with the template's name, so that a model directory says exactly how it was trained:
{# vlm_jax: v1 #}. Message contents are strings, or lists of {"type": "image"} and {"type": "text", "text": ...}; images come first.
"""

from __future__ import annotations

import json
import re

from vlm_jax.data.templates import Template, template

_CONTENT = (
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] if c['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] }}{% endfor %}{% endif %}"
)


def chat_template(name: str, start_end: bool = False) -> str:
    """Jinja text for the template called `name`; start_end: `<im_start>` and `<im_end>` stand around images."""
    t = template(name)
    content = _CONTENT.replace("<image>", "<im_start><image><im_end>") if start_end else _CONTENT
    system, user, answer, opening = _parts(t)
    body = (
        f"{{% for m in messages %}}{{% if m['role'] == 'user' %}}{_text(user[0])}{_first_round(t)}{content}{_text(user[1])}"
        f"{{% else %}}{_text(answer[0])}{_CONTENT}{_text(answer[1])}{{% endif %}}{{% endfor %}}"
    )
    return f"{{# vlm_jax: {name} #}}{_text(system)}{body}{{% if add_generation_prompt %}}{_text(opening)}{{% endif %}}"


def named_template(jinja: str) -> str | None:
    """The name that `chat_template` wrote into a Jinja text, None if another program wrote it."""
    found = re.match(r"\{# vlm_jax: (\w+) #\}", jinja)
    return found[1] if found else None


def _parts(t: Template) -> tuple[str, tuple[str, str], tuple[str, str], str]:
    """(before the dialogue, around a user turn, around an answer, what opens an answer)."""
    user, assistant = t.roles[:2]
    if t.style == "TWO":
        return t.system + t.sep, (f"{user}: ", t.sep), (f"{assistant}: ", t.sep2 or ""), f"{assistant}:"
    if t.style == "SINGLE":
        return t.system + t.sep, (f"{user}: ", t.sep), (f"{assistant}: ", t.sep), f"{assistant}:"
    if t.style == "MPT":
        return t.system + t.sep, (user, t.sep), (assistant, t.sep), assistant
    if t.style == "LLAMA_2":
        return "", ("[INST] ", " [/INST]"), (" ", f" {t.sep2}{t.sep}"), ""
    return "", ("", ""), ("", t.sep), ""


def _first_round(t: Template) -> str:
    """Llama-2 puts the system text inside the first user turn."""
    if t.style != "LLAMA_2" or not t.system:
        return ""
    return (
        f"{{% if loop.first %}}{_text(f'<<SYS>>{chr(10)}{t.system}{chr(10)}<</SYS>>{chr(10)}{chr(10)}')}{{% endif %}}"
    )


def _text(text: str) -> str:
    """A literal for Jinja; JSON strings are Jinja strings."""
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""

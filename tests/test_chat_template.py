"""The Jinja text renders what our own templates render."""

import jinja2
import pytest

from vlm_jax.data.chat_template import chat_template, named_template
from vlm_jax.data.templates import TEMPLATES, messages_of, render

DIALOGUES = [["Hi", None], ['Is it "late"?\nSay so.', "No.", "Sure?", None], ["a", "b"]]


@pytest.mark.parametrize("name", sorted(n for n, t in TEMPLATES.items() if t.style != "PLAIN" and "mmtag" not in n))
@pytest.mark.parametrize("texts", DIALOGUES, ids=len)
def test_equals_our_rendering(name, texts):
    t = TEMPLATES[name]
    open_turn = texts[-1] is None
    messages = [{"role": ("user", "assistant")[i % 2], "content": x} for i, x in enumerate(texts) if x is not None]
    ours = jinja2.Template(chat_template(name), keep_trailing_newline=True).render(
        messages=messages, add_generation_prompt=open_turn
    )
    expected = render(t, messages_of(t, texts))
    if t.style == "LLAMA_2":  # the original ends a closed dialogue without opening the next round
        ours = ours.removesuffix(t.sep) if not open_turn else ours
    assert ours == expected


def test_images_come_first():
    content = [{"type": "text", "text": "What?"}, {"type": "image"}]
    text = jinja2.Template(chat_template("v1"), keep_trailing_newline=True).render(
        messages=[{"role": "user", "content": content}], add_generation_prompt=True
    )
    assert text.endswith("USER: <image>\nWhat? ASSISTANT:")


def test_name_is_found_again():
    assert named_template(chat_template("llava_v1")) == "llava_v1"
    assert named_template("{% for message in messages %}") is None

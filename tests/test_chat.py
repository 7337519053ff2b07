"""The terminal conversation, with its input piped in, and what it remembers."""

import io

import numpy as np
import pytest
from PIL import Image

from tests import tiny_model
from vlm_jax.__main__ import main
from vlm_jax.config import IMAGE
from vlm_jax.data.image_source import ImageSource
from vlm_jax.generate.chat import Conversation, talk
from vlm_jax.generate.decode import Decoding
from vlm_jax.generate.load import load_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model.write(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def pictures(model):
    paths = []
    for i in range(2):
        paths.append(str(model.parent / f"{i}.png"))
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (20, 30, 3), np.uint8)).save(paths[i])
    return paths


@pytest.fixture(scope="module")
def parts(model):
    loaded = load_model(model)
    return loaded, loaded.generator(batch_size=1)


def conversation(parts, tokens=5):
    return Conversation(*parts, Decoding(tokens))


def piped(parts, text):
    out, made = io.StringIO(), conversation(parts)
    talk(made, io.StringIO(text), out)
    return out.getvalue(), made


def test_piped_lines_become_answers_without_prompts(parts, pictures):
    out, made = piped(parts, f"/image {pictures[0]}\nWhat is it?\n\nIs it a cat?\n/exit\nnever read\n")
    first, second = made.texts[1::2]
    assert first and second and out == f"{first}\n{second}\n"
    assert made.texts[::2] == ["<image>\nWhat is it?", "Is it a cat?"]


def test_the_answer_is_that_of_the_whole_dialogue(parts, pictures):
    loaded, generator = parts
    made = conversation(parts)
    made.show(pictures[0])
    first = made.ask("What is it?", lambda piece: None)
    made.show(pictures[1])
    second = made.ask("one or two?", lambda piece: None)
    shown = [loaded.picture(ImageSource(path)) for path in pictures]
    prompt = loaded.prompt(["<image>\nWhat is it?", first, "<image>\none or two?"], shown)
    assert (np.asarray(prompt.tokens) == IMAGE).sum() == 2
    assert generator.text([prompt], made.how) == [second]


def test_clear_forgets(parts, pictures):
    fresh, _ = piped(parts, "What is it?\n")
    out, made = piped(parts, f"/image {pictures[0]}\nIs it a dog?\n/image {pictures[1]}\n/clear\nWhat is it?\n")
    assert out.endswith(fresh) and out != fresh and len(made.texts) == 2 and not made.pictures


def test_mistakes_are_told_and_the_conversation_goes_on(parts, pictures, model):
    out, made = piped(
        parts, f"/image {model.parent / 'none.png'}\nshow me <image>\n/image {pictures[0]}\nWhat is it?\n"
    )
    missing, placeholder, answer = out.split("\n", 2)
    assert "none.png does not exist" in missing and "<image>" in placeholder
    assert answer == made.texts[1] + "\n" and len(made.texts) == 2


def test_command_line(model, pictures, monkeypatch, capsys, parts):
    monkeypatch.setattr("sys.stdin", io.StringIO("What is it?\n"))
    assert main(["chat", "--model", str(model), "--image", pictures[0], "--max_new_tokens", "5"]) == 0
    assert capsys.readouterr().out == piped(parts, f"/image {pictures[0]}\nWhat is it?\n")[0]

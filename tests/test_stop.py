"""Stop strings: found across token borders, cut off, and never shown by a stream before they are known not to come."""

from hypothesis import given
from hypothesis import strategies as st

from vlm_jax.generate.stop import cut, find, settled, shortest


class Letters:
    """A tokenizer of characters; id 0 is special."""

    def decode(self, ids, skip_special=True):
        return "".join("" if i == 0 and skip_special else "<end>" if i == 0 else chr(i) for i in ids)


def ids(text):
    return [ord(c) for c in text]


def test_the_earliest_stop_string_wins():
    assert find("one ## two ### three", ["###", "## "]) == 4
    assert find("nothing", ["###"]) == -1
    assert cut(" one ### two ", ["###"]) == "one"
    assert cut(" one ", []) == "one"


def test_shortest_prefix_of_ids_that_holds_a_stop_string():
    text = ids("ab###c###")
    assert shortest(text, Letters(), ["###"]) == ids("ab###")
    assert shortest(text, Letters(), ["###"], known=4) == ids("ab###")
    assert shortest(text, Letters(), ["zz"]) is None
    assert shortest([97, 0, 98], Letters(), ["<end>"]) == [97, 0]
    assert shortest(text, Letters(), []) is None


def test_what_may_become_a_stop_string_is_held_back():
    assert settled("sunny ##", ["###"]) == "sunny"
    assert settled("sunny #", ["###", "\nUSER"]) == "sunny"
    assert settled("sunny.", ["###"]) == "sunny."
    assert settled("caf\ufffd", []) == "caf"


@given(st.text("ab# ", max_size=12), st.sampled_from(["#", "ab", "b##", "aba", " a"]))
def test_settled_text_is_never_taken_back(text, stop):
    final = cut(text, [stop])
    for n in range(len(text) + 1):
        assert final.startswith(settled(cut(text[:n], [stop]), [stop]))

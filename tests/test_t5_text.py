"""Text of encoder-decoder models: T5's tokenizer in its layouts, questions and answers, split captions, what is refused."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny_tokenizers import byte_level_directory, llama_directory, t5_directory
from vlm_jax.config import IGNORE, IMAGE, ConfigError
from vlm_jax.data.draws import Draws
from vlm_jax.data.records import Record, RecordError
from vlm_jax.data.t5_text import T5_TEMPLATES, T5Format, answer_slots
from vlm_jax.data.tokenizer import Tokenizer, load_tokenizer

TEXTS = [
    "",
    "  ",
    "The battery is at 62%.",
    " a  man\n\tironing ",
    "½ ﬁ 猫",
    "USER: </s>",
    "a<extra_id_0> b",
    "<pad><unk>",
]
CAPTION = "A man ironing clothes on the back of a taxi."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return t5_directory(tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


def record(*turns, images=("a.jpg",)):
    return Record(
        "7", tuple((("human", "gpt")[i % 2], text) for i, text in enumerate(turns)), images, "x.json: record 7"
    )


def test_special_ids(tokenizer, folder):
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.unk_id, tokenizer.bos_id) == (0, 1, 2, None)
    pieces = tokenizer.model.pieces
    assert tokenizer.size == pieces + 100
    assert [tokenizer.id_of(f"<extra_id_{k}>") for k in (0, 1, 99)] == [pieces + 99, pieces + 98, pieces]
    assert load_tokenizer(folder / "spiece.model").fingerprint == tokenizer.fingerprint, "a bare file is read as T5's"
    assert load_tokenizer(folder, sentinels=0).size == pieces


def test_every_string_is_closed(tokenizer):
    assert tokenizer.encode("") == [1] and tokenizer.encode("", special=False) == []
    a, b = tokenizer.encode("a"), tokenizer.encode("b")
    assert a[-1] == 1 and len(a) > 1
    assert tokenizer.encode_images("a <image>\nb") == [*a, IMAGE, *b]
    assert tokenizer.encode_images("<image><image>") == [1, IMAGE, 1, IMAGE, 1]
    ids, spans = tokenizer.encode_spans("a<image>b", images=True)
    assert len(ids) == len(spans) and [s for i, s in zip(ids, spans) if i == 1] == [(-1, -1)] * 2
    assert IMAGE not in tokenizer.encode("<image>") and len(tokenizer.encode("<image>")) > 1, "there it is text"


def test_decoding(tokenizer):
    ids = tokenizer.encode(" a  man\nironing")
    assert tokenizer.decode(ids) == "a man ironing" == "".join(tokenizer.stream(ids))
    assert tokenizer.decode(ids, skip_special=False) == "a man ironing</s>"


def test_saved_tokenizers_read_back_equal(tokenizer, tmp_path):
    more = tokenizer.with_tokens("<im_start>")
    more.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert (tmp_path / "spiece.model").is_file() and again.fingerprint == more.fingerprint
    assert again.names == more.names and again.size == tokenizer.size + 1
    assert pickle.loads(pickle.dumps(again)).fingerprint == more.fingerprint
    few = load_tokenizer(tmp_path, sentinels=3)
    assert few.fingerprint == more.fingerprint, "sentinels that the files describe stay"


def test_transformers_reads_what_is_saved(tokenizer, tmp_path):
    """... and we read its tokenizer.json."""
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path / "ours")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    assert (tmp_path / "theirs/tokenizer.json").is_file()
    again = load_tokenizer(tmp_path / "theirs")
    assert (again.pad_id, again.eos_id, again.bos_id, again.size) == (0, 1, None, tokenizer.size)
    for text in TEXTS:
        assert theirs(text).input_ids == tokenizer.encode(text) == again.encode(text), text
        marked = f"{text}<image>{text}"
        assert again.encode_images(marked) == tokenizer.encode_images(marked)


def test_chat(tokenizer):
    form = T5Format(tokenizer)
    sample = form(record("What is it?\n<image>", "A man.", "Where?", "On a taxi."))
    system = "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    text = (
        system + "detailed, and polite answers to the user's questions. USER: <image>\nWhat is it? ASSISTANT: A man. "
    )
    assert sample.tokens.tolist() == tokenizer.encode_images(text + "USER: Where? ASSISTANT: ")
    assert sample.answer.tolist() == tokenizer.encode("On a taxi.")
    assert (sample.labels == IGNORE).all() and sample.images == ("a.jpg",)
    assert sample.tokens.dtype == sample.labels.dtype == sample.answer.dtype == np.int32
    assert not form.random and form.fingerprint != T5Format(tokenizer, "t5_plain").fingerprint


def test_plain(tokenizer):
    sample = T5Format(tokenizer, "t5_plain")(record("Say what it is.\n<image>", CAPTION))
    assert sample.tokens.tolist() == [1, IMAGE, 1] and sample.answer.tolist() == tokenizer.encode(CAPTION)
    both = T5Format(tokenizer, "t5_plain")(record("<image> and <image>", CAPTION, images=("a.jpg", "b.jpg")))
    assert both.tokens.tolist() == [1, IMAGE, 1, IMAGE, 1] and both.images == ("a.jpg", "b.jpg")


def test_split_captions(tokenizer):
    form = T5Format(tokenizer, "t5_plain_split_text")
    shown = record("<image>", CAPTION)
    splits = {}
    for epoch in range(40):
        draws = Draws(0, epoch, 3)
        sample, k = form(shown, draws), draws.integer(0, 1, len(CAPTION) // 2)
        assert sample.tokens.tolist() == tokenizer.encode_images("<image>" + CAPTION[:k])
        assert sample.answer.tolist() == tokenizer.encode(CAPTION[k:])
        splits[k] = sample
    assert form.random and min(splits) >= 1 and max(splits) <= len(CAPTION) // 2 and len(splits) > 10
    longest = form(shown)
    assert len(longest.tokens) == max(len(s.tokens) for s in splits.values())
    assert len(longest.answer) >= max(len(s.answer) for s in splits.values())
    for short in ("", "A"):
        sample = form(record("<image>", short), None)
        assert sample.tokens.tolist() == [1, IMAGE, 1] and sample.answer.tolist() == tokenizer.encode(short)


@settings(max_examples=60, deadline=None)
@given(words=st.lists(st.sampled_from(CAPTION.split()), max_size=12), epoch=st.integers(0, 99))
def test_what_is_measured_holds_what_is_drawn(tokenizer, words, epoch):
    """But for a token, of a word cut in two further in."""
    form = T5Format(tokenizer, "t5_plain_split_text")
    shown = record("<image>", " ".join(words))
    longest, drawn = form(shown), form(shown, Draws(0, epoch, 0))
    assert len(drawn.tokens) <= len(longest.tokens) + 1 and len(drawn.answer) <= len(longest.answer) + 1


def test_text_only_dialogues(tokenizer):
    form = T5Format(tokenizer, max_length=20)
    sample = form(record("<image>\nis text here", CAPTION * 3, images=()))
    assert IMAGE not in sample.tokens and sample.images == ()
    assert len(sample.tokens) == len(sample.answer) == 20 and sample.tokens[-1] == sample.answer[-1] == 1
    assert sample.answer[:19].tolist() == tokenizer.encode(CAPTION * 3)[:19]
    shown = form(record("<image>\nWhat?", CAPTION * 3))
    assert len(shown.answer) > 20, "dialogues with images are cut by packing alone"


def test_turns_without_a_partner(tokenizer):
    form = T5Format(tokenizer)
    whole = form(record("<image>\nWhat?", "A man."))
    assert form(record("<image>\nWhat?", "A man.", "Where?")).tokens.tolist() == whole.tokens.tolist()
    started = Record("7", (("gpt", "Hello."), *record("<image>\nWhat?", "A man.").turns), ("a.jpg",))
    assert form(started).tokens.tolist() == whole.tokens.tolist()
    with pytest.raises(RecordError, match="x.json: record 7 .*last turn"):
        form(record("<image>\nWhat?"))


@pytest.mark.parametrize(
    "turns, images, template, why",
    [
        (("<image>\nWhat?", "an <image> tag"), 1, "t5_v1", "its answer holds"),
        (("What?", "A man."), 1, "t5_v1", "1 image"),
        (("<image>\nWhat?", "A man.", "<image>\nAnd?", "A taxi."), 1, "t5_v1", "2 <image>"),
        (("<image>", CAPTION, "And?", "A taxi."), 1, "t5_plain", "one question"),
        (("Describe.", CAPTION), 0, "t5_plain", "one question"),
        (("<image>", CAPTION), 0, "t5_plain_split_text", "0 image"),
    ],
)
def test_records_that_are_refused(tokenizer, turns, images, template, why):
    with pytest.raises(RecordError, match=f"x.json: record 7 .*{why}"):
        T5Format(tokenizer, template)(record(*turns, images=("a.jpg",) * images))


def test_any_tokenizer_with_an_end_will_do(tmp_path):
    """A model that is trained from nothing may have one that opens texts: the answer is closed all the same."""
    for made in (load_tokenizer(llama_directory(tmp_path)), load_tokenizer(byte_level_directory(tmp_path))):
        sample = T5Format(made, "t5_plain")(record("<image>", CAPTION))
        assert sample.tokens.tolist() == [made.bos_id, IMAGE]
        assert sample.answer.tolist() == [*made.encode(CAPTION, special=False), made.eos_id]
    with pytest.raises(ConfigError, match="no EOS"):
        T5Format(Tokenizer(made.model, {**made.names, "eos": None}))
    with pytest.raises(ConfigError, match=", ".join(T5_TEMPLATES)):
        T5Format(made, "t5_v2")


def test_decoder_inputs_are_one_place_late():
    inputs, targets, weights = answer_slots(np.array([5, 6, 1]), start=9)
    assert inputs.tolist() == [9, 5, 6] and targets.tolist() == [5, 6, 1] and weights.tolist() == [1, 1, 1]
    assert inputs.dtype == targets.dtype == np.int32 and weights.dtype == np.float32
    assert [len(a) for a in answer_slots(np.zeros(0, np.int32))] == [0, 0, 0]

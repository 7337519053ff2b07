"""VQAScore of decoder-only models: the published formula, computed again with numpy; batches, modes, images, wrong input."""

import functools
import json

import jax
import numpy as np
import pytest
from PIL import Image

from tests import tiny_model
from tests.goldens import golden, needs_shared
from vlm_jax.config import IGNORE, IMAGE, ConfigError, UserError
from vlm_jax.data.image_source import ImageError, ImageSource
from vlm_jax.data.tasks import TextFormat
from vlm_jax.data.templates import template
from vlm_jax.data.tokenizer import load_tokenizer
from vlm_jax.evaluate.vqascore import ANSWER, QUESTION, Asking, VQAScore, filled
from vlm_jax.generate.load import load_model
from vlm_jax.generate.rows import Prompt, PromptError, batch_of, place
from vlm_jax.generate.scoring import AnswerScorer, encode_pair, program
from vlm_jax.models import vlm
from vlm_jax.parallel.mesh import make_mesh
from vlm_jax.parallel.mesh_config import MeshConfig

TEXTS = ["a cat", "a dog two one", "Is the watch sunny"]
WORDS = tiny_model.WORDS + f' {QUESTION} Yes No "</s>"'


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    tiny_model.write(folder, [WORDS])
    for i, size in enumerate([(20, 30), (30, 20), (16, 16)]):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (*size, 3), np.uint8)).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def images(folder):
    return [folder / f"{i}.png" for i in range(3)]


@pytest.fixture(scope="module")
def score(folder):
    return VQAScore(folder / "model", batch=4)


@functools.partial(jax.jit, static_argnums=0)
def logits_of(config, params, batch):
    model = vlm.build(config, params)
    return model.logits(vlm.forward(model, batch))


def expected(score, image, text, answer="Yes"):
    """Log-probabilities of the answer's tokens: all logits of one unpadded row, softmax in numpy float64."""
    loaded = score.scorer.loaded
    prompt = loaded.template.system + f" USER: <image>\n{QUESTION.format(text)} ASSISTANT:"
    tokenizer = loaded.tokenizer
    before = tokenizer.encode_images(prompt)
    tokens = tokenizer.encode_images(f"{prompt} {answer}</s>")
    assert tokens[: len(before)] == before and tokens.count(IMAGE) == 1
    placed = place(Prompt(tokens, (loaded.picture(ImageSource(str(image))),)), loaded.config)
    batch = batch_of([placed], loaded.config, 1, len(placed), 1)
    logits = np.asarray(logits_of(loaded.config, loaded.params, batch))[0, :, : tokenizer.size].astype(np.float64)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    said = range(len(placed) - (len(tokens) - len(before)), len(placed))
    return np.asarray([logp[t - 1, placed.tokens[t]] for t in said])


def test_is_the_mean_log_probability_of_the_answer(score, images):
    found = score(images, TEXTS)
    assert found.shape == (3, 3) and found.dtype == np.float32
    want = np.asarray([[expected(score, image, text) for text in TEXTS] for image in images])
    assert want.shape[-1] == 2  # "Yes" and </s>
    np.testing.assert_allclose(found, np.exp(want.mean(-1)), rtol=1e-4)
    assert np.ptp(found) > 1e-3 * found.max()
    np.testing.assert_allclose(score(images, TEXTS, mode="first_token"), np.exp(want[..., 0]), rtol=1e-4)
    no = np.asarray([[expected(score, image, text, "No")[0] for text in TEXTS] for image in images])
    yes = np.exp(want[..., 0])
    np.testing.assert_allclose(score(images, TEXTS, mode="yes_no"), yes / (yes + np.exp(no)), rtol=1e-4)


def test_does_not_depend_on_the_batch(folder, score, images):
    alone = VQAScore(folder / "model", batch=1)
    long = [*TEXTS, " ".join(["one two three cat dog"] * 8)]
    together = score(images, long)
    np.testing.assert_allclose(alone(images, long), together, rtol=1e-5)
    np.testing.assert_allclose(score(images[1], long[2]), together[1:2, 2:3], rtol=1e-5)
    assert score(images[::-1], long[::-1]) == pytest.approx(together[::-1, ::-1], rel=1e-5)


def test_texts_of_similar_length_compile_nothing_new(score, images):
    compiled = program(score.scorer.generator.config, score.scorer.generator.compute, None)._cache_size
    score(images, "a cat")
    before = compiled()
    for text in ("a dog", "one", "no Yes"):
        score(images, text)
    assert compiled() == before


def test_on_a_mesh(folder, score, images):
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2, seq=2))
    loaded = load_model(folder / "model", mesh=mesh)
    spread = VQAScore(AnswerScorer(loaded, loaded.generator(mesh=mesh, batch_size=4)))
    np.testing.assert_allclose(spread(images, TEXTS), score(images, TEXTS), rtol=1e-4)


def test_answers_of_different_length_in_one_batch(score, images):
    found = score(images[:1], TEXTS, question="", answer="{}")  # VisualGPTScore
    assert found.shape == (1, 3)
    each = [score(images[:1], text, question="", answer="{}")[0, 0] for text in TEXTS]
    np.testing.assert_allclose(found[0], each, rtol=1e-5)


def test_data_sets(score, images):
    items = [{"images": images[:2], "texts": TEXTS[:2]}, {"images": images[1:], "texts": TEXTS[1:]}]
    found = score.batch_forward(items)
    assert found.shape == (2, 2, 2)
    np.testing.assert_allclose(found[1], score(images[1:], TEXTS[1:]), rtol=1e-5)
    with pytest.raises(UserError, match="different numbers"):
        score.batch_forward([*items, {"images": images[:1], "texts": TEXTS}])


def test_images_in_memory_and_arrays(score, images, tmp_path):
    picture = Image.open(images[0]).convert("RGB")
    np.save(tmp_path / "bgr.npy", np.asarray(picture)[..., ::-1])
    found = score([images[0], picture, tmp_path / "bgr.npy"], TEXTS[0])
    assert found.min() == pytest.approx(found.max(), rel=1e-5)
    np.save(tmp_path / "flat.npy", np.zeros(4, np.uint8))
    with pytest.raises(ImageError, match=r"flat.npy is uint8 \(4,\)"):
        score(tmp_path / "flat.npy", "a cat")
    with pytest.raises(ImageError, match="none.png does not exist"):
        score(tmp_path / "none.png", "a cat")


def test_wrong_wording(folder, score, images):
    with pytest.raises(ConfigError, match="--template=t5_chat is for models with an encoder"):
        VQAScore(folder / "model", template="t5_chat")
    with pytest.raises(ConfigError, match="--mode='best'"):
        Asking(mode="best")
    with pytest.raises(ConfigError, match="--question='{text}' cannot be filled"):
        score(images, TEXTS, question="{text}")
    with pytest.raises(PromptError, match="is empty"):
        score(images, "", question="x", answer="{}")
    with pytest.raises(PromptError, match="holds <image>"):
        score(images, "a cat <image> and a dog")
    assert filled("{} is {} {{}}", "x{}") == "x{} is x{} {}"


@golden("clip_flant5", "llava15_vqascore_tokens*.json")
def test_published_tokens(path):
    tokenizer = load_tokenizer(needs_shared("tokenizers/llama2.model"), legacy=True)
    for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
        form = TextFormat(tokenizer, template({"chat": "v1"}.get(row["conversation"], row["conversation"])))
        answer = row["answer"].removesuffix("</s>").removesuffix("\n")
        question = QUESTION.format(row["caption"]) if answer == ANSWER else ""
        tokens, answered = encode_pair(form, question, answer)
        assert tokens.tolist() == row["input_ids"]
        assert [IGNORE] * (len(tokens) - len(answered)) + answered.tolist() == row["labels"]


@pytest.mark.parametrize("answer", ["Yes", "2 dogs", "\u65e5\u672c", '"so"', "No, it is not."])
def test_the_answer_begins_behind_the_question(answer):
    """Published rule: all but the tokens of the question alone, whose last one is the space before the answer."""
    tokenizer = load_tokenizer(needs_shared("tokenizers/llama2.model"), legacy=True)
    form = TextFormat(tokenizer, template("v1"))
    question = f"{form.template.system} USER: <image>\nHow many? ASSISTANT: "
    tokens, said = encode_pair(form, "How many?", answer)
    assert tokens.tolist() == tokenizer.encode_images(f"{question}{answer}</s>")
    assert len(tokens) - len(said) == len(tokenizer.encode_images(question)) - 1

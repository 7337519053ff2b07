"""VQAScore of a CLIP-T5 directory from end to end: the command as it is typed, a plain loop, wordings, batches, parts, wrong input."""

import csv
import functools
import json

import jax
import numpy as np
import pytest
from PIL import Image

from tests.tiny_model import random_params
from tests.tiny_tokenizers import TEXT, t5_directory
from vlm_jax.__main__ import main
from vlm_jax.config import T5Config, UserError, VisionConfig, VLMConfig
from vlm_jax.convert.command import convert_model
from vlm_jax.convert.manifest import read_manifest
from vlm_jax.convert.read import open_checkpoint
from vlm_jax.convert.write import export
from vlm_jax.data.chat_template import chat_template
from vlm_jax.data.image_source import ImageSource
from vlm_jax.data.templates import TEMPLATES
from vlm_jax.data.tokenizer import load_tokenizer
from vlm_jax.evaluate.vqascore import QUESTION, VQAScore
from vlm_jax.generate import scoring
from vlm_jax.generate.rows import Prompt, batch_of, place
from vlm_jax.generate.scoring import ENCODER_PROMPTS
from vlm_jax.models import vlm

TEXTS = ["a cat", "a dog on the back of a taxi, and a man", "is it sunny?"]
WORDS = f"{TEXT}\n{QUESTION}\nYes No\nYes\nNo\n" + "\n".join(TEXTS)
VISION = VisionConfig(image_size=28, patch_size=7, width=24, layers=3, heads=3, mlp=48)
TOLERANCE = 1e-6
ROOM = 160  # slots of the plain loop's rows; one number is one compilation


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """model/ and three images of different sizes."""
    folder = tmp_path_factory.mktemp("clip_t5")
    (folder / "tokenizer").mkdir()
    t5_directory(folder / "tokenizer", 200, WORDS)
    llm = T5Config(
        vocab=load_tokenizer(folder / "tokenizer").size + 12,  # rows that no token has, as in FLAN-T5
        width=32, mlp=64, encoder_layers=2, decoder_layers=2, heads=4, head_dim=12, buckets=8, max_distance=16,
    )  # fmt: skip
    config = VLMConfig(vision=VISION, llm=llm)
    written = chat_template("t5_v1")
    export(folder / "model", config, random_params(config), tokenizer=folder / "tokenizer", chat_template=written)
    for i, size in enumerate([(40, 30), (30, 40), (28, 28)]):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (*size, 3), np.uint8)).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def images(folder):
    return [str(folder / f"{i}.png") for i in range(3)]


@pytest.fixture(scope="module")
def score(folder):
    return VQAScore(folder / "model", batch=4)


@functools.partial(jax.jit, static_argnums=0)
def everything(config, params, rows):
    model = vlm.build(config, params)
    return model.logits(vlm.forward(model, rows))


def expected(score, image, text, answer="Yes", prompt="t5_chat"):
    """Log-probabilities of the answer's tokens and EOS: one row alone, the whole decoder, softmax in float64."""
    loaded = score.scorer.loaded
    tokens = loaded.tokenizer.encode_images(ENCODER_PROMPTS[prompt].format(QUESTION.format(text)))
    placed = place(Prompt(tokens, (loaded.picture(ImageSource(image)),)), loaded.config)
    rows = batch_of([placed], loaded.config, 1, max(ROOM, len(placed)), 1)
    said = loaded.tokenizer.encode(answer)
    rows |= {"answer_tokens": np.asarray([[0, *said[:-1]]]), "answer_segments": np.ones((1, len(said)), int)}
    logits = np.asarray(everything(loaded.config, loaded.params, rows))[0, :, : loaded.tokenizer.size].astype(
        np.float64
    )
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return logp[np.arange(len(said)), said]


def matrix(score, images, texts, value=lambda logp: np.exp(logp.mean()), **wording):
    return np.asarray([[value(expected(score, image, text, **wording)) for text in texts] for image in images])


def close(ours, wanted):
    np.testing.assert_allclose(ours, wanted, atol=TOLERANCE, rtol=1e-5)


def test_the_command_as_it_is_typed(folder, images, score, tmp_path, capsys):
    """Table, JSON and CSV; words behind a flag and repeated flags."""
    typed = ["score", "--model", str(folder / "model"), "--images", *images[:2], "--texts", *TEXTS[:2]]
    assert main([*typed, "--out", str(tmp_path / "x.json")]) == 0
    shown = capsys.readouterr().out.splitlines()
    found = json.loads((tmp_path / "x.json").read_text())
    assert found["images"] == images[:2] and found["texts"] == TEXTS[:2] and found["question"] == QUESTION
    close(found["scores"], matrix(score, images[:2], TEXTS[:2]))
    assert shown[:2] == [f"[{i}] {text}" for i, text in enumerate(TEXTS[:2], 1)]
    assert [f"{value:.6f}" for value in found["scores"][1]] == shown[-1].split()[-2:]
    repeated = [
        "score",
        "--model",
        str(folder / "model"),
        "--texts",
        TEXTS[2],
        f"--text={TEXTS[0]}",
        "--mode",
        "first_token",
    ]
    assert main([*repeated, "--image", images[2], "--out", str(tmp_path / "x.csv"), "--batch", "1"]) == 0
    head, row = list(csv.reader((tmp_path / "x.csv").read_text().splitlines()))
    assert head == ["image", TEXTS[2], TEXTS[0]] and row[0] == images[2]
    close(np.asarray(row[1:], float), matrix(score, images[2:], [TEXTS[2], TEXTS[0]], lambda p: np.exp(p[0]))[0])


def test_equals_a_plain_loop(score, images):
    wanted = matrix(score, images, TEXTS)
    assert np.ptp(wanted) > 100 * TOLERANCE, "a score that says nothing is compared with nothing"
    close(score(images=images, texts=TEXTS), wanted)
    yes, no = (matrix(score, images, TEXTS, lambda p: np.exp(p[0]), answer=word) for word in ("Yes", "No"))
    close(score(images, TEXTS, mode="first_token"), yes)
    close(score(images, TEXTS, mode="yes_no"), yes / (yes + no))


def test_templates(folder, score, images):
    """Question, answer and the prompt around them; a long answer goes through the whole decoder."""
    prompt = "t5_chat_no_system"
    other = VQAScore(folder / "model", template=prompt, batch=4)(images, TEXTS[:2])
    close(other, matrix(score, images, TEXTS[:2], prompt=prompt))
    system = TEMPLATES["v1"].system
    long = f"{system} {system}"
    found = score(images[:1], TEXTS[:1], answer=long)
    assert len(score.scorer.loaded.tokenizer.encode(long)) > scoring.SHORT
    close(found, matrix(score, images[:1], TEXTS[:1], answer=long))


def test_does_not_depend_on_the_batch(folder, score, images):
    """Alone, with longer and shorter texts, with other images, in another order, in batches of other sizes."""
    texts = [*TEXTS, " ".join(TEXTS * 3)]
    together = score(images, texts)
    close(VQAScore(folder / "model", batch=1)(images[:1], texts[1:]), together[:1, 1:])
    close(VQAScore(folder / "model", batch=16)(images[::-1], texts[::-1]), together[::-1, ::-1])
    items = [{"images": images[1:], "texts": texts[2:4]}, {"images": images[:2], "texts": texts[:2]}]
    close(score.batch_forward(items), [together[1:, 2:4], together[:2, :2]])


def test_an_image_is_encoded_once(score, images, monkeypatch):
    """For all texts about it, and for both answers of yes_no."""
    encode, seen = scoring.image_program, []

    def counted(*key):
        def run(params, pixels):
            seen.extend(np.asarray(pixels).any(axis=(1, 2, 3, 4)))
            return encode(*key)(params, pixels)

        return run

    monkeypatch.setattr(scoring, "image_program", counted)
    score([*images, images[0]], TEXTS * 5, mode="yes_no")
    assert sum(seen) == 3


def test_a_model_in_parts(folder, score, images, tmp_path):
    convert_model(folder / "model", tmp_path / "parts", names="parts")
    np.testing.assert_array_equal(VQAScore(tmp_path / "parts", batch=4)(images, TEXTS), score(images, TEXTS))


def test_transformers_gives_the_same_score(folder, score, images, tmp_path):
    """T5ForConditionalGeneration and CLIPVisionModel of the parts, spliced by hand."""
    torch = pytest.importorskip("torch")
    from transformers import CLIPVisionModel, T5ForConditionalGeneration

    convert_model(folder / "model", tmp_path / "parts", names="parts")
    parts, tokenizer = read_manifest(tmp_path / "parts").parts, score.scorer.loaded.tokenizer
    t5 = T5ForConditionalGeneration.from_pretrained(tmp_path / "parts" / parts["llm"]).eval()
    tower = CLIPVisionModel.from_pretrained(tmp_path / "parts" / parts["vision"]).eval()
    opened = open_checkpoint(tmp_path / "parts")
    found = []
    with torch.no_grad():
        for image in images:
            pixels = score.scorer.loaded.picture(ImageSource(image)).views / 255
            pixels = torch.tensor(((pixels - VISION.mean) / VISION.std).transpose(0, 3, 1, 2), dtype=torch.float32)
            x = tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
            for i in range(2):
                x = torch.nn.functional.gelu(x) if i else x
                kernel, bias = (torch.tensor(opened.read(f"projector/layer_{i}/{p}")) for p in ("kernel", "bias"))
                x = x @ kernel + bias
            for text in TEXTS:
                ids = tokenizer.encode_images(ENCODER_PROMPTS["t5_chat"].format(QUESTION.format(text)))
                at = ids.index(-200)
                before, after = (t5.shared(torch.tensor([part])) for part in (ids[:at], ids[at + 1 :]))
                labels = torch.tensor([tokenizer.encode("Yes")])
                logits = t5(inputs_embeds=torch.cat([before, x, after], 1), labels=labels).logits
                logits = logits[..., : tokenizer.size]  # the scorer drops the rows that no token has
                found.append(np.exp(-torch.nn.functional.cross_entropy(logits[0], labels[0]).item()))
    close(score(images, TEXTS), np.reshape(found, (3, 3)))


@pytest.mark.parametrize("make, words", [
    (lambda d: d, "is no model directory: it has no config.json"),
    (lambda d: saved(d, {"model_type": "t5"}), "is a language model: give a vision tower with --vision"),
    (lambda d: saved(d, {"model_type": "clip_vision_model"}), "is of model_type 'clip_vision_model', not a LLaVA model"),
    (lambda d: saved(d, {"model_type": "whisper"}), "is of model_type 'whisper', not a LLaVA model, Llama, Mistral or T5"),
])  # fmt: skip
def test_directories_that_are_no_model(make, words, images, tmp_path, capsys):
    (tmp_path / "x").mkdir()
    typed = ["score", "--model", str(make(tmp_path / "x")), "--images", images[0], "--texts", "a cat"]
    assert main(typed) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1


def saved(directory, raw):
    """A directory with a config.json and the weights of something."""
    from safetensors.numpy import save_file

    (directory / "config.json").write_text(json.dumps(raw))
    save_file({"shared.weight": np.zeros((4, 2), np.float32)}, directory / "model.safetensors")
    return directory


def test_models_that_lack_something(folder, images, tmp_path):
    import shutil

    from safetensors.numpy import load_file, save_file

    model = shutil.copytree(folder / "model", tmp_path / "model")
    (model / "spiece.model").rename(tmp_path / "spiece.model")
    with pytest.raises(UserError, match="model holds none of tokenizer.json, tokenizer.model, spiece.model"):
        VQAScore(model)
    (tmp_path / "spiece.model").rename(model / "spiece.model")
    tensors = load_file(model / "model.safetensors")
    for start, words in (("lm_head", "should have lm_head.weight"), ("mm_projector", "has no projector: give one")):
        save_file({k: v for k, v in tensors.items() if not k.startswith(start)}, model / "model.safetensors")
        with pytest.raises(UserError, match=words):
            VQAScore(model)
    (tmp_path / "page.png").write_text("<html>not found</html>")
    with pytest.raises(UserError, match="page.png"):
        VQAScore(folder / "model")(tmp_path / "page.png", "a cat")
    with pytest.raises(UserError, match="batch_size=0 must be at least 1"):
        VQAScore(folder / "model", batch=0)

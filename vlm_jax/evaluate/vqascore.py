"""VQAScore (arXiv 2404.01291): how well a text fits an image is how probable "Yes" is as the answer to whether it does.

    original      ( prod_t P(a_t | a_<t, image, question) )^(1/T)     a: the answer and what closes it, so T = 2 for "Yes"
    first_token   P(a_1)
    yes_no        P(a_1) / (P(a_1) + P(b_1))                          b: the answer that says no
Question, answer and the first form are those of linzhiqiu/t2v_metrics as its published numbers were made; they work with every model
that is a generate.scoring.Scorer.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import io
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from vlm_jax.config import ConfigError, UserError, one_of
from vlm_jax.data.image_source import ImageError, ImageSource
from vlm_jax.generate.load import load_model, usual_mesh
from vlm_jax.generate.scoring import ENCODER_PROMPTS, AnswerScorer, Scorer

QUESTION = 'Does this figure show "{}"? Please answer yes or no.'
ANSWER, AGAINST = "Yes", "No"
MODES = ("original", "first_token", "yes_no")
IN_FLIGHT = 256  # pairs whose images are in memory together
READERS = 8  # threads that decode images

AnyImage = str | Path | ImageSource | Image.Image


@dataclasses.dataclass(frozen=True)
class Asking:
    """What is asked about a text and what becomes of the answer's probabilities; every `{}` stands for the text.

    against: the answer that "yes_no" compares with.
    """

    question: str = QUESTION
    answer: str = ANSWER
    mode: str = "original"
    against: str = AGAINST

    def __post_init__(self):
        one_of("--mode", self.mode, MODES)
        for name in ("question", "answer", "against"):
            filled(getattr(self, name), "", f"--{name}")

    @property
    def answers(self) -> tuple[str, ...]:
        """The answers whose probabilities are needed."""
        return (self.answer, self.against) if self.mode == "yes_no" else (self.answer,)

    def value(self, answer: np.ndarray, against: np.ndarray | None = None) -> float:
        """The score of one pair from the log-probabilities of its answers' tokens."""
        if self.mode == "original":
            return float(np.exp(np.mean(answer, dtype=np.float32)))
        if self.mode == "first_token" or against is None:
            return float(np.exp(answer[0]))
        return float(1 / (1 + np.exp(np.float64(against[0]) - np.float64(answer[0]))))


def filled(template: str, text: str, name: str = "the template") -> str:
    """A template with the text in every `{}`; ConfigError if it has other fields."""
    try:
        return template.format(*[text] * template.count("{"))
    except (IndexError, KeyError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"{name}={template!r} cannot be filled: {{}} stands for the text, {{{{ and }}}} for braces"
        ) from error


class VQAScore:
    """Scores of texts against images by a model: `VQAScore(directory)(images=[...], texts=[...])`.

    model: a directory that generate.load reads, or a Scorer. batch: pairs computed together, which the scores do not depend on.
    The wording may be given here or with every call. loading: further arguments of `open_scorer`.
    """

    def __init__(
        self, model: str | Path | Scorer, *, batch: int = 16, asking: Asking = Asking(), progress: bool = False,
        **loading: Any,
    ):  # fmt: skip
        self.scorer = open_scorer(model, batch=batch, **loading) if isinstance(model, (str, Path)) else model
        self.asking, self.progress = asking, progress

    def __call__(self, images: AnyImage | Sequence[AnyImage], texts: str | Sequence[str], **wording: str) -> np.ndarray:
        """float32 [images, texts]. Images are files (`.npy`: H, W, 3 in BGR), ImageSources or Pillow images; one alone is a list of
        one. wording: fields of Asking for this call (question, answer, mode, against)."""
        images = [images] if isinstance(images, AnyImage) else list(images)
        texts = [texts] if isinstance(texts, str) else list(texts)
        return self.items([(images, texts)], **wording)[0]

    def batch_forward(self, dataset: Sequence[Mapping[str, Sequence]], **wording: str) -> np.ndarray:
        """float32 [items, images, texts] of items {"images": [...], "texts": [...]} with as many of each."""
        scores = self.items([(item["images"], item["texts"]) for item in dataset], **wording)
        shapes = {s.shape for s in scores}
        if len(shapes) > 1:
            raise UserError(f"items have different numbers of images and texts {sorted(shapes)}: score them one by one")
        return np.stack(scores) if scores else np.zeros((0, 0, 0), np.float32)

    def items(self, items: Sequence[tuple[Sequence[AnyImage], Sequence[str]]], **wording: str) -> list[np.ndarray]:
        """float32 [images, texts] for every item (images, texts)."""
        asking = dataclasses.replace(self.asking, **wording)
        found = [([source_of(image) for image in images], texts) for images, texts in items]
        pairs = [(source, text) for sources, texts in found for source in sources for text in texts]
        scores = self._scores(pairs, asking)
        out, at = [], 0
        for images, texts in items:
            n = len(images) * len(texts)
            out.append(np.asarray(scores[at : at + n], np.float32).reshape(len(images), len(texts)))
            at += n
        return out

    def _scores(self, pairs: Sequence[tuple[ImageSource, str]], asking: Asking) -> list[float]:
        """The scores of all pairs; while some are computed the images of the next are read."""
        chunks = [pairs[start : start + IN_FLIGHT] for start in range(0, len(pairs), IN_FLIGHT)]
        hidden, scores = not self.progress, []
        with (
            concurrent.futures.ThreadPoolExecutor(READERS) as readers,
            tqdm(total=len(pairs), unit="pair", desc="score", file=sys.stderr, disable=hidden) as bar,
        ):

            def read(chunk: Sequence[tuple[ImageSource, str]]) -> dict[ImageSource, concurrent.futures.Future]:
                sources = dict.fromkeys(source for source, _ in chunk)
                return {source: readers.submit(self.scorer.picture, source) for source in sources}

            ahead = read(chunks[0]) if chunks else {}
            for chunk, following in zip(chunks, [*chunks[1:], ()]):
                known = {source: reading.result() for source, reading in ahead.items()}
                ahead = read(following)
                scores += self._pairs(chunk, known, asking)
                bar.update(len(chunk))
        return scores

    def _pairs(
        self, pairs: Sequence[tuple[ImageSource, str]], known: Mapping[ImageSource, Any], asking: Asking
    ) -> list[float]:
        pictures, texts = [known[source] for source, _ in pairs], [text for _, text in pairs]
        questions, n = [filled(asking.question, text) for text in texts], len(pairs)
        said = [filled(answer, text) for answer in asking.answers for text in texts]
        times = len(asking.answers)  # one call, which reads every image once
        found = self.scorer.score_answers(pictures * times, questions * times, said)
        return [asking.value(*found[i::n]) for i in range(n)]


def open_scorer(
    directory: str | Path, *, batch: int = 16, dtype: str = "", template: str = "", **loading: Any
) -> Scorer:
    """The Scorer of a model directory.

    template: how it writes dialogues (default: its own; with an encoder one of ENCODER_PROMPTS). loading: see generate.load.load_model.
    """
    mesh = usual_mesh()
    named = "" if template in ENCODER_PROMPTS else template
    loaded = load_model(directory, dtype=dtype, mesh=mesh, template_name=named, **loading)
    generator = loaded.generator(dtype=dtype, mesh=mesh, batch_size=batch)
    if loaded.config.encoder_decoder:
        return AnswerScorer(loaded, generator, template or "t5_chat")
    if named != template:
        raise ConfigError(f"--template={template} is for models with an encoder: {directory} has none, leave it out")
    return AnswerScorer(loaded, generator)


def source_of(image: AnyImage) -> ImageSource:
    """Where an image is, whatever it was given as; arrays and Pillow images become PNG in memory."""
    if isinstance(image, ImageSource):
        return image
    if not isinstance(image, Image.Image) and Path(image).suffix != ".npy":
        return ImageSource(str(image))
    if isinstance(image, Image.Image):
        name, picture = "in memory", image
    else:
        name, picture = str(image), _of_array(Path(image))
    held = io.BytesIO()
    picture.save(held, "PNG", compress_level=1)
    return ImageSource(name, data=held.getvalue())


def _of_array(path: Path) -> Image.Image:
    """An `.npy` file of uint8 [H, W, 3] in OpenCV's order of colours."""
    try:
        array = np.load(path)
    except FileNotFoundError as error:
        raise ImageError(f"image {path} does not exist: check its name", "missing") from error
    except (ValueError, OSError, EOFError) as error:
        raise ImageError(f"image {path} is no array: {error}") from error
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8:
        raise ImageError(f"image {path} is {array.dtype} {array.shape}: it must be uint8 [height, width, 3] in BGR")
    return Image.fromarray(np.ascontiguousarray(array[..., ::-1]))

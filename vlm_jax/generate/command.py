"""`python -m vlm_jax generate`: answers to a prompt about some images, or to a whole question file.

    question line  {"question_id": 1, "image": "a.png", "text": "What is it?"}       image: a name, a list of names, or absent
    answer line    {"question_id": 1, "prompt": "What is it?", "text": "A cat.", "answer_id": "...", "model_id": "...", "metadata": {}}

Both formats are LLaVA's (model_vqa.py). Answers are written as they come, in the order of the questions.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import uuid
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vlm_jax.config import ConfigError
from vlm_jax.data.image_source import ImageSource
from vlm_jax.generate.adapters import adapter_flags
from vlm_jax.generate.decode import Decoding, Generator
from vlm_jax.generate.load import Loaded, load_model, usual_mesh

IN_FLIGHT = 4  # batches of questions whose images are in memory together


@dataclasses.dataclass(frozen=True)
class Question:
    """One line of a question file; `where` names it in messages."""

    id: Any
    text: str
    images: tuple[str, ...]
    where: str


def generate(
    model: str, *, image: Sequence[str] = (), prompt: str = "", questions: str = "", image_folder: str = "", out: str = "",
    template: str = "", dtype: str = "", batch: int = 8, seed: int = 0, stop: Sequence[str] = (), quant: str = "",
    adapter: Sequence[str] = (), use: Sequence[str] = (), **decoding: Any,
) -> None:  # fmt: skip
    """Print the answer to `prompt` about all of `image`, or write the answers to the `questions` file to `out` (both JSONL).

    quant, adapter, use: see generate.load.load_model and generate.adapters.adapter_flags.
    decoding: further fields of generate.decode.Decoding (max_new_tokens, temperature, top_k, top_p, beams ...).
    """
    if bool(prompt) == bool(questions):
        raise ConfigError("generate needs either --prompt or --questions")
    if questions and not out:
        raise ConfigError("--questions needs --out, the JSONL file for the answers")
    if questions and image:
        raise ConfigError("--image goes with --prompt: the lines of --questions name their images themselves")
    how = Decoding(stop=tuple(stop), **decoding)
    asked = list(read_questions(questions)) if questions else [Question(0, prompt, tuple(image), "--prompt")]
    mesh = usual_mesh()
    loaded = load_model(
        model, dtype=dtype, mesh=mesh, template_name=template, quant=quant, **adapter_flags(adapter, use)
    )
    generator = loaded.generator(dtype=dtype, mesh=mesh, batch_size=batch)
    answers = answer(loaded, generator, asked, how, seed, image_folder if questions else "")
    if not questions:
        print(next(answers))
        return
    name = Path(model).resolve().name
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    with open(out, "w", encoding="utf-8") as file:
        for question, text in zip(asked, tqdm(answers, total=len(asked), unit="question", file=sys.stderr)):
            file.write(json.dumps(answer_line(question, text, name), ensure_ascii=False) + "\n")
            file.flush()


def answer(
    loaded: Loaded,
    generator: Generator,
    questions: Sequence[Question],
    how: Decoding,
    seed: int = 0,
    image_folder: str = "",
) -> Iterator[str]:
    """The answers in order; images are read a few batches ahead. A sampled answer depends on its question and `seed` alone."""
    how = dataclasses.replace(how, stop=tuple(how.stop) + loaded.stop)
    step = IN_FLIGHT * generator.batch_size
    for start in range(0, len(questions), step):
        group = questions[start : start + step]
        prompts = []
        for question in group:
            sources = [ImageSource(str(Path(image_folder) / path), question.where) for path in question.images]
            prompts.append(loaded.prompt(question.text, [loaded.picture(source) for source in sources]))
        seeds = [zlib.crc32(f"{seed} {question.id} {question.text}".encode()) for question in group]
        yield from generator.text(prompts, how, seeds)


def read_questions(path: str) -> Iterator[Question]:
    """Questions of a JSONL file; a broken line raises one sentence naming file and line."""
    try:
        lines = (
            Path(path).read_text(encoding="utf-8").split("\n")
        )  # splitlines() would also cut at marks that JSON text may hold
    except OSError as error:
        raise ConfigError(f"the question file {path} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"the question file {path} is not UTF-8 text ({error.reason} at byte {error.start})"
        ) from error
    if not any(map(str.strip, lines)):
        raise ConfigError(f"the question file {path} holds no questions")
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield question_of(line, f"{path} line {number}")


def question_of(line: str, where: str) -> Question:
    """One parsed and checked line."""
    try:
        raw = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where} is not JSON: {error}") from error
    if not isinstance(raw, dict) or not isinstance(raw.get("text"), str) or "question_id" not in raw:
        raise ConfigError(f"{where} is no question: it needs `question_id` and `text`, and `image` if it is about one")
    images = raw.get("image") or ()
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, (list, tuple)) or not all(isinstance(name, str) for name in images):
        raise ConfigError(f"{where} has image={raw['image']!r}: it must be a file name or a list of file names")
    return Question(raw["question_id"], raw["text"], tuple(images), where)


def answer_line(question: Question, text: str, model_id: str) -> dict[str, Any]:
    """A line of the answer file; `answer_id` is a function of model, question and answer."""
    answer_id = uuid.uuid5(uuid.NAMESPACE_OID, json.dumps([model_id, question.id, text]))
    line = {"question_id": question.id, "prompt": question.text, "text": text}
    return {**line, "answer_id": answer_id.hex[:22], "model_id": model_id, "metadata": {}}

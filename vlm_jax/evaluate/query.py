"""What a benchmark asks a model: texts and images in, answers out, many at once."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence

from tqdm import tqdm

from vlm_jax.data.image_source import ImageSource
from vlm_jax.generate.decode import Decoding, Generator
from vlm_jax.generate.load import Loaded

IN_FLIGHT = 8  # batches whose images are in memory together


@dataclasses.dataclass(frozen=True)
class Query:
    """A question, or a dialogue question, answer, ..., question, about `images` (in front unless the texts place `<image>`)."""

    texts: tuple[str, ...]
    images: tuple[ImageSource, ...] = ()


@dataclasses.dataclass(frozen=True)
class Model:
    """A loaded model as benchmarks see it: `model(queries, max_new_tokens)` gives the greedy answers in order."""

    loaded: Loaded
    generator: Generator
    progress: bool = True

    def __call__(self, queries: Sequence[Query], max_new_tokens: int) -> list[str]:
        how, answers = Decoding(max_new_tokens, stop=self.loaded.stop), []
        step = IN_FLIGHT * self.generator.batch_size
        with tqdm(total=len(queries), unit="question", desc="ask", file=sys.stderr, disable=not self.progress) as bar:
            for start in range(0, len(queries), step):
                group = queries[start : start + step]
                prompts = [
                    self.loaded.prompt(query.texts, [self.loaded.picture(i) for i in query.images]) for query in group
                ]
                answers += self.generator.text(prompts, how)
                bar.update(len(group))
        return answers

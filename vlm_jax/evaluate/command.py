"""`python -m vlm_jax evaluate`: a model directory, a benchmark and its data in; a table on stdout and a JSON file out."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vlm_jax.config import ConfigError, one_of
from vlm_jax.evaluate import image_command, smartwatch, vqascore_sets
from vlm_jax.evaluate.query import Model
from vlm_jax.evaluate.vqascore import ANSWER, QUESTION, Asking, VQAScore
from vlm_jax.generate.adapters import adapter_flags
from vlm_jax.generate.load import load_model, usual_mesh
from vlm_jax.parallel import hosts


class Benchmark(NamedTuple):
    """run(model, data, limit, history) -> a JSON-able result with "answers"; table(result) -> text for people."""

    run: Callable[[Model, Path, int, str], dict[str, Any]]
    table: Callable[[dict[str, Any]], str]


# questions that a model answers; vqascore_sets.BENCHMARKS has those that ask how well texts fit images
BENCHMARKS: dict[str, Benchmark] = {
    "smartwatch": Benchmark(smartwatch.smartwatch, smartwatch.table),
}


def evaluate(
    task: str,
    model: str = "",
    data: str = "",
    *,
    dtype: str = "",
    out: str = "",
    batch: int = 16,
    limit: int = 0,
    history: str = "true",
    template: str = "",
    quant: str = "",
    adapter: Sequence[str] = (),
    use: Sequence[str] = (),
    question: str = QUESTION,
    answer: str = ANSWER,
    mode: str = "original",
    **pictures: Any,
) -> None:
    """Run the benchmark `task` on `model`, print the table and write the result with all answers or scores to `out`.

    Answers and scores do not depend on `batch` where dtype is float32. quant, adapter, use: see generate.load.load_model and
    generate.adapters.adapter_flags. Benchmarks of answers, which are greedy: `limit` takes the first records only, 0 is all, and
    `history` is what stands before the later questions of a dialogue. Benchmarks of scores: question, answer and mode as in
    evaluate.vqascore.Asking. Tasks that compare images: pictures and some others, as in evaluate.image_command.ImageFlags.
    """
    one_of("--task", task, (*BENCHMARKS, *vqascore_sets.BENCHMARKS, *image_command.TASKS))
    if task in image_command.TASKS:
        shared = {"model": model, "data": data, "dtype": dtype, "batch": batch, "limit": limit}
        result = image_command.run(task, image_command.ImageFlags(**pictures, **shared))
        return _show(result, image_command.table(result), out)
    if not model or not data:
        raise ConfigError(f"--task {task} needs --model, a model directory, and --data, the benchmark's file or folder")
    loading = {"quant": quant, **adapter_flags(adapter, use)}
    if task in BENCHMARKS:
        benchmark, mesh = BENCHMARKS[task], usual_mesh()
        loaded = load_model(model, dtype=dtype, mesh=mesh, template_name=template, **loading)
        answering = Model(loaded, loaded.generator(dtype=dtype, mesh=mesh, batch_size=batch))
        start = time.monotonic()
        result, table = benchmark.run(answering, Path(data), limit, history), benchmark.table
    else:
        if limit:
            raise ConfigError(
                f"--limit={limit} would make the numbers of {task} others than the published: leave it out"
            )
        opened = vqascore_sets.open_set(task, Path(data))
        scoring = VQAScore(
            model,
            batch=batch,
            asking=Asking(question, answer, mode),
            progress=True,
            dtype=dtype,
            template=template,
            **loading,
        )
        start = time.monotonic()
        asked = {"question": question, "answer": answer, "mode": mode}
        result, table = {**asked, **vqascore_sets.run(opened, scoring)}, vqascore_sets.table
    result = {"task": task, "model": model, "data": data, "seconds": round(time.monotonic() - start, 1), **result}
    _show(result, table(result), out)


def _show(result: dict[str, Any], text: str, out: str) -> None:
    if not hosts.is_first():
        return
    print(text)
    if out:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

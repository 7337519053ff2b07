"""`python -m vlm_jax evaluate`: a model directory, a benchmark and its data in; a table on stdout and a JSON file out."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from vlm_jax.config import one_of
from vlm_jax.evaluate import smartwatch
from vlm_jax.evaluate.query import Model
from vlm_jax.generate.load import load_model, usual_mesh


class Benchmark(NamedTuple):
    """run(model, data, limit, history) -> a JSON-able result with "answers"; table(result) -> text for people."""

    run: Callable[[Model, Path, int, str], dict[str, Any]]
    table: Callable[[dict[str, Any]], str]


BENCHMARKS: dict[str, Benchmark] = {
    "smartwatch": Benchmark(smartwatch.smartwatch, smartwatch.table),
}


def evaluate(
    model: str,
    task: str,
    data: str,
    *,
    dtype: str = "",
    out: str = "",
    batch: int = 16,
    limit: int = 0,
    history: str = "true",
    template: str = "",
) -> None:
    """Ask `model` everything of `task` greedily, print the table and write the result with all answers to `out`.

    Answers do not depend on `batch` where dtype is float32. limit: first records only, 0 is all.
    history: what stands before the later questions of a dialogue.
    """
    one_of("--task", task, tuple(BENCHMARKS))
    benchmark, mesh = BENCHMARKS[task], usual_mesh()
    loaded = load_model(model, dtype=dtype, mesh=mesh, template_name=template)
    answering = Model(loaded, loaded.generator(dtype=dtype, mesh=mesh, batch_size=batch))
    start = time.monotonic()
    result = benchmark.run(answering, Path(data), limit, history)
    result = {"task": task, "model": model, "data": data, "seconds": round(time.monotonic() - start, 1), **result}
    print(benchmark.table(result))
    if out:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

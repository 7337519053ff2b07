"""Our side of decode.py and eval_throughput.py: greedy answers of `generate`, asked from outside (see referee).

python launch/bench/answer_ours.py FOLDER CORES
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from referee import Clock, keep_programs, serve, take_cores
from stream import IMAGE_TOKEN, AnswerCase

take_cores(int(sys.argv[2]))

import jax  # noqa: E402

from vlm_jax.convert.write import export  # noqa: E402
from vlm_jax.generate.decode import Decoding, Generator  # noqa: E402
from vlm_jax.generate.rows import Picture, Prompt  # noqa: E402
from vlm_jax.models import vlm  # noqa: E402
from vlm_jax.models.vlm import Compute  # noqa: E402
from vlm_jax.planning.chips import CHIPS  # noqa: E402


class Ours:
    """Orders: write, answer."""

    def __init__(self, folder: Path):
        self.folder, self.case = folder, AnswerCase(**json.loads((folder / "case.json").read_text()))
        keep_programs(folder)
        self.config, dtype = self.case.shape.model, self.case.dtype
        self._seen: set[tuple] = set()  # questions whose programs are compiled
        self.params = vlm.init(self.config, 0, dict.fromkeys(vlm.shapes(self.config), dtype))

    def write(self) -> dict[str, Any]:
        """Export the weights for the other side. bandwidth: of the accelerator's memory, None elsewhere; weights: bytes that every step
        of decoding reads; slot: bytes of a slot's keys and values."""
        export(self.folder / "model", self.config, self.params, image_token=IMAGE_TOKEN)
        device, llm = jax.devices()[0].device_kind, self.config.llm
        chip = next((c for name, c in CHIPS.items() if name in device.lower()), None)
        read = [x for path, x in self.params.items() if path.startswith(("llm/blocks", "llm/head", "llm/norm"))]
        weights = sum(x.size * x.dtype.itemsize for x in read)
        return {
            "text": f"jax {jax.__version__} on {device}, {vlm.count(self.config) / 1e6:.0f} M parameters",
            "bandwidth": chip.bandwidth if chip and jax.default_backend() != "cpu" else None,
            "weights": weights,
            "slot": 2 * llm.layers * llm.kv_heads * llm.head_dim * jax.numpy.dtype(self.case.dtype).itemsize,
        }

    def answer(self, texts: list[int], batch: int, new: int) -> dict[str, Any]:
        """New ids of questions with `texts` text tokens, `batch` at a time; the time of the second of two runs."""
        prompts = [Prompt(ids.tolist(), (Picture(views),)) for ids, views in self.case.questions(texts)]
        compute = Compute(self.case.dtype, self.case.dtype)
        generator = Generator(self.config, self.params, compute=compute, eos=self.case.eos, batch_size=batch)
        how = Decoding(max_new_tokens=new)
        key = (tuple(texts), batch, new)
        if key not in self._seen:
            generator.tokens(prompts, how)
            self._seen.add(key)
        clock = Clock()
        found = generator.tokens(prompts, how)
        return clock.read() | {"ids": found}


if __name__ == "__main__":
    ours = Ours(Path(sys.argv[1]))
    serve({name: getattr(ours, name) for name in ("write", "answer")})

"""The other side of decode.py and eval_throughput.py: greedy answers of transformers' generate, asked from outside (see referee).

python launch/bench/answer_torch.py FOLDER CORES
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from referee import Clock, serve, take_cores
from stream import IMAGE_TOKEN, AnswerCase

take_cores(int(sys.argv[2]))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

from vlm_jax.config import IMAGE  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Peer:
    """Orders: text, answer."""

    def __init__(self, folder: Path):
        self.folder, self.case = folder, AnswerCase(**json.loads((folder / "case.json").read_text()))
        torch.set_num_threads(int(sys.argv[2]))
        self._model, self._seen = None, set()

    def text(self) -> dict[str, str]:
        """Versions."""
        device = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
        return {"text": f"torch {torch.__version__}, transformers {transformers.__version__} on {device}, SDPA"}

    @property
    def model(self) -> Any:
        """Loaded when it is first used."""
        if self._model is None:
            loaded = transformers.LlavaForConditionalGeneration.from_pretrained(
                self.folder / "model", dtype=getattr(torch, self.case.dtype), attn_implementation="sdpa"
            )
            self._model = loaded.to(DEVICE).eval()
            self._model.generation_config.eos_token_id = self.case.eos or None
            self._model.generation_config.pad_token_id = 0
        return self._model

    def inputs(self, questions: list) -> dict[str, torch.Tensor]:
        """Ids and normalised pixels of questions of one length, on the device."""
        vision = self.case.shape.model.vision
        takes = [np.where(ids == IMAGE, vision.features, 1) for ids, _ in questions]
        rows = [np.repeat(np.where(ids == IMAGE, IMAGE_TOKEN, ids), n) for (ids, _), n in zip(questions, takes)]
        pixels = np.concatenate([views for _, views in questions]).astype(np.float32) / 255
        pixels = ((pixels - np.float32(vision.mean)) / np.float32(vision.std)).transpose(0, 3, 1, 2)
        placed = torch.from_numpy(np.ascontiguousarray(pixels)).to(DEVICE, self.model.dtype)
        return {"input_ids": torch.from_numpy(np.stack(rows)).to(DEVICE), "pixel_values": placed}

    @torch.inference_mode()
    def answer(self, texts: list[int], batch: int, new: int, cache: str) -> dict[str, Any]:
        """New ids of questions with `texts` text tokens, `batch` at a time (which must be of one length); the time of the second of
        two runs. cache: "static" or "dynamic"."""
        questions = self.case.questions(texts)
        groups = [self.inputs(questions[i : i + batch]) for i in range(0, len(questions), batch)]
        how = {"do_sample": False, "max_new_tokens": new} | (
            {"cache_implementation": "static"} if cache == "static" else {}
        )

        def run() -> list[list[int]]:
            found = []
            for group in groups:
                mask = torch.ones_like(group["input_ids"])
                out = self.model.generate(**group, attention_mask=mask, **how)
                found += out[:, group["input_ids"].shape[1] :].tolist()
            return found

        key = (tuple(texts), batch, new, cache)
        if key not in self._seen:
            run()
            self._seen.add(key)
        clock = Clock()
        found = run()
        return clock.read() | {"ids": found}


if __name__ == "__main__":
    peer = Peer(Path(sys.argv[1]))
    serve({name: getattr(peer, name) for name in ("text", "answer")})

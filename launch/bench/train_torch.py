"""The other side of train.py: transformers' LlavaForConditionalGeneration and torch's fused AdamW, asked from outside (see referee).

    python launch/bench/train_torch.py FOLDER CORES

An update is the samples of one of ours, one after another in micro-batches that are padded to their longest, loss over the number of
labels of the update (as transformers' Trainer hands it on). bfloat16 is autocast over float32 masters of what is trained. Reading is a
DataLoader whose workers open and process the images with CLIPImageProcessor; token ids are at hand.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from referee import Clock, serve, take_cores
from stream import IMAGE_TOKEN, Case, Drawn

take_cores(int(sys.argv[2]))

import numpy as np  # noqa: E402
import peft  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from PIL import Image  # noqa: E402
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil  # noqa: E402

from vlm_jax.config import IGNORE, IMAGE  # noqa: E402

RATE = 1e-5
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class MicroBatches(torch.utils.data.Dataset):
    """Micro-batches as dicts of tensors, padded on the right."""

    def __init__(self, samples: list[Drawn], micros: list[list[int]], side: int, features: int):
        self.samples, self.micros, self.features = samples, micros, features
        self.processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})

    def __len__(self) -> int:
        return len(self.micros)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        chosen = [self.samples[i] for i in self.micros[index]]
        longest = max(one.length for one in chosen)
        ids, labels = np.zeros((len(chosen), longest), np.int64), np.full((len(chosen), longest), IGNORE)
        for row, one in enumerate(chosen):
            takes = np.where(one.tokens == IMAGE, self.features, 1)
            ids[row, : one.length] = np.repeat(np.where(one.tokens == IMAGE, IMAGE_TOKEN, one.tokens), takes)
            labels[row, : one.length] = np.repeat(one.labels, takes)
        batch = {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}
        if any(one.length < longest for one in chosen):
            mask = [[1] * one.length + [0] * (longest - one.length) for one in chosen]
            batch["attention_mask"] = torch.tensor(mask)
        files = [one.image for one in chosen if one.image]
        if files:
            images = [Image.open(file).convert("RGB") for file in files]
            batch["pixel_values"] = self.processor(images, return_tensors="pt")["pixel_values"]
        return batch


class Peer:
    """Orders: prepare, run, text."""

    def __init__(self, folder: Path):
        self.folder, self.case = folder, Case(**json.loads((folder / "case.json").read_text()))
        torch.set_num_threads(int(sys.argv[2]))

    def text(self) -> dict[str, str]:
        """Versions."""
        device = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
        adapters = f", peft {peft.__version__}" if self.case.mode == "lora" else ""
        return {
            "text": f"torch {torch.__version__}, transformers {transformers.__version__}{adapters} on {device}, SDPA"
        }

    def load(self, checkpoint: bool, compiled: bool, masters: str) -> None:
        """The model and its optimizer. masters: dtype of what is trained."""
        self.model = self.optimizer = None
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        lora, kind = self.case.mode == "lora", getattr(torch, masters)
        stored = getattr(torch, self.case.dtype) if lora else kind
        model = transformers.LlavaForConditionalGeneration.from_pretrained(
            self.folder / "model", dtype=stored, attn_implementation="sdpa"
        )
        model.model.vision_tower.to(getattr(torch, self.case.dtype)).requires_grad_(False)
        if lora:
            model = peft.PeftModel.from_pretrained(model, self.folder / "adapter", is_trainable=True)
            for parameter in model.parameters():
                parameter.data = parameter.data.to(kind) if parameter.requires_grad else parameter.data
        if checkpoint:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.config.use_cache = False
        self.model = model.to(DEVICE).train()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, RATE, weight_decay=0.0, fused=True)
        self.trained, self.forward = trained, self.model
        if compiled:
            self.forward = torch.compile(self.model, dynamic=None)

    def prepare(self, kind: str, way: dict[str, Any], updates: list[list[int]]) -> dict[str, Any]:
        """Load for a way, {"batch", "order": drawn or by length, "checkpoint", "compile", "masters"}; the first update."""
        self.case_way, clock = way, Clock()
        self.load(way["checkpoint"], way["compile"], way["masters"])
        samples, vision = self.case.samples_of(kind, self.folder), self.case.shape.model.vision
        self.counts, micros = [], []
        for update in updates:
            if way["order"] == "by length":
                update = sorted(update, key=lambda i: -samples[i].length)
            parts = [update[i : i + way["batch"]] for i in range(0, len(update), way["batch"])]
            self.counts.append((len(parts), sum(int((samples[i].labels[1:] != IGNORE).sum()) for i in update)))
            micros += parts
        self.data = MicroBatches(samples, micros, vision.image_size, vision.features)
        self.kept = [self._place(self.data[i]) for i in range(len(micros))]
        processed = sum(micro["input_ids"].numel() for micro in self.kept)
        took, kept = clock.read()["seconds"], iter(self.kept)
        loss, norm = self._update(kept, *self.counts[0])
        first = {"loss": float(loss), "grad_norm": float(norm)}
        for counts in self.counts[1:] if way["compile"] else ():  # shapes that were not seen yet are compiled now
            self._update(kept, *counts)
        return first | {"compile_seconds": took, "processed": processed}

    def run(self, loading: bool) -> dict[str, float]:
        """All updates once."""
        clock = Clock()
        micros = map(self._place, self._loader()) if loading else iter(self.kept)
        for counts in self.counts:
            loss, _ = self._update(micros, *counts)
        loss = float(loss)
        if loading:
            next(micros, None)  # lets the workers end
        memory = torch.cuda.max_memory_allocated() if DEVICE == "cuda" else 0
        return clock.read() | {"loss": loss, "memory": memory}

    def _loader(self) -> torch.utils.data.DataLoader:
        return torch.utils.data.DataLoader(
            self.data, batch_size=None, num_workers=self.case.threads, pin_memory=DEVICE == "cuda", prefetch_factor=2
        )

    def _place(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {key: x.to(DEVICE, non_blocking=True) for key, x in batch.items()}

    def _update(self, micros: Iterator[dict[str, torch.Tensor]], count: int, labels: int) -> tuple[Any, Any]:
        """One update of `count` micro-batches with `labels` supervised tokens: (loss, gradient norm before clipping)."""
        total = 0.0
        narrow = self.case.dtype == "bfloat16"
        for _ in range(count):
            with torch.autocast(DEVICE, torch.bfloat16) if narrow else contextlib.nullcontext():
                loss = self.forward(**next(micros), num_items_in_batch=labels, use_cache=False).loss
            loss.backward()
            total = total + loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total, norm


if __name__ == "__main__":
    peer = Peer(Path(sys.argv[1]))
    serve({name: getattr(peer, name) for name in ("text", "prepare", "run")})

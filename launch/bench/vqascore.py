"""VQAScore: pairs of image and text per second of ours and of torch, in one run, with the same random weights.

    python launch/bench/vqascore.py [--size small] [--images 8] [--texts 4] [--batch 8] [--rounds 3] [--dtype float32]

Size small | base | xl | xxl (the published ones; random weights). The peer is transformers' CLIPVisionModel and
T5ForConditionalGeneration in torch, loaded from our export in parts, without gradients, on a GPU where torch has one: image encoded,
projected, spliced, encoder, decoder over the answer, P(answer). It gets the pairs of a batch sorted by length and padded to the longest.
Both get pixels that are decoded and resized, and tokens of the same tokenizer. Before anything is timed all scores must agree.

    one text per image     every pair has an image of its own
    k texts per image      peer, per pair: an image is encoded for each of its texts, as linzhiqiu/t2v_metrics does
                           peer, once: it is encoded once for all of them, as ours
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
import torch
from transformers import CLIPVisionModel, T5ForConditionalGeneration

from vlm_jax.config import T5Config, VisionConfig, VLMConfig
from vlm_jax.convert.parts import VISION
from vlm_jax.convert.read import open_checkpoint
from vlm_jax.convert.write import export
from vlm_jax.data.images import Preprocess
from vlm_jax.data.new_tokenizer import T5, word_level
from vlm_jax.data.templates import TEMPLATES, template
from vlm_jax.data.tokenizer import load_tokenizer
from vlm_jax.evaluate.vqascore import ANSWER, QUESTION
from vlm_jax.generate.decode import Generator
from vlm_jax.generate.load import Loaded
from vlm_jax.generate.rows import Picture
from vlm_jax.generate.scoring import AnswerScorer, encode_apart
from vlm_jax.models import vlm
from vlm_jax.models.vlm import Compute

WORDS = (
    "a photo of two small dogs and one red car beside the old house in front of green trees under a cloudy sky".split()
)
SIZES = {
    "small": VLMConfig(
        VisionConfig(image_size=224, width=256, layers=6, heads=4, mlp=1024),
        llm=T5Config(8192, 512, 1280, encoder_layers=4, decoder_layers=4, heads=8),
    ),
    "base": VLMConfig(
        VisionConfig(image_size=224, width=768, layers=12, heads=12, mlp=3072),
        llm=T5Config(width=768, mlp=2048, encoder_layers=12, decoder_layers=12, heads=12),
    ),
    "xl": VLMConfig(llm=T5Config()),
    "xxl": VLMConfig(llm=T5Config(width=4096, mlp=10240, heads=64)),
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Peer:
    """The same model in torch."""

    def __init__(self, directory: Path, config: VLMConfig, dtype: str):
        kind = getattr(torch, dtype)
        self.config, self.kind = config, kind
        self.tower = CLIPVisionModel.from_pretrained(directory / VISION, dtype=kind).to(DEVICE).eval()
        self.t5 = T5ForConditionalGeneration.from_pretrained(directory / "t5", dtype=kind).to(DEVICE).eval()
        checkpoint, layers = open_checkpoint(directory), []
        for i in range(config.projector.depth):
            kernel, bias = (checkpoint.read(f"projector/layer_{i}/{part}") for part in ("kernel", "bias"))
            layers.append([torch.tensor(x.astype(np.float32)).to(DEVICE, kind) for x in (kernel.T, bias)])
        self.layers = layers
        self.mean, self.std = (
            torch.tensor(x).to(DEVICE, kind).reshape(3, 1, 1) for x in (config.vision.mean, config.vision.std)
        )

    def features(self, pixels: np.ndarray) -> torch.Tensor:
        """uint8 [n, S, S, 3] -> projected [n, P, D]."""
        x = torch.from_numpy(pixels).to(DEVICE).permute(0, 3, 1, 2).to(self.kind) / 255
        x = self.tower((x - self.mean) / self.std, output_hidden_states=True).hidden_states[-2][:, 1:]
        for i, (weight, bias) in enumerate(self.layers):
            x = torch.nn.functional.gelu(x) if i else x
            x = torch.nn.functional.linear(x, weight, bias)
        return x

    def batch(self, features: torch.Tensor, tokens: Sequence[np.ndarray], answer: np.ndarray) -> torch.Tensor:
        """Scores [B] of rows whose image stands where the marker of `tokens` is; padded to the longest."""
        longest, at = max(map(len, tokens)), int(np.flatnonzero(tokens[0] < 0)[0])
        padded = np.zeros((len(tokens), longest), np.int64)
        for row, ids in zip(padded, tokens):
            row[: len(ids)] = ids
        ids = torch.from_numpy(padded).to(DEVICE)
        before, after = self.t5.shared(ids[:, :at]), self.t5.shared(ids[:, at + 1 :])
        mask = torch.ones(len(tokens), longest - 1 + features.shape[1], dtype=torch.long, device=DEVICE)
        for row, own in zip(mask, tokens):
            row[len(own) - 1 + features.shape[1] :] = 0
        labels = torch.from_numpy(answer.astype(np.int64)).to(DEVICE).repeat(len(tokens), 1)
        x = torch.cat([before, features, after], 1)
        logits = self.t5(inputs_embeds=x, attention_mask=mask, labels=labels).logits.float()
        logp = torch.log_softmax(logits, -1).gather(-1, labels[..., None])[..., 0]
        return logp.mean(-1).exp()

    @torch.inference_mode()
    def score(
        self, pictures: Sequence[Picture], tokens: Sequence[np.ndarray], answer: np.ndarray, batch: int, once: bool
    ) -> np.ndarray:
        """float32 [pairs]; once: every picture is encoded once, else every pair."""
        order, found = sorted(range(len(tokens)), key=lambda i: len(tokens[i])), np.zeros(len(tokens), np.float32)
        table = {}
        if once:
            different = list({id(p): p for p in pictures}.values())
            for start in range(0, len(different), batch):
                some = different[start : start + batch]
                table |= dict(zip(map(id, some), self.features(np.concatenate([p.views for p in some]))))
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            if once:
                features = torch.stack([table[id(pictures[i])] for i in rows])
            else:
                features = self.features(np.concatenate([pictures[i].views for i in rows]))
            found[rows] = self.batch(features, [tokens[i] for i in rows], answer).cpu().numpy()
        return found


def captions(count: int) -> list[str]:
    """Texts of 4 to 24 words."""
    rng = np.random.default_rng(1)
    return [" ".join(rng.choice(WORDS, rng.integers(4, 25))) for _ in range(count)]


def scorer_of(config: VLMConfig, dtype: str, batch: int, folder: Path) -> AnswerScorer:
    """Our scorer of a random model."""
    word_level([TEMPLATES["v1"].system, "USER: ASSISTANT: Yes", QUESTION, " ".join(WORDS)], folder, T5)
    params = vlm.init(config, 0, dict.fromkeys(vlm.shapes(config), dtype))
    loaded = Loaded(config, params, load_tokenizer(folder), Preprocess.of(config), template("t5_v1"), (1,))
    generator = Generator(config, params, loaded.tokenizer, compute=Compute(dtype, dtype), batch_size=batch)
    return AnswerScorer(loaded, generator, whole_vocabulary=True)


def alternate(runs: dict[str, Callable[[], np.ndarray]], rounds: int) -> dict[str, tuple[float, float]]:
    """{name: (median seconds, median CPU seconds)}, one of each in turn so that other work slows all of them."""
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            began, cpu = time.perf_counter(), time.process_time()
            run()
            spent[name].append((time.perf_counter() - began, time.process_time() - cpu))
    return {name: tuple(map(statistics.median, zip(*times))) for name, times in spent.items()}


def agree(ours: np.ndarray, theirs: np.ndarray, dtype: str, name: str) -> float:
    """Largest relative difference; an error if it is more than rounding."""
    difference = float(np.abs(ours / theirs - 1).max())
    if difference > (1e-3 if dtype == "float32" else 0.3) or not np.ptp(theirs) > 0:
        raise SystemExit(f"{name}: scores differ by up to {difference:.2g}, they are not of the same model")
    return difference


def case(scorer: AnswerScorer, peer: Peer, images: int, texts: int, a: argparse.Namespace) -> list[str]:
    """Rows of the table for `images` images with `texts` texts each."""
    side, rng = peer.config.vision.image_size, np.random.default_rng(0)
    pictures = [Picture(rng.integers(0, 256, (1, side, side, 3), np.uint8)) for _ in range(images)]
    shown = [picture for picture in pictures for _ in range(texts)]
    questions = [QUESTION.format(text) for text in captions(images * texts)]
    answers = [ANSWER] * len(questions)
    pairs = [encode_apart(scorer.loaded.tokenizer, scorer.prompt, *pair) for pair in zip(questions, answers)]
    tokens, said = [pair[0] for pair in pairs], pairs[0][1]

    def ours() -> np.ndarray:
        return np.asarray([np.exp(logp.mean()) for logp in scorer.score_answers(shown, questions, answers)])

    ways = {"torch, image per pair": False, "torch, image once": True} if texts > 1 else {"torch": False}
    runs = {name: (lambda once=once: peer.score(shown, tokens, said, a.batch, once)) for name, once in ways.items()}
    worst = max(agree(ours(), run(), a.dtype, name) for name, run in runs.items())
    spent, n = alternate({**runs, "ours": ours}, a.rounds), len(questions)
    own = spent["ours"]
    name = f"{images} images, {texts} text{'s' * (texts > 1)} each"
    rows = [
        f"| {name} | {way} | {n / wall:.2f} | {cpu / n:.3f} | {wall / own[0]:.2f}x | {cpu / own[1]:.2f}x |"
        for way, (wall, cpu) in spent.items()
    ]
    return [*rows, f"(largest relative difference of a score: {worst:.1e})"]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="small")
    for name, default in (("images", 4), ("texts", 4), ("batch", 8), ("rounds", 3), ("threads", os.cpu_count())):
        parser.add_argument(f"--{name}", type=int, default=default)
    usual = "float32" if DEVICE == "cpu" else "bfloat16"
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default=usual)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    config = dataclasses.replace(SIZES[a.size], aspect="square")
    with tempfile.TemporaryDirectory() as folder:
        scorer = scorer_of(config, a.dtype, a.batch, Path(folder) / "tokenizer")
        export(Path(folder) / "parts", config, scorer.loaded.params, names="parts")
        peer = Peer(Path(folder) / "parts", config, a.dtype)
    devices = f"ours on {jax.devices()[0].device_kind}, torch on {DEVICE} ({a.threads} threads)"
    print(f"{a.size}: {vlm.count(config) / 1e6:.0f} M parameters, {a.dtype}, batches of {a.batch}; {devices}\n")
    print(
        "| case | | pairs/s | CPU s per pair | time against ours | CPU time against ours |\n|---|---|---|---|---|---|"
    )
    pairs = a.images * a.texts
    notes = []
    for images, texts in ((pairs, 1), (a.images, a.texts)):
        *rows, note = case(scorer, peer, images, texts, a)
        notes.append(note)
        print("\n".join(rows), flush=True)
    print("\n" + "\n".join(notes))


if __name__ == "__main__":
    main()

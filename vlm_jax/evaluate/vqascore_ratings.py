"""Benchmarks where people rated how well an image fits a text, in their published files.

tifa160       tifa160.json {key: {text_id, image_path, text}}, dsg_tifa160_anns.csv with the ratings
seetrue       SeeTRUE.csv (image, text, label, dataset_source): DrawBench, EditBench, COCO-T2I; images in images/
flickr8k_*    flickr8k.json, crowdflower_flickr8k.json {key: {image_path, human_judgement: [{caption, rating}]}}
genai_image   genai_image.json {number: {prompt, models: {name: [ratings]}}}, genai_skills.json {skill: [numbers]}, MODEL/NUMBER.jpeg
genai_video   genai_video.json alike, frames MODEL/video_NUMBER_frame_0000.jpg ...
t2vscore      t2vscore_alignment_score.json alike, frames t2vscore_images/MODEL/video_NUMBER_frame_0000.jpg ...
genai_ranking human_rating.json {number: {prompt, models: {name: {"1": [ratings] ... "9"}}}}, MODEL/00000_01.jpeg ...
stanfordt23d  stanfordt23d.json {number: {prompt, models: {name: [ratings]}}}, views MODEL/NUMBER/0/rgb_0.jpg ...
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from vlm_jax.data.image_source import ImageSource
from vlm_jax.evaluate.vqascore_files import (
    BenchmarkError,
    Entry,
    ImageGrid,
    Item,
    Numbers,
    ScoreSet,
    folder_of,
    keyed_entries,
    read_json,
    single,
    table_of,
)  # fmt: skip
from vlm_jax.evaluate.vqascore_metrics import agreement, auroc, best_above_worst, kendall, pearson

# how the annotations of DSG (arXiv 2310.18235) call the models of TIFA
TIFA_MODELS = {
    "mini-dalle": "mini_dalle", "vq-diffusion": "vq_diffusion", "sd1dot5": "stable_diffusion_v1_5",
    "sd2dot1": "stable_diffusion_v2_1", "sd1dot1": "stable_diffusion_v1_1",
}  # fmt: skip
IMAGE_MODELS = ("DALLE_3", "SDXL_Turbo", "DeepFloyd_I_XL_v1", "Midjourney_6", "SDXL_2_1", "SDXL_Base")
VIDEO_MODELS = ("Floor33", "Gen2", "Pika_v1", "Modelscope")
T2V_MODELS = ("floor33", "gen2", "pika", "modelscope", "zeroscope")
RANKED_MODELS, RANKED = ("DALLE_3", "SDXL_Base"), 9  # images of one prompt
FRAMES = 36
# the published numbers leave Shap-E out, as a space before its name keeps it from being found
MODELS_3D, UNPUBLISHED_3D = ("dreamfusion", "instant3d", "latent-nerf", "magic3d", "mvdream", "shap-e"), "shap-e"
VIEWS, COLUMNS = (2, 15, 28, 41, 54, 67, 80, 93, 106), 3
FLICKR_PAIRS = 20_000_000  # pairs of captions that are compared; the original draws a tenth of the 1.1e9


def tifa160(data: Path) -> ScoreSet:
    """160 prompts drawn by five models, rated in DSG: Pearson, tau-b and pairwise accuracy against the mean rating."""
    known = keyed_entries(data / "tifa160.json")
    path = data / "dsg_tifa160_anns.csv"
    ratings: dict[str, list[float]] = {}
    for line in table_of(path, ("model_type", "source_id", "answer")):
        name = line.text("model_type")
        if name not in TIFA_MODELS:
            raise BenchmarkError(f"{line.where} has model_type={name!r}: it must be one of {', '.join(TIFA_MODELS)}")
        ratings.setdefault(f"{line.text('source_id')}_{TIFA_MODELS[name]}", []).append(line.number("answer"))
    without = next((key for key in known if key not in ratings), None)
    if without is not None:
        raise BenchmarkError(f"{path} has no rating of {without}, which {data / 'tifa160.json'} holds")
    images = folder_of(data, "tifa160", "images")
    items = [Item((entry.image(images, "image_path"),), (entry.text("text"),)) for entry in known.values()]
    return ScoreSet(items, _agreement([float(np.mean(ratings[key])) for key in known]))


def seetrue(data: Path, only: str = "") -> ScoreSet:
    """Images drawn for texts and whether they fit (arXiv 2305.10400): AUROC by data set. only: one of them, "" is all."""
    path = data / "SeeTRUE.csv"
    lines = table_of(path, ("image", "text", "label", "dataset_source"))
    lines = [line for line in lines if only in ("", line.text("dataset_source"))]
    if not lines:
        raise BenchmarkError(f"{path} has no line with dataset_source={only}")
    images, sources = folder_of(data, "images"), np.asarray([line.text("dataset_source") for line in lines])
    labels = np.asarray([line.number("label") for line in lines])
    items = [Item((line.image(images, "image"),), (line.text("text"),)) for line in lines]

    def numbers(scores: Sequence[np.ndarray]) -> Numbers:
        values = single(scores)
        chosen = {source: sources == source for source in sorted(set(sources.tolist()))}
        return {
            source: {
                "auroc": auroc(labels[at], values[at]),
                "items": int(at.sum()),
                "positive": int((labels[at] > 0).sum()),
            }
            for source, at in chosen.items()
        }

    return ScoreSet(items, numbers)


def flickr8k(data: Path, file: str) -> ScoreSet:
    """Captions of photographs, rated by experts or by a crowd; tau-c is what is usual for the experts' three steps."""
    items, human = [], []
    folder = data if (data / file).exists() else folder_of(data, "flickr8k")
    for entry in keyed_entries(folder / file).values():
        for judgement in entry.entries("human_judgement"):
            caption = " ".join(judgement.text("caption").split()).strip(".").strip(" ")
            items.append(Item((entry.image(folder, "image_path"),), (caption,)))
            human.append(judgement.number("rating"))

    def numbers(scores: Sequence[np.ndarray]) -> Numbers:
        values = single(scores)
        found = agreement(human, values, sample=FLICKR_PAIRS)
        return {"all": {**found, "kendall_c": kendall(human, values, "c")}}

    return ScoreSet(items, numbers)


def genai_image(data: Path) -> ScoreSet:
    """GenAI-Bench (arXiv 2406.13743), prompts drawn by six models: agreement with ratings, by skill too, and mean scores by model."""
    prompts, items, human, model_of, number_of = keyed_entries(data / "genai_image.json"), [], [], [], []
    for model, key, entry in _by_model(prompts, IMAGE_MODELS):
        image = ImageSource(str(data / model / f"{key}.jpeg"), entry.where)
        items.append(Item((image,), (entry.text("prompt"),)))
        human.append(entry.object("models").mean(model))
        model_of.append(model)
        number_of.append(_number(key, entry))
    skills = _skills(data / "genai_skills.json")
    numbers = functools.partial(_of_prompts, np.asarray(human), np.asarray(model_of), np.asarray(number_of), skills)
    return ScoreSet(items, numbers)


def genai_video(data: Path) -> ScoreSet:
    """GenAI-Bench for videos: the score is the mean over the first 36 frames, which are files; the last stands for missing ones."""
    prompts, items, human = keyed_entries(data / "genai_video.json"), [], []
    for model, key, entry in _by_model(prompts, VIDEO_MODELS):
        items.append(_video(data / model, key, entry))
        human.append(entry.object("models").mean(model))
    return ScoreSet(items, _agreement(human))


def t2vscore(data: Path) -> ScoreSet:
    """T2VScore's videos of five models (arXiv 2401.07781), rated for how well they fit their prompts; frames as `genai_video`."""
    prompts, items, human = keyed_entries(data / "t2vscore_alignment_score.json"), [], []
    images = folder_of(data, "t2vscore_images")
    for model, key, entry in _by_model(prompts, T2V_MODELS):
        if entry.object("models").get(model, list, "a list of numbers"):
            items.append(_video(images / model, f"{_number(key, entry):04d}", entry))
            human.append(entry.object("models").mean(model))
    return ScoreSet(items, _agreement(human))


def _video(folder: Path, number: str, entry: Entry) -> Item:
    """The frames of a video against its prompt."""
    frames = sorted(folder.glob(f"video_{number}_frame_*.jpg"))[:FRAMES]
    if not frames:
        raise BenchmarkError(f"{folder} has no video_{number}_frame_0000.jpg: cut the videos into frames first")
    frames += [frames[-1]] * (FRAMES - len(frames))
    return Item(tuple(ImageSource(str(frame), entry.where) for frame in frames), (entry.text("prompt"),))


def genai_ranking(data: Path) -> ScoreSet:
    """GenAI-Bench's nine images of a prompt: is the one that people like best scored above the one they like least?

    "perfect" are the prompts whose best image has the full 5 points.
    """
    prompts, items, human = keyed_entries(data / "human_rating.json"), [], []
    models = [model for model in RANKED_MODELS if (data / model).is_dir()]
    if not models:
        raise BenchmarkError(f"{data} has none of the folders {', '.join(RANKED_MODELS)}")
    for model, key, entry in _by_model(prompts, models):
        ratings = entry.object("models").object(model)
        for place in range(1, RANKED + 1):
            name = f"{_number(key, entry):05d}_{place:02d}.jpeg"
            items.append(Item((ImageSource(str(data / model / name), entry.where),), (entry.text("prompt"),)))
            human.append(ratings.mean(str(place)))
    count = [sum(model in entry.object("models").values for entry in prompts.values()) for model in models]
    ends = np.cumsum([0, *count])

    def numbers(scores: Sequence[np.ndarray]) -> Numbers:
        ours, theirs = single(scores).reshape(-1, RANKED), np.asarray(human).reshape(-1, RANKED)
        rows: Numbers = {}
        for model, start, end in zip(models, ends, ends[1:]):
            rows |= ranking(model, theirs[start:end], ours[start:end])
        return rows

    return ScoreSet(items, numbers)


def ranking(name: str, human: np.ndarray, score: np.ndarray) -> Numbers:
    """Ratings and scores [prompts, images] -> the numbers of all prompts, of the perfect ones and of the others."""
    right, perfect = best_above_worst(human, score), human.max(axis=1) == 5
    rows = {
        name: {
            "pearson": pearson(human.ravel(), score.ravel()), "kendall_b": kendall(human.ravel(), score.ravel()),
            "ranking_accuracy": float(right.mean()), "items": len(right),
        }
    }  # fmt: skip
    for word, chosen in (("perfect", perfect), ("not perfect", ~perfect)):
        if chosen.any():
            rows[f"{name}, {word}"] = {"ranking_accuracy": float(right[chosen].mean()), "items": int(chosen.sum())}
    return rows


def stanfordt23d(data: Path) -> ScoreSet:
    """60 prompts as objects in 3D: nine views in a 3 x 3 grid are scored as one image.

    "published" leaves out Shap-E, as the original does by mistake; "all" has it where its folder is there.
    """
    prompts, items, human, model_of = keyed_entries(data / "stanfordt23d.json"), [], [], []
    models = [m for m in MODELS_3D if m != UNPUBLISHED_3D or (data / m).is_dir()]
    for model, key, entry in _by_model(prompts, models):
        if not entry.object("models").get(model, list, "a list of numbers"):
            continue
        views = tuple(str(data / model / key / "0" / f"rgb_{view}.jpg") for view in VIEWS)
        grid = ImageGrid(str(data / model / key), entry.where, parts=views, columns=COLUMNS)
        items.append(Item((grid,), (entry.text("prompt"),)))
        human.append(entry.object("models").mean(model))
        model_of.append(model)
    published, ratings = np.asarray(model_of) != UNPUBLISHED_3D, np.asarray(human)

    def numbers(scores: Sequence[np.ndarray]) -> Numbers:
        values = single(scores)
        rows = {"published": agreement(ratings[published], values[published])}
        return rows if published.all() else {**rows, "all": agreement(ratings, values)}

    return ScoreSet(items, numbers)


def _by_model(prompts: Mapping[str, Entry], models: Sequence[str]) -> list[tuple[str, str, Entry]]:
    """(model, key, entry) in the order of the published scores: all prompts of a model, then those of the next."""
    found = [(m, key, entry) for m in models for key, entry in prompts.items() if m in entry.object("models").values]
    if not found:
        raise BenchmarkError(
            f"{next(iter(prompts.values())).where} and all others have no model of {', '.join(models)}"
        )
    return found


def _number(key: str, entry: Entry) -> int:
    if not key.isdecimal():
        raise BenchmarkError(f"{entry.where} must have a number as its key")
    return int(key)


def _skills(path: Path) -> dict[str, list[int]]:
    """{skill: numbers of prompts}; {} without the file."""
    if not path.exists():
        return {}
    found = read_json(path)
    if not isinstance(found, dict) or any(not isinstance(v, list) for v in found.values()):
        raise BenchmarkError(f"{path} must be an object {{skill: [numbers of prompts]}}")
    return {skill: [int(n) for n in numbers] for skill, numbers in found.items()}


def _of_prompts(
    human: np.ndarray,
    model_of: np.ndarray,
    number_of: np.ndarray,
    skills: Mapping[str, Sequence[int]],
    scores: Sequence[np.ndarray],
) -> Numbers:
    values = single(scores)
    rows: Numbers = {"all": agreement(human, values)}
    for skill, of in skills.items():
        chosen = np.isin(number_of, of)
        if chosen.any():
            rows[skill] = agreement(human[chosen], values[chosen])
    for model in dict.fromkeys(model_of.tolist()):
        mine = values[model_of == model]
        rows[model] = {"mean_score": float(mine.mean()), "std_score": float(mine.std()), "items": len(mine)}
    return rows


def _agreement(human: Sequence[float]):
    return lambda scores: {"all": agreement(human, single(scores))}

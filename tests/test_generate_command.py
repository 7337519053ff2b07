"""`generate` and `evaluate` on a directory as training leaves it: prompts, question files, the smart-watch benchmark, and wrong input."""

import json

import numpy as np
import pytest
from PIL import Image

from tests import tiny_model
from vlm_jax.__main__ import main, parse
from vlm_jax.config import ConfigError, UserError
from vlm_jax.convert.read import model_directory
from vlm_jax.data.smartwatch_files import WatchSet, draw_all
from vlm_jax.data.smartwatch_files import generate as draw
from vlm_jax.evaluate import smartwatch
from vlm_jax.generate.command import generate, read_questions
from vlm_jax.generate.load import load_model, template_for
from vlm_jax.parallel.mesh import make_mesh
from vlm_jax.parallel.mesh_config import MeshConfig


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    texts = [turn["value"] for record in draw_all(WatchSet(8))[1] for turn in record["conversations"]]
    return tiny_model.write(tmp_path_factory.mktemp("run"), [tiny_model.WORDS, *texts])


@pytest.fixture(scope="module")
def watches(tmp_path_factory):
    folder = tmp_path_factory.mktemp("watches")
    draw(folder, WatchSet(3, seed=1), processes=1, progress=False)
    return folder


@pytest.fixture(scope="module")
def questions(model):
    folder = model.parent
    for i in range(2):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (20, 30, 3), np.uint8)).save(folder / f"{i}.png")
    asked = [
        {"question_id": 7, "image": "0.png", "text": "What is it?", "category": "detail"},
        {"question_id": "b", "text": "Is it a cat?"},
        {"question_id": 9, "image": ["0.png", "1.png"], "text": "one or two?"},
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in asked) + "\n")
    return folder / "questions.jsonl", asked


def run_file(model, questions, out, *flags):
    path = model.parent / out
    arguments = [
        "--questions",
        str(questions),
        "--image_folder",
        str(model.parent),
        "--out",
        str(path),
        "--max_new_tokens",
        "6",
    ]
    assert main(["generate", "--model", str(model), *arguments, *flags]) == 0
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_question_file(model, questions, capsys):
    file, asked = questions
    lines = run_file(model, file, "one.jsonl", "--batch", "1")
    assert [line["question_id"] for line in lines] == [7, "b", 9]
    assert [line["prompt"] for line in lines] == [q["text"] for q in asked]
    assert all(set(line) == {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"} for line in lines)
    assert all(line["text"] and line["model_id"] == model.name for line in lines)
    assert run_file(model, file, "many.jsonl", "--batch", "8") == lines
    image = str(model.parent / "0.png")
    capsys.readouterr()
    assert (
        main(["generate", "--model", str(model), "--image", image, "--prompt", "What is it?", "--max_new_tokens", "6"])
        == 0
    )
    assert capsys.readouterr().out.strip() == lines[0]["text"]


def test_sampled_answers_do_not_depend_on_the_order_of_the_file(model, questions):
    file, asked = questions
    turned = model.parent / "turned.jsonl"
    turned.write_text("".join(json.dumps(q) + "\n" for q in asked[::-1]))
    flags = ("--temperature", "1.0", "--seed", "3")
    assert run_file(model, turned, "turned_out.jsonl", *flags)[::-1] == run_file(
        model, file, "straight_out.jsonl", *flags
    )


@pytest.mark.parametrize(
    "line, words",
    [
        ('{"question_id": 1', "line 2 is not JSON"),
        ('{"question_id": 1, "image": "0.png"}', "line 2 is no question"),
        ('{"question_id": 1, "text": "What?", "image": [5]}', "line 2 has image=.5.: it must be a file name"),
        ('{"question_id": 1, "text": "What?", "image": "gone.png"}', "gone.png.*line 2.*does not exist"),
    ],
)
def test_broken_questions_are_named(model, questions, line, words):
    broken = model.parent / "broken.jsonl"
    broken.write_text('{"question_id": 0, "text": "What?"}\n' + line + "\n")
    with pytest.raises(ValueError, match=words):
        generate(
            str(model),
            questions=str(broken),
            image_folder=str(model.parent),
            out=str(model.parent / "x.jsonl"),
            max_new_tokens=2,
        )


@pytest.mark.parametrize(
    "flags, words",
    [
        ([], "--prompt or --questions"),
        (["--questions", "x.jsonl"], "needs --out"),
        (["--questions", "x.jsonl", "--out", "y.jsonl", "--image", "a.png"], "--image goes with --prompt"),
        (["--questions", "gone.jsonl", "--out", "x.jsonl"], "gone.jsonl cannot be read"),
        (["--prompt", "What?", "--template", "v9"], "template 'v9'"),
        (["--prompt", "What?", "--top_p", "0"], "top_p"),
        (["--prompt", "What?", "--dtype", "int8"], "--dtype='int8'"),
    ],
)
def test_wrong_flags(model, flags, words):
    with pytest.raises(ValueError, match=words):
        generate(**parse("generate", ["--model", str(model), *flags]))


def test_question_files_that_hold_nothing_or_no_text(tmp_path):
    for content, words in ((b"\n \n", "holds no questions"), (b"\xff\xfe", "not UTF-8")):
        (tmp_path / "q.jsonl").write_bytes(content)
        with pytest.raises(ConfigError, match=words):
            list(read_questions(str(tmp_path / "q.jsonl")))
    text = "a\u2028b\u0085c"  # line ends for str.splitlines, plain text for JSON
    (tmp_path / "q.jsonl").write_text(
        json.dumps({"question_id": 1, "text": text}, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    assert [q.text for q in read_questions(str(tmp_path / "q.jsonl"))] == [text]


def test_a_run_directory_means_its_export(model, tmp_path):
    (tmp_path / "config.json").write_text('{"model": {}, "train": {}}')  # the recipe of the run
    (tmp_path / "export").symlink_to(model)
    assert load_model(tmp_path).config == load_model(model).config
    (tmp_path / "export").unlink()
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="without an export"):
        model_directory(tmp_path)
    with pytest.raises(ValueError, match="no config.json"):
        model_directory(tmp_path / "nowhere")


def test_loading_onto_a_mesh(model):
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2, seq=2))
    alone, spread = load_model(model), load_model(model, mesh=mesh)
    assert not spread.params["llm/blocks/mlp/gate/kernel"].sharding.is_fully_replicated
    assert alone.params.keys() == spread.params.keys()
    for path, value in alone.params.items():
        np.testing.assert_array_equal(value, spread.params[path])


def test_template_of_a_directory(model, tmp_path):
    assert template_for(model) == "v1"
    for jinja, name in (
        ("{# vlm_jax: mpt #}...", "mpt"),
        ("USER: ASSISTANT:", "v1"),
        ("[INST] x [/INST]", "mistral_instruct"),
    ):
        (tmp_path / "chat_template.jinja").write_text(jinja)
        assert template_for(tmp_path) == name
    for folder, name in (("llava-v1.5-7b", "llava_v1"), ("llava-llama-2-13b", "llava_llama_2"), ("my-model", "v1")):
        (tmp_path / folder).mkdir()
        assert template_for(tmp_path / folder) == name


def test_smartwatch(model, watches):
    out = model.parent / "scores.json"
    assert (
        main(
            [
                "evaluate",
                "--model",
                str(model),
                "--task",
                "smartwatch",
                "--data",
                str(watches),
                "--out",
                str(out),
                "--limit",
                "2",
            ]
        )
        == 0
    )
    result = json.loads(out.read_text())
    assert set(result["accuracy"]) == {"weather", "weather_pos", "battery_pos", "time_exact", "battery_exact"}
    assert set(result["score"]) == {"time", "battery"} and set(result["count"].values()) == {2}
    assert set(result["chance"]) == set(result["accuracy"]) | set(result["score"])
    assert len(result["answers"]) == 10 and all(
        a["truth"] and not a["question"].startswith("<image>") for a in result["answers"]
    )


@pytest.mark.parametrize(
    "content", ["{}", "[1]", '[{"image": "a.png", "conversations": [{"from": "human"}]}]', '[{"conversations": []}]']
)
def test_records_that_are_none_are_named(tmp_path, content):
    (tmp_path / "records.json").write_text(content)
    with pytest.raises(UserError, match="records.json: record 0 is no smart-watch record"):
        smartwatch.read_records(tmp_path)


def test_an_output_that_cannot_be_written_ends_in_one_sentence(model, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "q.jsonl").write_text('{"question_id": 0, "text": "What?"}')
    arguments = [
        "--questions",
        str(tmp_path / "q.jsonl"),
        "--out",
        str(tmp_path / "file" / "x.jsonl"),
        "--max_new_tokens",
        "2",
    ]
    assert main(["generate", "--model", str(model), *arguments]) == 2
    assert capsys.readouterr().err.splitlines() == [f"vlm_jax: {tmp_path / 'file'}: File exists"]


class Oracle:
    """Answers every query with a made-up word, or the truth, and remembers what it was asked."""

    def __init__(self, truths):
        self.truths, self.asked = truths, []

    def __call__(self, queries, max_new_tokens):
        self.asked += queries
        return [self.truths[(query.images[0].path, query.texts[-1])] for query in queries]


@pytest.mark.parametrize("history", smartwatch.HISTORIES)
def test_history_of_a_dialogue(watches, history):
    records = json.loads((watches / "records.json").read_text())
    said, truths = {}, {}
    for record in records:
        texts = [turn["value"] for turn in record["conversations"]]
        for k, (question, truth) in enumerate(zip(texts[::2], texts[1::2])):
            key = (str(watches / "images" / record["image"]), question)
            said[key] = truth if k != 1 else "nowhere"
            truths[key] = truth
    oracle = Oracle(said)
    result = smartwatch.smartwatch(oracle, watches, history=history)
    wrong = {a["attribute"] for a in result["answers"] if not a["right"]}
    assert wrong == {name.removesuffix("_exact") for name, value in result["accuracy"].items() if value < 1}
    assert [a["right"] for a in result["answers"]] == [True, False, True, True, True] * 3
    longest = max(oracle.asked, key=lambda query: len(query.texts))
    if history == "none":
        assert len(longest.texts) == 1
    else:
        assert len(longest.texts) == 9
        shown = {"true": truths, "own": said}[history]
        assert longest.texts[3] == shown[(longest.images[0].path, longest.texts[2])]

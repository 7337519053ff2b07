"""`evaluate --task fid` and `--task reconstruction` as a person types them: numbers, files, and what is refused."""

import json

import numpy as np
import pytest
from PIL import Image

from tests import tiny_visual_tokenizers as tiny
from tests.test_hosts import launch
from vlm_jax.__main__ import main
from vlm_jax.convert import torch_pickle
from vlm_jax.convert.shards import Planned, write_file
from vlm_jax.convert.visual_tokenizer import save_tokenizer
from vlm_jax.data.crops import Crop
from vlm_jax.data.image_source import ImageSource
from vlm_jax.data.images import open_image
from vlm_jax.data.smartwatch_files import WatchSet, generate
from vlm_jax.evaluate import image_metrics, inception
from vlm_jax.evaluate.frechet import Moments, frechet_distance, read_statistics
from vlm_jax.generate.visual_codes import VisualCoder
from vlm_jax.visual_tokenizers import names, perceptual

STEM = {"Conv2d_1a_3x3": (32, 3, 3, 3), "Conv2d_2a_3x3": (32, 32, 3, 3), "Conv2d_2b_3x3": (64, 32, 3, 3)}


def inception_tensors():
    """Tensors under the published names, of which only the first three convolutions (--dims 64) have their shapes."""
    rng, found = np.random.default_rng(0), {"fc.weight": np.zeros((inception.CLASSES, 1), np.float32)}
    for name in inception.convolutions():
        shape = STEM.get(name, (1, 1, 1, 1))
        found[f"{name}.conv.weight"] = rng.normal(0, np.prod(shape[1:]) ** -0.5, shape).astype(np.float32)
        for part, value in (("weight", 1), ("bias", 0.1), ("running_mean", 0), ("running_var", 1)):
            found[f"{name}.bn.{part}"] = np.full(shape[0], value, np.float32)
    return found


def lpips_tensors():
    rng, width, vgg, heads = np.random.default_rng(1), 3, {}, {}
    for k, numbers in enumerate(perceptual.SLICES):
        for n in numbers:
            vgg[f"features.{n}.weight"] = rng.normal(0, (9 * width) ** -0.5, (4, width, 3, 3)).astype(np.float32)
            vgg[f"features.{n}.bias"], width = np.zeros(4, np.float32), 4
        heads[f"lin{k}.model.1.weight"] = rng.uniform(size=(1, 4, 1, 1)).astype(np.float32)
    return vgg, heads


def draw(folder, count, seed, size=(24, 20), ending=".png"):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8)).save(folder / f"{i}{ending}")
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Weights, a tokenizer, folders of images."""
    root = tmp_path_factory.mktemp("files")
    torch_pickle.save(root / "inception.pth", inception_tensors())
    vgg, heads = lpips_tensors()
    torch_pickle.save(root / "vgg.pth", vgg)
    write_file(root / "heads.safetensors", [Planned(k, v.shape, v.dtype, lambda v=v: v) for k, v in heads.items()])
    config = tiny.TINY["hq"]
    save_tokenizer(root / "tokenizer", config, *names.read(config, tiny.tensors(config)))
    draw(root / "a", 5, 0)
    draw(root / "b", 7, 1)
    generate(root / "watches", WatchSet(count=4, seed=2), processes=1, progress=False)
    return root


def evaluate(capsys, *arguments):
    """(exit code, stdout, stderr) of `evaluate`."""
    code = main(["evaluate", *map(str, arguments)])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_fid_of_folders_and_of_statistics(files, tmp_path, capsys):
    # one image that is larger, and one that is broken
    draw(tmp_path / "a" / "large", 1, 5, (40, 30))
    for i in range(5):
        (tmp_path / "a" / f"{i}.png").write_bytes((files / "a" / f"{i}.png").read_bytes())
    (tmp_path / "a" / "torn.png").write_bytes((files / "a" / "0.png").read_bytes()[:60])
    weights = (f"--weights={files / 'inception.pth'}", "--dims=64", "--batch=3")
    args = ("--task=fid", f"--images={tmp_path / 'a'}", f"--reference={files / 'b'}")
    made = (f"--statistics={tmp_path / 's.npz'}", f"--out={tmp_path / 'r.json'}")
    code, out, err = evaluate(capsys, *args, *weights, *made)
    found = json.loads((tmp_path / "r.json").read_text())
    assert code == 0 and "torn.png is broken" in err and f"{found['fid']:.3f}" in out
    assert (found["images"], found["reference"], found["dims"], found["full_rank"]) == (6, 7, 64, False)
    assert "the covariance lacks full rank" in out and "6 images, 7 in the reference" in out

    network = inception.Inception(inception.read_inception(inception_tensors()), 64, 8)

    def moments(paths):
        rows = network([np.asarray(open_image_file(path)) for path in paths]).astype(np.float64)
        return Moments(rows.mean(0), np.cov(rows, rowvar=False))

    a = moments([p for p in sorted((tmp_path / "a").rglob("*.png")) if p.name != "torn.png"])
    b = moments(sorted((files / "b").glob("*.png")))
    assert found["fid"] == pytest.approx(frechet_distance(a, b), rel=1e-5)
    kept = read_statistics(tmp_path / "s.npz")
    np.testing.assert_allclose(kept.sigma, a.sigma, rtol=1e-4, atol=1e-7)

    # statistics on both sides need no network; the distance to themselves is 0
    twice = (f"--images={tmp_path / 's.npz'}", f"--reference={tmp_path / 's.npz'}")
    code, out, _ = evaluate(capsys, "--task=fid", *twice)
    assert code == 0 and out.split()[:2] == ["fid", "0.000"]


def open_image_file(path):
    return open_image(ImageSource(str(path)))


TWO_PROCESSES = """
import os, sys
from vlm_jax.__main__ import main
root = sys.argv[1]
code = main(["evaluate", "--task=fid", f"--images={root}/a", f"--reference={root}/b", f"--weights={root}/inception.pth", "--dims=64",
             f"--out={root}/two.json"])
print("ended:", code, flush=True)
os._exit(0)
"""


@pytest.mark.slow
def test_two_processes_find_what_one_finds(files, capsys):
    said = launch(files, 2, 0, TWO_PROCESSES)
    assert all("ended: 0" in text for text in said), said
    assert sum("5 images, 7 in the reference" in text for text in said) == 1  # only the first speaks
    places = (f"--images={files / 'a'}", f"--reference={files / 'b'}", f"--weights={files / 'inception.pth'}")
    assert evaluate(capsys, "--task=fid", *places, "--dims=64", f"--out={files / 'one.json'}")[0] == 0
    one, two = (json.loads((files / f"{name}.json").read_text()) for name in ("one", "two"))
    assert (two["images"], two["reference"]) == (5, 7) and two["fid"] == pytest.approx(one["fid"], rel=1e-6)


def test_reconstructions_of_a_tokenizer(files, tmp_path, capsys):
    args = (
        "--task=reconstruction",
        f"--model={files / 'tokenizer'}",
        f"--images={files / 'a'}",
        "--size=16",
        "--batch=8",
    )
    networks = (
        f"--weights={files / 'inception.pth'}",
        "--dims=64",
        f"--lpips={files / 'vgg.pth'}",
        f"--lpips={files / 'heads.safetensors'}",
    )
    code, out, _ = evaluate(capsys, *args, *networks, f"--out={tmp_path / 'r.json'}")
    found = json.loads((tmp_path / "r.json").read_text())
    assert code == 0 and (found["images"], found["identical"], found["size"], found["crop"]) == (5, 0, 16, "centre")
    assert set(found["codebooks"]) == {"top", "bottom"} and found["rfid"] > 0 and found["lpips"] > 0
    for name in ("rfid", "psnr", "ssim", "lpips", "top", "bottom", "perplexity"):
        assert name in out

    coder = VisualCoder.open(str(files / "tokenizer"), batch=8)
    originals = np.stack([Crop(16, "centre")(open_image_file(p)) for p in sorted((files / "a").glob("*.png"))])
    codes = coder.encode(originals)
    pictures = coder.decode(codes)
    mse = ((originals / 255 - pictures / 255) ** 2).mean((1, 2, 3))
    assert found["mse"] == pytest.approx(mse.mean(), rel=1e-5)
    assert found["psnr"] == pytest.approx((-10 * np.log10(mse)).mean(), rel=1e-5)
    assert found["ssim"] == pytest.approx(float(np.mean(image_metrics.ssim(originals, pictures))), rel=1e-5)
    vgg, heads = lpips_tensors()
    lpips = image_metrics.lpips(perceptual.read_lpips(vgg | heads), originals, pictures)
    assert found["lpips"] == pytest.approx(float(np.mean(lpips)), rel=1e-4)
    assert found["codebooks"]["top"]["usage"] == len(np.unique(codes[0])) / 24
    assert found["codebooks"]["bottom"]["usage"] == len(np.unique(codes[1])) / 20


def test_pictures_of_the_same_names(files, tmp_path, capsys):
    folder, pairs = draw(tmp_path / "a", 3, 0, ending=".bmp"), ("--task=reconstruction", f"--reference={files / 'a'}")
    for i in (3, 4):
        Image.open(files / "a" / f"{i}.png").save(folder / f"{i}.bmp")  # the same pixels
    shifted = np.asarray(Image.open(folder / "0.bmp")).astype(int) // 2
    Image.fromarray(shifted.astype(np.uint8)).save(folder / "0.bmp")
    code, out, _ = evaluate(capsys, *pairs, f"--images={folder}", f"--out={tmp_path / 'r.json'}")
    found = json.loads((tmp_path / "r.json").read_text())
    assert code == 0 and (found["images"], found["identical"]) == (5, 4) and "codebooks" not in found
    assert found["psnr"] == pytest.approx(5 * found["mse"] and -10 * np.log10(5 * found["mse"]), rel=1e-5)
    code, out, _ = evaluate(capsys, *pairs, f"--images={files / 'a'}")
    assert code == 0 and "identical" in out and "1.0000" in out
    ranges = [
        float(evaluate(capsys, *pairs, f"--images={folder}", *more)[1].split("ssim")[1].split()[0])
        for more in ((), ("--compat=ssim_range_2",))
    ]
    assert ranges[0] < ranges[1] < 1  # twice the range hides errors


def test_double_rescaling_lowers_an_rfid(files, tmp_path, capsys):
    pairs = ("--task=reconstruction", f"--reference={draw(tmp_path / 'c', 5, 9)}", f"--images={files / 'a'}")
    weights = (f"--weights={files / 'inception.pth'}", "--dims=64")
    for compat in ("", "rfid_double_rescale"):
        assert evaluate(capsys, *pairs, *weights, f"--compat={compat}", f"--out={tmp_path / f'r{compat}.json'}")[0] == 0
    right, washed = (json.loads((tmp_path / f"r{c}.json").read_text())["rfid"] for c in ("", "rfid_double_rescale"))
    assert 0 < washed < right


def test_watches_are_read_back(files, tmp_path, capsys):
    watches = (
        f"--images={files / 'watches' / 'images'}",
        f"--data={files / 'watches'}",
        f"--out={tmp_path / 'r.json'}",
    )
    code, out, _ = evaluate(
        capsys, "--task=reconstruction", f"--model={files / 'tokenizer'}", *watches, "--size=64", "--crop=squash"
    )
    found = json.loads((tmp_path / "r.json").read_text())["watches"]
    assert code == 0 and found["originals"]["all"] == 1 and found["originals"]["count"] == 4
    assert found["pictures"]["all"] == 0 and "read back    originals  pictures" in out  # random weights draw no watch
    code, _, _ = evaluate(capsys, "--task=reconstruction", f"--reference={files / 'watches' / 'images'}", *watches)
    assert code == 0 and json.loads((tmp_path / "r.json").read_text())["watches"]["pictures"]["all"] == 1


def refused(capsys, *arguments):
    code, _, err = evaluate(capsys, *arguments)
    *before, last = err.splitlines()  # before it only the bar of progress
    assert code == 2 and last.startswith("vlm_jax: ") and not [line for line in before if line and "%|" not in line], (
        err
    )
    return last


def test_what_is_missing_is_named(files, tmp_path, capsys):
    images, pairs = f"--images={files / 'a'}", f"--reference={files / 'b'}"
    weights, model = f"--weights={files / 'inception.pth'}", f"--model={files / 'tokenizer'}"
    for arguments, sentence in (
        (("--task=fid",), "needs --images"),
        (("--task=fid", images), "needs --reference (images or statistics to compare with) or --statistics"),
        (("--task=fid", images, pairs), "--weights is empty: features need FID's Inception network"),
        (("--task=fid", images, pairs, "--weights=no.pth"), "no.pth does not exist"),
        (("--task=fid", images, pairs, weights, "--dims=100"), "--dims='100' is unknown: use one of 64, 192, 768, 2048"),
        (("--task=fid", images, "--reference=none", weights), "none does not exist: check --reference"),
        (("--task=fid", images, "--reference=none.npz", weights), "none.npz does not exist"),
        (("--task=fid", images, pairs, weights, "--batch=0"), "--batch=0 must be at least 1"),
        (("--task=fid", images, pairs, weights, "--limit=1", "--dims=64"), "has 1 usable images: a covariance needs at least 2"),
        (("--task=reconstruction", images), "needs either --model (a visual tokenizer) or --reference"),
        (("--task=reconstruction", images, pairs, model), "needs either --model"),
        (("--task=reconstruction", images, model, "--size=15"), "--size=15 must be a multiple of 8"),
        (("--task=reconstruction", images, model, "--crop=ten"), "--crop=ten gives 10 views of an image"),
        (("--task=reconstruction", images, model, "--size=16", "--compat=x"), "--compat='x' is unknown"),
        (("--task=reconstruction", images, model, "--size=16", "--lpips=no.pth"), "no.pth does not exist"),
        (
            ("--task=reconstruction", images, model, "--size=16", f"--lpips={files / 'vgg.pth'}"),
            "the LPIPS weights lack lin_0: give a file with VGG-16 and one with the five linear heads",
        ),
        (("--task=reconstruction", images, pairs), "5.png is not among --images"),
        (("--task=reconstruction", images, model, "--size=64", f"--data={files / 'a'}"), "does not say how smart-watches were drawn"),
        (("--task=smartwatch", model), "--task smartwatch needs --model, a model directory, and --data"),
    ):  # fmt: skip
        assert sentence in refused(capsys, *arguments), arguments


def test_images_that_do_not_fit_are_named(files, tmp_path, capsys):
    small = draw(tmp_path / "small", 5, 0, (20, 20))
    said = refused(capsys, "--task=reconstruction", f"--images={files / 'a'}", f"--reference={small}")
    assert "0.png: 24 x 20 and 20 x 20 pixels cannot be compared" in said
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "0.png").write_bytes((files / "a" / "0.png").read_bytes()[:60])
    code, _, err = evaluate(
        capsys, "--task=reconstruction", f"--model={files / 'tokenizer'}", "--size=16", f"--images={tmp_path / 'torn'}"
    )
    assert code == 2 and "0.png is broken" in err and "none of the images can be used: the lines above say why" in err
    other = draw(tmp_path / "other", 5, 0, (224, 224))
    said = refused(
        capsys, "--task=reconstruction", f"--images={other}", f"--reference={other}", f"--data={files / 'watches'}"
    )
    assert "4.png is no picture of --data: smart-watch pictures are called 0.png, 1.png ..." in said


def test_other_networks_are_refused(files, tmp_path, capsys):
    args = ("--task=fid", f"--images={files / 'a'}", f"--reference={files / 'b'}", "--dims=64")
    torch_pickle.save(tmp_path / "other.pth", {**inception_tensors(), "fc.weight": np.zeros((1000, 1), np.float32)})
    assert "other.pth is an Inception of 1000 classes" in refused(capsys, *args, f"--weights={tmp_path / 'other.pth'}")
    said = refused(capsys, *args[:-1], f"--weights={files / 'inception.pth'}")  # --dims=2048
    assert "inception.pth: the tensors of the convolutions do not have the shapes of FID's Inception network" in said
    less = {k: v for k, v in inception_tensors().items() if k != "Mixed_7c.branch_pool.bn.bias"}
    torch_pickle.save(tmp_path / "less.pth", less)
    said = refused(capsys, *args, f"--weights={tmp_path / 'less.pth'}")
    assert "less.pth lacks the tensor Mixed_7c.branch_pool.bn.bias" in said

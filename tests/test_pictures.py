"""Pictures of features and the cost table: probe.py --task pca and --task cost."""

import json
import tarfile

import numpy as np
import pytest
import torch
from conftest import error_of
from PIL import Image
from safetensors.torch import load_file

import brixel
import probe


@pytest.fixture
def ckpt(tmp_path):
    brixel.Brixel(brixel.load_backbone("timm:test_vit", None)).save(tmp_path / "out.pt")
    return tmp_path / "out.pt"


def test_colors_follow_the_reference_and_stay_in_its_range():
    torch.manual_seed(0)
    reference = torch.randn(8, 10, 10) * torch.tensor([9.0, 5, 3, 1, 1, 1, 1, 1])[:, None, None]
    same, scaled = probe.pca_rgb(reference, reference, 100 * reference)
    assert same.shape == (10, 10, 3) and same.dtype == np.uint8
    order = reference[0].flatten().argsort()       # the first component is the widest channel: red follows it
    red = same[..., 0].reshape(-1)[order.numpy()].astype(int)
    assert abs(np.corrcoef(np.arange(100), red)[0, 1]) > 0.9
    assert ((scaled == 0) | (scaled == 255)).mean() > 0.9         # out of the reference's range


def test_similarity_is_highest_at_the_query():
    features = torch.randn(16, 6, 9)
    picture = probe.similarity(features, (4 + 0.5) / 9, (2 + 0.5) / 6)
    brightness = picture.astype(int).sum(-1)
    assert picture.shape == (6, 9, 3) and np.unravel_index(brightness.argmax(), (6, 9)) == (2, 4)


def test_pca_writes_a_panel_per_photo_and_the_features(ckpt, photos, tmp_path, capsys):
    Image.new("RGB", (90, 200), "red").save(photos / "tall.png")
    probe.main(["--task", "pca", "--ckpt", str(ckpt), "--image", str(photos / "1.jpg"), str(photos / "*.png"), "--size", "64", "--teacher",
                "--query", "10", "20", "--out", str(tmp_path), "--save_features", str(tmp_path / "features.safetensors")])
    features = load_file(tmp_path / "features.safetensors")
    assert {path.rsplit("/", 1)[1]: tuple(value.shape) for path, value in features.items()} == {
        "1.jpg": (64, 16, 20), "tall.png": (64, 36, 16)}
    for name in ("1", "tall"):
        assert Image.open(tmp_path / f"{name}.pca.png").height > 600          # two rows
    model = brixel.load(ckpt)
    x = model.preprocess(Image.open(photos / "1.jpg"), 64)
    torch.testing.assert_close(features[str(photos / "1.jpg")], model(x)[0])


@pytest.mark.parametrize("args, sentence", [
    ([], "needs a checkpoint"), (["--image", "no/such.jpg"], "set --image"), (["--query", "5", "5", "5"], "must be X Y"),
    (["--query", "999", "5"], "lies outside"), (["--out", "no/such"], "--out no/such/PHOTO.pca.png: no such folder"),
    (["--save_features", "no/such/a.safetensors"], "--save_features no/such/a.safetensors: no such folder")])
def test_mistakes_are_one_sentence(ckpt, photos, args, sentence, capsys):
    common = ["--task", "pca", *(["--ckpt", str(ckpt), "--image", str(photos / "1.jpg")] if args else [])]
    assert error_of(probe.main, [*common, *args]) == "2"
    assert sentence in capsys.readouterr().err


def test_cost_counts_parameters_flops_and_time(tmp_path, capsys):
    probe.main(["--task", "cost", "--backbone", "timm:test_vit", "--repeats", "2", "--out", str(tmp_path / "cost.png")])
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    baseline, ours, teacher = record["rows"]
    assert [row["size"] for row in record["rows"]] == [256, 256, 1024]
    assert ours["trained_M"] == pytest.approx(sum(p.numel() for p in brixel.Upsampler(64).parameters()) / 1e6)
    assert baseline["gflops"] < ours["gflops"] and 16 * baseline["gflops"] < teacher["gflops"]      # attention is quadratic
    assert all(row["ms"] > 0 for row in record["rows"]) and teacher["gflops_over_teacher"] == 1
    assert Image.open(tmp_path / "cost.png").width > 500


def test_cost_grows_with_size_and_batch(tmp_path, capsys):
    probe.main(["--task", "cost", "--backbone", "timm:test_vit", "--repeats", "1", "--size", "64", "128", "--batch_size", "1", "2",
                "--out", str(tmp_path / "cost.png")])
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [(row["size"], row["batch"]) for row in rows if row["row"] == "BRIXEL"] == [(64, 1), (64, 2), (128, 1), (128, 2)]
    one, two = (next(row for row in rows if row["row"] == "teacher" and row["batch"] == batch) for batch in (1, 2))
    assert two["gflops"] == pytest.approx(2 * one["gflops"])


def test_peak_memory_of_a_known_call():
    assert probe.peak_mib(lambda: torch.ones(50, 2**20).sum(), "cpu") == pytest.approx(200, abs=30)


def test_results_keep_the_whole_stem(tmp_path):
    probe.main(["--task", "cost", "--backbone", "timm:test_vit", "--repeats", "1", "--out", str(tmp_path / "lr1.0e-3")])
    assert [path.name for path in tmp_path.iterdir()] == ["lr1.0e-3.png"]


def test_photos_of_a_tar_each_get_a_picture(ckpt, photos, tmp_path):
    with tarfile.open(tmp_path / "two.tar", "w") as tar:
        for name in ("1.jpg", "2.jpg"):
            tar.add(photos / name, name)
    probe.main(["--task", "pca", "--ckpt", str(ckpt), "--image", str(tmp_path / "two.tar"), "--size", "64", "--out", str(tmp_path)])
    assert len(list(tmp_path.glob("two_*.pca.png"))) == 2


def test_photo_whose_tar_has_gone_is_one_sentence(ckpt, photos, monkeypatch, capsys):
    def gone(*args):
        raise probe.PhotoError("unreadable", "FileNotFoundError: two.tar")
    monkeypatch.setattr(probe.PhotoIndex, "open", gone)
    assert error_of(probe.main, ["--task", "pca", "--ckpt", str(ckpt), "--image", str(photos / "1.jpg")]) == "2"
    assert "1.jpg cannot be read: FileNotFoundError: two.tar" in capsys.readouterr().err


def test_flops_of_a_linear_layer_by_hand():
    layer, x = torch.nn.Linear(30, 50, bias=False), torch.randn(7, 30)
    assert probe.gflops(lambda: layer(x)) == pytest.approx(2 * 7 * 30 * 50 / 1e9)

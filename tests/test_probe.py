"""Readouts, losses and metrics against the released code's numbers and by hand; every task through the command line."""
import json
import os
import re
import subprocess
import sys
import tarfile
from argparse import Namespace

import numpy as np
import pytest
import render
import torch
from accelerate import Accelerator
from conftest import FIXTURES, ROOT, TINY, error_of, photo, tensors
from PIL import Image
from safetensors.torch import load_file

import brixel
import probe


@pytest.fixture(scope="module")
def released():
    return tensors("probes")


@pytest.fixture(scope="module")
def values():
    return json.loads((FIXTURES / "probes_values.json").read_text())


def dpt_parameters(tensors, prefix):
    """Parameters of a released DPT head, conv_0 the shallowest of its levels, under the names of probe.DPT."""
    names = {rf"conv_{3 - i}\.": f"project.{i}." for i in range(4)}
    names |= {rf"ref_{3 - i}\.resConfUnit2\.conv\.": f"after.{i}." for i in range(4)}
    names |= {rf"ref_{2 - i}\.resConfUnit1\.conv\.": f"before.{i}." for i in range(3)} | {r"out_conv\.": "out."}
    found = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    for old, new in names.items():
        found = {re.sub(f"^{old}", new, key): value for key, value in found.items()}
    return found


def updated(readout, pred, **batch):
    readout.update(pred, batch)
    return readout.compute()


# ----------------------------------------------------------------------------------------------------------------------
# Readouts

def test_depth_head_agrees_with_the_released_one(released):
    head = probe.Depth(hidden=32).head(16)
    head.load_state_dict(dpt_parameters(released, "depth_head.head."))
    torch.testing.assert_close(head(released["feats"]), released["depth_head_out"], atol=5e-5, rtol=0)
    up = probe.Probe({"depth": head})({"features": released["feats"], "depth": torch.zeros(2, 1, 32, 48)})["depth"]
    torch.testing.assert_close(up, released["depth_head_out_up_32x48"], atol=5e-5, rtol=0)


def test_normal_head_agrees_with_the_released_one(released):
    head = probe.Normals(hidden=32).head(16)
    head.load_state_dict(dpt_parameters(released, "normal_head.head."))
    torch.testing.assert_close(head(released["feats"]), released["normal_head_out"], atol=5e-5, rtol=0)


def test_silog_agrees_with_the_released_one(released, values):
    batch = {"depth": released["depth_gt"], "valid": released["depth_valid"] > 0}
    total, count = probe.Depth().loss(released["depth_pred"], batch)
    assert (total / count).item() == pytest.approx(values["official.silog_loss beta=0.15"], abs=5e-5)


def test_silog_by_hand_without_the_image_that_has_no_depth():
    # log differences 1 and 3: mean of squares 5, square of the mean 4; the second image has no valid pixel
    pred = torch.tensor([[1.0, 3.0], [9.0, 9.0]]).exp().view(2, 1, 1, 2)
    valid = torch.tensor([True, True, False, False]).view(2, 1, 1, 2)
    total, count = probe.Depth(silog_beta=0.5).loss(pred, {"depth": torch.ones(2, 1, 1, 2), "valid": valid})
    assert count == 1 and total.item() == pytest.approx(5 - 0.5 * 4)


def test_cosine_loss_agrees_with_the_released_one(released, values):
    batch = {"normal": released["normal_gt (NaN where invalid)"], "normal_valid": released["normal_valid"] > 0}
    total, count = probe.Normals().loss(released["normal_pred"], batch)
    assert (total / count).item() == pytest.approx(values["official.cosine_normal_loss"], abs=5e-5)


def test_cross_entropy_counts_labeled_pixels_only():
    label = torch.tensor([[[0, 255, 3]]], dtype=torch.uint8)
    total, count = probe.Segmentation(4).loss(torch.zeros(1, 4, 1, 3), {"label": label})
    assert count == 2 and total.item() == pytest.approx(2 * torch.tensor(4.0).log().item())


def test_depth_metrics_agree_with_the_released_ones(released, values):
    got = updated(probe.Depth(), released["depth_pred"], depth=released["depth_gt"], valid=released["depth_valid"] > 0)
    names = {"AbsRel": "abs_rel", "RMSE": "rmse", "log10": "log10", "δ1": "delta1", "δ2": "delta2", "δ3": "delta3"}
    for key, suffix in (("official.compute_metrics", ""),
                        ("numpy64.correct per-image scale_shift LSQ over valid only", "_aligned")):
        want = {names[name] + suffix: value for name, value in values[key].items()}
        assert want == pytest.approx({name: got[name] for name in want}, abs=5e-5)


def test_normal_metrics_agree_with_the_released_ones(released, values):
    got = updated(probe.Normals(), released["normal_pred"], normal=released["normal_gt (NaN where invalid)"],
                  normal_valid=released["normal_valid"] > 0)
    want = values["official.normal_metrics"]
    assert got["angle_mean"] == pytest.approx(want["ang_mean"], abs=5e-5)
    assert got["angle_median"] == pytest.approx(want["ang_med"], abs=probe.Normals.bin / 2)
    shares = [got[f"share_{limit}"] for limit in (11.25, 22.5, 30)]
    assert shares == pytest.approx([want[f"t_{limit}"] for limit in (11.25, 22.5, 30)], abs=1e-6)


def test_mean_iou_agrees_with_both_readings(released, values):
    label, pred = released["seg.label (255 ignore, classes 4,5 absent)"], released["seg.pred"]
    logits = torch.nn.functional.one_hot(pred, 6).permute(2, 0, 1)[None].float()
    got = updated(probe.Segmentation(6), logits, label=label[None].to(torch.uint8))
    assert got == pytest.approx({"miou": values["numpy.mIoU present classes only"],
                                 "miou_absent_zero": values["official.mIoU 6 classes (absent classes count as 0)"],
                                 "pixel_accuracy": values["official.pixAcc"]}, abs=1e-9)


def test_an_image_without_a_valid_pixel_counts_nowhere():
    pred, maps = torch.rand(2, 2, 3, 4, 4) + 0.1
    valid = torch.tensor([True, False]).view(2, 1, 1, 1).expand(2, 1, 4, 4)
    batch = {"depth": maps[:, :1], "valid": valid, "normal": maps, "normal_valid": valid}
    for readout, channels in ((probe.Depth, 1), (probe.Normals, 3)):
        one = updated(readout(), pred[:1, :channels], **{key: value[:1] for key, value in batch.items()})
        assert updated(readout(), pred[:, :channels], **batch) == pytest.approx(one)


def test_colors_by_hand():
    facing = torch.tensor([0.0, 0, 1]).view(1, 3, 1, 1)                                # away from the camera is +z here
    normals = {"normal": facing, "normal_valid": torch.ones(1, 1, 1, 1) > 0}
    assert probe.paint("normal", 2 * facing, normals)[1].tolist() == [[[[127, 127, 255]]]]
    batch = {"label": torch.tensor([[[0, 1, 255]]], dtype=torch.uint8)}
    true, pred = probe.paint("label", torch.eye(2)[[0, 0, 1]].T.view(1, 2, 1, 3), batch)
    assert (pred[0, 0, 0] == true[0, 0, 0]).all() and (pred[0, 0, 1] != true[0, 0, 1]).any() and not true[0, 0, 2].any()
    depth = torch.tensor([1.0, 4.0, 0.0]).view(1, 1, 1, 3)
    true, _ = probe.paint("depth", depth, {"depth": depth, "valid": depth > 0})
    assert true[0, 0, 0].sum() > true[0, 0, 1].sum() > 0 and not true[0, 0, 2].any()    # near is brighter


# ----------------------------------------------------------------------------------------------------------------------
# Features

class Tiny(torch.nn.Module):
    """A backbone of one layer; counts the images it has seen."""
    name, patch_size, embed_dim, mean, std = "tiny", 8, 4, (0.5,) * 3, (0.5,) * 3

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.seen = torch.nn.Conv2d(3, 4, 8, 8), 0

    def forward(self, x):
        self.seen += len(x)
        return self.conv(x)


class Items(torch.utils.data.Dataset):
    split = "train"

    def __len__(self):
        return 7

    def __getitem__(self, i):
        image = torch.randint(0, 255, (3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(i))
        return {"image": image, "label": image[0] // 128}


CFG = Namespace(batch_size=3, num_workers=0, seed=1, lr=0.1, weight_decay=0.0, epochs=3)


def items(room=1e9, jitter=(0,)):
    return probe.Features(Items(), Tiny(), Accelerator(cpu=True), CFG, room, jitter)


def test_features_that_fit_are_computed_once_and_change_nothing():
    """An item takes 32 bytes of float16 features and 256 of labels: 7 x 288 in all."""
    fitted = []
    for room, kept in ((7 * 288, True), (7 * 288 - 1, False)):
        features = items(room)
        fitted.append(probe.fit([probe.Segmentation(2)], features, 4, CFG, features.acc).state_dict())
        assert (features.kept is not None) == kept and features.nbytes == 7 * 288
        assert features.model.seen == 1 + (7 if kept else 3 * 7)                        # 1: the first, for its size
    torch.testing.assert_close(*fitted, atol=1e-6, rtol=1e-5)


def test_an_epoch_holds_every_image_once_in_batches_of_even_size():
    order = [2, 4, 0, 1, 3, 5, 6]
    labels = [batch["label"] for batch in items().batches(torch.tensor(order))]
    assert [len(label) for label in labels] == [3, 2, 2]
    assert torch.equal(torch.cat(labels), torch.stack([Items()[i]["label"] for i in order]))


@pytest.mark.parametrize("room", [1e9, 0])
def test_color_jitter_changes_features_with_the_epoch_and_nothing_else(room):
    features = items(room, jitter=(0.2, 0.2, 0.2, 0.05))
    order = torch.tensor([2, 5])
    first, again, later = (next(features.batches(order, epoch))["features"] for epoch in (0, 0, 1))
    other = next(features.batches(torch.tensor([5, 2]), 0))["features"].flip(0)
    assert torch.equal(first, again) and torch.equal(first, other) and not torch.equal(first, later)
    assert not torch.equal(first, next(items().batches(order))["features"])


# ----------------------------------------------------------------------------------------------------------------------
# The four benchmarks, through the command line

SMALL = ["--size", "56", "--epochs", "2", "--batch_size", "4", "--num_workers", "0"]


@pytest.fixture(scope="module")
def benchmarks(tmp_path_factory):
    """The four benchmarks, 5 training and 3 validation images each, and a BRIXEL checkpoint with a random adapter."""
    root = tmp_path_factory.mktemp("benchmarks")
    textures = [photo(np.random.default_rng(i), 128, 128) for i in range(12)]
    splits = {"train": 5, "val": 3}
    render.write_ade20k(root / "ade20k", textures, splits, height=120, width=160)
    render.write_cityscapes(root / "cityscapes", textures, splits, height=64, width=128)
    render.write_nyu_parquet(root / "nyu", textures, splits, height=72, width=96)
    render.write_navi(root / "navi", textures, splits, height=120, width=160, objects=2)
    brixel.Brixel(brixel.load_backbone("timm:test_vit", None)).save(root / "out.pt")
    return root


@pytest.fixture
def run(benchmarks, capsys, monkeypatch, fresh_accelerate):
    """Runs probe.main in the folder of the benchmarks.  -> (what it printed, the JSON object in the last line)."""
    def run(task, *flags):
        fresh_accelerate()
        monkeypatch.chdir(benchmarks)
        probe.main(["--task", task, "--data_dir", task, *SMALL, *flags])
        printed = capsys.readouterr().out
        return printed, json.loads(printed.strip().splitlines()[-1])
    return run


@pytest.mark.parametrize(("task", "extra", "metric", "worst"), [
    ("ade20k", [], "miou", 1),
    ("cityscapes", ["--teacher"], "pixel_accuracy", 1),
    ("nyu", ["--hidden", "16"], "rmse_aligned", 10),
    ("navi", ["--hidden", "16", "--split", "dataset"], "angle_mean", 180)])
def test_task_end_to_end(benchmarks, run, task, extra, metric, worst):
    printed, out = run(task, "--ckpt", "out.pt", *extra)
    assert out["task"] == task and out["backbone"] == "timm:test_vit" and (out["n_train"], out["n_val"]) == (5, 3)
    assert [row["row"] for row in out["rows"]] == ["baseline", "BRIXEL"] + ["teacher"] * ("--teacher" in extra)
    assert all(0 <= row[metric] <= worst for row in out["rows"])
    assert out["settings"]["epochs"] == 2 and out["seed"] == 42 and "↑" in printed and "kept in memory" in printed
    assert json.loads((benchmarks / f"out.{task}.json").read_text()) == out
    assert min(Image.open(benchmarks / f"out.{task}.png").size) > 200


def test_what_differs_from_the_protocol_is_named(run):
    _, out = run("cityscapes", "--ckpt", "out.pt", "--teacher", "--limit", "2", "--out", "differs")
    assert out["deviations"] == [
        "--size 56", "--epochs 2", "--batch_size 4", "--limit 2",
        "2 train images instead of 2975", "2 val images instead of 500",
        "images are rounded to multiples of the patch size 16, labels are not",
        "photos are enlarged (the first has 128 x 64 pixels)"]


def test_several_sizes_without_a_checkpoint_give_a_baseline_each_with_its_cost_and_a_plot(benchmarks, run):
    _, out = run("cityscapes", *TINY, "--out", "sizes.pt", "--size", "48", "96")
    small, large = out["rows"]
    assert (small["row"], small["size"], large["size"]) == ("baseline", 48, 96)
    assert 3.9 < large["gflops"] / small["gflops"] < 5 and small["ms"] > 0                # 4x the tokens
    assert Image.open(benchmarks / "sizes.cityscapes.size.png").size[0] > 800


def test_paper_rows_stand_below_for_a_backbone_of_the_paper():
    record = {"row": "BRIXEL", "size": 256, "miou": 0.5, "pixel_accuracy": 0.25, "miou_absent_zero": 0.125}
    lines = probe.table("ade20k", [record], "dinov3_vitb16")
    assert lines[1:] == [["BRIXEL", "256", "50.0", "25.0", "12.5"], ["paper, baseline", "", "46.7", "80.5", ""],
                         ["paper, BRIXEL", "", "49.2", "82.0", ""]]
    assert len(probe.table("ade20k", [record], "sample")) == 2


@pytest.mark.parametrize(("task", "flags"), [("navi", ["--hidden", "16"]), ("cityscapes", ["--cache_gb", "0"])])
def test_two_processes_equal_one(benchmarks, run, task, flags):
    """With torchrun, for `accelerate launch --cpu` starts one process. 3 validation images: the shares are uneven."""
    flags = [*flags, "--ckpt", "out.pt", "--lr", "0.01"]
    _, one = run(task, *flags)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "probe.py",
               "--task", task, "--data_dir", task, *SMALL, *flags, "--out", "two"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=benchmarks, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    two = json.loads(done.stdout.strip().splitlines()[-1])
    assert (one["processes"], two["processes"]) == (1, 2)
    for a, b in zip(one["rows"], two["rows"], strict=True):
        assert a.pop("row") == b.pop("row") and a == pytest.approx(b, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize(("flags", "sentence"), [
    (["--task", "navi", "--data_dir", "nowhere", "--backbone", "no:such"], "no folder 'nowhere'; set --data_dir"),
    (["--task", "navi", "--data_dir", ".", "--split", "test"], "unknown split 'test'; known: paper, dataset, probe3d"),
    (["--task", "ade20k", "--batch_size", "0"], "--batch_size 0 must be at least 1"),
    (["--task", "ade20k", "--out", "no/such"], "--out no/such.ade20k: there is no folder"),
    (["--task", "pca", "--image", "a.jpg"], "needs a checkpoint")])
def test_mistakes_are_one_sentence(flags, sentence, fresh_accelerate):
    error = error_of(probe.main, [*TINY, *flags])
    assert error.startswith("probe.py: error: ") and sentence in error


@pytest.mark.parametrize("workers", ["0", "1"])
def test_broken_validation_file_ends_the_run_before_it_trains(run, tmp_path, monkeypatch, workers):
    render.write_ade20k(tmp_path, [np.zeros((8, 8, 3), np.uint8)] * 12, {"train": 2, "val": 2}, height=40, width=40)
    photo = max(tmp_path.rglob("ADE_val*.jpg"))
    photo.write_bytes(photo.read_bytes()[:200])
    monkeypatch.setattr(probe, "fit", lambda *args: pytest.fail("trained"))
    error = error_of(run, "ade20k", *TINY, "--data_dir", str(tmp_path), "--num_workers", workers, "--cache_gb", "0")
    assert error.startswith(f"probe.py: error: {photo} ") and "\n" not in error


# ----------------------------------------------------------------------------------------------------------------------
# Pictures and cost

@pytest.fixture
def pca(benchmarks, tmp_path):
    """Runs --task pca with the checkpoint of `benchmarks`, into tmp_path."""
    def pca(*flags):
        common = ["--ckpt", str(benchmarks / "out.pt"), "--size", "64", "--out", str(tmp_path)]
        probe.main(["--task", "pca", *common, *flags])
    return pca


def test_pca_writes_a_panel_per_photo_and_the_features(benchmarks, pca, photos, tmp_path):
    Image.new("RGB", (90, 200), "red").save(photos / "tall.png")
    saved = tmp_path / "features.safetensors"
    pca("--image", str(photos / "1.jpg"), str(photos / "*.png"), "--teacher", "--save_features", str(saved))
    features = load_file(saved)
    shapes = {path.rsplit("/", 1)[1]: tuple(value.shape) for path, value in features.items()}
    assert shapes == {"1.jpg": (64, 16, 20), "tall.png": (64, 36, 16)}
    assert all(Image.open(tmp_path / f"{name}.pca.png").width > 500 for name in ("1", "tall"))
    model = brixel.load(benchmarks / "out.pt")
    x = model.preprocess(Image.open(photos / "1.jpg"), 64)
    torch.testing.assert_close(features[str(photos / "1.jpg")], model(x)[0])


def test_pca_of_the_photos_in_a_tar_twice_the_same_name_and_a_broken_one(pca, photos, tmp_path, capsys):
    with tarfile.open(tmp_path / "two.tar", "w") as tar:
        for name in ("1.jpg", "2.jpg"):
            tar.add(photos / name, name)
    pca("--image", str(tmp_path / "two.tar"))
    assert len(list(tmp_path.glob("two_*.pca.png"))) == 2
    assert "two photos of --image would become 1." in error_of(pca, "--image", str(photos), str(photos / "1.jpg"))
    (photos / "0.jpg").write_bytes(b"")
    saved = tmp_path / "features.safetensors"
    error = error_of(pca, "--image", str(photos), "--save_features", str(saved))
    assert error == "probe.py: error: 1 of 8 photos were skipped, see above (--image)"
    assert f"skipped {photos / '0.jpg'} cannot be read" in capsys.readouterr().out and len(load_file(saved)) == 7


def test_cost_counts_parameters_time_and_every_multiplication(capsys):
    """By hand: 2 FLOPs for each weight and output position of a convolution or linear layer, 4 N^2 D for attention."""
    probe.main(["--task", "cost", "--backbone", "timm:test_vit", "--repeats", "1", "--size", "64", "--batch_size", "2"])
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [(row["row"], row["size"], row["batch"]) for row in rows] == [
        ("baseline", 64, 2), ("BRIXEL", 64, 2), ("teacher", 256, 2)]
    backbone, counted = brixel.load_backbone("timm:test_vit", None), [0]
    model = brixel.Brixel(backbone).eval()

    def count(layer, args, output):
        counted[0] += 2 * output.numel() // len(layer.weight) * layer.weight.numel()

    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
            layer.register_forward_hook(count)
    for row, module, side in zip(rows, (backbone, model, backbone), (64, 64, 256), strict=True):
        tokens, depth = (side // 16)**2 + backbone.model.num_prefix_tokens, len(backbone.model.blocks)
        counted[0] = 2 * depth * 4 * tokens**2 * backbone.embed_dim
        module(torch.zeros(2, 3, side, side))
        assert row["gflops"] == pytest.approx(counted[0] / 1e9, rel=1e-9), row["row"]
        assert row["ms"] > 0 and "peak_mib" not in row or torch.cuda.is_available()
    trained = sum(p.numel() for p in model.upsampler.parameters()) / 1e6
    assert rows[1]["params_M"] - rows[0]["params_M"] == pytest.approx(trained)

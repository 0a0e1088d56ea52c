"""Readouts, losses and metrics against the released code's numbers and by hand; the four tasks through the command line."""
import contextlib
import json
import os
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import render

import brixel
import probe

FIXTURES = HERE / "fixtures"


@pytest.fixture(scope="module")
def released():
    return load_file(FIXTURES / "probes.safetensors")


@pytest.fixture(scope="module")
def values():
    return json.loads((FIXTURES / "probes_values.json").read_text())


def parameters(released, prefix):
    return {key.removeprefix(prefix): value for key, value in released.items() if key.startswith(prefix)}


# ----------------------------------------------------------------------------------------------------------------------
# Readouts

def test_depth_head_agrees_with_the_released_one(released):
    head = probe.DepthHead(16, width=32)
    head.load_state_dict(parameters(released, "depth_head."))
    out = head(released["feats"])
    torch.testing.assert_close(head.head(released["feats"]), released["depth_head_logits256"], atol=5e-5, rtol=0)
    torch.testing.assert_close(out, released["depth_head_out"], atol=5e-5, rtol=0)
    batch = {"features": released["feats"], "depth": torch.zeros(2, 1, 32, 48)}
    up = probe.predict(torch.nn.ModuleDict({"depth": head}), batch)["depth"]
    torch.testing.assert_close(up, released["depth_head_out_up_32x48"], atol=5e-5, rtol=0)


def test_normal_head_agrees_with_the_released_one(released):
    head = probe.DPT(16, 3, width=32)
    head.load_state_dict(parameters(released, "normal_head.head."))
    torch.testing.assert_close(head(released["feats"]), released["normal_head_out"], atol=5e-5, rtol=0)


# ----------------------------------------------------------------------------------------------------------------------
# Losses and metrics

def test_silog_agrees_with_the_released_one(released, values):
    total, count = probe.silog(released["depth_pred"], released["depth_gt"], released["depth_valid"] > 0)
    assert (total / count).item() == pytest.approx(values["official.silog_loss beta=0.15"], abs=5e-5)


def test_silog_by_hand_without_the_image_that_has_no_depth():
    # log differences 1 and 3: mean of squares 5, square of the mean 4; the second image has no valid pixel
    pred, depth = torch.tensor([[1.0, 3.0], [9.0, 9.0]]).exp().view(2, 1, 1, 2), torch.ones(2, 1, 1, 2)
    total, count = probe.silog(pred, depth, torch.tensor([True, True, False, False]).view(2, 1, 1, 2), beta=0.5)
    assert count == 1 and total.item() == pytest.approx(5 - 0.5 * 4)


def test_cosine_loss_agrees_with_the_released_one(released, values):
    normal = released["normal_gt (NaN where invalid)"]
    total, count = probe.cosine_loss(released["normal_pred"], normal.nan_to_num(), released["normal_valid"] > 0)
    assert (total / count).item() == pytest.approx(values["official.cosine_normal_loss"], abs=5e-5)


def test_cross_entropy_counts_labeled_pixels_only():
    logits, label = torch.zeros(1, 4, 1, 3), torch.tensor([[[0, 255, 3]]], dtype=torch.uint8)
    total, count = probe.cross_entropy(logits, label)
    assert count == 2 and total.item() == pytest.approx(2 * torch.tensor(4.0).log().item())


def test_depth_metrics_agree_with_the_released_ones(released, values):
    pred, depth, valid = released["depth_pred"], released["depth_gt"], released["depth_valid"] > 0
    aligned = probe.align(pred.clamp(0.001, 10), depth, valid)
    for key, prediction in (("official.compute_metrics", pred),
                            ("numpy64.correct per-image scale_shift LSQ over valid only", aligned)):
        got, want = probe.depth_metrics(probe.depth_sums(prediction, depth, valid)), values[key]
        names = {"AbsRel": "abs_rel", "RMSE": "rmse", "log10": "log10", "δ1": "delta1", "δ2": "delta2", "δ3": "delta3"}
        assert {names[k]: v for k, v in want.items()} == pytest.approx(got, abs=5e-5)


def test_depth_metrics_by_hand():
    pred, depth = torch.tensor([2.0, 1.0, 7.0]).view(1, 1, 1, 3), torch.tensor([1.0, 1.0, 0.0]).view(1, 1, 1, 3)
    got = probe.depth_metrics(probe.depth_sums(pred, depth, depth > 0))
    assert got == pytest.approx({"rmse": 0.5**0.5, "abs_rel": 0.5, "log10": 0.150515, "delta1": 0.5, "delta2": 0.5,
                                 "delta3": 0.5}, abs=1e-6)


def test_alignment_recovers_scale_and_shift_from_valid_pixels():
    torch.manual_seed(0)
    depth, valid = torch.rand(2, 1, 5, 6) + 1, torch.rand(2, 1, 5, 6) > 0.3
    pred = torch.where(valid, (depth - 0.3) / 2.5, 99)
    got = probe.align(pred, torch.where(valid, depth, 7), valid)
    torch.testing.assert_close(got[valid].float(), depth[valid])
    assert probe.align(torch.ones(1, 1, 2, 2), depth[:1, :, :2, :2], valid[:1, :, :2, :2]).isfinite().all()


def test_normal_metrics_agree_with_the_released_ones(released, values):
    sums = probe.angle_sums(released["normal_pred"], released["normal_gt (NaN where invalid)"], released["normal_valid"] > 0)
    got, want = probe.angle_metrics(sums), values["official.normal_metrics"]
    assert got["angle_mean"] == pytest.approx(want["ang_mean"], abs=5e-5)
    assert got["angle_median"] == pytest.approx(want["ang_med"], abs=probe.ANGLE_BIN / 2)
    assert [got[f"share_{k}"] for k in (11.25, 22.5, 30)] == pytest.approx([want[f"t_{k}"] for k in (11.25, 22.5, 30)], abs=1e-6)


def test_normal_metrics_by_hand():
    pred = torch.tensor([[1.0, 0, 0], [1, 1, 0], [0, 3, 0]]).T.view(1, 3, 1, 3)         # 0, 45 and 90 degrees
    normal = torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1).expand(1, 3, 1, 3)
    got = probe.angle_metrics(probe.angle_sums(pred, normal, torch.ones(1, 1, 1, 3, dtype=torch.bool)))
    assert got == pytest.approx({"angle_mean": 45, "angle_median": 45, "share_11.25": 1 / 3, "share_22.5": 1 / 3,
                                 "share_30": 1 / 3}, abs=probe.ANGLE_BIN)


def test_mean_iou_agrees_with_both_readings(released, values):
    label, pred = released["seg.label (255 ignore, classes 4,5 absent)"], released["seg.pred"]
    logits = torch.nn.functional.one_hot(pred, 6).permute(2, 0, 1)[None].float()
    counts = probe.confusion(logits, label[None].to(torch.uint8))
    assert probe.mean_iou(counts) == pytest.approx(values["numpy.mIoU present classes only"], abs=1e-9)
    assert probe.mean_iou(counts, absent_zero=True) == pytest.approx(
        values["official.mIoU 6 classes (absent classes count as 0)"], abs=1e-9)
    assert probe.pixel_accuracy(counts) == pytest.approx(values["official.pixAcc"], abs=1e-9)


def test_mean_iou_by_hand():
    # labels 0, 0, 1, ignored; predictions 0, 1, 1, 2: class 2 occurs nowhere that counts
    logits = torch.eye(3)[[0, 1, 1, 2]].T.view(1, 3, 1, 4)
    counts = probe.confusion(logits, torch.tensor([[[0, 0, 1, 255]]], dtype=torch.uint8))
    assert probe.mean_iou(counts) == pytest.approx((1 / 2 + 1 / 2) / 2)
    assert probe.pixel_accuracy(counts) == pytest.approx(2 / 3)


def test_sums_do_not_depend_on_how_a_split_is_cut():
    torch.manual_seed(0)
    pred, depth = torch.rand(5, 1, 4, 4) + 0.1, torch.rand(5, 1, 4, 4) + 0.1
    valid, normals = torch.rand(5, 1, 4, 4) > 0.5, torch.randn(2, 5, 3, 4, 4)
    valid[2] = False                                                                  # an image without a valid pixel
    for cut in (1, 2, 5):
        parts = [slice(i, i + cut) for i in range(0, 5, cut)]
        torch.testing.assert_close(sum(probe.depth_sums(pred[s], depth[s], valid[s]) for s in parts),
                                   probe.depth_sums(pred, depth, valid))
        torch.testing.assert_close(sum(probe.angle_sums(*normals[:, s], valid[s]) for s in parts),
                                   probe.angle_sums(*normals, valid))


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
    def __len__(self):
        return 7

    def __getitem__(self, i):
        generator = torch.Generator().manual_seed(i)
        image = torch.randint(0, 255, (3, 16, 16), dtype=torch.uint8, generator=generator)
        return {"image": image, "label": (image[0] // 128)}


def settings(**changes):
    return Namespace(**{"cache_gb": 1.0, "batch_size": 3, "num_workers": 0, "seed": 1, "lr": 0.1, "weight_decay": 0.0,
                        "epochs": 3} | changes)


def test_what_is_cached_is_computed_once_and_changes_nothing():
    """An item takes 32 bytes of fp16 features and 256 of labels; 7 images, 3 epochs."""
    from accelerate import Accelerator

    fitted = []
    assert next(probe.Features(Items(), Tiny(), Accelerator(cpu=True), settings()).batches([0]))["features"].dtype is torch.float16
    for cache_gb, kept in ((1.0, 7), (1e-6, 3), (0.0, 0)):
        features = probe.Features(Items(), Tiny(), Accelerator(cpu=True), settings(cache_gb=cache_gb))
        fitted.append(probe.fit(Namespace(targets=("label",), classes=2), features, features.cfg, 4).state_dict())
        assert len(features.cache) == kept and features.model.seen == 3 * 7 - 2 * kept
        assert f"of {kept} of 7 training images" in features.summary()
    for other in fitted[1:]:
        torch.testing.assert_close(fitted[0], other, atol=1e-6, rtol=1e-5)


def test_processes_share_out_every_batch():
    shares = []
    for rank in range(2):
        acc = Namespace(num_processes=2, process_index=rank, device=torch.device("cpu"), autocast=contextlib.nullcontext)
        features = probe.Features(Items(), Tiny(), acc, settings())
        shares.append([len(batch.get("label", ())) for batch in features.batches([0, 2, 4, 1, 3, 5, 6])])
        assert sorted(features.cache) == list(range(rank, 7, 2))
    assert shares == [[3, 0, 1], [0, 3, 0]]


def test_color_jitter_changes_with_the_epoch_and_not_with_the_process():
    from accelerate import Accelerator

    features = probe.Features(Items(), Tiny(), Accelerator(cpu=True), settings(), jitter=(0.2, 0.2, 0.2, 0.05))
    first, again, later = (next(features.batches([2, 5], epoch))["features"] for epoch in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, later)
    assert "decoded images" in features.summary() and len(features.cache) == 2
    plain = next(probe.Features(Items(), Tiny(), Accelerator(cpu=True), settings()).batches([2, 5]))["features"]
    assert not torch.equal(first, plain)


# ----------------------------------------------------------------------------------------------------------------------
# The four tasks, through the command line

SMALL = ["--size", "56", "--epochs", "2", "--batch_size", "4", "--num_workers", "0"]


@pytest.fixture(scope="module")
def benchmarks(tmp_path_factory):
    """The four benchmarks, 5 training and 3 validation images each, and a BRIXEL checkpoint with a random adapter."""
    root = tmp_path_factory.mktemp("benchmarks")
    textures, splits = render.load_textures(FIXTURES / "ade20k" / "images" / "validation", side=128), {"train": 5, "val": 3}
    render.write_ade20k(root / "ade20k", textures, splits, height=120, width=160)
    render.write_cityscapes(root / "cityscapes", textures, splits, height=64, width=128)
    render.write_nyu_parquet(root / "nyu", textures, splits, height=72, width=96)
    render.write_navi(root / "navi", textures, splits, height=120, width=160, objects=2)
    torch.manual_seed(0)
    brixel.Brixel(brixel.load_backbone("sample")).save(root / "out.pt")
    return root


@pytest.fixture
def run(benchmarks, capsys, monkeypatch):
    """Runs probe.main in the folder of the benchmarks.  -> (what it printed, the JSON object in the last line)."""
    from accelerate.state import AcceleratorState

    def run(task, *flags):
        AcceleratorState._reset_state(True)
        monkeypatch.chdir(benchmarks)
        probe.main(["--task", task, "--data_dir", task, *SMALL, *flags])
        printed = capsys.readouterr().out
        return printed, json.loads(printed.strip().splitlines()[-1])
    return run


def launch(benchmarks, task, processes, *flags):
    """The JSON object of probe.py on several CPU processes.  (`accelerate launch --cpu` would start one, whatever it is told.)"""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes),
               str(HERE.parent / "probe.py"), "--task", task, "--data_dir", task, *SMALL, *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=benchmarks, check=False,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"})
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize(("task", "extra", "metric", "worst"), [
    ("ade20k", [], "miou", 1), ("cityscapes", ["--teacher"], "pixel_accuracy", 1),
    ("nyu", ["--hidden", "16"], "rmse_aligned", 10), ("navi", ["--hidden", "16", "--split", "dataset"], "angle_mean", 180)])
def test_task_end_to_end(benchmarks, run, task, extra, metric, worst):
    printed, out = run(task, "--ckpt", "out.pt", *extra)
    assert out["task"] == task and out["backbone"] == "sample" and (out["n_train"], out["n_val"]) == (5, 3)
    assert [row["row"] for row in out["rows"]] == ["baseline", "BRIXEL"] + ["teacher"] * ("--teacher" in extra)
    assert all(0 <= row[metric] <= worst for row in out["rows"])
    assert out["settings"]["epochs"] == 2 and out["seed"] == 42 and "epochs 2 instead of" in " ".join(out["deviations"])
    assert "↑" in printed and "BRIXEL" in printed and "kept in memory" in printed
    assert json.loads((benchmarks / f"out.{task}.json").read_text()) == out
    assert min(Image.open(benchmarks / f"out.{task}.png").size) > 200


def test_without_a_checkpoint_the_baseline_runs_alone(benchmarks, run):
    _, out = run("ade20k", "--backbone", "sample", "--limit", "2", "--batch_size", "1", "--out", "alone.pt")
    assert [row["row"] for row in out["rows"]] == ["baseline"] and (out["n_train"], out["n_val"]) == (2, 2)
    assert (benchmarks / "alone.ade20k.json").is_file()


def test_several_sizes_give_a_row_each_with_its_cost_and_a_plot(benchmarks, run):
    _, out = run("cityscapes", "--backbone", "sample", "--out", "sizes.pt", "--size", "42", "84")
    small, large = out["rows"]
    assert (small["size"], large["size"]) == (42, 84)
    assert 3.5 < large["gflops"] / small["gflops"] < 5 and small["ms"] > 0                # 4x the tokens
    assert Image.open(benchmarks / "sizes.cityscapes.size.png").size[0] > 800


def test_colors_by_hand():
    facing = probe.normal_colors(torch.tensor([0.0, 0, 1]).view(3, 1, 1))                 # away from the camera is +z here
    assert facing.tolist() == [[[127, 127, 255]]]
    assert probe.depth_colors(torch.zeros(1, 1, 1), 1, 2).tolist() == [[[0, 0, 0]]]
    assert probe.class_colors(torch.tensor([[0, 255]]), 19)[0, 1].tolist() == [0, 0, 0]


def test_paper_rows_stand_below_for_a_backbone_of_the_paper():
    record = {"row": "BRIXEL", "size": 256, "miou": 0.5, "pixel_accuracy": 0.25, "miou_absent_zero": 0.125}
    lines = probe.table(probe.TASKS["ade20k"], [record], "dinov3_vitb16")
    assert [line.split() for line in lines[1:]] == [["BRIXEL", "256", "50.0", "25.0", "12.5"],
                                                    ["paper,", "baseline", "46.7", "80.5"], ["paper,", "BRIXEL", "49.2", "82.0"]]
    assert len(probe.table(probe.TASKS["ade20k"], [record], "sample")) == 2


@pytest.mark.parametrize("task", ["navi", "cityscapes"])
def test_two_processes_equal_one(benchmarks, task):
    flags = ["--ckpt", "out.pt", *(["--hidden", "16"] if task == "navi" else [])]
    one, two = (launch(benchmarks, task, n, *flags, "--out", f"{n}.pt") for n in (1, 2))
    assert (one["processes"], two["processes"]) == (1, 2)
    for a, b in zip(one["rows"], two["rows"], strict=True):
        metrics = {key for key in a if key not in ("row", "size", "seconds")}
        assert {key: a[key] for key in metrics} == pytest.approx({key: b[key] for key in metrics}, abs=2e-3, rel=2e-3)


# ----------------------------------------------------------------------------------------------------------------------
# Mistakes

@pytest.mark.parametrize(("flags", "sentence"), [
    (["--task", "pascal"], "invalid choice: 'pascal'"),
    ([], "--task is needed"),
    (["--task", "navi", "--data_dir", "nowhere"], "no folder 'nowhere'; set --data_dir"),
    (["--task", "navi"], "no folder 'navi_v1.0'; set --data_dir"),
    (["--task", "ade20k", "--epoch", "3"], "unrecognized arguments: --epoch"),
    (["--task", "ade20k", "--epochs", "0"], "epochs 0 must be 1 or more"),
    (["--task", "ade20k", "--epochs", "many"], "invalid int value: 'many'"),
    (["--task", "navi", "--split", "test"], "unknown split 'test'; known: paper, dataset, probe3d"),
    (["--task", "ade20k", "--mixed_precision", "fp8"], "is not one of auto, no, fp16, bf16"),
    (["--task", "navi", "--color_jitter", "0"], "needs 4 numbers"),
    (["--task", "ade20k", "--size", "8"], "must be 32 or more (--size)"),
])
def test_mistakes_are_one_sentence_and_exit_code_2(flags, sentence, capsys):
    with pytest.raises(SystemExit) as stop:
        probe.main(flags)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and sentence in error and "Traceback" not in error


def test_wrong_checkpoints_and_bad_files_are_one_error(benchmarks, run, tmp_path, capsys):
    (tmp_path / "bad.pt").write_bytes(b"no checkpoint")
    for ckpt in ("missing.pt", str(tmp_path / "bad.pt")):
        with pytest.raises(SystemExit, match="2"):
            run("ade20k", "--ckpt", ckpt)
        assert re.search(rf"probe.py: error: .*{re.escape(Path(ckpt).name)}", capsys.readouterr().err)
    black = [torch.zeros(8, 8, 3).byte().numpy()] * 12
    render.write_ade20k(tmp_path, black, {"train": 2, "val": 1}, height=40, width=40)
    photo = next(tmp_path.rglob("ADE_val*.jpg"))
    photo.write_bytes(photo.read_bytes()[:200])
    with pytest.raises(SystemExit, match="2"):
        run("ade20k", "--backbone", "sample", "--data_dir", str(tmp_path))
    error = capsys.readouterr().err
    assert "1 of 1 val samples" in error and photo.name in error

"""The command line of brixel.py: settings, training from end to end, and one sentence for every mistake."""

import json
import os
import re
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, SMALL, TINY, error_of, launch, weights_of
from PIL import Image

import brixel

CONFIG = (ROOT / "config.yaml").read_text()


def config_with(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return path


# --- settings

def test_every_key_is_a_flag_with_its_comment_as_help():
    started = time.time()
    done = subprocess.run([sys.executable, "brixel.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and time.time() - started < 30
    for key, (_, comment) in brixel.read_config(ROOT / "config.yaml")["paper"].items():
        assert f"--{key}" in done.stdout and comment.split()[0] in done.stdout


def test_quickstart_differs_from_paper_only_where_it_says():
    sections = brixel.read_config(ROOT / "config.yaml")
    assert sections["quickstart"].keys() == sections["paper"].keys()
    changed = {key for key, (value, _) in sections["quickstart"].items() if value != sections["paper"][key][0]}
    written = CONFIG.partition("quickstart:")[2].partition("\n\n")[0]
    assert changed == {line.split(":")[0].strip() for line in written.splitlines()[2:] if line.startswith("  ")}


def test_paper_section_holds_the_recipe_of_section_3():
    paper = {key: value for key, (value, _) in brixel.read_config(ROOT / "config.yaml")["paper"].items()}
    recipe = {"backbone": "dinov3", "teacher_size": 1024, "scale": 4, "batch_size": 16, "max_steps": 40_000, "lr": 1e-3, "warmup_lr": 1e-4,
                  "warmup_epochs": 1, "lambda_edge": 1, "lambda_spectral": 0.1, "k": 8}
    assert {key: paper[key] for key in recipe} == recipe


@pytest.mark.parametrize("text, sentence", [
    ("paper:\n  lr: 1e-3  # rate\n", "write 1.0e-3"),
    ("paper:\n  lr: 1.0e-3  # rate\n  lr: 2.0e-3\n", "line 3: paper: lr is given twice"),
    ("paper: &paper\n  lr: 1.0e-3  # rate\nmine:\n  <<: *paper\n  lt: 2.0\n", "mine: lt is unknown"),
    ("paper: &paper\n  lr: 1.0e-3  # rate\nmine:\n  <<: *paper\n  lr: fast\n", "lr must be a float"),
    ("paper: &paper\n  mode: fp16  # rate\nmine:\n  <<: *paper\n  mode: no\n", "'no' needs quotes"),
    ("paper:\n  lr: !!python/object/apply:os.system [ls]  # rate\n", "could not determine a constructor"),
    ("paper:\n  lr: {a: 1}  # rate\n", "must be a number"),
    ("paper:\n  a: &a [x, x]  # one\n  b: &b [*a, *a]  # two\n", "b must be a number"),
    ("paper:\n  lr: [1,\n", "not plain YAML"),
    ("paper: 3\n", "must be one section of keys"),
])
def test_bad_config_is_refused_in_one_sentence(tmp_path, text, sentence):
    with pytest.raises(brixel.BrixelError, match=sentence):
        brixel.read_config(config_with(tmp_path, text))


@pytest.mark.parametrize("args, sentence", [
    (["--lr", "fast"], "invalid float value"),
    (["--max_steps", "1.5"], "invalid int value"),
    (["--max_step", "5"], "unrecognized arguments: --max_step"),
    (["--preset", "mine"], "invalid choice: 'mine'"),
    (["--frobnicate", "1"], "unrecognized arguments"),
])
def test_bad_flags_are_refused(in_process, capsys, args, sentence):
    assert error_of(in_process, *args) == "2"
    assert sentence in capsys.readouterr().err


def test_both_spellings_of_a_flag_work():
    both = [brixel.load_config([flag, "7"], "preset", lambda s: "max_steps" in s, "paper", "").max_steps
            for flag in ("--max_steps", "--max-steps")]
    assert both == [7, 7]


@pytest.mark.parametrize("args, sentence", [
    (["--teacher_size", "130"], r"teacher_size 130 must be a multiple of .* 4 x 16 = 64.*nearest: 128"),
    (["--teacher_size", "64"], "nearest: 128"),
    (["--k", "65"], "k 65 must lie between 1 and the width 64"),
    (["--k", "0"], "k 0 must lie between"),
    (["--scale", "3"], "scale 3 is not one of 2, 4, 8"),
    (["--crop_min", "0"], "crop_min"),
    (["--crop", "left"], "crop 'left' is not one of"),
    (["--drop_path", "1"], "drop_path"),
    (["--color_jitter", "0", "0", "0", "0.6"], "color_jitter .* hue of at most 0.5"),
    (["--batch_size", "0"], "batch_size 0 must be 1 or more"),
    (["--lr", "-1"], "lr -1.0 must not be negative"),
    (["--mixed_precision", "fp8"], "mixed_precision 'fp8' is not one of"),
    (["--report_to", "paper"], "report_to 'paper' is not one of"),
    (["--val_share", "1"], "val_share"),
    (["--data_dir", "no/such/folder"], "no such file or folder: .*no/such/folder; set --data_dir"),
    (["--backbone", "dinov9"], "unknown backbone 'dinov9'; known: .*dinov3_vitb16.*sample.*siglip2"),
    (["--out", "no/such/folder/out.pt"], "no such folder .*no/such/folder"),
    (["--out", "out.bin"], "must end in .pt or .safetensors"),
    (["--resume", "latest"], "there is no state"),
    (["--min_side", "500"], r"none of the 8 photos can be used \(6 too small\).*--min_side"),
])
def test_impossible_settings_are_one_sentence_and_write_nothing(in_process, photos, tmp_path, args, sentence, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = error_of(in_process, *SMALL, "--data_dir", photos, "--out", "out.pt", *args)
    assert re.search(sentence, message), message
    assert "\n" not in message and not (tmp_path / "out.pt").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_folder_is_refused_before_training(in_process, photos, tmp_path):
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    assert "cannot write in" in error_of(in_process, *SMALL, "--data_dir", photos, "--out", folder / "out.pt")


def test_no_network_names_weights_and_sample(in_process, photos, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    message = error_of(in_process, "--backbone", "dinov3", "--data_dir", photos, "--out", tmp_path / "out.pt")
    assert "--weights FILE" in message and "--backbone sample" in message and "dinov3" in message


# --- training from end to end

def test_launch_trains_and_leaves_checkpoint_picture_and_log(photos, tmp_path):
    out = tmp_path / "out.pt"
    (photos / "cut.jpg").write_bytes((photos / "0.jpg").read_bytes()[:900])
    (photos / "empty.jpg").touch()
    (photos / "text.jpg").write_text("not a photo")
    done = launch(*SMALL, "--data_dir", photos, "--out", out, "--max_steps", 6, "--num_workers", 1, "--eval_every", 3)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "loss" in r] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in records if "brixel l1" in r] == [3, 6]
    assert all(r["loss"] == pytest.approx(r["l1"] + r["edge"] + 0.1 * r["spectral"], rel=1e-4) for r in records if "loss" in r)
    assert "11 photos, 2 of them held out" in done.stdout and "photos left out: 3 unreadable" in done.stdout
    for name in ("cut.jpg", "empty.jpg", "text.jpg"):
        assert (done.stdout + done.stderr).count(f"{name}:") == 1
    assert all(word in done.stderr for word in ("loss", "l1", "edge", "spectral", "images/s"))
    model = brixel.load(out)
    assert model.settings["training"]["max_steps"] == 6 and "--max_steps 6" in model.settings["command"]
    assert Image.open(tmp_path / "out.png").width > 1000


def test_training_changes_every_trainable_tensor_and_nothing_of_the_backbone(in_process, photos, tmp_path, monkeypatch):
    backbone = brixel.load_backbone("timm:test_vit", None)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    monkeypatch.setattr(brixel, "load_backbone", lambda *_: backbone)
    torch.manual_seed(42)
    in_process(*SMALL, "--data_dir", photos, "--out", tmp_path / "one.pt", "--max_steps", 1)
    in_process(*SMALL, "--data_dir", photos, "--out", tmp_path / "out.pt", "--max_steps", 4)
    assert all(torch.equal(before[key], value) for key, value in backbone.state_dict().items())
    first, last = weights_of(tmp_path / "one.pt"), weights_of(tmp_path / "out.pt")
    assert not [key for key in first if torch.equal(first[key], last[key])]


def test_loss_falls_on_cached_crops(in_process, photos, tmp_path):
    in_process(*SMALL, "--data_dir", photos, "--out", tmp_path / "out.pt", "--cache_crops", 6, "--max_steps", 40, "--log_every", 10,
               "--lr", "3e-3", "--warmup_epochs", 0)
    losses = [json.loads(line).get("loss") for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    losses = [loss for loss in losses if loss]
    assert len(losses) == 4 and losses[-1] < 0.8 * losses[0]


def test_resumed_run_equals_uninterrupted_run(in_process, photos, tmp_path):
    common = [*SMALL, "--data_dir", photos, "--save_every", 3]
    in_process(*common, "--out", tmp_path / "whole.pt", "--max_steps", 7)
    in_process(*common, "--out", tmp_path / "parts.pt", "--max_steps", 3)
    in_process(*common, "--out", tmp_path / "parts.pt", "--max_steps", 7, "--resume", "latest")
    want, got = weights_of(tmp_path / "whole.pt"), weights_of(tmp_path / "parts.pt")
    assert all(torch.equal(want[key], got[key]) for key in want)
    steps = [json.loads(line)["step"] for line in (tmp_path / "parts.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and set(steps) == set(range(1, 8))


def test_resume_with_other_settings_is_refused(in_process, photos, tmp_path):
    common = [*SMALL, "--data_dir", photos, "--out", tmp_path / "out.pt", "--save_every", 2]
    in_process(*common, "--max_steps", 2)
    message = error_of(in_process, *common, "--resume", "latest", "--lr", "0.5", "--scale", "2")
    assert "lr was 0.001, is 0.5" in message and "scale was 4, is 2" in message


def test_existing_run_is_not_overwritten(in_process, photos, tmp_path):
    common = [*SMALL, "--data_dir", photos, "--out", tmp_path / "out.pt"]
    in_process(*common, "--max_steps", 1)
    before = (tmp_path / "out.pt").read_bytes()
    assert "--overwrite" in error_of(in_process, *common)
    assert (tmp_path / "out.pt").read_bytes() == before
    in_process(*common, "--max_steps", 1, "--seed", 1, "--overwrite")
    assert (tmp_path / "out.pt").read_bytes() != before


def test_gradient_accumulation_equals_one_larger_batch(in_process, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.BatchNorm2d, "forward", lambda self, x: torch.nn.functional.batch_norm(
        x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps))
    common = [*SMALL, "--data_dir", photos, "--drop_path", 0, "--max_steps", 4]
    in_process(*common, "--out", tmp_path / "one.pt", "--batch_size", 4)
    in_process(*common, "--out", tmp_path / "two.pt", "--batch_size", 2, "--grad_accum", 2)
    one, two = ([json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()] for name in ("one", "two"))
    for a, b in zip(one, two):
        for key in a.keys() & {"loss", "l1", "edge", "spectral", "brixel l1"}:
            assert a[key] == pytest.approx(b[key], rel=1e-4)


def test_one_bad_step_is_not_applied_and_three_in_a_row_stop(in_process, photos, tmp_path, monkeypatch):
    real, calls = brixel.brixel_loss, []

    def poisoned(bad):
        def loss(*args, **options):
            calls.append(1)
            total, terms = real(*args, **options)
            return (total * float("nan") if len(calls) in bad else total), terms
        return loss

    common = [*SMALL, "--data_dir", photos, "--max_steps", 5]
    monkeypatch.setattr(brixel, "brixel_loss", poisoned({2, 3}))
    in_process(*common, "--out", tmp_path / "a.pt")
    skipped = [json.loads(line).get("skipped") for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert skipped[:5] == [0, 1, 1, 0, 0]
    assert all(torch.isfinite(v).all() for v in weights_of(tmp_path / "a.pt").values())
    calls.clear()
    monkeypatch.setattr(brixel, "brixel_loss", poisoned({2, 3, 4}))
    message = error_of(in_process, *common, "--out", tmp_path / "b.pt")
    assert "3 steps in a row" in message and "--lr" in message and "l1" in message


def test_fp16_step_is_bad_once_the_loss_scaler_has_given_up(fresh_accelerate):
    cfg = brixel.load_config(["--preset", "bench", "--backbone", "timm:test_vit", "--mixed_precision", "no"], "preset", lambda _: True, None, "")
    accelerator, model, _, _ = brixel.prepare(cfg, brixel.load_backbone(cfg.backbone, None))
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    upsampler, optimizer = accelerator.prepare(model.upsampler, torch.optim.Adam(model.upsampler.parameters(), fused=True))
    upsampler.head.out.weight.register_hook(lambda gradient: gradient * float("inf"))
    batch = brixel.frozen_pass(model.backbone, torch.randint(256, (2, 3, 256, 256), dtype=torch.uint8), 4)
    bad = [brixel.train_step([batch], upsampler, optimizer, accelerator, cfg)[4].item() for _ in range(4)]
    assert bad == [0, 0, 1, 1]                     # scale 2, 1, 0.5, 0.25: below 1 no gradient is left to save


def test_bench_prints_its_figures_and_writes_nothing(in_process, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    in_process("--preset", "bench", "--backbone", "timm:test_vit", "--teacher_size", 256, "--batch_size", 2, "--max_steps", 5)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["images/s"] == pytest.approx(2000 / result["ms"]["step"])
    assert result["ms"]["step"] > max(result["ms"][part] for part in ("teacher", "student", "loss", "optimizer")) > 0
    assert 0 < result["share_of_floor"] < 1 and not list(tmp_path.iterdir())


def test_ctrl_c_before_the_first_step_is_one_sentence(in_process, photos, tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr(brixel, "cached_maps", interrupted)
    assert "brixel.py: stopped; there is no state yet" in error_of(in_process, *SMALL, "--data_dir", photos, "--out", tmp_path / "out.pt", "--cache_crops", 4)


def test_photos_that_are_mostly_unreadable_stop_the_run(in_process, photos, tmp_path):
    for i in range(12):
        (photos / f"bad{i}.jpg").write_bytes(b"no")
    assert "more than half" in error_of(in_process, *SMALL, "--data_dir", photos, "--out", tmp_path / "out.pt", "--max_steps", 40)


def test_run_whose_held_out_photos_cannot_be_read_still_ends_well(in_process, photos, tmp_path, capsys):
    import data

    _, held_out = data.split(8, 0.2)
    for i in held_out:
        (photos / f"{i}.jpg").write_bytes(b"no")
    in_process(*SMALL, "--data_dir", photos, "--out", tmp_path / "out.pt", "--max_steps", 2)
    output = capsys.readouterr().out
    assert "on 0 held-out photos" in output and "2 unreadable" in output and not (tmp_path / "out.png").exists()


def test_resuming_another_run_does_not_overwrite_this_one(in_process, photos, tmp_path):
    common = [*SMALL, "--data_dir", photos, "--max_steps", 1, "--save_every", 1]
    in_process(*common, "--out", tmp_path / "a.pt")
    in_process(*common, "--out", tmp_path / "b.pt")
    assert "exist" in error_of(in_process, *common, "--out", tmp_path / "b.pt", "--resume", tmp_path / "a.state" / "step_0000001")


@pytest.mark.parametrize("args, sentence", [
    (["--export", "x.onnx"], "--export needs a checkpoint"),
    (["--export", "x.onnx", "--ckpt", "out.pt", "--export_size", "256"], "needs two sides"),
    (["--export", "x.onnx", "--ckpt", "out.pt", "--export_size", "250", "256"], "nearest valid size is 256 x 256"),
    (["--export", "x.onnx", "--ckpt", "none.pt"], "none.pt")])
def test_export_mistakes_are_one_sentence(in_process, tmp_path, monkeypatch, args, sentence):
    monkeypatch.chdir(tmp_path)
    brixel.Brixel(brixel.load_backbone("timm:test_vit", None)).save("out.pt")
    assert sentence in error_of(in_process, *args) and [p.name for p in tmp_path.iterdir()] == ["out.pt"]


def test_missing_tracker_is_said(in_process, photos, tmp_path):
    assert "report_to wandb: that package is not installed" in error_of(
        in_process, *SMALL, "--data_dir", photos, "--out", tmp_path / "out.pt", "--report_to", "wandb")


@pytest.mark.parametrize("extra", [["--scale", 2, "--teacher_size", 64], ["--scale", 8, "--teacher_size", 256, "--min_side", 64], ["--crop", "center"],
                                   ["--mixed_precision", "bf16"]])
def test_other_scales_crops_and_precisions_train(in_process, photos, tmp_path, extra):
    out = tmp_path / "out.safetensors"
    in_process(*SMALL, "--data_dir", photos, "--out", out, "--max_steps", 2, *extra)
    model = brixel.load(out)
    assert model(torch.zeros(1, 3, 32, 48)).shape == (1, 64, 2 * model.scale, 3 * model.scale)


def test_tiny_flags_are_what_the_other_tests_think():
    assert TINY == SMALL[:len(TINY)]


def test_a_step_neither_copies_from_the_host_nor_reads_back(fresh_accelerate):
    """Either would make the host wait for a GPU; the eigh of 3k x 3k numbers is the one exception."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Ops(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.add(func._overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    cfg = brixel.load_config(["--preset", "bench", "--backbone", "timm:test_vit", "--mixed_precision", "no"], "preset", lambda _: True, None, "")
    accelerator, model, upsampler, optimizer = brixel.prepare(cfg, brixel.load_backbone(cfg.backbone, None))
    image, seen = torch.randint(256, (2, 3, 256, 256), dtype=torch.uint8), set()
    with Ops():
        torch.tensor([1.0, 2.0]).sum().item()
    assert seen >= {"lift_fresh", "_local_scalar_dense"}          # what the two look like
    seen.clear()
    with Ops():
        brixel.train_step([brixel.frozen_pass(model.backbone, image, 4)], upsampler, optimizer, accelerator, cfg)
    assert "convolution" in seen and not seen & {"lift_fresh", "_local_scalar_dense"}

"""Training from the command line: settings, mistakes, exact resuming, several processes, faults."""

import itertools
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import FAST, ROOT, error_of, weights_of
from PIL import Image

import brixel
import data

CONFIG = (ROOT / "config.yaml").read_text()
BEST_CACHED = ["--preset", "best", "--cache_crops", 6]            # after FAST; FAST alone is `paper`, with live crops


def settings(*argv, **options):
    return brixel.load_config(argv, "preset", "paper", "", **options)


def log_of(path):
    """Records of the steps in the log of the run whose --out is `path`."""
    return [record for record in map(json.loads, open(path.with_suffix(".jsonl"))) if "loss" in record]


def checkpoints(path):
    return sorted(p.name for p in path.with_suffix(".state").glob("step_*"))


def call_at(monkeypatch, name, number, action):
    """Call `action` just before call `number` (1, 2, ...) of the function brixel.NAME."""
    real, calls = getattr(brixel, name), itertools.count(1)

    def counted(*args):
        if next(calls) == number:
            action()
        return real(*args)

    monkeypatch.setattr(brixel, name, counted)


def test_every_key_is_a_flag_with_its_comment_as_help(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        settings("--preset", "quickstart", "--help")
    text = capsys.readouterr().out
    comments = dict(re.findall(r"^  (\w+): .*? +# (.*)", CONFIG.split("best:")[0], re.M))
    assert comments.keys() | {"preset"} == vars(settings()).keys()
    for key, comment in comments.items():
        assert re.search(rf"^  --{key}\b.*\s+{re.escape(comment)} \[", text, re.M), key
    assert "[sample]" in text                      # the section's own value
    assert settings("--max-steps", "7", "--no-resume").max_steps == 7


def test_paper_is_the_default_and_holds_the_recipe_of_section_3():
    recipe = {"backbone": "dinov3", "teacher_size": 1024, "scale": 4, "batch_size": 16, "max_steps": 40_000, "lr": 1e-3,
              "warmup_lr": 1e-4, "warmup_epochs": 1, "lambda_edge": 1, "lambda_spectral": 0.1, "k": 8,
              "optimizer": "adam", "full_rank": False, "lambda_cosine": 0, "lr_decay": 0}
    assert vars(settings()).items() >= recipe.items()


@pytest.mark.parametrize("line, sentence", [
    ("lt: 2.0", "mine: lt: 2.0: unknown key"),
    ("lr: fast", "mine: lr: 'fast': .*not a float"),
    ("mode: no", "mine: mode: False: .*not a str .*needs quotes"),
    ("max_steps: 1.5", "mine: max_steps: 1.5: .*not a int")])
def test_bad_config_is_refused_in_one_sentence(tmp_path, line, sentence):
    path = tmp_path / "config.yaml"
    text = "paper: &paper\n  lr: 1.0e-3  # rate\n  max_steps: 4  # all\n  mode: bf16  # type\nmine:\n  <<: *paper\n"
    path.write_text(f"{text}  {line}\n")
    with pytest.raises(brixel.BrixelError, match=sentence):
        settings("--preset", "mine", path=path)


@pytest.mark.parametrize("value, number", [("1e-3", 1e-3), ("2", 2.0), ("1.5E+2", 150.0)])
def test_numbers_in_the_config_are_numbers(tmp_path, value, number):
    path = tmp_path / "config.yaml"
    path.write_text(f"mine:\n  lr: 1.0e-3  # rate\n\n  max_steps: 4  # all\nother:\n  max_steps: 3\n  lr: {value}\n")
    cfg = settings("--preset", "other", path=path)
    assert type(cfg.lr) is float and cfg.lr == number and cfg.max_steps == 3


@pytest.mark.parametrize("args, sentence", [
    (["--lr", "fast"], "invalid float value"),
    (["--num_workers", "-1"], "--num_workers: -1: must be 0 or more"),
    (["--max_step", "5"], "unrecognized arguments: --max_step"),
    (["--preset", "ade20k"], "invalid choice: 'ade20k'")])
def test_bad_flags_are_refused(capsys, args, sentence):
    assert error_of(brixel.main, args) == "2"
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("args, sentence", [
    (["--teacher_size", "130"], r"teacher_size 130 must be a multiple of .* 4 x 16.*nearest: 128"),
    (["--scale", "3", "--teacher_size", "144"], "scale 3 is not one of 2, 4, 8"),
    (["--k", "0"], "k 0 must be 1 or more"),
    (["--crop_min", "1.5"], "crop_min 1.5 must be a share, 1 or less"),
    (["--mixed_precision", "fp16"], "mixed_precision fp16 is not one of auto, no, bf16"),
    (["--val_share", "1"], "val_share"), (["--optimizer", "sgd"], "optimizer sgd .*adam.*muon"),
    (["--data_dir", "no/such/folder"], "no such file or folder: .*no/such/folder; set --data_dir"),
    (["--backbone", "dinov9"], "unknown backbone 'dinov9'; known: .*dinov3_vitb16.*sample.*siglip2"),
    (["--out", "no/such/folder/out.pt"], "--out .*there is no folder .*no/such/folder"),
    (["--out", "out.bin"], "must end in .pt or .safetensors"),
    (["--init", "none.pt"], "there is no file none.pt"),
    (["--resume"], "there is no checkpoint of a run in .*out.state: give --overwrite, not --resume")])
def test_impossible_settings_are_one_sentence_and_write_nothing(
        in_process, photos, tmp_path, monkeypatch, args, sentence):
    monkeypatch.chdir(tmp_path)
    message = error_of(in_process, *FAST, "--data_dir", photos, "--out", "out.pt", *args)
    assert re.match("brixel.py: error: .*" + sentence, message), message
    assert "\n" not in message and os.listdir(tmp_path) == ["photos"]


def test_lr_at_by_hand():
    cfg = SimpleNamespace(warmup_epochs=0.5, warmup_lr=1e-4, lr=2e-3, lr_decay=0.2, max_steps=100)
    rates = [brixel.lr_at(step, cfg, steps_per_epoch=20) for step in (0, 9, 10, 79, 80, 90, 99)]
    assert rates == pytest.approx([1e-4, 1e-4, 2e-3, 2e-3, 2e-3, 1e-3, 1e-4])
    cfg.lr_decay = 0
    assert brixel.lr_at(99, cfg, steps_per_epoch=20) == 2e-3


@pytest.mark.parametrize("shape", [(8, 96), (96, 8)])
def test_muon_is_that_of_torch(shape):
    start, *gradients = torch.randn(4, *shape)
    ours, theirs = start.clone().requires_grad_(), start.clone().requires_grad_()
    both = brixel.Muon([ours], 0.1), torch.optim.Muon([theirs], 0.1, weight_decay=0, adjust_lr_fn="match_rms_adamw")
    for gradient in gradients:
        for p, optimizer in zip((ours, theirs), both):
            p.grad = gradient.clone()
            optimizer.step()
    assert (ours - theirs).norm() < 0.03 * (theirs - start).norm()                        # torch's is in bfloat16


def test_muon_gets_exactly_the_matrices():
    upsampler = brixel.Upsampler(64, full_rank=True)
    adam, muon = brixel.make_optimizers(upsampler, settings("--optimizer", "muon"))
    others, matrices = ([p for group in optimizer.param_groups for p in group["params"]] for optimizer in (adam, muon))
    assert type(adam) is torch.optim.Adam and type(muon) is brixel.Muon
    assert {p.ndim for p in matrices} == {2} and 2 not in {p.ndim for p in others}
    assert {id(p) for p in others + matrices} == {id(p) for p in upsampler.parameters()}


def test_launch_trains_and_leaves_checkpoint_picture_and_log(photos, tmp_path):
    out = tmp_path / "out.pt"
    cut = photos / f"{data.split(8, 0.01)[0][0]}.jpg"             # not the photo that is held out
    cut.write_bytes(cut.read_bytes()[:900])
    flags = ["--data_dir", photos, "--out", out, *"--max_steps 3 --num_workers 1 --eval_every 2".split()]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "brixel.py", *FAST, *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [r["step"] for r in map(json.loads, open(tmp_path / "out.jsonl")) if "brixel l1" in r] == [2, 3]
    assert [r["step"] for r in log_of(out)] == [1, 2, 3]
    for r in log_of(out):
        assert r["loss"] == pytest.approx(r["l1"] + r["edge"] + 0.1 * r["spectral"], rel=1e-4)
    assert len(re.findall(f"skipped {cut}: ", done.stderr)) == 1
    model = brixel.load(out)
    assert model.settings["training"]["max_steps"] == 3 and "--max_steps 3" in model.settings["command"]
    assert Image.open(tmp_path / "out.png").width > 1000 and checkpoints(out) == ["step_0000003"]


def test_training_changes_every_trainable_tensor_and_nothing_of_the_backbone(in_process, photos, tmp_path, monkeypatch):
    backbone = brixel.load_backbone("timm:test_vit", None)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    monkeypatch.setattr(brixel, "load_backbone", lambda *_: backbone)
    common = [*FAST, "--data_dir", photos, "--preset", "best"]
    in_process(*common, "--out", tmp_path / "one.pt", "--max_steps", 1)
    in_process(*common, "--out", tmp_path / "out.pt")
    assert all(torch.equal(before[key], value) for key, value in backbone.state_dict().items())
    first, last = weights_of(tmp_path / "one.pt"), weights_of(tmp_path / "out.pt")
    assert not [key for key in first if torch.equal(first[key], last[key])]


def test_loss_falls_on_cached_crops(in_process, photos, tmp_path):
    in_process(*FAST, "--data_dir", photos, "--out", tmp_path / "out.pt", *BEST_CACHED, "--max_steps", 40,
               "--log_every", 10, "--lr", "3e-3", "--warmup_epochs", 0)
    losses = [record["loss"] for record in log_of(tmp_path / "out.pt")]
    assert len(losses) == 4 and losses[-1] < 0.8 * losses[0]


def test_gradients_are_accumulated_over_several_batches(in_process, photos, tmp_path, monkeypatch):
    steps = []
    call_at(monkeypatch, "frozen_pass", 9, lambda: steps.append(len(log_of(tmp_path / "out.pt"))))
    in_process(*FAST, "--data_dir", photos, "--out", tmp_path / "out.pt", "--grad_accum", 3, "--max_steps", 3)
    assert steps == [2] and [record["step"] for record in log_of(tmp_path / "out.pt")] == [1, 2, 3]


@pytest.mark.parametrize("extra", [["--scale", 2, "--teacher_size", 64, "--crop", "center"],
                                   ["--scale", 8, "--teacher_size", 256, "--mixed_precision", "bf16"]])
def test_other_scales_crops_and_precisions_train(in_process, photos, tmp_path, extra):
    out = tmp_path / "out.safetensors"
    in_process(*FAST, "--data_dir", photos, "--out", out, "--max_steps", 1, "--min_side", 64, *extra)
    model = brixel.load(out)
    assert model(torch.zeros(1, 3, 32, 48)).shape == (1, 64, 2 * model.scale, 3 * model.scale)


def test_init_starts_from_the_weights_of_a_checkpoint_and_refuses_another_network(in_process, photos, tmp_path):
    common, first = [*FAST, "--data_dir", photos, "--warmup_epochs", 0], tmp_path / "first.pt"
    in_process(*common, "--out", first)
    init = [*common, "--init", first, "--seed", 1, "--lr", 0, "--max_steps", 1]
    in_process(*init, "--out", tmp_path / "second.pt")
    want, got = weights_of(first), weights_of(tmp_path / "second.pt")
    assert all(torch.equal(want[key], got[key]) for key in want if "running" not in key and "num_batches" not in key)
    for other, sentence in ((["--full_rank"], "direct.weight"), (["--scale", 2, "--teacher_size", 64], "scale 2")):
        message = error_of(in_process, *init, "--out", tmp_path / "third.pt", *other)
        assert "--init" in message and str(first) in message and sentence in message


def test_existing_run_is_kept_and_overwrite_starts_anew(in_process, photos, tmp_path):
    out = tmp_path / "out.pt"
    common = [*FAST, "--data_dir", photos, "--out", out, "--save_every", 1]
    in_process(*common)
    before = out.read_bytes()
    assert "--overwrite" in error_of(in_process, *common) and out.read_bytes() == before and len(log_of(out)) == 4
    in_process(*common, "--max_steps", 2, "--seed", 1, "--overwrite")
    assert out.read_bytes() != before and len(log_of(out)) == 2 and checkpoints(out) == ["step_0000002"]


@pytest.mark.parametrize("number, preset", [(signal.SIGTERM, []), (signal.SIGINT, BEST_CACHED),
                                            (signal.SIGTERM, ["--preset", "best"])])
def test_stopped_run_resumes_bit_for_bit(in_process, photos, tmp_path, monkeypatch, number, preset):
    common, out = [*FAST, "--data_dir", photos, "--max_steps", 7, "--eval_every", 3, *preset], tmp_path / "parts.pt"
    in_process(*common, "--out", tmp_path / "whole.pt")
    handler = signal.getsignal(number)
    call_at(monkeypatch, "optimizer_step", 3, lambda: signal.raise_signal(number))
    message = error_of(in_process, *common, "--out", out)
    assert "after step 3" in message and "--resume" in message and checkpoints(out) == ["step_0000003"]
    assert signal.getsignal(number) is handler and not out.exists()
    (tmp_path / "parts.state/tmp").mkdir()         # half-written, by a run that was killed
    in_process(*common, "--out", out, "--resume")
    torch.testing.assert_close(weights_of(tmp_path / "whole.pt"), weights_of(out), rtol=0, atol=0)
    assert [record["step"] for record in log_of(out)] == [1, 2, 3, 4, 5, 6, 7]


def start(out, *args):
    """brixel.py in a session of its own, on one thread, up to its first new checkpoint."""
    code = "import os, torch, brixel; torch.set_num_threads(1); os.cpu_count = lambda: 1; brixel.main()"
    command, before = [sys.executable, "-c", code, *FAST, "--out", out, "--save_every", 1, *args], checkpoints(out)
    process = subprocess.Popen([*map(str, command)], cwd=ROOT, start_new_session=True, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while process.poll() is None and checkpoints(out) == before:
        time.sleep(0.02)
    return process


def test_ctrl_c_in_the_terminal_reaches_the_workers_too_and_does_no_harm(photos, tmp_path):
    out = tmp_path / "out.pt"
    process = start(out, "--data_dir", photos, "--max_steps", 9999, "--num_workers", 1)
    os.killpg(process.pid, signal.SIGINT)
    output = process.communicate()[0]
    assert process.returncode == 1 and "Traceback" not in output
    assert f"stopped by a signal after step {int(checkpoints(out)[0][5:])};" in output


@pytest.mark.parametrize("kills, steps", [(1, 30), pytest.param(20, 600, marks=pytest.mark.slow)])
def test_run_killed_at_a_random_moment_resumes_bit_for_bit(in_process, photos, tmp_path, kills, steps):
    whole, parts, rng = tmp_path / "whole.pt", tmp_path / "parts.pt", random.Random(0)
    common = ["--data_dir", photos, "--max_steps", steps]
    in_process(*FAST, "--out", whole, *common)
    for _ in range(kills):
        process = start(parts, *common, *(["--resume"] if checkpoints(parts) else []))
        time.sleep(rng.uniform(0, 1))
        process.kill()
        process.communicate()
    assert checkpoints(parts)
    in_process(*FAST, "--out", parts, *common, "--resume")
    torch.testing.assert_close(weights_of(whole), weights_of(parts), rtol=0, atol=0)


def test_resume_with_other_settings_is_refused(in_process, photos, tmp_path):
    common = [*FAST, "--data_dir", photos, "--out", tmp_path / "out.pt"]
    in_process(*common, "--max_steps", 1)
    message = error_of(in_process, *common, "--resume", "--lr", "0.5", "--scale", "2")
    assert "lr was 0.001, is 0.5" in message and "scale was 4, is 2" in message
    (photos / "0.jpg").unlink()
    assert "n_photos was 8, is 7" in error_of(in_process, *common, "--resume")


def test_ctrl_c_before_the_first_step_is_one_sentence(in_process, photos, tmp_path, monkeypatch):
    call_at(monkeypatch, "cached_maps", 1, lambda: signal.raise_signal(signal.SIGINT))
    message = error_of(in_process, *FAST, "--data_dir", photos, "--out", tmp_path / "out.pt", *BEST_CACHED)
    assert re.fullmatch("brixel.py: stopped; to go on, run the same command, with --resume if .*", message)


def test_teacher_maps_outlive_a_run_that_dies_in_its_first_step(in_process, photos, tmp_path, monkeypatch):
    out, maps = tmp_path / "out.pt", tmp_path / "out.state/maps.pt"
    common = [*FAST, "--data_dir", photos, "--out", out, *BEST_CACHED]
    call_at(monkeypatch, "principal_components", 1, lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        in_process(*common)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    written = maps.stat().st_mtime_ns
    in_process(*common, "--resume")
    assert maps.stat().st_mtime_ns == written and [record["step"] for record in log_of(out)] == [1, 2, 3, 4]


def torchrun(tmp_path, patch, *args):
    """brixel.py after the lines `patch`, on two CPU processes (accelerate's launcher needs MPI for that)."""
    (tmp_path / "run.py").write_text(f"import os, torch, brixel\n{patch}\nbrixel.main()")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command += [str(tmp_path / "run.py"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_two_processes_log_the_same_as_one(in_process, photos, tmp_path, monkeypatch):
    """Same photos in the same steps, global principal components and mean; no stochastic depth."""
    monkeypatch.setattr(torch.nn.BatchNorm2d, "train", lambda self, mode: torch.nn.Module.train(self, False))
    common = [*FAST, "--data_dir", photos, "--drop_path", 0, "--lambda_cosine", 1, "--val_share", 0.4]
    in_process(*common, "--batch_size", 4, "--out", tmp_path / "one.pt")
    patch = "torch.nn.BatchNorm2d.train = lambda self, mode: torch.nn.Module.train(self, False)"
    done = torchrun(tmp_path, patch, *common, "--out", tmp_path / "two.pt")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("settings: ") == done.stdout.count("held-out photos") == 1
    one, two = ([*map(json.loads, open(tmp_path / name))] for name in ("one.jsonl", "two.jsonl"))
    assert len(one) == 5
    for a, b in zip(one, two, strict=True):
        assert a | {"images/s": 0} == pytest.approx(b | {"images/s": 0}, rel=1e-4)


def test_a_dying_process_ends_all_with_its_error(photos, tmp_path):
    patch = "if os.environ['RANK'] == '1':\n    del brixel.brixel_loss"
    done = torchrun(tmp_path, patch, *FAST, "--data_dir", photos, "--out", tmp_path / "out.pt")
    assert done.returncode != 0 and "name 'brixel_loss' is not defined" in done.stderr


def test_steps_that_are_not_finite_are_not_applied_and_three_in_a_row_stop(in_process, photos, tmp_path, monkeypatch):
    real, bad, calls = brixel.l1_loss, {2, 3, 5}, itertools.count(1)
    monkeypatch.setattr(brixel, "l1_loss", lambda *maps: real(*maps) * (math.nan if next(calls) in bad else 1))
    common = [*FAST, "--data_dir", photos, "--max_steps", 5, "--out"]
    in_process(*common, tmp_path / "a.pt")
    assert all(torch.isfinite(value).all() for value in weights_of(tmp_path / "a.pt").values())
    bad |= set(range(100))
    assert re.search("3 steps in a row, up to step 3.* --lr", error_of(in_process, *common, tmp_path / "b.pt"))


@pytest.mark.parametrize("workers", [0, 1])
def test_no_usable_photo_is_one_sentence(in_process, photos, tmp_path, workers):
    _, held_out = data.split(8, 0.01)
    Image.new("RGB", (600, 600)).save(photos / f"{held_out[0]}.jpg")             # the others are too small
    message = error_of(in_process, *FAST, "--data_dir", photos, "--out", tmp_path / "out.pt", "--min_side", 500,
                       "--num_workers", workers)
    assert re.fullmatch(r"brixel.py: error: 7 photos in a row cannot be used, first .*\.jpg: the short side is 150 px, "
                        r"min_side is 500 \(--data_dir, --min_side\)", message)

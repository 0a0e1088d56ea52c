"""Training from the command line: settings, mistakes, exact resuming, several processes, faults."""
import contextlib
import io
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace
from unittest.mock import Mock

import psutil
import pytest
import torch
from conftest import FAST, ROOT, TINY, error_of, log_of, on_two_processes, tensors, weights_of
from PIL import Image
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

import brixel
import data
import probe

CONFIG = (ROOT / "config.yaml").read_text("utf-8")
BEST_CACHED = ["--preset", "best", "--cache_crops", 6]            # after FAST; FAST alone is `paper`, with live crops
SEVERAL = ["--teacher_size", 128, 192, 128, "--min_side", 100]


def settings(*argv, **options):
    return brixel.load_config(argv, "preset", "paper", "", **options)


def saved_step(path):
    """Step of out.state beside `path`, or None."""
    state = path.with_suffix(".state")
    return torch.load(state)["step"] if state.exists() else None


def call_at(monkeypatch, name, number, action, owner=brixel):
    """Call `action` just before call `number` (1, 2, ...) of the function brixel.NAME."""
    real, calls = getattr(owner, name), itertools.count(1)

    def counted(*args):
        if next(calls) == number:
            action()
        return real(*args)

    monkeypatch.setattr(owner, name, counted)


def test_every_key_is_a_flag_with_its_comment_as_help_and_the_default_is_the_paper_s_recipe(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        settings("--preset", "quickstart", "--help")
    text = capsys.readouterr().out
    comments = dict(re.findall(r"^  (\w+): .*? +# (.*)", CONFIG.split("best:")[0], re.M))
    assert comments.keys() | {"preset"} == vars(settings()).keys()
    for key, comment in comments.items():
        assert re.search(rf"^  --{key}\b.*\s+{re.escape(comment)} \[", text, re.M), key
    assert settings("--max-steps", "7", "--no-resume").max_steps == 7
    recipe = {"backbone": "dinov3", "teacher_size": [1024], "scale": 4, "batch_size": 16, "max_steps": 40_000,
              "lr": 1e-3, "warmup_lr": 1e-4, "warmup_epochs": 1, "lambda_edge": 1, "lambda_spectral": 0.1, "k": 8,
              "grad_accum": 1, "optimizer": "adam", "full_rank": False, "lambda_cosine": 0, "lr_decay": 0,
              "mixed_precision": "bf16"}
    assert vars(settings()).items() >= recipe.items()


def config_with(tmp_path, section, comments=True):
    path = tmp_path / "config.yaml"
    path.write_text(f"{CONFIG if comments else re.sub(' +#.*', '', CONFIG)}\n{section}\n", "utf-8")
    return path


def test_values_as_people_write_them_in_a_preset_of_their_own(tmp_path):
    section = """mine:
  <<: *best
  lr: 1e-3
  lr_decay: 1
  max_steps: 4e2
  batch_size: 16.0
  drop_path: 0
  mixed_precision: no
  teacher_size: 448
  out: 007.pt
  data_dir: fot\u00f3s"""
    path = config_with(tmp_path, section, comments=False)
    cfg = vars(settings("--preset", "mine", "--drop_path", "0.5", path=path))
    want = {"lr": 1e-3, "lr_decay": 1.0, "max_steps": 400, "batch_size": 16, "mixed_precision": "no", "drop_path": 0.5,
            "teacher_size": [448], "out": "007.pt", "data_dir": "fot\u00f3s", "full_rank": True, "lambda_edge": 0.2}
    assert {key: cfg[key] for key in want} == want and type(cfg["lr_decay"]) is float is not type(cfg["max_steps"])


@pytest.mark.parametrize("line, words", [
    ("  lt: 2.0  # rate", "mine: .*lt"), ("  lr: fast", "mine: .*--lr.*'fast'"), ("  lr:", "mine: .*--lr"),
    ("  mixed_precision: yes", "mine: .*mixed_precision.*'yes'"), ("  max_steps: 1.5", "mine: .*max_steps.*1.5"),
    ("  resume: 3", "mine: .*resume"), ("  crop: centre", "mine: .*crop.*'centre'.*'center'"), ("\tlr: 1.0", "line"),
    ("  lr 1.0", "line"), ("  <<: *fast", "fast.*line"), ('  data_dir: "C:\\photos"', "line"), ("  lr: -1", "lr.*-1"),
    ("  lr: 1\n  k: 4\n  lr: 2", "line [0-9]+: lr "), ("best:\n  k: 1", "line [0-9]+: best ")])
def test_a_mistake_in_the_config_is_one_sentence(tmp_path, line, words):
    with pytest.raises(brixel.BrixelError, match=words) as caught:
        settings("--preset", "mine", path=config_with(tmp_path, f"mine:\n  <<: *best\n{line}"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("args, sentence", [
    (["--lr", "nan"], "--lr"), (["--max_stps", "5"], "--max_stps.*did you mean --max_steps"), (["--val_share", "1"], "--val_share"),
    (["--num_workers", "-1"], "--num_workers"),
    (["--preset", "ade20k"], "--preset.*'ade20k'"), (["--optimizer", "sgd"], "--optimizer.*'sgd'.*adam.*muon"),
    (["--teacher_size", "130"], "4 x 16, such as 128 .--teacher_size"),
    (["--backbone", "dinov9"], "'dinov9'.*dinov3_vitb16.*sample.*siglip2"),
    (["--data_dir", "no/such/folder", "--backbone", "dinov9"], "no/such/folder.*--data_dir"),
    (["--out", "no/such/folder/out.pt"], "--out .*no/such/folder"), (["--out", "out.bin"], "--out out.bin"),
    (["--init", "none.pt"], "--init: .*none.pt"), (["--report_to", "wandb"], "wandb is not installed .--report_to"),
    (["--resume"], "out.state.*--overwrite.*--resume")])
def test_impossible_settings_are_one_sentence_and_write_nothing(
        in_process, photos, tmp_path, monkeypatch, args, sentence):
    """Also the order of a start: a wrong --data_dir is told before a wrong --backbone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("accelerate.tracking._available_trackers", [])                    # neither is installed
    message = error_of(in_process, *FAST, "--data_dir", photos, "--out", "out.pt", *args)
    assert re.match("brixel.py: error: .*" + sentence, message), message
    assert "\n" not in message and os.listdir(tmp_path) == ["photos"]


def test_lr_at_by_hand():
    cfg = SimpleNamespace(warmup_epochs=0.5, warmup_lr=1e-4, lr=2e-3, lr_decay=0.2, max_steps=100)
    rates = [brixel.lr_at(step, cfg, steps_per_epoch=20) for step in (0, 9, 10, 79, 80, 90, 99)]
    assert rates == pytest.approx([1e-4, 1e-4, 2e-3, 2e-3, 2e-3, 1e-3, 1e-4])
    cfg.lr_decay = 0
    assert brixel.lr_at(99, cfg, steps_per_epoch=20) == 2e-3


def test_loss_falls_on_cached_crops_each_of_which_is_computed_once(in_process, photos, tmp_path, monkeypatch):
    sizes, real = [], brixel.frozen_pass
    monkeypatch.setattr(brixel, "frozen_pass", lambda image, *args: sizes.append(len(image)) or real(image, *args))
    in_process(*FAST, "--data_dir", photos, "--out", tmp_path / "out.pt", *BEST_CACHED, "--max_steps", 40,
               "--log_every", 10, "--lr", "3e-3", "--warmup_epochs", 0)
    losses = [record["loss"] for record in log_of(tmp_path / "out.pt")]
    assert len(losses) == 4 and losses[-1] < 0.8 * losses[0]
    assert sizes == 6 * [1] + [1]                                 # the crops, then the held-out photo


def test_gradients_are_accumulated_at_another_scale_crop_and_precision(in_process, photos, tmp_path, monkeypatch):
    out, steps = tmp_path / "out.safetensors", []
    call_at(monkeypatch, "frozen_pass", 9, lambda: steps.append(len(log_of(out))))
    monkeypatch.setattr("accelerate.Accelerator.init_trackers", init_trackers := Mock())
    in_process(*FAST, "--data_dir", photos, "--out", out, "--grad_accum", 3, "--max_steps", 3, "--scale", 8,
               "--teacher_size", 256, "--min_side", 64, "--crop", "center", "--mixed_precision", "bf16")
    assert steps == [2] and [record["step"] for record in log_of(out)] == [1, 2, 3]
    assert init_trackers.call_args.args == ("out.tensorboard",)   # beside the others: TensorBoard shows runs as folders
    assert init_trackers.call_args.kwargs["init_kwargs"] == {"wandb": {"name": "out"}}
    assert brixel.load(out)(torch.zeros(1, 3, 32, 48)).shape == (1, 64, 16, 24)


def test_several_sizes_take_turns(in_process, photos, tmp_path, monkeypatch):
    sides, real = [], brixel.frozen_pass
    monkeypatch.setattr(brixel, "frozen_pass", lambda image, *args: sides.append(image.shape[-1]) or real(image, *args))
    in_process(*FAST, "--data_dir", photos, *SEVERAL, "--max_steps", 6, "--out", f"{tmp_path}/")
    assert sides == [128, 192, 128, 128, 192, 128, 128, 192]           # six batches, one held-out photo at each size
    last = json.loads((tmp_path / "out.jsonl").read_text().splitlines()[-1])
    assert {key for key in last if "photos" in key} == {"photos at 128", "photos at 192"} and "brixel l1 at 192" in last


def test_init_takes_what_load_takes_or_a_mean_and_refuses_another_network(in_process, photos, tmp_path):
    common, first = [*FAST, "--data_dir", photos, "--warmup_epochs", 0], tmp_path / "first.pt"
    brixel.Brixel(brixel.load_backbone("timm:test_vit", None)).save(first, note="a year on a thousand GPUs")
    init = [*common, "--seed", 1, "--lr", 0, "--max_steps", 1, "--init"]
    save_file(tensors("tiny_brixel_weights"), tmp_path / "released.safetensors")          # of the authors' code
    for start_from in (first, tmp_path / "released.safetensors"):
        in_process(*init, start_from, "--out", tmp_path / "second.pt", "--overwrite")
        want, got = (brixel.load(path, "timm:test_vit", "none") for path in (start_from, tmp_path / "second.pt"))
        assert all(map(torch.equal, want.upsampler.parameters(), got.upsampler.parameters()))
        assert got.settings["skip"] == want.settings["skip"] and got.settings["training"]["init"] == [str(start_from)]
        assert "note" not in got.settings          # what is said of the first run's weights is not said of these
    in_process(*common, "--max_steps", 5, "--out", other := tmp_path / "other.pt")
    in_process(*init, first, other, other, "--max_steps", 0, "--out", tmp_path / "mean.pt")
    first_weights, other_weights, mean = map(weights_of, (first, other, tmp_path / "mean.pt"))
    want = {key: (x + 2 * other_weights[key]) / 3 for key, x in first_weights.items() if x.is_floating_point()}
    torch.testing.assert_close({key: mean[key] for key in want}, want)
    for other in (["--full_rank"], ["--backbone", "timm:test_vit2"]):                     # of the same sizes
        message = error_of(in_process, *init, first, "--out", tmp_path / "third.pt", *other)
        assert "--init" in message and str(first) in message and other[0].strip("-") in message


def test_an_existing_run_is_kept_from_every_mistake_and_goes_on_or_is_overwritten(
        in_process, photos, tmp_path, capsys):
    """Also by a run that finds no photo; a damaged checkpoint is named; what changes between two parts is said."""
    out, state = tmp_path / "out.pt", tmp_path / "out.state"
    common = [*FAST, "--data_dir", photos, "--out", out, "--save_every", 1]
    in_process(*common, "--max_steps", 2)
    before = out.read_bytes()
    for args, words in (([], "--overwrite"), (["--overwrite", "--min_side", 999], "--min_side"),
                        (["--resume", "--seed", 1], "seed was 42, is 1"),
                        (["--resume", "--backbone", "timm:test_vit2"], "backbone was"),
                        (["--resume", "--optimizer", "muon"], "'adam', is 'muon'"),
                        (["--resume", "--max_steps", 1], "--max_steps")):
        assert words in error_of(in_process, *common, *args)
        assert out.read_bytes() == before and len(log_of(out)) == saved_step(out) == 2
    in_process(*common, "--resume", "--lr", "0.5", "--max_steps", 3)
    output = capsys.readouterr().out
    assert "lr was 0.001, is 0.5" in output and "max_steps was 2, is 3" in output and "seed was" not in output
    (photos / "0.jpg").unlink()
    assert "n_photos was 8, is 7" in error_of(in_process, *common, "--resume")
    for size in (state.stat().st_size - 1, 1000, 0):
        os.truncate(state, size)
        message = error_of(in_process, *common, "--resume")
        assert str(state) in message and "--overwrite" in message and "\n" not in message
    in_process(*common, "--max_steps", 1, "--overwrite")
    assert out.read_bytes() != before and len(log_of(out)) == saved_step(out) == 1


@pytest.mark.parametrize("number, preset", [(signal.SIGTERM, []), (signal.SIGINT, BEST_CACHED),
                                            (signal.SIGUSR1, [*SEVERAL, "--cache_crops", 9])])
def test_stopped_run_resumes_bit_for_bit(in_process, photos, tmp_path, monkeypatch, number, preset):
    common, out = [*FAST, "--data_dir", photos, "--max_steps", 7, "--eval_every", 3, *preset], tmp_path / "parts.pt"
    in_process(*common, "--out", tmp_path / "whole.pt")
    handler = signal.getsignal(number)
    call_at(monkeypatch, "optimizer_step", 3, lambda: signal.raise_signal(number))
    message = error_of(in_process, *common, "--out", out)
    assert "after step 3" in message and "--resume" in message and saved_step(out) == 3
    assert signal.getsignal(number) is handler and brixel.load(out).settings["step"] == 3     # of use from now on
    first = weights_of(out)
    with open(tmp_path / "parts.jsonl", "a") as file:
        file.write('\n\0\0\n{"step": 4, "loss": 0}\n{"step": 5, "lo')      # damaged, or logged after the checkpoint
    in_process(*common, "--out", out, "--resume")
    before = (tmp_path / "parts.jsonl").read_text()
    in_process(*common, "--out", out, "--resume")
    assert (tmp_path / "parts.jsonl").read_text() == before       # resuming a finished run changes nothing
    torch.testing.assert_close(weights_of(tmp_path / "whole.pt"), last := weights_of(out), rtol=0, atol=0)
    assert [record["step"] for record in log_of(out)] == [1, 2, 3, 4, 5, 6, 7]
    assert not [key for key in first if torch.equal(first[key], last[key])]


def start(out, *args, launcher=(), **options):
    """brixel.py in a session of its own, on one thread, up to its first checkpoint, or its third step."""
    command = [sys.executable, *launcher, "brixel.py", *FAST, "--out", out, "--save_every", 1, *args]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    process = subprocess.Popen([*map(str, command)], cwd=ROOT, start_new_session=True, text=True, env=environment,
                               **{"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} | options)
    log = out.with_suffix(".jsonl")
    while process.poll() is None and not out.exists() and not (log.exists() and log.read_text().count("\n") > 3):
        time.sleep(0.02)
    return process


def end(process, number, to="group"):
    """Send a signal `to` the process, its group or every process of it, as batch systems do; wait for all of them."""
    family = [psutil.Process(process.pid)]
    family += family[0].children(recursive=True)
    if to == "group":
        os.killpg(process.pid, number)
    for each in {"process": family[:1], "every": family}.get(to, ()):
        if each.is_running():
            each.send_signal(number)
    output = process.communicate(timeout=60)[0]
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive
    return output


@pytest.mark.parametrize("number, to, every", [(signal.SIGTERM, "group", 1000), (signal.SIGUSR1, "every", 1000),
                                               (signal.SIGKILL, "group", 1)])
def test_a_signal_saves_the_run_with_its_loaders_workers(in_process, photos, tmp_path, number, to, every):
    """SIGKILL does not, at a random moment; then there is the checkpoint of a step before it."""
    whole, parts, common = tmp_path / "a.pt", tmp_path / "b.pt", ["--data_dir", photos, "--max_steps", 60]
    process = start(parts, *common, "--save_every", every, "--eval_every", 4, "--num_workers", 2)
    if number == signal.SIGKILL:
        time.sleep(time.time() % 1)
        end(process, number, to)
    else:
        output = end(process, number, to)
        assert process.returncode == 1 and f"after step {saved_step(parts)};" in output and "Traceback" not in output
    for out, flags in ((whole, []), (parts, ["--resume"])):
        in_process(*FAST, *common, "--out", out, *flags)
    torch.testing.assert_close(weights_of(whole), weights_of(parts), rtol=0, atol=0)


@pytest.mark.parametrize("number, to", [(signal.SIGINT, "every"), (signal.SIGUSR1, "process")])
def test_a_signal_saves_the_run_of_two_processes_under_a_launcher_into_a_dead_pipe(
        in_process, photos, tmp_path, number, to):
    """Before it another run on the same --out is refused."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    reader = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    process = start(tmp_path / "out.pt", "--data_dir", photos, "--max_steps", 9999, "--num_workers", 2,
                    launcher=launcher, stdout=reader.stdin, stderr=reader.stdin)
    reader.kill()
    reader.stdin.close()
    reader.wait()
    for flag in ("--resume", "--overwrite"):
        message = error_of(in_process, *FAST, "--data_dir", photos, "--max_steps", 9999, "--out", tmp_path / "out.pt", flag)
        assert "another run is writing" in message and "out.jsonl" in message
    before = saved_step(tmp_path / "out.pt")
    end(process, number, to)
    assert saved_step(tmp_path / "out.pt") == len(log_of(tmp_path / "out.pt")) >= before


def test_launched_run_on_untidy_photos_whose_pictures_cannot_be_drawn_leaves_checkpoint_and_log(photos, tmp_path):
    """Two thirds of the photos are too small, and a matplotlibrc asks for a LaTeX that is not there."""
    out = tmp_path / "out.pt"
    for i in range(20):
        Image.new("RGB", (90, 90), (i, i, i)).save(photos / f"small{i}.jpg")
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\n")
    (tmp_path / "out.png").mkdir()                                # where no picture can be written
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "brixel.py", *FAST, "--data_dir", photos,
               "--val_share", 0.4, "--num_workers", 2, "--eval_every", 3, "--out", out, "--overwrite"]
    done = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "MATPLOTLIBRC": str(tmp_path), "PATH": "/usr/bin:/bin"})
    said, index = done.stdout + done.stderr, data.PhotoIndex(photos)
    usable = [i for i in data.split(len(index), 0.4)[1] if "small" not in index.name(i)]
    assert done.returncode == 0 and said.count("warning: ") == 1 and "out.png" in said, said
    assert re.search(rf"on {len(usable)} of 11 held-out photos .*--min_side", said) and len(usable) < 5
    assert "17 photos to train on, 11 held out" in said and "differ from preset paper: backbone timm:test_vit, " in said
    assert f"wrote {out}, {tmp_path}/out.jsonl, {tmp_path}/out.state;" in said and not re.search("UserWarning|Loading", said)
    assert 1 <= said.count("skipped ") <= 3 and re.search(r"\d % of the first 8 samples met a photo", said)
    assert [r["step"] for r in map(json.loads, open(tmp_path / "out.jsonl")) if "brixel l1" in r] == [3, 4]
    assert [r["step"] for r in log_of(out)] == [1, 2, 3, 4] and saved_step(out) == 4
    for r in log_of(out):
        assert r["loss"] == pytest.approx(r["l1"] + r["edge"] + 0.1 * r["spectral"], rel=1e-4)
    kept = brixel.load(out).settings
    assert kept["held_out"]["photos"] == len(usable) and kept["training"]["val_share"] == 0.4
    assert "--val_share 0.4" in kept["command"]


@pytest.mark.parametrize("name", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_NTASKS"])
def test_several_processes_that_would_each_run_alone_are_refused(
        in_process, photos, benchmarks, monkeypatch, fresh_accelerate, name):
    """Some versions of accelerate miss the address of the first process themselves; they also write to os.environ."""
    monkeypatch.setattr("os.environ", {**os.environ, name: "2"})
    sentence = f"error: (2 processes were started .{name}.*accelerate launch|Accelerate cannot start: .*MASTER_ADDR)"
    assert re.search(sentence, error_of(in_process, *FAST, "--data_dir", photos))
    fresh_accelerate()
    assert re.search(sentence, error_of(probe.main, [*TINY, *"--task ade20k --size 32 --num_workers 0".split()]))
    assert not [*benchmarks.glob("out*")]


def test_ctrl_c_is_one_word_and_any_console_can_print(monkeypatch):
    def run(action):
        with brixel.command_line("x"):
            action()

    console = io.TextIOWrapper(io.BytesIO(), "cp1252")
    monkeypatch.setattr(sys, "stdout", console)
    run(lambda: print("RMSE \u2193"))
    console.flush()
    assert console.buffer.getvalue().strip() == rb"RMSE \u2193"
    assert error_of(run, Mock(side_effect=KeyboardInterrupt)) == "x: stopped"


@pytest.mark.parametrize("extra", [[], ["--preset", "best", "--cache_crops", 6, "--grad_accum", 2]])
def test_two_processes_see_the_photos_and_gradients_of_one(in_process, photos, tmp_path, monkeypatch, extra):
    """The batch is that of all processes: every step has the same photos, so the same terms and gradients.

    Not so on a CPU are BatchNorm's statistics, which are per process (SyncBatchNorm needs GPUs): it is in eval mode
    here, and there is no stochastic depth.
    """
    evaluating = "torch.nn.BatchNorm2d.train = lambda self, mode: torch.nn.Module.train(self, False)"
    monkeypatch.setattr(torch.nn.BatchNorm2d, "train", None)      # to be restored
    exec(evaluating)
    common = [*FAST, "--data_dir", photos, "--drop_path", 0, "--val_share", 0.4, "--max_steps", 2, *extra, "--out"]
    in_process(*common, tmp_path / "one.pt")
    (tmp_path / "run.py").write_text(f"import torch, brixel\n{evaluating}\nbrixel.main()")
    printed = on_two_processes(tmp_path / "run.py", *common, tmp_path / "two.pt")
    assert printed.count("held out; ") == printed.count("held-out photos") == 1           # one process prints
    one, two = ([*map(json.loads, open(tmp_path / name))][1:] for name in ("one.jsonl", "two.jsonl"))
    for a, b in zip(one, two, strict=True):
        assert a | {"images/s": 0} == pytest.approx(b | {"images/s": 0}, rel=1e-4)
    states = [[x for optimizer in torch.load(tmp_path / name)["optimizers"] for x in optimizer["state"].values()]
              for name in ("one.state", "two.state")]             # with the gradients' running means
    one, two = (torch.cat([x.get("exp_avg", x.get("momentum_buffer")).flatten() for x in state]) for state in states)
    # Adam has turned the rounding of gradients near zero into updates
    torch.testing.assert_close(one, two, rtol=0, atol=1e-3 * one.norm().item())


def test_steps_that_are_not_finite_and_a_full_disk_leave_the_last_good_checkpoint(
        in_process, photos, tmp_path, monkeypatch):
    """Single steps are left out; ten in a row end the run."""
    real, calls = brixel.l1_loss, itertools.count(1)
    monkeypatch.setattr(brixel, "l1_loss", lambda *maps: real(*maps) * (math.nan if next(calls) in bad else 1))
    out, bad = tmp_path / "a.pt", {2}
    common = [*FAST, "--data_dir", photos, "--save_every", 1, "--out", out]
    in_process(*common, "--log_every", 2)
    assert [record["left_out"] for record in log_of(out)] == [1, 0]
    assert all(math.isfinite(record["loss"]) for record in log_of(out))
    calls, bad = itertools.count(1), range(3, 99)
    message = error_of(in_process, *common, "--max_steps", 99, "--overwrite")
    assert "step 12" in message and "--resume" in message and "--lr" in message and saved_step(out) == 11
    assert all(torch.isfinite(value).all() for value in weights_of(out).values())
    no_space, bad = Mock(side_effect=RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64")), ()
    call_at(monkeypatch, "save", 3, lambda: monkeypatch.setattr(torch, "save", no_space), brixel.Run)
    message = error_of(in_process, *common, "--overwrite")
    assert "a.state" in message and "space" in message and "\n" not in message
    assert saved_step(out) == brixel.load(out).settings["step"] == 2


def test_compiled_run_has_the_losses_and_the_names_of_a_plain_one(in_process, photos, tmp_path, monkeypatch):
    plain, out, real, compiled = tmp_path / "plain.pt", tmp_path / "out.pt", torch.compile, []

    def compile_eagerly(part, **options):
        compiled.append(part.__qualname__)
        return real(part, backend="aot_eager", fullgraph=True, **options)

    monkeypatch.setattr(torch, "compile", compile_eagerly)
    for path, flags in ((plain, []), (out, ["--compile"])):
        in_process(*FAST, "--data_dir", photos, "--drop_path", 0, "--max_steps", 2, "--out", path, *flags)
    assert compiled == ["Backbone.layers", "Module._call_impl"]
    assert [r["loss"] for r in log_of(out)] == pytest.approx([r["loss"] for r in log_of(plain)], rel=1e-4)
    assert weights_of(out).keys() == weights_of(plain).keys()


def test_a_step_waits_for_the_device_once_and_sends_it_nothing(fresh_accelerate, tmp_path):
    """Counted on a CPU: values that are read back, and tensors that are made of Python's numbers."""
    fresh_accelerate()
    seen = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.overloadpacket.__name__)
            return func(*args, **kwargs or {})

    cfg = settings("--preset", "best", *map(str, FAST), "--out", str(tmp_path / "out.pt"))
    accelerator, backbone = brixel.make_accelerator(cfg.mixed_precision), brixel.load_backbone(cfg.backbone, cfg.weights)
    model, upsampler, optimizers = brixel.set_up(cfg, backbone, accelerator)
    for mode in (contextlib.nullcontext(), Count()):              # the first step keeps what is made once
        image = torch.randint(256, (2, 3, 128, 128), dtype=torch.uint8)
        with mode:
            small, layers, teacher = brixel.frozen_pass(image, backbone, 4, accelerator)
            loss, _ = brixel.brixel_loss(upsampler(small, layers), teacher, 0.2, 0.03, 1.0, 8, accelerator)
            accelerator.backward(loss)
            assert brixel.optimizer_step(upsampler, optimizers, 1e-3)
    assert "convolution" in seen and seen.count("_local_scalar_dense") == 1 and "lift_fresh" not in seen

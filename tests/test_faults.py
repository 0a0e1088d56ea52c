"""What a long run meets: kills, full disks, several processes, hostile photos, damaged checkpoints."""

import json
import os
import random
import re
import shlex
import signal
import struct
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, error_of, launch, photo, weights_of
from PIL import Image

import brixel

# --- kills and resuming

def start(*args):
    """brixel.py in a process of its own, started and left running."""
    return subprocess.Popen([sys.executable, "brixel.py", *map(str, args)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def finish(process):
    """Wait for the end of a run that must go well."""
    output = process.communicate()[0]
    assert process.returncode == 0, output


def killed_and_resumed(photos, tmp_path, kills, steps, rng):
    """Weights of the run that nobody disturbed, and after `kills` SIGKILLs up to 1.5 seconds after a run's first new state."""
    common = [*SMALL, "--data_dir", photos, "--save_every", 1, "--max_steps", steps, "--eval_every", 1000]
    finish(start(*common, "--out", tmp_path / "whole.pt"))
    for _ in range(kills):
        before = set(tmp_path.glob("parts.state/step_*"))
        process = start(*common, "--out", tmp_path / "parts.pt", *(["--resume", "latest"] if before else ["--overwrite"]))
        while process.poll() is None and set(tmp_path.glob("parts.state/step_*")) <= before:
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 1.5))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    finish(start(*common, "--out", tmp_path / "parts.pt", "--resume", "latest"))
    return weights_of(tmp_path / "whole.pt"), weights_of(tmp_path / "parts.pt")


def test_run_killed_at_a_random_moment_resumes_bit_for_bit(photos, tmp_path):
    want, got = killed_and_resumed(photos, tmp_path, kills=1, steps=30, rng=random.Random(0))
    assert all(torch.equal(want[key], got[key]) for key in want)


@pytest.mark.slow
def test_run_killed_many_times_resumes_bit_for_bit(photos, tmp_path):
    want, got = killed_and_resumed(photos, tmp_path, kills=20, steps=600, rng=random.Random(1))
    assert all(torch.equal(want[key], got[key]) for key in want)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_the_state_and_says_how_to_go_on(in_process, photos, tmp_path, number):
    process = start(*SMALL, "--data_dir", photos, "--out", tmp_path / "out.pt", "--max_steps", 100_000, "--num_workers", 1)
    while not (tmp_path / "out.jsonl").exists() or not (tmp_path / "out.jsonl").read_text():
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(number)
    output = process.communicate(timeout=60)[0]
    states = sorted(tmp_path.glob("out.state/step_*"))
    assert process.returncode == 1 and "--resume latest" in output and "Traceback" not in output
    step = int(states[0].name[5:])
    assert len(states) == 1 and f"after step {step}" in output
    in_process(*shlex.split(re.search(r"brixel\.py (.*--resume latest)", output)[1]), "--max_steps", step + 1)
    assert (tmp_path / "out.pt").exists()


def test_signals_are_collected_and_their_handlers_given_back_after_an_error():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(brixel.BrixelError, match="diverged"), brixel.collected_signals() as signals:
        signal.raise_signal(signal.SIGINT)
        raise brixel.BrixelError("diverged")
    assert signals == [signal.SIGINT] and signal.getsignal(signal.SIGINT) is before


def test_half_written_states_are_never_picked(in_process, photos, tmp_path):
    common = [*SMALL, "--data_dir", photos, "--out", tmp_path / "out.pt", "--save_every", 1]
    in_process(*common, "--max_steps", 3)
    assert [p.name for p in sorted((tmp_path / "out.state").iterdir())] == ["step_0000002", "step_0000003"]       # keep_states 2
    (tmp_path / "out.state" / "tmp_0000009").mkdir()
    in_process(*common, "--max_steps", 4, "--resume", "latest")
    assert json.loads((tmp_path / "out.state" / "step_0000004" / "settings.json").read_text())["step"] == 4


def test_states_of_an_overwritten_or_later_run_do_not_outlive_it(in_process, photos, tmp_path):
    common = [*SMALL, "--data_dir", photos, "--out", tmp_path / "out.pt", "--save_every", 1]
    states = tmp_path / "out.state"
    in_process(*common, "--max_steps", 4)
    in_process(*common, "--max_steps", 2, "--overwrite")
    assert [p.name for p in sorted(states.iterdir())] == ["step_0000001", "step_0000002"]
    in_process(*common, "--max_steps", 2, "--resume", states / "step_0000001")
    assert [p.name for p in sorted(states.iterdir())] == ["step_0000001", "step_0000002"]


@pytest.mark.parametrize("place, name, call, limit, sentence, states", [
    ("brixel", "save_state", 2, 100_000, "could not save the state of step 4", ["step_0000002"]),
    ("brixel", "write_log", 2, 100, "out.jsonl: File too large", []),
    ("brixel.Brixel", "save", 1, 100_000, "out.pt: File too large", ["step_0000004", "step_0000005"]),
])
def test_full_disk_keeps_what_is_there_and_says_so(photos, tmp_path, place, name, call, limit, sentence, states):
    common = [*SMALL, "--data_dir", str(photos), "--out", str(tmp_path / "out.pt"), "--save_every", "2"]
    code = (f"import resource, signal, sys, brixel\n"
            f"real, calls = {place}.{name}, []\n"
            f"def limited(*args, **options):\n"
            f"    calls.append(1)\n"
            f"    if len(calls) == {call}:\n"           # from this call on, no file may grow beyond the limit
            f"        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            f"        resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
            f"    real(*args, **options)\n"
            f"{place}.{name} = limited\n"
            f"brixel.main(sys.argv[1:])")
    done = subprocess.run([sys.executable, "-c", code, *map(str, common), "--max_steps", "5"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and sentence in done.stderr and "Traceback" not in done.stderr
    assert [p.name for p in sorted(tmp_path.glob("out.state/*"))] == states


def test_check_leaves_nothing_behind(in_process, photos, tmp_path, capsys):
    in_process(*SMALL, "--data_dir", photos, "--out", tmp_path / "out.pt", "--check")
    assert "check passed" in capsys.readouterr().out and [p.name for p in tmp_path.iterdir()] == ["photos"]


# --- several processes

def torchrun(processes, script, *args):
    """`script` on several CPU processes; accelerate's own launcher starts only one there, unless MPI is installed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes, script, *args]
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=150,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"})


def test_two_processes_equal_one(photos, tmp_path):
    """Same photos in the same steps, global principal components, same losses; BatchNorm in eval mode, no stochastic depth."""
    script = tmp_path / "eval_batchnorm.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport torch, brixel\n"
                      "torch.nn.BatchNorm2d.forward = lambda self, x: torch.nn.functional.batch_norm(\n"
                      "    x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)\n"
                      "brixel.main()\n")
    common = [*SMALL, "--data_dir", photos, "--drop_path", 0, "--max_steps", 4, "--save_every", 2]
    for name, processes, batch in (("one", 1, 4), ("two", 2, 2)):
        done = torchrun(processes, script, *common, "--batch_size", batch, "--out", tmp_path / f"{name}.pt")
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("of them held out") == done.stdout.count("held-out photos") == 1
    one, two = ([json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()] for name in ("one", "two"))
    assert len(one) == len(two) == 5
    for a, b in zip(one, two):
        for key in a.keys() - {"images/s"}:
            assert a[key] == pytest.approx(b[key], rel=1e-4), key


def test_a_dying_process_ends_all_with_its_error(photos, tmp_path):
    script = tmp_path / "dies.py"
    script.write_text(f"import os, sys; sys.path.insert(0, {str(ROOT)!r})\nimport brixel\nreal = brixel.brixel_loss\n"
                      "def loss(*args, **kw):\n"
                      "    if os.environ['RANK'] == '1':\n        raise RuntimeError('this worker is lost')\n"
                      "    return real(*args, **kw)\n"
                      "brixel.brixel_loss = loss\nbrixel.main()\n")
    done = torchrun(2, script, *SMALL, "--data_dir", photos, "--out", tmp_path / "out.pt")
    assert done.returncode != 0 and "this worker is lost" in done.stderr


# --- hostile photos

def png_claiming(width, height):
    """A PNG whose header promises width x height pixels and holds none."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + chunk(b"IDAT", b"")


def hostile_corpus(folder, rng):
    """Write bad files of many kinds among the good ones of `folder`.   Returns: names of those that cannot be read."""
    good = (folder / "0.jpg").read_bytes()
    bad = {f"cut{i}.jpg": good[:rng.randrange(1, len(good) * 3 // 4)] for i in range(20)}
    bad |= {"empty.png": b"", "text.webp": b"hello", "html.jpg": b"<html></html>", "zeros.tif": bytes(1000),
            "bomb.png": png_claiming(20_000, 20_000), "huge.png": png_claiming(2**31 - 1, 2**31 - 1), "flat.png": png_claiming(0, 10),
            "name with spaces.jpg": b"no", "emoji \N{CAMERA}.jpg": b"no", "-rf.jpg": b"no", "new\nline.jpg": b"no", "riff.webp": b"RIFF\0\0\0\0WEBP",
            "bmp.bmp": b"BM" + bytes(50), "tiff.tiff": b"II*\0\xff\xff\xff\x7f", "gif.jpg": b"GIF89a"}
    for i in range(15):                            # damage in the header, where it shows
        data = bytearray(good)
        for _ in range(30):
            data[rng.randrange(2, 200)] ^= rng.randrange(1, 256)
        bad[f"flip{i}.jpg"] = bytes(data)
    for name, content in bad.items():
        (folder / name).write_bytes(content)
    (folder / "dangling.jpg").symlink_to(folder / "nowhere.jpg")
    (folder / "loop.jpg").symlink_to(folder / "loop.jpg")
    (folder / "loop").symlink_to(folder)
    (folder / "folder.jpg").mkdir()
    Image.new("RGB", (1, 1)).save(folder / "pixel.png")
    Image.new("RGB", (30_000, 10)).save(folder / "strip.png")
    for mode in ("CMYK", "L", "LA", "P", "RGBA", "1", "I;16"):
        image = Image.fromarray(photo(np.random.default_rng(1)))
        image = Image.new("I;16", (160, 160), 30_000) if mode == "I;16" else image.convert(mode)
        image.save(folder / f"mode_{mode.replace(';', '')}.tiff")
    frames = [Image.fromarray(photo(np.random.default_rng(i))) for i in range(3)]
    frames[0].save(folder / "animated.webp", save_all=True, append_images=frames[1:])
    exif = frames[0].getexif()
    exif[0x0112] = 77                              # there is no such orientation
    frames[0].save(folder / "exif.jpg", exif=exif)
    return [*(n for n in bad if not n.startswith("flip")), "dangling.jpg", "loop.jpg"]


def test_training_survives_a_hostile_corpus_and_names_each_bad_file_once(photos, tmp_path):
    rng = np.random.default_rng(5)
    for i in range(70):                            # most photos must be good, or the run stops
        Image.fromarray(photo(rng)).save(photos / f"good{i}.jpg")
    bad = hostile_corpus(photos, random.Random(2))
    done = launch(*SMALL, "--data_dir", photos, "--out", tmp_path / "out.pt", "--max_steps", 70, "--log_every", 10, "--min_side", 64,
                  "--num_workers", 2, "--val_share", 0.3)
    output = done.stdout + done.stderr
    assert done.returncode == 0, done.stderr[-3000:]
    missing = [name for name in bad if output.count(f"{name}: ") != 1]
    assert not missing and "too small" in done.stdout.splitlines()[-1] and "unreadable" in done.stdout.splitlines()[-1]


# --- damaged checkpoints

@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("trials", [25, pytest.param(400, marks=pytest.mark.slow)])
def test_damaged_checkpoints_are_one_sentence(tmp_path, suffix, trials):
    """Truncations anywhere, and bit flips in the header and the settings and the tensors."""
    backbone, path, rng = brixel.load_backbone("timm:test_vit", None), tmp_path / f"out{suffix}", random.Random(0)
    model = brixel.Brixel(backbone)
    want, refused = model.upsampler.state_dict(), 0
    model.save(path)
    good = path.read_bytes()
    for trial in range(trials):
        data = bytearray(good)
        if trial % 2:
            del data[rng.randrange(len(data)):]
        else:
            for _ in range(rng.choice([1, 8])):
                data[rng.randrange(rng.choice([2000, len(data)]))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        try:                                       # a flip in the padding of a zip archive changes nothing
            state = brixel.load(path, backbone=backbone).upsampler.state_dict()
            assert trial % 2 == 0 and all(torch.equal(state[key], value) for key, value in want.items())
        except brixel.BrixelError as error:
            refused += 1
            assert path.name in str(error)
    assert refused > 0.9 * trials


@pytest.mark.parametrize("change", [{"scale": 3}, {"scale": "x"}, {"skip": None}, {"patch_size": 15}])
def test_nonsense_settings_in_a_checkpoint_are_one_sentence(tmp_path, change):
    model = brixel.Brixel(brixel.load_backbone("timm:test_vit", None))
    model.save(tmp_path / "out.pt", **change)
    with pytest.raises(brixel.BrixelError):
        brixel.load(tmp_path / "out.pt")


def test_existing_state_of_another_program_is_refused(in_process, photos, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    message = error_of(in_process, *SMALL, "--data_dir", photos, "--out", tmp_path / "out.pt", "--resume", tmp_path / "elsewhere")
    assert "is not a state of this program" in message

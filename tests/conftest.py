"""Shared by all tests: small photographs, a tiny backbone, and the two ways to run brixel.py."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
FIXTURES = Path(__file__).with_name("fixtures")
sys.path.insert(0, str(ROOT))
TINY = ["--backbone", "timm:test_vit", "--weights", "none"]       # 6 blocks, 64 wide, patch 16, random weights
FAST = [*TINY, "--teacher_size", "128", "--min_side", "0", "--cache_crops", "0", "--max_steps", "4", "--batch_size", "2",
        "--num_workers", "0", "--log_every", "1"]                 # what makes any preset small
SMALL = [*FAST, "--preset", "photos"]


def tensors(name):
    """A file of tests/fixtures as {name: tensor}."""
    from safetensors.torch import load_file

    return load_file(FIXTURES / f"{name}.safetensors")


def photo(rng, height=150, width=180):
    """Smooth random colors with a few sharp boxes: (height, width, 3) uint8."""
    low = Image.fromarray(rng.integers(0, 255, (6, 7, 3), dtype=np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.array(low)
    for _ in range(5):
        y, x = rng.integers(0, height - 40), rng.integers(0, width - 40)
        pixels[y:y + 40, x:x + 30] = rng.integers(0, 255, 3)
    return pixels


@pytest.fixture
def photos(tmp_path):
    """Folder of eight small photographs."""
    folder, rng = tmp_path / "photos", np.random.default_rng(0)
    folder.mkdir()
    for i in range(8):
        Image.fromarray(photo(rng)).save(folder / f"{i}.jpg", quality=95)
    return folder


@pytest.fixture
def fresh_accelerate():
    """A function that makes accelerate forget its settings: they are global in a process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    return lambda: AcceleratorState._reset_state(True)


@pytest.fixture
def in_process(fresh_accelerate):
    """Run brixel.main in this process: fresh accelerate state, and our signal handlers back afterwards."""
    import brixel

    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}

    def run(*args):
        fresh_accelerate()
        brixel.main([str(arg) for arg in args])

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def error_of(run, *args):
    """The one sentence that `run(*args)` exits with."""
    with pytest.raises(SystemExit) as exit:
        run(*args)
    assert exit.value.code not in (0, None)
    return str(exit.value.code)


def launch(*args, launcher=(), cwd=ROOT, **environment):
    """`accelerate launch ... brixel.py ...` as a user types it.   Returns: subprocess.CompletedProcess."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", *launcher, "brixel.py", *map(str, args)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", **environment})


def weights_of(path):
    return torch.load(path, weights_only=True)["model"]

"""Shared by all tests: small photographs, a tiny backbone, and the ways to run brixel.py."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import render
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

ROOT, FIXTURES = Path(__file__).parents[1], Path(__file__).with_name("fixtures")
sys.path.insert(0, str(ROOT))
TINY = ["--backbone", "timm:test_vit", "--weights", "none"]       # 6 blocks, 64 wide, patch 16, random weights
FAST = [*TINY, *"--teacher_size 128 --min_side 0 --cache_crops 0 --max_steps 4 --batch_size 2 --num_workers 0".split(),
        *"--mixed_precision no --log_every 1".split()]            # what makes any preset small


def tensors(name):
    """A file of tests/fixtures as {name: tensor}."""
    return load_file(FIXTURES / f"{name}.safetensors")


def photo(rng, height=150, width=180):
    """Smooth random colors with a few sharp boxes: (height, width, 3) uint8."""
    pixels = np.array(Image.fromarray(rng.integers(0, 255, (6, 7, 3), np.uint8)).resize((width, height)))
    for y, x in rng.integers(0, (height - 40, width - 40), (5, 2)):
        pixels[y:y + 40, x:x + 30] = rng.integers(0, 255, 3)
    return pixels


TEXTURES = [photo(np.random.default_rng(i), 128, 128) for i in range(12)]


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """Folder with the four benchmarks, small, under the names of the README; and what NAVI's writer says is true."""
    root, splits = tmp_path_factory.mktemp("scenes"), {"train": 3, "val": 3}
    render.write_ade20k(root, TEXTURES, splits)
    render.write_cityscapes(root / "cityscapes", TEXTURES, splits)
    render.write_nyu_parquet(root / "nyuv2", TEXTURES, splits)
    return root, render.write_navi(root / "navi_v1.0", TEXTURES, {"train": 24, "val": 6})


@pytest.fixture
def benchmarks(scenes, tmp_path, monkeypatch):
    """The working folder, with links to the four benchmarks."""
    monkeypatch.chdir(tmp_path)
    for folder in scenes[0].iterdir():
        Path(folder.name).symlink_to(folder)
    return tmp_path


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
    """Calling it makes accelerate forget its settings, which are global in a process."""
    return lambda: AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def in_process(fresh_accelerate):
    """in_process(*args): brixel.main in this process, on one thread: two on a busy machine take longer."""
    import brixel
    torch.set_num_threads(1)

    def run(*args):
        fresh_accelerate()
        brixel.main([str(arg) for arg in args])
    return run


def on_two_processes(*command):
    """What a Python script printed on two CPU processes.  By torchrun: accelerate's launcher needs MPI for them."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *map(str, command)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout


def error_of(run, *args):
    """The one sentence that `run(*args)` exits with."""
    with pytest.raises(SystemExit) as exit:
        run(*args)
    return str(exit.value.code)


def log_of(path):
    """Records of the steps in the log of the run whose --out is `path`."""
    return [record for record in map(json.loads, open(path.with_suffix(".jsonl"))) if "loss" in record]


def weights_of(path):
    return torch.load(path, weights_only=True)["model"]

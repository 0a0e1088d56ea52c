"""What README.md prints must work: its Python, its commands, its file map."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import render
import torch
from conftest import FAST, ROOT, photo
from PIL import Image

import brixel
import probe

README = (ROOT / "README.md").read_text()
COMMANDS = [line.split("  #")[0].strip() for line in README.splitlines() if re.match(r"    (\S.*&& )?(accelerate|python) ", line)]
INLINE = [command for command in re.findall(r"`((?:python|accelerate launch) \S+\.py [^`]*)`", README)
          if not re.search(r"\.\.\.|TASK|--help", command)]
# What makes each of them small; the last of two equal flags counts.
PROBE = ["--size", "32", "--epochs", "1", "--num_workers", "0"]
SMALLER = {"brixel.py": [*FAST, "--save_every", "1", "--overwrite"], "pca": ["--size", "64"], "ade20k": PROBE, "cityscapes": PROBE,
           "nyu": [*PROBE, "--hidden", "8"], "navi": [*PROBE, "--hidden", "8"]}


def script_and_args(command):
    """("brixel.py", its arguments) of a command; a launcher, its flags and what comes before && are left out."""
    words = shlex.split(command.split("&& ")[-1])
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    return words[at], words[at + 1:]


def test_python_example_runs_and_its_shapes_are_true(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    brixel.Brixel(brixel.load_backbone("timm:test_vit", None)).save("out.pt")
    Image.new("RGB", (300, 200)).save("photo.jpg")
    names = {}
    exec(re.search(r"```python\n(.*?)```", README, re.DOTALL)[1], names)
    assert names["x"].shape == (1, 3, 256, 384)
    assert names["features"].shape == (1, 64, 4 * 256 // 16, 4 * 384 // 16) and names["tokens"].shape == (1, 64, 16, 24)
    assert torch.isfinite(names["features"]).all()


def test_commands_are_found():
    assert len(COMMANDS) >= 14


@pytest.mark.parametrize("command", COMMANDS + INLINE)
def test_every_flag_of_every_command_exists(command):
    script, args = script_and_args(command)
    if script == "brixel.py":
        brixel.load_config(args, "preset", lambda section: "max_steps" in section, "paper", "")
    elif script == "probe.py":
        brixel.load_config(args, "task", probe.is_task, None, "")
    else:
        done = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True, check=False, cwd="/")
        assert done.returncode == 0 and all(arg in done.stdout for arg in args if arg.startswith("--"))


def test_the_commands_run_one_after_the_other(photos, fresh_accelerate, in_process, tmp_path, monkeypatch, capsys):
    """Every command that stands on a line of its own, on small data, as one process of the launcher would run it."""
    monkeypatch.chdir(tmp_path)
    textures, splits = [np.array(Image.open(path)) for path in photos.iterdir()], {"train": 3, "val": 2}
    render.write_ade20k(tmp_path / "ADEChallengeData2016", textures, splits, height=40, width=60)
    render.write_cityscapes(tmp_path / "cityscapes", textures, splits, height=40, width=80)
    render.write_nyu_parquet(tmp_path / "nyuv2", textures, splits, height=40, width=60)
    render.write_navi(tmp_path / "navi_v1.0", textures, splits, height=40, width=60, objects=1)
    shutil.copytree(photos, "PHOTOS")
    Path("folder").mkdir()
    for name in ("photo.jpg", "folder/another.jpg"):
        Image.fromarray(photo(np.random.default_rng(0), 300, 400)).save(name)
    for command in COMMANDS:
        script, args = script_and_args(command)
        if script == "brixel.py":
            in_process(*args, *SMALLER[script], *(["--no-overwrite"] if "--resume" in args else []))
        else:
            fresh_accelerate()
            probe.main([*args, *SMALLER[args[args.index("--task") + 1]]])
    written = {path.name for path in tmp_path.iterdir()}
    assert {"out.pt", "out.png", "out.jsonl", "out.state", "photo.pca.png", "features.safetensors", "out.navi.json"} <= written


def test_every_alias_stands_in_the_table():
    table = README.partition("| `--backbone` |")[2].partition("\n\n")[0]
    for name in brixel.BACKBONES:
        family, _, size = name.partition("_")
        assert name in table or f"_{size}" in table and family in table, name


def test_file_map_is_true():
    for name in ("brixel.py", "probe.py", "data.py", "config.yaml"):
        said = int(re.search(rf"\| `{re.escape(name)}` \| (\d+) \|", README)[1])
        assert said == pytest.approx(len((ROOT / name).read_text().splitlines()), rel=0.03), name

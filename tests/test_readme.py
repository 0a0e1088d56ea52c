"""What README.md prints must work: its Python, its commands, its file map."""

import re
import shlex

import pytest
import torch
from conftest import ROOT
from PIL import Image

import brixel
import probe

README = (ROOT / "README.md").read_text()
COMMANDS = [line.split("  #")[0].strip() for line in README.splitlines() if re.match(r"    (\S.*&& )?(accelerate|python) ", line)]


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


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_of_every_command_exists(command):
    script, *args = shlex.split(command.split("&& ")[-1].replace("...", "")[re.search(r"\S+\.py", command.split("&& ")[-1]).start():])
    if script == "brixel.py":
        brixel.load_config(args, "preset", lambda section: "max_steps" in section, "paper", "")
    elif script == "probe.py":
        brixel.load_config(args, "task", probe.is_task, None, "")
    else:
        assert script == "data.py" and args[0] == "--bench"


def test_every_alias_stands_in_the_table():
    table = README.partition("| `--backbone` |")[2].partition("\n\n")[0]
    for name in brixel.BACKBONES:
        family, _, size = name.partition("_")
        assert name in table or f"_{size}" in table and family in table, name


def test_file_map_is_true():
    for name in ("brixel.py", "probe.py", "data.py", "config.yaml"):
        said = int(re.search(rf"\| `{re.escape(name)}` \| (\d+) \|", README)[1])
        assert said == pytest.approx(len((ROOT / name).read_text().splitlines()), rel=0.03), name

"""What README.md prints must work: its Python, its commands, the figures of the checkpoint."""
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from conftest import FAST, ROOT
from PIL import Image

import brixel
import data
import probe

README = (ROOT / "README.md").read_text("utf-8")
LINES = [line.split("  #")[0].strip() for line in README.splitlines()]
COMMANDS = [line for line in LINES if re.match(r"(\S.*&& )?(accelerate|python) ", line)]
# What makes each of them small; the last of two equal flags counts.
PROBE = ["--size", "32", "--epochs", "1", "--num_workers", "0"]
SMALLER = {"brixel.py": [*FAST, "--save_every", "1"], "pca": ["--size", "56"], "ade20k": PROBE, "cityscapes": PROBE,
           "nyu": [*PROBE, "--hidden", "8"], "navi": [*PROBE, "--hidden", "8"]}


def test_python_example_runs_and_its_shapes_are_true(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("assets").symlink_to(ROOT / "assets")
    exec(re.search(r"```python\n(.*?)```", README, re.DOTALL)[1], names := {})
    assert names["x"].shape == (2, 3, 224, 336) and torch.isfinite(names["features"]).all()
    assert names["features"].shape == (2, 384, 4 * 224 // 14, 4 * 336 // 14)
    assert names["tokens"].shape == (2, 384, 224 // 14, 336 // 14)


def test_the_commands_run_one_after_the_other(photos, benchmarks, fresh_accelerate, in_process):
    """Every command that stands on a line of its own, on small data, as one process of the launcher would run it."""
    Path("PHOTOS").symlink_to(photos)
    Path("assets").symlink_to(ROOT / "assets")
    assert {"accelerate launch brixel.py --backbone dinov3", "python probe.py --task navi --ckpt out.pt"} < {*COMMANDS}
    for command in COMMANDS:
        words = shlex.split(command.split("&& ")[-1])             # a launcher and its flags are left out
        at = next(i for i, word in enumerate(words) if word.endswith(".py"))
        args = words[at + 1:]
        if words[at] == "brixel.py":
            in_process(*args, *SMALLER["brixel.py"], *([] if "--resume" in args else ["--overwrite"]))
        else:
            fresh_accelerate()
            probe.main([*args, *SMALLER[args[args.index("--task") + 1]]])
    written = {path.name for path in benchmarks.iterdir()}
    assert {"out.pt", "out.png", "out.jsonl", "out.state", "mine.pt"} <= written
    assert "perched-osprey.pca.png" in written
    for task, metric, worst in (("ade20k", "miou", 1), ("cityscapes", "pixel_accuracy", 1), ("nyu", "rmse_aligned", 10),
                                ("navi", "angle_mean", 180)):
        rows = json.loads(Path(f"out.{task}.json").read_text())["rows"]
        assert [row["row"] for row in rows] == ["baseline", "BRIXEL"] + ["teacher"] * (task == "ade20k")
        assert all(0 <= row[metric] <= worst for row in rows) and min(Image.open(f"out.{task}.png").size) > 200


@torch.no_grad()
def test_shipped_checkpoint_has_the_figures_that_are_written(fresh_accelerate):
    """The lines of tests/README.md on photos that it was not trained on: central crops, 112 px against 448 px."""
    fresh_accelerate()
    path = ROOT / "assets/sample.safetensors"
    model = brixel.load(path)
    assert model.settings["backbone"] == "sample" and path.stat().st_size <= 6e6
    accelerator = Accelerator(mixed_precision="no", cpu=True)
    rows = re.findall(r"^\| `(\S+\.jpg)` \| (.*) \|$", (ROOT / "tests/README.md").read_text("utf-8"), re.MULTILINE)
    assert len(rows) == 3
    for name, figures in rows:
        crop = data.read_crop(ROOT / "assets/photos" / name, 448)
        small, layers, teacher = brixel.frozen_pass(crop[None], model.backbone, 4, accelerator)
        _, terms = brixel.brixel_loss(model.upsampler(small, layers), teacher, lambda_cosine=1)
        got = [terms["l1"].item(), terms["edge"].item(), terms["spectral"].item(), 1 - terms["cosine"].item()]
        written = [float(figure.split(" -> ")[1]) for figure in figures.split(" | ")]      # bilinear -> BRIXEL
        assert got == pytest.approx(written, rel=0.01), name

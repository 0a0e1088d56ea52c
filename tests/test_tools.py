"""The tools in tests/ run, tiny."""
import json

import ablate
import bench
import numpy as np
import pytest
import torch
import voc
from compare import main, paired
from conftest import error_of
from PIL import Image

import brixel

HUB = """import torch
def twice(): print("a hub may print"); return Bilinear()
class Bilinear(torch.nn.Module):
    def forward(self, image, features, output_size):
        assert image.shape[1:] == (3, 64, 64) and features.shape[1:] == (64, 4, 4) and output_size == (16, 16)
        return torch.nn.functional.interpolate(features, size=output_size, mode="bilinear")
"""


def test_paired_by_hand():
    ours, theirs = ([{"l1": x, "cosine": x} for x in values] for values in ((1, 2, 6), (2, 2, 2)))
    assert paired(ours, theirs, "l1") == "+1.000 ± 1.528 (1)"             # -1, 0, 4: deviation sqrt(7), by sqrt(3)
    assert [paired(theirs, ours, "cosine"), paired(ours[:1], theirs[:1], "l1")] == ["-1.000 ± 1.528 (1)", "-1.000 (1)"]


def test_a_bilinear_hub_equals_the_bilinear_row_and_a_checkpoint_does_not(photos, tmp_path, capsys):
    model = brixel.Brixel(brixel.load_backbone("timm:test_vit", "none"))
    with torch.no_grad():
        model.upsampler.head.out.bias += 0.5                      # without it a new model is the bilinear row
    model.save(tmp_path / "out.pt")
    (tmp_path / "hubconf.py").write_text(HUB)
    flags, brix = ["--photos", str(photos), "--ckpt", str(tmp_path / "out.pt")], f"BRIXEL {tmp_path / 'out.pt'}"
    main([*flags, "--size", "64", "--hub", hub := f"{tmp_path}:twice", "--repeats", "1"])
    lines = [[cell.strip() for cell in line[1:-1].split("|")] for line in capsys.readouterr().out.splitlines()]
    rows = {row: cells for row, *cells in lines[2:]}
    assert list(rows) == ["bilinear", "ViT at 80 px", "ViT at 96 px", "ViT at 128 px", brix, hub]
    assert rows[hub][:4] + rows[hub][6:] == rows["bilinear"][:4] + rows["bilinear"][6:]        # [4:6]: milliseconds
    bilinear, ours = (float(rows[row][0]) for row in ("bilinear", brix))
    assert abs(bilinear - ours) > 0.05 and rows[brix][6:] == [""] * 3 and len(set(rows["ViT at 80 px"][4:6])) == 1
    assert float(rows["bilinear"][6].split()[0]) == pytest.approx(bilinear - ours, abs=0.0011)
    assert "--hub OWNER/REPO:NAME" in error_of(main, [*flags, "--hub", f"{tmp_path}:no"])


SMALL = ["--backbone", "timm:test_vit", "--weights", "none", "--teacher_size", "128", "--batch_size", "2"]


def test_ablation_trains_each_variant_once(photos, tmp_path, capsys, fresh_accelerate):
    fresh_accelerate()
    flags = ["--data_dir", str(photos), "--val_dir", str(photos), "--val", "2", "--out", str(tmp_path / "a.jsonl"), *SMALL,
             *"--seeds 1 --min_side 0 --cache_crops 2 --max_steps 2".split()]
    ablate.main(flags)
    table = capsys.readouterr().out.splitlines()[-5:]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table]
    assert [row[:2] for row in rows[2:]] == [["bilinear", "1"], ["paper", "1"], ["best", "1"]] and rows[3] != rows[4]
    with pytest.MonkeyPatch.context() as patch:                   # the second time nothing is trained
        patch.setattr(ablate, "train", None)
        ablate.main(flags)
    assert capsys.readouterr().out.splitlines()[-5:] == table


def test_bench_times_the_parts_of_a_step(capsys, fresh_accelerate):
    fresh_accelerate()
    bench.main([*SMALL, "--mixed_precision", "no", "--repeats", "1"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(result["ms"]) == ["teacher", "student", "loss", "optimizer"] and min(result["ms"].values()) > 0
    assert result["step_ms"] == pytest.approx(sum(result["ms"].values())) and result["peak_bytes"] > 1e8


def test_voc_probe_converges_and_goes_on_where_it_stopped(tmp_path, capsys, monkeypatch):
    """Left and right half of a photo: two colors, two classes: separable, by any features that see color."""
    rng, ckpt = np.random.default_rng(0), str(tmp_path / "out.pt")
    for i in range(4):
        mask = np.full((40, 60), 7, np.uint8)
        mask[:, 30:], mask[:2] = 20, 255
        pixels = np.where(mask[..., None] == 20, (200, 60, 20), (20, 60, 200)) + rng.integers(-20, 20, (40, 60, 3))
        for folder, image, end in (("JPEGImages", pixels, "jpg"), ("SegmentationClass", mask, "png")):
            (tmp_path / folder).mkdir(exist_ok=True)
            Image.fromarray(image.astype(np.uint8)).save(tmp_path / folder / f"{i}.{end}")
    brixel.Brixel(brixel.load_backbone("timm:test_vit", "none")).save(ckpt)
    flags = ["--data_dir", str(tmp_path), "--ckpt", ckpt, "--size", "64", "--out", str(tmp_path / "voc.jsonl")]
    voc.main([*flags, "--splits", "1"])
    before = capsys.readouterr().out
    mious = [float(line.split("mIoU ")[1].split()[0]) for line in before.splitlines()]
    assert len(mious) == 2 and min(mious) > 90
    monkeypatch.setattr(voc, "miou_of_split", lambda maps, labels, split: mious[0] + 3 * split)
    voc.main([*flags, "--splits", "2"])
    assert f"{ckpt}, 64 px: mIoU {mious[0] + 1.5:.2f} ± 1.50, difference 0.00 ± 0.00" in capsys.readouterr().out

"""The tools in tests/ run, tiny."""
import itertools
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


SMALL = "--backbone timm:test_vit --weights none --teacher_size 128 --batch_size 2 --mixed_precision no".split()


def test_ablation_trains_each_variant_once(photos, tmp_path, capsys, fresh_accelerate, monkeypatch):
    flags = [*SMALL, "--data_dir", str(photos), "--val_dir", str(photos), "--out", str(tmp_path / "a.jsonl"),
             *"--val 2 --seeds 1 --min_side 0 --cache_crops 2 --max_steps 2".split()]
    ablate.main(flags)
    table = capsys.readouterr().out.splitlines()[-3:]
    assert [row.split(" | ")[0] for row in table] == ["| bilinear", "| paper", "| best"] and len({*table}) == 3
    monkeypatch.setattr(ablate, "train", None)
    ablate.main(flags)
    assert capsys.readouterr().out.splitlines()[-3:] == table


def test_bench_times_the_parts_of_a_step(capsys, fresh_accelerate):
    bench.main([*SMALL, "--repeats", "1"])
    assert min(json.loads(capsys.readouterr().out.splitlines()[-1])["ms"].values()) > 0


def test_voc_probe_tells_two_colors_apart_and_goes_on_where_it_stopped(tmp_path, capsys):
    mask, ckpt = np.full((40, 60), 7, np.uint8), str(tmp_path / "out.pt")
    mask[:, 30:], mask[:2] = 20, 255
    for i, (folder, end) in itertools.product(range(4), {"JPEGImages": "jpg", "SegmentationClass": "png"}.items()):
        (tmp_path / folder).mkdir(exist_ok=True)
        Image.fromarray(mask * 10 if end == "jpg" else mask).convert("RGB" if end == "jpg" else "L").save(
            tmp_path / folder / f"{i}.{end}")
    brixel.Brixel(brixel.load_backbone("timm:test_vit", "none")).save(ckpt)
    flags = ["--data_dir", str(tmp_path), "--ckpt", ckpt, "--size", "64", "--out", str(tmp_path / "voc.jsonl")]
    (tmp_path / "voc.jsonl").write_text(json.dumps([ckpt, 64, 0, 98.0]))
    voc.main([*flags, "--splits", "1"])
    brix, vit = (line.split("mIoU ")[1].split()[0] for line in capsys.readouterr().out.splitlines())
    assert brix == "98.00" and float(vit) > 80

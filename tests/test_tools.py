"""The tools in tests/ run, tiny."""
import ablate
import bench
import numpy as np
import voc
from compare import main
from conftest import error_of
from render import save

import brixel

HUB = """import torch
class twice(torch.nn.Module):
    def forward(self, image, features, output_size):
        return torch.nn.functional.interpolate(features, size=output_size, mode="bilinear")
"""
SMALL = "--backbone timm:test_vit --weights none --teacher_size 128 --batch_size 2 --mixed_precision no".split()


def test_a_bilinear_hub_equals_the_bilinear_row_and_a_checkpoint_does_not(photos, tmp_path, capsys):
    model = brixel.Brixel(brixel.load_backbone("timm:test_vit", "none"))
    model.upsampler.head.out.bias.data += 0.5                     # without it a new model is the bilinear row
    model.save(tmp_path / "out.pt")
    (tmp_path / "hubconf.py").write_text(HUB)
    flags, brix = ["--photos", str(photos), "--ckpt", str(tmp_path / "out.pt")], f"BRIXEL {tmp_path / 'out.pt'}"
    main([*flags, "--size", "64", "--hub", hub := f"{tmp_path}:twice", "--repeats", "1"])
    lines = [[cell.strip() for cell in line[1:-1].split("|")] for line in capsys.readouterr().out.splitlines()]
    rows = {row: cells for row, *cells in lines[2:]}
    assert list(rows) == ["bilinear", "ViT at 80 px", "ViT at 96 px", "ViT at 128 px", brix, hub]
    assert rows[hub][:4] + rows[hub][6:] == rows["bilinear"][:4] + rows["bilinear"][6:]        # [4:6]: milliseconds
    assert rows[brix][0] != rows["bilinear"][0] and rows[brix][6:] == [""] * 3
    assert len({*rows["ViT at 80 px"][4:6]}) == 1
    assert "--hub OWNER/REPO:NAME" in error_of(main, [*flags, "--hub", f"{tmp_path}:no"])


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
    assert "images/s" in capsys.readouterr().out


def test_voc_probe_tells_two_colors_apart(tmp_path, capsys):
    mask, ckpt = np.full((40, 60), 7, np.uint8), str(tmp_path / "out.pt")
    mask[:, 30:], mask[:2] = 20, 255
    for i in range(4):
        save(np.stack([mask * 10] * 3, -1), tmp_path / "JPEGImages" / f"{i}.jpg")
        save(mask, tmp_path / "SegmentationClass" / f"{i}.png")
    brixel.Brixel(brixel.load_backbone("timm:test_vit", "none")).save(ckpt)
    voc.main(["--data_dir", str(tmp_path), "--ckpt", ckpt, "--size", "64", "--splits", "2"])
    brix, vit = (line.split("mIoU ")[1] for line in capsys.readouterr().out.splitlines())
    assert brix.endswith("difference +0.00 ± 0.00") and min(float(row.split(",")[0]) for row in (brix, vit)) > 80

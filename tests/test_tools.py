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
    assert list(rows) == ["bilinear", "ViT at 96 px", brix, hub]
    assert rows[hub][:4] + rows[hub][6:] == rows["bilinear"][:4] + rows["bilinear"][6:]        # [4:6]: milliseconds
    assert rows[brix][0] != rows["bilinear"][0] and rows[brix][6:] == [""] * 3
    assert len({*rows["ViT at 96 px"][4:6]}) == 1
    assert "--hub OWNER/REPO:NAME" in error_of(main, [*flags, "--hub", f"{tmp_path}:no"])


def test_ablation_trains_each_variant_once(photos, tmp_path, capsys, fresh_accelerate, monkeypatch):
    flags = [*SMALL, "--data_dir", str(photos), "--val_dir", str(photos), "--out", str(tmp_path / "a.jsonl"),
             *"--val 2 --seeds 1 --min_side 0 --cache_crops 2 --max_steps 2".split()]
    flags += ["--variants", "paper", "best", *ablate.REPLACED]
    ablate.main(flags)
    table = capsys.readouterr().out.splitlines()[-5:]
    assert [row.split(" | ")[0] for row in table] == [f"| {name}" for name in ("bilinear", *flags[-4:])]
    assert len({row.partition(" | ")[2] for row in table}) == 5
    monkeypatch.setattr(ablate, "train", None)
    ablate.main(flags)
    assert capsys.readouterr().out.splitlines()[-5:] == table


def test_bench_times_the_parts_of_a_step(capsys, fresh_accelerate):
    bench.main([*SMALL, "--repeats", "1"])
    assert "images/s" in capsys.readouterr().out


def test_voc_probe_tells_two_colors_apart(tmp_path, capsys, monkeypatch):
    mask, ckpt = np.full((40, 60), 7, np.uint8), str(tmp_path / "out.pt")
    mask[:, 30:], mask[:2] = 20, 255
    for i in range(5):
        save(np.stack([mask * 10] * 3, -1), tmp_path / "JPEGImages" / f"{i}.jpg")
        save(mask, tmp_path / "SegmentationClass" / f"{i}.png")
    brixel.Brixel(brixel.load_backbone("timm:test_vit", "none")).save(ckpt)
    flags = ["--data_dir", str(tmp_path), "--images", "[0-3]", "--ckpt", ckpt, "--out", str(tmp_path / "voc.jsonl"),
             *"--size 64 --vit_size 64 96 --splits 2 --repeats 1 --plot".split(), str(tmp_path / "voc.png")]
    for _ in range(2):
        voc.main(flags)
        header, _, *rows = ([cell.strip() for cell in row.split("|")] for row in capsys.readouterr().out.splitlines())
        assert header[1] == "4 images" and [row[1:3] for row in rows] == [["ViT", "64"], ["ViT", "96"], [ckpt, "64"]]
        assert all(float(row[3]) > 80 for row in rows) and rows[0][4:7] == [""] * 3
        assert all(" ± " in cell for cell in rows[2][4:6]) and rows[2][6] == ""
        monkeypatch.setattr(voc, "miou_of_split", None)           # the results are kept
    assert (tmp_path / "voc.png").stat().st_size > 10_000

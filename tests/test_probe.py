"""Readouts, losses and metrics against the released code's numbers and by hand; every task through the command line."""
import json
import re
import shutil
import subprocess
import sys
import tarfile
from argparse import Namespace
from base64 import b64decode

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from conftest import FIXTURES, ROOT, TINY, error_of, on_two_processes, photo, tensors
from PIL import Image
from safetensors.torch import load_file

import brixel
import probe
from data import DataError

RELEASED = tensors("probes")
VALUES = json.loads((FIXTURES / "probes_values.json").read_text())


def updated(readout, pred, **batch):
    readout.update(pred, batch)
    return readout.compute()


def test_heads_agree_with_the_released_ones():
    """conv_0 is the shallowest of the released levels."""
    names = {rf"conv_{3 - i}\.": f"project.{i}." for i in range(4)}
    names |= {rf"ref_{3 - i}\.resConfUnit2\.conv\.": f"after.{i}." for i in range(4)}
    names |= {rf"ref_{2 - i}\.resConfUnit1\.conv\.": f"before.{i}." for i in range(3)} | {r"out_conv\.": "out."}
    for name, readout in (("depth", probe.Depth(hidden=32)), ("normal", probe.Normals(hidden=32))):
        head, state = readout.head(16), {}
        for key, value in RELEASED.items():
            if key.startswith(f"{name}_head.head."):
                key = key.removeprefix(f"{name}_head.head.")
                old = next(old for old in names if re.match(old, key))
                state[re.sub(old, names[old], key)] = value
        head.load_state_dict(state)
        torch.testing.assert_close(head(RELEASED["feats"]), RELEASED[f"{name}_head_out"], atol=5e-5, rtol=0)
        if name == "depth":
            up = probe.Probe({"depth": head})({"features": RELEASED["feats"], "depth": torch.zeros(2, 1, 32, 48)})
            torch.testing.assert_close(up["depth"], RELEASED["depth_head_out_up_32x48"], atol=5e-5, rtol=0)


def test_losses_and_metrics_agree_with_the_released_ones_and_mean_iou_with_both_readings():
    pred, batch = RELEASED["depth_pred"], {"depth": RELEASED["depth_gt"], "valid": RELEASED["depth_valid"] > 0}
    total, count = probe.Depth().loss(pred, batch)
    assert (total / count).item() == pytest.approx(VALUES["official.silog_loss beta=0.15"], abs=5e-5)
    got = updated(probe.Depth(), pred, **batch)
    names = {"AbsRel": "abs_rel", "RMSE": "rmse", "log10": "log10", "δ1": "delta1", "δ2": "delta2", "δ3": "delta3"}
    for key, suffix in (("official.compute_metrics", ""),
                        ("numpy64.correct per-image scale_shift LSQ over valid only", "_aligned")):
        want = {names[name] + suffix: value for name, value in VALUES[key].items()}
        assert want == pytest.approx({name: got[name] for name in want}, abs=5e-5)
    maps = {"depth": torch.full((1, 1, 2, 2), 40.0), "valid": torch.ones(1, 1, 2, 2) > 0}
    for unit, rmse in (("encoded", 5 - 0.05), ("metric", 10 - 0.001)):                   # within the unit's limits
        depth, _ = probe.new_readouts(Namespace(task="navi", hidden=8, silog_beta=0.15, depth=unit))
        assert updated(depth, torch.zeros(1, 1, 2, 2), **maps)["rmse"] == pytest.approx(rmse)
    pred, want = RELEASED["normal_pred"], VALUES["official.normal_metrics"]
    batch = {"normal": RELEASED["normal_gt (NaN where invalid)"], "normal_valid": RELEASED["normal_valid"] > 0}
    total, count = probe.Normals().loss(pred, batch)
    assert (total / count).item() == pytest.approx(VALUES["official.cosine_normal_loss"], abs=5e-5)
    got = updated(probe.Normals(), pred, **batch)
    assert got.pop("angle_median") == pytest.approx(want["ang_med"], abs=probe.Normals.bin / 2)
    assert got == pytest.approx({"angle_mean": want["ang_mean"], "share_11.25": want["t_11.25"],
                                 "share_22.5": want["t_22.5"], "share_30": want["t_30"]}, abs=5e-5)
    label, pred = RELEASED["seg.label (255 ignore, classes 4,5 absent)"], RELEASED["seg.pred"]
    got = updated(probe.Classes(6), F.one_hot(pred, 6).permute(2, 0, 1)[None].float(), label=label[None].byte())
    assert got == pytest.approx({"miou": VALUES["numpy.mIoU present classes only"],
                                 "miou_absent_zero": VALUES["official.mIoU 6 classes (absent classes count as 0)"],
                                 "pixel_accuracy": VALUES["official.pixAcc"]}, abs=1e-9)


class Tiny(torch.nn.Conv2d):
    """A backbone of one layer; counts the images it has seen."""
    name, patch_size, mean, std, seen = "tiny", 8, (0.5,) * 3, (0.5,) * 3, 0

    def forward(self, x):
        self.seen += len(x)
        return super().forward(x)


class Items(list):
    """Seven images with labels."""
    split = "train"

    def __init__(self, label=None):
        images = torch.randint(255, (7, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        super().__init__({"image": x, "label": x[0] // 128 if label is None else x[0] * 0 + label} for x in images)


CFG = Namespace(batch_size=3, num_workers=0, lr=0.1, weight_decay=0.0, epochs=3, mixed_precision="no", seed=[1])


def items(host=1e9, device=0, jitter=(0,), images=None, cfg=CFG, width=4):
    torch.manual_seed(0)
    return probe.Features(images or Items(), Tiny(3, width, 8, 8), Accelerator(cpu=True), cfg, host, device, jitter)


def fitted(features):
    return probe.fit([probe.Classes(2)], features, features.model.out_channels, features.cfg, features.acc, 1)


@pytest.mark.parametrize("workers", [0, 1])
def test_where_features_are_kept_changes_nothing_but_how_often_they_are_computed(workers, capsys):
    """Of an item the label takes 256 bytes, the image 768, 2 x 2 features of 512 channels, float16, 4096."""
    results, cfg = [], Namespace(**{**vars(CFG), "num_workers": workers, "lr": 0.01})
    for host, device, kept, times in ((0, 7 * 4352, "device: features", 1),
                                      (7 * 4352, 7 * 4352 - 1, "host: features", 1),
                                      (7 * 4352 - 1, 0, "host: images", 3), (7 * 1024 - 1, 0, "host: nothing", 3)):
        features = items(host, device, cfg=cfg, width=512)
        trained, readouts = fitted(features), [probe.Classes(2)]
        assert features.model.seen == 4 * 3 + times * 7            # the first batch is timed
        results.append(probe.score(trained, readouts, features, features.acc) | trained.state_dict())
        printed = capsys.readouterr().out
        assert f"kept on the {kept} (0 MB); features are computed {('once', '3 times')[times > 1]}, " in printed
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], atol=1e-6, rtol=1e-5)


def test_an_image_without_a_valid_pixel_counts_nowhere_and_none_with_one_is_a_sentence():
    pred, maps = torch.rand(2, 2, 3, 4, 4) + 0.1
    valid, label = torch.ones(2, 1, 4, 4) > 0, torch.randint(3, (2, 4, 4), dtype=torch.uint8)
    valid[1], label[1] = False, 255
    batch = {"depth": maps[:, :1], "valid": valid, "normal": maps, "normal_valid": valid, "label": label}
    first = {key: value[:1] for key, value in batch.items()}
    for readout, channels in ((probe.Depth, 1), (probe.Normals, 3), (lambda: probe.Classes(3), 3)):
        x = pred[:, :channels]
        assert updated(readout(), x, **batch) == pytest.approx(updated(readout(), x[:1], **first))
        torch.testing.assert_close(readout().loss(x, batch), readout().loss(x[:1], first))
    empty, features = items(images=Items(label=255)), items()
    with pytest.raises(DataError, match="no pixel of 7 train images"):
        fitted(empty)
    with pytest.raises(DataError, match="no pixel of 7 val images has a valid label"):
        probe.score(fitted(features), [probe.Classes(2)], empty, features.acc)


@pytest.mark.parametrize("host", [1e9, 0])
def test_color_jitter_changes_features_with_the_epoch_and_mixed_precision_rounds_them(host):
    features, plain = items(host, jitter=(0.2, 0.2, 0.2, 0.05)), items()
    order = torch.tensor([2, 5])
    first, again, later = (next(features.batches(order, epoch))["features"] for epoch in (0, 0, 1))
    other = next(features.batches(torch.tensor([5, 2]), 0))["features"].flip(0)
    assert torch.equal(first, again) and torch.equal(first, other) and not torch.equal(first, later)
    assert not torch.equal(first, next(plain.batches(order))["features"])
    rounded = items(cfg=Namespace(**{**vars(CFG), "mixed_precision": "bf16"})).kept["features"]
    assert rounded.dtype == torch.float16 and not torch.equal(rounded, plain.kept["features"])


SMALL = ["--size", "56", "--epochs", "2", "--batch_size", "4", "--num_workers", "0"]


@pytest.fixture
def run(benchmarks, capsys, fresh_accelerate):
    """Runs probe.main beside the benchmarks.  -> (what it printed, the JSON object in the last line)."""
    brixel.Brixel(brixel.load_backbone("timm:test_vit", None)).save("out.pt")

    def run(task, *flags):
        fresh_accelerate()
        probe.main(["--task", task, *SMALL, *flags])
        printed, warnings = capsys.readouterr()
        return printed + warnings, json.loads(printed.splitlines()[-1])
    return run


def test_deviations_are_named_results_replaced_on_request_only_and_a_terminal_shows_no_json(
        benchmarks, run, monkeypatch, capsys):
    """The readout stays in float32."""
    forward, seen = probe.Probe.forward, set()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setattr(probe.Probe, "forward", lambda *a: seen.add(torch.is_autocast_enabled("cpu")) or forward(*a))
    flags = ["--task", "cityscapes", *SMALL, *"--ckpt out.pt --limit 2 --mixed_precision bf16 --out x".split()]
    (benchmarks / "x.cityscapes.size.png").touch()                                      # of an earlier call
    assert "x.cityscapes.size.png: there are" in error_of(probe.main, [*flags, "--backbone", "no:such"])
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    probe.main([*flags, "--teacher", "--overwrite"])
    printed, result = capsys.readouterr().out, json.loads((benchmarks / "x.cityscapes.json").read_text())
    assert printed.endswith("wrote x.cityscapes.json, x.cityscapes.png\n") and "{" not in printed
    assert seen == {False} and result["deviations"] == [
        "--size 56", "--epochs 2", "--batch_size 4", "--limit 2", "--mixed_precision bf16",
        "2 train images instead of 2975", "2 val images instead of 500",
        "images are rounded to multiples of the patch size 16, labels are not",
        "photos are enlarged (the first has 128 x 64 pixels)"]


def test_finished_rows_are_in_the_files_whatever_ends_the_next_and_without_matplotlib(benchmarks, run, monkeypatch):
    fits = [probe.fit, probe.fit]                                                       # the third one is too many
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(probe, "fit", lambda *args: fits.pop()(*args) if fits else 1 / 0)
        run("ade20k", "--ckpt", "out.pt", "--teacher", "--out", "ended")
    rows = json.loads((benchmarks / "ended.ade20k.json").read_text())["rows"]
    assert [row["row"] for row in rows] == ["baseline", "BRIXEL"] and (benchmarks / "ended.ade20k.png").exists()
    monkeypatch.setitem(sys.modules, "matplotlib", None)           # importing it fails
    printed, out = run("ade20k", "--ckpt", "out.pt", "--out", "dull")
    assert "warning: picture dull.ade20k.png: " in printed and out["matmul"] == "float32"
    assert json.loads((benchmarks / "dull.ade20k.json").read_text()) == out and len(out["rows"]) == 2


def test_several_sizes_and_seeds_give_means_deviations_costs_and_a_plot(benchmarks, run, monkeypatch):
    score, scores = probe.score, []
    (benchmarks / "sizes").symlink_to(".")
    monkeypatch.setattr(probe, "score", lambda *args: scores.append(score(*args)) or scores[-1])
    small, large = run("cityscapes", *TINY, *"--out sizes --size 48 96 --seed 1 2".split())[1]["rows"]
    assert (small["row"], small["size"], large["size"]) == ("baseline", 48, 96)
    assert 3.9 < large["gflops"] / small["gflops"] < 5 and small["ms"] > 0                # 4x the tokens
    a, b = (metrics["pixel_accuracy"] for metrics in scores[:2])
    assert a != b and small["pixel_accuracy"] == pytest.approx((a + b) / 2)
    assert small["pixel_accuracy_std"] == pytest.approx(abs(a - b) / 2**0.5)
    assert Image.open(benchmarks / "out.cityscapes.size.png").width > 2000


def test_paper_rows_stand_below_for_a_backbone_of_the_paper_and_in_its_unit():
    record = {"row": "BRIXEL", "size": 256, "miou": 0.5, "miou_std": 0.008, "pixel_accuracy": 0.25,
              "miou_absent_zero": 0.125}
    result = {"task": "ade20k", "rows": [record], "backbone": "dinov3_vitb16", "settings": {}}
    assert probe.table_cells(result)[1:] == [
        ["BRIXEL", "256", "50.0 ± 0.8", "25.0", "12.5"], ["paper, baseline", "", "46.7", "80.5", ""],
        ["paper, BRIXEL", "", "49.2", "82.0", ""]]
    navi = {"task": "navi", "rows": [], "backbone": "dinov3_vitb16", "settings": {"depth": "metric"}}
    assert probe.table_cells(navi)[1][2:4] == ["", "41.3"]


def test_two_processes_equal_one(run):
    """3 images: the shares are uneven.  0.2 MB hold no image to train on, and of the baseline what it is scored on."""
    flags = "--hidden 16 --limit 3 --ckpt out.pt --lr 0.01 --cache_gb 2e-4".split()
    printed, one = run("navi", *flags)
    assert re.findall("kept on the host: (.*?) ", printed) == ["nothing", "features", "nothing", "nothing"]
    printed = on_two_processes(ROOT / "probe.py", "--task", "navi", *SMALL, *flags, "--out", "two")
    two = json.loads(printed.splitlines()[-1])
    assert (one["processes"], two["processes"]) == (1, 2)
    for a, b in zip(one["rows"], two["rows"], strict=True):
        assert a.pop("row") == b.pop("row") and a == pytest.approx(b, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize(("folder", "limit", "used", "cache"), [
    ("", "max", "current", "inactive_file"), ("memory", "limit_in_bytes", "usage_in_bytes", "total_inactive_file")])
def test_half_of_what_a_container_leaves_is_room(tmp_path, monkeypatch, folder, limit, used, cache):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    (tmp_path / folder).mkdir(exist_ok=True)
    for name, text in ((limit, "5000"), (used, "3000"), ("stat", f"anon 9\n{cache} 1000\n")):
        (tmp_path / folder / f"memory.{name}").write_text(text)
    rooms = [probe.memory_room(Namespace(cache_gb=gb), Accelerator(cpu=True), tmp_path) for gb in (0, 1e-6)]
    assert rooms == [[1500, 0], [1000, 0]]


@pytest.mark.parametrize(("flags", "named"), [
    (["--task", "navi", "--data_dir", "nowhere", "--backbone", "no:such"], "--data_dir"),
    (["--task", "ade20k", "--size", "64", "0"], "--size"),
    (["--task", "ade20k", "--color_jitter", "0", "0", "0", "0.6"], "--color_jitter"),
    (["--task", "ade20k", "--out", "no/"], "--out no/out.ade20k"),
    (["--size", "64"], "choose a --task: ade20k (semantic segmentation, 150 classes), "),
    (["--task", "pca", "--image", "a.jpg"], "--ckpt"),
    (["--task", "ade20k", *SMALL, "--classes", "1"], "allowed are 0 to 1"),
    (["--task", "ade20k", *SMALL, "--limit", "1"], "--limit")])
def test_mistakes_are_one_sentence(flags, named, benchmarks, fresh_accelerate, monkeypatch):
    fresh_accelerate()
    if named == "--limit":                                         # fewer images than processes
        monkeypatch.setattr(Accelerator, "num_processes", 2)
    error = error_of(probe.main, [*TINY, *flags])
    assert error.startswith("probe.py: error: ") and named in error


def test_pca_writes_pictures_and_features_of_each_photo_of_any_name_and_counts_what_fails(photos, tmp_path, capsys):
    for name in ("tall.png", "Tall.jpg", "1_2.jpg"):
        Image.new("RGB", (90, 200), "red").save(photos / name)
    with tarfile.open(tmp_path / "a.b.TAR", "w") as tar:
        for name in ("1.jpg", "2.jpg"):
            tar.add(photos / name, name)
    (tmp_path / "damaged.tar").write_bytes(b"no tar" * 200)
    (photos / "0.jpg").write_bytes(b"")
    model = brixel.Brixel(brixel.load_backbone("timm:test_vit", None)).eval()
    model.save(tmp_path / "out.safetensors")
    flags = ["--task", "pca", "--ckpt", tmp_path / "out.safetensors", "--size", 64, "--out", tmp_path, "--teacher",
             "--image", tmp_path / "*.[tT][aA][rR]", *(photos / f"{i}.jpg" for i in ("1_2", 0, 1, 1)),
             photos / "tall.png", photos / "Tall.jpg", "--save_features", tmp_path / "features.safetensors"]
    assert "not be --ckpt" in error_of(probe.main, [*map(str, flags[:-1]), str(tmp_path / "out.safetensors")])
    message = error_of(probe.main, [*map(str, flags)])
    assert message.startswith("probe.py: error: 1 of 8 photos")
    printed = capsys.readouterr().out
    assert "damaged.tar" in printed and f"{photos / '0.jpg'} failed: " in printed
    names = [re.sub(r"_\d{3,}", "_BYTE", path.name.removesuffix(".pca.png")) for path in tmp_path.glob("*.pca.png")]
    assert sorted(names) == sorted(["a.b_BYTE", "a.b_BYTE", "1_2", "1", "1_3", "tall", "Tall_2"])
    assert Image.open(tmp_path / "tall.pca.png").width > 500
    features = load_file(tmp_path / "features.safetensors")
    assert features[str(photos / "tall.png")].shape == (64, 36, 16)
    x = model.preprocess(Image.open(photos / "1.jpg"), 64)
    torch.testing.assert_close(features[str(photos / "1.jpg")], model(x)[0])


def test_page_holds_the_photo_and_what_gives_the_colors_and_similarities(tmp_path):
    """As the script of the page reads them."""
    image = Image.fromarray(photo(np.random.default_rng(0)))
    maps = {"ViT": torch.randn(1, 80, 6, 9), "BRIXEL": torch.randn(1, 80, 12, 12) + 1}
    probe.write_page(tmp_path / "a <b>.html", image, maps)
    page = json.loads(re.search(r'id="data">(.*?)</script>', (tmp_path / "a <b>.html").read_text("utf-8"))[1])
    assert page["title"] == "a <b>" and 0 < page["difference"] < 0.1
    for shown, (name, features), colors in zip(page["maps"], maps.items(), brixel.pca_rgb(*maps.values()), strict=True):
        tokens = torch.frombuffer(bytearray(b64decode(shown["features"])), dtype=torch.int8).view(-1, shown["dims"])
        tokens, exact = (F.normalize(x.float(), dim=1) for x in (tokens, features[0].flatten(1).T))
        assert (tokens @ tokens.T - exact @ exact.T).abs().mean() < 1.5 * page["difference"]
        assert (shown["name"], shown["h"], shown["w"]) == (name, *features.shape[2:])
        assert b64decode(shown["colors"]) == colors.tobytes()


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
def test_page_renders_in_a_browser_and_starts_on_what_is_least_like_the_rest(tmp_path):
    path, odd = tmp_path / "a.html", torch.ones(1, 8, 4, 6)
    odd[..., 1, 4] = -1
    probe.write_page(path, Image.new("RGB", (60, 40)), {"ViT": odd, "BRIXEL": odd})
    command = ["chromium", "--headless=new", "--no-sandbox", "--dump-dom", f"file://{path}"]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=100).stdout
    assert [float(x) for x in re.findall(r"--point-[xy]: ([\d.]+)", dom)][:2] == pytest.approx([4.5 / 6, 1.5 / 4])
    assert re.findall(r"<output[^>]*>([^<]+)", dom) == ["1.00", "1.00"] and not re.search(r"(src|href)=\"http", dom)


def test_cost_counts_every_multiplication_and_times_what_training_compiles(capsys, monkeypatch):
    """By hand: 2 FLOPs for each weight and output position of a convolution or linear layer, 4 N^2 D for attention."""
    real, compiled, counted = torch.compile, [], []
    monkeypatch.setattr(torch, "compile", lambda *a, **k: compiled.append(a) or real(*a, **k | {"backend": "eager"}))
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **k: compiled.append(self))
    probe.main("--task cost --backbone timm:test_vit --repeats 1 --size 64 --batch_size 2 --compile".split())
    printed, progress = capsys.readouterr()
    rows = json.loads(printed.splitlines()[-1])["rows"]
    assert [(row["row"], row["size"]) for row in rows] == [
        ("baseline", 64), ("BRIXEL", 64), ("teacher", 256), ("BRIXEL, compiled", 64), ("teacher, compiled", 256)]
    model = brixel.Brixel(brixel.load_backbone("timm:test_vit", None)).eval()
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
            layer.register_forward_hook(lambda layer, _, output: counted.append(
                2 * output.numel() // len(layer.weight) * layer.weight.numel()))
    model(torch.zeros(2, 3, 64, 64))
    vit = model.backbone.model
    attention = 2 * len(vit.blocks) * 4 * (16 + vit.num_prefix_tokens)**2 * vit.embed_dim
    assert rows[1]["gflops"] == rows[3]["gflops"] == pytest.approx((sum(counted) + attention) / 1e9, rel=1e-9)
    assert all(row["batch"] == 2 and row["ms"] > 0 for row in rows) and len(compiled) == 2 and "measuring" in progress

"""What only a CUDA device can show: `pytest -m gpu`.  Random or shipped weights; nothing is downloaded."""
import json
import signal
from argparse import Namespace

import pytest
import torch
from accelerate import Accelerator
from conftest import FAST, ROOT, error_of, weights_of

import brixel
import probe

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
FULL = ["--mixed_precision", "no"]


def losses(out):
    """The loss of every step in the log of the run whose --out is `out`."""
    return [r["loss"] for r in map(json.loads, open(out.with_suffix(".jsonl"))) if "loss" in r]


def parameters(out):
    """All weights of a checkpoint, without BatchNorm's statistics, as one vector."""
    weights = weights_of(out).items()
    return torch.cat([x.flatten() for key, x in weights if not key.endswith(("_mean", "_var", "_tracked"))])


def relative(x, wanted):
    return ((x.cpu() - wanted).norm() / wanted.norm()).item()


def test_losses_in_bf16_are_those_in_fp32(in_process, photos, tmp_path):
    common = [*FAST, "--data_dir", photos, "--drop_path", 0]      # the same weights and photos
    for precision in ("bf16", "no"):
        in_process(*common, "--out", tmp_path / f"{precision}.pt", "--mixed_precision", precision)
    assert losses(tmp_path / "bf16.pt") == pytest.approx(losses(tmp_path / "no.pt"), rel=0.02)


@torch.no_grad()
def test_shipped_checkpoint_gives_the_same_on_cuda_and_cpu():
    stand_in = brixel.load_backbone("dinov2_vits14", None)        # as wide as `sample`, which comes from the network
    model = brixel.load(ROOT / "assets/sample.safetensors", stand_in)
    x = torch.randn(2, 3, 112, 154, generator=torch.Generator().manual_seed(0))
    layers, wanted = stand_in.layers(x), model(x)
    model.to("cuda")
    upsampled = model.upsampler(x.to("cuda"), [layer.to("cuda") for layer in layers])
    assert relative(upsampled, wanted) < 5e-3 and relative(model(x.to("cuda")), wanted) < 5e-3       # TF32: 1e-3


def test_compiled_run_trains_and_its_checkpoint_loads(in_process, photos, tmp_path):
    plain, out = tmp_path / "plain.pt", tmp_path / "out.pt"
    common = [*FAST, *FULL, "--data_dir", photos, "--drop_path", 0]
    in_process(*common, "--out", plain)
    in_process(*common, "--out", out, "--compile")
    assert losses(out) == pytest.approx(losses(plain), rel=0.01)
    assert brixel.load(out)(torch.zeros(1, 3, 32, 48)).shape == (1, 64, 8, 12)


class Pictures(list):
    """A split as probe.Features takes it: random images with their depth."""
    split = "train"

    def __init__(self, count):
        super().__init__({"image": torch.randint(256, (3, 64, 64), dtype=torch.uint8),
                          "depth": torch.rand(1, 64, 64) + 1, "valid": torch.ones(1, 64, 64) > 0} for _ in range(count))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_probe_keeps_features_in_float16_and_trains_its_readout_in_float32(fresh_accelerate, precision):
    fresh_accelerate()
    acc = Accelerator(mixed_precision="no")
    cfg = Namespace(batch_size=2, num_workers=0, mixed_precision=precision, epochs=1, lr=1e-3, weight_decay=0.0,
                    seed=[0])
    backbone = brixel.load_backbone("timm:test_vit", None).to("cuda")
    features = probe.Features(Pictures(4), backbone, acc, cfg, room={"device": 1e9, "host": 0})
    kept = features.kept["features"]
    assert (kept.dtype, kept.device.type, kept.shape) == (torch.float16, "cuda", (4, 64, 4, 4))
    head = probe.fit([probe.Depth(hidden=8)], features, 64, cfg, acc, seed=0)
    assert {p.dtype for p in head.parameters()} == {head(next(features.batches(torch.arange(4))))["depth"].dtype}
    assert next(head.parameters()).dtype == torch.float32


def test_stopped_run_resumes_closely(in_process, photos, tmp_path, monkeypatch):
    """Close, not bit for bit: the gradient of grid_sample has no deterministic kernel on CUDA."""
    common, whole, parts = [*FAST, *FULL, "--data_dir", photos, "--max_steps", 7], tmp_path / "a.pt", tmp_path / "b.pt"
    in_process(*common, "--out", whole)
    real = brixel.optimizer_step
    with monkeypatch.context() as patch:           # a signal in the first step
        patch.setattr(brixel, "optimizer_step", lambda *args: signal.raise_signal(signal.SIGTERM) or real(*args))
        assert "after step 1" in error_of(in_process, *common, "--out", parts)
    first = parameters(parts)
    in_process(*common, "--out", parts, "--resume")
    assert len(losses(parts)) == 7
    # without Adam's moments, or with other stochastic depth, it is 0.6; noise of 1e-6 in the gradients makes 0.002
    assert (parameters(parts) - parameters(whole)).norm() < 0.1 * (parameters(whole) - first).norm()


def test_paper_run_of_vit_b_fits_into_40_gb(in_process, photos, tmp_path):
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    in_process("--backbone", "dinov3_vitb16", "--weights", "none", "--data_dir", photos, "--out", tmp_path / "out.pt",
               "--min_side", 100, "--max_steps", 2, "--num_workers", 4)      # batch 16, 1024 px; photos are enlarged
    assert torch.cuda.max_memory_allocated() < 40e9

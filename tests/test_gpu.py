"""What only a CUDA device can show: `pytest -m gpu`.  Random or shipped weights; nothing is downloaded."""
import signal

import pytest
import torch
from conftest import FAST, ROOT, error_of, log_of, weights_of

import brixel

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
FULL = ["--mixed_precision", "no"]


def parameters(out):
    """All weights of a checkpoint, without BatchNorm's statistics, as one vector."""
    weights = weights_of(out).items()
    return torch.cat([x.flatten() for key, x in weights if not key.endswith(("_mean", "_var", "_tracked"))])


def test_losses_in_bf16_and_of_a_compiled_run_are_those_in_fp32(in_process, photos, tmp_path):
    common = [*FAST, "--data_dir", photos, "--drop_path", 0]      # the same weights and photos
    for name, flags, tolerance in (("no", FULL, 0), ("bf16", [], 0.02), ("compiled", [*FULL, "--compile"], 0.01)):
        in_process(*common, "--mixed_precision", "bf16", *flags, "--out", tmp_path / f"{name}.pt")
        loss, exact = ([r["loss"] for r in log_of(tmp_path / f"{run}.pt")] for run in (name, "no"))
        assert loss == pytest.approx(exact, rel=tolerance)
    assert brixel.load(tmp_path / "compiled.pt")(torch.zeros(1, 3, 32, 48)).shape == (1, 64, 8, 12)


@torch.no_grad()
def test_shipped_checkpoint_gives_the_same_on_cuda_and_cpu():
    stand_in = brixel.load_backbone("dinov2_vits14", None)        # as wide as `sample`, which comes from the network
    model = brixel.load(ROOT / "assets/sample.safetensors", stand_in)
    x = torch.randn(2, 3, 112, 154, generator=torch.Generator().manual_seed(0))
    layers, wanted = stand_in.layers(x), model(x)
    model.to("cuda")
    upsampled = model.upsampler(x.to("cuda"), [layer.to("cuda") for layer in layers])
    for got in (upsampled, model(x.to("cuda"))):
        assert (got.cpu() - wanted).norm() < 5e-3 * wanted.norm()  # TF32: 1e-3


def test_stopped_run_resumes_closely(in_process, photos, tmp_path, monkeypatch):
    """Close, not bit for bit: the gradient of grid_sample has no deterministic kernel on CUDA."""
    common, whole, parts = [*FAST, *FULL, "--data_dir", photos, "--max_steps", 7], tmp_path / "a.pt", tmp_path / "b.pt"
    in_process(*common, "--out", whole)
    real = brixel.optimizer_step
    with monkeypatch.context() as patch:           # a signal at the end of the first step
        patch.setattr(brixel, "optimizer_step", lambda *args: signal.raise_signal(signal.SIGTERM) or real(*args))
        assert "after step 1" in error_of(in_process, *common, "--out", parts)
    first = parameters(parts)
    in_process(*common, "--out", parts, "--resume")
    # without Adam's moments, or with other stochastic depth, it is 0.6; noise of 1e-6 in the gradients makes 0.002
    assert (parameters(parts) - parameters(whole)).norm() < 0.1 * (parameters(whole) - first).norm()


def test_paper_run_of_vit_b_fits_into_40_gb(in_process, photos, tmp_path):
    torch.cuda.reset_peak_memory_stats()
    in_process("--backbone", "dinov3_vitb16", "--weights", "none", "--data_dir", photos, "--out", tmp_path / "out.pt",
               "--min_side", 100, "--max_steps", 2, "--num_workers", 4)      # batch 16, 1024 px; photos are enlarged
    assert torch.cuda.max_memory_allocated() < 40e9

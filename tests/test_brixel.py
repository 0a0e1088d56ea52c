"""The network, the losses, the checkpoints and the pictures of brixel.py."""

import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import FIXTURES, ROOT, tensors
from PIL import Image
from torch import nn

import brixel
from brixel import BrixelError


class Toy(nn.Module):
    """A backbone as any project might bring it: the members of the interface, nothing else."""

    name, mean, std = "toy", (0.5,) * 3, (0.25,) * 3

    def __init__(self, patch_size=16, embed_dim=64):
        super().__init__()
        self.patch_size, self.embed_dim = patch_size, embed_dim
        self.embed = nn.Conv2d(3, embed_dim, patch_size, patch_size)
        self.norm = nn.BatchNorm2d(embed_dim)

    def layers(self, x):
        x = self.norm(self.embed(x))
        return [x, x.sin(), x.cos(), x.tanh()]


def trained(backbone=None, **options):
    """Brixel in eval mode whose every parameter counts."""
    torch.manual_seed(0)
    model = brixel.Brixel(backbone or Toy(), **options).eval()
    for p in model.upsampler.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return model


@pytest.mark.parametrize("size", ["64x64", "48x80"])
def test_network_agrees_with_the_released_one(size):
    settings, state = brixel.from_released(tensors("tiny_brixel_weights"), "tiny.pth")
    upsampler = brixel.Upsampler(64, **settings).eval()
    upsampler.load_state_dict(state)
    io = tensors(f"tiny_io_{size}")
    h, w = (side // 16 for side in io["image"].shape[2:])
    layers = [io[f"backbone.layer{i}.patch"].view(1, h, w, 64).permute(0, 3, 1, 2) for i in range(4)]
    with torch.no_grad():
        adapted = brixel.nchw(upsampler.adapter(io["image"], [brixel.nhwc(layer) for layer in layers]))
        output = upsampler(io["image"], layers)
    torch.testing.assert_close(adapted, io["adapter.1"], atol=5e-5, rtol=0)
    torch.testing.assert_close(output, io["output"], atol=5e-5, rtol=0)


@pytest.mark.parametrize("embed_dim, count", [
    (384, 2_108_288), (768, 6_683_072), (1024, 11_207_488), (1280, 16_911_552)])
def test_trainable_parameters_are_the_live_ones(embed_dim, count):
    with torch.device("meta"):
        plain, full_rank = brixel.Upsampler(embed_dim), brixel.Upsampler(embed_dim, full_rank=True)
    assert sum(p.numel() for p in plain.parameters()) == count
    assert sum(p.numel() for p in full_rank.parameters()) == count + embed_dim**2 + embed_dim


def test_training_starts_from_bilinear_upsampling():
    model, x = brixel.Brixel(Toy(), full_rank=True).eval(), torch.randn(2, 3, 64, 48)
    want = F.interpolate(model.backbone.layers(x)[-1], scale_factor=4, mode="bilinear")
    torch.testing.assert_close(model(x), want, atol=1e-6, rtol=0)


@pytest.mark.parametrize("patch_size, scale, h, w", [(14, 4, 3, 3), (14, 8, 5, 4), (16, 2, 3, 7)])
def test_output_grid_is_scale_times_the_token_grid_and_images_do_not_mix(patch_size, scale, h, w):
    model = trained(Toy(patch_size), scale=scale, full_rank=True)
    x = torch.randn(2, 3, h * patch_size, w * patch_size)
    with torch.no_grad():
        out = model(x)
        torch.testing.assert_close(model(x[1:]), out[1:], atol=1e-5, rtol=1e-5)
    assert out.shape == (2, 64, scale * h, scale * w)


def test_preprocess_gives_a_normalized_image_of_valid_size_and_others_are_refused():
    x = trained().preprocess(Image.new("RGBA", (301, 200), (255, 0, 0, 255)), 64)
    assert x.shape == (1, 3, 64, 96) and trained().bfloat16().preprocess(Image.new("L", (8, 8))).dtype == torch.bfloat16
    assert x[0, 0].unique().item() == pytest.approx((1 - 0.5) / 0.25) and x[0, 1].unique().item() == -2
    for other, sentence in [(x[..., :50], "nearest valid size is 64 x 48"), (x[0], "must be .B, 3, H, W")]:
        with pytest.raises(BrixelError, match=sentence):
            trained()(other)


def test_heads_start_by_looking_one_to_four_tokens_away_and_places_are_not_rounded_to_bfloat16():
    attention = brixel.DeformableAttention(64)
    bias = attention.offsets.bias.view(16, 4, 2)
    torch.testing.assert_close(bias.abs().amax(-1), torch.arange(1.0, 5).expand(16, 4))
    torch.testing.assert_close(bias[4, 2], torch.tensor([0.0, 3.0]), atol=1e-5, rtol=0)
    maps = torch.randn(1, 8, 128, 64), torch.randn(1, 4, 64, 64)
    want, got = attention(*maps), attention.bfloat16()(*(x.bfloat16() for x in maps))
    assert (got - want).norm() < 0.02 * want.norm()


def test_stochastic_depth_drops_whole_samples_and_keeps_the_mean():
    extractor, zeros = brixel.Extractor(32, 0.3), torch.zeros(4000, 2, 2, 32)
    del extractor.attention, extractor.ffn
    extractor.attention, extractor.ffn = (lambda query, tokens: 0), torch.ones_like
    x = extractor(zeros, zeros).flatten(1)
    assert (x.amin(1) == x.amax(1)).all()
    assert (x[:, 0] == 0).float().mean().item() == pytest.approx(0.3, abs=0.03)
    assert x.mean().item() == pytest.approx(1, abs=0.05)
    assert (extractor.eval()(zeros, zeros) == 1).all()


def test_adapter_and_head_compile_without_graph_breaks():
    model, image = trained(full_rank=True), torch.randn(1, 3, 64, 96)
    layers = model.backbone.layers(image)
    compiled = torch.compile(model.upsampler, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(image, layers), model.upsampler(image, layers))


@pytest.mark.parametrize("name", ["sq32", "rect24x40", "odd31x45"])
def test_losses_agree_with_the_equations(name):
    maps, values = tensors(f"losses_{name}"), json.loads((FIXTURES / "losses_values.json").read_text())[name]
    exact = next(value for key, value in values.items() if key.startswith("paper64.Eq2_edge_L1_exactSVD_K8"))
    total, terms = brixel.brixel_loss(maps["pred"], maps["target"])
    assert terms["l1"].item() == pytest.approx(values["paper64.Eq1_L1"], rel=1e-4)
    assert terms["edge"].item() == pytest.approx(exact, rel=1e-3)
    spectral = values["paper64.Eq4_fftshift.hann.radFreq.bins24.r0=0.3"]
    assert terms["spectral"].item() == pytest.approx(spectral, rel=1e-4)
    assert total.item() == pytest.approx(terms["l1"].item() + terms["edge"].item() + 0.1 * terms["spectral"].item())


def test_principal_components_are_the_exact_ones_and_the_same_at_every_call():
    variances = torch.cat([torch.tensor([675, 181, 74, 48, 34, 25, 20, 17, 16, 14]), 13 * 0.95 ** torch.arange(374)])
    teacher = torch.randn(2, 384, 32, 32) * variances.sqrt()[:, None, None] + 1          # spectrum of a map of DINOv2
    before = torch.get_rng_state()
    P, mean = brixel.principal_components(teacher)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(torch.initial_seed() + 1)
    assert torch.equal(brixel.principal_components(teacher)[0], P)
    torch.testing.assert_close(P.T @ P, torch.eye(8), atol=1e-5, rtol=0)
    tokens = teacher.permute(0, 2, 3, 1).flatten(0, 2)
    exact = torch.linalg.svd(tokens - tokens.mean(0), full_matrices=False).Vh[:8].T
    torch.testing.assert_close(P[:, :3].abs(), exact[:, :3].abs(), atol=1e-2, rtol=0)    # largest first
    edges = [brixel.edge_loss(torch.zeros_like(teacher), teacher, P=x).item() for x in (P, exact)]
    assert edges[0] == pytest.approx(edges[1], rel=1e-3)


def test_principal_components_of_two_processes_are_those_of_all_their_tokens():
    ours, theirs = torch.randn(1, 16, 6, 5) + 2, 3 * torch.randn(2, 16, 6, 5)
    both, tokens = torch.cat([ours, theirs]), theirs.permute(0, 2, 3, 1).flatten(0, 2)
    centered = tokens - both.mean((0, 2, 3))
    parts = iter([len(tokens), tokens.sum(0), centered.T @ centered])       # what the other process contributes
    P, mean = brixel.principal_components(ours, 3, SimpleNamespace(reduce=lambda x: x + next(parts)))
    want_P, want_mean = brixel.principal_components(both, 3)
    torch.testing.assert_close((P.abs(), mean), (want_P.abs(), want_mean), atol=1e-4, rtol=0)


def test_sobel_and_edge_loss_of_a_slope_by_hand():
    y, x = torch.meshgrid(torch.arange(5.0), torch.arange(6.0), indexing="ij")
    slopes = torch.stack([3 * x + 5 * y, -x])[None]                         # (1, 2, 5, 6)
    gradients = brixel.sobel(slopes)                                        # a slope of 1 is -8: 1 + 2 + 1, two apart
    assert gradients.shape == (2, 2, 3, 4)
    assert gradients[:, :, 0, 0].tolist() == [[-24, -40], [8, 0]]
    assert (gradients == gradients[:, :, :1, :1]).all()
    assert brixel.edge_loss(torch.zeros_like(slopes), slopes, P=torch.eye(2)) == (24 + 8) / 2 + (40 + 0) / 2
    assert brixel.edge_loss(torch.zeros_like(slopes), slopes, P=torch.eye(2)[:, 1:]) == 8


def test_rings_and_spectrum_by_hand():
    # 4 x 4: frequencies 0, .25, -.5, -.25; radii 0, .25, .354, .5, .559, .707; over .707 in 2 rings: cut at .354
    assert brixel.ring_index(4, 4, 2).view(4, 4).tolist() == [[0, 0, 1, 0], [0, 0, 1, 0], [1, 1, 1, 1], [0, 0, 1, 0]]
    # a constant map keeps its energy in the innermost ring; what is left there is the Hann window's
    spectrum = brixel.ring_spectrum(torch.ones(1, 3, 16, 16), 8)[0]
    assert spectrum.argmax() == 0 and spectrum[1:].sum() < 0.05 * spectrum[0]
    teacher = torch.randn(2, 8, 32, 32)
    assert brixel.spectral_loss(F.avg_pool2d(teacher, 5, 1, 2), teacher) > 1         # sees missing detail,
    assert brixel.spectral_loss(teacher + 3, teacher) < 1e-3                         # not brightness


def test_cosine_loss_of_two_tokens_by_hand():
    teacher = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]).T.reshape(1, 2, 1, 2) + 5      # (1, 0), (-1, 0) around (5, 5)
    student = torch.tensor([[0.0, 3.0], [-2.0, 0.0]]).T.reshape(1, 2, 1, 2) + 5      # at a right angle, and parallel
    assert brixel.cosine_loss(student, teacher).item() == pytest.approx(1 - (0 + 1) / 2)


def test_brixel_loss_is_the_weighted_sum_of_its_terms():
    student, teacher = torch.randn(2, 2, 16, 12, 12)
    P, mean = torch.linalg.qr(torch.randn(16, 4)).Q, torch.randn(16)
    total, terms = brixel.brixel_loss(student, teacher, 0.2, 0.03, 2.0, P=P, mean=mean)
    assert terms["edge"] == brixel.edge_loss(student, teacher, P=P)
    assert terms["cosine"] == brixel.cosine_loss(student, teacher, mean) != brixel.cosine_loss(student, teacher)
    weights = {"l1": 1, "edge": 0.2, "spectral": 0.03, "cosine": 2}
    assert total.item() == pytest.approx(sum(weights[name] * term.item() for name, term in terms.items()))


def test_losses_of_bfloat16_maps_are_taken_in_float32():
    maps = torch.randn(2, 2, 16, 12, 12).bfloat16()
    for loss in (brixel.l1_loss, brixel.edge_loss, brixel.spectral_loss, brixel.cosine_loss):
        value = loss(maps[0], maps[1])
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(loss(maps[0].float(), maps[1].float()).item())
        assert not loss(maps[0], maps[1] * torch.inf).isfinite()            # a loss, not an exception


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("options", [{}, {"scale": 2, "width": 32}, {"scale": 8, "full_rank": True, "skip": "half"}])
def test_checkpoint_round_trip(tmp_path, suffix, options):
    model, path, x = trained(**options), tmp_path / f"out{suffix}", torch.randn(1, 3, 64, 64)
    model.save(path, note="one")
    again = brixel.load(path, backbone=model.backbone)
    with torch.no_grad():
        assert torch.equal(model(x), again(x))
        again.upsampler.half()
        again.save(path)
        half = brixel.load(path, backbone=model.backbone)(x)
        torch.testing.assert_close(half, model(x), atol=2e-2, rtol=0)
    assert again.settings == {**model.settings, "note": "one"} and not again.training
    assert half.dtype == torch.float32 and not torch.equal(half, model(x))
    settings = {key: value for key, value in model.settings.items() if key != "full_rank"} | options
    torch.save({"brixel": settings, "model": model.upsampler.state_dict()}, tmp_path / "older.pt")
    assert torch.equal(brixel.load(tmp_path / "older.pt", backbone=model.backbone)(x), model(x))
    size = sum(value.numel() for value in model.upsampler.state_dict().values())
    assert path.stat().st_size < 2.2 * size + 60_000


def test_checkpoint_rebuilds_its_own_backbone_and_refuses_another(tmp_path):
    brixel.Brixel(brixel.load_backbone("timm:test_vit", None)).save(tmp_path / "out.pt")
    again = brixel.load(tmp_path / "out.pt")
    assert again.backbone.name == "timm:test_vit" and again.settings["weights"] == "none"
    for backbone, problem in [("dinov3", "was trained for backbone timm:test_vit, not for dinov3"),
                              (Toy(embed_dim=96), "does not fit BRIXEL on toy: .*size mismatch"),
                              (Toy(patch_size=14), "does not fit BRIXEL on toy: trained for patch size 16, not 14")]:
        with pytest.raises(BrixelError, match=f"out.pt {problem}"):
            brixel.load(tmp_path / "out.pt", backbone=backbone)


def test_released_checkpoint_drops_dead_keys_only(tmp_path):
    released, path = tensors("tiny_brixel_weights"), tmp_path / "tiny.pth"
    less = {key: value for key, value in released.items() if key != "adapter.spm.fc2.bias"}
    more = {**released, "adapter.norm5.weight": torch.ones(3)}
    for content, problem in [(less, "Missing key.*prior.proj2.bias"), (more, "Unexpected key.*norm5"),
                             ({"a": torch.ones(3)}, "neither a BRIXEL checkpoint nor")]:
        torch.save(content, path)
        with pytest.raises(BrixelError, match=f"tiny.pth .*{problem}"):
            brixel.load(path, backbone=Toy())
    torch.save(released, path)
    assert brixel.load(path, backbone=Toy()).settings["skip"] == "half"
    with pytest.raises(BrixelError, match="names no backbone"):
        brixel.load(path)


def test_brixel_alone_in_a_folder_imports_torch_only_and_runs_a_checkpoint(tmp_path):
    shutil.copy(ROOT / "brixel.py", tmp_path)
    brixel.Brixel(brixel.load_backbone("timm:test_vit", None)).save(tmp_path / "out.pt")
    code = """
import sys, torch
before = set(sys.modules)
import brixel
new = {name.partition(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)
assert new <= {"brixel", "torch"}, new
print(brixel.load("out.pt")(torch.zeros(1, 3, 64, 48)).shape)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "[1, 64, 16, 12]" in done.stdout, done.stderr


def test_imports_run_one_way_from_probe_to_brixel_to_data():
    for file, others in (("brixel.py", "probe"), ("data.py", "brixel|probe")):
        assert not re.search(rf"^\s*(import|from)\b.*\b({others})\b", (ROOT / file).read_text(), re.MULTILINE)


def test_onnx_agrees_with_pytorch_for_any_batch(tmp_path):
    model = trained(brixel.load_backbone("timm:test_vit", None), full_rank=True)
    model.export_onnx(tmp_path / "brixel.onnx", (48, 80))
    session = onnxruntime.InferenceSession(tmp_path / "brixel.onnx")
    for batch in (1, 3):
        x = torch.randn(batch, 3, 48, 80)
        with torch.no_grad():
            want = model(x)
        got = torch.from_numpy(session.run(None, {"image": x.numpy()})[0])
        torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


def test_pushed_model_has_a_card_and_is_read_back(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, repo_id, **options: None)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder",
                        lambda self, repo_id, folder_path, **_: shutil.copytree(folder_path, tmp_path / repo_id))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo_id, name: str(tmp_path / repo_id / name))
    model, x = trained(), torch.randn(1, 3, 48, 48)
    model.settings |= {"backbone": "timm:test_vit", "held_out": {"brixel l1": 0.25}}
    model.push_to_hub("me/features")
    _, front, text = (tmp_path / "me/features/README.md").read_text().split("---\n", 2)
    front = yaml.safe_load(front)
    assert (front["library_name"], front["base_model"]) == ("brixel", "timm/test_vit") and "brixel l1 0.25" in text
    for place in ("me/features", tmp_path / "me/features"):
        assert torch.equal(brixel.load(place, backbone=model.backbone)(x), model(x))


def test_colors_follow_the_reference_and_stay_in_its_range():
    reference = torch.randn(1, 8, 10, 10) * torch.tensor([9.0, 5, 3, 1, 1, 1, 1, 1])[:, None, None]
    scaled, same = brixel.pca_rgb(100 * reference, reference)
    assert same.shape == (10, 10, 3) and same.dtype == np.uint8
    assert abs(np.corrcoef(reference[0, 0].flatten(), same[..., 0].flatten())[0, 1]) > 0.9     # red: the widest channel
    assert ((scaled == 0) | (scaled == 255)).mean() > 0.9                                   # out of its range


def test_panel_is_a_png_of_rows_and_columns(tmp_path):
    colors = [[(255, 0, 0), (0, 255, 0), (0, 0, 255)], [(0, 0, 0), (255, 255, 0), (0, 255, 255)]]
    rows = [[np.full((8, 16, 3), color, np.uint8) for color in row] for row in colors]
    brixel.write_panel(tmp_path / "panel.png", ("a", "b", "c"), rows)
    panel = Image.open(tmp_path / "panel.png")
    assert panel.format == "PNG" and panel.width > 2.5 * panel.height       # 3 pictures twice as wide as high, 2 rows
    for x, *column in zip((1 / 6, 3 / 6, 5 / 6), *colors):
        for y, color in zip((0.3, 0.75), column):
            assert panel.convert("RGB").getpixel((int(x * panel.width), int(y * panel.height))) == color

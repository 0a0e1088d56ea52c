"""The network, the losses and the checkpoints of brixel.py."""
import json
import re
import shutil
import subprocess
import sys

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from conftest import FIXTURES, ROOT, tensors
from PIL import Image
from torch import nn
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

import brixel
from brixel import BrixelError


class Toy(nn.Module):
    """A backbone as any project might bring it: the members of the interface, nothing else."""
    name, mean, std = "toy", (0.5,) * 3, (0.25,) * 3

    def __init__(self, patch_size=16, embed_dim=64):
        super().__init__()
        self.patch_size, self.embed_dim = patch_size, embed_dim
        self.embed = nn.Sequential(nn.Conv2d(3, embed_dim, patch_size, patch_size), nn.BatchNorm2d(embed_dim))

    def layers(self, x):
        x = self.embed(x)
        return [x, x.sin(), x.cos(), x.tanh()]


def trained(backbone=None, **options):
    """Brixel in eval mode whose every parameter counts."""
    torch.manual_seed(0)
    model = brixel.Brixel(backbone or Toy(), **options).eval()
    for p in model.upsampler.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return model


def test_network_agrees_with_the_released_one():
    state, settings = brixel.from_released(tensors("tiny_brixel_weights"), "tiny.pth")
    upsampler = brixel.Upsampler(64, **settings).eval()
    upsampler.load_state_dict(state)
    for size in ("64x64", "48x80"):
        io = tensors(f"tiny_io_{size}")
        grid = [side // 16 for side in io["image"].shape[2:]]
        layers = [io[f"backbone.layer{i}.patch"].mT.unflatten(2, grid) for i in range(4)]
        torch.testing.assert_close(upsampler(io["image"], layers), io["output"], atol=5e-5, rtol=0)


@pytest.mark.parametrize("patch_size, scale, h, w", [(14, 4, 3, 3), (14, 8, 5, 4), (16, 2, 3, 7)])
def test_output_starts_bilinear_at_scale_times_the_grid_and_images_do_not_mix(patch_size, scale, h, w):
    x, backbone = torch.randn(2, 3, h * patch_size, w * patch_size), Toy(patch_size)
    untrained = brixel.Brixel(backbone, scale, full_rank=True).eval()
    bilinear = F.interpolate(backbone.layers(x)[-1], (scale * h, scale * w), mode="bilinear")
    torch.testing.assert_close(untrained(x), bilinear, atol=1e-6, rtol=0)
    model = trained(backbone, scale=scale, full_rank=True)
    torch.testing.assert_close(model(x[1:]), model(x)[1:], atol=1e-5, rtol=1e-5)


def test_preprocess_normalizes_turns_and_ignores_exif_that_cannot_be_parsed_and_refuses_what_is_no_photo(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6
    for exif, shape in ((turned, (1, 3, 96, 64)), (b"Exif\0\0no TIFF at all", (1, 3, 64, 96))):
        Image.new("RGB", (301, 200), (255, 0, 0)).save(tmp_path / "photo.png", exif=exif)
        x = trained().preprocess(Image.open(tmp_path / "photo.png"), 64)
        assert x.shape == shape and x[0, :, 0, 0].tolist() == [2, -2, -2]
    assert trained().bfloat16().preprocess(Image.new("L", (32, 32))).dtype == torch.bfloat16
    clear = trained().preprocess(Image.new("RGBA", (32, 32), (0, 0, 0, 0)))
    assert clear.unique().tolist() == [2]                          # white
    good, bad = Image.new("RGB", (90, 60)), Image.new("I;16", (90, 60))
    for image, size, words in (
            (bad, 64, "not one of mode I;16"), ("a.jpg", 64, "not str"), (torch.zeros(3, 64, 64), 64, "not Tensor"),
            (good, 31, "size 31"), (good, -5, "size -5"), (good, (64, 65), "64 x 64"), (good, "64", "size 64"),
            (good, (64.0, 0), "size .64.0, 0")):
        with pytest.raises(BrixelError, match=words):
            trained().preprocess(image, size)


@pytest.mark.parametrize("shape, patch_size, words", [
    ((1, 3, 64, 50), 16, "64 x 48"), ((1, 3, 28, 58), 14, "28 x 58 .*42 x 56"), ((3, 64, 64), 16, "B, 3, H, W")])
def test_image_of_another_size_is_refused_with_the_nearest_one(shape, patch_size, words):
    for image, said in ((torch.zeros(shape), words), (torch.zeros(1, 3, 64, 64).byte(), "uint8"), ("a.jpg", "not str")):
        with pytest.raises(BrixelError, match=said):
            trained(Toy(patch_size))(image)


def test_stochastic_depth_drops_whole_samples_and_keeps_the_mean():
    extractor, zeros = brixel.Extractor(32, 0.3), torch.zeros(4000, 2, 2, 32)
    del extractor.attention, extractor.ffn
    extractor.attention, extractor.ffn = (lambda query, tokens: 0), torch.ones_like
    x = extractor(zeros, zeros).flatten(1)
    assert (x.amin(1) == x.amax(1)).all() and (extractor.eval()(zeros, zeros) == 1).all()
    assert (x[:, 0] == 0).float().mean().item() == pytest.approx(0.3, abs=0.03)
    assert x.mean().item() == pytest.approx(1, abs=0.05)


def exact_components(teacher):
    """The first 8 principal components of all tokens by a full SVD, (C, 8)."""
    tokens = teacher.permute(0, 2, 3, 1).flatten(0, 2)
    return torch.linalg.svd(tokens - tokens.mean(0), full_matrices=False).Vh[:8].T


@pytest.mark.parametrize("name", ["sq32", "rect24x40", "odd31x45"])
def test_losses_agree_with_the_equations(name):
    maps, values = tensors(f"losses_{name}"), json.loads((FIXTURES / "losses_values.json").read_text())[name]
    _, terms = brixel.brixel_loss(student := maps["pred"], teacher := maps["target"])
    terms["edge"] = brixel.edge_loss(student, teacher, exact_components(teacher))
    for term, key in {"l1": "paper64.Eq1_L1", "edge": "paper64.Eq2_edge_L1_exactSVD_K8 (mean|dgx|+mean|dgy|)",
                      "spectral": "paper64.Eq4_fftshift.hann.radFreq.bins24.r0=0.3"}.items():
        assert terms[term].item() == pytest.approx(values[key], rel=1e-4)


def test_principal_components_are_the_exact_ones_and_the_same_at_every_call():
    variances = torch.cat([torch.tensor([675, 181, 74, 48, 34, 25, 20, 17, 16, 14]), 13 * 0.95 ** torch.arange(374)])
    teacher = torch.randn(2, 384, 32, 32) * variances.sqrt()[:, None, None] + 1          # spectrum of a map of DINOv2
    P, _ = brixel.principal_components(teacher)
    torch.manual_seed(torch.initial_seed() + 1)
    assert torch.equal(brixel.principal_components(teacher)[0], P)
    exact = exact_components(teacher)
    torch.testing.assert_close(P[:, :3].abs(), exact[:, :3].abs(), atol=1e-2, rtol=0)    # largest first
    edges = [brixel.edge_loss(torch.zeros_like(teacher), teacher, x).item() for x in (P, exact)]
    assert edges[0] == pytest.approx(edges[1], rel=1e-4)                                 # what svd_lowrank adds


def test_brixel_loss_is_the_weighted_sum_of_its_terms_in_float32_and_its_cosine_term_is_so_by_hand():
    student, teacher = torch.randn(2, 2, 16, 12, 12).bfloat16()
    P, mean = brixel.principal_components(teacher, 4)
    total, terms = brixel.brixel_loss(student, teacher, 0.2, 0.03, 2.0, 4)
    assert terms["edge"] == brixel.edge_loss(student, teacher, P) and P.shape == (16, 4)
    assert terms["cosine"] == brixel.cosine_loss(student, teacher, mean)
    torch.testing.assert_close(mean, teacher.float().mean((0, 2, 3)))
    assert total == terms["l1"] + 0.2 * terms["edge"] + 0.03 * terms["spectral"] + 2 * terms["cosine"]
    assert total == brixel.brixel_loss(student.float(), teacher.float(), 0.2, 0.03, 2.0, 4)[0]
    teacher = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]).T.reshape(1, 2, 1, 2) + 5      # (1, 0), (-1, 0) around (5, 5)
    student = torch.tensor([[0.0, 3.0], [-2.0, 0.0]]).T.reshape(1, 2, 1, 2) + 5      # at a right angle, and parallel
    assert brixel.cosine_loss(student, teacher, torch.tensor([5.0, 5.0])).item() == pytest.approx(1 - (0 + 1) / 2)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("options", [{}, {"scale": 2, "width": 32}, {"scale": 8, "full_rank": True, "skip": "half"}])
def test_checkpoint_round_trip(tmp_path, suffix, options):
    model, path, x = trained(**options), tmp_path / f"out{suffix}", torch.randn(1, 3, 64, 64)
    default = {"backbone": "toy", "weights": "pretrained", "fingerprint": None, "embed_dim": 64, "patch_size": 16,
               "scale": 4, "width": 64, "skip": "full", "stem_width": 64, "full_rank": False}
    model.save(path, note="one")
    again = brixel.load(path, model.backbone)
    assert again.settings == {**default, **options, "note": "one"} and not again.training
    assert torch.equal(model(x), again(x))


def test_checkpoint_in_a_folder_or_on_the_hub_rebuilds_its_backbone(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repo, name: str(tmp_path / name))
    backbone, file = brixel.load_backbone("timm:test_vit", None), tmp_path / "vit.pth"
    brixel.Brixel(backbone).save(tmp_path / "brixel.safetensors")
    torch.save(backbone.model.state_dict(), file)
    for place, weights, used in ((tmp_path, None, "none"), ("you/name", file, str(file))):
        again = brixel.load(place, weights=weights)
        assert (again.backbone.name, again.backbone.weights) == ("timm:test_vit", used)


def test_checkpoint_follows_its_backbone_to_another_place_and_warns_of_other_weights(tmp_path, capsys):
    config = Dinov2Config(hidden_size=64, num_hidden_layers=4, num_attention_heads=2, image_size=112)
    for folder in ("job1/vit", "other"):
        Dinov2Model(config).save_pretrained(tmp_path / folder)
        BitImageProcessor().save_pretrained(tmp_path / folder)
    out, name = tmp_path / "out.pt", f"hf:{tmp_path}/job1/vit"
    model = brixel.Brixel(brixel.load_backbone(name)).eval()
    model.save(out)
    (tmp_path / "job1").rename(tmp_path / "job2")
    again, x = brixel.load(out, f"hf:{tmp_path}/job2/vit"), torch.randn(1, 3, 56, 56)
    assert torch.equal(again(x), model(x)) and again.settings["backbone"].endswith("job2/vit")
    assert "warning" not in capsys.readouterr().err
    brixel.load(out, f"hf:{tmp_path}/other")
    assert re.search("^warning: .*other are not those that .*out.pt was trained with", capsys.readouterr().err, re.M)
    trained().save(tmp_path / "toy.pt")
    for file, backbone, words in ((out, None, "backbone hf:.*job1/vit"), (out, "timm:test_vit", "not for timm:test_vit"),
                                  (out, "timmy", "unknown backbone 'timmy'"), (out, nn.Linear(1, 1), "without .name"),
                                  (tmp_path / "toy.pt", Toy(embed_dim=96), "toy.pt .*toy"),
                                  (tmp_path / "toy.pt", Toy(patch_size=14), "toy.pt .*toy")):
        with pytest.raises(BrixelError, match=words):
            brixel.load(file, backbone)


def test_released_checkpoint_drops_dead_keys_only(tmp_path):
    released, path = tensors("tiny_brixel_weights"), tmp_path / "tiny.pth"
    less = {key: value for key, value in released.items() if key != "adapter.spm.fc2.bias"}
    more = {**released, "adapter.norm5.weight": torch.ones(3)}
    for content, words in [(less, "prior.proj2.bias"), (more, "norm5"), ({"a": torch.ones(3)}, "neither")]:
        torch.save(content, path)
        with pytest.raises(BrixelError, match=f"tiny.pth .*{words}"):
            brixel.load(path, Toy())
    for content in (released, {"state_dict": released, "epoch": 3}, {"teacher": released}):
        torch.save(content, path)
        assert brixel.load(path, Toy()).settings["skip"] == "half"
    with pytest.raises(BrixelError, match="names no backbone"):
        brixel.load(path)


def test_brixel_alone_in_a_folder_runs_a_checkpoint_with_torch_alone(tmp_path):
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
    assert "[1, 64, 16, 12]" in done.stdout, done.stderr


def test_onnx_as_the_readme_writes_it_agrees_with_pytorch_for_any_batch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = trained(brixel.load_backbone("timm:test_vit", None), full_rank=True)
    code = re.search(r"```python\n(torch.onnx.*?)```", (ROOT / "tests/README.md").read_text("utf-8"), re.DOTALL)[1]
    exec(code, {"torch": torch, "model": model, "x": torch.zeros(1, 3, 48, 48)})
    session = onnxruntime.InferenceSession("brixel.onnx")
    for batch in (1, 3):
        x = torch.randn(batch, 3, 48, 48)
        got = torch.from_numpy(session.run(None, {"image": x.numpy()})[0])
        torch.testing.assert_close(got, model(x).detach(), atol=1e-4, rtol=0)

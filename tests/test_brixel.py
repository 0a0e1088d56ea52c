"""The network, the losses and the checkpoints of brixel.py."""

import json
import re
import shutil
import subprocess
import sys

import ablate
import pytest
import torch
import torch.nn.functional as F
from conftest import FIXTURES, ROOT, tensors
from torch import nn

import brixel
from brixel import BrixelError


class Toy(nn.Module):
    """A backbone as any project might bring it: the members of the interface, nothing else."""

    name, embed_dim, mean, std = "toy", 64, (0.5,) * 3, (0.25,) * 3

    def __init__(self, patch_size=16):
        super().__init__()
        self.patch_size = patch_size
        self.embed = nn.Conv2d(3, 64, patch_size, patch_size)
        self.norm = nn.BatchNorm2d(64)

    def layers(self, x):
        x = self.norm(self.embed(x))
        return [x, x.sin(), x.cos(), x.tanh()]

    def forward(self, x):
        return self.layers(x)[-1]


@pytest.fixture
def toy():
    torch.manual_seed(0)
    return brixel.Brixel(Toy()).eval()


# --- network

@pytest.mark.parametrize("size", ["64x64", "48x80"])
def test_network_agrees_with_the_released_one(size):
    settings, state = brixel.from_released(tensors("tiny_brixel_weights"))
    upsampler = brixel.Upsampler(64, **settings, stem_width=8).eval()
    upsampler.load_state_dict(state)
    io = tensors(f"tiny_io_{size}")
    h, w = (side // 16 for side in io["image"].shape[2:])
    layers = [io[f"backbone.layer{i}.patch"].view(1, h, w, 64).permute(0, 3, 1, 2) for i in range(4)]
    with torch.no_grad():
        adapted = brixel.nchw(upsampler.adapter(io["image"], [brixel.nhwc(layer) for layer in layers]))
        output = upsampler(io["image"], layers)
    torch.testing.assert_close(adapted, io["adapter.1"], atol=5e-5, rtol=0)
    torch.testing.assert_close(output, io["output"], atol=5e-5, rtol=0)


@pytest.mark.parametrize("embed_dim, count", [(384, 2_108_288), (768, 6_683_072), (1024, 11_207_488), (1280, 16_911_552)])
def test_trainable_parameters_are_the_live_ones(embed_dim, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in brixel.Upsampler(embed_dim).parameters()) == count


def test_gradient_reaches_every_trainable_parameter_and_none_the_backbone():
    model = brixel.Brixel(Toy(), drop_path=0).train()
    optimizer = torch.optim.SGD(model.upsampler.parameters(), lr=0.1)
    for _ in range(3):                             # some weights start at zero: the head's last layer, where attention looks
        optimizer.zero_grad()
        student = model(torch.randn(2, 3, 64, 96))
        brixel.brixel_loss(student, torch.randn_like(student))[0].backward()
        optimizer.step()
    dead = [name for name, p in model.upsampler.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not dead
    assert all(p.grad is None for p in model.backbone.parameters())


def test_training_mode_leaves_the_backbone_in_eval_mode(toy):
    before = {k: v.clone() for k, v in toy.backbone.state_dict().items()}
    toy.train()(torch.randn(2, 3, 64, 64))
    assert toy.upsampler.training and not any(m.training for m in toy.backbone.modules())
    assert all(torch.equal(before[k], v) for k, v in toy.backbone.state_dict().items())


@pytest.mark.parametrize("patch_size", [14, 16])
@pytest.mark.parametrize("scale", [2, 4, 8])
@pytest.mark.parametrize("grid", [(3, 3), (5, 4), (3, 7)])
def test_output_grid_is_scale_times_the_token_grid(patch_size, scale, grid):
    model = brixel.Brixel(Toy(patch_size), scale).eval()
    with torch.no_grad():
        out = model(torch.randn(2, 3, *(n * patch_size for n in grid)))
    assert out.shape == (2, 64, scale * grid[0], scale * grid[1])


def test_images_of_a_batch_do_not_mix(toy):
    x = torch.randn(3, 3, 64, 48)
    with torch.no_grad():
        torch.testing.assert_close(toy(x)[1:2], toy(x[1:2]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size, nearest", [((64, 50), "64 x 48"), ((16, 64), "32 x 64"), ((70, 200), "64 x 192|64 x 208")])
def test_wrong_size_names_the_nearest_valid_one(toy, size, nearest):
    with pytest.raises(BrixelError, match=nearest):
        toy(torch.randn(1, 3, *size))


def test_preprocess_gives_normalized_image_of_valid_size(toy):
    from PIL import Image

    x = toy.preprocess(Image.new("RGBA", (301, 200), (255, 0, 0, 255)), 64)
    assert x.shape == (1, 3, 64, 96)
    assert x[0, 0].unique().item() == pytest.approx((1 - 0.5) / 0.25) and x[0, 1].unique().item() == pytest.approx(-2)


def test_heads_start_by_looking_one_to_four_tokens_away():
    bias = brixel.DeformableAttention(64).offsets.bias.view(16, 4, 2)
    torch.testing.assert_close(bias.abs().amax(-1), torch.arange(1.0, 5).expand(16, 4))
    assert torch.allclose(bias[0, 0], torch.tensor([1.0, 0])) and torch.allclose(bias[4, 2], torch.tensor([0.0, 3]), atol=1e-5)


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    x = brixel.drop_path(torch.ones(4000, 2, 2, 3), 0.3, training=True)
    per_sample = x.flatten(1)
    assert (per_sample.amin(1) == per_sample.amax(1)).all()
    assert (per_sample[:, 0] == 0).float().mean().item() == pytest.approx(0.3, abs=0.03)
    assert x.mean().item() == pytest.approx(1, abs=0.05)
    assert brixel.drop_path(x, 0.3, training=False) is x


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 4, 64, 64)])
def test_image_of_another_shape_is_one_sentence(toy, shape):
    with pytest.raises(BrixelError, match=re.escape(f"image of shape {shape}: it must be (B, 3, H, W)")):
        toy(torch.zeros(shape))


def test_adapter_and_head_compile_without_graph_breaks(toy):
    image = torch.randn(1, 3, 64, 96)
    layers = toy.backbone.layers(image)
    compiled = torch.compile(toy.upsampler, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(image, layers), toy.upsampler(image, layers))


# --- losses

@pytest.mark.parametrize("name", ["sq32", "rect24x40", "odd31x45"])
def test_losses_agree_with_the_equations(name):
    maps, values = tensors(f"losses_{name}"), json.loads((FIXTURES / "losses_values.json").read_text())[name]
    edge_key = next(key for key in values if key.startswith("paper64.Eq2_edge_L1_exactSVD_K8"))
    total, terms = brixel.brixel_loss(maps["pred"], maps["target"])
    assert terms["l1"].item() == pytest.approx(values["paper64.Eq1_L1"], rel=1e-4)
    assert terms["edge"].item() == pytest.approx(values[edge_key], rel=1e-4)
    assert terms["spectral"].item() == pytest.approx(values["paper64.Eq4_fftshift.hann.radFreq.bins24.r0=0.3"], rel=1e-4)
    assert total.item() == pytest.approx(terms["l1"].item() + terms["edge"].item() + 0.1 * terms["spectral"].item())


def test_components_of_micro_batches_are_those_of_the_whole_batch():
    teacher = torch.randn(4, 16, 6, 5) * torch.linspace(3, 1, 16)[:, None, None] + 2
    whole, parts = brixel.principal_components(teacher), brixel.principal_components([teacher[:3], teacher[3:]])
    torch.testing.assert_close(whole.abs(), parts.abs(), atol=1e-4, rtol=0)
    centered = teacher.permute(0, 2, 3, 1).flatten(0, 2) - teacher.mean((0, 2, 3))
    torch.testing.assert_close(whole.abs(), torch.linalg.svd(centered).Vh[:8].T.abs(), atol=1e-4, rtol=0)


def test_leading_eigenvectors_agree_with_eigh():
    values = torch.cat([torch.tensor([675, 181, 74, 48, 34, 25, 20, 17, 16, 14]), 13 * 0.95 ** torch.arange(374)])     # as DINOv2's
    basis = torch.linalg.qr(torch.randn(384, 384, generator=torch.Generator().manual_seed(1))).Q
    matrix = basis * values @ basis.T
    ours, exact = brixel.leading_eigenvectors(matrix, 8), torch.linalg.eigh(matrix).eigenvectors[:, -8:].flip(1)
    torch.testing.assert_close(ours.T @ ours, torch.eye(8), atol=1e-5, rtol=0)
    torch.testing.assert_close((ours * exact).sum(0).abs(), torch.ones(8), atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", ["sq32", "rect24x40", "odd31x45"])
def test_released_losses_of_the_ablation_are_the_released_ones(name):
    maps, values = tensors(f"losses_{name}"), json.loads((FIXTURES / "losses_values.json").read_text())[name]
    edge_key = next(key for key in values if key.startswith("variant64.edge_MSE_exactSVD_K8"))
    with ablate.replaced(ablate.RELEASED_LOSSES):
        _, terms = brixel.brixel_loss(maps["pred"], maps["target"], components=brixel.principal_components(maps["target"]))
    assert terms["edge"].item() == pytest.approx(values[edge_key], rel=1e-4)
    assert terms["spectral"].item() == pytest.approx(values["official.crispness_spectral_loss(bins=24,hi_start=0.3)"], rel=1e-4)


def test_ring_index_by_hand():
    # 4 x 4: frequencies 0, .25, -.5, -.25; radii 0, .25, .354, .5, .559, .707 over .707, in 2 rings cut at .354
    assert brixel.ring_index(4, 4, 2).view(4, 4).tolist() == [[0, 0, 1, 0], [0, 0, 1, 0], [1, 1, 1, 1], [0, 0, 1, 0]]


def test_spectral_loss_sees_missing_detail_and_not_brightness():
    teacher = torch.randn(2, 8, 32, 32)
    blurred = F.avg_pool2d(teacher, 5, 1, 2)
    assert brixel.spectral_loss(blurred, teacher) > 1
    assert brixel.spectral_loss(teacher + 3, teacher) < 1e-3


def test_losses_of_bfloat16_maps_are_taken_in_float32():
    maps = torch.randn(2, 2, 16, 12, 12).bfloat16()
    for loss in (brixel.l1_loss, brixel.edge_loss, brixel.spectral_loss):
        value = loss(maps[0], maps[1])
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(loss(maps[0].float(), maps[1].float()).item())


def test_learning_rate_warms_up_for_one_epoch():
    from types import SimpleNamespace

    cfg = SimpleNamespace(lr=1e-3, warmup_lr=1e-4, warmup_epochs=1, max_steps=8, lr_schedule="constant")
    assert [brixel.lr_at(step, cfg, 3.5) for step in range(6)] == [1e-4, 1e-4, 1e-4, 1e-4, 1e-3, 1e-3]
    cfg.lr_schedule = "cosine"
    assert [brixel.lr_at(step, cfg, 4) for step in (3, 4, 6, 8)] == pytest.approx([1e-4, 1e-3, 5e-4, 0])


# --- checkpoints

@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("scale", [2, 4, 8])
def test_checkpoint_round_trip(tmp_path, suffix, scale):
    torch.manual_seed(scale)
    model = brixel.Brixel(Toy(), scale, width=32).eval()
    path = tmp_path / f"out{suffix}"
    model.save(path, note="one", steps=3)
    again = brixel.load(path, backbone=model.backbone)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(x), again(x))
    assert again.settings["note"] == "one" and not again.training
    assert path.stat().st_size < 4.4 * sum(v.numel() for v in model.upsampler.state_dict().values()) + 60_000


def test_checkpoint_alone_rebuilds_the_backbone(tmp_path):
    model = brixel.Brixel(brixel.load_backbone("timm:test_vit", None))
    model.save(tmp_path / "out.pt")
    again = brixel.load(tmp_path / "out.pt")
    assert again.backbone.name == "timm:test_vit" and again.settings["weights"] == "none"


def test_released_checkpoint_drops_dead_keys_only(tmp_path):
    released = tensors("tiny_brixel_weights")
    torch.save(released, tmp_path / "tiny.pth")
    model = brixel.load(tmp_path / "tiny.pth", backbone=Toy())
    assert model.settings["skip"] == "half" and model.settings["stem_width"] == 8
    for key, problem in [("adapter.norm1.weight", "missing"), ("adapter.spm.fc2.bias", "missing")]:
        torch.save({k: v for k, v in released.items() if k != key}, tmp_path / "less.pth")
        with pytest.raises(BrixelError, match=problem):
            brixel.load(tmp_path / "less.pth", backbone=Toy())
    torch.save({**released, "adapter.norm5.weight": torch.ones(3)}, tmp_path / "more.pth")
    with pytest.raises(BrixelError, match="norm5.*unknown"):
        brixel.load(tmp_path / "more.pth", backbone=Toy())


def test_checkpoint_of_another_width_is_refused(tmp_path):
    wide = Toy()
    wide.embed_dim = 96
    brixel.Brixel(wide).save(tmp_path / "out.pt")
    with pytest.raises(BrixelError, match="embed_dim 96 .*toy has 64"):
        brixel.load(tmp_path / "out.pt", backbone=Toy())
    torch.save(tensors("tiny_brixel_weights"), tmp_path / "tiny.pth")
    with pytest.raises(BrixelError, match="embed_dim 64 .*toy has 96"):
        brixel.load(tmp_path / "tiny.pth", backbone=wide)


class Payload:
    def __reduce__(self):
        return open, ("brixel_payload_ran", "w")


def test_bad_checkpoints_are_refused_and_nothing_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    brixel.Brixel(Toy()).save("good.pt")
    good = (tmp_path / "good.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(good[:len(good) // 2])
    (tmp_path / "text.pt").write_text("hello")
    torch.save({"model": Payload()}, "evil.pt")
    torch.save({"something": torch.ones(2)}, "other.pt")
    torch.save({"brixel": {}, "model": {"a": torch.ones(1).expand(10**6, 10**6)}}, "huge.pt")
    torch.save({"brixel": {"scale": torch.ones(2)}, "model": {"a": torch.ones(1)}}, "odd.pt")
    for name in ("cut.pt", "text.pt", "evil.pt", "other.pt", "none.pt", "huge.pt", "odd.pt"):
        with pytest.raises(BrixelError, match=name):
            brixel.load(name, backbone=Toy())
    assert not (tmp_path / "brixel_payload_ran").exists()


def test_checkpoint_of_another_backbone_of_the_same_size_is_refused(tmp_path):
    brixel.Brixel(brixel.load_backbone("dinov3_vits16", None)).save(tmp_path / "out.pt", command="brixel.py --backbone dinov3_vits16")
    with pytest.raises(BrixelError, match="trained for backbone dinov3_vits16 .*--backbone dinov3_vits16.*not for timm:vit_small"):
        brixel.load(tmp_path / "out.pt", backbone="timm:vit_small_patch16_dinov3", weights="none")


def test_released_checkpoint_without_backbone_asks_for_it(tmp_path):
    torch.save(tensors("tiny_brixel_weights"), tmp_path / "tiny.pth")
    with pytest.raises(BrixelError, match="does not name its backbone"):
        brixel.load(tmp_path / "tiny.pth")


# --- copying

def test_brixel_alone_in_a_folder_imports_little_and_runs_a_checkpoint(tmp_path):
    shutil.copy(ROOT / "brixel.py", tmp_path)
    brixel.Brixel(brixel.load_backbone("timm:test_vit", None)).save(tmp_path / "out.pt")
    code = """
import sys, brixel
heavy = {"accelerate", "yaml", "timm", "transformers", "open_clip", "data", "torchvision"} & set(sys.modules)
assert not heavy, heavy
import torch
print(brixel.load("out.pt")(torch.zeros(1, 3, 64, 48)).shape)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "[1, 64, 16, 12]" in done.stdout, done.stderr


def test_hann_window_and_dc_by_hand():
    # a constant map keeps all its energy in the innermost ring
    spectrum = brixel.ring_spectrum(torch.ones(1, 3, 16, 16), 8)[0]
    assert spectrum.argmax() == 0 and spectrum[1:].sum() < 0.05 * spectrum[0]


# --- export and sharing

def test_onnx_agrees_with_pytorch_for_any_batch(tmp_path, size=(48, 80)):
    import onnxruntime

    torch.manual_seed(0)
    model = brixel.Brixel(brixel.load_backbone("timm:test_vit", None))
    model.export_onnx(tmp_path / "brixel.onnx", size)
    session = onnxruntime.InferenceSession(tmp_path / "brixel.onnx")
    for batch in (1, 3):
        x = torch.randn(batch, 3, *size)
        with torch.no_grad():
            want = model(x)
        got = torch.from_numpy(session.run(None, {"image": x.numpy()})[0])
        torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


def test_pushed_model_is_read_back_from_its_folder(tmp_path, monkeypatch):
    """The Hub is played by a local folder: what push_to_hub uploads is what load reads."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, repo_id, **options: None)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder",
                        lambda self, repo_id, folder_path: shutil.copytree(folder_path, tmp_path / repo_id))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo_id, name: str(tmp_path / repo_id / name))
    monkeypatch.setattr(brixel, "download", lambda name, page, load, checkpoint=False: load())
    model = brixel.Brixel(brixel.load_backbone("timm:test_vit", None)).eval()
    model.push_to_hub("me/features")
    x = torch.randn(1, 3, 48, 48)
    for place in ("me/features", tmp_path / "me" / "features"):
        assert torch.equal(brixel.load(place, backbone=model.backbone)(x), model(x))


# Shapes in a released checkpoint: D the backbone's width, s the width of the stem, M the head's.
RELEASED_SHAPES = {
    r"level_embed$": "3 D", r"interactions.*_norm\.\w+$": "D", r"adapter\.norm[1234]\.\w+$": "D",
    r"sampling_offsets\.weight": "128 D", r"sampling_offsets\.bias": "128", r"attention_weights\.weight": "64 D",
    r"attention_weights\.bias": "64", r"value_proj\.weight": "D/2 D", r"value_proj\.bias": "D/2", r"output_proj\.weight": "D D/2",
    r"output_proj\.bias": "D", r"ffn\.fc1\.weight": "D/4 D", r"ffn\.fc1\.bias": "D/4", r"dwconv\.dwconv\.weight": "D/4 1 3 3",
    r"dwconv\.dwconv\.bias": "D/4", r"ffn\.fc2\.weight": "D D/4", r"ffn\.fc2\.bias": "D", r"num_batches_tracked": "",
    r"stem\.0\.weight": "s 3 3 3", r"stem\.[36]\.weight": "s s 3 3", r"stem\.[147]\.\w+$": "s", r"conv2\.0\.weight": "s*2 s 3 3",
    r"conv2\.1\.\w+$": "s*2", r"conv3\.0\.weight": "s*4 s*2 3 3", r"conv4\.0\.weight": "s*4 s*4 3 3", r"conv[34]\.1\.\w+$": "s*4",
    r"spm\.fc1\.weight": "D s 1 1", r"spm\.fc2\.weight": "D s*2 1 1", r"spm\.fc[34]\.weight": "D s*4 1 1", r"spm\.fc\d\.bias": "D",
    r"align_in\.weight": "M D 1 1", r"block\.1\.weight": "M 1 3 3", r"block\.[35]\.weight": "M M 1 1", r"mix\.weight": "M M/4 3 3",
    r"out_conv\.weight": "D M 1 1", r"out_conv\.bias": "D", r"head\..*\.(bias|weight)$": "M", r"up\.expand\.weight": "D*4 D 1 1",
    r"up\.expand\.bias": "D*4", r"up\.post\.0\.weight": "D 1 3 3", r"up\.post\.1\.weight": "D D 1 1", r"up\.post\.\d\.bias": "D",
    r"guide_proj\.0\.weight": "48 64 1 1", r"guide_proj\.0\.bias": "48"}


def released_shape(key, D, s, M=64):
    pattern = next(pattern for pattern in RELEASED_SHAPES if re.search(pattern, key))
    return tuple(int(eval(term, {"D": D, "s": s, "M": M})) for term in RELEASED_SHAPES[pattern].split())


def test_table_of_released_shapes_describes_the_fixture():
    for key, value in tensors("tiny_brixel_weights").items():
        assert tuple(value.shape) == released_shape(key, 64, 8), key


@pytest.mark.parametrize("width", [384, 768, 1024, 1280])
def test_released_checkpoints_of_every_size_fit(width):
    with torch.device("meta"):
        released = {key: torch.empty(released_shape(key, width, 64)) for key in tensors("tiny_brixel_weights")}
        settings, state = brixel.from_released(released)
        brixel.load_strictly(brixel.Upsampler(width, **settings), state, "released.pth", f"width {width}")

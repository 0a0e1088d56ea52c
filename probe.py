"""Probe frozen dense features: the paper's four benchmarks (Table 1) for a backbone, BRIXEL and the teacher.

    python probe.py --task navi --data_dir navi_v1.0 --ckpt out.pt                  # baseline and BRIXEL
    python probe.py --task cityscapes --data_dir cityscapes --ckpt out.pt --size 128 256 384 512 --seed 42 43 44
    accelerate launch --num_processes 4 --multi_gpu probe.py --task navi ...        # same result as one process
    python probe.py --task pca --ckpt out.pt --image a.jpg photos/                  # pictures of the features
    python probe.py --task cost --backbone dinov3_vits16 dinov3_vitb16              # GFLOPs, milliseconds, memory

Rows: "baseline", the backbone; "BRIXEL", with --ckpt; "teacher", with --teacher: the backbone at `scale` times the side
(the ceiling).  Each has its own probe, trained on frozen features with the same seeds, batches and steps.  Each row is
written at once to out.TASK.json and .png.  Where the output is no terminal, its last line is the result as JSON.
"""
import contextlib
import io
import itertools
import json
import math
import os
import re
import sys
import time
from base64 import b64encode
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from accelerate.utils import tqdm
from safetensors.torch import save
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, default_collate
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import ColorJitter

import brixel
from data import ADE20K, IGNORE, NAVI, NYU, Cityscapes, DataError, PhotoIndex, check_workers, open_photo

# ----------------------------------------------------------------------------------------------------------------------
# 1. Readouts: what a probe predicts.  head(C): its trained part.  `batch`: a dict of stacked items of data.py.  loss()
#    returns a sum and a count, added up over the processes and then divided.  compute(): the metrics of all updates.

MIN_DEPTH, MAX_DEPTH = 0.001, 10.0      # meters: range of the depth head and of the depth metrics


class DPT(nn.Module):
    """probe3d's DPT head, with 1x1 convolutions and one map for all four levels.  (B, C, h, w) -> (B, out_dim, h, w)"""
    def __init__(self, in_dim, out_dim, width=512):
        def unit():
            return nn.Sequential(nn.Conv2d(width, width, 1), nn.ReLU(), nn.Conv2d(width, width, 1), nn.ReLU())

        super().__init__()
        self.project = nn.ModuleList(nn.Conv2d(in_dim, width, 1) for _ in range(4))     # the deepest level first
        self.before = nn.ModuleList(unit() for _ in range(3))                           # residual unit of each level
        self.after = nn.ModuleList(unit() for _ in range(4))                            # of its sum with deeper ones
        self.out = nn.Sequential(nn.Conv2d(width, width, 1), nn.ReLU(), nn.Conv2d(width, out_dim, 1))

    def forward(self, x):
        fused = self.project[0](x)                                                      # (B, width, h, w)
        fused = fused + self.after[0](fused)
        for project, before, after in zip(self.project[1:], self.before, self.after[1:], strict=True):
            level = project(x)
            fused = level + before(level) + fused
            fused = fused + after(fused)
        return self.out(fused)


class DepthHead(DPT):
    """Depth as the expectation over out_dim bins.  (B, C, h, w) -> (B, 1, h, w) meters."""
    def forward(self, x):
        weight = F.normalize(super().forward(x).float().relu() + 0.1, p=1, dim=1)       # (B, bins, h, w)
        depth = torch.linspace(MIN_DEPTH, MAX_DEPTH, weight.shape[1], device=x.device)  # (bins,)
        return torch.einsum("bkhw,k->bhw", weight, depth)[:, None]


class Classes:
    """Semantic classes, by one 1x1 convolution.  batch["label"]: (B, H, W) uint8, class or IGNORE."""
    target = "label"

    def __init__(self, classes):
        self.classes, self.head = classes, partial(nn.Conv2d, out_channels=classes, kernel_size=1)
        self.sums = torch.zeros(classes, classes, dtype=torch.float64)     # pixels: rows labels, columns predictions

    def loss(self, pred, batch):
        """Cross-entropy: sum over labeled pixels, and their number.  pred: (B, K, H, W) logits."""
        label = batch["label"]
        return F.cross_entropy(pred, label.long(), ignore_index=IGNORE, reduction="sum"), (label != IGNORE).sum()

    def update(self, pred, batch):
        seen = batch["label"] != IGNORE
        pairs = batch["label"][seen].long() * self.classes + pred.argmax(1)[seen]
        self.sums += torch.bincount(pairs, minlength=self.classes**2).view_as(self.sums).cpu()

    def compute(self):
        """mIoU over the classes that occur; mIoU where absent classes count as 0, as released; pixel accuracy."""
        # released: scripts/eval/segmentation/ade20k_linear_probe.py:308
        hit = self.sums.diag()
        union = self.sums.sum(0) + self.sums.sum(1) - hit
        iou = hit / union.clamp_min(1)                                                  # (K,)
        return {"miou": iou[union > 0].mean().item(), "miou_absent_zero": iou.mean().item(),
                "pixel_accuracy": (hit.sum() / self.sums.sum()).item()}


def align(pred, depth, valid):
    """`pred`, scaled and shifted per image to fit `depth` best over the valid pixels.  (B, 1, H, W), float64"""
    pred, depth, weight = pred.double(), depth.double(), valid.double()
    weight = weight / weight.sum((1, 2, 3), keepdim=True).clamp_min(1)
    mean_pred, mean_depth = ((weight * x).sum((1, 2, 3), keepdim=True) for x in (pred, depth))
    covariance = (weight * (pred - mean_pred) * (depth - mean_depth)).sum((1, 2, 3), keepdim=True)
    variance = (weight * (pred - mean_pred)**2).sum((1, 2, 3), keepdim=True)
    return covariance / variance.clamp_min(1e-12) * (pred - mean_pred) + mean_depth


class Depth:
    """Depth in meters, by DepthHead.  batch["depth"]: (B, 1, H, W) float32 m; batch["valid"]: (B, 1, H, W) bool."""
    target = "depth"

    def __init__(self, hidden=512, silog_beta=0.15, limits=(MIN_DEPTH, MAX_DEPTH)):
        self.silog_beta, self.limits, self.head = silog_beta, limits, partial(DepthHead, out_dim=256, width=hidden)
        self.sums = torch.zeros(2, 7, dtype=torch.float64)         # (as predicted, aligned) x (DEPTH, pixels)

    def loss(self, pred, batch):
        """Sum of mean(d²) - beta mean(d)² over the images, and their number; d = log pred - log depth (SILog)."""
        n = batch["valid"].sum((1, 2, 3))                                               # (B,)
        diff = pred.clamp_min(1e-8).log() - batch["depth"].clamp_min(1e-8).log()
        diff = torch.where(batch["valid"], diff, 0)
        mean = diff.sum((1, 2, 3)) / n.clamp_min(1)
        square = (diff**2).sum((1, 2, 3)) / n.clamp_min(1)
        return (square - self.silog_beta * mean**2).sum(), (n > 0).sum()

    def update(self, pred, batch):
        depth, valid = batch["depth"], batch["valid"]
        aligned = align(pred.clamp(*self.limits), depth, valid)
        d = depth[valid].double().clamp(*self.limits)                                   # (pixels,)
        for sums, x in zip(self.sums, (pred, aligned), strict=True):
            p = x[valid].double().clamp(*self.limits)
            ratio = torch.maximum(p / d, d / p)
            terms = [(p - d)**2, (p - d).abs() / d, ratio.log10(), ratio < 1.25, ratio < 1.25**2, ratio < 1.25**3]
            sums += torch.stack([term.double().sum() for term in [*terms, torch.ones_like(p)]]).cpu()

    def compute(self):
        """The metrics of DEPTH over all valid pixels, as predicted and, `_aligned`, after align()."""
        means = self.sums[:, :-1] / self.sums[:, -1:]                                   # (2, 6)
        means[:, 0].sqrt_()                                        # the first is the square of the RMSE
        return dict(zip(DEPTH | ALIGNED, means.flatten().tolist(), strict=True))


class Normals:
    """Surface normals.  batch["normal"]: (B, 3, H, W), unit, x right, y down, z away; "normal_valid": (B, 1, H, W)."""
    target = "normal"
    bin = 0.01              # degrees; width of the bins of a histogram that gives the median
    limits = (11.25, 22.5, 30)

    def __init__(self, hidden=512):
        self.head = partial(DPT, out_dim=3, width=hidden)          # its output is not normalized
        self.sums = torch.zeros(2 + round(180 / self.bin), dtype=torch.float64)        # sum of angles; histogram

    def loss(self, pred, batch):
        """Sum of 1 - cos over valid pixels, and their number.  pred: (B, 3, H, W)."""
        cos = F.cosine_similarity(pred, batch["normal"], dim=1)[:, None]
        return torch.where(batch["normal_valid"], 1 - cos, 0).sum(), batch["normal_valid"].sum()

    def update(self, pred, batch):
        cos = F.cosine_similarity(pred.double(), batch["normal"].double(), dim=1)[batch["normal_valid"][:, 0]]
        angle = cos.clamp(-1, 1).acos().rad2deg()                                       # (pixels,)
        histogram = torch.bincount((angle / self.bin).long(), minlength=len(self.sums) - 1)
        self.sums += torch.cat([angle.sum()[None], histogram]).cpu()

    def compute(self):
        """Mean and median of the angle in degrees; share of the pixels below each limit."""
        below = self.sums[1:].cumsum(0)                            # pixels up to the end of each bin
        median_bin = (below < below[-1] / 2).sum().item()
        shares = {f"share_{limit}": (below[round(limit / self.bin) - 1] / below[-1]).item() for limit in self.limits}
        return {"angle_mean": (self.sums[0] / below[-1]).item(), "angle_median": (median_bin + 0.5) * self.bin} | shares


# ----------------------------------------------------------------------------------------------------------------------
# 2. The benchmarks: images, readouts, and what the table shows

def read_split(cfg, split, size, patch_size=1, scale=1):
    """The images of a split, "train" or "val", of the benchmark cfg.task: a Benchmark of data.py."""
    options = {"protocol": cfg.split, "unit": cfg.depth} if cfg.task == "navi" else {}
    images = BENCHMARKS[cfg.task]["reader"](cfg.data_dir, split, size, patch_size, scale, cfg.limit, **options)
    if cfg.task == "ade20k":
        images.class_of = images.class_of[:cfg.classes + 1]        # labels above it are refused
    return images


def new_readouts(cfg):
    """New readouts for the benchmark cfg.task."""
    if cfg.task in ("ade20k", "cityscapes"):
        return [Classes(cfg.classes if cfg.task == "ade20k" else 19)]
    if cfg.task == "nyu":
        return [Depth(cfg.hidden, cfg.silog_beta)]
    limits = (0.05, 5.0) if cfg.depth == "encoded" else (MIN_DEPTH, MAX_DEPTH)     # scripts/eval/depth/navi.py:517-518
    return [Depth(cfg.hidden, cfg.silog_beta, limits), Normals(cfg.hidden)]


# Columns of a table: {metric: (header with arrow, factor, format)}, the first is plotted
SEGMENTATION = {"miou": ("mIoU % ↑", 100, ".1f"), "pixel_accuracy": ("pixel acc. % ↑", 100, ".1f"),
                "miou_absent_zero": ("mIoU %, absent = 0", 100, ".1f")}
DEPTH = {"rmse": ("RMSE ↓", 1, ".3f"), "abs_rel": ("AbsRel ↓", 1, ".3f"), "log10": ("log10 ↓", 1, ".3f"),
         **{f"delta{k}": (f"δ{k} ↑", 1, ".3f") for k in (1, 2, 3)}}
ALIGNED = {f"{key}_aligned": (f"aligned {header}", *rest) for key, (header, *rest) in DEPTH.items()}
NORMALS = {"rmse": DEPTH["rmse"], "angle_mean": ("mean ° ↓", 1, ".1f"), "angle_median": ("median ° ↓", 1, ".1f"),
           **{f"share_{limit}": (f"< {limit}° % ↑", 100, ".1f") for limit in Normals.limits}}

# counts: training and validation images of the full benchmark; paper: {metric: {backbone: (baseline, BRIXEL)}}, Table 1
BENCHMARKS = {
    "ade20k": {"reader": ADE20K, "counts": (20210, 2000), "columns": SEGMENTATION,
        "paper": {"miou": {"siglip2": (36.6, 40.8), "dinov3_vitb16": (46.7, 49.2), "pe": (34.0, 37.8)},
                  "pixel_accuracy": {"siglip2": (72.0, 76.0), "dinov3_vitb16": (80.5, 82.0), "pe": (73.3, 76.3)}}},
    "cityscapes": {"reader": Cityscapes, "counts": (2975, 500), "columns": SEGMENTATION,
        "paper": {"miou": {"siglip2": (44.2, 50.0), "dinov3_vitb16": (61.1, 64.4), "pe": (45.7, 52.0)},
                  "pixel_accuracy": {"siglip2": (88.1, 90.9), "dinov3_vitb16": (91.6, 93.0), "pe": (90.0, 92.4)}}},
    "nyu": {"reader": NYU, "counts": (795, 654), "columns": DEPTH | ALIGNED,
        # the released evaluation aligns every image first (scripts/eval/depth/nyu.py:217-237, with "scale_shift")
        "paper": {"rmse_aligned": {"siglip2": (0.613, 0.567), "dinov3_vitb16": (0.354, 0.346), "pe": (0.394, 0.381)}}},
    "navi": {"reader": NAVI, "counts": (), "columns": NORMALS,
        "paper": {"rmse": {"siglip2": (0.506, 0.489), "dinov3_vitb16": (0.388, 0.380), "pe": (0.469, 0.440)},
                  "angle_mean": {"siglip2": (49.4, 48.6), "dinov3_vitb16": (41.3, 39.4), "pe": (48.4, 44.9)}}},
}


# ----------------------------------------------------------------------------------------------------------------------
# 3. Frozen features, and the probe that is trained and scored on them

def memory_room(cfg, acc, root="/sys/fs/cgroup"):
    """Bytes that each process may keep on the host, and on a GPU: half of what is free, at most cfg.cache_gb each."""
    host = [psutil.virtual_memory().available]                     # and what the limit of a container leaves:
    for folder, limit, used, cache in (("", "max", "current", "inactive_file"),
                                       ("memory", "limit_in_bytes", "usage_in_bytes", "total_inactive_file")):
        with contextlib.suppress(OSError, ValueError):             # no such file; or "max", no limit
            limit, used = (int(Path(root, folder, f"memory.{name}").read_text()) for name in (limit, used))
            host.append(limit - used)
            host[-1] += int(re.search(rf"^{cache} (\d+)", Path(root, folder, "memory.stat").read_text(), re.M)[1])
    free = [min(host) / int(os.environ.get("LOCAL_WORLD_SIZE", acc.num_processes)),
            torch.cuda.mem_get_info()[0] if acc.device.type == "cuda" else 0]
    room = torch.tensor([min(n / 2, cfg.cache_gb * 1e9 or n) for n in free], device=acc.device)
    return acc.gather(room).view(-1, 2).amin(0).tolist()           # the least of all processes


class Features:
    """Frozen features of the images of one split, with their targets.

    Keeps the first of these that fits: features on the device, features on the host, decoded images on the host,
    nothing.  What is not kept is computed anew in every epoch, with the same result, as are features with color jitter.
    Each process computes a share and gives it to the others.
    model: a backbone or a Brixel.   room, device_room: of memory_room; kept_on: what is used of them, {place: bytes}.
    """
    def __init__(self, images, model, acc, cfg, room, device_room=0, jitter=(0,)):
        self.images, self.model, self.acc, self.cfg = images, model, acc, cfg
        self.jitter = ColorJitter(*jitter) if any(jitter) else None
        n, size = len(images), max(1, cfg.batch_size // acc.num_processes)
        batch = default_collate([images[i] for i in range(min(n, size))])
        pixels = batch["image"].to(acc.device)
        ready = {"features": self.extract(pixels).cpu()} | {key: batch[key] for key in batch if key != "image"}
        tiers = [("features", "device", ready), ("features", "host", ready), ("images", "host", batch)]
        for what, place, sample in [*tiers[2 if self.jitter else 0:], ("nothing", "host", {})]:
            nbytes = n * sum(value[0].nbytes for value in sample.values())
            if nbytes <= {"host": room, "device": device_room}[place]:
                break
        self.kept_on = {"host": 0, "device": 0, place: nbytes}
        device = acc.device if place == "device" else "cpu"
        self.kept = {key: value.new_empty((n, *value.shape[1:]), device=device) for key, value in sample.items()}

        epochs = len(cfg.seed) * (cfg.epochs if images.split == "train" else 1)
        passes = 1 if "features" in self.kept else epochs          # of the network
        computing, reading = milliseconds([partial(self.extract, pixels), partial(images.__getitem__, 0)], repeats=1)
        ms = passes * computing / len(pixels) + (1 if self.kept else epochs) * reading / max(1, cfg.num_workers)
        often, minutes = f"{passes} times" if passes > 1 else "once", n / acc.num_processes * ms / 6e4
        takes = f"{minutes:.0f} minutes" if minutes > 1.5 else f"{math.ceil(60 * minutes)} seconds"
        acc.print(f"  {n:,} {images.split} images; kept on the {place}: {what} ({nbytes / 1e6:,.0f} MB); features are "
                  f"computed {often}, which takes about {takes}")
        loading = {"num_workers": cfg.num_workers, "pin_memory": acc.device.type == "cuda"}
        self.parts = []                                            # images of each batch, set by batches()
        self.loader = DataLoader(images, batch_sampler=self.parts, persistent_workers=cfg.num_workers > 0, **loading)
        start, once = 0, acc.prepare(DataLoader(images, size, **loading)) if self.kept else []
        for batch in tqdm(once, desc=f"reading {images.split}", leave=False, disable=not self.kept):
            batch = acc.gather_for_metrics(batch if "image" in self.kept else self.on_device(batch))    # in order
            for key, value in batch.items():
                self.kept[key][start:start + len(value)] = value
            start += len(value)

    @torch.no_grad()
    def extract(self, images):
        """(B, 3, H, W) uint8 -> (B, C, h, w) float16, also where they are not kept: the result is the same."""
        with torch.autocast(self.acc.device.type, torch.bfloat16, enabled=self.cfg.mixed_precision == "bf16"):
            return self.model(brixel.normalize(images, getattr(self.model, "backbone", self.model))).half()

    def on_device(self, batch):
        """A batch on the device; unless there is color jitter, with "features" in place of "image"."""
        batch = {key: value.to(self.acc.device, non_blocking=True) for key, value in batch.items()}
        if "image" in batch and not self.jitter:
            batch["features"] = self.extract(batch.pop("image"))
        return batch

    def batches(self, order, epoch=0, seed=0):
        """Yields this process's part of each batch: a dict of "features" (B, C, h, w) and the targets.

        order: image numbers, spread evenly over as few batches as cfg.batch_size allows.   epoch, seed: of the jitter.
        """
        whole = order.tensor_split(-(-len(order) // self.cfg.batch_size))
        self.parts[:] = [batch[self.acc.process_index::self.acc.num_processes].tolist() for batch in whole]
        kept = ({key: value[part] for key, value in self.kept.items()} for part in self.parts)
        for part, batch in zip(self.parts, kept if self.kept else self.loader, strict=True):
            batch = self.on_device(batch)
            if self.jitter:
                images = []                # ColorJitter has no generator; torch.manual_seed would reseed GPUs, too
                for i, image in zip(part, batch["image"], strict=True):
                    torch.default_generator.manual_seed((seed << 32) + (epoch << 20) + i)
                    images.append(self.jitter(image))
                batch["features"] = self.extract(torch.stack(images))
            yield batch


class Probe(nn.ModuleDict):
    """{target: head}.  A batch of Features -> {target: (B, K, H, W) float32}, H x W the target's size."""
    def forward(self, batch):
        features = batch["features"].float()
        return {target: F.interpolate(head(features), size=batch[target].shape[-2:], mode="bilinear")
                for target, head in self.items()}


def fit(readouts, features, embed_dim, cfg, acc, seed):
    """A probe trained on frozen features; initial weights, batches and steps depend on cfg and seed alone."""
    torch.manual_seed(seed)
    probe = Probe({readout.target: readout.head(embed_dim) for readout in readouts})
    optimizer = torch.optim.AdamW(probe.parameters(), cfg.lr, weight_decay=cfg.weight_decay)
    probe, optimizer = acc.prepare(probe, optimizer)
    for epoch in tqdm(range(cfg.epochs), desc="training the probe", unit="epoch", leave=False):
        order = torch.randperm(len(features.images), generator=torch.Generator().manual_seed(seed + epoch))
        counts = torch.zeros(len(readouts), device=acc.device)
        for batch in features.batches(order, epoch, seed):
            outputs = probe(batch)
            totals, count = zip(*(readout.loss(outputs[readout.target], batch) for readout in readouts), strict=True)
            count = acc.reduce(torch.stack(count))                                      # (readouts,)
            counts += count
            # over the count of all processes; times their number, because gradients are averaged over them
            loss = (torch.stack(totals) / count.clamp_min(1)).sum() * acc.num_processes
            if not loss.isfinite():
                raise brixel.BrixelError(f"the loss is {loss.item()} in epoch {epoch + 1}; try a smaller --lr")
            optimizer.zero_grad()
            acc.backward(loss)
            optimizer.step()
        if not counts.all():
            raise DataError(f"no pixel of {len(order)} train images has a valid target (--data_dir, --limit)")
    return acc.unwrap_model(probe).eval()


@torch.no_grad()
def score(probe, readouts, features, acc):
    """Metrics over the whole split, by name; the processes' sums are added up before anything is divided."""
    for batch in features.batches(torch.arange(len(features.images))):
        outputs = probe(batch)
        for readout in readouts:
            readout.update(outputs[readout.target], batch)
    metrics = {}
    for readout in readouts:
        readout.sums = acc.reduce(readout.sums.to(acc.device)).cpu()
        if not readout.sums.any():
            raise DataError(f"no pixel of {len(features.images)} val images has a valid {readout.target} (--data_dir)")
        metrics |= readout.compute()
    return metrics


@torch.no_grad()
def example_pictures(probe, features, count=4):
    """{"image", "true TARGET", "predicted TARGET": list of (h, w, 3) uint8}; black where there is no truth."""
    from matplotlib import colormaps

    items = [features.images[i] for i in sorted({i * len(features.images) // count for i in range(count)})]
    shown = {"image": [item["image"].permute(1, 2, 0).numpy() for item in items]}
    batch = default_collate(items)
    for target, pred in probe(features.on_device(batch)).items():
        true, pred = batch[target], pred.cpu()
        if target == "label":                                      # neighboring classes differ in hue
            valid = true != IGNORE
            pair = [colormaps["hsv"](x.numpy() * 0.618 % 1)[..., :3] for x in (true, pred.argmax(1))]
        elif target == "depth":                                    # near is yellow, far dark blue; of codes, reversed
            valid, far = batch["valid"][:, 0], (true * batch["valid"]).max().clamp_min(MIN_DEPTH)
            pair = [colormaps["viridis_r"]((x[:, 0] / far).numpy())[..., :3] for x in (true, pred)]
        else:                                                      # the usual colors: light blue faces the camera
            valid, flip = batch["normal_valid"][:, 0], torch.tensor([-1, 1, 1]).view(3, 1, 1)
            pair = [((1 + F.normalize(x * flip)) / 2).permute(0, 2, 3, 1).numpy() for x in (true, pred)]
        for title, x in zip(("true", "predicted"), pair, strict=True):
            shown[f"{title} {target}"] = (x * valid.numpy()[..., None] * 255).astype(np.uint8)
    return shown


# ----------------------------------------------------------------------------------------------------------------------
# 4. A benchmark: rows, table, files

def run_row(cfg, acc, size, model, scale, backbone):
    """Train and score one probe per seed.   Returns: the metrics' means, the splits, a function that draws examples."""
    acc.free_memory()                                              # of the row before
    room, device_room = memory_room(cfg, acc)
    splits = [read_split(cfg, split, size, backbone.patch_size, scale) for split in ("train", "val")]
    train = Features(splits[0], model, acc, cfg, room, device_room, cfg.color_jitter)
    val = Features(splits[1], model, acc, cfg, room - train.kept_on["host"], device_room - train.kept_on["device"])
    scores = []
    for seed in cfg.seed:
        readouts = new_readouts(cfg)
        probe = fit(readouts, train, backbone.embed_dim, cfg, acc, seed)
        scores.append(score(probe, readouts, val, acc))
    record = {name: np.mean([metrics[name] for metrics in scores]).item() for name in scores[0]}
    if len(scores) > 1:
        record |= {f"{name}_std": np.std([metrics[name] for metrics in scores], ddof=1).item() for name in scores[0]}
    if len(cfg.size) > 1:
        image = splits[1][0]["image"][None].to(acc.device)
        with brixel.one_sentence(f"cost of {size} pixels", only_warn=True):
            record["gflops"] = gflops(partial(model, image.float()))
            [record["ms"]] = milliseconds([partial(val.extract, image)], repeats=5)
    return record, splits, partial(example_pictures, probe, val)


def run_benchmark(cfg):
    """Train and score the probes of one benchmark.  Files are written after each row: a later failure loses none."""
    ckpt = cfg.ckpt if Path(cfg.ckpt).is_file() else "out"
    out = str(brixel.file_in(cfg.out, os.path.basename(ckpt))) if cfg.out else ckpt
    stem = re.sub(r"\.(pt|pth|safetensors)$", "", out) + f".{cfg.task}"
    brixel.check_writable(stem)
    files = [Path(f"{stem}.{ending}") for ending in ("json", "png", "size.png")]
    there = ", ".join(str(path) for path in files if path.exists())
    if there and not cfg.overwrite:
        raise brixel.BrixelError(f"{there}: there are results of an earlier call; add --overwrite, or change --out")
    if min(cfg.size) < 1 or len(cfg.color_jitter) != 4 or cfg.color_jitter[3] > 0.5:
        raise DataError("--size must be 1 or more, --color_jitter four numbers, the last, of the hue, at most 0.5")
    check_workers(cfg.num_workers)
    acc = brixel.make_accelerator()                                # of the readout; Features has its own precision
    for split in ("train", "val"):                                 # tells of a wrong folder before a download
        smallest_batch = min(len(read_split(cfg, split, 1)), (cfg.batch_size + 1) // 2)
        if smallest_batch < acc.num_processes:
            raise DataError(f"too few {split} images for {acc.num_processes} processes (--limit, --batch_size)")
    if cfg.ckpt:
        model = brixel.load(cfg.ckpt, cfg.backbone or None, cfg.weights or None)
    else:                                                          # no row uses its adapter, which is random
        model = brixel.Brixel(brixel.load_backbone(cfg.backbone or "dinov3", cfg.weights or "pretrained"))
    backbone = model.to(acc.device).backbone
    rows = {"baseline": (backbone, 1)}                             # row: (network, factor on the image's side)
    rows |= {"BRIXEL": (model, 1)} if cfg.ckpt else {}
    rows |= {"teacher": (backbone, model.scale)} if cfg.teacher else {}
    for path in files if acc.is_main_process else ():              # --overwrite
        path.unlink(missing_ok=True)
    records, shown = [], {}
    for size, (row, (network, scale)) in itertools.product(cfg.size, rows.items()):
        acc.print(f"{row}, {size} pixels")
        record, splits, draw = run_row(cfg, acc, size, network, scale, backbone)
        records.append({"row": row, "size": size, **record})
        result = {"task": cfg.task, "backbone": backbone.name, "rows": records,
                  "n_train": len(splits[0]), "n_val": len(splits[1]), "processes": acc.num_processes,
                  "matmul": "tf32" if acc.device.type == "cuda" else "float32",
                  "deviations": deviations(cfg, splits, backbone), "settings": vars(cfg)}
        if acc.is_main_process:
            with brixel.atomic(f"{stem}.json") as temporary:
                temporary.write_text(json.dumps(result, indent=1, allow_nan=False))
            with brixel.one_sentence(f"picture {stem}.png", only_warn=True):
                shown |= {key.replace("predicted", row): value for key, value in draw().items()}   # of the last size
                brixel.write_panel(f"{stem}.png", list(shown), list(zip(*shown.values(), strict=True)))
                if len(cfg.size) > 1:
                    write_plot(f"{stem}.size.png", cfg.task, records)
        del draw                                                   # it holds the features of this row
        header, *cells = table_cells(result)
        acc.print(f"{row}, {size} pixels: {header[2]} {cells[len(records) - 1][2]}, saved in {files[0]}")
    if acc.is_main_process:
        print_table([header, *cells])
        print("differences from the paper's protocol:", "; ".join(result["deviations"]) or "none in the settings")
        print("wrote", ", ".join(str(path) for path in files if path.exists()))
        if not sys.stdout.isatty():                                # for other programs
            print(json.dumps(result, allow_nan=False))


def deviations(cfg, splits, backbone):
    """What differs from the paper's protocol: a list of phrases.  splits: train and val images of the last row."""
    protocol = vars(load_config(["--task", cfg.task]))
    free = {"backbone", "weights", "ckpt", "data_dir", "teacher", "out", "overwrite", "cache_gb", "num_workers"}
    notes = [f"--{key} {' '.join(map(str, value)) if isinstance(value, list) else value}"
             for key, value in vars(cfg).items() if key not in free and value != protocol[key]]
    notes += [f"{len(images)} {images.split} images instead of {full}"
              for images, full in zip(splits, BENCHMARKS[cfg.task]["counts"]) if len(images) != full]
    if any(size % backbone.patch_size for size in cfg.size):
        notes.append(f"images are rounded to multiples of the patch size {backbone.patch_size}, labels are not")
    photo, _ = splits[1].read(splits[1].samples[0])
    if min(photo.size) < splits[1].scale * max(cfg.size):
        notes.append(f"photos are enlarged (the first has {photo.width} x {photo.height} pixels)")
    return notes


def print_table(rows):
    """Print rows of cells: first column left, others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        print(first.ljust(widths[0]), *map(str.rjust, others, widths[1:]), sep="  ")


def table_cells(result):
    """Cells of the table: header, a row per record (of several seeds: mean ± standard deviation), the paper's rows."""
    columns, paper = (BENCHMARKS[result["task"]][key] for key in ("columns", "paper"))
    rows = [["", "size", *(header for header, _, _ in columns.values())]]
    for record in result["rows"]:
        cells = [" ± ".join(format(record[key] * factor, digits) for key in (name, f"{name}_std") if key in record)
                 for name, (_, factor, digits) in columns.items()]
        rows.append([record["row"], str(record["size"]), *cells])
    if result["settings"].get("depth") == "metric":                # the paper's RMSE has another unit
        paper = paper | {"rmse": {}}
    for i, row in enumerate(("baseline", "BRIXEL")):
        numbers = [paper.get(name, {}).get(result["backbone"], ("", ""))[i] for name in columns]
        if any(numbers):
            rows.append([f"paper, {row}", "", *map(str, numbers)])
    return rows


def write_plot(path, task, records):
    """The first metric against size, GFLOPs and milliseconds, a line per row; bars: standard deviation of the seeds."""
    from matplotlib import style
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    metric, (header, factor, _) = next(iter(BENCHMARKS[task]["columns"].items()))
    labels = {"size": "size, pixels", "gflops": "GFLOPs per image", "ms": "milliseconds per image"}
    with brixel.atomic(path) as temporary, style.context("default"):                    # whatever matplotlibrc says
        figure = Figure(figsize=(11, 4), dpi=200, layout="constrained")
        for axis, (key, label) in zip(figure.subplots(1, 3, sharey=True), labels.items(), strict=True):
            for row in dict.fromkeys(record["row"] for record in records):
                chosen = [record for record in records if record["row"] == row]
                x, y = [record[key] for record in chosen], [record[metric] * factor for record in chosen]
                bars = [record.get(f"{metric}_std", 0) * factor for record in chosen]
                axis.errorbar(x, y, bars, fmt="o-", capsize=3, label=row)
                for record, *point in zip(chosen, x, y, strict=True):
                    axis.annotate(record["size"], point, (5, -11), textcoords="offset points")
            axis.set(xlabel=label, ylabel=header, xscale="log", xmargin=0.15)
            axis.xaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}")
            axis.minorticks_off()
            axis.label_outer()
        axis.legend()
        figure.savefig(temporary, format="png")


# ----------------------------------------------------------------------------------------------------------------------
# 5. Without a benchmark: pictures of features (--task pca) and cost (--task cost)

def write_page(path, photo, maps):
    """Write assets/explore.html with a photo's data: point at the photo, and every map shows what is similar.

    photo: PIL image.   maps: {name: (1, C, h, w)}, of which pca_rgb makes colors; their 64 leading directions (not
    centered, as cosine similarity is not) are stored in 8 bits.  The page shows how much this changes similarities.
    """
    panels, differences, similarities = [], [], []
    for (name, features), colors in zip(maps.items(), brixel.pca_rgb(*maps.values()), strict=True):
        _, C, h, w = features.shape
        tokens = F.normalize(features[0].float().cpu().flatten(1).T, dim=1)                     # (N, C)
        reduced = tokens @ torch.linalg.eigh(tokens.T @ tokens).eigenvectors[:, -64:]           # (N, 64)
        reduced = (reduced / reduced.abs().amax(1, keepdim=True).clamp_min(1e-12) * 127).round()
        kept, queries = F.normalize(reduced, dim=1), torch.linspace(0, h * w - 1, 64).long()
        similarities.append(tokens[queries] @ tokens.T)
        differences.append((kept[queries] @ kept.T - similarities[-1]).abs().mean().item())
        panels.append({"name": name, "h": h, "w": w, "dims": reduced.shape[1],
                       "colors": b64encode(colors.tobytes()).decode(),
                       "features": b64encode(reduced.to(torch.int8).numpy().tobytes()).decode()})
    low = torch.cat(similarities, dim=1).median().clamp(0, 0.9).item()          # where the color scale starts
    y, x = divmod((tokens @ tokens.mean(0)).argmin().item(), w)    # least like the whole, mostly the subject
    small = photo.convert("RGB")
    small.thumbnail((1024, 1024))
    small.save(buffer := io.BytesIO(), "JPEG", quality=88)
    data = {"title": Path(path).stem, "photo": "data:image/jpeg;base64," + b64encode(buffer.getvalue()).decode(),
            "width": photo.width, "height": photo.height, "maps": panels,
            "low": round(low, 1), "channels": C, "difference": max(differences),
            "start": {"x": (x + 0.5) / w, "y": (y + 0.5) / h}}
    page = Path(__file__).with_name("assets").joinpath("explore.html").read_text("utf-8")
    with brixel.atomic(path) as temporary:
        temporary.write_text(page.replace("DATA", json.dumps(data).replace("<", "\\u003c")), "utf-8")


@torch.no_grad()
def run_pca(cfg):
    """Write PHOTO.pca.png for each photo of --image, features as colors; one that fails does not stop the others."""
    if not cfg.ckpt or not cfg.image[0] or len(cfg.size) > 1:
        raise brixel.BrixelError("--task pca needs a checkpoint (--ckpt), photos (--image) and one --size")
    folder, taken, saved, failed = Path(cfg.out or "."), set(), {}, []
    brixel.check_writable(folder / "PHOTO.pca.png")
    if cfg.save_features:
        brixel.check_writable(cfg.save_features, "--save_features")
        if Path(cfg.save_features).suffix != ".safetensors" or cfg.save_features == cfg.ckpt:
            raise brixel.BrixelError(f"--save_features {cfg.save_features} must end in .safetensors and not be --ckpt")
    indices = [PhotoIndex(image, flag="--image") for image in cfg.image]      # before CUDA is up: it forks processes
    print(*(note + "\n" for index in indices for note in index.notes), sep="", end="")
    model = brixel.load(cfg.ckpt, cfg.backbone or None, cfg.weights or None)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    photos = [(index, i) for index in indices for i in range(len(index))]
    for index, i in photos:
        path = index.name(i).encode("utf-8", "backslashreplace").decode()               # any name can be printed
        stem = Path(re.sub(r"(?i)\.tar at byte (\d+)$", r"_\1.tar", path)).stem
        names = itertools.chain([stem], (f"{stem}_{k}" for k in itertools.count(2)))
        stem = next(name for name in names if name.casefold() not in taken)             # no picture replaces another
        taken.add(stem.casefold())
        try:
            image = open_photo(index.open(i), "the photo")
            x = model.preprocess(image, cfg.size[0])
            layers = model.backbone.layers(x)
            maps = {"ViT": layers[-1], "bilinear": F.interpolate(layers[-1], scale_factor=model.scale, mode="bilinear"),
                    "BRIXEL": model.upsampler(x, layers)}
            if cfg.teacher:
                maps["teacher"] = model.backbone(model.preprocess(image, [model.scale * side for side in x.shape[2:]]))
            if cfg.save_features:                                  # before a picture fails
                saved[path] = maps["BRIXEL"][0].float().cpu().contiguous()              # (C, h, w)
            row = [np.asarray(image), *brixel.pca_rgb(*maps.values())]
            brixel.write_panel(folder / f"{stem}.pca.png", ["photo", *maps], [row])
            if cfg.html:
                write_page(folder / f"{stem}.html", image, maps)
            print(f"wrote {folder / stem}.pca.png{' and .html' * cfg.html} from {path}; BRIXEL's map is "
                  f"{tuple(maps['BRIXEL'][0].shape)}")
        except Exception as error:    # noqa: BLE001  whatever is wrong with this photo, the others go on
            print(f"{path} failed: {str(error) or type(error).__name__}")
            failed.append(error)
    if saved:
        with brixel.atomic(cfg.save_features) as temporary:
            temporary.write_bytes(save(saved))
    if failed:
        raise DataError(f"{len(failed)} of {len(photos)} photos failed; the reasons stand above") from failed[-1]


def gflops(call):
    """GFLOPs of `call`, with those of attention; a multiplication and an addition are 2 FLOPs."""
    # the counter knows plain attention on every device; its matrices may be too large for a GPU: hence fake tensors
    fake, plain = FakeTensorMode(allow_non_fake_inputs=True), sdpa_kernel(SDPBackend.MATH)
    with fake, plain, FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() / 1e9


def milliseconds(calls, repeats):
    """Median time of each of `calls`, which take turns, so that a machine's drift slows all alike; 2 turns warm up."""
    times = [[] for _ in calls]
    for _ in range(repeats + 2):
        for call, record in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            record.append((time.perf_counter() - start) * 1000)
    return [sorted(record[2:])[repeats // 2] for record in times]


@torch.no_grad()
def run_cost(cfg):
    """Measure and print what the baseline, BRIXEL and the teacher cost for a batch, with random weights."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    machine = torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    half, records = cfg.mixed_precision == "bf16", []
    settings = list(itertools.product(cfg.backbone, cfg.size, cfg.batch_size))
    for name, side, batch in tqdm(settings, desc="measuring", leave=False, main_process_only=False):
        model = brixel.Brixel(brixel.load_backbone(name, None)).eval().to(device)
        side = side or 16 * model.backbone.patch_size              # 256 pixels for patch 16, 224 for patch 14
        image, large = (torch.randn(batch, 3, n, n, device=device) for n in (side, model.scale * side))
        cases = {"baseline": (model.backbone, image), "BRIXEL": (model, image), "teacher": (model.backbone, large)}
        counted = {row: gflops(partial(*case)) for row, case in cases.items()}
        if cfg.compile:                                            # FLOPs cannot be counted in a compiled model
            torch.compiler.reset()                                 # else it gives up after some sizes
            twin = brixel.Brixel(brixel.load_backbone(name, None)).eval().to(device)
            brixel.compile_parts(twin)
            cases |= {"BRIXEL, compiled": (twin, image), "teacher, compiled": (twin.backbone, large)}
        with torch.autocast(device, torch.bfloat16, enabled=half, cache_enabled=False):
            times = milliseconds([partial(*case) for case in cases.values()], cfg.repeats)
            for (row, (module, x)), ms in zip(cases.items(), times, strict=True):
                records.append({"backbone": name, "row": row, "size": x.shape[-1], "batch": batch,
                                "params_M": sum(p.numel() for p in module.parameters()) / 1e6,
                                "gflops": counted[row.removesuffix(", compiled")], "ms": ms})
                if device == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                    before = torch.cuda.memory_allocated()         # weights and images
                    module(x)
                    records[-1]["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    cells = [[f"{x:.2f}" if isinstance(x, float) else str(x) for x in record.values()] for record in records]
    print_table([list(records[0]), *cells])
    result = {"task": "cost", "device": machine, "torch": torch.__version__, "rows": records,
              "matmul": "tf32" if device == "cuda" else "float32", "settings": vars(cfg)}
    if not sys.stdout.isatty():                                    # for other programs
        print(json.dumps(result, allow_nan=False))


# ----------------------------------------------------------------------------------------------------------------------
# 6. Command line

TASKS = {**dict.fromkeys(BENCHMARKS, run_benchmark), "pca": run_pca, "cost": run_cost}
load_config = partial(brixel.load_config, flag="task", default="pca", description=__doc__)


def main(argv=None):
    with brixel.command_line("probe.py"):
        words = [word.partition("=")[0] for word in (sys.argv[1:] if argv is None else argv)]
        if not {"--task", "--help", "-h"} & set(words):
            text = Path(__file__).with_name("config.yaml").read_text("utf-8")
            purpose = dict(re.findall(r"^(\w+):.*# (.*)", text, re.M))
            raise brixel.BrixelError("choose a --task: " + ", ".join(f"{x} ({purpose.get(x)})" for x in TASKS))
        cfg = load_config(argv)
        if cfg.task not in TASKS:
            raise brixel.BrixelError(f"--task {cfg.task}: choose from {', '.join(TASKS)}")
        TASKS[cfg.task](cfg)


if __name__ == "__main__":
    main()

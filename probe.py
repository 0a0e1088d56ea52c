"""Probe frozen dense features: the paper's four benchmarks (Table 1) for a backbone, BRIXEL and the teacher.

    python probe.py --task navi --data_dir navi_v1.0 --ckpt out.pt                  # baseline and BRIXEL
    python probe.py --task ade20k --data_dir ADEChallengeData2016 --ckpt out.pt --teacher
    python probe.py --task cityscapes --data_dir cityscapes --ckpt out.pt --size 128 256 384 512
    accelerate launch --num_processes 4 --multi_gpu probe.py --task navi ...        # same result as one process
    python probe.py --task pca --ckpt out.pt --image a.jpg photos/                  # pictures of the features
    python probe.py --task cost --backbone dinov3_vits16 dinov3_vitb16              # GFLOPs, milliseconds, memory

Rows: "baseline" is the backbone, alone without --ckpt; "BRIXEL" the checkpoint on the same image; "teacher" the
backbone at 4x the side, the ceiling. Each gets its own small readout, trained with the same seed, batches and steps on
frozen features of the last layer. Prints a table beside the paper's numbers and, as the last line, one JSON object;
writes out.TASK.json and out.TASK.png beside the checkpoint (--out). Settings: config.yaml, section of the task's name.
"""
import io
import itertools
import json
import random
import re
import sys
import tempfile
import time
from base64 import b64encode
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import tqdm
from matplotlib import colormaps
from matplotlib.figure import Figure
from safetensors.torch import save
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, default_collate
from torch.utils.flop_counter import FlopCounterMode

import brixel
from data import ADE20K, IGNORE, NAVI, NYU, Cityscapes, DataError, PhotoIndex, color_jitter, open_photo

# ----------------------------------------------------------------------------------------------------------------------
# 1. Readouts: what a probe predicts.  `batch`: a dict of stacked items of data.py.  loss() gives a sum and a count, for
#    several processes add up their counts; update() adds to .sums, which compute() divides once for a split.

MIN_DEPTH, MAX_DEPTH = 0.001, 10.0      # range of the depth head and of the depth metrics


def conv_unit(width):
    """Two 1x1 convolutions, each with a ReLU."""
    return nn.Sequential(nn.Conv2d(width, width, 1), nn.ReLU(), nn.Conv2d(width, width, 1), nn.ReLU())


class DPT(nn.Module):
    """probe3d's DPT head with 1x1 convolutions, its four levels fed with the same map, as the paper uses it.

    (B, C, h, w) -> (B, out_dim, h, w)
    """
    def __init__(self, in_dim, out_dim, width=512):
        super().__init__()
        self.project = nn.ModuleList(nn.Conv2d(in_dim, width, 1) for _ in range(4))     # the deepest level first
        self.before = nn.ModuleList(conv_unit(width) for _ in range(3))                 # residual units of a level
        self.after = nn.ModuleList(conv_unit(width) for _ in range(4))                  # and of its sum with deeper
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
        weight = super().forward(x).float().relu() + 0.1                                # (B, bins, h, w)
        weight = weight / weight.sum(1, keepdim=True)
        depth = torch.linspace(MIN_DEPTH, MAX_DEPTH, weight.shape[1], device=x.device)  # (bins,)
        return torch.einsum("bkhw,k->bhw", weight, depth)[:, None]


class Segmentation:
    """Semantic classes, by one 1x1 convolution.  batch["label"]: (B, H, W) uint8, class or IGNORE."""
    target = "label"

    def __init__(self, classes):
        self.classes = classes
        self.sums = torch.zeros(classes, classes, dtype=torch.float64)     # pixels: rows labels, columns predictions

    def head(self, in_dim):
        return nn.Conv2d(in_dim, self.classes, 1)

    def loss(self, pred, batch):
        """Cross-entropy: sum over labeled pixels, and their number.  pred: (B, K, H, W) logits."""
        label = batch["label"]
        return F.cross_entropy(pred, label.long(), ignore_index=IGNORE, reduction="sum"), (label != IGNORE).sum()

    def update(self, pred, batch):
        seen = batch["label"] != IGNORE
        pairs = batch["label"][seen].long() * self.classes + pred.argmax(1)[seen]
        self.sums += torch.bincount(pairs, minlength=self.classes**2).view_as(self.sums).cpu()

    def compute(self):
        """mIoU over the classes that occur in labels or predictions, and pixel accuracy.

        miou_absent_zero: as the released code, where classes that occur nowhere count 0 (ade20k_linear_probe.py:308).
        """
        hit = self.sums.diag()
        union = self.sums.sum(0) + self.sums.sum(1) - hit
        iou = hit / union.clamp_min(1)                                                  # (K,)
        return {"miou": iou[union > 0].mean().item(), "miou_absent_zero": iou.mean().item(),
                "pixel_accuracy": (hit.sum() / self.sums.sum()).item()}


def align(pred, depth, valid):
    """`pred` after the scale and shift, per image, that fit `depth` best in least squares over the valid pixels.

    All (B, 1, H, W).   Returns: float64.
    """
    pred, depth, weight = pred.double(), depth.double(), valid.double()
    weight = weight / weight.sum((1, 2, 3), keepdim=True).clamp_min(1)
    mean_pred = (weight * pred).sum((1, 2, 3), keepdim=True)
    mean_depth = (weight * depth).sum((1, 2, 3), keepdim=True)
    covariance = (weight * (pred - mean_pred) * (depth - mean_depth)).sum((1, 2, 3), keepdim=True)
    variance = (weight * (pred - mean_pred)**2).sum((1, 2, 3), keepdim=True)
    return covariance / variance.clamp_min(1e-12) * (pred - mean_pred) + mean_depth


class Depth:
    """Depth in meters, by DepthHead.  batch["depth"]: (B, 1, H, W) float32 m; batch["valid"]: (B, 1, H, W) bool."""
    target = "depth"
    names = ("rmse", "abs_rel", "log10", "delta1", "delta2", "delta3")

    def __init__(self, hidden=512, silog_beta=0.15):
        self.hidden, self.silog_beta = hidden, silog_beta
        self.sums = torch.zeros(2, 7, dtype=torch.float64)         # as predicted, aligned; `names`, number of pixels

    def head(self, in_dim):
        return DepthHead(in_dim, 256, self.hidden)

    def loss(self, pred, batch):
        """SILog: mean of squares - beta * square of mean, of the log difference over an image's valid pixels.

        pred: (B, 1, H, W) meters.   Returns: sum over the images with a valid pixel, their number.
        """
        n = batch["valid"].sum((1, 2, 3))                                               # (B,)
        diff = pred.clamp_min(1e-8).log() - batch["depth"].clamp_min(1e-8).log()
        diff = torch.where(batch["valid"], diff, 0)
        mean = diff.sum((1, 2, 3)) / n.clamp_min(1)
        square = (diff**2).sum((1, 2, 3)) / n.clamp_min(1)
        return (square - self.silog_beta * mean**2).sum(), (n > 0).sum()

    def update(self, pred, batch):
        depth, valid = batch["depth"], batch["valid"]
        aligned = align(pred.clamp(MIN_DEPTH, MAX_DEPTH), depth, valid)
        d = depth[valid].double().clamp(MIN_DEPTH, MAX_DEPTH)                           # (pixels,)
        for sums, x in zip(self.sums, (pred, aligned), strict=True):
            p = x[valid].double().clamp(MIN_DEPTH, MAX_DEPTH)
            ratio = torch.maximum(p / d, d / p)
            terms = [(p - d)**2, (p - d).abs() / d, ratio.log10(), ratio < 1.25, ratio < 1.25**2, ratio < 1.25**3]
            sums += torch.stack([term.double().sum() for term in [*terms, torch.ones_like(p)]]).cpu()

    def compute(self):
        """RMSE and the usual others over all valid pixels, also `_aligned`: after scale and shift of each image."""
        metrics = {}
        for suffix, sums in zip(("", "_aligned"), self.sums, strict=True):
            for name, mean in zip(self.names, (sums[:-1] / sums[-1]).tolist(), strict=True):
                metrics[name + suffix] = mean**0.5 if name == "rmse" else mean
        return metrics


class Normals:
    """Surface normals, by a DPT whose output is not normalized.

    batch["normal"]: (B, 3, H, W) unit vectors, x right, y down, z away; batch["normal_valid"]: (B, 1, H, W) bool.
    """
    target = "normal"
    bin = 0.01              # degrees; the median over a split is read from a histogram, to half a bin
    limits = (11.25, 22.5, 30)

    def __init__(self, hidden=512):
        self.hidden = hidden
        self.sums = torch.zeros(2 + round(180 / self.bin), dtype=torch.float64)        # the angle; its histogram

    def head(self, in_dim):
        return DPT(in_dim, 3, self.hidden)

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
        """Mean and (lower) median angle in degrees, shares of the pixels below each limit."""
        below = self.sums[1:].cumsum(0)                            # pixels up to the end of each bin
        median_bin = (below < below[-1] / 2).sum().item()
        shares = {f"share_{limit}": (below[round(limit / self.bin) - 1] / below[-1]).item() for limit in self.limits}
        mean = (self.sums[0] / below[-1]).item()
        return {"angle_mean": mean, "angle_median": (median_bin + 0.5) * self.bin, **shares}


# ----------------------------------------------------------------------------------------------------------------------
# 2. Tasks.  Columns of a table are {metric: (header with arrow, factor, format)}, the first is plotted

SEGMENTATION = {"miou": ("mIoU % ↑", 100, ".1f"), "pixel_accuracy": ("pixel acc. % ↑", 100, ".1f"),
                "miou_absent_zero": ("mIoU %, absent = 0", 100, ".1f")}
DEPTH = {"rmse": ("RMSE ↓", 1, ".3f"), "abs_rel": ("AbsRel ↓", 1, ".3f"), "log10": ("log10 ↓", 1, ".3f"),
         **{f"delta{k}": (f"δ{k} ↑", 1, ".3f") for k in (1, 2, 3)}}
ALIGNED = {f"{key}_aligned": (f"aligned {header}", *rest) for key, (header, *rest) in DEPTH.items()}
NORMALS = {"rmse": ("RMSE ↓", 1, ".3f"), "angle_mean": ("mean ° ↓", 1, ".1f"),
           "angle_median": ("median ° ↓", 1, ".1f"),
           **{f"share_{limit}": (f"< {limit}° % ↑", 100, ".1f") for limit in Normals.limits}}

# counts: training and validation images of the full benchmark; paper: {metric: {backbone: (baseline, BRIXEL)}}, Table 1
TASKS = {
    "ade20k": {"reader": lambda cfg: ADE20K, "counts": (20210, 2000), "columns": SEGMENTATION,
        "readouts": lambda cfg: [Segmentation(150)],
        "paper": {"miou": {"siglip2": (36.6, 40.8), "dinov3_vitb16": (46.7, 49.2), "pe": (34.0, 37.8)},
                  "pixel_accuracy": {"siglip2": (72.0, 76.0), "dinov3_vitb16": (80.5, 82.0), "pe": (73.3, 76.3)}}},
    "cityscapes": {"reader": lambda cfg: Cityscapes, "counts": (2975, 500), "columns": SEGMENTATION,
        "readouts": lambda cfg: [Segmentation(19)],
        "paper": {"miou": {"siglip2": (44.2, 50.0), "dinov3_vitb16": (61.1, 64.4), "pe": (45.7, 52.0)},
                  "pixel_accuracy": {"siglip2": (88.1, 90.9), "dinov3_vitb16": (91.6, 93.0), "pe": (90.0, 92.4)}}},
    "nyu": {"reader": lambda cfg: NYU, "counts": (795, 654), "columns": DEPTH | ALIGNED,
        "readouts": lambda cfg: [Depth(cfg.hidden, cfg.silog_beta)],
        # the released evaluation aligns each image before it measures (nyu.py:217-237, called with "scale_shift")
        "paper": {"rmse_aligned": {"siglip2": (0.613, 0.567), "dinov3_vitb16": (0.354, 0.346), "pe": (0.394, 0.381)}}},
    "navi": {"reader": lambda cfg: partial(NAVI, protocol=cfg.split, unit=cfg.depth), "counts": (None, None),
        "columns": NORMALS, "readouts": lambda cfg: [Depth(cfg.hidden, cfg.silog_beta), Normals(cfg.hidden)],
        "paper": {"rmse": {"siglip2": (0.506, 0.489), "dinov3_vitb16": (0.388, 0.380), "pe": (0.469, 0.440)},
                  "angle_mean": {"siglip2": (49.4, 48.6), "dinov3_vitb16": (41.3, 39.4), "pe": (48.4, 44.9)}}},
}


# ----------------------------------------------------------------------------------------------------------------------
# 3. Frozen features, and the probe that is trained and scored on them

class Features:
    """Frozen features of one split with their targets.  model: a backbone or a Brixel.

    Each process computes a share and gives it to the others. All are kept if they take at most `room` bytes, else they
    are computed anew in every epoch. With color jitter (strengths as in data.color_jitter), which changes them in every
    epoch, the images are kept instead. Every file is read once here: a broken one ends the run before a probe trains.
    """
    def __init__(self, split, model, acc, cfg, room, jitter=(0,)):
        self.split, self.model, self.acc, self.cfg = split, model, acc, cfg
        self.jitter = jitter if any(jitter) else None
        self.dtype = torch.bfloat16 if acc.device.type == "cuda" else torch.float16
        first = self.prepare(default_collate([split[0]]))
        self.nbytes = len(split) * sum(value.nbytes for value in first.values())
        self.kept = {key: value.new_empty(len(split), *value.shape[1:])
                     for key, value in first.items()} if self.nbytes <= room else None
        loader = DataLoader(split, max(1, cfg.batch_size // acc.num_processes), num_workers=cfg.num_workers)
        start = 0
        for batch in tqdm(acc.prepare(loader), desc=f"reading {split.split}", leave=False):
            if self.kept:
                batch = acc.gather_for_metrics(self.prepare(batch))                     # of all processes, in order
                for key, value in batch.items():
                    self.kept[key][start:start + len(value)] = value
                start += len(value)
        acc.print(f"  {len(split)} {split.split} images, {self.nbytes / 1e9:.2g} GB, "
                  f"{'kept in memory' if self.kept else 'read anew in every epoch (--cache_gb)'}")

    @torch.no_grad()
    def extract(self, images):
        """(B, 3, H, W) uint8 -> (B, C, h, w), in the type in which they are kept, whether they are or not."""
        backbone = getattr(self.model, "backbone", self.model)
        with self.acc.autocast():
            return self.model(brixel.normalize(images, backbone)).to(self.dtype)

    def prepare(self, batch):
        """A batch of the split on the device; unless there is color jitter, with "features" in place of "image"."""
        batch = {key: value.to(self.acc.device) for key, value in batch.items()}
        if not self.jitter:
            batch["features"] = self.extract(batch.pop("image"))
        return batch

    def batches(self, order, epoch=0):
        """This process's part of each batch of the images `order`: dicts of "features" (B, C, h, w) and the targets.

        The images are spread evenly over as few batches as cfg.batch_size allows: none is much smaller than the others.
        """
        rank, world = self.acc.process_index, self.acc.num_processes
        whole = order.tensor_split(-(-len(order) // self.cfg.batch_size))
        parts = [batch[rank::world] for batch in whole if len(batch) > rank]
        if self.kept:
            batches = ({key: value[part] for key, value in self.kept.items()} for part in parts)
        else:
            numbers = [part.tolist() for part in parts]
            batches = map(self.prepare, DataLoader(self.split, batch_sampler=numbers, num_workers=self.cfg.num_workers))
        for part, batch in zip(parts, batches, strict=True):
            if self.jitter:
                rngs = [random.Random(f"{self.cfg.seed} {epoch} {i}") for i in part.tolist()]
                images = map(color_jitter, batch["image"], itertools.repeat(self.jitter), rngs)
                batch["features"] = self.extract(torch.stack(list(images)))
            yield batch


class Probe(nn.ModuleDict):
    """{target: head}.  A batch of Features -> {target: (B, K, H, W) float32}, H x W the target's size."""
    def forward(self, batch):
        outputs = {}
        for target, head in self.items():
            output = head(batch["features"].float()).float()                            # (B, K, h, w), of the features
            outputs[target] = F.interpolate(output, size=tuple(batch[target].shape[-2:]), mode="bilinear")
        return outputs


def fit(readouts, features, embed_dim, cfg, acc):
    """A probe trained on frozen features; its first weights, batches and steps depend on nothing but cfg."""
    torch.manual_seed(cfg.seed)
    probe = Probe({readout.target: readout.head(embed_dim) for readout in readouts})
    optimizer = torch.optim.AdamW(probe.parameters(), cfg.lr, weight_decay=cfg.weight_decay)
    probe, optimizer = acc.prepare(probe, optimizer)
    for epoch in tqdm(range(cfg.epochs), desc="training the probe", unit="epoch", leave=False):
        order = torch.randperm(len(features.split), generator=torch.Generator().manual_seed(cfg.seed + epoch))
        for batch in features.batches(order, epoch):
            outputs = probe(batch)
            loss = 0
            for readout in readouts:
                total, count = readout.loss(outputs[readout.target], batch)
                # divided by the count of all processes; times their number, as gradients are averaged over them
                loss = loss + total / acc.reduce(count).clamp_min(1) * acc.num_processes
            if not loss.isfinite():
                raise brixel.BrixelError(f"the loss is {loss.item()} in epoch {epoch + 1}; try a smaller --lr")
            optimizer.zero_grad()
            acc.backward(loss)
            optimizer.step()
    return acc.unwrap_model(probe).eval()


@torch.no_grad()
def score(probe, readouts, features, acc):
    """Metrics over the whole split, by name; the processes' sums are added up before anything is divided."""
    for batch in features.batches(torch.arange(len(features.split))):
        outputs = probe(batch)
        for readout in readouts:
            readout.update(outputs[readout.target], batch)
    metrics = {}
    for readout in readouts:
        readout.sums = acc.reduce(readout.sums.to(acc.device)).cpu()
        metrics |= readout.compute()
    return metrics


def paint(target, pred, batch):
    """Truth and prediction as pictures, each (B, H, W, 3) uint8, black where there is no truth."""
    true = batch[target]
    if target == "label":                                          # neighboring classes differ in hue
        valid = true != IGNORE
        pair = [colormaps["hsv"](x.cpu().numpy() * 0.618 % 1)[..., :3] for x in (true, pred.argmax(1))]
    elif target == "depth":                                        # near is yellow, far dark blue
        valid, far = batch["valid"][:, 0], true.max().clamp_min(MIN_DEPTH)
        pair = [colormaps["viridis_r"]((x[:, 0] / far).cpu().numpy())[..., :3] for x in (true, pred)]
    else:                                                          # the usual colors: light blue faces the camera
        valid, flip = batch["normal_valid"][:, 0], pred.new_tensor([-1, 1, 1]).view(3, 1, 1)
        pair = [((1 + F.normalize(x * flip)) / 2).permute(0, 2, 3, 1).cpu().numpy() for x in (true, pred)]
    return [(x * valid.cpu().numpy()[..., None] * 255).astype(np.uint8) for x in pair]


@torch.no_grad()
def pictures(probe, features, row, count=4):
    """{"image", "true TARGET", "ROW TARGET": list of (h, w, 3) uint8} of some images of the split."""
    items = [features.split[i] for i in sorted({i * len(features.split) // count for i in range(count)})]
    shown = {"image": [item["image"].permute(1, 2, 0).numpy() for item in items]}
    batch = features.prepare(default_collate(items))
    for target, pred in probe(batch).items():
        shown[f"true {target}"], shown[f"{row} {target}"] = paint(target, pred, batch)
    return shown


# ----------------------------------------------------------------------------------------------------------------------
# 4. A benchmark: rows, table, files

def run_row(cfg, acc, row, size, model, scale, backbone):
    """Train and score the probe of one row.  -> its metrics (of several sizes: also its cost), splits, and pictures."""
    reader = TASKS[cfg.task]["reader"](cfg)
    splits = [reader(cfg.data_dir, split, size, backbone.patch_size, scale, cfg.limit) for split in ("train", "val")]
    train = Features(splits[0], model, acc, cfg, cfg.cache_gb * 1e9, cfg.color_jitter)
    val = Features(splits[1], model, acc, cfg, cfg.cache_gb * 1e9 - train.nbytes * bool(train.kept))
    readouts = TASKS[cfg.task]["readouts"](cfg)
    probe = fit(readouts, train, backbone.embed_dim, cfg, acc)
    record = score(probe, readouts, val, acc)
    if len(cfg.size) > 1:
        call = partial(val.extract, splits[1][0]["image"][None].to(acc.device))
        record["gflops"], (record["ms"],) = gflops(call), milliseconds([call], repeats=5)
    return record, splits, pictures(probe, val, row)


def run_benchmark(cfg):
    """Train and score the probes of one task; print the table and the JSON line, write the files."""
    out = cfg.out or (cfg.ckpt if Path(cfg.ckpt).is_file() else "out")
    stem = re.sub(r"\.(pt|pth|safetensors)$", "", out) + f".{cfg.task}"
    brixel.check_writable(stem)
    acc = Accelerator(mixed_precision=brixel.precision(cfg), cpu=torch.backends.mps.is_available())    # MPS: no float64
    if cfg.batch_size < 2 * acc.num_processes - 1:                 # so that each process has an image of every batch
        raise brixel.BrixelError(f"--batch_size {cfg.batch_size} must be at least {2 * acc.num_processes - 1}")
    for split in ("train", "val"):                                 # a wrong folder is told before a backbone is fetched
        TASKS[cfg.task]["reader"](cfg)(cfg.data_dir, split, 1)
    if cfg.ckpt:
        model = brixel.load(cfg.ckpt, cfg.backbone or None, cfg.weights or None)
    else:                                                          # its adapter is random, and no row uses it
        model = brixel.Brixel(brixel.load_backbone(cfg.backbone or "dinov3", cfg.weights or "pretrained"))
    backbone = model.to(acc.device).backbone
    rows = {"baseline": (backbone, 1)}                             # row: (network, factor on the image's side)
    if cfg.ckpt:
        rows["BRIXEL"] = model, 1
    if cfg.teacher:
        rows["teacher"] = backbone, model.scale
    records, shown = [], {}
    for size, (row, (network, scale)) in itertools.product(cfg.size, rows.items()):
        acc.print(f"{row}, {size} pixels")
        record, splits, panels = run_row(cfg, acc, row, size, network, scale, backbone)
        records.append({"row": row, "size": size, **record})
        shown |= panels                                            # of several sizes the last one is shown
    result = {"task": cfg.task, "backbone": backbone.name, "ckpt": cfg.ckpt, "rows": records,
              "n_train": len(splits[0]), "n_val": len(splits[1]), "seed": cfg.seed,
              "processes": acc.num_processes, "precision": acc.mixed_precision,
              "deviations": deviations(cfg, splits, backbone), "settings": vars(cfg)}
    if acc.is_main_process:
        write_results(result, shown, stem)


def deviations(cfg, splits, backbone):
    """How a run differs from the paper's protocol: settings, as flags, and what no flag shows, in a sentence each.

    splits: training and validation images of the last row, which is the teacher's if there is one.
    """
    protocol = vars(brixel.load_config(["--task", cfg.task], "task", "pca", __doc__))
    free = {"backbone", "weights", "ckpt", "data_dir", "teacher", "out", "cache_gb", "num_workers"}
    notes = [f"--{key} {' '.join(map(str, value)) if isinstance(value, list) else value}"
             for key, value in vars(cfg).items() if key not in free and value != protocol[key]]
    notes += [f"{len(split)} {split.split} images instead of {full}"
              for split, full in zip(splits, TASKS[cfg.task]["counts"], strict=True) if full not in (None, len(split))]
    if any(size % backbone.patch_size for size in cfg.size):
        notes.append(f"images are rounded to multiples of the patch size {backbone.patch_size}, labels are not")
    photo, _ = splits[1].read(splits[1].samples[0])
    if min(photo.size) < splits[1].scale * max(cfg.size):
        notes.append(f"photos are enlarged (the first has {photo.width} x {photo.height} pixels)")
    if cfg.task == "navi" and cfg.depth == "metric":
        notes.append("RMSE in meters, the paper's is in PNG codes / 1000 (--depth encoded)")
    return notes


def print_table(rows):
    """Print rows of cells: first column left, others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        print(first.ljust(widths[0]), *map(str.rjust, others, widths[1:]), sep="  ")


def table(task, records, backbone):
    """Cells of the table: a header, a row per record, then the paper's two for that backbone."""
    columns, paper = TASKS[task]["columns"], TASKS[task]["paper"]
    rows = [["", "size", *(header for header, _, _ in columns.values())]]
    for record in records:
        cells = [format(record[name] * factor, digits) for name, (_, factor, digits) in columns.items()]
        rows.append([record["row"], str(record["size"]), *cells])
    for i, row in enumerate(("baseline", "BRIXEL")):
        numbers = {name: str(values[backbone][i]) for name, values in paper.items() if backbone in values}
        if numbers:
            rows.append([f"paper, {row}", "", *(numbers.get(name, "") for name in columns)])
    return rows


def write_results(result, shown, stem):
    """Print table, deviations and JSON; write STEM.json, STEM.png and, for several sizes, STEM.size.png."""
    print_table(table(result["task"], result["rows"], result["backbone"]))
    print("differs from the paper's protocol:", "; ".join(result["deviations"]) or "nothing")
    with brixel.atomic(f"{stem}.json") as temporary:
        temporary.write_text(json.dumps(result, indent=1))
    brixel.write_panel(f"{stem}.png", list(shown), list(zip(*shown.values(), strict=True)))
    if len(result["settings"]["size"]) > 1:
        write_plot(f"{stem}.size.png", result["task"], result["rows"])
    print(json.dumps(result))


def write_plot(path, task, records):
    """The first metric against input size, GFLOPs and milliseconds, a line per row."""
    metric, (header, factor, _) = next(iter(TASKS[task]["columns"].items()))
    labels = {"size": "input size, pixels", "gflops": "GFLOPs per image", "ms": "ms per image"}
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    for axis, (key, label) in zip(figure.subplots(1, 3, sharey=True), labels.items(), strict=True):
        for row in dict.fromkeys(record["row"] for record in records):
            points = [(record[key], record[metric] * factor) for record in records if record["row"] == row]
            axis.plot(*zip(*points, strict=True), "o-", label=row)
        axis.set(xlabel=label, ylabel=header, xscale="log")
        axis.grid(alpha=0.3)
    axis.legend()
    with brixel.atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


# ----------------------------------------------------------------------------------------------------------------------
# 5. Without a benchmark: pictures of features (--task pca) and cost (--task cost)

def write_page(path, photo, maps):
    """Write `path`: assets/explore.html filled with one photo's data; point at it, and every map shows what is similar.

    photo: PIL image.   maps: {name: (1, C, h, w)}; the last one gives basis and range of the PCA colors.
    Features are sent as their 64 leading directions (not centered, as cosine similarity is not), each token as 8-bit
    shares of its largest value: the page brings them back to length 1. What that changes is measured and written there.
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
    small = photo.convert("RGB")
    small.thumbnail((1024, 1024))
    small.save(buffer := io.BytesIO(), "JPEG", quality=88)
    data = {"title": Path(path).stem, "photo": "data:image/jpeg;base64," + b64encode(buffer.getvalue()).decode(),
            "width": photo.width, "height": photo.height, "maps": panels,
            "low": round(low, 1), "channels": C, "difference": max(differences)}
    page = Path(__file__).with_name("assets").joinpath("explore.html").read_text("utf-8")
    with brixel.atomic(path) as temporary:
        temporary.write_text(page.replace("DATA", json.dumps(data).replace("<", "\\u003c")), "utf-8")


@torch.no_grad()
def run_pca(cfg):
    """For each photo of --image: PHOTO.pca.png with its features as colors, all in one basis (the last column's)."""
    if not cfg.ckpt or not cfg.image[0]:
        raise brixel.BrixelError("--task pca needs a checkpoint (--ckpt out.pt) and photos (--image a.jpg folder)")
    folder, saved = Path(cfg.out or "."), {}
    brixel.check_writable(folder / "PHOTO.pca.png")
    if cfg.save_features:
        brixel.check_writable(cfg.save_features, "--save_features")
    model = brixel.load(cfg.ckpt, cfg.backbone or None, cfg.weights or None)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    indices = [PhotoIndex(image, flag="--image") for image in cfg.image]
    photos = [(index.name(i), index, i) for index in indices for i in range(len(index))]
    stems = [Path(name.replace(".tar at byte ", "_")).stem for name, *_ in photos]
    if len(set(stems)) < len(stems):
        raise brixel.BrixelError(f"two photos of --image would become {max(stems, key=stems.count)}.pca.png")
    for stem, (path, index, i) in zip(stems, photos, strict=True):
        try:
            image = open_photo(index.open(i), path)
        except DataError as error:                 # named now, and counted when the others are done
            print(f"skipped {error}")
            continue
        x = model.preprocess(image, cfg.size)
        layers = model.backbone.layers(x)
        maps = {"ViT": layers[-1], "bilinear": F.interpolate(layers[-1], scale_factor=model.scale, mode="bilinear"),
                "BRIXEL": model.upsampler(x, layers)}
        if cfg.teacher:
            maps["teacher"] = model.backbone(model.preprocess(image, [model.scale * side for side in x.shape[2:]]))
        row = [np.asarray(image), *brixel.pca_rgb(*maps.values())]
        brixel.write_panel(folder / f"{stem}.pca.png", ["photo", *maps], [row])
        if cfg.html:
            write_page(folder / f"{stem}.html", image, maps)
        saved[path] = maps["BRIXEL"][0].float().cpu().contiguous()                      # (C, h, w)
        print(f"wrote {folder / stem}.pca.png{' and .html' if cfg.html else ''}, maps of {tuple(saved[path].shape)}")
    if cfg.save_features and saved:
        with brixel.atomic(cfg.save_features) as temporary:
            temporary.write_bytes(save(saved))
    if len(saved) < len(photos):
        raise DataError(f"{len(photos) - len(saved)} of {len(photos)} photos were skipped, see above (--image)")


def gflops(call):
    """GFLOPs of `call`; attention counted, a multiplication and an addition are 2 FLOPs."""
    # torch's counter knows not every fused attention, but always the two matrix products of the plain one
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() / 1e9


def milliseconds(calls, repeats):
    """Median time of each of `calls`; they take turns, so that a drifting machine slows all alike. 2 warm-up turns."""
    times = [[] for _ in calls]
    for _ in range(repeats + 2):
        for call, record in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            record.append((time.perf_counter() - start) * 1000)
    return [sorted(record[2:])[repeats // 2] for record in times]


def onnx_call(model, image):
    """A call of the model in ONNX Runtime, on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()                         # its threads shall not spin while others are timed
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    with tempfile.TemporaryDirectory() as folder:
        model.export_onnx(Path(folder, "brixel.onnx"), tuple(image.shape[2:]))
        session = onnxruntime.InferenceSession(Path(folder, "brixel.onnx"), options)
    return partial(session.run, None, {"image": image.cpu().numpy()})


@torch.no_grad()
def run_cost(cfg):
    """Table and JSON line: what the baseline, BRIXEL and the teacher cost, with random weights.

    For each backbone, side of the student's image and number of images at a time; all figures are of the whole batch.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    machine = torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    half, records = brixel.precision(cfg) == "bf16", []
    for name, side, batch in itertools.product(cfg.backbone, cfg.size, cfg.batch_size):
        model = brixel.Brixel(brixel.load_backbone(name, None)).eval().to(device)
        side = side or 16 * model.backbone.patch_size              # 256 pixels for patch 16, 224 for patch 14
        image, large = (torch.randn(batch, 3, n, n, device=device) for n in (side, model.scale * side))
        cases = {"baseline": (model.backbone, image), "BRIXEL": (model, image), "teacher": (model.backbone, large)}
        timed = [(row, "ms", partial(*case)) for row, case in cases.items()]
        if cfg.compile:
            timed.append(("BRIXEL", "ms_compiled", partial(torch.compile(model), image)))
        if cfg.onnx:
            timed.append(("BRIXEL", "ms_onnx", onnx_call(model, image)))
        rows = {}
        with torch.autocast(device, torch.bfloat16, enabled=half, cache_enabled=False):
            for row, (module, x) in cases.items():
                rows[row] = {"backbone": name, "row": row, "size": x.shape[-1], "batch": batch,
                             "params_M": sum(p.numel() for p in module.parameters()) / 1e6,
                             "gflops": gflops(partial(module, x))}
                if device == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                    before = torch.cuda.memory_allocated()         # weights and images
                    module(x)
                    rows[row]["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
            times = milliseconds([call for _, _, call in timed], cfg.repeats)
        for (row, column, _), ms in zip(timed, times, strict=True):
            rows[row][column] = ms
        records += rows.values()
    columns = list(dict.fromkeys(key for record in records for key in record))
    cells = [columns]
    for record in records:
        values = [record.get(key, "") for key in columns]
        cells.append([f"{value:.3g}" if isinstance(value, float) else str(value) for value in values])
    print_table(cells)
    print(json.dumps({"task": "cost", "device": machine, "torch": torch.__version__, "rows": records,
                      "settings": vars(cfg)}))


# ----------------------------------------------------------------------------------------------------------------------
# 6. Command line

def main(argv=None):
    try:
        cfg = brixel.load_config(argv, "task", "pca", __doc__)
        {"pca": run_pca, "cost": run_cost}.get(cfg.task, run_benchmark)(cfg)
    except (brixel.BrixelError, DataError, OSError) as error:
        sys.exit(f"probe.py: error: {error}")
    except KeyboardInterrupt:
        sys.exit("probe.py: stopped")


if __name__ == "__main__":
    main()

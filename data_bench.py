import json
import random
from collections import Counter
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset

from brixel import BrixelError
from data import UNREADABLE

# ----------------------------------------------------------------------------------------------------------------------
# Benchmarks: what the four readers share

IGNORE = 255     # label of pixels that count nowhere


class Benchmark(Dataset):
    """One split of a benchmark, cut and resized to the probe's size.

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
    square = False                      # centre square crop, or the whole frame
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
    """(left, top, right, bottom) of the centre square, or of the whole frame, of a (width, height) photo."""
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
# ADE20K and Cityscapes: semantic segmentation

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
# NYU and NAVI: depth and surface normals

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
                    row["camera"]["focal_length"], row["image_size"], row["split"]
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
        image = ImageOps.exif_transpose(open_image(sample["image"])).convert("RGB")
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

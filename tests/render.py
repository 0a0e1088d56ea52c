"""Rendered stand-ins for ADE20K, Cityscapes, NYU and NAVI: real on-disk formats, exact depth, normals and classes.

Textures: pictures (side, side, 3) uint8, one a class.   Splits: {"train": n, "val": n} scenes.
"""
import json
from pathlib import Path

import numpy as np
import pyarrow
from PIL import Image
from pyarrow import parquet


def draw(rng, textures, height, width):
    """A tilted wall (texture 0) and six spheres before it; focal length 0.9 * width, x right, y down, z forward.

    Returns: image (H, W, 3) uint8; depth (H, W) m; unit normal (H, W, 3), away from the camera; texture (H, W) uint8.
    """
    x, y = np.arange(width), np.arange(height)[:, None]
    rays = [(x - (width - 1) / 2) / (0.9 * width), (y - (height - 1) / 2) / (0.9 * width), 1.0]
    rays = np.stack(np.broadcast_arrays(*rays), -1)                                # (H, W, 3), z = 1
    wall = np.array([*rng.uniform(-0.2, 0.2, 2), 1])
    wall /= np.linalg.norm(wall)
    depth, normal = rng.uniform(4, 6) / (rays @ wall), np.broadcast_to(wall, rays.shape).copy()
    texture = np.zeros((height, width), np.uint8)
    for _ in range(6):
        center, radius = rng.uniform((-1.5, -1, 2), (1.5, 1, 3)), rng.uniform(0.25, 0.6)
        a, b, c = (rays**2).sum(-1), rays @ center, center @ center - radius**2
        near = (b - np.sqrt(np.maximum(b**2 - a * c, 0))) / a
        hit = (b**2 > a * c) & (near < depth)
        depth[hit], texture[hit] = near[hit], rng.integers(1, len(textures))
        normal[hit] = (center - rays[hit] * near[hit, None]) / radius
    image = np.array(textures)[texture, y % len(textures[0]), x % len(textures[0])]
    return image, depth.astype(np.float32), normal.astype(np.float32), texture


def scenes(textures, splits, seed, height, width):
    """(split, number, *draw(...)) of the scenes of all splits."""
    rng = np.random.default_rng(seed)
    for split, count in splits.items():
        for i in range(count):
            yield split, i, *draw(rng, textures, height, width)


def save(array, path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


def write_ade20k(root, textures, splits, seed=0, height=60, width=80):
    label_of = np.array([4, 1, 6, 8, 16, 20, 34, 45, 64, 93, 120, 132], np.uint8)       # label of texture 0, 1, ...
    root, folders = Path(root, "ADEChallengeData2016"), {"train": "training", "val": "validation"}
    for split, i, image, _, _, classes in scenes(textures, splits, seed, height, width):
        labels, name = label_of[classes], f"{folders[split]}/ADE_{split}_{i + 1:08d}"
        labels[:, :4] = 0                                                         # unlabeled border
        save(image, root / "images" / f"{name}.jpg", quality=95)
        save(labels, root / "annotations" / f"{name}.png")


def write_cityscapes(root, textures, splits, seed=1, height=64, width=128):
    id_of = np.array([7, 11, 23, 26, 24, 21, 33, 8, 12, 28, 17, 1], np.uint8)      # the last is not evaluated
    for split, i, image, _, _, classes in scenes(textures, splits, seed, height, width):
        city = ("aachen", "bochum")[i % 2]
        name = f"{split}/{city}/{city}_{i:06d}_000019"
        save(image, Path(root, "leftImg8bit", f"{name}_leftImg8bit.png"), compress_level=1)
        save(id_of[classes], Path(root, "gtFine", f"{name}_gtFine_labelIds.png"), compress_level=1)


def write_nyu_parquet(root, textures, splits, seed=2, height=48, width=64):
    """As tanganke/nyuv2, without its columns segmentation and normal: nested lists; a file per photo."""
    Path(root, "data").mkdir(parents=True)
    for split, i, image, depth, _, _ in scenes(textures, splits, seed, height, width):
        table = pyarrow.table({"image": [(image.transpose(2, 0, 1) / 255).tolist()], "depth": [depth[None].tolist()]})
        parquet.write_table(table, f"{root}/data/{split}-{i:05d}-of-{splits[split]:05d}.parquet")


def write_navi(root, textures, splits, seed=3, height=96, width=128, objects=2):
    """The spheres of scenes a tenth as large: wild_set and, in half as many images, one multiview scene per object.

    Returns: {(object, scene, name): (image, depth, normal, mask)}, upright; every second file has EXIF orientation 6.
    """
    rng, truth = np.random.default_rng(seed), {}
    marks = [split for split, count in splits.items() for _ in range(count)]
    for k in range(objects):
        for scene, its_marks in (("wild_set", marks[k::objects]), ("multiview-00-pixel_5", marks[k::2 * objects])):
            folder, rows = Path(root, f"object_{k}", scene), []
            for i, mark in enumerate(its_marks):
                h, w = (height, width) if i % 2 else (width, height)               # portrait is stored turned
                image, depth, normal, texture = draw(rng, textures, h, w)
                depth, mask, exif = depth / 10, texture > 0, Image.Exif()
                truth[f"object_{k}", scene, f"{i:03d}"] = image, depth, normal, mask
                if i % 2 == 0:
                    image, exif[0x0112] = np.rot90(image), 6                       # 6: turn clockwise to view
                save(image, folder / "images" / f"{i:03d}.jpg", quality=95, exif=exif)
                save(np.where(mask, np.round(655.35 / depth), 0).astype(np.uint16), folder / "depth" / f"{i:03d}.png")
                save(mask.astype(np.uint8) * 255, folder / "masks" / f"{i:03d}.png")
                row = {"filename": f"{i:03d}.jpg", "image_size": [h, w], "camera": {"focal_length": 0.9 * w}}
                rows.append(row | {"split": mark} if scene == "wild_set" else row)     # multiview scenes have no split
            (folder / "annotations.json").write_text(json.dumps(rows))
    return truth

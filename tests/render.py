"""Rendered stand-ins for ADE20K, Cityscapes, NYU and NAVI: real on-disk formats, exact depth, normals and classes.

    python tests/render.py OUT --photos DIR --train 200 --val 50     # OUT/{ade20k,cityscapes,nyu,navi}

A scene is a room of textured planes with boxes and spheres, seen by a pinhole camera (x right, y down, z forward). The
textures are photographs, one per class, so that classes can be told apart by what a backbone sees.
"""
import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

SUFFIXES = (".jpg", ".jpeg", ".png")


def load_textures(folder, count=12, side=384):
    """`count` photos of a folder as (side, side, 3) uint8, spread over the sorted names."""
    paths = sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in SUFFIXES)
    chosen = [paths[i * len(paths) // count] for i in range(count)]
    return [np.asarray(Image.open(path).convert("RGB").resize((side, side), Image.Resampling.BICUBIC)) for path in chosen]


def rotation(rng):
    """A random rotation matrix."""
    q, r = np.linalg.qr(rng.normal(size=(3, 3)))
    q = q * np.sign(np.diag(r))
    return q if np.linalg.det(q) > 0 else q[:, [1, 0, 2]]


def hit_plane(rays, normal, offset):
    """Depth and normal of the plane normal . x = offset along rays (..., 3) with z = 1; inf where missed."""
    slope = rays @ normal
    with np.errstate(divide="ignore"):
        depth = offset / slope
    return np.where(depth > 0, depth, np.inf), np.broadcast_to(normal, rays.shape)


def hit_sphere(rays, center, radius):
    a, b, c = (rays**2).sum(-1), rays @ center, center @ center - radius**2
    root = b**2 - a * c
    depth = np.where(root > 0, (b - np.sqrt(np.maximum(root, 0))) / a, np.inf)
    normal = (rays * np.where(np.isfinite(depth), depth, 0)[..., None] - center) / radius
    return np.where(depth > 0, depth, np.inf), normal


def hit_box(rays, center, half, turn):
    """`turn`: rotation from the box's axes to the camera's."""
    local, origin = rays @ turn, -center @ turn
    with np.errstate(divide="ignore"):
        near, far = np.sort(np.stack([(-half - origin) / local, (half - origin) / local]), axis=0)
    face, enter, leave = near.argmax(-1), near.max(-1), far.min(-1)
    depth = np.where((enter < leave) & (enter > 0), enter, np.inf)
    return depth, turn.T[face]


def render(shapes, textures, height, width, focal, texels_per_meter):
    """Ray cast `shapes`, a list of (hit function, arguments, texture index).

    Returns: image (H, W, 3) uint8; depth (H, W) float32 m; normal (H, W, 3) unit, away from the camera; index (H, W) of
    the shape that is seen.
    """
    x, y = np.arange(width) - (width - 1) / 2, np.arange(height) - (height - 1) / 2
    rays = np.stack(np.broadcast_arrays(x / focal, y[:, None] / focal, 1.0), -1)
    hits = [hit(rays, *arguments) for hit, arguments, _ in shapes]
    index = np.stack([depth for depth, _ in hits]).argmin(0)
    depth = np.stack([depth for depth, _ in hits]).min(0)
    normal = np.take_along_axis(np.stack([normal for _, normal in hits]), index[None, ..., None], 0)[0]
    normal = normal * np.sign((normal * rays).sum(-1, keepdims=True))
    image = np.zeros((height, width, 3))
    axes = np.array([[1, 2], [0, 2], [0, 1]])[np.abs(normal).argmax(-1)]           # texture plane: the two flat axes
    side = len(textures[0])
    uv = np.moveaxis(np.take_along_axis(rays * depth[..., None], axes, -1) * texels_per_meter, -1, 0).astype(int)
    u, v = np.abs((uv + side // 2) % (2 * side) - side + 0.5).astype(int)          # mirrored at its borders
    for i, (_, _, texture) in enumerate(shapes):
        image[index == i] = textures[texture][v[index == i], u[index == i]]
    light = 0.55 + 0.45 * np.abs(normal @ np.array([0.35, 0.75, 0.56]))
    return (image * light[..., None]).astype(np.uint8), depth.astype(np.float32), normal.astype(np.float32), index


def room(rng, n_textures, n_objects=6):
    """Shapes of a room: floor, walls, ceiling (textures 0..2), then boxes and spheres, each class with its texture."""
    tilt = rng.uniform(-0.08, 0.08, 2)
    planes = [((0.0, 1.0, tilt[0]), 1.4, 0), ((tilt[1], 0.0, 1.0), rng.uniform(4, 6), 1), ((1.0, 0.0, 0.1), 2.6, 1),
              ((-1.0, 0.0, 0.1), 2.6, 1), ((0.0, -1.0, 0.05), 1.5, 2)]
    shapes = [(hit_plane, (np.array(n) / np.linalg.norm(n), offset), texture) for n, offset, texture in planes]
    for _ in range(n_objects):
        size, texture = rng.uniform(0.25, 0.6), int(rng.integers(3, n_textures))
        center = np.array([rng.uniform(-1.5, 1.5), rng.uniform(-0.6, 1.0), rng.uniform(2, 4)])
        if texture % 2:
            shapes.append((hit_sphere, (center, size), texture))
        else:
            shapes.append((hit_box, (center, size * rng.uniform(0.6, 1, 3), rotation(rng)), texture))
    return shapes


def near_object(rng, n_textures):
    """Shapes of one NAVI-like object, 10 cm wide at 30 cm (a box and a sphere), before a wall; shape 0 is the wall."""
    texture, center = int(rng.integers(3, n_textures)), np.array([*rng.uniform(-0.02, 0.02, 2), rng.uniform(0.28, 0.34)])
    side = rng.choice([-1, 1], 3) * 0.045
    return [(hit_plane, (np.array([0.1, 0.1, 0.99]), 0.7), int(rng.integers(0, 3))),
            (hit_box, (center, rng.uniform(0.04, 0.07, 3), rotation(rng)), texture),
            (hit_sphere, (center + side, rng.uniform(0.03, 0.05)), (texture + 1) % n_textures)]


def draw(rng, textures, height, width):
    """A rendered room, with `classes` (H, W): the texture index of what is seen."""
    shapes = room(rng, len(textures))
    image, depth, normal, index = render(shapes, textures, height, width, 0.9 * width, 0.3 * width)
    return image, depth, normal, np.array([texture for _, _, texture in shapes], np.uint8)[index]


# ----------------------------------------------------------------------------------------------------------------------
# Writers, one a benchmark; splits = {"train": n, "val": n}; height x width of the photos

ADE_LABELS = np.array([4, 1, 6, 8, 16, 20, 34, 45, 64, 93, 120, 132], np.uint8)
CITYSCAPES_IDS = np.array([7, 11, 23, 26, 24, 21, 33, 8, 12, 28, 17, 1], np.uint8)     # the last is not evaluated


def write_ade20k(root, textures, splits, seed=0, height=480, width=640):
    rng = np.random.default_rng(seed)
    for split, count in splits.items():
        folder = {"train": "training", "val": "validation"}[split]
        images, annotations = (Path(root, "ADEChallengeData2016", kind, folder) for kind in ("images", "annotations"))
        images.mkdir(parents=True), annotations.mkdir(parents=True)
        for i in range(count):
            image, _, _, classes = draw(rng, textures, height, width)
            labels = ADE_LABELS[classes]
            labels[:, :4] = 0                                                     # unlabeled border
            Image.fromarray(image).save(images / f"ADE_{split}_{i + 1:08d}.jpg", quality=95)
            Image.fromarray(labels).save(annotations / f"ADE_{split}_{i + 1:08d}.png")


def write_cityscapes(root, textures, splits, seed=1, height=448, width=896, suffix=""):
    """suffix="_trainvaltest" writes the other folder layout."""
    rng = np.random.default_rng(seed)
    for split, count in splits.items():
        for i in range(count):
            city, name = ("aachen", "bochum")[i % 2], f"{('aachen', 'bochum')[i % 2]}_{i:06d}_000019"
            image, _, _, classes = draw(rng, textures, height, width)
            for kind, end, array in (("leftImg8bit", "leftImg8bit", image), ("gtFine", "gtFine_labelIds", CITYSCAPES_IDS[classes])):
                folder = Path(root, f"{kind}{suffix}", kind, split, city) if suffix else Path(root, kind, split, city)
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(folder / f"{name}_{end}.png", compress_level=1)


def write_nyu_parquet(root, textures, splits, seed=2, height=288, width=384):
    """As tanganke/nyuv2: the features `datasets` writes for it, two files for the training split."""
    from datasets import Array2D, Array3D, Dataset, Features

    features = Features(image=Array3D((3, height, width), "float32"), segmentation=Array2D((height, width), "int64"),
                        depth=Array3D((1, height, width), "float32"), normal=Array3D((3, height, width), "float32"))
    rng = np.random.default_rng(seed)
    Path(root, "data").mkdir(parents=True)
    for split, count in splits.items():
        rows = []
        for _ in range(count):
            image, depth, normal, classes = draw(rng, textures, height, width)
            rows.append({"image": image.transpose(2, 0, 1).astype(np.float32) / 255, "segmentation": classes.astype(np.int64),
                         "depth": depth[None], "normal": normal.transpose(2, 0, 1)})
        table, shards = Dataset.from_list(rows, features=features), min(2, count) if split == "train" else 1
        for k in range(shards):
            table.shard(shards, k, contiguous=True).to_parquet(f"{root}/data/{split}-{k:05d}-of-{shards:05d}.parquet")


def write_nyu_mat(root, textures, splits, seed=2, height=480, width=640, split_format="v5"):
    """As nyu_depth_v2_labeled.mat (v7.3, MATLAB's order) and splits.mat (MATLAB 5; "v7.3": HDF5 as well)."""
    import h5py
    from scipy.io import savemat

    rng, total = np.random.default_rng(seed), sum(splits.values())
    Path(root).mkdir(parents=True, exist_ok=True)
    with h5py.File(Path(root, "nyu_depth_v2_labeled.mat"), "w", userblock_size=512) as file:
        images = file.create_dataset("images", (total, 3, width, height), "uint8", compression="gzip")
        depths = file.create_dataset("depths", (total, width, height), "float32", compression="gzip")
        for i in range(total):
            image, depth, _, _ = draw(rng, textures, height, width)
            images[i], depths[i] = image.T, depth.T
    numbers = np.arange(1, total + 1, dtype=np.float64)[:, None]
    parts = {"trainNdxs": numbers[: splits["train"]], "testNdxs": numbers[splits["train"]:]}
    if split_format == "v5":
        savemat(Path(root, "splits.mat"), parts)
    else:
        with h5py.File(Path(root, "splits.mat"), "w", userblock_size=512) as file:
            for key, value in parts.items():
                file[key] = value.T


def write_navi(root, textures, splits, seed=3, height=480, width=640, objects=5, multiview=True):
    """wild_set (train and val images of `splits`) and, in half as many images, one multiview scene per object.

    Every second photo is stored turned, with EXIF orientation 6; depth, masks and image_size are upright, as in NAVI.
    Returns: {(object, scene, name): (image, depth, normal, mask)}, upright, full resolution.
    """
    rng, truth = np.random.default_rng(seed), {}
    marks = [split for split, count in splits.items() for _ in range(count)]
    for k in range(objects):
        for scene, mine in (("wild_set", marks[k::objects]), ("multiview-00-pixel_5", marks[k::objects][::2])):
            if scene == "wild_set" or multiview:
                rows = [write_navi_image(Path(root, f"object_{k}", scene), f"{i:03d}", mark, textures, rng, height, width, truth)
                        for i, mark in enumerate(mine)]
                Path(root, f"object_{k}", scene, "annotations.json").write_text(json.dumps(rows))
    return truth


def write_navi_image(folder, name, split, textures, rng, height, width, truth):
    """Write one photo with its depth and mask.  -> its row of annotations.json."""
    turned = int(name) % 2 == 0
    h, w, focal = (width, height, 1.3 * width) if turned else (height, width, 1.3 * width)     # phones: portrait is turned
    image, depth, normal, index = render(near_object(rng, len(textures)), textures, h, w, focal, focal / 0.4)
    mask = index > 0
    code = np.where(mask, np.round(655.35 / depth), 0).astype(np.uint16)
    for kind in ("images", "depth", "masks"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    photo, exif = Image.fromarray(image), Image.Exif()
    if turned:
        photo, exif[0x0112] = photo.transpose(Image.Transpose.ROTATE_90), 6      # 6: turn clockwise to view
    photo.save(folder / "images" / f"{name}.jpg", quality=95, exif=exif)
    Image.fromarray(code).save(folder / "depth" / f"{name}.png")
    Image.fromarray(mask.astype(np.uint8) * 255).save(folder / "masks" / f"{name}.png")
    truth[(*folder.parts[-2:], name)] = image, depth, normal, mask
    camera = {"q": [1.0, 0.0, 0.0, 0.0], "t": [0.0, 0.0, 0.0], "focal_length": focal, "camera_model": "pixel_5"}
    row = {"object_id": folder.parts[-2], "camera": camera, "filename": f"{name}.jpg", "image_size": [h, w],
           "scene_name": folder.name, "occluded": False}
    return row | {"split": split} if folder.name == "wild_set" else row        # the multiview scenes have no split


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--photos", required=True, help="folder of photographs for the textures")
    parser.add_argument("--train", type=int, default=200)
    parser.add_argument("--val", type=int, default=50)
    args = parser.parse_args()
    textures, splits = load_textures(args.photos), {"train": args.train, "val": args.val}
    write_ade20k(args.out / "ade20k", textures, splits)
    write_cityscapes(args.out / "cityscapes", textures, splits)
    write_nyu_parquet(args.out / "nyu", textures, splits)
    write_navi(args.out / "navi", textures, splits, multiview=False)


if __name__ == "__main__":
    main()

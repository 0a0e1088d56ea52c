"""How good are features, at what cost?  PASCAL VOC by a linear probe that converges, over random halves of the images.

    python tests/voc.py --data_dir VOC2012 --ckpt a.pt b.pt --plot voc.png

Central squares; logistic regression by 60 iterations of L-BFGS on standardized features of 100,000 output cells, their
labels the shares of the classes.  Prints a Markdown table: the mIoU of the other halves at 224 px; BRIXEL's differences
to the ViT at the same size, to the ViT at about the same cost and to the first checkpoint, in pairs of one split, with
the standard error; GFLOPs; and median milliseconds, of one image on the CPU.
"""
import argparse
import itertools
import json
import sys
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

sys.path.insert(0, str(Path(__file__).parents[1]))
from compare import side_of_same_cost

import brixel
from probe import Classes, gflops, milliseconds


def squares(paths, side, resample=Image.Resampling.BICUBIC):
    """Central squares of photos, (N, side, side, 3), or of masks, (N, side, side); uint8."""
    return torch.from_numpy(np.stack([ImageOps.fit(Image.open(path), (side, side), resample) for path in paths]))


def miou_of_split(maps, labels, split, cells=100_000):
    """Percent.   maps: (N, C, h, w).   labels: (N, 224, 224), 255: void."""
    generator, readout, pairs = torch.Generator().manual_seed(split), Classes(21), []
    fitted, tested = torch.randperm(len(labels), generator=generator).chunk(2)
    for i in fitted:
        share = F.one_hot(labels[i].long().clamp(max=21), 22)[..., :21].permute(2, 0, 1).float()
        share = F.adaptive_avg_pool2d(share, maps.shape[2:]).flatten(1).T               # (h*w, 21)
        some = torch.randperm(len(share), generator=generator)[:cells // len(fitted)]
        some = some[share[some].sum(1) > 0.5]                      # without cells that are mostly void
        pairs.append((maps[i].flatten(1).T[some].float(), F.normalize(share[some], p=1, dim=1)))
    x, y = map(torch.cat, zip(*pairs))                             # (cells, C), (cells, 21)
    std, mean = torch.std_mean(x, dim=0)
    x.sub_(mean).div_(std)
    W, b = torch.zeros(21, len(std), requires_grad=True), torch.zeros(21, requires_grad=True)
    optimizer = torch.optim.LBFGS([W, b], max_iter=60, max_eval=600, history_size=20, line_search_fn="strong_wolfe",
                                  tolerance_grad=0, tolerance_change=0)

    def closure():
        loss = F.cross_entropy(F.linear(x, W, b), y) + 1e-4 * W.square().sum()
        W.grad, b.grad = torch.autograd.grad(loss, (W, b))
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    for batch in tested.split(8):
        standardized = (maps[batch].float() - mean[:, None, None]) / std[:, None, None]
        logits = F.conv2d(standardized, W.detach()[:, :, None, None], b.detach())
        readout.update(F.interpolate(logits, size=labels.shape[1:], mode="bilinear"), {"label": labels[batch]})
    return 100 * readout.compute()["miou"]


def measure(args, networks, backbone):
    """{(row, size): [mIoU of each split]}, from --out where it holds them, and the number of images.

    networks: {(row, size): the backbone or a Brixel}.
    """
    masks, mious = sorted(Path(args.data_dir, "SegmentationClass").glob(f"{args.images}.png")), {}
    photos = [Path(args.data_dir, "JPEGImages", f"{mask.stem}.jpg") for mask in masks]
    labels = squares(masks, 224, Image.Resampling.NEAREST)
    records = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    for (row, size), network in networks.items():
        weights = zlib.crc32(b"".join(x.numpy().tobytes() for x in network.state_dict().values()))
        key = {"weights": weights, "size": size, "images": args.images, "splits": args.splits}
        record = next((record for record in records if key.items() <= record.items()), None)
        if not record:
            pixels = squares(photos, size).permute(0, 3, 1, 2)
            maps = torch.cat([network(brixel.normalize(x, backbone)).half() for x in pixels.split(8)])
            record = {"row": row, **key, "miou": [miou_of_split(maps, labels, i) for i in range(args.splits)]}
            with args.out.open("a") as file:
                print(json.dumps(record), file=file)
        mious[row, size] = record["miou"]
    return mious, len(photos)


def difference(mious, others):
    """Mean of mious - others, split by split, with its standard error."""
    better = np.subtract(mious, others)
    return f"{better.mean():+.2f}" + (f" ± {better.std(ddof=1) / len(better)**0.5:.2f}" if len(better) > 1 else "")


def draw(path, brix, mious, costs, conditions):
    """mIoU over GFLOPs and over milliseconds.   brix: the checkpoint.   mious, costs: {(row, size): numbers}."""
    from matplotlib.figure import Figure

    looks = {"ViT": ("ViT, upsampled bilinearly", "0.4", (6, -3), "left", "top"),
             brix: ("BRIXEL", "tab:red", (-6, 3), "right", "bottom")}
    figure = Figure(figsize=(9, 4.4), dpi=150, layout="constrained")
    figure.suptitle("Segmentation of PASCAL VOC by frozen features, against the cost of the features")
    figure.supxlabel(conditions, fontsize=8.5, color="0.3")
    for axis, i, label in zip(figure.subplots(1, 2, sharey=True), (0, 1), ("GFLOPs", "milliseconds")):
        for row, (name, color, offset, ha, va) in looks.items():
            sizes = [size for other, size in mious if other == row]
            sizes = [n for n in sizes if not any(1 < n / other < 1.07 for other in sizes)]      # labels need room
            x, y = [costs[row, size][i] for size in sizes], [np.mean(mious[row, size]) for size in sizes]
            bars = [np.std(mious[row, size], ddof=1) / len(mious[row, size])**0.5 for size in sizes]
            axis.errorbar(x, y, bars, fmt="o-", color=color, capsize=3, label=name)
            for size, *point in zip(sizes, x, y):
                axis.annotate(f"{size} px", point, offset, color=color, ha=ha, va=va, textcoords="offset points",
                              bbox={"boxstyle": "square,pad=0", "color": "white", "alpha": 0.8})
        axis.set(xlabel=f"{label} per image", ylabel="mIoU, %", xmargin=0.2)
        axis.grid(alpha=0.3)
        axis.label_outer()
    axis.legend(loc="lower right")
    figure.savefig(path)


@torch.no_grad()
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True, help="VOC2012 as it is unpacked: JPEGImages, SegmentationClass")
    parser.add_argument("--images", default="2007_*", help="pattern of the images' names [2007_*: 632 with masks]")
    parser.add_argument("--ckpt", nargs="+", required=True, help="checkpoints of one backbone")
    parser.add_argument("--size", type=int, nargs="+", default=[112, 168, 224], help="of BRIXEL's image, pixels")
    parser.add_argument("--vit_size", type=int, nargs="+", default=[112, 154, 168, 224, 238, 308, 336],
                        help="of the image that the ViT alone sees, pixels")
    parser.add_argument("--splits", type=int, default=5, help="how often the images are halved at random")
    parser.add_argument("--repeats", type=int, default=10, help="timed calls of each row, in turns")
    parser.add_argument("--out", default="voc.jsonl", type=Path, help="results; what it holds is not measured again")
    parser.add_argument("--plot", help="picture to be drawn: mIoU of the ViT and of the first checkpoint, against cost")
    args = parser.parse_args(argv)
    models = {path: brixel.load(path).requires_grad_(False) for path in args.ckpt}
    first, backbone = args.ckpt[0], models[args.ckpt[0]].backbone
    networks = {("ViT", size): backbone for size in args.vit_size}
    networks |= {(path, size): models[path] for path, size in itertools.product(models, args.size)}
    mious, n_images = measure(args, networks, backbone)
    calls = [partial(network, torch.randn(1, 3, size, size)) for (_, size), network in networks.items()]
    costs = dict(zip(networks, zip(map(gflops, calls), milliseconds(calls, args.repeats))))
    print(f"| {n_images} images | px | mIoU | less ViT, same size | less ViT, same cost | less {first} | GFLOPs | ms |")
    print(f"|{'---|' * 8}")
    for (row, size), values in mious.items():
        others = ("ViT", size), ("ViT", side_of_same_cost(size, backbone.patch_size)), (first, size)
        cells = [difference(values, mious[other]) if "ViT" != row != other[0] and other in mious else ""
                 for other in others]
        cells += [f"{cost:.1f}" for cost in costs[row, size]]
        print(f"| {' | '.join([row, str(size), f'{np.mean(values):.2f}', *cells])} |", flush=True)
    if args.plot:
        vit = {"sample": "DINOv2 ViT-S/14"}.get(backbone.name, backbone.name)
        draw(args.plot, first, mious, costs, f"{n_images} images, converged linear probe, {vit}, CPU (threads: "
             f"{torch.get_num_threads()}); bars: standard error over {args.splits} random halves of the images")


if __name__ == "__main__":
    main()

"""How good are checkpoints as features?  PASCAL VOC by a linear probe that converges, over random halves of the images.

    python tests/voc.py --data_dir VOC --ckpt a.pt b.pt --size 112 168 224

Central squares; logistic regression by 60 iterations of L-BFGS on standardized features of 100,000 output cells, their
labels the shares of the classes.  Prints the other half's mIoU at 224 px and the difference to the first checkpoint.
"""
import argparse
import itertools
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

sys.path.insert(0, str(Path(__file__).parents[1]))
import brixel
from probe import Classes


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

    optimizer.step(closure)
    for batch in tested.split(8):
        standardized = (maps[batch].float() - mean[:, None, None]) / std[:, None, None]
        logits = F.conv2d(standardized, W.detach()[:, :, None, None], b.detach())
        readout.update(F.interpolate(logits, size=labels.shape[1:], mode="bilinear"), {"label": labels[batch]})
    return 100 * readout.compute()["miou"]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True, help="holds JPEGImages and SegmentationClass")
    parser.add_argument("--ckpt", nargs="+", required=True, help="checkpoints of one backbone")
    parser.add_argument("--size", type=int, nargs="+", default=[112, 168, 224])
    parser.add_argument("--splits", type=int, default=5)
    args = parser.parse_args(argv)
    masks = sorted(Path(args.data_dir, "SegmentationClass").glob("*.png"))
    photos = [Path(args.data_dir, "JPEGImages", f"{mask.stem}.jpg") for mask in masks]
    labels = squares(masks, 224, Image.Resampling.NEAREST)
    for size, row in itertools.product(args.size, [*args.ckpt, "ViT"]):
        model = brixel.load(args.ckpt[0] if row == "ViT" else row).requires_grad_(False)
        network, pixels = model.backbone if row == "ViT" else model, squares(photos, size).permute(0, 3, 1, 2)
        maps = torch.cat([network(brixel.normalize(x, model.backbone)).half() for x in pixels.split(8)])
        mious = [miou_of_split(maps, labels, split) for split in range(args.splits)]
        first = mious if row == args.ckpt[0] else first
        better = np.subtract(mious, first)                         # split by split, with the standard error of the mean
        error = f" ± {better.std(ddof=1) / len(better)**0.5:.2f}" if len(better) > 1 else ""
        print(f"{row}, {size} px: mIoU {np.mean(mious):.2f}, difference {better.mean():+.2f}{error}")


if __name__ == "__main__":
    main()

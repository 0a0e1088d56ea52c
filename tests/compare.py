"""Is BRIXEL worth its price?  Beside larger images and other upsamplers, on photographs it was not trained on.

    python tests/compare.py --photos PHOTOS --size 224 --ckpt a.pt b.pt --hub wimmerth/anyup:anyup_multi_backbone

The teacher sees the central square of each photo at `scale` times --size, all others see that made smaller.  Rows:
"bilinear" enlarges the ViT's map, "ViT at N px" that of a larger image; --ckpt; upsamplers of torch.hub, called as
AnyUp is: (image, features, output_size), with the ViT's image.  Prints Markdown: means; median milliseconds, for "ViT
at N px" of the whole ViT; differences to the first checkpoint with standard errors, and on how many photos better.
"""
import argparse
import contextlib
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate.utils import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
import brixel
import data
from probe import milliseconds

TERMS = ("l1", "cosine", "edge", "spectral")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def side_of_same_cost(size, patch_size):
    """Side, in pixels, at which the ViT alone costs about what it costs at `size` with BRIXEL."""
    return brixel.nearest_side(1.375 * size, patch_size)


def make_rows(args):
    """(first model, {row: (side of the ViT's image, its upsampler(image, layers))})."""
    models = {path: brixel.load(path).to(DEVICE) for path in args.ckpt}
    if len({str([model.settings[key] for key in ("backbone", "weights", "scale")]) for model in models.values()}) > 1:
        raise brixel.BrixelError(f"{', '.join(models)} differ in backbone, weights or scale (--ckpt)")
    first, p = models[args.ckpt[0]], models[args.ckpt[0]].backbone.patch_size
    size = (first.scale * args.size // p,) * 2                    # of the teacher's map

    def bilinear(image, layers):
        return F.interpolate(layers[-1], size=size, mode="bilinear")

    sides = args.vit_size or [side_of_same_cost(args.size, p)]
    rows = {"bilinear": (args.size, bilinear)} | {f"ViT at {side} px": (side, bilinear) for side in sides}
    rows |= {f"BRIXEL {path}": (args.size, model.upsampler) for path, model in models.items()}
    for name in args.hub:
        with brixel.one_sentence(f"cannot load {name} (--hub OWNER/REPO:NAME or FOLDER:NAME)"):
            repo, _, entry = name.rpartition(":")
            hub = torch.hub.load(repo, entry, source="local" if Path(repo).is_dir() else "github", trust_repo=True)
        rows[name] = args.size, lambda x, layers, hub=hub.to(DEVICE).eval(): hub(x, layers[-1], output_size=size)
    return first, rows


@torch.no_grad()
def measure(args, model, rows):
    """({row: [errors of each photo]}, {row: (ms without the ViT, ms with it)}), ms on the last photo."""
    index, layers_of, found = data.PhotoIndex(args.photos, "--photos"), model.backbone.layers, {row: [] for row in rows}
    for i in tqdm(range(len(index))):
        with brixel.one_sentence(index.name(i)):
            crop = data.read_crop(index.open(i), model.scale * args.size)[None].to(DEVICE)
        photo = brixel.normalize(crop, model.backbone)                                  # as brixel.frozen_pass
        images = {side: F.interpolate(photo, size=side, mode="bicubic", antialias=True) for side, _ in rows.values()}
        layers = {side: layers_of(image) for side, image in images.items()}
        teacher = model.backbone(photo)
        for row, (side, upsampler) in rows.items():
            _, terms = brixel.brixel_loss(upsampler(images[side], layers[side]), teacher, lambda_cosine=1)
            terms["cosine"] = 1 - terms["cosine"]
            found[row].append({term: value.item() for term, value in terms.items()})
    parts = [lambda n=side, f=upsampler: f(images[n], layers[n]) for side, upsampler in rows.values()]
    wholes = [lambda n=side, f=upsampler: f(images[n], layers_of(images[n])) for side, upsampler in rows.values()]
    ms = milliseconds(parts + wholes, args.repeats)
    pairs = zip(rows, ms, ms[len(rows):])
    return found, {row: (part if rows[row][0] == args.size else whole, whole) for row, part, whole in pairs}


def paired(photos, reference, term):
    """Mean difference of a term to `reference`, its standard error, and (on how many photos it is better)."""
    sign, differences = 1 if term == "cosine" else -1, [a[term] - b[term] for a, b in zip(photos, reference)]
    spread = f" ± {statistics.stdev(differences) / len(photos)**0.5:.3f}" if len(photos) > 1 else ""
    return f"{statistics.mean(differences):+.3f}{spread} ({sum(sign * d > 0 for d in differences)})"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", required=True, help="folder or pattern of photographs; small ones are enlarged")
    parser.add_argument("--size", type=int, default=112, help="side of the student's image, pixels")
    parser.add_argument("--vit_size", type=int, nargs="+", help="sides of the larger images that the ViT alone sees; "
                        "default: the one at which it costs about what BRIXEL does, 1.375 times --size")
    parser.add_argument("--ckpt", nargs="+", required=True, help="BRIXEL checkpoints; all is compared with the first")
    parser.add_argument("--hub", nargs="+", default=[], help="OWNER/REPO:NAME or FOLDER:NAME, whose code is run")
    parser.add_argument("--repeats", type=int, default=10, help="timed calls of each row, in turns")
    args = parser.parse_args(argv)
    with brixel.command_line("compare.py"), contextlib.redirect_stdout(sys.stderr):     # whatever a hub prints
        model, rows = make_rows(args)
        found, times = measure(args, model, rows)
    first, px = f"BRIXEL {args.ckpt[0]}", model.scale * args.size
    print(f"| {args.size} -> {px} px, {len(found[first])} photos, {DEVICE} | L1 | cosine | edge | spectral "
          f"| ms without ViT | ms with ViT | Δ L1 (better) | Δ cosine (better) | Δ edge (better) |\n|{'---|' * 10}")
    for row, photos in found.items():
        cells = [f"{statistics.mean(photo[term] for photo in photos):.3f}" for term in TERMS]
        cells += [f"{ms:.1f}" for ms in times[row]]
        cells += ["" if row == first else paired(photos, found[first], term) for term in TERMS[:3]]
        print(f"| {' | '.join([row, *cells])} |")


if __name__ == "__main__":
    main()

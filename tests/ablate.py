"""What each part of a recipe is worth: one short run per variant and seed, at equal samples.

    python tests/ablate.py --data_dir PHOTOS --val_dir OTHER_PHOTOS --out ablation.jsonl

All have the same crops and teacher's maps; a seed sets weights, order and stochastic depth.  Errors are those of the
central crops of photographs that are not trained on.  A run that --out holds is not made again.  Prints a Markdown
table: mean and standard deviation over the seeds.  Other flags are those of brixel.py and hold for all runs.
"""
import argparse
import itertools
import json
import statistics
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch
from accelerate import Accelerator
from accelerate.utils import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
import brixel
import data

TERMS = ("l1", "cosine", "edge", "spectral")
COMMON = ("--backbone sample --teacher_size 448 --min_side 256 --val_share 0.02 --batch_size 8 --mixed_precision no "
          "--num_workers 0 --eval_every 100000 --save_every 100000 --max_steps 700 --cache_crops 1480 "
          "--warmup_epochs 0.27").split()                         # 50 steps
VARIANTS = {
    "paper": "--preset paper",
    "best": "--preset best",
    "best, no full-rank layer": "--preset best --no-full_rank",
    "best, Adam": "--preset best --optimizer adam --lr 1e-3",
    "best, constant learning rate": "--preset best --lr_decay 0",
    "best, no cosine term": "--preset best --lambda_cosine 0",
    "best, the paper's weights of edge and spectral loss": "--preset best --lambda_edge 1 --lambda_spectral 0.1",
    "paper, lambda_spectral 0.03": "--preset paper --lambda_spectral 0.03",
    "paper, no fftshift": "--preset paper",
    "paper, head started at random": "--preset paper",
}


class RandomHead(brixel.Head):
    """A head whose last layer starts at random, not at zero."""
    def __init__(self, *args):
        super().__init__(*args)
        self.out.reset_parameters()


# What is replaced in brixel.py while a variant is trained that no setting tells apart
REPLACED = {
    "paper, no fftshift": {"ring_index": lambda H, W, *args, ring_index=brixel.ring_index:
                           torch.fft.fftshift(ring_index(H, W, *args).view(H, W)).flatten()},
    "paper, head started at random": {"Head": RandomHead},
}


def all_maps(cfg, accelerator):
    """What brixel.cached_pass keeps of all training crops."""
    backbone, kept, index = brixel.load_backbone(cfg.backbone, cfg.weights), {}, data.PhotoIndex(cfg.data_dir)
    ids, crops = data.split(len(index), cfg.val_share), range(cfg.cache_crops)
    for numbers, images, _ in tqdm(data.make_loaders(cfg, index, *ids, crops, accelerator)[0], desc="teacher maps"):
        brixel.cached_pass(kept, numbers, images, backbone, cfg.scale, accelerator)
    return kept


def train(flags, replaced, kept, photos, accelerator):
    """Train on the crops whose maps are `kept`.   Returns: mean errors of bilinear and of BRIXEL on `photos`."""
    with (tempfile.TemporaryDirectory() as folder, mock.patch("brixel.Run.finish"),
          mock.patch("brixel.cached_pass", lambda _, *inputs, real=brixel.cached_pass: real(kept, *inputs)),
          mock.patch("data.read_crop", lambda *_, **__: torch.empty(0)),                 # nothing is decoded
          mock.patch.dict(vars(brixel), replaced)):
        brixel.main([*flags, "--out", f"{folder}/out.pt"])
        model = brixel.load(f"{folder}/out.pt")
    return brixel.evaluate(model, photos, accelerator)[0]         # all by the same losses


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--val_dir", required=True, help="folder of photos that are not trained on")
    parser.add_argument("--val", type=int, default=60, help="how many of them, evenly spaced")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--variants", nargs="+", default=["paper", "best"], choices=list(VARIANTS))
    parser.add_argument("--out", default="ablation.jsonl", type=Path)
    args, flags = parser.parse_known_args(argv)
    cfg = brixel.load_config([*COMMON, *flags], "preset", "paper", "")       # its seed is that of the crops
    accelerator, index = Accelerator(mixed_precision="no", cpu=True), data.PhotoIndex(args.val_dir, "--val_dir")
    files = [index.open(i * len(index) // args.val) for i in range(args.val)]
    photos = [(0, data.read_crop(file, cfg.teacher_size[0])[None]) for file in files]
    kept = all_maps(cfg, accelerator)
    records = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    for seed, variant in itertools.product(args.seeds, args.variants):
        key = {"variant": variant, "seed": seed, "flags": flags}
        if not any(key.items() <= record.items() for record in records):
            run = [*COMMON, *flags, *VARIANTS[variant].split(), "--seed", str(seed)]
            records.append(key | train(run, REPLACED.get(variant, {}), kept, photos, accelerator))
            args.out.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    print(f"| variant | seeds | {' | '.join(TERMS)} |\n|{'---|' * 6}")
    for name in dict.fromkeys(["bilinear", *(record["variant"] for record in records)]):
        runs = [record for record in records if record["variant"] == name] or records[:1]     # all hold bilinear's
        prefix = "bilinear" if name == "bilinear" else "brixel"
        values = [[run[f"{prefix} {term}"] for run in runs] for term in TERMS]
        cells = [f"{statistics.mean(x):.3f}" + (f" ± {statistics.stdev(x):.3f}" if len(x) > 1 else "") for x in values]
        print(f"| {name} | {len(runs)} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()

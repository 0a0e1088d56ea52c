"""What each part of a recipe is worth: one short run per variant and seed, at equal samples.

    python tests/ablate.py --data_dir PHOTOS --val_dir OTHER_PHOTOS --out ablation.jsonl

The crops, and so the teacher's maps, are the same for all variants and seeds; a seed sets weights, order and
stochastic depth.  Errors are those of the central crops of photographs that are not trained on.  The lines of --out
are kept: a run that is there is not made again.  Prints a Markdown table: mean and standard deviation over the seeds.
Other flags are those of brixel.py and hold for all runs: --max_steps, --cache_crops, --backbone and so on.
"""
import argparse
import itertools
import json
import statistics
import sys
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
import brixel
import data

TERMS = ("l1", "edge", "spectral", "cosine")
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
}


def train(flags, kept):
    """Train on the crops whose maps are `kept`.   Returns: the upsampler."""
    with (tempfile.TemporaryDirectory() as folder, mock.patch("brixel.finish"),          # errors() measures
          mock.patch("brixel.remembered_pass", lambda _, *inputs, real=brixel.remembered_pass: real(kept, *inputs)),
          mock.patch("data.read_crop", lambda *_, **__: torch.empty(0))):                # nothing is decoded
        brixel.main([*flags, "--out", f"{folder}/out.pt"])
        return brixel.load(f"{folder}/out.pt").upsampler


def all_maps(cfg, val_dir, val):
    """What brixel.remembered_pass keeps of all training crops; frozen_pass of `val` other photos, evenly spaced."""
    frozen = brixel.load_backbone(cfg.backbone, cfg.weights), cfg.scale, Accelerator(mixed_precision="no", cpu=True)
    kept, index, others = {}, data.PhotoIndex(cfg.data_dir), data.PhotoIndex(val_dir, "--val_dir")
    side = int(np.ravel(cfg.teacher_size)[0])
    ids, crops = data.split(len(index), cfg.val_share), range(cfg.cache_crops)
    for numbers, images, *_ in tqdm(data.make_loaders(cfg, index, *ids, crops, frozen[-1])[0], desc="teacher maps"):
        brixel.remembered_pass(kept, numbers, images, *frozen)
    photos = [data.read_crop(others.open(i * len(others) // val), side) for i in range(val)]
    return kept, [brixel.frozen_pass(photo[None], *frozen) for photo in photos]


@torch.no_grad()
def errors(upsampler, held_out):
    """{term: mean over the photos}; upsampler None: bilinear."""
    found = []
    for small, layers, teacher in held_out:
        bilinear = F.interpolate(layers[-1], teacher.shape[2:], mode="bilinear")
        _, terms = brixel.brixel_loss(upsampler(small, layers) if upsampler else bilinear, teacher, lambda_cosine=1)
        found.append(terms | {"cosine": 1 - terms["cosine"]})
    return {term: statistics.mean(terms[term].item() for terms in found) for term in TERMS}


def print_table(records):
    """Markdown: a line per variant, mean and standard deviation over its seeds."""
    print("| variant | seeds | L1 | edge | spectral | cosine |\n|---|---|---|---|---|---|")
    for variant in dict.fromkeys(record["variant"] for record in records):
        runs = [record for record in records if record["variant"] == variant]
        values = [[run[term] for run in runs] for term in TERMS]
        cells = [f"{statistics.mean(x):.3f}" + (f" ± {statistics.stdev(x):.3f}" if len(x) > 1 else "") for x in values]
        print(f"| {variant} | {len(runs)} | {' | '.join(cells)} |")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--val_dir", required=True, help="folder of photos that are not trained on")
    parser.add_argument("--val", type=int, default=60, help="how many of them")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--variants", nargs="+", default=["paper", "best"], choices=list(VARIANTS))
    parser.add_argument("--out", default="ablation.jsonl")
    args, flags = parser.parse_known_args(argv)
    cfg = brixel.load_config([*COMMON, *flags], "preset", "paper", "")       # its seed is that of the crops
    out, (kept, held_out) = Path(args.out), all_maps(cfg, args.val_dir, args.val)
    records = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    for seed, variant in itertools.product(args.seeds, args.variants):
        key = {"variant": variant, "seed": seed, "flags": flags}
        if not any(key.items() <= record.items() for record in records):
            upsampler = train([*COMMON, *flags, *VARIANTS[variant].split(), "--seed", str(seed)], kept)
            records.append(key | errors(upsampler, held_out))
            out.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    print_table([{"variant": "bilinear", **errors(None, held_out)}, *records])


if __name__ == "__main__":
    main()

"""What each part of a recipe is worth: one short run per variant and seed, at equal samples.

    python tests/ablate.py --data_dir PHOTOS --val_dir OTHER_PHOTOS --out ablation.jsonl

The crops, and so the cached teacher maps, are the same for all variants and seeds; a seed sets weights, order and
stochastic depth.  Errors are those of the central crops of photographs that are not trained on.  The lines of --out
are kept: a run that is there is not made again.  Prints a Markdown table: mean and standard deviation over the seeds.
"""
import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).parents[1]))
import brixel
import data

TERMS = ("l1", "edge", "spectral", "cosine")
COMMON = {"backbone": "sample", "teacher_size": 448, "min_side": 256, "val_share": 0.02, "batch_size": 8,
          "mixed_precision": "no", "num_workers": 0, "eval_every": 100000, "save_every": 100000}
# variant: (preset, settings that differ from it)
VARIANTS = {
    "paper": ("paper", {}),
    "best": ("best", {}),
    "best, no full-rank layer": ("best", {"full_rank": False}),
    "best, Adam": ("best", {"optimizer": "adam", "lr": 1e-3}),
    "best, constant learning rate": ("best", {"lr_decay": 0.0}),
    "best, no cosine term": ("best", {"lambda_cosine": 0.0}),
    "best, the paper's weights of edge and spectral loss": ("best", {"lambda_edge": 1.0, "lambda_spectral": 0.1}),
}


def train(variant, seed, args, maps):
    """Train one variant.   maps: what is computed for the first one and used by all.   Returns: its upsampler."""
    (preset, changes), cached_maps = VARIANTS[variant], brixel.cached_maps
    with tempfile.TemporaryDirectory() as folder:
        own = {"data_dir": args.data_dir, "out": f"{folder}/out.pt", "seed": seed, "max_steps": args.steps,
               "cache_crops": args.crops, "warmup_epochs": 50 * COMMON["batch_size"] / args.crops}     # 50 steps
        cfg = brixel.load_config(["--preset", preset], "preset", None, "")
        cfg = argparse.Namespace(**{**vars(cfg), **COMMON, **own, **changes})
        with mock.patch("brixel.cached_maps", lambda *inputs: maps or maps.extend(cached_maps(*inputs)) or maps):
            brixel.train(cfg)
        return brixel.load(cfg.out).upsampler


def held_out_maps(args):
    """[frozen_pass of one photo, ...] for args.val photos of --val_dir, evenly spaced."""
    index, backbone = data.PhotoIndex(args.val_dir, "--val_dir"), brixel.load_backbone("sample")
    chosen = [i * len(index) // args.val for i in range(args.val)]
    crops = [data.read_crop(index.open(i), COMMON["teacher_size"]) for i in chosen]
    accelerator = Accelerator(mixed_precision="no", cpu=True)
    return [brixel.frozen_pass(crop[None], backbone, 4, accelerator) for crop in crops]


@torch.no_grad()
def errors(upsampler, held_out):
    """{term: mean over the photos}; upsampler None: bilinear."""
    sums = dict.fromkeys(TERMS, 0.0)
    for small, layers, teacher in held_out:
        size = teacher.shape[2:]
        student = upsampler(small, layers) if upsampler else F.interpolate(layers[-1], size=size, mode="bilinear")
        _, terms = brixel.brixel_loss(student, teacher, lambda_cosine=1)
        terms["cosine"] = 1 - terms["cosine"]
        for term in sums:
            sums[term] += terms[term].item() / len(held_out)
    return sums


def table(records):
    """Markdown: a line per variant, mean and standard deviation over its seeds."""
    lines = ["| variant | seeds | L1 | edge | spectral | cosine |", "|---|---|---|---|---|---|"]
    for variant in dict.fromkeys(record["variant"] for record in records):
        runs = [record for record in records if record["variant"] == variant]
        cells = []
        for term in TERMS:
            values = [run[term] for run in runs]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}")
        lines.append(f"| {variant} | {len(runs)} | {' | '.join(cells)} |")
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True, help="folder of photos to train on")
    parser.add_argument("--val_dir", required=True, help="folder of other photos")
    parser.add_argument("--val", type=int, default=60, help="how many of them")
    parser.add_argument("--steps", type=int, default=700, help="of 8 crops")
    parser.add_argument("--crops", type=int, default=1480, help="whose teacher maps are computed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--variants", nargs="+", default=["paper", "best"], choices=list(VARIANTS))
    parser.add_argument("--out", default="ablation.jsonl")
    args = parser.parse_args()
    out, maps, held_out = Path(args.out), [], held_out_maps(args)
    records = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    for seed in args.seeds:
        for variant in args.variants:
            key = {"variant": variant, "seed": seed, "steps": args.steps, "crops": args.crops}
            if not any(key.items() <= record.items() for record in records):
                records.append(key | errors(train(variant, seed, args, maps), held_out))
                out.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    print(*table([{"variant": "bilinear", **errors(None, held_out)}, *records]), sep="\n")


if __name__ == "__main__":
    main()

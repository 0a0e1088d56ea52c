"""What each point in which brixel.py differs from the released code is worth: a short run per variant and seed, at equal steps.

    python tests/ablate.py --data_dir PHOTOS --out ablation.jsonl        # 30 runs, a good hour and a half on one CPU core

The recipe is the preset `photos` with fewer crops and steps. A seed sets weights, order and stochastic depth; the crops, and so
the cached teacher maps, are the same for all. Held-out errors are always measured with the paper's losses. The lines of --out are
kept: a run that is there is not made again. Prints a Markdown table: mean and standard deviation over the seeds.
"""
import argparse
import contextlib
import json
import statistics
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import brixel


def released_edge_loss(student, teacher, k=8, components=None):
    """brixel.edge_loss with the difference squared, as train_utils.py has it."""
    gradients = brixel.sobel(torch.einsum("bchw,ck->bkhw", teacher - student, components))
    return gradients[:, 0].square().mean() + gradients[:, 1].square().mean()


def released_ring_index(H, W, rings, device=None):
    """brixel.ring_index as train_utils.py has it: circles around the middle of the unshifted FFT, where the highest frequency lies."""
    y = torch.linspace(-1, 1, H, dtype=torch.float64, device=device)[:, None]
    x = torch.linspace(-1, 1, W, dtype=torch.float64, device=device)
    return brixel.ring_of((y**2 + x**2).sqrt(), rings)


def random_head(*args, **kwargs):
    """Brixel whose head starts at random, not at zero."""
    model = brixel_Brixel(*args, **kwargs)
    model.upsampler.head.out.reset_parameters()
    return model


def with_options(**options):
    """A stand-in for brixel.Brixel that always gets `options`."""
    return lambda *args, **kwargs: brixel_Brixel(*args, **kwargs, **options)


brixel_Brixel, evaluate, cached_maps = brixel.Brixel, brixel.evaluate, brixel.cached_maps
LOSSES = {"edge_loss": brixel.edge_loss, "ring_index": brixel.ring_index}
RELEASED_LOSSES = {"edge_loss": released_edge_loss, "ring_index": released_ring_index}
# name: (what is replaced in brixel, settings that differ)
VARIANTS = {
    "as brixel.py": ({}, {}),
    "skip from half the grid (released)": ({"Brixel": with_options(skip="half")}, {}),
    "edge loss squared (released)": ({"edge_loss": released_edge_loss}, {}),
    "spectral loss without fftshift (released)": ({"ring_index": released_ring_index}, {}),
    "head starts at random (released)": ({"Brixel": random_head}, {}),
    "center crops (released)": ({}, {"crop": "center"}),
    "skip, both losses and crops as released": ({"Brixel": with_options(skip="half"), **RELEASED_LOSSES}, {"crop": "center"}),
    "head width 128": ({"Brixel": with_options(width=128)}, {}),
    "head width 256": ({"Brixel": with_options(width=256)}, {}),
    "cosine learning rate": ({}, {"lr_schedule": "cosine"}),
}


@contextlib.contextmanager
def replaced(names):
    """The functions of brixel.py in `names`, {name: function}, replaced for a while."""
    old = {name: getattr(brixel, name) for name in names}
    try:
        for name, new in names.items():
            setattr(brixel, name, new)
        yield
    finally:
        for name, function in old.items():
            setattr(brixel, name, function)


def evaluate_with_the_papers_losses(*args, **kwargs):
    with replaced(LOSSES):
        return evaluate(*args, **kwargs)


def run(variant, seed, args, maps):
    """Train one variant.   Returns: its held-out errors, and the median seconds of a step."""
    names, settings = VARIANTS[variant]
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--preset", "photos", "--data_dir", args.data_dir, "--out", f"{folder}/out.pt", "--seed", str(seed), "--max_steps",
                 str(args.steps), "--cache_crops", str(args.crops), "--eval_every", "100000", "--save_every", "100000"]
        flags += [part for key, value in settings.items() for part in (f"--{key}", value)]
        cfg = brixel.load_config(flags, "preset", lambda section: "max_steps" in section, None, "")

        def remembered_maps(*loader):
            if cfg.crop not in maps:
                maps[cfg.crop] = cached_maps(*loader)
            return maps[cfg.crop]

        with replaced({**names, "evaluate": evaluate_with_the_papers_losses, "cached_maps": remembered_maps}):
            brixel.train(cfg)
        records = [json.loads(line) for line in Path(folder, "out.jsonl").read_text().splitlines()]
    seconds = statistics.median(cfg.batch_size / r["images/s"] for r in records if "images/s" in r)
    return {"variant": variant, "seed": seed, "steps": args.steps, "crops": args.crops, "seconds_per_step": seconds, **records[-1]}


def table(records):
    """Markdown: a line per variant, mean and standard deviation over its seeds."""
    terms = ("l1", "edge", "spectral", "cosine")
    lines = ["| variant | L1 | edge | spectral | cosine | time of a step |", "|---|---|---|---|---|---|"]
    bilinear = " | ".join(f"{records[0][f'bilinear {term}']:.3f}" for term in terms)
    lines.append(f"| bilinear upsampling | {bilinear} | |")
    times = {v: statistics.mean(r["seconds_per_step"] for r in records if r["variant"] == v) for v in {r["variant"] for r in records}}
    for variant in VARIANTS:
        runs = [r for r in records if r["variant"] == variant]
        if runs:
            cells = [f"{statistics.mean(v):.3f} ± {statistics.stdev(v) if len(v) > 1 else 0:.3f}"
                     for v in ([r[f"brixel {term}"] for r in runs] for term in terms)]
            lines.append(f"| {variant} | {' | '.join(cells)} | {times[variant] / times['as brixel.py']:.2f} x |")
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True, help="folder of photos")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--crops", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--out", default="ablation.jsonl")
    args = parser.parse_args()
    out, maps = Path(args.out), {}
    records = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    for seed in args.seeds:
        for variant in args.variants:
            wanted = {"variant": variant, "seed": seed, "steps": args.steps, "crops": args.crops}
            if not any(wanted.items() <= record.items() for record in records):
                records.append(run(variant, seed, args, maps))
                with out.open("a") as file:
                    file.write(json.dumps(records[-1]) + "\n")
    print(*table(records), sep="\n")


if __name__ == "__main__":
    main()

"""Speed of training: photos read a second, images trained a second, the parts of a step, and its share of the floor.

    python tests/bench.py --photos FOLDER                                             # reading, beside the plain way
    python tests/bench.py --backbone dinov3_vits16 --teacher_size 448 --batch_size 8  # a step, on any device

The floor is the time that the step's multiplications take at the speed of one large matrix product.  Medians of calls
taken in turns.  Peak memory: of one whole step; on a CPU, of the process.  Prints a line, and one of JSON.
Other flags are those of brixel.py: --preset, --mixed_precision and so on; weights are random.
"""
import argparse
import json
import random
import sys
import time
from pathlib import Path
from resource import RUSAGE_SELF, getrusage

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torchvision.transforms.functional import pil_to_tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
import brixel
import data
from probe import gflops, milliseconds


def read_plainly(file, size, rng):
    """The usual way to data.read_crop's result: decode everything, float tensor, antialiased resize, crop, flip."""
    with Image.open(file) as image:
        full = pil_to_tensor(ImageOps.exif_transpose(image).convert("RGB")).float() / 255
    _, H, W = full.shape
    zoom = size / rng.uniform(min(size, H, W), min(H, W))
    sides = [max(size, round(side * zoom)) for side in (H, W)]
    full = F.interpolate(full[None], size=sides, mode="bicubic", antialias=True)[0]
    y, x = (rng.randint(0, side - size) for side in full.shape[1:])
    crop = full[:, y:y + size, x:x + size]
    return crop.flip(2) if rng.random() < 0.5 else crop


def bench_reading(folder, size=1024, count=60):
    """Crops a second of data.read_crop and of read_plainly in one process, in turns."""
    index, seconds = data.PhotoIndex(folder, "--photos"), {data.read_crop: 0.0, read_plainly: 0.0}
    for n in range(count):
        for read in seconds:
            start = time.perf_counter()
            read(index.open(n % len(index)), size=size, rng=random.Random(n))
            seconds[read] += time.perf_counter() - start
    ours, plain = (count / total for total in seconds.values())
    print(f"{count} crops of {size} px from {len(index)} photos, {torch.get_num_threads()} thread(s): {ours:.1f}/s, "
          f"plain way {plain:.1f}/s, ratio {ours / plain:.2f}")


def bench_step(cfg, repeats):
    """The parts of one training step, each alone, their sum, and the peak memory of one whole step."""
    accelerator, backbone = brixel.make_accelerator(cfg), brixel.load_backbone(cfg.backbone, None)
    _, upsampler, optimizers = brixel.set_up(cfg, backbone, accelerator)
    lambdas, side = (cfg.lambda_edge, cfg.lambda_spectral, cfg.lambda_cosine), cfg.teacher_size
    image = torch.randint(256, (cfg.batch_size, 3, side, side), dtype=torch.uint8, device=accelerator.device)

    def teacher():
        return brixel.frozen_pass(image, backbone, cfg.scale, accelerator)

    def loss_of(output, target):
        P, mean = brixel.principal_components(target, cfg.k)
        return brixel.brixel_loss(output, target, *lambdas, P=P, mean=mean)[0]

    small, layers, target = teacher()
    accelerator.backward(loss_of(upsampler(small, layers), target))
    brixel.optimizer_step(upsampler, optimizers, cfg.lr)
    peak = torch.cuda.max_memory_allocated() if image.is_cuda else 1024 * getrusage(RUSAGE_SELF).ru_maxrss
    output = upsampler(small, layers).detach().float().requires_grad_()
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    matrix = torch.randn([8192 if image.is_cuda else 2048] * 2, device=image.device, dtype=dtype)
    calls = {"teacher": teacher, "student": lambda: accelerator.backward(upsampler(small, layers).float().mean()),
             "loss": lambda: loss_of(output, target).backward(), "product": lambda: matrix @ matrix,
             "optimizer": lambda: brixel.optimizer_step(upsampler, optimizers, 0.0)}        # of the student's gradients
    ms = dict(zip(calls, milliseconds(calls.values(), repeats)))
    flops = (gflops(teacher) + 3 * gflops(lambda: upsampler(small, layers))) * 1e9      # backward: two forward passes
    rate = 2 * len(matrix)**3 / ms.pop("product") * 1000
    step = sum(ms.values())
    print(f"{cfg.batch_size / step * 1000:.3g} images/s, {step:.4g} ms a step, peak memory {peak / 1e9:.3g} GB")
    print(json.dumps({"step_ms": step, "ms": ms, "share_of_floor": flops / rate / step * 1000, "peak_bytes": peak,
                      "device": str(image.device), "threads": torch.get_num_threads(), "settings": vars(cfg)}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", help="measure reading of the photos in this folder instead")
    parser.add_argument("--repeats", type=int, default=10)
    args, flags = parser.parse_known_args()
    cfg = brixel.load_config(flags, "preset", "paper", "")
    bench_reading(args.photos) if args.photos else bench_step(cfg, args.repeats)

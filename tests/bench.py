"""Speed of training: photos read a second, images trained a second, the parts of a step, and its share of the floor.

    python tests/bench.py --photos FOLDER                                             # reading, beside the plain way
    python tests/bench.py --backbone dinov3_vits16 --teacher_size 448 --batch_size 8  # a step, on any device

The floor is the time that the step's multiplications take at the speed of one large matrix product.  Medians of calls
taken in turns.  Prints a line, and one of JSON.
"""
import argparse
import json
import random
import sys
import time
from pathlib import Path

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


def bench_step(args):
    """The parts of one training step, each alone, and the whole."""
    cfg = brixel.load_config(["--preset", args.preset], "preset", None, "")
    backbone = brixel.load_backbone(args.backbone, None)
    accelerator, _, upsampler, optimizers = brixel.set_up(cfg, backbone)
    image = torch.randint(256, (args.batch_size, 3, args.teacher_size, args.teacher_size), dtype=torch.uint8)
    image = image.to(accelerator.device)
    small, layers, target = brixel.frozen_pass(image, backbone, cfg.scale, accelerator)
    output = upsampler(small, layers).detach().float().requires_grad_()
    lambdas = cfg.lambda_edge, cfg.lambda_spectral, cfg.lambda_cosine

    def teacher():
        return brixel.frozen_pass(image, backbone, cfg.scale, accelerator)

    def student():
        accelerator.backward(upsampler(small, layers).float().mean())

    def loss():
        P, mean = brixel.principal_components(target, cfg.k)
        brixel.brixel_loss(output, target, *lambdas, P=P, mean=mean)[0].backward()

    def optimizer():
        for parameter in upsampler.parameters():
            parameter.grad = torch.zeros_like(parameter)
        brixel.optimizer_step(upsampler, optimizers, accelerator)

    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    matrix = torch.randn([8192 if image.is_cuda else 2048] * 2, device=image.device, dtype=dtype)
    calls = {"teacher": teacher, "student": student, "loss": loss, "optimizer": optimizer,
             "product": lambda: matrix @ matrix}
    ms = dict(zip(calls, milliseconds(calls.values(), args.repeats)))
    flops = (gflops(teacher) + 3 * gflops(lambda: upsampler(small, layers))) * 1e9      # backward: two forward passes
    rate = 2 * len(matrix)**3 / ms.pop("product") * 1000
    step = sum(ms.values())
    result = {**vars(args), "device": str(accelerator.device), "threads": torch.get_num_threads(),
              "precision": accelerator.mixed_precision,
              "images/s": args.batch_size / step * 1000, "ms": ms, "share_of_floor": flops / rate / step * 1000}
    print(f"{result['images/s']:.3g} images/s, {step:.4g} ms a step: "
          f"{', '.join(f'{part} {value:.4g}' for part, value in ms.items())}; {result['share_of_floor']:.0%} of the "
          f"floor\n{json.dumps(result)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", help="measure reading of the photos in this folder instead")
    parser.add_argument("--preset", default="paper")
    parser.add_argument("--backbone", default="dinov3_vitb16", help="with random weights")
    parser.add_argument("--teacher_size", type=int, default=1024)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    bench_reading(args.photos) if args.photos else bench_step(args)

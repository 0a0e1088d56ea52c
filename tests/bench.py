"""Speed of training: images a second, the parts of a step, peak memory.

    python tests/bench.py --backbone dinov3_vits16 --teacher_size 448 --batch_size 8

Medians of calls taken in turns, with random weights.  Peak memory: of one whole step; on a CPU, of the process.  Prints
a line, and one of JSON.  Other flags are those of brixel.py: --preset, --mixed_precision and so on.
"""
import argparse
import json
import sys
from functools import partial
from pathlib import Path
from resource import RUSAGE_SELF, getrusage

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import brixel
from probe import milliseconds


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10)
    args, flags = parser.parse_known_args(argv)
    cfg = brixel.load_config(flags, "preset", "paper", "")
    accelerator, backbone = brixel.make_accelerator(cfg.mixed_precision), brixel.load_backbone(cfg.backbone, None)
    _, upsampler, optimizers = brixel.set_up(cfg, backbone, accelerator)
    shape = cfg.batch_size, 3, cfg.teacher_size[0], cfg.teacher_size[0]
    image = torch.randint(256, shape, dtype=torch.uint8, device=accelerator.device)
    teacher = partial(brixel.frozen_pass, image, backbone, cfg.scale, accelerator)
    small, layers, target = teacher()

    def loss_of(output):
        return brixel.brixel_loss(output, target, cfg.lambda_edge, cfg.lambda_spectral, cfg.lambda_cosine, cfg.k)[0]

    accelerator.backward(loss_of(upsampler(small, layers)))
    brixel.optimizer_step(upsampler, optimizers, cfg.lr)
    peak = torch.cuda.max_memory_allocated() if image.is_cuda else 1024 * getrusage(RUSAGE_SELF).ru_maxrss
    output = upsampler(small, layers).detach().float().requires_grad_()
    calls = {"teacher": teacher, "student": lambda: accelerator.backward(upsampler(small, layers).float().mean()),
             "loss": lambda: loss_of(output).backward(),
             "optimizer": lambda: brixel.optimizer_step(upsampler, optimizers, 0.0)}
    ms = dict(zip(calls, milliseconds(calls.values(), args.repeats)))
    step = sum(ms.values())
    print(f"{cfg.batch_size / step * 1000:.3g} images/s, {step:.4g} ms a step, peak memory {peak / 1e9:.3g} GB")
    print(json.dumps({"step_ms": step, "ms": ms, "peak_bytes": peak, "device": str(image.device),
                      "threads": torch.get_num_threads(), "settings": vars(cfg)}))


if __name__ == "__main__":
    main()

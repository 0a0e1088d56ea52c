"""Probes and pictures for BRIXEL."""

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from brixel import atomic, frozen_pass, principal_components


def pca_rgb(reference, *maps):
    """Each (C, H, W) of `maps` as an (H', W', 3) uint8 picture, in the basis and range of the map `reference`.

    The first three principal components become red, green, blue; 1st to 99th percentile of the reference 0 to 255.
    """
    basis = principal_components(reference[None], 3)
    basis = basis * basis.sum(0).sign()                                                 # eigenvectors have no sign
    colors = [torch.einsum("chw,ck->hwk", x.float(), basis) for x in (reference, *maps)]
    low, high = (torch.quantile(colors[0].flatten(0, 1), q, dim=0) for q in (0.01, 0.99))
    return [((c - low) / (high - low) * 255).clamp(0, 255).byte().cpu().numpy() for c in colors[1:]]


def write_panel(path, titles, rows, side=320):
    """Write rows of pictures, each (H, W, 3) uint8, under a line of titles; every row `side` pixels high."""
    gap, font = 6, ImageFont.load_default(size=20)
    # token maps are enlarged by pixel repetition: a picture shows what is there
    rows = [[Image.fromarray(p).resize((round(side * p.shape[1] / p.shape[0]), side), 4 if len(p) > side else 0) for p in row]
            for row in rows]
    width = max(sum(p.width + gap for p in row) - gap for row in rows)
    panel = Image.new("RGB", (width, 34 + len(rows) * (side + gap) - gap), "white")
    for j, row in enumerate(rows):
        x = 0
        for title, picture in zip(titles, row):
            if j == 0:
                ImageDraw.Draw(panel).text((x + picture.width / 2, 17), title, "black", font, anchor="mm")
            panel.paste(picture, (x, 34 + j * (side + gap)))
            x += picture.width + gap
    with atomic(path) as temporary:
        panel.save(temporary, "PNG")


@torch.no_grad()
def feature_row(model, image):
    """One row of out.png for `image` (1, 3, H, W) uint8: photo, low-resolution features, bilinear, BRIXEL, teacher."""
    small, layers, teacher = frozen_pass(model.backbone, image, model.scale)
    bilinear = F.interpolate(layers[-1], size=teacher.shape[2:], mode="bilinear")
    maps = [layers[-1][0], bilinear[0], model.upsampler(small, layers)[0], teacher[0]]
    return [image[0].permute(1, 2, 0).cpu().numpy(), *pca_rgb(teacher[0], *maps)]

"""The page of `probe.py --task pca --html`, opened in headless Chromium."""
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import photo
from PIL import Image
from playwright.sync_api import sync_playwright

import brixel
import probe

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (apt install chromium)")


@torch.no_grad()
def feature_maps(image):
    """{name: (1, C, h, w)} of a tiny random model, moved away from bilinear."""
    model = brixel.Brixel(brixel.load_backbone("timm:test_vit", "none")).eval()
    for parameter in model.upsampler.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    x = model.preprocess(image, 128)
    layers = model.backbone.layers(x)
    bilinear = F.interpolate(layers[-1], scale_factor=4, mode="bilinear")
    return {"ViT": layers[-1], "bilinear": bilinear, "BRIXEL": model.upsampler(x, layers)}


@pytest.fixture
def opened(tmp_path):
    """The opened page and its maps. In no test a request leaves the page, or anything is written to the console."""
    image, path, log = Image.fromarray(photo(np.random.default_rng(0))), tmp_path / "a <b>.html", []
    maps = feature_maps(image)
    probe.write_page(path, image, maps)
    with sync_playwright() as driver:
        page = driver.chromium.launch(executable_path=CHROMIUM, args=["--disable-gpu", "--disable-sync"]).new_page()
        page.on("request", lambda request: log.append(request.url))
        page.on("console", lambda message: log.append(message.text))
        page.on("pageerror", lambda error: log.append(str(error)))
        page.goto(path.as_uri())
        yield page, {name: features[0] for name, features in maps.items()}
        assert [line for line in log if not line.startswith("data:image/")] == [path.as_uri()]


def move(page, x, y):
    box = page.locator("#photo .picture").bounding_box()
    page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])


def written(page):
    return [float(text.replace("−", "-")) for text in page.locator("output").all_inner_texts()]


def test_similarity_under_the_pointer_is_1_and_elsewhere_what_python_computes(opened):
    page, maps = opened
    move(page, 0.21, 0.37)
    assert written(page) == [1, 1, 1]
    shown = page.evaluate("maps.map(map => Array.from(map.similarity))")
    for features, similarity in zip(maps.values(), shown, strict=True):
        query = features[:, int(0.37 * features.shape[1]), int(0.21 * features.shape[2])]
        cosine = F.cosine_similarity(features, query[:, None, None], dim=0)                        # (h, w)
        assert np.abs(np.array(similarity) - cosine.flatten().numpy()).max() < 0.03
    assert 0 < page.evaluate("data.difference") < 0.02


def test_click_pins_the_point_and_escape_lets_it_go(opened):
    page, _ = opened
    move(page, 0.21, 0.37)
    page.mouse.down()
    move(page, 0.83, 0.58)
    assert max(written(page)) < 0.9
    page.keyboard.press("Escape")
    page.keyboard.press("ArrowLeft")
    assert written(page) == [1, 1, 1]


def test_key_and_button_switch_between_similarity_and_pca_colors(opened):
    page, maps = opened
    page.keyboard.press("c")
    drawn = "maps.map(({canvas: c}) => Array.from(c.getContext('2d').getImageData(0, 0, c.width, c.height).data))"
    for pixels, colors in zip(page.evaluate(drawn), brixel.pca_rgb(*(m[None] for m in maps.values())), strict=True):
        assert np.array_equal(np.reshape(pixels, (*colors.shape[:2], 4))[..., :3], colors)
    page.get_by_text("Show similarity").click()
    assert page.get_by_text("Cosine similarity to the point").is_visible()

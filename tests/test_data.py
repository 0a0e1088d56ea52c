"""Training photos: reading, cropping, streams."""

import io
import random

import numpy as np
import pytest
import torch
from conftest import photo
from PIL import Image

import data
from brixel import BrixelError


def gradient(width, height):
    """RGB picture whose red is x and whose green is y, 0..255."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))


def saved(image, suffix, **options):
    file = io.BytesIO()
    image.save(file, suffix, **options)
    file.seek(0)
    return file


def test_central_crop_is_the_middle_square():
    crop = data.read_crop(saved(gradient(400, 200), "PNG"), 100).float()
    assert crop.shape == (3, 100, 100) and crop.dtype == torch.float32
    assert crop[0, 50, 0].item() == pytest.approx(255 * 100 / 400, abs=2) and crop[1, 0, 50].item() == pytest.approx(0, abs=2)
    assert crop[0, 50, -1].item() == pytest.approx(255 * 300 / 400, abs=2) and crop[1, -1, 50].item() == pytest.approx(255, abs=2)


@pytest.mark.parametrize("format", ["JPEG", "TIFF", "PNG", "WEBP"])
def test_exif_rotation_is_applied(format):
    image = gradient(300, 200)
    exif = image.getexif()
    exif[data.ORIENTATION] = 6                     # the camera was held upright: rotate by 90 degrees clockwise to view
    crop = data.read_crop(saved(image, format, exif=exif), 64).float()
    assert crop[0, 5].mean() < crop[0, -5].mean() - 100           # red now grows downwards
    assert crop[1, :, 5].mean() > crop[1, :, -5].mean() + 100     # green now grows to the left


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "YCbCr", "1", "I;16", "I", "F", "LAB"])
def test_any_color_mode_becomes_rgb(mode):
    if mode in ("I;16", "I"):
        image = Image.fromarray((np.array(gradient(80, 80).convert("L")).astype(np.uint16) << 8))
        image = image if mode == "I;16" else image.convert("I")
    else:
        image = gradient(80, 80).convert(mode) if mode != "LAB" else Image.new("LAB", (80, 80), (128, 128, 128))
    file = saved(image, "TIFF")
    crop = data.read_crop(file, 40)
    assert crop.shape == (3, 40, 40) and crop.dtype == torch.uint8
    if mode in ("L", "I;16", "I", "F"):
        want = np.array(gradient(80, 80).convert("L").resize((40, 40), Image.Resampling.BICUBIC), dtype=float)
        assert np.abs(crop[0].numpy() - want).mean() < 3


def test_transparency_is_laid_on_white():
    image = Image.new("RGBA", (50, 50), (255, 0, 0, 0))
    assert data.read_crop(saved(image, "PNG"), 20).unique().tolist() == [255]


def test_random_crop_covers_half_to_all_of_the_short_side_but_never_too_few_pixels():
    image = gradient(400, 300)
    for size, smallest in [(64, 150), (250, 250), (500, 300)]:
        sides = []
        for seed in range(60):
            crop = data.read_crop(saved(image, "PNG"), size, rng=random.Random(seed)).float()
            sides.append((crop[1, -1].mean() - crop[1, 0].mean()).item() / 255 * 300)
        assert min(sides) >= smallest * 0.97 - 4 and max(sides) <= 305
        if size == 64:
            assert min(sides) < 170 and max(sides) > 280


def test_half_of_the_random_crops_are_flipped():
    crops = [data.read_crop(saved(gradient(100, 100), "PNG"), 32, rng=random.Random(seed)).float() for seed in range(100)]
    flipped = sum((crop[0, :, 0].mean() > crop[0, :, -1].mean()).item() for crop in crops)
    assert 35 < flipped < 65


def test_reduced_decoding_of_a_large_jpeg_gives_the_same_picture():
    picture = Image.fromarray(photo(np.random.default_rng(0), 900, 1200))
    fast = data.read_crop(saved(picture, "JPEG", quality=95), 100, rng=random.Random(3)).float()
    slow = data.read_crop(saved(picture, "PNG"), 100, rng=random.Random(3)).float()
    assert (fast - slow).abs().mean() < 3


@pytest.mark.parametrize("content, reason", [(b"", "cannot identify"), (b"just text", "cannot identify"), ("cut", "truncated")])
def test_broken_files_say_why(content, reason):
    if content == "cut":
        content = saved(gradient(200, 200), "JPEG").getvalue()[:1500]
    with pytest.raises(data.PhotoError, match=reason) as error:
        data.read_crop(io.BytesIO(content), 64)
    assert error.value.kind == "unreadable"


def test_too_small_photo_says_both_numbers():
    with pytest.raises(data.PhotoError, match="60 px, min_side is 64") as error:
        data.read_crop(saved(gradient(100, 60), "PNG"), 32, min_side=64)
    assert error.value.kind == "too small"


def test_stream_is_a_pure_function_of_the_draw_and_covers_every_epoch(photos):
    paths = data.find_photos(photos)
    one, two = (data.Photos(paths, [0, 2, 4, 5], 100, 7, 64) for _ in range(2))
    picks = [one.pick(n) for n in range(12)]
    assert all(sorted(picks[i:i + 4]) == [0, 2, 4, 5] for i in (0, 4, 8)) and picks[:4] != picks[4:8]
    for n in (11, 3, 0):
        assert torch.equal(one[n][0], two[n][0])
    assert not torch.equal(data.Photos(paths, [0, 2, 4, 5], 100, 8, 64)[0][0], one[0][0])


def test_bad_photo_is_replaced_by_the_next_one_and_told_once(photos):
    (photos / "3.jpg").write_bytes(b"")
    paths = data.find_photos(photos)
    stream = data.Photos(paths, range(8), 64, 0, 64)
    items = [stream[n] for n in range(24)]
    assert all(crop.shape == (3, 64, 64) for crop, _ in items)
    assert [entry[:2] for _, left_out in items for entry in left_out] == [(str(paths[3]), "unreadable")]


def test_split_is_fixed_disjoint_and_complete():
    train, held_out = data.split(50, 0.1)
    assert len(held_out) == 5 and sorted(train + held_out) == list(range(50)) and data.split(50, 0.1) == (train, held_out)
    assert data.split(3, 0.01)[1]
    for n, share in [(1, 0.1), (10, 0.0), (10, 1.0)]:
        with pytest.raises(BrixelError, match="val_share"):
            data.split(n, share)


def test_folders_are_searched_recursively_whatever_the_case_of_the_suffix(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name in ("a/b/one.JPG", "two.webp", "a/three.Tiff", "a/notes.txt"):
        (tmp_path / name).touch()
    assert [path.name for path in data.find_photos(tmp_path)] == ["one.JPG", "three.Tiff", "two.webp"]


def test_missing_and_empty_folders_are_one_sentence(tmp_path):
    with pytest.raises(BrixelError, match="no such folder.*--data_dir"):
        data.find_photos(tmp_path / "nothing")
    with pytest.raises(BrixelError, match=r"no photo \(.jpg .*--data_dir"):
        data.find_photos(tmp_path)

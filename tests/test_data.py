"""Training photos: reading, cropping, sampling, tar shards."""

import io
import os
import random
import tarfile

import numpy as np
import pytest
import torch
from conftest import photo
from PIL import Image
from torch.utils.data import DataLoader

import data


def gradient(width, height):
    """RGB picture whose red is x and whose green is y, 0..255."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))


def saved(image, format, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    file.seek(0)
    return file


def test_central_crop_is_the_middle_square():
    crop = data.read_crop(saved(gradient(400, 200), "PNG"), 100)
    assert crop.shape == (3, 100, 100) and crop.dtype == torch.uint8
    assert crop[0, 50, [0, -1]].tolist() == pytest.approx([255 * 100 / 400, 255 * 300 / 400], abs=2)
    assert crop[1, [0, -1], 50].tolist() == pytest.approx([0, 255], abs=2)


@pytest.mark.parametrize("format", ["JPEG", "TIFF", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation, corner", [(1, (0, 0)), (2, (0, -1)), (3, (-1, -1)), (4, (-1, 0)), (5, (0, 0)),
                                                 (6, (0, -1)), (7, (-1, -1)), (8, (-1, 0)), (99, (0, 0))])
def test_exif_rotation_is_applied(format, orientation, corner):
    """corner: where, (row, column), the EXIF standard shows the first stored pixel, which is black in our picture."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = saved(gradient(200, 200), format, exif=exif)
    for pixels in (data.read_crop(file, 64), torch.from_numpy(np.array(data.open_photo(file))).permute(2, 0, 1)):
        red_and_green = pixels[:2, corner[0], corner[1]]
        assert red_and_green.max() < 30 and pixels.amax(dim=(1, 2))[:2].min() > 230
        assert (pixels[0, 0].float().std() < 5) == (orientation in (5, 6, 7, 8))         # red grows along the columns


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "YCbCr", "1", "I;16", "I", "F"])
def test_any_color_mode_becomes_rgb_and_transparency_white(mode):
    gray = gradient(80, 80).convert("L")
    image = Image.fromarray(np.array(gray).astype(np.uint16) << 8) if mode in ("I;16", "I") else gradient(80, 80)
    crop = data.read_crop(saved(image if mode == "I;16" else image.convert(mode), "TIFF"), 80)
    assert crop.shape == (3, 80, 80) and crop.dtype == torch.uint8
    if mode in ("L", "I;16", "I", "F"):
        assert np.abs(crop[0].numpy() - np.array(gray, float)).max() <= 1
    if mode in ("LA", "RGBA"):
        assert data.read_crop(saved(Image.new(mode, (50, 50)), "PNG"), 20).unique().tolist() == [255]


@pytest.mark.parametrize("size, crop_min, smallest", [(64, 0.5, 150), (250, 0.5, 150), (250, 0, 250), (500, 0, 300)])
def test_random_crops_cover_crop_min_to_all_of_the_short_side_and_half_are_flipped(size, crop_min, smallest):
    sides, flipped = [], 0
    for seed in range(60):
        crop = data.read_crop(saved(gradient(400, 300), "PNG"), size, 0, random.Random(seed), crop_min).float()
        sides.append((crop[1, -1].mean() - crop[1, 0].mean()).item() / 255 * 300)
        flipped += int(crop[0, :, 0].mean() > crop[0, :, -1].mean())
    assert smallest * 0.97 - 4 <= min(sides) < smallest + 25 and 280 < max(sides) <= 305
    assert 18 < flipped < 42


def test_large_jpeg_is_decoded_at_a_reduced_scale_and_gives_the_same_picture(monkeypatch):
    picture, decoded = Image.fromarray(photo(np.random.default_rng(0), 900, 1200)), []
    to_rgb = data.to_rgb
    monkeypatch.setattr(data, "to_rgb", lambda crop: decoded.append(crop.width) or to_rgb(crop))
    fast = data.read_crop(saved(picture, "JPEG", quality=95), 100, 0, random.Random(3), 0.5).float()
    slow = data.read_crop(saved(picture, "PNG"), 100, 0, random.Random(3), 0.5).float()
    assert 100 <= decoded[0] < decoded[1] / 3.5 and (fast - slow).abs().mean() < 3


def test_broken_files_say_why():
    with pytest.raises(data.DataError, match="^the file cannot be read: .*truncated"):
        data.read_crop(io.BytesIO(saved(gradient(200, 200), "JPEG").read(1500)), 64)
    with pytest.raises(data.DataError, match="^holiday cannot be read: .*cannot identify"):
        data.open_photo(io.BytesIO(b"text"), "holiday")


def test_color_jitter_changes_brightness_within_its_strength_and_nothing_else():
    image, state = torch.full((3, 4, 4), 100, dtype=torch.uint8), torch.get_rng_state()
    changed = [data.color_jitter(image, (0.2, 0, 0, 0), random.Random(seed))[0, 0, 0].item() for seed in range(50)]
    assert 80 <= min(changed) < 85 and 115 < max(changed) <= 120
    assert torch.equal(torch.get_rng_state(), state)


def test_folders_are_searched_recursively_whatever_the_case_of_the_suffix(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    with pytest.raises(data.DataError, match="no .jpg .*set --data_dir"):
        data.PhotoIndex(tmp_path)
    with pytest.raises(data.DataError, match="no such file or folder.*nothing; set --image"):
        data.PhotoIndex(tmp_path / "nothing", flag="--image")
    for name in ("a/b/one.JPG", "two.webp", "a/three.Tiff", "a/notes.txt"):
        (tmp_path / name).touch()
    index = data.PhotoIndex(tmp_path)
    assert [os.path.basename(index.name(i)) for i in range(len(index))] == ["one.JPG", "three.Tiff", "two.webp"]


def test_split_is_fixed_disjoint_and_complete():
    train, val = data.split(10, 0.2)
    assert val.tolist() == [1, 4] and sorted([*train, *val]) == list(range(10)) and len(data.split(3, 0.01)[1]) == 1
    assert len(data.split(10**6, 0.01)[1]) == 256
    for n, share in [(1, 0.1), (10, 0.0), (10, 1.0)]:
        with pytest.raises(data.DataError, match="val_share"):
            data.split(n, share)


def test_draws_cover_every_epoch_in_a_new_order_and_go_on_wherever_a_run_is_resumed():
    samples = list(data.Draws(5, 0, 20, seed=7))
    assert [n for n, _ in samples] == list(range(20)) and len(data.Draws(5, 3, 20, seed=7)) == 17
    for epoch in range(4):                         # this order, so that checkpoints of older versions go on exactly
        order = torch.randperm(5, generator=torch.Generator().manual_seed((7 << 20) + epoch))
        assert [position for _, position in samples[5 * epoch:5 * epoch + 5]] == order.tolist()
    for start in (0, 3, 5, 19):
        assert list(data.Draws(5, start, 20, seed=7)) == samples[start:]


@pytest.mark.parametrize("workers", [0, 2])
def test_crop_is_a_pure_function_of_number_photo_and_seed(photos, workers):
    dataset = data.Photos(data.PhotoIndex(photos), [0, 2, 4, 5], 64, crop_min=0.3, seed=7)
    loader = DataLoader(dataset, 3, sampler=data.Draws(len(dataset), 0, 6, 7), num_workers=workers)
    crops = torch.cat(list(loader))
    assert crops.shape == (6, 3, 64, 64) and crops.dtype == torch.uint8
    for n, position in data.Draws(4, 0, 6, 7):
        file = photos / f"{[0, 2, 4, 5][position]}.jpg"
        assert torch.equal(crops[n], data.read_crop(file, 64, 0, random.Random(f"7/{n}"), 0.3))


def test_photo_that_cannot_be_used_is_named_once_another_takes_its_place_and_twenty_in_a_row_end_the_run(photos):
    Image.new("RGB", (100, 60)).save(photos / "3.jpg")
    (photos / "7.jpg").write_bytes(b"")
    dataset = data.Photos(data.PhotoIndex(photos), range(8), 64, min_side=64, crop="center")
    with pytest.warns(UserWarning) as told:
        crops = [dataset[n, position] for n, position in enumerate((3, 7, 3, 7, 3, 7, 3, 7))]
    assert len(told) == 2 and "3.jpg: the short side is 60 px, min_side is 64" in str(told[0].message)
    assert "7.jpg: the file cannot be read" in str(told[1].message)
    good = [data.read_crop(photos / f"{i}.jpg", 64) for i in (0, 1, 2, 4, 5, 6)]
    places = [[torch.equal(crop, other) for other in good].index(True) for crop in crops]
    assert len(set(places)) > 2 and all(torch.equal(dataset[n, 3], crops[n]) for n in (0, 2, 4, 6))    # a pure function
    sentence = r"^20 photos in a row cannot be used, first .*/3.jpg: the short side .* \(--data_dir, --min_side\)$"
    with pytest.warns(UserWarning), pytest.raises(data.DataError, match=sentence):
        data.Photos(data.PhotoIndex(photos), [3] * 400 + [4], 64, min_side=64)[0, 1]


def test_tar_shards_are_read_in_place_and_unreadable_ones_are_named(photos, capsys):
    """With .json beside the photos, as img2dataset and SA-1B write them."""
    (photos / "2.json").touch()
    for shard, names in (("0.tar", ("1.jpg", "2.jpg", "2.json")), ("1.tar", ("3.jpg", "4.jpg"))):
        with tarfile.open(photos / shard, "w", format=tarfile.USTAR_FORMAT) as tar:
            for name in names:
                tar.add(photos / name, name)
    for place, expected in ((photos, [*range(8), 1, 2, 3, 4]), (photos / "*.tar", [1, 2, 3, 4])):
        index = data.PhotoIndex(place)
        assert "indexed 2 tar files, 4 photos, in" in capsys.readouterr().out
        for i, number in enumerate(expected):
            assert np.array_equal(Image.open(index.open(i)), Image.open(photos / f"{number}.jpg"))
    assert index.name(3).startswith(f"{photos}/1.tar at byte ")

    second = data.index_tar(0, photos / "0.tar")[1, 1] - 512                             # a header in the middle
    content = bytearray((photos / "0.tar").read_bytes())
    content[second:second + 512] = b"x" * 512
    (photos / "2.tar").write_bytes(content)
    (photos / "0.tar").write_bytes(b"no tar at all" * 100)
    os.truncate(photos / "1.tar", 5000)                                                  # a download that broke off
    for name, reason in zip("0123", ("ReadError", "unexpected end of data", "damaged header", "No such file")):
        with pytest.warns(UserWarning, match=f"skipped .*/{name}.tar: .*{reason}"):
            assert data.index_tar(0, photos / f"{name}.tar").shape == (0, 3)
    with pytest.raises(data.DataError, match=r"no .jpg .*\.tar; set --data_dir"):
        data.PhotoIndex(photos / "0.tar")

"""Training photos: reading, cropping, sampling, tar shards."""

import io
import os
import random
import re
import tarfile
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import photo
from PIL import Image, ImageOps

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


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_exif_that_cannot_be_parsed_does_not_lose_the_picture(format):
    file, good = (saved(gradient(80, 60), format, **options) for options in ({"exif": b"Exif\0\0no TIFF at all"}, {}))
    assert torch.equal(data.read_crop(file, 32), data.read_crop(good, 32))
    assert np.array_equal(ImageOps.exif_transpose(data.open_photo(file).copy()), data.open_photo(good))


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
    monkeypatch.setattr(data, "to_rgb", lambda crop, real=data.to_rgb: decoded.append(crop.width) or real(crop))
    fast = data.read_crop(saved(picture, "JPEG", quality=95), 100, 0, random.Random(3), 0.5).float()
    slow = data.read_crop(saved(picture, "PNG"), 100, 0, random.Random(3), 0.5).float()
    assert 100 <= decoded[0] < decoded[1] / 3.5 and (fast - slow).abs().mean() < 3


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
    samples = list(data.Draws(9, 0, 36, seed=7))
    assert [n for n, _ in samples] == list(range(36)) and len(data.Draws(9, 3, 36, seed=7)) == 33
    orders = [tuple(position for _, position in samples[start:start + 9]) for start in (0, 9, 18, 27)]
    assert all(sorted(order) == list(range(9)) for order in orders) and len(set(orders)) == 4
    assert list(data.Draws(9, 0, 36, seed=8)) != samples
    for start in (0, 3, 9, 35):
        assert list(data.Draws(9, start, 36, seed=7)) == samples[start:]


def test_photo_that_cannot_be_used_is_named_once_another_takes_its_place_and_twenty_in_a_row_end_the_run(photos):
    Image.new("RGB", (100, 60)).save(photos / "3.jpg")
    (photos / "7.jpg").write_bytes((photos / "7.jpg").read_bytes()[:900])
    dataset = data.Photos(data.PhotoIndex(photos), range(8), 64, min_side=64, crop="center")
    with pytest.warns(UserWarning) as told:
        crops = [dataset[n, position][1] for n, position in enumerate((3, 7, 3, 7, 3, 7, 3, 7))]
    assert len(told) == 2 and "3.jpg: the short side is 60" in str(told[0].message) and "7.jpg" in str(told[1].message)
    good = [data.read_crop(photos / f"{i}.jpg", 64) for i in (0, 1, 2, 4, 5, 6)]
    places = [[torch.equal(crop, other) for other in good].index(True) for crop in crops]
    assert len(set(places)) > 2 and all(torch.equal(dataset[n, 3][1], crops[n]) for n in (0, 2, 4, 6))
    with pytest.warns(UserWarning), pytest.raises(data.DataError, match="^20 photos .*3.jpg: .*--data_dir, --min_side"):
        data.Photos(data.PhotoIndex(photos), [3] * 400 + [4], 64, min_side=64)[0, 1]


def test_a_batch_that_the_processes_cannot_divide_is_one_sentence():
    with pytest.raises(data.DataError, match="batch_size 3 .* 2 processes"):
        data.make_loaders(Mock(batch_size=3), None, [], [], None, Mock(num_processes=2))


def write_tar(path, *members):
    """Photos, by path, and members of other kinds, by TarInfo."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for member in members:
            tar.addfile(member) if isinstance(member, tarfile.TarInfo) else tar.add(member, member.name)


def test_tar_shards_are_read_in_place(photos):
    """With .json beside the photos, as img2dataset and SA-1B write them."""
    (photos / "2.json").touch()
    write_tar(photos / "0.tar", photos / "1.jpg", photos / "2.jpg", photos / "2.json")
    write_tar(photos / "1.TAR", photos / "3.jpg", photos / "4.jpg")
    for place, expected in ((photos, [*range(8), 1, 2, 3, 4]), (photos / "[01].[tT]*", [1, 2, 3, 4])):
        index = data.PhotoIndex(place)
        for i, number in enumerate(expected):
            assert np.array_equal(Image.open(index.open(i)), Image.open(photos / f"{number}.jpg"))
    assert index.name(3).startswith(f"{photos}/1.TAR at byte ") and index.notes == []


def test_what_a_tar_or_a_folder_holds_and_is_no_photo_is_noted(photos, capfd):
    for name in ("a.png", "pca.png", "cat.pca.png", "out.png", "out.jsonl", "out.navi.png", "out.nyu.size.png"):
        (photos / name).touch()
    sparse, link = tarfile.TarInfo("scan.jpg"), tarfile.TarInfo("same.jpg")
    sparse.type, link.type, link.linkname = tarfile.GNUTYPE_SPARSE, tarfile.LNKTYPE, "5.jpg"
    write_tar(photos / "0.tar", photos / "5.jpg", sparse, link, photos / "6.jpg")
    (photos / "1.tar").write_bytes(b"no tar at all" * 100)
    content = (photos / "0.tar").read_bytes()
    (photos / "2.tar").write_bytes(content[:5000])                                       # a download that broke off
    (photos / "3.tar").write_bytes(content.replace(b"6.jpg", b"6.png"))                  # a damaged header
    for place in (photos, photos / "*"):
        index = data.PhotoIndex(place)
        assert [os.path.basename(path) for path in index.files] == [*(f"{i}.jpg" for i in range(8)), "a.png", "pca.png"]
        assert [Image.open(index.open(i)).size for i in (10, 11)] == [(180, 150)] * 2 and len(index) == 12
        reasons = "4 pictures", "0.tar: 2 links", "1.tar .*ReadError", "2.tar .*unexpected end", "3.tar .*damaged"
        assert all(re.search(reason, note) for reason, note in zip(reasons, index.notes, strict=True))
    with pytest.raises(data.DataError, match="no .jpg .*1.tar cannot be read.*--data_dir"):
        data.PhotoIndex(photos / "1.tar")
    assert capfd.readouterr() == ("", "")                                                # every process has an index


def test_what_hinders_the_sample_names_the_variable(monkeypatch):
    monkeypatch.setattr("pathlib.Path.home", Mock(side_effect=RuntimeError("no home")))
    for cache, reason in (("/dev/null/cache", "/dev/null"), ("", "home")):
        monkeypatch.setenv("BRIXEL_CACHE", str(cache))
        with pytest.raises(data.DataError, match=f"{reason}.*BRIXEL_CACHE"):
            data.sample_folder("wheel")

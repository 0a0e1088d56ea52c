"""Training photos: reading, cropping, sampling, tar shards."""
import io
import multiprocessing
import os
import random
import re
import subprocess
import sys
import tarfile
from functools import partial
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from conftest import ROOT, photo
from PIL import Image

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


@pytest.mark.parametrize("format", ["JPEG", "TIFF", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation, corner", [(1, (0, 0)), (2, (0, -1)), (3, (-1, -1)), (4, (-1, 0)), (5, (0, 0)),
                                                 (6, (0, -1)), (7, (-1, -1)), (8, (-1, 0)), (99, (0, 0))])
def test_exif_rotation_is_applied_and_what_cannot_be_parsed_loses_no_picture(format, orientation, corner):
    """corner: where, (row, column), the EXIF standard shows the first stored pixel, which is black in our picture."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    if orientation == 99 and format != "TIFF":
        exif = b"Exif\0\0no TIFF at all"
    file = saved(gradient(200, 200), format, exif=exif)
    for pixels in (data.read_crop(file, 64), torch.from_numpy(np.array(data.open_photo(file))).permute(2, 0, 1)):
        red_and_green = pixels[:2, corner[0], corner[1]]
        assert red_and_green.max() < 30 and pixels.amax(dim=(1, 2))[:2].min() > 230
        assert (pixels[0, 0].float().std() < 5) == (orientation in (5, 6, 7, 8))         # red grows along the columns


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "YCbCr", "1"])
def test_any_color_mode_becomes_rgb_and_transparency_white(mode):
    crop = data.read_crop(saved(gradient(80, 80).convert(mode), "TIFF"), 80)
    assert crop.shape == (3, 80, 80) and crop.dtype == torch.uint8
    if mode in ("LA", "RGBA"):
        assert data.read_crop(saved(Image.new(mode, (50, 50)), "PNG"), 20).unique().tolist() == [255]


@pytest.mark.parametrize("dtype, low, high, tags, seen", [
    (np.uint16, 0, 65535, {}, (0, 255)), (np.uint16, 0, 255, {}, (0, 1)), (np.int32, 0, 65535, {}, (0, 255)),
    (np.int32, 0, 255, {}, (0, 255)), (np.float32, 0, 1, {}, (0, 255)), (np.float32, 0, 255, {}, (0, 255)),
    (np.uint16, 65535, 0, {262: 0}, None), (np.int32, -1, 255, {}, None), (np.int32, 0, 65536, {}, None),
    (np.float32, 0, 256, {}, None), (np.float32, 0, np.nan, {}, None), (np.uint8, 0, 255, {339: 2}, None)])
def test_gray_photos_look_as_in_a_viewer_or_are_refused(dtype, low, high, tags, seen):
    """From low to high on the left, where no central crop is, and half of high on the right; TIFF tag 262: inverted."""
    gray = np.full((40, 120), (low + high) / 2)
    gray[:, :20] = np.linspace(low, high, 20)
    file = saved(Image.fromarray(gray.astype(dtype)), "TIFF", tiffinfo=tags)
    if seen:
        middle = sum(seen) / 2
        assert np.array(data.open_photo(file))[0, [0, 19, 50], 1].tolist() == pytest.approx([*seen, middle], abs=1)
        assert data.read_crop(file, 40).unique().tolist() == pytest.approx([middle], abs=1)
    else:
        for read in (partial(data.open_photo, name="the file"), partial(data.read_crop, size=40)):
            with pytest.raises(data.DataError, match="^the file cannot be read: .* gray values"):
                read(file)


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
    monkeypatch.setattr(data, "to_rgb", lambda image, real=data.to_rgb: decoded.append(image.width) or real(image))
    fast = data.read_crop(saved(picture, "JPEG", quality=95), 100, 0, random.Random(3), 0.5).float()
    slow = data.read_crop(saved(picture, "PNG"), 100, 0, random.Random(3), 0.5).float()
    assert 100 <= decoded[0] < decoded[1] / 3.5 and (fast - slow).abs().mean() < 3


def settings(**changes):
    """What make_loaders wants to know of a run."""
    return SimpleNamespace(**{"batch_size": 4, "teacher_size": [64], "min_side": 0, "crop": "random", "crop_min": 0.0,
                              "cache_crops": 0, "num_workers": 0, "seed": 7, **changes})


def test_split_is_fixed_and_samples_cover_every_epoch_in_a_new_order_and_go_on_wherever_a_run_is_resumed():
    """Batch b has side b % 3; a cached crop always has its own, the last element of a sample."""
    train, val = data.split(10, 0.2)
    assert val.tolist() == [1, 4] and sorted([*train, *val]) == list(range(10))
    assert [len(data.split(n, 0.01)[1]) for n in (3, 10**6)] == [1, 256]
    with pytest.raises(data.DataError, match="val_share"):
        data.split(1, 0.1)
    several = settings(teacher_size=[64, 96, 64])
    for cfg in (settings(), several, settings(teacher_size=[64, 96, 64], cache_crops=14)):
        samples = list(data.Samples(cfg, 9, range(72)))
        assert all(list(data.Samples(cfg, 9, range(n, 72))) == samples[n:] for n in (4, 12, 36, 68))
        assert [side for *_, side in samples[::4]] == (cfg.teacher_size * 18)[:18]
        if not cfg.cache_crops:
            orders = [tuple(position for _, position, _ in samples[start:start + 9]) for start in range(0, 72, 9)]
            assert all(sorted(order) == list(range(9)) for order in orders) and len(set(orders)) == 8
    assert {*samples} == {*data.Samples(several, 9, range(14))} and samples[:12] != samples[12:24]       # the cached
    with pytest.raises(data.DataError, match="--cache_crops 11 must be 12 or more"):
        data.Samples(settings(teacher_size=[64, 96, 64], cache_crops=11), 9, range(4))


def test_photo_that_cannot_be_used_is_named_another_takes_its_place_and_twenty_in_a_row_end_the_run(photos):
    Image.new("RGB", (100, 60)).save(photos / "3.jpg")
    (photos / "7.jpg").write_bytes((photos / "7.jpg").read_bytes()[:900])
    dataset = data.Photos(data.PhotoIndex(photos), range(8), crop="center")
    items = [dataset[n, 3 + 4 * (n % 2), 64] for n in range(40)]
    good = [data.read_crop(photos / f"{i}.jpg", 64) for i in (0, 1, 2, 4, 5, 6)]
    assert len({[torch.equal(crop, other) for other in good].index(True) for _, crop, _ in items}) > 2
    said = f"{photos}/3.jpg: the short side has 60 pixels, but min_side is 64"
    assert {skipped for *_, skipped in items[::2]} == {said}
    assert items[1][2].startswith(f"{photos}/7.jpg: the file cannot be read: ") and dataset[40, 2, 64][2] == ""
    assert dataset[3, 3, 60][2] == ""                                                    # min_side 0: the crop's side
    with pytest.raises(data.DataError, match="^20 training photos .*3.jpg: .*--data_dir, --min_side"):
        data.Photos(data.PhotoIndex(photos), [3] * 400 + [4])[0, 1, 64]


def loaders(photos, world=1, process=0, **changes):
    """make_loaders for samples 4 to 15 of eight photos, of which 0, 4 and 7 are held out."""
    prepare = partial(prepare_data_loader, num_processes=world, process_index=process)
    accelerator = Mock(num_processes=world, process_index=process, prepare=prepare)
    ids = data.split(8, 0.4)
    return data.make_loaders(settings(**changes), data.PhotoIndex(photos), *ids, range(4, 16), accelerator)


@pytest.mark.parametrize("cache_crops", [0, 14])
def test_loaders_give_each_process_its_part(cache_crops, photos, fresh_accelerate):
    for name in ("2", "4", "5", "6"):
        Image.new("RGB", (80, 80)).save(photos / f"{name}.jpg")
    changes = {"teacher_size": [64, 96, 64], "cache_crops": cache_crops}
    train, held_out = loaders(photos, num_workers=1, **changes)
    whole, parts = list(train), [list(loaders(photos, 2, k, **changes)[0]) for k in (0, 1)]
    assert [crops.shape for _, crops, _ in whole] == [(4, 3, 96, 96), (4, 3, 64, 64), (4, 3, 64, 64)]
    for batch, one, two in zip(whole, *parts, strict=True):
        assert batch[0] == one[0] + two[0] and batch[2] == one[2] + two[2] and len(one[2]) == 2
        assert torch.equal(batch[1], torch.cat([one[1], two[1]])) and (not cache_crops or max(one[0]) % 4 < 2)
    assert any("the short side has 80 pixels, but min_side is 96" in skipped for skipped in whole[0][2])
    assert [len(crop) * crop.shape[2] for _, crop in held_out] == [64, 64, 64, 96, 0, 96]
    assert torch.equal(list(held_out)[5][1][0], data.read_crop(photos / "7.jpg", 96))
    shares = [list(loaders(photos, 2, k, **changes)[1]) for k in (0, 1)]
    assert [len(share) for share in shares] == [4, 2] and len(shares[1][1][1]) == 0


def test_what_hinders_the_loaders_is_one_sentence_and_an_error_in_a_worker_ends_the_program(
        photos, monkeypatch, fresh_accelerate):
    with pytest.raises(data.DataError, match="batch_size 4 .* 3 processes"):
        loaders(photos, 3)
    with pytest.raises(data.DataError, match="^3 held-out photos .*first .*/0.jpg: .*150 pixels.* .--data_dir, --min"):
        loaders(photos, min_side=999)
    monkeypatch.setattr("tempfile.tempdir", "/" + "x" * 74)                              # the longest possible
    loaders(photos, num_workers=1)
    monkeypatch.setattr("tempfile.tempdir", "/" + "x" * 75)
    loaders(photos)
    with pytest.raises(data.DataError, match="TMPDIR .76 characters.*--num_workers 0"):
        loaders(photos, num_workers=1)
    code = """if True:                                            # holds the loader, so its workers, to the very end
        import atexit, brixel, data, sys
        atexit.register(brixel.end_workers)
        photos = data.Photos(data.PhotoIndex(sys.argv[1]), range(8), min_side=999)
        list(data.DataLoader(photos, sampler=[(0, 0, 64)] * 9, num_workers=1, worker_init_fn=brixel.ignore_signals))"""
    done = subprocess.run([sys.executable, "-c", code, photos], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and re.search("DataError: 8 training photos .*--min_side.$", done.stderr)


def test_photos_of_folders_and_tars_are_read_in_place_and_what_is_none_is_noted(photos, capfd, monkeypatch):
    """With .json beside the photos of a tar, as img2dataset and SA-1B write them; in a folder that is hidden itself."""
    photos = photos.rename(photos.with_name(".photos"))
    (photos / "deep" / "er").mkdir(parents=True)
    (photos / "deep" / ".cache").mkdir()
    for name in ("a.png", "pca.png", "cat.pca.png", "out.png", "out.jsonl", "out.navi.png", "out.nyu.size.png",
                 "2.json", "a.HEIC", "b.heic", "d41d8cd98", "deep/er/b.Tiff", "deep/c.WEBP", "deep/.cache/1.jpg",
                 "deep/._c.WEBP"):
        (photos / name).touch()
    for name, target in (("gone.jpg", "nowhere.jpg"), ("self.jpg", "self.jpg"), ("deep/loop", photos)):
        (photos / name).symlink_to(target)
    sparse, link, hidden = map(tarfile.TarInfo, ("scan.jpg", "same.jpg", "a/._5.jpg"))
    sparse.type, link.type, link.linkname = tarfile.GNUTYPE_SPARSE, tarfile.LNKTYPE, "5.jpg"
    for path, members in (("0.tar", (photos / "5.jpg", sparse, link, hidden, photos / "2.json", photos / "6.jpg")),
                          ("4.TAR", (photos / "3.jpg",))):
        with tarfile.open(photos / path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for member in members:
                tar.addfile(member) if isinstance(member, tarfile.TarInfo) else tar.add(member, f"./{member.name}")
    (photos / "1.tar").write_bytes(b"no tar at all" * 100)
    content = (photos / "0.tar").read_bytes()
    (photos / "2.tar").write_bytes(content[:5000])                                       # a download that broke off
    (photos / "3.tar").write_bytes(content.replace(b"6.jpg", b"6.png"))                  # a damaged header
    monkeypatch.setattr("multiprocessing.Pool", pool := Mock(side_effect=multiprocessing.Pool))
    monkeypatch.setattr("data.usable_cores", lambda: 9)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    for place in (photos, photos / "*"):
        monkeypatch.setattr("os.path.exists", asked := Mock(side_effect=os.path.exists))
        index = data.PhotoIndex(place)
        assert asked.call_count == 4 or place != photos              # of the folder and its links, not for each file
        names = [*(f"{i}.jpg" for i in range(8)), "a.png", "c.WEBP", "b.Tiff", "pca.png"]
        assert sorted(os.path.basename(path) for path in index.files) == sorted(names)
        pictures = [np.array(Image.open(index.open(i))) for i in range(12, len(index))]
        assert index.name(14).startswith(f"{photos}/4.TAR at byte ")
        for picture, name in zip(pictures, ("5.jpg", "6.jpg", "3.jpg"), strict=True):
            assert np.array_equal(picture, Image.open(photos / name))
        assert {*re.split(": |, ", index.notes[0])[1:]} == {
            "hidden files and folders (2)", "broken links (2)", "links to folders (1)", ".heic (2)", ".json (1)",
            "pictures that a run or a probe wrote (4)", "files without an ending (1)", ".jsonl (1)"}
        reasons = (".", "0.tar: left out: links and sparse files .2.$", "1.tar .*ReadE",
                   "2.tar .*unexpected end", "3.tar .*damaged")
        assert all(re.search(reason, note) for reason, note in zip(reasons, index.notes, strict=True))
    assert [call.args for call in pool.call_args_list] == [(1,), (1,)]                   # this process's share of cores
    for name, reason in (("1.tar", "no photo .*.jpg.*1.tar cannot be read"), ("[ab].*[cC]", "no photo .*heic .2."),
                         ("gone.jpg", "no photo .*broken links"), ("nothing", "no such file or folder.*nothing")):
        with pytest.raises(data.DataError, match=f"{reason}.*set --image"):
            data.PhotoIndex(photos / name, flag="--image")
    assert capfd.readouterr() == ("", "")                                                # every process has an index

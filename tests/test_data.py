"""Training photos: reading, cropping, streams."""

import io
import os
import random
import re
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch
from conftest import ROOT, photo
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
        image = Image.fromarray(np.array(gradient(80, 80).convert("L")).astype(np.uint16) << 8)
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
    for size, smallest in [(64, 150), (250, 250), (500, 150)]:
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


def test_damaged_exif_does_not_matter():
    rng, image = random.Random(0), gradient(90, 70)
    exif = image.getexif()
    for tag in (data.ORIENTATION, 0x011A, 0x0131, 0x8298):
        exif[tag] = {data.ORIENTATION: 6, 0x011A: 72.0}.get(tag, "some text")
    good = saved(image, "JPEG", exif=exif).getvalue()
    for _ in range(300):
        damaged = bytearray(good)
        for _ in range(rng.randrange(1, 12)):
            damaged[rng.randrange(20, 160)] ^= 1 << rng.randrange(8)
        try:
            assert data.read_crop(io.BytesIO(damaged), 32).shape == (3, 32, 32)
        except data.PhotoError as error:
            assert error.kind == "unreadable"


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
    index = data.PhotoIndex(photos)
    one, two = (data.Photos(index, [0, 2, 4, 5], 100, 7, 64) for _ in range(2))
    picks = [one.pick(n) for n in range(12)]
    assert all(sorted(picks[i:i + 4]) == [0, 2, 4, 5] for i in (0, 4, 8)) and picks[:4] != picks[4:8]
    for n in (11, 3, 0):
        assert torch.equal(one[n][0], two[n][0])
    assert not torch.equal(data.Photos(index, [0, 2, 4, 5], 100, 8, 64)[0][0], one[0][0])


def test_bad_photo_is_replaced_by_the_next_one_and_told_once(photos):
    (photos / "3.jpg").write_bytes(b"")
    index = data.PhotoIndex(photos)
    stream = data.Photos(index, range(8), 64, 0, 64)
    items = [stream[n] for n in range(24)]
    assert all(crop.shape == (3, 64, 64) for crop, _ in items)
    assert [entry[:2] for _, left_out in items for entry in left_out] == [(index.name(3), "unreadable")]


def test_split_is_fixed_disjoint_and_complete():
    train, held_out = data.split(50, 0.1)
    assert len(held_out) == 5 and sorted([*train, *held_out]) == list(range(50))
    assert np.array_equal(data.split(50, 0.1)[1], held_out) and len(data.split(3, 0.01)[1]) == 1
    for n, share in [(1, 0.1), (10, 0.0), (10, 1.0)]:
        with pytest.raises(BrixelError, match="val_share"):
            data.split(n, share)


def test_folders_are_searched_recursively_whatever_the_case_of_the_suffix(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name in ("a/b/one.JPG", "two.webp", "a/three.Tiff", "a/notes.txt"):
        (tmp_path / name).touch()
    index = data.PhotoIndex(tmp_path)
    assert [os.path.basename(index.name(i)) for i in range(len(index))] == ["one.JPG", "three.Tiff", "two.webp"]


def test_missing_and_empty_folders_are_one_sentence(tmp_path):
    with pytest.raises(BrixelError, match="no such file or folder.*--data_dir"):
        data.PhotoIndex(tmp_path / "nothing")
    with pytest.raises(BrixelError, match=r"no photo \(.jpg .*--data_dir"):
        data.PhotoIndex(tmp_path)


# --- tar shards

def shard(path, photos, extra=()):
    with tarfile.open(path, "w") as tar:
        for name, content in [*photos, *extra]:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def shards(tmp_path):
    """Three tars of four photos each, with .json beside each photo, as img2dataset and SA-1B write them."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for s in range(3):
        members = [(f"{s}{i}.jpg", saved(gradient(100 + 10 * s + i, 80), "JPEG").getvalue()) for i in range(4)]
        shard(folder / f"{s:05d}.tar", members, [(f"{s}{i}.json", b"{}") for i in range(4)])
    return folder


def test_tar_shards_are_read_in_place(shards, tmp_path):
    for pattern in (shards, shards / "*.tar", shards / "{00000..00002}.tar"):
        index = data.PhotoIndex(pattern, tmp_path / "index.npz")
        assert len(index) == 12 and [Image.open(index.open(i)).width for i in (0, 5, 11)] == [100, 111, 123]
    assert len(data.PhotoIndex(shards / "00001.tar")) == 4
    a, b = data.Photos(index, range(12), 50, 3, 64), data.Photos(data.PhotoIndex(shards), range(12), 50, 3, 64)
    assert torch.equal(a[30][0], b[30][0])


def test_tar_index_is_kept_and_renewed_when_a_shard_changes(shards, tmp_path, monkeypatch):
    cache, read = tmp_path / "index.npz", []
    real = data.index_tar
    monkeypatch.setattr(data, "index_tar", lambda path: read.append(path) or real(path))
    first = data.PhotoIndex(shards, cache)
    assert len(read) == 3 and np.array_equal(data.PhotoIndex(shards, cache).members, first.members) and len(read) == 3
    shard(shards / "00001.tar", [("x.jpg", saved(gradient(90, 90), "JPEG").getvalue())])
    assert len(data.PhotoIndex(shards, cache)) == 9 and len(read) == 4


def test_damaged_tars_and_members_are_left_out_with_a_reason(shards):
    whole = bytearray((shards / "00001.tar").read_bytes())
    second = data.index_tar(shards / "00001.tar")[1][0] - 512
    whole[second:second + 200] = b"x" * 200
    (shards / "00001.tar").write_bytes(whole)
    (shards / "00002.tar").write_bytes(b"no tar at all" * 100)
    shard(shards / "00003.tar", [("../../up.jpg", saved(gradient(90, 90), "JPEG").getvalue()), ("bad.jpg", b"text")])
    index = data.PhotoIndex(shards)
    assert len(index) == 6 and sorted(os.path.basename(tar) for tar in index.bad) == ["00001.tar", "00002.tar"]
    (shards / "00004.tar").symlink_to(shards / "nowhere.tar")
    assert len(data.PhotoIndex(shards, shards / "index.npz")) == 6
    assert len(data.PhotoIndex(shards, shards / "index.npz")) == 6 and len(data.PhotoIndex(shards).bad) == 3
    assert "damaged header at byte" in index.bad[str(shards / "00001.tar")]
    with pytest.raises(data.PhotoError):
        data.read_crop(index.open(5), 32)
    assert data.read_crop(index.open(4), 32).shape == (3, 32, 32)


@pytest.mark.slow
def test_thousand_shards_of_a_thousand_photos_stay_flat_in_memory(tmp_path, capsys):
    import resource
    import time

    content = saved(gradient(80, 80), "JPEG").getvalue()
    shard(tmp_path / "first.tar", [(f"{i}.jpg", content) for i in range(1000)])
    (tmp_path / "shards").mkdir()
    for s in range(1000):
        os.link(tmp_path / "first.tar", tmp_path / "shards" / f"{s:05d}.tar")
    seconds = []
    for _ in range(2):                             # first without, then with the index
        start = time.time()
        index = data.PhotoIndex(tmp_path / "shards", tmp_path / "index.npz")
        seconds.append(time.time() - start)
    assert len(index) == 1_000_000
    stream = data.Photos(index, np.arange(len(index)), 10**9, 0, 32)
    used = []
    for n in range(10_000):
        assert stream[n * 97][0] is not None
        if n in (1000, 9999):
            used.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    with capsys.disabled():
        print(f"\n1,000,000 photos: indexed in {seconds[0]:.1f} s, opened with the index in {seconds[1]:.1f} s; "
              f"peak memory {used[0]:.0f} MiB after 1,000 reads, {used[1]:.0f} MiB after 10,000")
    assert used[1] - used[0] < 50


def test_bench_compares_two_ways_and_refuses_in_one_sentence(photos):
    def bench(folder):
        return subprocess.run([sys.executable, ROOT / "data.py", "--bench", folder], capture_output=True, text=True, check=False)
    assert re.search(r"60 crops of 1024 px from 8 photos, \d+ thread\(s\): .*ratio \d", bench(photos).stdout)
    (photos / "bad.jpg").write_bytes(b"no photo")
    for folder, reason in ((photos, "bad.jpg"), ("nowhere", "set --bench")):
        done = bench(folder)
        assert done.returncode == 1 and done.stderr.startswith("data.py: error: ") and reason in done.stderr
        assert "Traceback" not in done.stderr

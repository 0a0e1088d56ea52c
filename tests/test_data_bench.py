"""The four benchmark readers, on rendered scenes written in each benchmark's own format, and on three real ADE20K pairs."""
import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import render

import data
from brixel import BrixelError

FIXTURES = HERE / "fixtures"
ADE_PHOTOS = FIXTURES / "ade20k" / "images" / "validation"
SPLITS = {"train": 3, "val": 2}


@pytest.fixture(scope="module")
def textures():
    return render.load_textures(ADE_PHOTOS, side=128)


@pytest.fixture
def ade(tmp_path, textures):
    render.write_ade20k(tmp_path, textures, SPLITS, height=60, width=80)
    return tmp_path / "ADEChallengeData2016"


@pytest.fixture
def cityscapes(tmp_path, textures):
    render.write_cityscapes(tmp_path, textures, SPLITS, height=64, width=128)
    return tmp_path


@pytest.fixture
def nyu(tmp_path, textures):
    render.write_nyu_parquet(tmp_path, textures, SPLITS, height=48, width=64)
    return tmp_path


@pytest.fixture
def nyu_mat(tmp_path, textures):
    render.write_nyu_mat(tmp_path, textures, SPLITS, height=48, width=64)
    return tmp_path


@pytest.fixture
def navi(tmp_path, textures):
    render.write_navi(tmp_path, textures, {"train": 8, "val": 2}, height=96, width=128, objects=2)
    return tmp_path


def refusal(dataset):
    """The sentence with which a dataset is refused after a scan of all its files."""
    with pytest.raises(BrixelError) as error:
        dataset.refuse(list(dataset.scan(range(len(dataset)))))
    return str(error.value)


def truncate(path, keep=0.6):
    content = path.read_bytes()
    path.write_bytes(content[:int(len(content) * keep)])


# ----------------------------------------------------------------------------------------------------------------------
# Segmentation

def test_ade20k_labels_of_real_pairs():
    """Read off the pictures: sky (3 on disk, class 2) above building (1), grass (9) and, in the third, road (6) below."""
    items = list(data.ADE20K(FIXTURES / "ade20k", "val", 256))
    assert [tuple(item["image"].shape) for item in items] == [(3, 256, 256)] * 3
    for item, below in zip(items, (9, data.IGNORE, 6), strict=True):
        assert item["label"][5, 150] == 2 and item["label"][245, 170] == below
    assert items[0]["label"][130, 150] == 1 and items[1]["label"][110, 180] == 1
    seen = torch.cat([item["label"].unique() for item in items]).unique()
    assert 0 <= seen.min() and seen[-1] == data.IGNORE and seen[-2] < 150


def test_ade20k_label_mapping_by_hand(ade):
    labels = np.array([[0, 1], [2, 150]], np.uint8)
    target = data.ADE20K(ade, "val", 32).targets(labels, (0, 0, 2, 2), 2, 2)["label"]
    assert target.tolist() == [[255, 0], [1, 149]]


def test_ade20k_root_or_its_parent(ade):
    assert len(data.ADE20K(ade, "train", 32)) == len(data.ADE20K(ade.parent, "train", 32)) == 3


def test_image_and_label_stay_aligned(tmp_path):
    """A photo whose color is its label: after crop and resize both still say the same, away from edges."""
    label = np.kron(np.arange(1, 13, dtype=np.uint8).reshape(3, 4), np.ones((50, 50), np.uint8))
    for kind, array, end in (("images", np.stack([label * 20] * 3, -1), "jpg"), ("annotations", label, "png")):
        (tmp_path / kind / "validation").mkdir(parents=True)
        Image.fromarray(array).save(tmp_path / kind / "validation" / f"a.{end}", quality=100, subsampling=0)
    item = data.ADE20K(tmp_path, "val", 90)[0]                                        # 200x150 -> the middle 150x150
    agree = (item["image"][0].float() / 20 - 1 - item["label"].float()).abs() < 0.5
    assert agree.float().mean() > 0.9
    assert item["label"][0].tolist() == [0] * 15 + [1] * 30 + [2] * 30 + [3] * 15


def test_cityscapes_ids_map_to_the_19_classes(cityscapes):
    every = np.arange(34, dtype=np.uint8)[None]
    target = data.Cityscapes(cityscapes, "val", 32).targets(every, (0, 0, 34, 1), 1, 34)["label"][0].tolist()
    names = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13, 27: 14,
             28: 15, 31: 16, 32: 17, 33: 18}
    assert target == [names.get(i, 255) for i in range(34)]


def test_cityscapes_both_layouts_read_the_same(tmp_path, textures):
    for name, suffix in (("a", ""), ("b", "_trainvaltest")):
        render.write_cityscapes(tmp_path / name, textures, SPLITS, height=64, width=128, suffix=suffix)
    a, b = (data.Cityscapes(tmp_path / name, "train", 32) for name in "ab")
    assert len(a) == len(b) == 3 and tuple(a[0]["label"].shape) == (32, 64)
    for x, y in zip(a, b, strict=True):
        assert all(torch.equal(x[key], y[key]) for key in x)


# ----------------------------------------------------------------------------------------------------------------------
# Depth and normals

@pytest.mark.parametrize("split_format", ["v5", "v7.3"])
def test_nyu_parquet_and_mat_agree(tmp_path, textures, split_format):
    """The same scenes, once as tanganke/nyuv2 and once as the original files, in MATLAB's order."""
    render.write_nyu_parquet(tmp_path / "parquet", textures, SPLITS, height=48, width=64)
    render.write_nyu_mat(tmp_path / "mat", textures, SPLITS, height=48, width=64, split_format=split_format)
    for split, count in SPLITS.items():
        a, b = (data.NYU(tmp_path / name, split, 48) for name in ("parquet", "mat"))
        assert len(a) == len(b) == count
        for x, y in zip(a, b, strict=True):
            assert tuple(x["image"].shape) == (3, 48, 64) and tuple(x["depth"].shape) == (1, 48, 64)
            assert torch.equal(x["image"], y["image"]) and torch.equal(x["depth"], y["depth"])


def test_nyu_depth_is_the_renderers(nyu, textures):
    rng = np.random.default_rng(2)                                                    # write_nyu_parquet's seed
    for item in data.NYU(nyu, "train", 48):
        image, depth, _, _ = render.draw(rng, textures, 48, 64)
        np.testing.assert_array_equal(item["depth"][0], depth)
        np.testing.assert_array_equal(item["image"].permute(1, 2, 0), image)
        assert item["valid"].all()


def test_nyu_pixels_without_depth_are_not_valid(nyu):
    target = data.NYU(nyu, "val", 48).targets(np.array([[0, 0.0005], [0.5, 9]], np.float32), (0, 0, 2, 2), 2, 2)
    assert target["valid"].tolist() == [[[False, False], [True, True]]]


@pytest.mark.parametrize("size", [96, 64, 40])
def test_navi_photo_depth_and_normals_are_the_renderers(tmp_path, textures, size):
    truth = render.write_navi(tmp_path, textures, {"train": 8, "val": 2}, height=192, width=256, objects=2)
    dataset, errors = data.NAVI(tmp_path, "train", size), []
    for sample, item in zip(dataset.samples, dataset, strict=True):
        image, depth, normal, mask = truth[(*sample["depth"].parts[-4:-2], sample["depth"].stem)]
        box = data.center_box(mask.shape[::-1], True)
        depth, normal, mask = (data.resize_nearest(x, box, size, size) for x in (depth, normal, mask))
        image = np.array(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC, box=box)).astype(float)
        loaded = item["image"].permute(1, 2, 0).numpy()
        assert np.abs(loaded - image).mean() < 6 < np.abs(loaded[::-1] - image).mean()        # JPEG; upside down
        np.testing.assert_array_equal(item["valid"][0], mask)
        np.testing.assert_allclose(item["depth"][0].numpy()[mask], depth[mask], rtol=1e-3)
        smooth = np.all([(np.roll(normal, shift, (0, 1)) * normal).sum(-1) > 0.9 for shift in
                         ((2, 0), (-2, 0), (0, 2), (0, -2), (2, 2), (-2, -2), (2, -2), (-2, 2))], axis=0)
        keep = item["normal_valid"][0].numpy() & smooth
        cosine = (item["normal"].permute(1, 2, 0).numpy() * normal).sum(-1)[keep]
        errors.append(np.degrees(np.arccos(cosine.clip(-1, 1))))
    errors = np.concatenate(errors)
    assert len(errors) > size**2 and errors.mean() < 2


def test_navi_depth_of_a_code_by_hand():
    depth = data.depth_from_code(np.array([0, 1, 655.35, 65535], np.float32))
    np.testing.assert_allclose(depth, [0, 655.35, 1, 0.01], rtol=1e-6)                # 655350 / code in mm


def test_navi_encoded_unit_is_the_code(navi):
    metric, encoded = (data.NAVI(navi, "val", 48, unit=unit)[0] for unit in ("metric", "encoded"))
    both = metric["valid"] & encoded["valid"]
    assert both.any()
    torch.testing.assert_close(metric["depth"][both] * encoded["depth"][both] * 1000, torch.full((int(both.sum()),), 655.35))


def test_navi_splits(tmp_path, textures):
    render.write_navi(tmp_path, textures, {"train": 24, "val": 6}, height=32, width=32, objects=2)
    def names(split, protocol):
        return {"/".join(s["depth"].parts[-4:-2][:1] + (s["depth"].parts[-3], s["depth"].stem))
                for s in data.NAVI(tmp_path, split, 32, protocol=protocol).samples}
    rng, expected = random.Random(42), set()
    for k in range(2):                                                                # 15 photos each: round(1.5) = 2
        ids = list(range(15))
        rng.shuffle(ids)
        expected |= {f"object_{k}/wild_set/{i:03d}" for i in ids[:2]}
    assert names("val", "paper") == expected and len(names("train", "paper") | expected) == 30
    assert len(names("train", "dataset")) == 24 and len(names("val", "dataset")) == 6
    assert not names("train", "dataset") & names("val", "dataset")
    assert len(names("val", "probe3d")) == 30 and {n.split("/")[1] for n in names("train", "probe3d")} == {"multiview-00-pixel_5"}


def test_navi_copies_that_probe3d_leaves_are_no_samples(navi):
    before = len(data.NAVI(navi, "train", 32))
    for kind, end in (("images", "jpg"), ("depth", "png")):
        folder = navi / "object_0" / "wild_set" / kind
        (folder / f"downsampled_000.{end}").write_bytes((folder / f"000.{end}").read_bytes())
    assert len(data.NAVI(navi, "train", 32)) == before


def test_normals_of_a_tilted_plane_by_hand():
    """The plane z + x = 1 seen with focal length 10: depth 1 / (1 + x / 10), normal (1, 0, 1) / sqrt 2."""
    depth = np.tile(1 / (1 + (np.arange(9) - 4) / 10), (9, 1)).astype(np.float32)
    depth[4, 4] = 0
    normal, valid = data.normals_from_depth(depth, 10)
    assert valid.sum() == 7 * 7 - 5 and not valid[4, 4] and not valid[4, 3] and not valid[0].any()
    np.testing.assert_allclose(normal[:, valid], np.tile([[0.5**0.5], [0], [0.5**0.5]], valid.sum()), atol=1e-5)


def test_normals_agree_with_the_released_code_where_the_surface_is_smooth():
    """The released code takes forward differences, ours are central: equal up to the curvature."""
    fixture = load_file(FIXTURES / "probes.safetensors")
    depth, mask = fixture["navi.depth"].numpy(), fixture["navi.mask"].numpy() > 0
    normal, valid = data.normals_from_depth(depth * mask, 30)
    released = fixture["navi.normals (H,W,3; fx=fy=30,cx=cy=11.5)"].numpy()
    angle = np.degrees(np.arccos((normal.transpose(1, 2, 0) * released).sum(-1)[valid].clip(-1, 1)))
    assert valid.sum() > 50 and np.median(angle) < 5


# ----------------------------------------------------------------------------------------------------------------------
# What all readers share

def test_patch_size_rounds_the_image_and_not_the_labels(cityscapes, nyu, ade):
    item = data.Cityscapes(cityscapes, "val", 60, patch_size=14)[0]
    assert tuple(item["image"].shape) == (3, 56, 126) and tuple(item["label"].shape) == (60, 120)
    item = data.NYU(nyu, "val", 48, patch_size=14, scale=4)[0]
    assert tuple(item["image"].shape) == (3, 4 * 42, 4 * 70) and tuple(item["depth"].shape) == (1, 48, 64)
    item = data.ADE20K(ade, "val", 256, patch_size=14)[0]
    assert tuple(item["image"].shape) == (3, 252, 252) and tuple(item["label"].shape) == (256, 256)


def test_limit_keeps_evenly_spaced_samples(ade):
    everything, some = (data.ADE20K(ade, "train", 32, limit=limit).samples for limit in (0, 2))
    assert some == [everything[0], everything[1]] and len(data.ADE20K(ade, "train", 32, limit=9)) == 3


@pytest.mark.parametrize("reader", [data.ADE20K, data.Cityscapes, data.NYU, data.NAVI])
def test_missing_or_empty_root_shows_the_expected_tree(reader, tmp_path):
    with pytest.raises(BrixelError, match="no folder.*--data_dir") as error:
        reader(tmp_path / "nothing", "train", 32)
    assert reader.tree in str(error.value)
    with pytest.raises(BrixelError, match="no train samples") as error:
        reader(tmp_path, "train", 32)
    assert reader.tree in str(error.value)


def test_missing_partners_are_counted_and_the_first_named(ade, tmp_path, textures):
    (ade / "annotations" / "training" / "ADE_train_00000001.png").unlink()
    (ade / "images" / "training" / "ADE_train_00000003.jpg").unlink()
    with pytest.raises(BrixelError, match=r"2 files missing for 3 samples .* annotation of ADE_train_00000001"):
        data.ADE20K(ade, "train", 32)
    render.write_cityscapes(tmp_path / "c", textures, SPLITS, height=32, width=64)
    next((tmp_path / "c").rglob("*train/bochum/*labelIds.png")).unlink()
    with pytest.raises(BrixelError, match=r"1 files missing .* labelIds of bochum/bochum_000001"):
        data.Cityscapes(tmp_path / "c", "train", 32)


@pytest.mark.parametrize("kind", ["images", "depth", "masks"])
def test_navi_missing_files_are_named(navi, kind):
    next((navi / "object_1" / "wild_set" / kind).glob("001.*")).unlink()
    with pytest.raises(BrixelError, match=rf"1 files missing .* {kind.rstrip('s')} of object_1/wild_set/001"):
        data.NAVI(navi, "train", 32)


@pytest.mark.parametrize("keep", [0.0, 0.02, 0.6, 0.9])
def test_truncated_files_are_counted_and_the_first_named(ade, keep):
    truncate(ade / "images" / "training" / "ADE_train_00000002.jpg", keep)
    truncate(ade / "annotations" / "training" / "ADE_train_00000003.png", keep)
    sentence = refusal(data.ADE20K(ade, "train", 32))
    assert "2 of 3 train samples" in sentence and "ADE_train_00000002.jpg is truncated" in sentence
    assert data.ADE20K.tree in sentence


def test_wrong_sizes_and_labels_out_of_range_are_refused(ade, cityscapes):
    folder = ade / "annotations" / "training"
    Image.fromarray(np.full((60, 80), 151, np.uint8)).save(folder / "ADE_train_00000001.png")
    Image.fromarray(np.ones((60, 79), np.uint8)).save(folder / "ADE_train_00000002.png")
    Image.fromarray(np.ones((60, 80, 3), np.uint8)).save(folder / "ADE_train_00000003.png")
    dataset = data.ADE20K(ade, "train", 32)
    reasons = list(dataset.scan(range(3)))
    assert "labels 151..151, allowed 0..150" in reasons[0]
    assert "79x60 pixels, its photo 80x60" in reasons[1] and "not a one-channel" in reasons[2]
    assert "3 of 3 train samples" in refusal(dataset)
    ids = next((cityscapes / "gtFine" / "val").rglob("*.png"))
    Image.fromarray(np.full((64, 128), 34, np.uint8)).save(ids)
    assert "1 of 2 val samples" in refusal(data.Cityscapes(cityscapes, "val", 32))


def test_frames_of_different_size_are_refused(cityscapes):
    image = next((cityscapes / "leftImg8bit" / "train").rglob("*000002*"))
    label = next((cityscapes / "gtFine" / "train").rglob("*000002*"))
    for path in (image, label):
        Image.open(path).resize((100, 64), Image.Resampling.NEAREST).save(path)
    assert "a frame of 100x64 where most are 128x64" in refusal(data.Cityscapes(cityscapes, "train", 32))


def test_nyu_broken_files_are_refused(nyu, tmp_path, textures):
    file = next((nyu / "data").glob("train-00001*"))
    truncate(file)
    with pytest.raises(BrixelError, match=r"1 of 2 files cannot be used, first: .*train-00001"):
        data.NYU(nyu, "train", 48)
    render.write_nyu_mat(tmp_path / "mat", textures, SPLITS, height=48, width=64)
    truncate(tmp_path / "mat" / "nyu_depth_v2_labeled.mat")
    with pytest.raises(BrixelError, match="cannot be read"):
        data.NYU(tmp_path / "mat", "train", 48)
    (tmp_path / "mat" / "splits.mat").unlink()
    with pytest.raises(BrixelError, match=r"splits.mat is missing"):
        data.NYU(tmp_path / "mat", "train", 48)


def test_nyu_depth_in_millimeters_is_refused(nyu_mat):
    import h5py
    with h5py.File(nyu_mat / "nyu_depth_v2_labeled.mat", "r+") as file:
        file["depths"][1] *= 1000
    sentence = refusal(data.NYU(nyu_mat, "train", 48))
    assert "1 of 3 train samples" in sentence and "image 2 of" in sentence and "expected meters" in sentence


def test_navi_broken_annotations_and_depth_are_refused(navi):
    scene = navi / "object_0" / "wild_set"
    Image.fromarray(np.ones((96, 128), np.uint8)).save(scene / "depth" / "001.png")
    rows = json.loads((scene / "annotations.json").read_text())
    rows[2]["image_size"] = [1, 2]
    (scene / "annotations.json").write_text(json.dumps(rows))
    reasons = "\n".join(map(str, data.NAVI(navi, "val", 32, protocol="probe3d").scan(range(10))))
    assert "001.png is not a 16-bit depth image" in reasons and "has 2x1 pixels, its photo 96x128" in reasons
    del rows[0]["camera"]
    (scene / "annotations.json").write_text(json.dumps(rows))
    with pytest.raises(BrixelError, match="no list of NAVI annotations"):
        data.NAVI(navi, "val", 32)

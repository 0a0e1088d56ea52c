"""The four benchmark readers, on rendered scenes in each benchmark's own format, and on three real ADE20K pairs."""
import fcntl
import io
import shutil

import h5py
import numpy as np
import pyarrow
import pytest
import render
import torch
from conftest import FIXTURES, TEXTURES
from PIL import Image
from pyarrow import parquet
from scipy.io import savemat
from torch.utils.data import DataLoader

import data


@pytest.fixture
def copy(scenes, tmp_path):
    """A copy of the folder with the four benchmarks, to be damaged."""
    return shutil.copytree(scenes[0], tmp_path / "copy")


def test_ade20k_labels_of_real_pairs():
    """Read off the pictures: sky (3 on disk, class 2) above building (1), grass (9), in the third road (6) below."""
    for item, below in zip(data.ADE20K(FIXTURES / "ade20k", "val", 256), (9, data.IGNORE, 6), strict=True):
        assert item["label"][5, 150] == 2 and item["label"][245, 170] == below


@pytest.mark.parametrize("orientation, width", [(1, 200), (3, 200), (6, 200), (6, 150)])
def test_image_and_label_stay_aligned_as_stored_and_ade20k_classes_are_labels_less_one(orientation, width, tmp_path):
    """A photo whose color is its label, 0, 1, 20, 34, .. in squares of 50 px; the middle 150x150 is taken.  No EXIF."""
    label = np.kron(np.array([0, 1, *range(20, 160, 14)], np.uint8).reshape(3, 4), np.ones((50, 50), np.uint8))
    label[label == 146], exif, left = 150, Image.Exif(), (width - 150) // 2
    label, exif[0x0112] = label[:, :width], orientation
    photo = np.stack([label] * 3, -1)
    render.save(photo, tmp_path / "images/validation/a.jpg", quality=100, subsampling=0, exif=exif)
    render.save(label, tmp_path / "annotations/validation/a.png")
    item = data.ADE20K(tmp_path, "val", 150)[0]
    assert item["image"].shape == (3, 150, 150) and item["label"].dtype == torch.uint8
    assert np.array_equal(item["label"], label[:, left:left + 150] - np.uint8(1)) and item["label"][0, 0] == 255
    assert ((item["image"][0].float() - 1 - item["label"].float())[:, 50:].abs() < 2).float().mean() > 0.95


def test_cityscapes_ids_map_to_the_19_classes_in_either_folder_layout(copy):
    by_id = [*[255] * 7, 0, 1, 255, 255, 2, 3, 4, 255, 255, 255, 5, 255, *range(6, 16), 255, 255, *range(16, 19)]
    assert data.Cityscapes.class_of.tolist() == by_id
    items = list(data.Cityscapes(copy, "train", 32))
    for kind in ("leftImg8bit", "gtFine"):
        (copy / f"{kind}_trainvaltest").mkdir()
        (copy / "cityscapes" / kind).rename(copy / f"{kind}_trainvaltest" / kind)
    for old, new in zip(items, data.Cityscapes(copy, "train", 32), strict=True):
        assert torch.equal(old["image"], new["image"]) and torch.equal(old["label"], new["label"])


def test_nyu_parquet_is_the_rendered_scene_and_mat_the_same(benchmarks, tmp_path):
    items = list(data.NYU("nyuv2", "train", 48))
    for item, (_, _, image, depth, _, _) in zip(items, render.scenes(TEXTURES, {"train": 3}, 2, 48, 64), strict=True):
        np.testing.assert_array_equal(item["image"].permute(1, 2, 0), image)
        np.testing.assert_array_equal(item["depth"][0], depth)
        assert item["valid"].all()
    items[0]["depth"][0, 0, :2] = torch.tensor([0, 0.0005])                           # no depth: not valid
    with h5py.File(tmp_path / "nyu_depth_v2_labeled.mat", "w", userblock_size=512) as file:       # MATLAB's order
        file["images"] = np.stack([item["image"].numpy().transpose(0, 2, 1) for item in items])
        file["depths"] = np.stack([item["depth"][0].numpy().T for item in items])
    savemat(tmp_path / "splits.mat", {"testNdxs": np.array([[1.0]]), "trainNdxs": np.array([[2.0], [3.0]])})
    train = data.NYU(tmp_path, "train", 48)
    with open(tmp_path / "nyu_depth_v2_labeled.mat") as file:
        fcntl.flock(file, fcntl.LOCK_EX)                                              # as where files cannot be locked
        again = [*data.NYU(tmp_path, "val", 48), *train]
    for old, new in zip(items, again, strict=True):
        assert torch.equal(old["image"], new["image"]) and torch.equal(old["depth"], new["depth"])
    assert (~again[0]["valid"]).nonzero().tolist() == [[0, 0, 0], [0, 0, 1]]
    (tmp_path / "nyu_depth_v2_labeled.mat").write_bytes(b"cut")
    with pytest.raises(data.DataError, match="image 2 of .*labeled.mat cannot be read"):
        train[0]


def test_nyu_of_other_shapes_and_units_is_the_same_or_refused(tmp_path):
    [(*_, image, depth, _, _)] = render.scenes(TEXTURES, {"train": 1}, 2, 48, 64)
    image[0, 0], depth[0, :2] = 255, (np.nan, 0)
    pictures = [io.BytesIO(), io.BytesIO()]                                           # columns of type Image
    Image.fromarray(image).save(pictures[0], "PNG")
    Image.fromarray(depth).save(pictures[1], "TIFF")
    same = [(image, depth[None]), (image.transpose(2, 0, 1) / 255, depth), (image.astype(float), depth[..., None]),
            [{"bytes": file.getvalue()} for file in pictures]]
    wrong = [(image, depth * 1000), (image, np.array(1)), (image / 127.5 - 1, depth), (image[:-1], depth),
             (image.transpose(1, 0, 2), depth.T)]
    for k, cells in enumerate(same + wrong):
        columns = zip(("image", "depth"), [[cell if isinstance(cell, dict) else cell.tolist()] for cell in cells])
        (tmp_path / f"{k}" / "data").mkdir(parents=True)
        parquet.write_table(pyarrow.table(dict(columns)), tmp_path / f"{k}/data/train-00000-of-00001.parquet")
        dataset = data.NYU(tmp_path / f"{k}", "train", 48)
        if k < len(same):
            np.testing.assert_array_equal(dataset[0]["image"].permute(1, 2, 0), image)
            np.testing.assert_array_equal(dataset[0]["depth"][0], np.nan_to_num(depth))
            assert (~dataset[0]["valid"]).nonzero().tolist() == [[0, 0, 0], [0, 0, 1]]
        else:
            with pytest.raises(data.DataError, match=f"^row 0 of {tmp_path}/{k}/data/train"):
                dataset[0]


def test_navi_photo_depth_and_normals_are_the_rendered_object(benchmarks, scenes):
    """The middle 96 x 96 pixels at half the scale; "encoded" is code / 1000 where the depth is 655.35 m / code."""
    (dataset, encoded), errors = [data.NAVI("navi_v1.0", "val", 48, unit=unit) for unit in ("metric", "encoded")], []
    for sample, item, its_code in zip(dataset.samples, dataset, encoded, strict=True):
        image, depth, normal, mask = scenes[1][(*sample["depth"].parts[-4:-2], sample["depth"].stem)]
        top, left = (mask.shape[0] - 96) // 2, (mask.shape[1] - 96) // 2
        image = Image.fromarray(image).resize((48, 48), Image.Resampling.BICUBIC, box=(left, top, left + 96, top + 96))
        image = np.array(image).astype(float)
        depth, normal, mask = (x[top + 1:top + 96:2, left + 1:left + 96:2] for x in (depth, normal, mask))
        loaded = item["image"].permute(1, 2, 0).numpy()
        assert np.abs(loaded - image).mean() < 6 < np.abs(loaded[::-1] - image).mean()    # JPEG; upside down
        np.testing.assert_array_equal(item["valid"][0], mask)
        np.testing.assert_allclose(item["depth"][0].numpy()[mask], depth[mask], rtol=1e-3)
        np.testing.assert_allclose((item["depth"] * its_code["depth"])[item["valid"]], 0.65535, rtol=1e-5)
        cosine = (item["normal"].permute(1, 2, 0).numpy() * normal).sum(-1)[item["normal_valid"][0]]
        errors.append(np.degrees(np.arccos(cosine.clip(-1, 1))))
    errors = np.concatenate(errors)
    assert len(errors) > 48**2 / 2 and np.median(errors) < 2.5                      # small spheres, few pixels


def test_navi_splits_and_the_copies_that_probe3d_leaves(copy):
    folder = copy / "navi_v1.0/object_0/wild_set/images"
    shutil.copy(folder / "000.jpg", folder / "downsampled_000.jpg")

    def names(protocol, split):
        samples = data.NAVI(copy / "navi_v1.0", split, 32, protocol=protocol).samples
        return {"/".join((*s["depth"].parts[-4:-2], s["depth"].stem)) for s in samples}

    # of 15 photos each round(1.5), the first two of Random(42).shuffle, once for all objects
    expected = {f"object_{k}/wild_set/{i:03d}" for k, i in ((0, 8), (0, 13), (1, 2), (1, 12))}
    wild = {f"object_{k}/wild_set/{i:03d}" for k in range(2) for i in range(15)}
    assert names("paper", "val") == expected and names("paper", "train") == wild - expected
    assert len(names("dataset", "train")) == 24 and names("dataset", "val") == wild - names("dataset", "train")
    assert names("probe3d", "val") == wild
    assert {name.split("/")[1] for name in names("probe3d", "train")} == {"multiview-00-pixel_5"}


def test_normals_of_a_tilted_plane_by_hand():
    """The plane z + x = 1 seen with focal length 10: depth 1 / (1 + x / 10), normal (1, 0, 1) / sqrt 2."""
    depth = np.tile(1 / (1 + (np.arange(9) - 4) / 10), (9, 1)).astype(np.float32)
    depth[4, 4] = 0
    normal, valid = data.normals_from_depth(depth, 10)
    assert valid.sum() == 7 * 7 - 5 and not valid[4, 4] and not valid[4, 3] and not valid[0].any()
    np.testing.assert_allclose(normal[:, valid], np.tile([[0.5**0.5], [0], [0.5**0.5]], valid.sum()), atol=1e-5)


def test_patch_size_rounds_the_image_and_not_the_labels_and_limit_keeps_evenly_spaced_samples(benchmarks):
    item = data.Cityscapes("cityscapes", "val", 60, patch_size=14)[0]
    assert item["image"].shape == (3, 56, 126) and item["label"].shape == (60, 120)
    item = data.NYU("nyuv2", "val", 48, patch_size=14, scale=4)[0]
    assert item["image"].shape == (3, 4 * 42, 4 * 70) and item["depth"].shape == (1, 48, 64)
    everything, some, most = (data.NAVI("navi_v1.0", "train", 32, limit=n).samples for n in (0, 4, 99))
    assert some == [everything[i] for i in (0, 6, 13, 19)] and most == everything


def test_broken_files_are_named_missing_ones_counted_and_an_empty_folder_shows_the_expected_tree(copy, tmp_path):
    for reader in (data.ADE20K, data.Cityscapes, data.NYU, data.NAVI):
        with pytest.raises(data.DataError, match=f"no train samples below {tmp_path}/no .--data_dir") as error:
            reader(tmp_path / "no", "train", 32)
        assert reader.tree in str(error.value)
    path = copy / "ADEChallengeData2016/annotations/training/ADE_train_00000001.png"
    for pixels, reason in ((np.full((60, 80), 151), "has label 151, allowed are 0 to 150"),
                           (np.ones((60, 79)), "has .* 79x60 pixels, expected .* 80x60"),
                           (np.ones((60, 80, 3)), "has mode RGB .*, expected mode L or P")):
        render.save(pixels.astype(np.uint8), path)
        with pytest.raises(data.DataError, match=f"^{path} {reason}"):
            data.ADE20K(copy, "train", 32)[0]
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(data.DataError, match=f"^{path} cannot be read"):                 # one sentence
        list(DataLoader(data.ADE20K(copy, "train", 32), num_workers=1))
    path = copy / "nyuv2/data/train-00001-of-00003.parquet"
    path.write_bytes(b"no parquet")
    with pytest.raises(data.DataError, match=f"cannot be read: .*{path}"):
        data.NYU(copy / "nyuv2", "train", 48)
    image, label = (sorted((copy / "cityscapes" / kind).glob("train/*/*"))[1] for kind in ("leftImg8bit", "gtFine"))
    for path in (image, label):                                                           # of another aspect
        Image.open(path).crop((0, 0, 90, 64)).save(path)
    with pytest.raises(data.DataError, match=f"{image}.*--data_dir"):
        list(data.Cityscapes(copy / "cityscapes", "train", 32))
    path = copy / "navi_v1.0/object_0/wild_set/annotations.json"
    rows = path.read_text()
    for old, new in (('"focal_length"', '"f"'), ('"focal_length": ', '"focal_length": -'), ('"val"', '"test"')):
        path.write_text(rows.replace(old, new))
        with pytest.raises(data.DataError, match=f"^{path}"):
            data.NAVI(copy / "navi_v1.0", "val", 32, protocol="dataset")
    path.write_text(rows)
    for name in ("000", "001"):
        (copy / f"navi_v1.0/object_1/wild_set/masks/{name}.png").unlink()
    with pytest.raises(data.DataError, match="^2 files missing .* first: mask of object_1/wild_set/000"):
        data.NAVI(copy / "navi_v1.0", "train", 32)

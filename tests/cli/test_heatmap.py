"""``fisnet-cuda heatmap`` on real files: what lands on the disk is the module's own relevance, and errors leave nothing."""

import json

import numpy as np
import pytest
import real_data
import saved_run
import torch
from PIL import Image

import fisnet_cuda as fc
from fisnet_cuda.cli import main
from fisnet_cuda.cli.heatmap import find_images, find_masks
from fisnet_cuda.data.images import read_image
from fisnet_cuda.errors import InputError
from fisnet_cuda.plot import background_share


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """images/<class>/<n>.png with masks/<class>/<n>.png beside it, but for one; and a run of a net."""
    root = tmp_path_factory.mktemp("heatmap")
    rng = np.random.default_rng(0)
    for label in ("disc", "square"):
        for i in range(3):
            for kind, pixels in (("images", rng.integers(0, 255, (30, 50, 3))), ("masks", 255 * (rng.random((30, 50)) > 0.5))):
                (root / kind / label).mkdir(parents=True, exist_ok=True)
                if (kind, label, i) != ("masks", "disc", 2):
                    Image.fromarray(pixels.astype(np.uint8)).save(root / kind / label / f"{i}.png")
    _, module = saved_run.save(root / "run")
    return root, module


def heatmap(root, *arguments):
    return main(["heatmap", *map(str, arguments), "--checkpoint", str(root / "run")])


def index(out):
    return json.loads((out / "heatmaps.json").read_text())


def test_folder_with_masks(data, tmp_path, capsys):
    root, module = data
    assert heatmap(root, root / "images", "--masks", root / "masks", "--out", tmp_path, "-b", 4) == 0
    entries = index(tmp_path)["images"]
    assert len(entries) == 6
    assert len({entry["npy"] for entry in entries}) == 6  # disc/0.png and square/0.png are told apart
    for entry in entries:
        x = module.spec.normalise(read_image(entry["file"], module.spec)[None])
        out = module.explain(x, "predicted")
        got = np.load(tmp_path / entry["npy"])
        assert got.dtype == np.float32
        assert got.shape == (1, 3, 24, 32)
        np.testing.assert_allclose(got, out.heatmaps[0].numpy(), rtol=1e-3, atol=1e-6)
        assert entry["predicted"] == module.spec.classes[int(out.logits.argmax())]
        assert entry["explained"] == [entry["predicted"]]
        assert sum(entry["probabilities"].values()) == pytest.approx(1)
        assert entry["folder_says"] in entry["file"]
        assert (tmp_path / entry["figure"]).stat().st_size > 1000
    (without,) = [entry for entry in entries if entry["mask"] is None]
    assert without["file"].endswith("disc/2.png")
    assert without["background_share"] == [None]
    assert all(entry["mask"].split("/")[-2:] == entry["file"].split("/")[-2:] for entry in entries if entry is not without)
    said = capsys.readouterr().out
    assert "1 of 6 images have no mask" in said
    assert str(tmp_path) in said


def test_share_is_of_the_mask_at_the_networks_size(data, tmp_path):
    from fisnet_cuda.data.images import read_mask

    root, module = data
    assert heatmap(root, root / "images/square/1.png", "--masks", root / "masks/square/1.png", "--out", tmp_path) == 0
    mask = read_mask(root / "masks/square/1.png", module.spec, image_size=(30, 50)).mask[0].float() / 255
    (entry,) = index(tmp_path)["images"]
    assert entry["background_share"] == [pytest.approx(background_share(np.load(tmp_path / "1.npy")[0], mask))]


def test_all_classes_with_rules_in_pages(data, tmp_path):
    root, module = data
    command = [root / "images/disc", "--target", "all", "--rules", "epsilon_gamma_box", "--grid", 2, "--scale", "shared", "--overlay"]
    assert heatmap(root, *command, "--out", tmp_path) == 0
    assert sorted(p.name for p in tmp_path.glob("*.png")) == ["page-001.png", "page-002.png"]
    x = module.spec.normalise(read_image(root / "images/disc/0.png", module.spec)[None])
    rules = fc.rules.presets()["epsilon_gamma_box"]
    with torch.no_grad():  # the box is that of normalised images
        box = fc.rules.RuleMap(rules.conv, rules.linear, fc.rules.ZB(module.spec.low, module.spec.high))
        expected = fc.relevance(module.net.model, x, torch.tensor([[0, 1]]), box)[0]
    np.testing.assert_allclose(np.load(tmp_path / "0.npy"), expected.numpy(), rtol=1e-3, atol=1e-6)


def test_target_by_name(data, tmp_path):
    root, module = data
    assert heatmap(root, root / "images/disc/0.png", "--target", "square", "--out", tmp_path) == 0
    x = module.spec.normalise(read_image(root / "images/disc/0.png", module.spec)[None])
    np.testing.assert_allclose(np.load(tmp_path / "0.npy")[0], module.explain(x, 1).heatmaps[0, 0].numpy(), rtol=1e-3, atol=1e-6)
    assert index(tmp_path)["images"][0]["explained"] == ["square"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ROOT/imagse"], "does not exist"),
        (["ROOT/*.gif"], "no file matches"),
        (["ROOT/run"], "holds no images"),
        (["ROOT/images/disc/0.png", "ROOT/run/best.ckpt"], "best.ckpt"),
        (["ROOT/images", "--target", "sqare"], "there is no class 'sqare' (did you mean square?)"),
        (["ROOT/images", "--rules", "epsilon_plos"], "there is no preset 'epsilon_plos'"),
        (["ROOT/images", "--masks", "ROOT/nowhere"], "does not exist"),
        (["ROOT/images", "--masks", "ROOT/run"], "none of the 0 masks"),
        (["ROOT/images", "--grid", "0"], "--grid"),
    ],
)
def test_errors_are_one_line_and_write_nothing(data, tmp_path, capsys, arguments, message):
    root, _ = data
    out = tmp_path / "out"
    assert heatmap(root, *(a.replace("ROOT", str(root)) for a in arguments), "--out", out) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_unreadable_images_are_counted_before_anything_is_written(data, tmp_path, capsys):
    root, _ = data
    for name in ("broken.png", "empty.png"):
        (tmp_path / name).write_bytes(b"\x89PNG" if name == "broken.png" else b"")
    assert heatmap(root, root / "images/disc", tmp_path, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "broken.png" in error
    assert "1 more of 5" in error
    assert not (tmp_path / "out").exists()


def test_images_are_found_once_and_masks_are_left_out(tmp_path):
    for name in ("a.png", "b.png", "b_mask.png", "masks/a.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    files, left_out = find_images([str(tmp_path), str(tmp_path / "a.png"), str(tmp_path / "[a].png")])
    assert [f.name for f in files] == ["a.png", "b.png"]
    assert len(left_out) == 3


def test_masks_are_paired_by_name_by_folder_or_in_order(tmp_path):
    names = ["i/x/1.png", "i/y/1.png", "m/x/1.png", "m/y/1_mask.png", "q/s1.png", "q/s2.png"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    x, y, mx, my, s1, s2 = (tmp_path / name for name in names)
    assert find_masks([x, y], [str(tmp_path / "m")]) == ([mx, my], 0)
    assert find_masks([y, s1], [str(tmp_path / "m")]) == ([my, None], 1)
    assert find_masks([x, y], [str(s2), str(s1)]) == ([s2, s1], 0)
    assert find_masks([x, y], None) == ([None, None], 0)
    with pytest.raises(InputError, match="none of the 1 masks"):
        find_masks([x, y], [str(s1)])
    assert find_masks([x], [str(tmp_path / "m/y")]) == ([my], 0)  # asked for by its own folder
    my.rename(tmp_path / "kept")
    assert find_masks([x, y], [str(tmp_path / "m")]) == ([mx, None], 1)  # x's mask is not y's
    (tmp_path / "n/x").mkdir(parents=True)
    (tmp_path / "n/x/1.png").touch()
    with pytest.raises(InputError, match="both"):
        find_masks([x], [str(tmp_path / "m"), str(tmp_path / "n")])


def test_chest_x_rays(tmp_path):
    """Real images and 1-bit masks of the same names in a parallel folder."""
    cxr = real_data.cxr_tb()
    saved_run.save(tmp_path / "run", classes=("normal", "TB"), size=(64, 64), channels=1)
    images = sorted((cxr / "images").glob("*.png"))[:3]
    assert heatmap(tmp_path, *images, "--masks", cxr / "masks", "--out", tmp_path / "out", "--grid", 3) == 0
    entries = index(tmp_path / "out")["images"]
    assert [entry["mask"] for entry in entries] == [str(cxr / "masks" / image.name) for image in images]
    assert all(0 < entry["background_share"][0] < 1 for entry in entries)
    assert (tmp_path / "out" / "page-001.png").is_file()

"""The folder of `ssd export --standalone`, run where neither torch nor this package can be imported."""

import ast
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import OTHER_LAYOUTS, SMALL_LAYOUT, made_model, with_metadata
from PIL import ExifTags, Image

from ssd import checkpoint, standalone
from ssd.calibration import Calibration
from ssd.detector import Detector
from ssd.standalone import TEMPLATES, write_standalone
from ssd.transforms import resize

pytest.importorskip("onnxruntime")
NAMES = ("cat", "cup", "person")
LOW = 0.2
CALIBRATION = Calibration(temperature=2.5, bias=-0.5)


def module():
    """The template, imported."""
    spec = importlib.util.spec_from_file_location("detect_template", TEMPLATES / "detect.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    state = made_model(layout=SMALL_LAYOUT).state_dict()
    known = {"score_thresholds": (0.3, 0.2, 0.4), "calibration": CALIBRATION}
    checkpoint.save(path, state, NAMES, layout=SMALL_LAYOUT, **known)
    return path


@pytest.fixture(scope="module")
def folder(weights, tiny_exported, tmp_path_factory):
    """Around a file that other tests use, too: exporting takes long."""

    def export(_, path, **choices):
        assert choices == {"nms": True, "uint8": True, "precision": "fp32"}
        known = {"score_thresholds": [0.3, 0.2, 0.4], "calibration": CALIBRATION.to_dict()}
        return with_metadata(tiny_exported["onnx nms"], path, known)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(standalone, "export", export)
        return write_standalone(weights, tmp_path_factory.mktemp("standalone") / "made")


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """A folder with three packages, and no others."""
    links = tmp_path_factory.mktemp("packages")
    for name in ("numpy", "pillow", "onnxruntime"):
        files = importlib.metadata.files(name)
        for top in {file.parts[0] for file in files if file.parts[0] not in ("..", "bin")}:
            (links / top).symlink_to(files[0].locate().parents[len(files[0].parts) - 1] / top)
    return links


@pytest.fixture
def run(packages, folder, tmp_path):
    def run(*arguments, script=folder / "detect.py"):
        return subprocess.run(
            [sys.executable, "-S", "-s", script, *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
            cwd=tmp_path,
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(packages)},
        )

    return run


def test_the_script_is_for_python_3_9():
    ast.parse((TEMPLATES / "detect.py").read_text(), feature_version=(3, 9))


def test_torch_and_this_package_are_out_of_reach(run, tmp_path):
    script = tmp_path / "try.py"
    for name in ("torch", "ssd", "torchvision"):
        script.write_text(f"import numpy, PIL, onnxruntime, {name}")
        assert f"No module named '{name}'" in run(script=script).stderr


def noise(width, height, channels=3):
    small = np.random.default_rng(width).integers(0, 256, (9, 7, channels), np.uint8)
    return Image.fromarray(small if channels > 1 else small[..., 0]).resize((width, height))


def turned(number):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = number
    return exif


def pictures(folder):
    """Photos of every kind that both read."""
    noise(3000, 2000).save(folder / "large.jpg", quality=90)
    noise(40, 30).save(folder / "small.png")
    noise(200, 611).save(folder / "portrait.webp", lossless=True)
    noise(SMALL_LAYOUT.size, SMALL_LAYOUT.size).save(folder / "fits.bmp")
    for number in range(1, 9):
        noise(160, 90).save(folder / f"exif-{number}.jpg", exif=turned(number))
    noise(160, 90).save(folder / "exif.png", exif=turned(8))
    noise(160, 90).save(folder / "exif.tif", exif=turned(5))
    noise(160, 90).save(folder / "odd-exif.jpg", exif=turned(77))
    noise(90, 160, 1).save(folder / "grey.jpg")
    noise(90, 160, 4).save(folder / "rgba.png")
    noise(90, 160, 2).save(folder / "grey-alpha.png")
    noise(90, 160).quantize(200).save(folder / "palette.png", transparency=3)
    noise(90, 160).quantize(50).save(folder / "palette.gif")
    noise(90, 160).convert("1").save(folder / "one-bit.png")
    noise(90, 160).convert("CMYK").save(folder / "cmyk.jpg")
    wide = np.random.default_rng(5).integers(0, 65536, (90, 160), np.uint16)
    Image.fromarray(wide).save(folder / "16-bit.png")
    Image.fromarray(wide).save(folder / "16-bit.tif")
    return sorted(folder.iterdir())


def test_same_as_the_detector(run, weights, tmp_path):
    photos = pictures(tmp_path)
    result = run(*photos, "--json", "--score-threshold", LOW)
    assert (result.returncode, result.stderr) == (0, "")
    detector = Detector.load(weights, "cpu", "fp32")
    total = 0
    for line, path in zip(result.stdout.splitlines(), photos, strict=True):
        found, expected = json.loads(line), detector(path, score_threshold=LOW).to_dict()
        for each in ("source", "width", "height"):
            assert found[each] == expected[each]
        assert len(found["detections"]) == len(expected["detections"]), path
        for ours, theirs in zip(found["detections"], expected["detections"], strict=True):
            assert (ours["name"], ours["class_id"]) == (theirs["name"], theirs["class_id"]), path
            np.testing.assert_allclose(ours["score"], theirs["score"], atol=1e-4)
            np.testing.assert_allclose(ours["box"], theirs["box"], atol=1e-3 * max(found["width"], 200))
            total += 1
    assert total > 100


@pytest.mark.parametrize("size", [96, 300, 512])
@pytest.mark.parametrize(
    ("width", "height"), [(640, 480), (299, 301), (33, 1000), (301, 17), (1, 1), (96, 300), (1201, 1999)]
)
def test_images_are_resized_as_the_detector_does(size, width, height):
    """To the bit, with the kernel that torch has for processors with AVX2, and its plain one."""
    image = Image.fromarray(np.random.default_rng(7).integers(0, 256, (height, width, 3), np.uint8))
    np.testing.assert_array_equal(module().resize(image, size), resize(image, size).numpy())


def test_verify(run, folder, tmp_path):
    result = run("--verify")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "proved: this machine finds" in result.stdout
    assert len(json.loads((folder / "check.json").read_text())["detections"]) > 5

    other = tmp_path / "other"
    shutil.copytree(folder, other)
    check = json.loads((other / "check.json").read_text())
    moved = check["detections"][0]["box"]
    moved[0] += 3
    (other / "check.json").write_text(json.dumps(check))
    result = run("--verify", script=other / "detect.py")
    assert result.returncode == 1
    assert "not found: " in result.stdout
    assert "not expected: " in result.stdout
    assert result.stdout.endswith("NOT PROVED\n")

    moved[0] -= 3
    (other / "check.json").write_text(json.dumps(check))
    Image.open(other / "check.png").save(other / "check.png")  # without the orientation
    assert run("--verify", script=other / "detect.py").returncode == 1

    (other / "model.onnx").write_bytes((other / "model.onnx").read_bytes() + b"\0")
    result = run("--verify", script=other / "detect.py")
    assert (result.returncode, result.stdout[:10]) == (1, "NOT PROVED")
    assert "model.onnx is another file" in result.stdout


def test_text_pictures_and_calibrated_thresholds(run, weights, tmp_path):
    noise(200, 150).save(tmp_path / "a.png")
    out = tmp_path / "out"
    for _ in range(2):
        result = run("a.png", "--draw", "out", "--score-threshold", "calibrated")
        assert (result.returncode, result.stderr) == (0, "")
    expected = Detector.load(weights, "cpu", "fp32")(tmp_path / "a.png", score_threshold="calibrated")
    first, *rest = result.stdout.splitlines()
    assert first == f"a.png: {len(expected)} objects"
    assert [line.split()[0] for line in rest] == expected.names.tolist()
    assert [float(line.split()[1]) for line in rest] == pytest.approx(expected.scores, abs=0.006)
    assert sorted(path.name for path in out.iterdir()) == ["a-2.jpg", "a.jpg"]
    picture = np.asarray(Image.open(out / "a.jpg")).astype(int)
    assert picture.shape == (150, 200, 3)
    assert (np.abs(picture - np.asarray(noise(200, 150))) > 60).any()


def test_what_cannot_be_read_is_told_and_the_rest_goes_on(run, tmp_path):
    Image.new("RGB", (900, 5)).save(tmp_path / "thin.png")
    Image.new("F", (90, 50)).save(tmp_path / "floats.tif")
    (tmp_path / "text.jpg").write_text("no image")
    noise(60, 50).save(tmp_path / "fine.png")
    names = ["thin.png", "floats.tif", "text.jpg", "missing.jpg", "fine.png"]
    result = run(*names)
    assert result.returncode == 1
    thin, floats, text, missing = result.stderr.splitlines()
    assert thin == "thin.png: 900x5 is too thin to be seen in a square"
    assert floats == "floats.tif: its values are floats; save it with 8 or 16 bits"
    assert "cannot identify image file" in text
    assert "No such file" in missing
    assert result.stdout.startswith("fine.png: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name photos, or --verify"),
        (["a.jpg", "--score-threshold", "0.01"], "--score-threshold is from 0.05 to 1"),
        (["a.jpg", "--score-threshold", "many"], "invalid score value"),
    ],
)
def test_wrong_arguments(run, arguments, message):
    result = run(*arguments)
    assert (result.returncode, message in result.stderr) == (2, True)


def test_a_folder_with_something_in_it_is_left_alone(weights, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="nothing was overwritten"):
        write_standalone(weights, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["512", "300 with other boxes"])
def test_other_layouts_and_fp16(run, tmp_path, layout):
    checkpoint.save(
        tmp_path / "w.pt", made_model(layout=OTHER_LAYOUTS[layout]).state_dict(), NAMES,
        layout=OTHER_LAYOUTS[layout],
    )  # fmt: skip
    precision = "fp16" if layout == "512" else "fp32"
    made = write_standalone(tmp_path / "w.pt", tmp_path / "made", precision)
    result = run("--verify", script=made / "detect.py")
    assert result.returncode == 0, result.stdout + result.stderr

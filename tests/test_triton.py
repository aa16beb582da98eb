import pytest
from conftest import SMALL_LAYOUT

from ssd import export, triton
from ssd.backends import NMS, Metadata
from ssd.boxes import LAYOUTS
from ssd.checkpoint import CheckpointError
from ssd.triton import write_triton


@pytest.mark.slow
def test_triton_repository(exported, tmp_path):
    onnx = pytest.importorskip("onnx")
    path = exported["onnx nms"]
    home = write_triton(path, tmp_path / "models")
    assert (home / "1" / "model.onnx").read_bytes() == path.read_bytes()
    assert (home / "labels.txt").read_text() == "cat\ncup\nperson\n"
    config = (home / "config.pbtxt").read_text()
    assert 'name: "ssd300"' in config
    assert '{ name: "images", data_type: TYPE_UINT8, dims: [300, 300, 3] }' in config
    assert '{ name: "counts", data_type: TYPE_INT64, dims: [1], reshape: { shape: [] } }' in config
    graph = onnx.load(path).graph
    for end in (*graph.input, *graph.output):
        kind = {1: "FP32", 2: "UINT8", 7: "INT64"}[end.type.tensor_type.elem_type]
        dims = [each.dim_value for each in end.type.tensor_type.shape.dim][1:]
        assert f'name: "{end.name}", data_type: TYPE_{kind}, dims: {dims or [1]}' in config
    with pytest.raises(FileExistsError, match="has a model ssd300 already"):
        write_triton(path, tmp_path / "models")


@pytest.mark.slow
def test_triton_with_one_batch_size(exported, tmp_path):
    home = write_triton(exported["onnx batch"], tmp_path / "models", "mine")
    config = (home / "config.pbtxt").read_text()
    assert "max_batch_size: 0" in config
    assert 'name: "images", data_type: TYPE_UINT8, dims: [2, 300, 300, 3]' in config
    assert 'name: "conf", data_type: TYPE_FP32, dims: [2, 4, 8732]' in config


def test_triton_repository_of_raw_outputs(tiny_exported, tmp_path):
    home = write_triton(tiny_exported["onnx"], tmp_path / "models", "raw")
    assert sorted(str(path.relative_to(home)) for path in home.rglob("*.*")) == [
        "1/model.onnx",
        "config.pbtxt",
        "labels.txt",
    ]
    assert (home / "1" / "model.onnx").read_bytes() == tiny_exported["onnx"].read_bytes()
    assert (home / "labels.txt").read_text() == "cat\ncup\nperson\n"
    with pytest.raises(FileExistsError, match="has a model raw already"):
        write_triton(tiny_exported["onnx"], tmp_path / "models", "raw")


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        (
            {},
            [
                "max_batch_size: 64",
                '{ name: "images", data_type: TYPE_FP32, dims: [3, 96, 96] }',
                '{ name: "loc", data_type: TYPE_FP32, dims: [4, 830] }',
                '{ name: "conf", data_type: TYPE_FP32, dims: [4, 830] }',
            ],
        ),
        (
            {"batch": 2, "uint8": True},
            [
                "max_batch_size: 0",
                '{ name: "images", data_type: TYPE_UINT8, dims: [2, 96, 96, 3] }',
                '{ name: "conf", data_type: TYPE_FP32, dims: [2, 4, 830] }',
            ],
        ),
        (
            {"layout": LAYOUTS["512"]},
            [
                '{ name: "images", data_type: TYPE_FP32, dims: [3, 512, 512] }',
                '{ name: "loc", data_type: TYPE_FP32, dims: [4, 24564] }',
            ],
        ),
        (
            {"nms": NMS(max_detections=50)},
            [
                '{ name: "boxes", data_type: TYPE_FP32, dims: [50, 4] }',
                '{ name: "scores", data_type: TYPE_FP32, dims: [50] }',
                '{ name: "class_ids", data_type: TYPE_INT64, dims: [50] }',
                '{ name: "counts", data_type: TYPE_INT64, dims: [1], reshape: { shape: [] } }',
            ],
        ),
        (
            {"nms": NMS(max_detections=50), "batch": 3},
            ['{ name: "counts", data_type: TYPE_INT64, dims: [3] }'],
        ),
    ],
)
def test_the_configuration_says_what_goes_in_and_comes_out(changes, lines):
    values = {"class_names": ("cat", "cup", "person"), "category_ids": (), "backbone": "resnet18"}
    values |= {"precision": "fp32", "uint8": False, "batch": None, "nms": None, "layout": SMALL_LAYOUT}
    text = triton._config("mine", Metadata(**values | changes))
    assert 'name: "mine"' in text
    for line in lines:
        assert line in text


def test_triton_takes_only_our_files(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"nothing")
    with pytest.raises(CheckpointError):
        write_triton(tmp_path / "model.onnx", tmp_path / "models")
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize("name", ["../up", 'a"b', "", ".."])
def test_names_that_triton_would_not_take(weights_file, tmp_path, name):
    with pytest.raises(ValueError, match="letters, digits"):
        write_triton(tmp_path / "model.onnx", tmp_path, name)


def test_triton_takes_no_other_format(tmp_path):
    (tmp_path / "model.torchscript").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"\.onnx file"):
        write_triton(tmp_path / "model.torchscript", tmp_path / "models")


def test_ssd_export_has_it_too():
    assert export.write_triton is write_triton

import json

import pytest
from conftest import with_metadata

from ssd.backends import NMS
from ssd.checkpoint import CheckpointError
from ssd.detector import Detector


def test_repr_names_the_runtime(tiny_exported):
    assert repr(Detector.load(tiny_exported["onnx"])) == "Detector(3 classes, fp32, cpu, ONNX Runtime)"


def test_a_file_of_someone_else_is_named(tmp_path):
    onnx = pytest.importorskip("onnx")
    node = onnx.helper.make_node("Identity", ["images"], ["out"])
    ends = [onnx.helper.make_tensor_value_info(each, 1, [1]) for each in ("images", "out")]
    graph = onnx.helper.make_graph([node], "g", ends[:1], ends[1:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, tmp_path / "other.onnx")
    with pytest.raises(CheckpointError, match=r"other\.onnx: was not written by `ssd export`"):
        Detector.load(tmp_path / "other.onnx")


@pytest.mark.parametrize("changes", [{"uint8": True}, {"class_names": ["a", "b"]}, {"nms": vars(NMS())}])
def test_metadata_that_does_not_fit_the_graph_is_refused(tiny_exported, tmp_path, changes):
    path = with_metadata(tiny_exported["onnx"], tmp_path / "model.onnx", changes)
    with pytest.raises(CheckpointError, match=r"model\.onnx: .* (says of itself|gives)"):
        Detector.load(path)


def test_a_file_of_a_later_version_says_to_update(tiny_exported, tmp_path):
    path = with_metadata(tiny_exported["onnx"], tmp_path / "model.onnx", {"version": 4, "anchors": "free"})
    with pytest.raises(CheckpointError, match=r"model\.onnx: .*pip install --upgrade ssd300"):
        Detector.load(path)


def test_an_impossible_value_is_named(tiny_exported, tmp_path):
    path = with_metadata(tiny_exported["onnx"], tmp_path / "model.onnx", {"batch": 0})
    with pytest.raises(CheckpointError, match=r"model\.onnx: .*its batch is impossible"):
        Detector.load(path)


def test_only_standard_operators(tiny_exported):
    onnx = pytest.importorskip("onnx")
    model = onnx.load(tiny_exported["onnx nms"])
    assert {node.domain for node in model.graph.node} == {""}
    assert [each.domain for each in model.opset_import] == [""]
    assert sum(node.op_type == "NonMaxSuppression" for node in model.graph.node) == 1
    assert not model.functions
    notes = {each.key: each.value for each in model.metadata_props}
    assert json.loads(notes["ssd300"])["class_names"] == ["cat", "cup", "person"]

import pickle
import re
from pathlib import Path

import pytest

import ssd
from ssd import backends, checkpoint, data, distributed, errors, export, images, postprocess
from ssd.errors import MissingExtra, NonFiniteError, UserError


@pytest.mark.parametrize(
    ("name", "home", "kind"),
    [
        ("ImageError", images, ValueError),
        ("AnnotationError", data, ValueError),
        ("CheckpointError", checkpoint, RuntimeError),
        ("DownloadError", checkpoint, OSError),
        ("NonFiniteError", postprocess, FloatingPointError),
        ("ExportError", export, RuntimeError),
        ("LostContactError", distributed, RuntimeError),
    ],
)
def test_errors_are_caught_by_their_old_names_and_kinds(name, home, kind):
    error = getattr(errors, name)
    assert getattr(home, name) is error
    assert issubclass(error, kind)
    assert issubclass(error, UserError)
    if name in ssd.__all__:
        assert getattr(ssd, name) is error


def test_a_missing_extra_names_an_extra_that_there_is():
    extras = (Path(ssd.__file__).parents[1] / "pyproject.toml").read_text()
    used = set()
    for path in Path(ssd.__file__).parent.rglob("*.py"):
        used |= set(re.findall(r'MissingExtra\("(\w+)"\)', path.read_text()))
    used |= {kind.extra for kind in backends.BACKENDS.values() if kind.extra}
    assert {"onnx", "openvino", "plots", "tensorboard", "supervision"} <= used
    for name in used:
        assert re.search(rf"^{name} = \[", extras, re.MULTILINE), name
        assert f"pip install 'ssd300[{name}]'" in str(MissingExtra(name))
    assert isinstance(MissingExtra("onnx"), ImportError)


def test_errors_go_to_other_processes():
    error = pickle.loads(pickle.dumps(NonFiniteError("image 3: NaN", [3])))
    assert (str(error), error.images) == ("image 3: NaN", (3,))
    assert str(pickle.loads(pickle.dumps(MissingExtra("onnx")))) == str(MissingExtra("onnx"))

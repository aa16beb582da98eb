import pytest
from conftest import SMALL_LAYOUT

from ssd import shapes
from ssd.boxes import LAYOUTS
from ssd.data import DetectionDataset, load


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """Six scenes to train on, some of which may be empty, and three to evaluate on."""
    folder = tmp_path_factory.mktemp("scenes")
    shapes.write_dataset(folder, 6, 3, seed=5)
    return folder


@pytest.fixture
def images(scenes):
    return DetectionDataset(load(scenes, "train"))


@pytest.fixture(scope="session", autouse=True)
def _small_layout():
    """That of `training.SMALL`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(LAYOUTS, "small", SMALL_LAYOUT)
        yield

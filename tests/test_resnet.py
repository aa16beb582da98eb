import pytest
import torch
import torchvision

from ssd.choices import BACKBONES
from ssd.pretrained import BACKBONE_WEIGHTS
from ssd.resnet import Trunk


def torchvisions(backbone):
    """torchvision's network up to conv4_x, whose strides are taken out, as NVIDIA's code makes it."""
    resnet = torchvision.models.get_model(backbone)
    first = resnet.layer3[0]
    for conv in (first.conv1, first.conv2, first.downsample[0]):
        conv.stride = (1, 1)
    return torch.nn.Sequential(*list(resnet.children())[:7])


@pytest.mark.parametrize("backbone", BACKBONES)
def test_keys_and_shapes_are_torchvisions(backbone):
    with torch.device("meta"):
        ours, theirs = Trunk(backbone).feature_extractor.state_dict(), torchvisions(backbone).state_dict()
    assert [(key, value.shape) for key, value in ours.items()] == [
        (key, value.shape) for key, value in theirs.items()
    ]


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
@pytest.mark.parametrize("size", [300, 96])
def test_outputs_are_torchvisions(backbone, size):
    torch.manual_seed(0)
    theirs, ours = torchvisions(backbone), Trunk(backbone)
    ours.feature_extractor.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, size, size)
    for mode in (True, False):
        with torch.no_grad():
            assert torch.equal(ours.train(mode)(images), theirs.train(mode)(images))


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
def test_random_weights_spread_as_torchvisions(backbone):
    torch.manual_seed(0)
    ours, theirs = Trunk(backbone).feature_extractor.state_dict(), torchvisions(backbone).state_dict()
    for key, value in theirs.items():
        if value.is_floating_point() and value.numel() > 1000:
            assert torch.isclose(ours[key].std(), value.std(), rtol=0.1), key


@pytest.mark.parametrize("backbone", BACKBONES)
def test_weights_are_torchvisions_best_last(backbone):
    known = torchvision.models.get_model_weights(backbone)
    assert BACKBONE_WEIGHTS[backbone] == {name: known[name].url for name in BACKBONE_WEIGHTS[backbone]}
    assert set(BACKBONE_WEIGHTS[backbone]) == {each.name for each in known}
    assert list(BACKBONE_WEIGHTS[backbone].values())[-1] == known.DEFAULT.url

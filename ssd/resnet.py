"""The trunk: a ResNet up to conv4_x, with the keys of torchvision's, whose import alone takes a second."""

from torch import Tensor, nn

from ssd.choices import Backbone

# Blocks of layer1 to layer3, and whether they are bottlenecks; table 1 of https://arxiv.org/abs/1512.03385.
DEPTHS: dict[Backbone, tuple[tuple[int, int, int], bool]] = {
    "resnet18": ((2, 2, 2), False),
    "resnet34": ((3, 4, 6), False),
    "resnet50": ((3, 4, 6), True),
    "resnet101": ((3, 4, 23), True),
    "resnet152": ((3, 8, 36), True),
}
_EXPANSION = 4  # of channels, by the last convolution of a bottleneck


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and the way around them: ``[N, C, H, W]`` -> ``[N, channels, ...]``."""

    def __init__(self, c_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(c_in, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Features of the block."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.downsample(x)
        features: Tensor = self.relu(out)
        return features


class Bottleneck(nn.Module):
    """A 3x3 convolution, which has the stride (v1.5), between two of 1x1, and the way around them."""

    def __init__(self, c_in: int, channels: int, stride: int) -> None:
        super().__init__()
        width = channels // _EXPANSION
        self.conv1 = nn.Conv2d(c_in, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(c_in, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Features of the block."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += self.downsample(x)
        features: Tensor = self.relu(out)
        return features


def _shortcut(c_in: int, channels: int, stride: int) -> nn.Module:
    if stride == 1 and c_in == channels:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(c_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))


class Trunk(nn.Module):
    """A ResNet up to conv4_x, whose strides are 1: ``[N, 3, S, S]`` -> ``[N, C, S / 8, S / 8]``, rounded up.

    Random weights are drawn as torchvision draws them.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        depths, bottleneck = DEPTHS[backbone]
        block = Bottleneck if bottleneck else BasicBlock
        expansion = _EXPANSION if bottleneck else 1
        stages = []
        c_in = 64
        for depth, width, stride in zip(depths, (64, 128, 256), (1, 2, 1), strict=True):
            channels = width * expansion
            blocks = [block(c_in, channels, stride)]
            blocks += [block(channels, channels, 1) for _ in range(depth - 1)]
            stages.append(nn.Sequential(*blocks))
            c_in = channels
        # One flat Sequential under this name: the keys of published checkpoints depend on it.
        self.feature_extractor = nn.Sequential(
            nn.Conv2d(3, 64, 7, 2, padding=3, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, padding=1),
            *stages,
        )
        for module in self.modules():
            # On the meta device there are no values, and drawing them would import torch's compiler.
            if isinstance(module, nn.Conv2d) and not module.weight.is_meta:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Features of conv4_x."""
        features: Tensor = self.feature_extractor(images)
        return features

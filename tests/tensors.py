"""Tensors with the names of an SSD's, and what is found in files of them."""

import pathlib

import torch

from ssd import containers, networks

NAMES = (
    "feature_extractor.feature_extractor.0.weight",
    "feature_extractor.feature_extractor.1.running_mean",
    "additional_blocks.0.0.weight",
    "loc.0.weight",
    "conf.0.weight",
    "conf.0.bias",
)


def made(seed=0):
    """Tensors with the names of an SSD's, small."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(2, 3, generator=generator) for name in NAMES}


def with_prefix(prefix, tensors):
    return {prefix + key: value for key, value in tensors.items()}


def find(content):
    return networks.find_network(pathlib.Path("w.pt"), content)


def assert_is(network, expected):
    assert network.tensors.keys() == expected.keys()
    assert all(torch.equal(network.tensors[key], value) for key, value in expected.items())


def through_file(tmp_path, content, name="w.pt"):
    torch.save(content, tmp_path / name)
    return containers.read(tmp_path / name)[0]

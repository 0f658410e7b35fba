"""The layers of ResNet-50, without training it."""

import pytest

from muonwire.lab.claims.vision import convolutional_networks


def test_resnet_50s_layers_are_its_published_ones():
    shapes = convolutional_networks.resnet50_shapes()
    assert (512, 4608, 9) in shapes
    assert (64, 147, 49) in shapes
    assert (2048, 1024, 1) in shapes
    assert convolutional_networks.relative_step(512, 4608, 150.0) == pytest.approx(0.01508, rel=1e-3)

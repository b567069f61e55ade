"""A loss that is not a number names the place where that began."""

import torch
from torch import nn

from optimum_mobilequant.tune.loop import first_broken


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.mask, self.layers = nn.Linear(4, 4), nn.Threshold(0.0, -torch.inf), nn.ModuleList()
        self.layers.extend(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        x = self.first(x)
        self.mask(x)  # minus infinity is no fault
        for layer in self.layers:
            x = layer(x)
        return x


def test_the_first_module_with_nan_is_named():
    net, x = Net(), torch.ones(2, 4)
    assert first_broken(net, lambda ids: net(ids).sum(), x) == ""
    with torch.no_grad():
        net.layers[1].weight[0, 0] = torch.nan
    assert first_broken(net, lambda ids: net(ids).sum(), x) == ", first in layers.1"
    assert not any(module._forward_hooks for module in net.modules())
    with torch.no_grad():
        net.first.weight[0, 0] = torch.inf
    assert first_broken(net, lambda ids: net(ids).sum(), x) == ", first in first"

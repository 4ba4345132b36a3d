"""Muon against torch's own, and what orthogonal means."""

import pytest
import torch
from torch import nn

from vmt_core.pretraining.muon import Muon, orthogonal


@pytest.mark.parametrize("shape", [(3, 40, 160), (2, 160, 40), (1, 64, 96)])
def test_singular_values_come_near_one_and_directions_stay(shape):
    torch.manual_seed(0)
    matrices = torch.randn(shape)
    found = orthogonal(matrices)
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.2 and values.max() < 1.3
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    assert ((u.mT @ found @ v.mT).diagonal(dim1=-2, dim2=-1) > 0).all()


def test_updates_are_those_of_torch():
    torch.manual_seed(0)
    start = [torch.randn(32, 64), torch.randn(32, 64), torch.randn(64, 16)]
    ours, theirs = ([nn.Parameter(matrix.clone()) for matrix in start] for _ in range(2))
    optimizers = (
        Muon(ours, lr=0.02, weight_decay=0.1),
        torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    )
    for _ in range(6):
        gradients = [torch.randn_like(matrix) for matrix in start]
        for parameters, optimizer in zip((ours, theirs), optimizers, strict=True):
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient.clone()
            optimizer.step()
    for one, other, first in zip(ours, theirs, start, strict=True):
        assert (one - first).norm() > 0.1
        torch.testing.assert_close(one, other, atol=2e-3, rtol=0)  # theirs is in bf16


def test_a_matrix_without_a_gradient_stays():
    still, moved = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4, 4))
    moved.grad = torch.randn(4, 4)
    Muon([still, moved], lr=0.1, weight_decay=0.5).step()
    assert torch.equal(still, torch.ones(4, 4))
    assert not torch.equal(moved, torch.ones(4, 4))

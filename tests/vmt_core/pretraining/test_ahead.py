"""Calls that helpers make ahead of need give what calls made in turn give."""

import os
from functools import partial

import pytest
import torch

from vmt_core.pretraining.ahead import Ahead, Helpers


def made(factor, number):
    return torch.full((3,), factor * number), os.getpid()


@pytest.fixture(scope="module")
def helpers():
    return Helpers(2)


def test_helpers_answer_in_order_and_elsewhere(helpers):
    series = Ahead(partial(made, 10), helpers)
    answers = [series(number) for number in range(5)]
    assert [int(values[0]) for values, _ in answers] == [0, 10, 20, 30, 40]
    assert os.getpid() not in {process for _, process in answers}


def test_another_place_can_be_asked_for(helpers):
    series = Ahead(partial(made, 1), helpers)
    assert [int(series(number)[0][0]) for number in (0, 1, 7, 8, 3, 4)] == [0, 1, 7, 8, 3, 4]


def test_without_helpers_everything_is_made_here():
    series = Ahead(partial(made, 2), Helpers())
    values, process = series(4)
    assert (int(values[0]), process) == (8, os.getpid())


def test_what_goes_wrong_elsewhere_is_told_here(helpers):
    with pytest.raises(TypeError):
        Ahead(partial(made, "ten", 3), helpers)(0)

"""Adam with moments in int8 takes nearly the way of Adam in float, and a closer one than other maps of 8 bits."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch

from lowmem.numerics.int8_blocks import BLOCK
from lowmem.optim import AdamW
from tests.reference import quantize

STEPS, LR = 200, 3e-3
INT8 = {"moment": "int8", "variance": "int8"}


def problem(name):
    """Weights, the loss of a batch of rows, and how many rows there are."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    if name == "inputs of very different sizes":
        x = draw(512, 64) * torch.logspace(-2, 0.5, 64)
        y = torch.tanh(x @ draw(64, 16)) @ draw(16, 4)
        weights = [draw(64, 64) / 8, draw(64, 64) / 8, draw(64, 4) / 8]

        def loss(w, rows):
            return ((torch.tanh(torch.tanh(x[rows] @ w[0]) @ w[1]) @ w[2] - y[rows]) ** 2).mean()

        return weights, loss, len(x)
    words = torch.multinomial(1 / torch.arange(1.0, 201.0) ** 1.2, 4096, True, generator=generator)
    following = torch.multinomial(torch.softmax(draw(200, 200)[words] * 1.5, 1), 1, generator=generator)[:, 0]
    weights = [draw(200, 32) / 10, draw(32, 200) / 10]

    def loss(w, rows):
        return torch.nn.functional.cross_entropy(w[0][words[rows]] @ w[1], following[rows])

    return weights, loss, len(words)


PROBLEMS = ["inputs of very different sizes", "rare words"]
each_problem = pytest.mark.parametrize("name", PROBLEMS)


def trained(name, make):
    """The weights after STEPS steps of `make(params)`, one batch of 32 rows a step."""
    weights, loss, count = problem(name)
    params = [torch.nn.Parameter(weight) for weight in weights]
    optimizer, generator = make(params), torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss(params, torch.randint(0, count, (32,), generator=generator)).backward()
        optimizer.step()
    return [param.detach() for param in params]


@functools.cache
def float_adam(name):
    return trained(name, lambda params: AdamW(params, lr=LR, weight_decay=0.0))


def distance(name, make):
    """How far from float Adam's weights, relative to how far those have moved."""
    found, expected, start = trained(name, make), float_adam(name), problem(name)[0]
    off = sum((a - b).square().sum() for a, b in zip(found, expected, strict=True))
    moved = sum((a - b).square().sum() for a, b in zip(start, expected, strict=True))
    return (off / moved).sqrt().item()


def int8_adam(rounding):
    return lambda params: AdamW(params, lr=LR, weight_decay=0.0, storage=INT8, rounding=rounding)


class MappedAdam:
    """Adam whose moments pass through the nearest levels of two maps after every step."""

    def __init__(self, params, moments, variances):
        self.params, self.maps = params, (moments, variances)
        self.state = [(torch.zeros_like(param), torch.zeros_like(param)) for param in params]
        self.step_count = 0

    def zero_grad(self):
        for param in self.params:
            param.grad = None

    @torch.no_grad()
    def step(self):
        self.step_count += 1
        correct1, correct2 = 1 - 0.9**self.step_count, 1 - 0.999**self.step_count
        for param, (m, v) in zip(self.params, self.state, strict=True):
            m.lerp_(param.grad, 0.1)
            v.lerp_(param.grad.square(), 0.001)
            param -= LR * (m / correct1) / ((v / correct2).sqrt() + 1e-8)
            for moment, levels in zip((m, v), self.maps, strict=True):
                coded = quantize.nearest(moment.view(-1), levels, BLOCK, positive_stays=moment is v)
                moment.copy_(coded.view_as(moment))


def mapped(moments, variances):
    return lambda params: MappedAdam(params, moments, variances)


@each_problem
def test_int8_moments_take_nearly_the_way_of_float_ones(name):
    for rounding in ("stochastic", "nearest"):
        assert 0 < distance(name, int8_adam(rounding)) < 0.06


@each_problem
def test_the_engines_codes_do_what_the_float64_reference_does(name):
    ours = distance(name, int8_adam("nearest"))
    assert ours == pytest.approx(distance(name, mapped(quantize.MOMENTS, quantize.VARIANCES)), rel=0.1)


@each_problem
def test_powers_are_closer_to_float_than_decades_and_equal_steps(name):
    ours = distance(name, mapped(quantize.MOMENTS, quantize.VARIANCES))
    assert ours < distance(name, mapped(quantize.decades(True), quantize.decades(False)))
    equal = (torch.arange(n + 1, dtype=torch.float64) / n for n in (127, 255))
    assert ours < distance(name, mapped(*equal))


def bitsandbytes():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")


def test_the_decades_above_are_those_of_bitsandbytes():
    """Theirs lie in the middle of steps whose upper ends are ours, so half a step apart."""
    functional = bitsandbytes().functional
    for signed in (True, False):
        ours = quantize.decades(signed)
        theirs = functional.create_dynamic_map(signed=signed).double()
        theirs = theirs[(theirs > 0) & (theirs < 1)]
        assert theirs.numel() == ours.numel() - 1
        assert ((ours[:-1] < theirs) & (theirs < ours[1:])).all()


@each_problem
def test_int8_moments_are_closer_to_float_than_those_of_bitsandbytes(name):
    library = bitsandbytes()

    def theirs(params):
        return library.optim.AdamW8bit(params, lr=LR, weight_decay=0.0, min_8bit_size=1)

    found = distance(name, theirs)
    assert 0 < found < 0.12
    assert distance(name, int8_adam("stochastic")) < found
    assert distance(name, int8_adam("nearest")) < found

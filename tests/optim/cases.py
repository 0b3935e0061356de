"""The settings each registered optimizer is tested with, and gradients to test it on.

A new optimizer adds its settings to SETTINGS; without an entry it runs with its defaults.
"""

from __future__ import annotations

import torch

from lowmem.optim.registry import OPTIMIZERS, optimizer_class
from lowmem.optim.settings import settings_of

FLOAT = {"moment": "param", "variance": "param", "basis": "param"}

SETTINGS: dict[str, list[dict]] = {
    "adamw": [{"weight_decay": 0.1}, {"betas": (0.8, 0.95), "eps": 1e-4}],
    "sgd": [
        {},
        {"momentum": 0.9, "weight_decay": 0.1},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.5, "dampening": 0.3},
    ],
    "sgd_sai": [
        {},
        {"gsnr": "paper", "momentum_start": "zero", "lr": 0.2},
        {"momentum": 0.0, "weight_decay": 0.0},
    ],
    "adafactor": [
        {"weight_decay": 0.1},
        {"beta2": 0.99, "beta1": 0.9, "clip_threshold": None},
        {"relative": True, "beta2_power": 0.6, "clip_threshold": 0.5},
    ],
    "sinkgd": [
        {"weight_decay": 0.1},
        {"iterations": 1, "scale": 1.0, "momentum": 0.9},
        {"normalize": "row", "momentum": 0.5},
    ],
    "swan": [{"weight_decay": 0.1}, {"whitening": "newton_schulz", "iterations": 6}],
    "muon": [{"weight_decay": 0.1}, {"nesterov": False, "momentum": 0.5, "adjust_lr": "original"}],
    "galore": [
        {"rank": 4, "refresh_every": 7, "projection": "svd", "weight_decay": 0.1, "stagger": False},
        {"rank": 4, "refresh_every": 7, "projection": "subspace", "scale": 0.25},
        {"rank": 4, "refresh_every": 7, "projection": "subspace", "on_refresh": "reset"},
        {"rank": 4, "refresh_every": 7, "projection": "subspace", "on_refresh": "rotate"},
    ],
    "q_galore": [
        # Random gradients make bases about as alike as chance does: some gaps grow and some do not.
        {
            "rank": 4,
            "refresh_every": 2,
            "similarity_threshold": 0.05,
            "similarity_window": 2,
            "storage": FLOAT,
        },
    ],
    "fira": [
        {"rank": 4, "refresh_every": 7, "weight_decay": 0.1, "scale": 0.25},
        {"rank": 4, "refresh_every": 7, "compat": True, "scale": 0.5, "on_refresh": "rotate"},
    ],
    "apollo": [
        {"rank": 4, "refresh_every": 7, "weight_decay": 0.1},
        {"rank": 1, "refresh_every": 7, "scaling": "tensor", "scale": 4.0},
    ],
    "dct_adamw": [
        {"rank": 4, "weight_decay": 0.1},
        {"rank": 4, "residual": "none", "refresh_every": 7, "on_refresh": "keep", "scale": 0.5},
    ],
    "frugal": [
        {"refresh_every": 7, "weight_decay": 0.1},
        {"refresh_every": 7, "projection": "rows", "density": 0.4, "residual": "sgd", "residual_scale": 1.0},
        {"refresh_every": 5, "projection": "block", "density": 0.4, "weight_decay": 0.1},
        {"refresh_every": 4, "projection": "subspace", "density": 0.4, "residual": "sgd"},
    ],
    # All at once, so that every weight moves at every step.
    "block_adam": [{"refresh_every": 5, "active": 8, "weight_decay": 0.1}],
    # Codes for the small tensors of the tests, too.
    "adamw8bit": [{"min_8bit_size": 1, "weight_decay": 0.1}],
    "lion8bit": [{"min_8bit_size": 1, "lr": 1e-3}],
}

TWIN_SETTINGS: dict[str, list[dict]] = {
    "frugal": [
        {"refresh_every": 5, "projection": "rows", "inner": "lion", "betas": (0.9, 0.99)},
        {"refresh_every": 5, "inner": "momentum", "residual": "none"},
        {
            "refresh_every": 4,
            "projection": "block",
            "order": "mirror",
            "inner": "momentum",
            "residual": "sgd",
        },
        {"refresh_every": 4, "projection": "svd", "inner": "momentum", "weight_decay": 0.1},
        {"refresh_every": 4, "projection": "dct", "density": 0.4},
        {"refresh_every": 4, "projection": "random", "density": 0.4, "inner": "lion"},
        {"refresh_every": 4, "projection": "subspace", "residual": "none"},
        {"inner": "sign"},
        {"density": 0.0},
        {"density": 1.0},
    ],
    "block_adam": [
        {"refresh_every": 3, "weight_decay": 0.1},
        {"refresh_every": 2, "active": 3},
        {"refresh_every": 2, "active": 3, "order": "descending"},
        {"refresh_every": 1, "order": "mirror", "betas": (0.8, 0.95)},
    ],
    "adamw8bit": [{"weight_decay": 0.1}, {"betas": (0.8, 0.95), "eps": 1e-4}],
    "lion8bit": [{"weight_decay": 0.1}],
}
"""More settings that are held against the plain reference, beside those of the whole battery."""

LR = {"adamw": 1e-2, "sgd": 1e-2, "sgd_sai": 1e-2, "galore": 1e-2}

# Wide, tall, square, GQA-like, a row, a vector, one entry, a batch of expert matrices. A smaller side of
# at most rank + 16 makes the randomised subspace exact, so that it can be held against an SVD.
SHAPES = [(12, 20), (20, 12), (16, 16), (6, 18), (1, 9), (13,), (1,), (3, 10, 14)]


def cases_of(settings: dict[str, list[dict]]) -> list[tuple[str, dict]]:
    return [
        (name, {"lr": LR.get(name, 1e-2), **each}) for name in OPTIMIZERS for each in settings.get(name, [])
    ]


CASES = cases_of({name: [{}] for name in OPTIMIZERS} | SETTINGS)
LOW_BIT = {"moment": "int8", "variance": "int8", "basis": "int4"}


def takes_storage(case: tuple[str, dict]) -> bool:
    return "storage" in settings_of(optimizer_class(case[0]))


def is_in_codes(case: tuple[str, dict]) -> bool:
    """Whether state is codes of few bits, of which blocks share a scale."""
    return case[1].get("storage") is LOW_BIT or "min_8bit_size" in case[1]


STORAGE_CASES = [case for case in CASES if takes_storage(case)]
LOW_BIT_CASES = [(name, {**settings, "storage": LOW_BIT}) for name, settings in STORAGE_CASES]
"""The same with state in few bits, which no float64 twin can be held against for many steps."""

TWIN_CASES = [case for case in CASES if not is_in_codes(case)] + cases_of(TWIN_SETTINGS)


def cases_in_float(name: str) -> list[tuple[str, dict]]:
    """Those of one optimizer that give the same weights, up to rounding, however its state is divided."""
    own = [case for case in CASES if case[0] == name and not is_in_codes(case)]
    return own or [case for case in TWIN_CASES if case[0] == name]


def case_id(case: tuple[str, dict]) -> str:
    name, settings = case
    shown = {**settings, "storage": "low-bit"} if settings.get("storage") is LOW_BIT else settings
    return name + "".join(f"-{key}={value}" for key, value in shown.items())


def make(case: tuple[str, dict], params, **changes):
    """The optimizer of a case over `params`, with some settings changed."""
    name, settings = case
    return optimizer_class(name)(params, **{**settings, **changes})


def weights(dtype: torch.dtype = torch.float32, shapes=SHAPES) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def gradients(step: int, dtype: torch.dtype = torch.float32, shapes=SHAPES) -> list[torch.Tensor]:
    """Gradients with well separated singular values, so that two correct decompositions agree."""
    generator = torch.Generator().manual_seed(1000 + step)
    return [
        separated(torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype) for shape in shapes
    ]


def separated(g: torch.Tensor) -> torch.Tensor:
    if g.dim() < 2:
        return g
    U, S, Vh = torch.linalg.svd(g, full_matrices=False)
    return (U * 0.7 ** torch.arange(S.shape[-1])) @ Vh * 3


def as_parameters(tensors: list[torch.Tensor]) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(tensor.clone()) for tensor in tensors]


def run(optimizer, params, steps, dtype=torch.float32, shapes=SHAPES) -> None:
    """Steps `steps` (an iterable of step numbers) with the gradients of those numbers."""
    for step in steps:
        for param, grad in zip(params, gradients(step, dtype, shapes), strict=True):
            param.grad = grad
        optimizer.step()

"""Are the int8 weights in a model's files what its configuration says? Asked of the headers, before loading."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lowmem.errors import RecipeError
from lowmem.hf.model_folder import a_few
from lowmem.quant.int8_weight import Int8Module

CODES, SCALES = "weight_codes", "weight_scales"

Shapes = Mapping[str, tuple[int, ...]]


def int8_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of codes and of scales in `model`, by name."""
    return {
        f"{path}.{name}": tuple(getattr(module, name).shape)
        for path, module in model.named_modules()
        if isinstance(module, Int8Module)
        for name in (CODES, SCALES)
    }


def check_headers(files: Sequence[str], shapes: Shapes, *, scale_dtype: str) -> None:
    """Raise RecipeError for codes and scales that are stored in another dtype or shape than is expected.

    scale_dtype: safetensors' name of it. A damaged file is named.
    """
    problems = []
    for file in map(Path, files):
        if file.suffix != ".safetensors":
            continue
        try:
            with safe_open(file, framework="pt") as stored:
                for name in stored.keys():  # noqa: SIM118  # not a mapping
                    wanted = {CODES: "I8", SCALES: scale_dtype}.get(name.rpartition(".")[2])
                    if wanted is None:
                        continue
                    found = stored.get_slice(name)
                    if (dtype := found.get_dtype()) != wanted:
                        problems.append(f"{name} in {file} is of {dtype}, not of {wanted}")
                    elif (shape := tuple(found.get_shape())) != shapes.get(name, shape):
                        problems.append(f"{name} in {file} is {shape}, not {shapes[name]}")
        except SafetensorError as error:
            raise RecipeError(f"{file} is damaged or cut short ({error}). Copy it again.") from error
    if problems:
        raise RecipeError(
            f"{a_few(problems)}. Copy the files again, with the config.json that belongs to them."
        )


def check_loaded(model: nn.Module, shapes: Shapes, where: str) -> None:
    """Raise RecipeError for codes and scales that the files at `where` did not give, or not as they must be."""
    problems = []
    for name, wanted in shapes.items():
        path, _, kind = name.rpartition(".")
        found: Tensor = getattr(model.get_submodule(path), kind)
        if not getattr(found, "_is_hf_initialized", False):  # as transformers marks what it has loaded
            problems.append(f"{name} is missing")
        elif tuple(found.shape) != wanted:
            problems.append(f"{name} is {tuple(found.shape)}, not {wanted}")
        elif kind == SCALES and not bool(found.isfinite().all()):
            problems.append(f"{name} holds values that are not finite")
    if problems:
        raise RecipeError(
            f"{where}: {a_few(problems)}. Copy the files again, with the config.json that belongs to them."
        )

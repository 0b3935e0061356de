"""A model folder as transformers alone loads it: float weights, no trace of int8 ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowmem.errors import FaultError, RecipeError
from lowmem.hf.atomic_folder import disk_faults_explained, publish_folder
from lowmem.hf.expected_tensors import refuse_unexpected_shapes
from lowmem.hf.inference_model import ADAPTER_CONFIG, trained_weights
from lowmem.hf.int8_config import METHOD
from lowmem.hf.model_folder import CONFIG, INDEX, KEY, WEIGHTS, check_model_folder, read_config, weight_files
from lowmem.hf.run_folder import STATE_FILE, RunFolder
from lowmem.hf.stored_model import DTYPES, StoredModel
from lowmem.memory.wording import size
from lowmem.run.checkpoint_interval import FILE as INTERVAL
from lowmem.run.checkpoint_manifest import MANIFEST
from lowmem.run.checkpoint_tensors import Streamed, write_streamed

SHARD_BYTES = 5 * 10**9
"""As transformers cuts files."""

NAMES = {"bfloat16": "BF16", "float32": "F32", "float16": "F16"}
COPIED = (".json", ".jinja", ".txt", ".model", ".py")
"""Endings of the files that go with weights: tokenizer, templates, generation settings, a model's own code."""
LEFT_OUT = (CONFIG, INDEX, STATE_FILE, INTERVAL, MANIFEST)


@dataclass(frozen=True)
class Exported:
    """What was written, and from what. `tensors` is their number."""

    source: Path
    folder: Path
    dtype: str
    tensors: int
    nbytes: int


def export(target: str, *, dtype: str | None = None, out: str | None = None) -> Exported:
    """Write the model of the run folder or model folder `target` as plain float safetensors.

    dtype: bfloat16, float32 or float16; by default the one that the model computes in. out: a folder that does not
    exist yet, by default `target` with the dtype at its end. Needs a few tens of MiB of memory, and the disk.

    Raises RecipeError for a folder that holds no whole model, or one of adapters; FaultError for a full disk.
    """
    source = _model_folder(Path(target))
    config = _checked(source)
    chosen = dtype or _own_dtype(config)
    folder = Path(out) if out is not None else Path(f"{target.rstrip('/')}-{chosen}")
    if folder.exists():
        raise RecipeError(f"{folder} exists and is not overwritten. Choose another folder with --out.")
    if not folder.parent.is_dir():
        raise RecipeError(f"{folder}: the folder {folder.parent} does not exist. Make it first.")
    unfinished = folder.with_name(f".{folder.name}.saving")
    try:
        with disk_faults_explained("The exported model", source):
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            written = write_float_copy(source, unfinished, dtype=chosen, check_shapes=True)
            publish_folder(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return Exported(source, folder, chosen, len(written), sum(tensor.nbytes for tensor in written.values()))


def write_float_copy(
    source: Path, folder: Path, *, dtype: str, check_shapes: bool = False
) -> dict[str, Streamed]:
    """Write the model in `source` to the empty `folder` with its float weights in `dtype`; gives what was written.

    check_shapes: hold them against config.json first, where files may not be as they were written.
    """
    config = _checked(source)
    quantization = config.pop("quantization_config", None)
    group = None if quantization is None else quantization["group_size"]
    with StoredModel(weight_files(source)) as stored:
        tensors = stored.as_float(DTYPES[NAMES[dtype]], group=group)
        if check_shapes:
            refuse_unexpected_shapes(config, {name: tensor.shape for name, tensor in tensors.items()})
        _refuse_too_small_disk(folder, tensors)
        _write_shards(tensors, folder)
    for name in ("dtype", "torch_dtype"):
        if name in config:
            config[name] = dtype
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix in COPIED and path.name not in LEFT_OUT:
            shutil.copyfile(path, folder / path.name)
    return tensors


def _model_folder(target: Path) -> Path:
    if not target.is_dir():
        raise RecipeError(f"there is no folder {target}. Name a run folder or a model folder.")
    run = RunFolder(target)
    folder = trained_weights(run) if run.recipe.is_file() else target
    if (folder / ADAPTER_CONFIG).is_file():
        raise RecipeError(
            f"{folder} holds LoRA adapters, which are plain files already. To have them in the weights, train with "
            "save.merge_lora: true."
        )
    return folder


def _checked(source: Path) -> dict[str, Any]:
    """Its config.json."""
    try:
        check_model_folder(source)
        config = read_config(source)
    except RecipeError as error:
        raise RecipeError([problem.removeprefix(f"{KEY}: ") for problem in error.problems]) from error
    quantization = config.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        if method != METHOD:
            raise RecipeError(
                f"{source} is quantised by {method}; lowmem exports its own int8 weights alone."
            )
        group = quantization.get("group_size")
        if not isinstance(group, int) or isinstance(group, bool) or group < 1:
            raise RecipeError(
                f"{source / CONFIG}: quantization_config.group_size is {group!r}; it must be a whole number of at "
                "least 1."
            )
    return config


def _own_dtype(config: Mapping[str, Any]) -> str:
    found = config.get("dtype", config.get("torch_dtype"))
    return found if found in NAMES else "bfloat16"


def _write_shards(tensors: Mapping[str, Streamed], folder: Path) -> None:
    shards = list(_shards(tensors))
    if len(shards) == 1:
        write_streamed(shards[0], folder / WEIGHTS, {"format": "pt"})
        return
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_streamed(shard, folder / name, {"format": "pt"})
        places |= dict.fromkeys(shard, name)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(tensors: Mapping[str, Streamed]) -> Iterator[dict[str, Streamed]]:
    """In order, none larger than SHARD_BYTES but of one tensor that is."""
    shard: dict[str, Streamed] = {}
    for name, tensor in tensors.items():
        if shard and sum(one.nbytes for one in shard.values()) + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard = {}
        shard[name] = tensor
    yield shard


def _refuse_too_small_disk(folder: Path, tensors: Mapping[str, Streamed]) -> None:
    needed, free = sum(tensor.nbytes for tensor in tensors.values()), shutil.disk_usage(folder).free
    if needed > free:
        raise FaultError(
            f"The disk of {folder.parent} has {size(free)} free and the exported model needs {size(needed)}. Free some "
            "space, or name a folder on another disk with --out."
        )

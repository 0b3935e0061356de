"""Find out from its files, before anything is loaded, that a folder is not a model we can train, and say why."""

from __future__ import annotations

import json
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lowmem.errors import RecipeError
from lowmem.run.checkpoint_manifest import DamagedError, checksum_of, read_manifest

KEY = "model.name_or_path"
BUILTIN_PREFIX = "builtin:"
BUILTIN = "builtin:tiny-llama"
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
LFS_POINTER = b"version https://git-lfs"

CONVERSION = (
    "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; "
    "M.from_pretrained({source!r}, use_safetensors=False, dtype='auto').save_pretrained({target!r}); "
    "T.from_pretrained({source!r}).save_pretrained({target!r})"
)


def local_folder(name: str) -> Path | None:
    """The folder that `name` means, or None when it can only be the id of a model on the Hugging Face Hub.

    Raises RecipeError for a file, and for a missing folder whose name cannot be an id.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise RecipeError(f"{KEY}: {name} is a file. Name the folder that holds it, with its {CONFIG}.")
    cannot_be_an_id = name.startswith((".", "/", "~")) or "\\" in name or len(path.parts) > 2
    if cannot_be_an_id or (len(path.parts) == 2 and path.parent.is_dir()):
        raise RecipeError(f"{KEY}: there is no folder {name}.{_nearest(path)} Checked from {Path.cwd()}.")
    return None


def check_builtin(name: str) -> None:
    """Raise RecipeError unless `name` is the one model that lowmem makes itself."""
    if name != BUILTIN:
        raise RecipeError(f"{KEY}: there is no {name}. Did you mean {BUILTIN}?")


def check_model_folder(folder: Path) -> None:
    """Raise RecipeError unless `folder` holds a readable config.json and whole safetensors weights.

    Weights of one of our checkpoints, which has a list of checksums, must have theirs.
    """
    read_config(folder)
    files = weight_files(folder)
    for file in files:
        _check_safetensors(file)
    _check_content(folder, files)


def _check_content(folder: Path, files: list[Path]) -> None:
    try:
        written = read_manifest(folder).files
    except DamagedError:
        return  # no checkpoint of ours, and a file of that name is somebody else's
    for file in files:
        if file.name in written and checksum_of(file) != written[file.name].checksum:
            raise RecipeError(
                f"{KEY}: {file} is damaged: it has other content than was written (its checksum differs). Name "
                "another checkpoint, or copy this one again."
            )


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of `folder`. Raises RecipeError when it is missing or not a JSON object."""
    file = folder / CONFIG
    if not file.is_file():
        raise RecipeError(f"{KEY}: {folder} has no {CONFIG}.{_what_it_is_instead(folder)}")
    return _json_object(file)


def _json_object(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise RecipeError(f"{KEY}: {file} is not UTF-8 text.") from error
    except json.JSONDecodeError as error:
        raise RecipeError(f"{KEY}: {file}:{error.lineno} is not valid JSON: {error.msg}.") from error
    if not isinstance(found, dict):
        raise RecipeError(f"{KEY}: {file} holds a {type(found).__name__} where a JSON object is needed.")
    return found


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder. Raises RecipeError where some are missing."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise _no_weights(folder)
    weight_map = _json_object(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise RecipeError(
            f"{KEY}: {folder / INDEX} has no weight_map from weights to files. Download it again."
        )
    files = [folder / name for name in sorted(set(weight_map.values()))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise RecipeError(
            f"{KEY}: {folder} lacks {len(missing)} of the {len(files)} files that {INDEX} lists: "
            f"{a_few(missing)}. Download or copy them again."
        )
    return files


def _no_weights(folder: Path) -> RecipeError:
    pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
    if not pickles:
        return RecipeError(
            f"{KEY}: {folder} holds no weights. A model folder has {WEIGHTS}, or {INDEX} and its parts."
        )
    code = CONVERSION.format(source=str(folder), target=f"{folder}-safetensors")
    return RecipeError(
        f"{KEY}: {folder} holds its weights only as pickles ({a_few(pickles)}). Loading a pickle can run any "
        f"program hidden in it, so lowmem reads safetensors only. If you trust these files, convert them once with "
        f'python -c "{code}" and name {folder}-safetensors.'
    )


def _check_safetensors(file: Path) -> None:
    with file.open("rb") as stream:
        start = stream.read(len(LFS_POINTER))
    if start == LFS_POINTER:
        raise RecipeError(
            f"{KEY}: {file} is a Git LFS pointer, not the weights. Fetch them with git lfs pull."
        )
    try:
        with safe_open(file, framework="pt"):  # reads the header and holds it against the size of the file
            pass
    except SafetensorError as error:
        raise RecipeError(
            f"{KEY}: {file} ({file.stat().st_size} bytes) is damaged or cut short ({error}). Download or copy it again."
        ) from error


def _what_it_is_instead(folder: Path) -> str:
    if (folder / "adapter_config.json").is_file():
        base = _json_object(folder / "adapter_config.json").get("base_model_name_or_path")
        return f" It holds LoRA adapters for {base or 'a model'}: name that model, or merge the adapters into it."
    inside = [child.name for child in sorted(folder.iterdir()) if (child / CONFIG).is_file()]
    if inside:
        return f" Did you mean {folder / inside[0]}?"
    if any(folder.glob("*.gguf")):
        return " GGUF files cannot be trained; name the model that they were made from."
    return f" A model folder has {CONFIG} beside its weights."


def _nearest(path: Path) -> str:
    if not path.parent.is_dir():
        return ""
    near = get_close_matches(
        path.name, [child.name for child in path.parent.iterdir() if child.is_dir()], n=1
    )
    return f" Did you mean {path.parent / near[0]}?" if near else ""


def a_few(names: list[str]) -> str:
    """The first three, and how many more."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

"""Imports point down only, and what must be light imports nothing heavy."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = [
    {"errors", "claims"},
    {"numerics", "recipe"},
    {"optim", "quant", "kernels"},
    {"run", "memory", "data"},
    {"hf"},
    {"cli"},
    {"train"},
]
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}
MAY_IMPORT = {
    # part -> packages from outside; a part that is not here may import anything
    "errors": set(),
    "claims": set(),
    "recipe": {"yaml"},
    "numerics": {"torch"},
    "optim": {"torch"},
}
NEVER_IMPORTS = {
    "memory": {"transformers", "accelerate", "peft"},
    "quant": {"transformers"},
    "run": {"transformers"},
}
LOOKED_UP_FROM_BELOW = {
    # Names that a recipe may use are defined by the data layer; this file reads them inside functions.
    ("lowmem/recipe/known_names.py", "data"),
}


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(dotted module, whether it is imported when the file is) of every import in a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    at_top = set(_run_on_import(tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node in at_top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports are not used"
            assert node.module is not None
            yield node.module, node in at_top
            if node.module == "lowmem":
                yield from ((f"lowmem.{alias.name}", node in at_top) for alias in node.names)


def _run_on_import(body: list[ast.stmt]) -> Iterator[ast.AST]:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        for inner in ("body", "orelse", "finalbody", "handlers"):
            yield from _run_on_import(getattr(node, inner, []))


def part_of(module: str) -> str | None:
    """optim for lowmem.optim.engine; None for other packages and for the package itself."""
    names = module.split(".")
    return names[1] if names[0] == "lowmem" and len(names) > 1 and names[1] in LEVEL else None


SOURCES = sorted(path.relative_to(ROOT) for path in (ROOT / "lowmem").rglob("*.py"))
PARTS = [path for path in SOURCES if len(path.parts) > 2 or path.stem in LEVEL]


def own_part(path: Path) -> str:
    return path.parts[1].removesuffix(".py")


def test_every_part_of_the_package_has_a_layer() -> None:
    parts = {own_part(path) for path in SOURCES} - {"__init__"}
    assert parts <= set(LEVEL)


@pytest.mark.parametrize("path", PARTS, ids=str)
def test_imports_point_down_only(path: Path) -> None:
    here = own_part(path)
    for module, _ in imports(ROOT / path):
        there = part_of(module)
        if there is None or there == here or (str(path), there) in LOOKED_UP_FROM_BELOW:
            continue
        assert LEVEL[there] < LEVEL[here], f"{path} imports {module}, which lies above it or beside it"


@pytest.mark.parametrize("path", [path for path in PARTS if own_part(path) in MAY_IMPORT], ids=str)
def test_the_lower_layers_import_no_other_package(path: Path) -> None:
    allowed = MAY_IMPORT[own_part(path)] | {"lowmem"} | set(sys.stdlib_module_names)
    for module, is_at_top in imports(ROOT / path):
        if is_at_top:
            assert module.split(".")[0] in allowed, f"{path} imports {module}"


@pytest.mark.parametrize("path", [path for path in PARTS if own_part(path) in NEVER_IMPORTS], ids=str)
def test_measuring_and_executing_know_nothing_of_transformers(path: Path) -> None:
    for module, _ in imports(ROOT / path):
        assert module.split(".")[0] not in NEVER_IMPORTS[own_part(path)], f"{path} imports {module}"


@pytest.mark.parametrize(
    "path", sorted((ROOT / "tests" / "reference").rglob("*.py")), ids=lambda path: path.name
)
def test_references_are_independent_of_the_package(path: Path) -> None:
    for module, _ in imports(path):
        assert module.split(".")[0] != "lowmem", f"{path} imports {module}"


def modules_after(*commands: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after running command lines of lowmem in it."""
    code = (
        "import sys, contextlib, io\n"
        "from lowmem.cli.main import main\n"
        f"for command in {list(commands)!r}:\n"
        "    with contextlib.redirect_stdout(io.StringIO()):\n"
        "        code = main(command.split())\n"
        "    assert code == 0, (command, code)\n"
        "print(*{name.partition('.')[0] for name in sys.modules})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_help_ls_show_validate_and_cp_leave_torch_unimported(tmp_path: Path) -> None:
    recipe = str(next((ROOT / "recipes").glob("*.yaml")))
    loaded = modules_after(
        "--help",
        "--version",
        "train --help",
        "eval --help",
        "generate --help",
        "doctor --help",
        "ls",
        "ls --json",
        f"show {recipe}",
        f"show {recipe} --resolved",
        "show --schema",
        f"validate {recipe}",
        f"cp {recipe} {tmp_path}/mine.yaml",
    )
    assert "yaml" in loaded
    assert not loaded & {"torch", "numpy", "transformers", "accelerate", "peft", "datasets"}


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("lowmem", {"torch", "numpy", "transformers", "yaml"}),
        ("lowmem.optim", {"transformers", "accelerate", "peft", "datasets", "matplotlib"}),
        ("lowmem.data.builtins", {"torch", "numpy", "transformers"}),
        ("lowmem.data.templates", {"torch", "numpy", "transformers"}),
    ],
)
def test_importing_a_light_module_loads_nothing_heavy(module: str, forbidden: set[str]) -> None:
    code = f"import sys, {module}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert not set(done.stdout.split()) & forbidden

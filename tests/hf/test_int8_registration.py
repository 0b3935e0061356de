"""Whether transformers knows the int8 format, as somebody has imported lowmem.hf or nobody has."""

from __future__ import annotations

import subprocess
import sys

from tests.hf.test_quantizer import int8_folder


def test_a_folder_is_known_also_when_transformers_is_imported_last(tmp_path):
    code = (
        "import sys, lowmem.hf\n"
        "assert 'torch' not in sys.modules, 'lowmem.hf alone is light'\n"
        "import transformers\n"
        f"model = transformers.AutoModelForCausalLM.from_pretrained({str(int8_folder(tmp_path))!r})\n"
        "print(type(model.model.layers[0].mlp.up_proj).__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["Int8Linear"], done.stderr


def test_without_the_import_transformers_warns_and_makes_matrices_at_random(tmp_path):
    """As docs/int8.md says, which is to be changed when transformers refuses it."""
    code = (
        "import sys, transformers\n"
        f"model = transformers.AutoModelForCausalLM.from_pretrained({str(int8_folder(tmp_path))!r})\n"
        "assert 'lowmem' not in sys.modules\n"
        "print(type(model.model.layers[0].mlp.up_proj).__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["Linear"], done.stderr
    assert "lowmem_int8" in done.stderr
    assert "MISSING" in done.stderr

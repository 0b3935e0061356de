"""Where optional real weights and data lie, and the mark of the tests that need them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

DATA = Path(__file__).parent.parent / os.environ.get("LOWMEM_TEST_DATA", "../shared/data")

needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no test data in {DATA} (set LOWMEM_TEST_DATA)")

"""bitsandbytes' Lion8bit, for parameters that are too small for codes: Lion. `bitsandbytes_codes` has the codes."""

from tests.reference.lion import reference as reference

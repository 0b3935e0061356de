"""bitsandbytes' AdamW8bit, for parameters that are too small for codes: AdamW. `bitsandbytes_codes` has the codes."""

from tests.reference.adamw import reference as reference

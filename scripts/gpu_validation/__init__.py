"""The parts of scripts/gpu_validate.py: what is compared, by whom, and how the result is written."""

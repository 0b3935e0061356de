"""What is compared, how a run is made, and how the results are written: parts of compare_optimizers.py."""

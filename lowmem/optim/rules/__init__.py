"""Element-wise and whole-matrix update rules, one idea a file. Pure: no learning rate, no weights."""

"""One file, one paper: the docstring says what it is, the body composes it from shared pieces."""

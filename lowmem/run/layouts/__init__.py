"""Where the pieces of parameters lie when every process has some of each, and how whole matrices come together."""

"""Published memory figures and what we compute for the same settings: parts of make_paper_tables.py."""

"""Recipes: strict nested YAML to frozen dataclasses. Pure data; nothing here imports torch."""

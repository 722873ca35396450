"""The `beft` command: recipes, checks, runs and reports."""

from .main import explained_errors, main, merge_beft


__all__ = ["explained_errors", "main", "merge_beft"]

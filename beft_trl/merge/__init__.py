"""An adapter folded into a plain checkpoint of its base."""

from ..weight_files import MergeError
from .adapter import MergeReport, merge_adapter


__all__ = ["MergeError", "MergeReport", "merge_adapter"]

"""Empties the page cache of some files; the comparison with other offloaders does it the same way."""

from harness.baselines.sandbox.page_cache import drop, drop_files

__all__ = ["drop", "drop_files"]

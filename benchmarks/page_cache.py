"""Drops files from the page cache, in the same way as the comparison with other offloaders."""

from harness.baselines.sandbox.page_cache import drop, drop_files

__all__ = ["drop", "drop_files"]

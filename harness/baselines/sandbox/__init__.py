"""Where another system runs: its process, memory limit, page cache and environment."""

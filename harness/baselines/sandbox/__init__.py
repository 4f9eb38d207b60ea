"""What another system runs in: its process, memory limit, page cache and environment."""

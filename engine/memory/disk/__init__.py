"""Files that are read and written past the page cache."""

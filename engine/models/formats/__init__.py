"""What stands in the files of a checkpoint's folder: settings and headers, read with suspicion."""

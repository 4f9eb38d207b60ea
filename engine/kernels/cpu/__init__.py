"""The kernels in C: compiled once with the machine's own compiler, called with addresses."""

"""Compares systems: the same requests, tokens, weights and memory, one child process after the other.

`run` walks, `search` finds batch sizes, `measure` runs one cell, `ratios` and `rows` say what came of it.
Systems themselves are in `harness.baselines`.
"""

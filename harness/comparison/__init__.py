"""Compares systems: the same requests, weights and memory limit, one child process after the other.

`runner` knows the order of trials, `search` finds batch sizes, `measure` runs one trial, `rows` and `ratios`
make the tables. The systems themselves are in `harness.baselines`.
"""

"""Decides: which tensor lives where, how many bytes that takes, in which order a pass runs. Free of torch."""

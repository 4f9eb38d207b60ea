"""Walks it: one call's passes over the block, from batching to sampled tokens."""

"""Synthetic load and the FlexGen paper's throughput tables."""

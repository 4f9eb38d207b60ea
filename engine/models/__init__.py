"""The arithmetic: transformers' own layers, run one at a time over packed tokens."""

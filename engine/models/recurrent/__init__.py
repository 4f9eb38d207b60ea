"""Layers that keep a state of every sequence beside or instead of keys and values."""

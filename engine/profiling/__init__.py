"""Measurements of which a hardware profile is made; `engine.profiler` puts them together."""

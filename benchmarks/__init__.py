"""Measurements of the engine. See README.md beside this file."""

"""Finds a policy: blocks are enumerated, fractions come from the linear program."""

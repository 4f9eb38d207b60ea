"""Accuracy against compression: every format answers the same questions."""

"""Weights in their tiers, and how a stage's weights get to the device."""

"""Weights in their tiers, and how a stage's weights reach the device."""

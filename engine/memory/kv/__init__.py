"""The KV cache in its tiers, and what attention sees of it."""

"""Holds and moves data: tiers and their ledger, streams, weights, KV cache, hidden states."""

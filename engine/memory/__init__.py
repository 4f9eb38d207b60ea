"""Holds and moves: tiers and their ledger, lanes, weights, KV cache, hidden states."""

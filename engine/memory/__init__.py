"""Holds and moves: tiers and their ledger, streams, weights, KV cache, hidden states."""

"""What helps where a plan does not fit a tier."""

from __future__ import annotations

from engine.spec.hardware import Tier


def cure_of(largest_use: str, tier: Tier, limit: str) -> str:
    """What helps where a tier is too small, by what takes most of it and by what its limit comes from."""
    cures = {
        "weights": "place more weights in another tier, or use fewer bits (weight_quant=4 or less)",
        "weight buffers": "raise the budget; two layers' weights must fit beside everything else",
        "KV cache": "lower device_batch or num_device_batches, place kv in another tier, or use fewer bits "
        "(kv_quant=4 or less)",
        "shared KV cache": "place prefix_kv in another tier, use prefix_sharing=off, or a smaller block",
        "KV tails": "lower device_batch or num_device_batches, or place kv in another tier",
        "KV buffers": "lower device_batch",
        "state": "lower device_batch or num_device_batches, place state in another tier, or use fewer bits "
        "(state_quant=8)",
        "shared state": "use prefix_sharing=off, or a smaller block",
        "state buffers": "lower device_batch",
        "activations": "lower max_batch_tokens or num_device_batches",
        "workspace": "lower max_batch_tokens or device_batch",
    }
    flag = "--disk" if tier is Tier.DISK else f"--{tier.value}-memory"
    more = f"free more memory ({limit} leaves no more)" if limit else f"raise {flag}"
    return f"{more} or {cures.get(largest_use, 'lower device_batch')}"

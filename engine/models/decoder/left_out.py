"""Tensors of a checkpoint that text does not need: which may be left out, and how they are named."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping

from engine.models.adapter import LayeredModel

_KV_SCALE = re.compile(r"^(?:[kvq]_(?:scale|zero_point)|output_scale|scaling_factor)$")
"""Leaves of scales that other engines' 8-bit KV caches read; no weight is multiplied by them."""

_EXTRA_LAYER = re.compile(r"^(?:model\.)?(?:language_model\.)?(?:model\.)?layers\.\d+")


def misplaced(model: LayeredModel, strays: Iterable[str]) -> list[str]:
    """Those of some names, as in the model's state dict, that belong to what the model computes for text.

    Leaving them out would change answers in silence: a bias or a scale beside a weight that is there, or a
    whole decoder layer more than the config has. Layers that predict several tokens, heads and towers are not
    among them, as they have modules of their own.
    """
    layers = f"{model.parts.layers_name}."
    known = {name[len(layers) :].split(".", 1)[1] for name in model.text_names if name.startswith(layers)}
    found: list[str] = []
    beyond: dict[str, list[str]] = {}
    for name in strays:
        owner, _, leaf = name.rpartition(".")
        index, _, rest = name.removeprefix(layers).partition(".")
        if name.startswith(layers) and index not in model.layers._modules:
            beyond.setdefault(index, []).append(rest)
        elif f"{owner}.weight" in model.text_names and not _KV_SCALE.match(leaf):
            found.append(name)
    for index, names in beyond.items():
        if known.issuperset(names):
            found += (f"{layers}{index}.{rest}" for rest in names)
    return found


def grouped(names: Iterable[str]) -> Mapping[str, int]:
    """How many tensors there are by the first parts of their names: what a person calls a tower or a head."""
    counts: Counter[str] = Counter()
    for name in names:
        layer = _EXTRA_LAYER.match(name)
        counts[layer.group(0) if layer else ".".join(name.split(".")[:2])] += 1
    return dict(sorted(counts.items()))


def notice_of(left_out: Mapping[str, int], model: str) -> str:
    """One line that tells of them."""
    groups = ", ".join(f"{group} ({count:,})" for group, count in left_out.items())
    return f"{sum(left_out.values()):,} tensors of {model} are left out, as text needs none of them: {groups}"

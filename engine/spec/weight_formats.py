"""Which weight is kept in which format: one for all matrices of the layers, others by name.

Written as one format (``4``, ``flexgen``, ``16`` for none), or as rules ``pattern=format`` of which the
first whose regular expression is found in a tensor's name holds: ``mlp.*=3,default=4``. ``default``
stands for all matrices of the layers; embeddings and head are packed by a rule that names them only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from engine.errors import PolicyError
from engine.spec.model import TensorSpec
from engine.spec.quant import QuantSpec

_DEFAULT = "default"
EXACT = "16"
"""How a policy writes that nothing is packed."""


@dataclass(frozen=True)
class WeightFormats:
    """The formats of a model's weights; falsy if none is packed."""

    default: QuantSpec | None = None
    """Format of every matrix of the layers that no rule names."""

    rules: tuple[tuple[str, QuantSpec | None], ...] = ()
    """Regular expressions and formats, the first that is found in a name holds."""

    def __bool__(self) -> bool:
        return self.default is not None or any(form is not None for _, form in self.rules)

    @property
    def rounds_activations(self) -> bool:
        """Whether some product rounds its activations, too."""
        forms = (self.default, *(form for _, form in self.rules))
        return any(form is not None and form.activation_bits != 16 for form in forms)

    def of(self, tensor: TensorSpec) -> QuantSpec | None:
        """The format of one tensor; its own if its checkpoint packed it already.

        Activations can be rounded only where the product is ours; elsewhere the weight alone is packed.
        """
        if tensor.packed is not None:
            return tensor.packed
        if self.default is None and not self.rules:
            return None
        form = self.default if tensor.compressible else None
        if tensor.is_matrix:
            form = next((form for pattern, form in self.rules if re.search(pattern, tensor.name)), form)
        if form is not None and form.activation_bits != 16 and not tensor.fused:
            return form.replace(activation_bits=16)
        return form

    def __str__(self) -> str:
        if not self.rules:
            return _word(self.default)
        named = [f"{pattern}={_word(form)}" for pattern, form in self.rules]
        return ";".join([*named, f"{_DEFAULT}={_word(self.default)}"])

    @classmethod
    def parse(cls, text: str) -> WeightFormats:
        """Read what ``str`` writes; rules are separated by ``,`` or ``;``.

        Raises:
            PolicyError: naming the rule that is not understood.
        """
        parts = [part.strip() for part in re.split(r"[;,]", text) if part.strip()]
        if not parts:
            raise PolicyError("the weights' format is empty: write for instance 4, flexgen or 16")
        if len(parts) == 1 and "=" not in parts[0]:
            return cls(_format(parts[0]))
        default = None
        rules = []
        for part in parts:
            pattern, equals, form = part.rpartition("=")
            if not equals or not pattern or not form:
                raise PolicyError(f"{part!r} in {text!r} is not pattern=format, as in mlp.*=3;default=4")
            if pattern == _DEFAULT:
                default = _format(form)
                continue
            try:
                re.compile(pattern)
            except re.error as error:
                raise PolicyError(f"pattern {pattern!r} is not a regular expression: {error}") from None
            rules.append((pattern, _format(form)))
        return cls(default, tuple(rules))


def _format(text: str) -> QuantSpec | None:
    return None if text == EXACT else QuantSpec.parse(text)


def _word(form: QuantSpec | None) -> str:
    return EXACT if form is None else str(form)

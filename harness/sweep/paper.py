"""The accuracy table of the FlexGen paper: its published figures, to stand beside measured ones.

Sheng et al., arXiv 2303.06865, version 2, Table 5. They are constants; nothing is measured here.
"""

from __future__ import annotations

from dataclasses import dataclass

SOURCE = "FlexGen paper, arXiv 2303.06865 v2, Table 5"

MODEL = "facebook/opt-30b"
DATASET = "Salesforce/wikitext:wikitext-2-raw-v1:test"


@dataclass(frozen=True)
class PaperAccuracy:
    """One format of one model in the paper."""

    model: str
    format: str
    """Its name in scenarios/formats_paper.yaml; "full" for fp16."""

    lambada_accuracy: float
    wikitext_perplexity: float
    kind: str = "published"


PUBLISHED = (
    PaperAccuracy("opt-30b", "full", 0.725, 12.72),
    PaperAccuracy("opt-30b", "4-bit", 0.724, 12.90),
    PaperAccuracy("opt-30b", "4-bit-sparse", 0.718, 12.90),
    PaperAccuracy("opt-175b", "full", 0.758, 10.82),
    PaperAccuracy("opt-175b", "4-bit", 0.756, 10.94),
    PaperAccuracy("opt-175b", "4-bit-sparse", 0.756, 10.94),
)

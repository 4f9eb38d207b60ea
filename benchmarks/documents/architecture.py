"""The picture of docs/architecture.md: who asks, who scores, who computes, and where bytes lie."""

from __future__ import annotations

from benchmarks.documents.drawing import GREY, Drawing

FRONT_ENDS = (
    ("HELM", "run entries"),
    ("lm-eval", "tasks"),
    ("batch", "OpenAI's format"),
    ("Python", "token ids"),
)
SUITE = (("suite/", "build requests, answer, score"), ("engines/", "settings, automatic policy"))
AROUND = (
    ("report/", "HTML, Markdown"),
    ("sweep/", "accuracy by bits"),
    ("comparison/", "other systems"),
    ("throughput/", "paper's tables"),
)
RUNTIME = "walks a pass: every device batch, layer by layer, while streams bring what comes next"
COLUMNS = (
    ("plan/", "decides: schedule, placement"),
    ("memory/", "holds and moves"),
    ("models/", "computes, with transformers"),
)
BELOW = "below them: kernels/ (C, Triton) and spec/ (requests, policies, formats)"
TIERS = (
    ("device", "computes; fastest, smallest"),
    ("host", "RAM, pinned where it helps"),
    ("disk", "read past the page cache"),
)
PLACED = "three tiers: weights, KV cache and hidden states are placed by fractions"


def draw_architecture() -> str:
    """Front ends above the harness above the engine above the tiers."""
    drawing = Drawing(720, 640, "The architecture of Tierbench")
    panel(drawing, 10, 104, ("Front ends", "each in the format that its users have"), "#eef3f9")
    cells(drawing, 46, FRONT_ENDS, gap=8)
    drawing.arrow(360, 114, 360, 138)
    panel(drawing, 138, 166, ("harness/", "text in, scores out; knows no tensors"), "#e3f1e8")
    cells(drawing, 174, SUITE, gap=8)
    cells(drawing, 238, AROUND, gap=8)
    drawing.arrow(360, 304, 360, 334)
    drawing.text(372, 325, "Engine.answer(requests): token ids", 13, fill=GREY)
    panel(drawing, 334, 184, ("engine/", "token ids in and out; knows no text"), "#fdf0e2")
    cells(drawing, 370, (("runtime/", RUNTIME),), gap=8)
    cells(drawing, 434, COLUMNS, gap=10)
    drawing.text(360, 508, BELOW, 13, anchor="middle", fill=GREY)
    drawing.arrow(360, 518, 360, 550)
    cells(drawing, 552, TIERS, gap=34)
    for x in (228, 462):
        drawing.arrow(x + 30, 580, x + 2, 580)
    drawing.text(360, 630, PLACED, 13, anchor="middle", fill=GREY)
    return drawing.svg()


def panel(drawing: Drawing, top: float, height: float, names: tuple[str, str], fill: str) -> None:
    """A coloured band over the whole width: its name, and what it knows."""
    drawing.box(10, top, 700, height, fill, radius=10)
    drawing.text(26, top + 26, names[0], 17, weight="bold")
    drawing.text(694, top + 26, names[1], 14, anchor="end", fill=GREY)


def cells(drawing: Drawing, top: float, names: tuple[tuple[str, str], ...], gap: float) -> None:
    """A row of boxes, each with a name and a line below it."""
    width = (668 - gap * (len(names) - 1)) / len(names)
    for index, (name, what) in enumerate(names):
        x = 26 + (width + gap) * index
        drawing.box(x, top, width, 56, "#ffffff", radius=6, stroke=GREY)
        drawing.text(x + width / 2, top + 24, name, 15, anchor="middle", weight="bold")
        drawing.text(x + width / 2, top + 44, what, 12.5, anchor="middle", fill=GREY)

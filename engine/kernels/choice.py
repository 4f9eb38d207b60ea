"""Which float32 product is the fastest here, by rows and size of the weight: measured once, then kept.

Candidates are our C product, oneDNN's and torch's own (MKL, mostly). They round differently in the last
digits, so a choice must not change: within a process it is made once, and the figures are kept in the
folder of the compiled kernels, from where later processes on this machine choose alike. Each candidate is
timed on one thread, by that thread's processor time: on a busy machine several threads wait for each
other, and the figures would show which one was unlucky. Knows nothing of models.

Weights that are packed or in 16-bit floats have no alternative. FBGEMM's product of prepacked fp16 weights
is slower than ours at few rows and at most a quarter faster at 16 and more (Zen 3, 4096 x 4096), but takes 20
seconds of packing per billion weights and memory of its own, and rounds bfloat16. Torch's arithmetic in 16
bits is emulated there, and four times slower. To unpack a whole matrix first gains nothing.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from engine.errors import UsageError
from engine.files.documents import read_json
from engine.kernels.cpu import build, native
from engine.spec.precision import MatmulPrecision

SWITCH = "TIERBENCH_PRODUCT"
"""Environment variable: the name of one of `CANDIDATES`, for all products, and nothing is measured."""

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]
Rates = dict[str, dict[int, dict[str, float]]]
"""GFLOP/s of one thread by size of the weight, rows, candidate."""

ROWS = (1, 2, 4, 8, 16, 64, 256)
SIZES = {"small": (256, 512), "large": (4096, 2048)}
"""Shapes of the weight; the large one does not stay in most caches."""

_LARGE = 2**20  # values of a weight that counts as large
_WORK, _FEWEST_ROWS = 2e8, 512  # FLOPs of a measurement: fewer rows of the weight where x has many
_ROUNDS = {"small": 12, "large": 3}
_MARGIN = 1.05  # how much faster another candidate has to be than the first

_lock = threading.Lock()
_table: list[Rates] = []  # at most one


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")
    return product


CANDIDATES: dict[str, Product] = {"c": native.linear, "onednn": _onednn, "torch": nn.functional.linear}
"""x [rows, width] times weight [outputs, width], transposed, plus bias: float32, the weight contiguous."""


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    precision: MatmulPrecision = MatmulPrecision.HIGHEST,
) -> Tensor:
    """x [..., width] times weight [rows, width], transposed, plus bias [rows]: [..., rows], as `F.linear`.

    Args:
        precision: which the C product may use where many rows gain by it.
    """
    rows = x.numel() // x.shape[-1]
    if not (rows and x.dtype == weight.dtype == torch.float32 and weight.is_contiguous()):
        return nn.functional.linear(x, weight, bias)
    flat = x.reshape(rows, -1)
    if native.uses_bfloats(rows, precision):
        product = native.linear(flat, weight, bias, precision)
    else:
        product = fastest(rows, weight.numel())(flat, weight, bias)
    return product.view(*x.shape[:-1], -1)


def fastest(rows: int, values: int) -> Product:
    """The product for ``rows`` rows of activations, at least 1, and a weight of ``values`` values.

    Raises:
        UsageError: if `SWITCH` names no candidate that works here.
    """
    forced = os.environ.get(SWITCH)
    if forced:
        if forced not in candidates():
            raise UsageError(f"{SWITCH}={forced} is not available: use {', '.join(candidates())}")
        return CANDIDATES[forced]
    if len(candidates()) == 1:
        return nn.functional.linear
    return CANDIDATES[choose(table(), rows, values)]


def choose(rates: Rates, rows: int, values: int) -> str:
    """The name of the fastest candidate at the next lower number of rows measured; in doubt the first."""
    by_rows = rates["large" if values >= _LARGE else "small"]
    measured = by_rows[max(count for count in by_rows if count <= rows)]
    first = next(name for name in CANDIDATES if name in measured)
    best = max(measured, key=lambda name: measured[name])
    return best if measured[best] > _MARGIN * measured[first] else first


@cache
def candidates() -> tuple[str, ...]:
    """Those that work here; torch's always does."""
    return (*(["c"] if native.available() else []), *(["onednn"] if _has_onednn() else []), "torch")


def table() -> Rates:
    """The figures: this process's, those on disk, or measured now, which takes half a second."""
    with _lock:
        if not _table:
            path = _path()
            found = None if path is None else read(path, candidates())
            if found is None:
                found = measure()
                if path is not None:
                    found = _keep(path, found)
            _table.append(found)
        return _table[0]


def measure() -> Rates:
    """GFLOP/s of all candidates on one thread, taken in turn."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {size: {rows: _rates(size, rows) for rows in ROWS} for size in SIZES}
    finally:
        torch.set_num_threads(threads)


def _rates(size: str, rows: int) -> dict[str, float]:
    outputs, width = SIZES[size]
    outputs = min(outputs, max(_FEWEST_ROWS, int(_WORK / (2 * rows * width))))
    weight, x = torch.ones(outputs, width), torch.ones(rows, width)
    times = dict.fromkeys(candidates(), float("inf"))
    for _ in range(_ROUNDS[size]):
        for name in times:
            begin = time.thread_time()
            CANDIDATES[name](x, weight, None)
            times[name] = min(times[name], time.thread_time() - begin)
    return {name: 2e-9 * rows * weight.numel() / max(best, 1e-7) for name, best in times.items()}


def read(path: Path, names: tuple[str, ...]) -> Rates | None:
    """Figures on disk; None if there are none, or they are not those of these candidates."""
    try:
        kept = read_json(path)
        found = {
            size: {rows: {name: float(kept[size][str(rows)][name]) for name in names} for rows in ROWS}
            for size in SIZES
        }
    except (OSError, ValueError, LookupError, TypeError):
        return None
    rates = [rate for by_rows in found.values() for by_name in by_rows.values() for rate in by_name.values()]
    return found if all(0 < rate < float("inf") for rate in rates) else None


def _keep(path: Path, rates: Rates) -> Rates:
    """Write figures where no valid ones are; returns those that are there then, maybe another process's."""
    made = None
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, suffix=".json", delete=False
        ) as file:
            made = Path(file.name)
            json.dump(rates, file, indent=1)
        try:
            os.link(made, path)  # unlike replacing, this never exchanges what another process has read
        except FileExistsError:
            others = read(path, candidates())
            if others is not None:
                return others
            os.replace(made, path)
    except OSError:
        pass  # a folder that cannot be written: other processes measure for themselves
    finally:
        if made is not None:
            made.unlink(missing_ok=True)
    return rates


def _path() -> Path | None:
    """Where the figures are kept; None if nowhere."""
    try:
        return build.cache_folder() / f"products-{build.machine_key()}.json"
    except (build.BuildError, OSError):
        return None


def _has_onednn() -> bool:
    """Whether this torch has the operator, which is not part of its public interface, and it works."""
    if not torch.backends.mkldnn.is_available():
        return False
    x, weight = torch.arange(6.0).view(2, 3), torch.arange(12.0).view(4, 3)
    try:
        product = _onednn(x, weight, None)
    except (RuntimeError, AttributeError, TypeError):
        return False
    return torch.equal(product, nn.functional.linear(x, weight))

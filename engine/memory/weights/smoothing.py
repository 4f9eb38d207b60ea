"""Moves outliers of the activations into the weights, where both are rounded to 8 bits.

SmoothQuant (Xiao et al., 2023): with the largest magnitude a_j of input channel j over calibration
data and w_j of the weight's column j, the activations are divided and the column multiplied by
s_j = a_j ** strength / w_j ** (1 - strength), which leaves their product as it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from engine.errors import PolicyError, first_line
from engine.files.whole import write_whole

STRENGTH = 0.5
"""SmoothQuant's alpha: how much of the difficulty goes into the weights."""

_FLOOR = 1e-5
_FORMAT = "tierbench-calibration"


def smooth(matrix: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    """Smooth a weight [rows, width] float32: divisor [width] of the activations, and the new weight.

    Args:
        largest: [width] float32, largest magnitude of every input channel.
    """
    columns = matrix.abs().amax(0).clamp_min(_FLOOR)
    scale = largest.clamp_min(_FLOOR) ** STRENGTH / columns ** (1 - STRENGTH)
    scale = scale.clamp_min(_FLOOR)
    return scale, matrix * scale


def write_statistics(path: Path, largest: Mapping[str, Tensor], digest: str, tokens: int) -> None:
    """Write the statistics of a calibration run, with the digest of the model they belong to.

    Args:
        largest: [width] per weight, largest magnitude of every input channel.

    Raises:
        StorageError: if the file cannot be written.
    """
    about = {"format": _FORMAT, "model": digest, "tokens": str(tokens)}
    write_whole(path, save({name: t.float().cpu().contiguous() for name, t in largest.items()}, about))


def read_statistics(path: Path, digest: str) -> dict[str, Tensor]:
    """Read them back: [width] float32 by the name of the weight.

    Raises:
        PolicyError: if the file is missing, damaged, or belongs to another model.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise PolicyError(
            f"calibration={path} cannot be read ({first_line(error)}): write it with run_helm.py calibrate"
        ) from error
    if about.get("format") != _FORMAT:
        raise PolicyError(f"calibration={path} was not written by run_helm.py calibrate")
    if about.get("model") != digest:
        raise PolicyError(f"calibration={path} belongs to another model: calibrate this one")
    return found

"""Single rows of an embedding table that is kept elsewhere: a pass asks for few of them."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.memory.stage_buffers import StoredWeight


def gather(stored: StoredWeight, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of a table: ids [...] -> [..., width], in ``dtype`` on the device of ``ids``.

    Raises:
        StorageError: if the disk fails.
    """
    kept = stored.kept
    wanted, places = torch.unique(ids.reshape(-1), return_inverse=True)
    form_dtype = getattr(torch, kept.dtype if kept.form is None else str(kept.form))
    width = kept.tensor.shape[1]
    rows = torch.empty(len(wanted), width, dtype=form_dtype)
    if stored.file is not None:
        size = width * form_dtype.itemsize
        as_bytes = rows.view(torch.uint8)
        stored.file.read_many(
            [(stored.offset + row * size, as_bytes[i]) for i, row in enumerate(wanted.tolist())]
        )
    else:
        assert stored.data is not None
        table = stored.data.view(-1).view(form_dtype).view(-1, width)
        torch.index_select(table, 0, wanted.to(table.device), out=rows)
    found = rows.to(ids.device, dtype)[places]
    return found.view(*ids.shape, width)

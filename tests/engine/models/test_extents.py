"""Which tensors are read from a checkpoint's own files; only the others are streamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.engine import Engine
from engine.errors import CheckpointError
from engine.models import weight_files
from engine.models.checkpoint import Checkpoint
from engine.models.formats.headers import read_header
from tests.support.engine_models import Family
from tests.support.page_cache import resident
from tests.support.prequantised_models import GPTQ, save_quantised


def opened(folder: Path) -> tuple[Checkpoint, Any]:
    """A checkpoint and the empty model that it belongs to."""
    with Engine(folder, device="cpu", offload_dir=folder / "off") as engine:
        assert isinstance(engine._source, Checkpoint)
        return engine._source, engine._model


def in_file(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor that has an extent, made from the bytes there, in the dtype and shape of the model."""
    source, model = opened(folder)
    state, dtypes = model.model.state_dict(), source.dtypes(model)
    found = {}
    for name, extent in source.extents(model).items():
        data = bytearray(extent.path.read_bytes()[extent.offset : extent.end])
        found[name] = torch.frombuffer(data, dtype=dtypes[name]).view(state[name].shape)
    return found


FUSED = {"mixtral": "mlp.experts", "qwen3_moe": "mlp.experts"}
"""Families some of whose tensors transformers makes of several on disk, and how these are named."""


@pytest.mark.parametrize("name", ["opt", "llama", "gpt2", "gpt_neox", "phi3", "deepseek_v3", *FUSED])
def test_extents_and_the_rest_of_the_stream_are_the_whole(name: str, family: Callable[[str], Family]) -> None:
    folder = family(name).folder
    source, model = opened(folder)
    everything, files = dict(source.stream(model)), in_file(folder)
    rest = dict(source.stream(model, everything.keys() - files.keys()))
    assert not files.keys() & rest.keys() and files.keys() | rest.keys() == everything.keys()
    for tensor, value in {**files, **rest}.items():
        assert torch.equal(value, everything[tensor]), tensor
    if name in FUSED:
        assert rest and all(FUSED[name] in tensor for tensor in rest)
    elif name != "deepseek_v3":
        assert not rest


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_shards_and_half_precision(dtype: torch.dtype, llama: Family, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llama.folder, tmp_path / "model"))
    state = {name: value.to(dtype) for name, value in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    names, weight_map = sorted(state), {}
    for number in range(3):
        part = {name: state[name] for name in names[number::3]}
        save_file(part, folder / f"model-{number}.safetensors", {"format": "pt"})
        weight_map |= dict.fromkeys(part, f"model-{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(str({"weight_map": weight_map}).replace("'", '"'))
    found = in_file(folder)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the tensors that are read from files."""
    names: list[str] = []
    real = weight_files.Reader.read

    def read(self: weight_files.Reader, entry: weight_files.Entry, name: str) -> torch.Tensor:
        names.append(name)
        return real(self, entry, name)

    monkeypatch.setattr(weight_files.Reader, "read", read)
    yield names


def test_what_is_not_asked_for_is_not_read(family: Callable[[str], Family], reads: list[str]) -> None:
    source, model = opened(family("mixtral").folder)
    reads.clear()
    (wanted,) = (name for name in source.dtypes(model) if name.endswith("0.mlp.experts.down_proj"))
    assert [name for name, _ in source.stream(model, {wanted})] == [wanted]
    assert reads and all(".0." in name and ".w2." in name for name in reads), reads
    reads.clear()
    assert list(source.stream(model, ())) == [] and reads == []


def test_a_tensor_that_is_missing_is_missed_whatever_is_asked_for(llama: Family, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llama.folder, tmp_path / "model"))
    state = load_file(folder / "model.safetensors")
    del state["model.norm.weight"]
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    source, model = opened(folder)
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors, first 'model\.norm\.weight'"):
        list(source.stream(model, ()))


def test_other_files_and_packed_tensors_have_none(llama: Family, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llama.folder, tmp_path / "model"))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    source, model = opened(folder)
    assert source.extents(model) == {}
    assert dict(source.stream(model)).keys() == source.dtypes(model).keys()


def test_tensors_of_few_bits_have_none(llama: Family, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save_quantised(llama.model, folder, GPTQ)
    source, model = opened(folder)
    packed = source.packed_formats(model)
    assert packed and not packed.keys() & source.extents(model).keys()


def test_large_files_do_not_stay_in_the_page_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    state = {str(number): torch.full((1 << 20,), float(number)) for number in range(4)}
    save_file(state, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())  # pages that are not on the disk yet cannot be dropped
    header = read_header(path)

    def read_all() -> None:
        with weight_files.Reader() as reader:
            for name, value in state.items():
                assert torch.equal(reader.read(header[name], name), value)

    read_all()
    assert resident(path) == 1, "a small file is read again soon"
    monkeypatch.setattr(weight_files, "DROP_BEYOND", 0)
    read_all()
    if resident(path) == 1:
        pytest.skip("this file system is the page cache")
    assert resident(path) < 0.2, "pages that two tensors share may stay"

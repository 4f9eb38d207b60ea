"""Damaged or foreign checkpoints are refused with one clear line that names what is wrong."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.engine import Engine
from engine.errors import CheckpointError, ModelError, TierbenchError
from engine.spec.request import Request
from tests.support.engine_models import Family


@pytest.fixture
def copy(llama: Family, tmp_path: Path) -> Path:
    """A checkpoint to be damaged."""
    return Path(shutil.copytree(llama.folder, tmp_path / "model"))


def refusal(folder: Path, kind: type[TierbenchError] = CheckpointError, **options: Any) -> str:
    """The one line with which a model is refused, when it is opened or at the first answer."""
    with (
        pytest.raises(kind) as caught,
        Engine(folder, device="cpu", offload_dir=folder / "off", **options) as engine,
    ):
        engine.answer([Request((5, 6), 1)])
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600
    assert caught.value.exit_code == 2
    return message


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 0.5, -1])
def test_truncated_safetensors(keep: float, copy: Path) -> None:
    path = copy / "model.safetensors"
    size = path.stat().st_size
    os.truncate(path, int(size * keep) if isinstance(keep, float) else keep % size)
    message = refusal(copy)
    assert "model.safetensors" in message and "download it again" in message


@pytest.mark.parametrize("header", [
    b"\xff" * 8 + b"{}",
    (10).to_bytes(8, "little") + b"not json!!",
    (2).to_bytes(8, "little") + b"[]",
    (4).to_bytes(8, "little") + b"null",
    b'\x14\x00\x00\x00\x00\x00\x00\x00{"a": {"dtype": 3}}  ',
    b"PK\x03\x04 an archive, for instance",
    b"<!DOCTYPE html><title>404</title>",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 100\n",
])  # fmt: skip
def test_garbage_instead_of_safetensors(header: bytes, copy: Path) -> None:
    (copy / "model.safetensors").write_bytes(header)
    assert "not a valid safetensors file" in refusal(copy)


def edit_header(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite a safetensors header, keeping the data."""
    data = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


NAME = "model.layers.0.mlp.up_proj.weight"


def test_header_that_contradicts_itself(copy: Path) -> None:
    def negative(header: dict[str, Any]) -> None:
        begin, end = header[NAME]["data_offsets"]
        header[NAME]["data_offsets"] = [begin - end, 0]

    edit_header(copy, negative)
    assert NAME in refusal(copy)


def test_offsets_beyond_the_file(copy: Path) -> None:
    def beyond(header: dict[str, Any]) -> None:
        header[NAME]["data_offsets"] = [offset + 10_000_000 for offset in header[NAME]["data_offsets"]]

    edit_header(copy, beyond)
    assert "truncated" in refusal(copy)


def test_unknown_kind_of_number(copy: Path) -> None:
    def eight_bits(header: dict[str, Any]) -> None:
        header[NAME]["dtype"] = "F8_E4M3"

    edit_header(copy, eight_bits)
    message = refusal(copy)
    assert NAME in message and "F8_E4M3" in message


def resave(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def without(state: dict[str, torch.Tensor], name: str) -> None:
    del state[name]


def test_wrong_shape_is_named(copy: Path) -> None:
    resave(copy, lambda state: state.update({NAME: state[NAME][:-3].clone()}))
    message = refusal(copy)
    assert NAME in message and "[93, 64]" in message and "[96, 64]" in message


def test_missing_tensor_is_named(copy: Path) -> None:
    resave(copy, lambda state: without(state, NAME))
    message = refusal(copy)
    assert NAME in message and "lacks 1 tensor" in message


def test_left_over_tensor_is_named(copy: Path) -> None:
    resave(copy, lambda state: state.update({"model.layers.9.mlp.up_proj.weight": torch.zeros(2)}))
    message = refusal(copy)
    assert "model.layers.9.mlp.up_proj.weight" in message and "LlamaForCausalLM" in message


def test_missing_expert_is_refused(family: Callable[[str], Family], tmp_path: Path) -> None:
    """One of the matrices that are fused into one tensor in the model."""
    folder = Path(shutil.copytree(family("mixtral").folder, tmp_path / "model"))
    names = [name for name in load_file(folder / "model.safetensors") if "experts.1." in name]
    resave(folder, lambda state: without(state, names[0]))
    assert "experts" in refusal(folder)


def test_missing_shard_is_named(llama: Family, tmp_path: Path) -> None:
    llama.model.save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    shard = sorted((tmp_path / "shards").glob("model-*.safetensors"))[1]
    shard.unlink()
    message = refusal(tmp_path / "shards")
    assert shard.name in message and "model.safetensors.index.json" in message


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "x" * 5000, "a\0b"]
)
def test_index_that_leads_outside_is_refused(name: str, llama: Family, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    llama.model.save_pretrained(folder, max_shard_size="60KB")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    first = next(iter(content["weight_map"]))
    content["weight_map"][first] = name
    index.write_text(json.dumps(content))
    shutil.copy(llama.folder / "model.safetensors", tmp_path / "secret.safetensors")
    assert repr(name[:80]) in refusal(folder)


@pytest.mark.parametrize(
    "content",
    ["", "{}", "[]", '{"weight_map": [1]}', '{"weight_map": {"a": 5}}', '{"weight_map": {}}', "\x00\xff"],
)
def test_index_that_is_none(content: str, llama: Family, copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    (copy / "model.safetensors.index.json").write_text(content)
    refusal(copy)


def test_config_without_weights(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    message = refusal(copy)
    assert "model.safetensors" in message and "random weights" in message


def test_folder_without_config(copy: Path, tmp_path: Path) -> None:
    (copy / "config.json").unlink()
    assert "config.json" in refusal(copy, ModelError)
    (tmp_path / "empty").mkdir()
    assert "config.json" in refusal(tmp_path / "empty", ModelError)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '"llama"', '{"model_type": "no_such_model"}', "{}", '{"model_type": 7}']
)
def test_config_that_is_none(content: str, copy: Path) -> None:
    (copy / "config.json").write_text(content)
    assert "config.json" in refusal(copy, ModelError)


@pytest.mark.parametrize("changes", [
    {"num_hidden_layers": "two"},
    {"hidden_size": -64},
    {"num_attention_heads": 0},
    {"num_attention_heads": 7},
    {"num_key_value_heads": 3},
    {"vocab_size": None},
    {"hidden_act": "no_such_function"},
    {"rope_parameters": {"rope_type": "no_such_rope"}},
    {"num_hidden_layers": 10**7},
    {"hidden_size": 2**40},
    {"vocab_size": 10**12},
    {"intermediate_size": 1e30},
    {"num_attention_heads": 10**6},
    {"layer_types": ["full_attention"] * 200_000},
])  # fmt: skip
def test_config_with_impossible_values(changes: dict[str, Any], copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | changes))
    refusal(copy, ModelError)


@pytest.mark.parametrize("name", ["no/such/folder/at/all", "./missing", "../x", "/nowhere/model", ""])
def test_model_that_is_no_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        Engine(name, device="cpu", offload_dir=tmp_path)
    assert "\n" not in str(caught.value)


def test_file_instead_of_a_folder(copy: Path) -> None:
    assert "not a folder" in refusal(copy / "model.safetensors", ModelError)


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fp8"])
def test_quantised_checkpoint_is_refused(method: str, copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": method, "bits": 4}})
    )
    message = refusal(copy, ModelError)
    assert "quantised" in message and method in message


def test_config_that_wants_to_run_code(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config |= {
        "model_type": "own_kind",
        "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
    }
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "evil.py").write_text(f"open({str(copy / 'ran')!r}, 'w').close()\n")
    assert "--trust-remote-code" in refusal(copy, ModelError)
    assert not (copy / "ran").exists()


class Malicious:
    """Writes a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return open, (self.path, "w")


@pytest.mark.parametrize("form", ["torch", "plain"])
def test_pickle_that_runs_code_is_refused(form: str, copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    content = {"lm_head.weight": Malicious(str(copy / "ran"))}
    if form == "torch":
        torch.save(content, copy / "pytorch_model.bin")
    else:
        (copy / "pytorch_model.bin").write_bytes(pickle.dumps(content, protocol=2))
    assert "pytorch_model.bin" in refusal(copy)
    assert not (copy / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"garbage", None])
def test_damaged_pickled_weights(content: bytes | None, llama: Family, copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    torch.save(llama.model.state_dict(), copy / "pytorch_model.bin")
    data = (copy / "pytorch_model.bin").read_bytes()
    (copy / "pytorch_model.bin").write_bytes(data[: len(data) // 2] if content is None else content)
    assert "pytorch_model.bin" in refusal(copy)

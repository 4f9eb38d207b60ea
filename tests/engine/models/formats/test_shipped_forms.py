"""Checkpoints as makers ship them: read as transformers reads them, or refused as what they are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from engine.errors import CheckpointError, ModelError
from engine.models.checkpoint import Checkpoint, resolve
from engine.models.weight_files import weight_files
from tests.support.engine_models import Family
from tests.support.prequantised_models import (
    AWQ,
    GPTQ,
    as_int32,
    edit,
    gptq_tensors,
    load,
    round_weight,
    save_quantised,
    set_config,
    unpacked,
    words_of,
)

BASE = "model.layers.0.mlp.up_proj"
SYMMETRIC = GPTQ | {"sym": True}
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


@pytest.fixture
def copy(llama: Family, tmp_path: Path) -> Path:
    """A checkpoint in 32 bits to be changed."""
    return Path(shutil.copytree(llama.folder, tmp_path / "model"))


def refusal(folder: Path, kind: type[ModelError] = CheckpointError) -> str:
    """The one line with which a folder is refused."""
    with pytest.raises(kind) as caught:
        load(folder)
    message = str(caught.value)
    assert (
        "\n" not in message and "\x1b" not in message and "weights_only" not in message and len(message) < 500
    )
    return message


def check(folder: Path, meanings: dict[str, Tensor]) -> None:
    """Whether the packed weights of a folder mean what they should."""
    found, formats = load(folder)
    assert formats.keys() == meanings.keys()
    for name, value in meanings.items():
        assert torch.equal(unpacked(found[name]), value), name


def shift_zeros(folder: Path, by: int) -> None:
    """Change what every packed zero point says, as a writer of the other convention leaves it."""
    ones = sum(1 << low for low in range(0, 32, 4))
    state = load_file(folder / "model.safetensors")
    changed = {
        name: (value.long() + by * ones).to(torch.int32)
        for name, value in state.items()
        if name.endswith("qzeros")
    }
    save_file(state | changed, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(("written", "shift"), [("gptq", 1), ("gptq_v2", -1), ("gptq", 0), ("gptq_v2", 0)])
def test_zero_points_of_symmetric_weights_in_either_convention(
    written: str, shift: int, llama: Family, tmp_path: Path
) -> None:
    meanings = save_quantised(llama.model, tmp_path, SYMMETRIC | {"checkpoint_format": written})
    shift_zeros(tmp_path, shift)
    check(tmp_path, meanings)


def test_zero_points_that_contradict_symmetry_are_refused(llama: Family, tmp_path: Path) -> None:
    save_quantised(llama.model, tmp_path, SYMMETRIC)
    shift_zeros(tmp_path, 3)
    message = refusal(tmp_path)
    assert ".qzeros" in message and "zero point of 11" in message and "sym" in message


@pytest.mark.parametrize(
    "settings", [SYMMETRIC, GPTQ, {k: v for k, v in GPTQ.items() if k != "quant_method"}]
)
def test_settings_and_file_names_of_autogptq(settings: dict[str, Any], llama: Family, tmp_path: Path) -> None:
    meanings = save_quantised(llama.model, tmp_path, {"quant_method": "gptq"} | settings)
    set_config(tmp_path, None)
    (tmp_path / "quantize_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (tmp_path / "model.safetensors").rename(tmp_path / "gptq_model-4bit-32g.safetensors")
    check(tmp_path, meanings)


def test_settings_of_autoawq(llama: Family, tmp_path: Path) -> None:
    meanings = save_quantised(llama.model, tmp_path, AWQ)
    set_config(tmp_path, None)
    settings = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
    (tmp_path / "quant_config.json").write_text(json.dumps(settings), encoding="utf-8")
    check(tmp_path, meanings)


def test_settings_beside_weights_that_are_not_quantised_do_not_count(copy: Path, llama: Family) -> None:
    (copy / "quantize_config.json").write_text(json.dumps(GPTQ | {"bits": 3}), encoding="utf-8")
    found, formats = load(copy)
    assert not formats and torch.equal(
        torch.as_tensor(found["model.norm.weight"]), llama.model.model.norm.weight
    )


def test_settings_of_single_modules(llama: Family, tmp_path: Path) -> None:
    """GPTQModel's ``dynamic``: other groups and bits in one layer, and a module that is left alone."""
    left_alone = "model.layers.0.self_attn.q_proj"
    meanings = save_quantised(llama.model, tmp_path, GPTQ, left_out=lambda name: name == left_alone)
    for leaf, bits, group in (("up_proj", 4, 16), ("down_proj", 8, 32)):
        base = f"model.layers.1.mlp.{leaf}"
        rounded = round_weight(llama.model.get_submodule(base).weight.detach(), bits, group, False)
        edit(tmp_path, {f"{base}.{part}": value for part, value in gptq_tensors(rounded, bits).items()})
        meanings[f"{base}.weight"] = rounded.values()
    dynamic = {
        r"-:.*layers\.0\.self_attn\.q_proj": {},
        r"+:.*layers\.1\..*up_proj": {"group_size": 16},
        r"model\.layers\.1\.mlp\.down_proj$": {"bits": 8},
    }
    set_config(tmp_path, GPTQ | {"dynamic": dynamic})
    check(tmp_path, meanings)


@pytest.mark.parametrize(("dynamic", "said"), [
    ({"-:.*up_proj": {}}, "dynamic in the quantisation settings says that it is not"),
    ({"+:.*up_proj": {"bits": 3}}, "3 bits"),
    ({"+:.*up_proj": {"group_size": 5}}, "groups of 5"),
    ({"+:(": {}}, "no regular expression"),
    ({"+:(a+)+b": {}}, "no repetition of a group"),
    ({"+:" + ".*" * 20: {}}, "repetitions"),
    ({"+:.*up_proj": 3}, "does not map patterns to settings"),
    ([1], "does not map patterns to settings"),
])  # fmt: skip
def test_settings_of_single_modules_that_cannot_be_obeyed(
    dynamic: Any, said: str, llama: Family, tmp_path: Path
) -> None:
    save_quantised(llama.model, tmp_path, GPTQ)
    set_config(tmp_path, GPTQ | {"dynamic": dynamic})
    assert said in refusal(tmp_path, ModelError)


@pytest.mark.parametrize("settings", [GPTQ | {"is_marlin_format": True}, GPTQ | {"pack_dtype": "int64"}])
def test_words_of_another_order_are_refused(settings: dict[str, Any], llama: Family, tmp_path: Path) -> None:
    save_quantised(llama.model, tmp_path, GPTQ)
    set_config(tmp_path, settings)
    assert "words of another order" in refusal(tmp_path, ModelError)


def test_a_single_file_comes_before_an_index_as_in_transformers(copy: Path, llama: Family) -> None:
    state = load_file(copy / "model.safetensors")
    shard = "model-00001-of-00001.safetensors"
    save_file({name: value * 0.5 for name, value in state.items()}, copy / shard, {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(state, shard)}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    theirs = AutoModelForCausalLM.from_pretrained(copy).state_dict()
    for name, value in load(copy)[0].items():
        assert torch.equal(torch.as_tensor(value), theirs[name]), name
    (copy / "model.safetensors").unlink()
    theirs = AutoModelForCausalLM.from_pretrained(copy).state_dict()
    for name, value in load(copy)[0].items():
        assert torch.equal(torch.as_tensor(value), theirs[name]), name


@pytest.mark.parametrize("name", ["weights.safetensors", "model.fp16.safetensors"])
def test_one_file_of_another_name_will_do(name: str, copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / name)
    assert [path.name for path in weight_files(copy)] == [name]


def test_several_files_of_other_names_are_named(copy: Path) -> None:
    shutil.copy(copy / "model.safetensors", copy / "b.safetensors")
    (copy / "model.safetensors").rename(copy / "a.safetensors")
    message = refusal(copy)
    assert "a.safetensors, b.safetensors" in message and "rename" in message


def test_pickles_of_before_torch_1_6(copy: Path, llama: Family) -> None:
    (copy / "model.safetensors").unlink()
    state = llama.model.state_dict()
    torch.save(state, copy / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    found = load(copy)[0]
    assert all(torch.equal(torch.as_tensor(found[name]), state[name]) for name in found)


@pytest.mark.parametrize(("content", "said"), [
    ({"epoch": 3, "model": {}}, "'epoch' is a int"),
    ([torch.zeros(2)], "holds a list"),
    ({"a": torch.zeros(2).to_sparse()}, "a sparse tensor"),
    ({"a": Path("x")}, "asks for pathlib"),
])  # fmt: skip
def test_pickles_of_something_else(content: Any, said: str, copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    torch.save(content, copy / "pytorch_model.bin")
    message = refusal(copy)
    assert said in message and "pytorch_model.bin" in message and "safetensors" in message


@pytest.mark.parametrize(("name", "content", "said"), [
    ("model.safetensors", POINTER, "git lfs pull"),
    ("pytorch_model.bin", POINTER, "git lfs pull"),
    ("config.json", POINTER, "git lfs pull"),
    ("model.safetensors", b"<html>404</html>" * 10, "a web page"),
    ("model.safetensors", b"GGUF\x03\x00\x00\x00" * 10, "GGUF"),
    ("model.safetensors", b"PK\x03\x04" * 10, "name it pytorch_model.bin"),
    ("model.safetensors", b"\0" * 100, "model.safetensors"),
])  # fmt: skip
def test_other_kinds_of_files_are_named(name: str, content: bytes, said: str, copy: Path) -> None:
    if name.startswith("pytorch"):
        (copy / "model.safetensors").unlink()
    (copy / name).write_bytes(content)
    assert said in refusal(copy, ModelError)


def test_gguf_is_named(copy: Path, tmp_path: Path) -> None:
    (copy / "model.safetensors").rename(copy / "model-Q4_K_M.gguf")
    assert "model-Q4_K_M.gguf" in refusal(copy) and "gguf_file" in refusal(copy)
    with pytest.raises(ModelError, match="GGUF"):
        resolve(str(copy / "model-Q4_K_M.gguf"))
    (copy / "config.json").unlink()
    assert "GGUF" in refusal(copy, ModelError)


def test_an_adapter_is_no_model_and_never_ignored(copy: Path) -> None:
    settings = {"peft_type": "LORA", "base_model_name_or_path": "org/base"}
    (copy / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    message = refusal(copy)
    assert "LORA" in message and f"--adapter {copy}" in message and "move adapter_config.json away" in message
    (copy / "config.json").unlink()
    message = refusal(copy, ModelError)
    assert f"--model org/base --adapter {copy}" in message


def _shifted(header: dict[str, Any], name: str, by: int) -> None:
    header[name]["data_offsets"] = [offset + by for offset in header[name]["data_offsets"]]


def _last(header: dict[str, Any]) -> str:
    return max((name for name in header if name[:2] != "__"), key=lambda name: header[name]["data_offsets"])


@pytest.mark.parametrize(("change", "said"), [
    (lambda header: _shifted(header, _last(header), -4), "overlaps"),
    (lambda header: header[_last(header)].update(data_offsets=[0, 256]), "overlaps"),
    (lambda header: header.pop("model.layers.0.mlp.up_proj.weight"), "leaves a hole"),
    (lambda header: header.pop(_last(header)), "belong to none"),
    (lambda header: header[_last(header)].update(shape=[-1, -64]), "no shape"),
    (lambda header: header[_last(header)].update(shape=[2**40, 2**40]), "bytes for shape"),
    (lambda header: header[_last(header)].update(shape=[True]), "no shape"),
    (lambda header: header[_last(header)].update(shape="x"), "no shape"),
    (lambda header: header[_last(header)].update(dtype=[1]), "kind of number"),
    (lambda header: header[_last(header)].update(data_offsets=[1.5, 2.5]), "no extent"),
    (lambda header: header[_last(header)].update(data_offsets=[1]), "no extent"),
    (lambda header: header.update({_last(header): 5}), "no extent"),
])  # fmt: skip
def test_headers_whose_tensors_do_not_fill_the_file(
    change: Callable[[dict[str, Any]], object], said: str, copy: Path
) -> None:
    data = (copy / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    rest = data[8 + length :]
    (copy / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + rest)
    message = refusal(copy)
    assert "not a valid safetensors file" in message and said in message


def test_a_header_that_names_a_tensor_twice_is_refused(copy: Path) -> None:
    text = b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "a": {"dtype": "I32"}}'
    (copy / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 4)
    assert "has the key 'a' twice" in refusal(copy)


def test_digest_reads_the_one_that_counts(copy: Path) -> None:
    before = Checkpoint(copy).digest
    (copy / "model.safetensors.index.json").write_text("[]", encoding="utf-8")
    assert Checkpoint(copy).digest == before


def test_order_of_words_is_that_of_the_definition() -> None:
    """The zero points that `shift_zeros` makes are those of version 2."""
    zeros = words_of(torch.full((1, 8), 8).numpy(), 4)
    ones = sum(1 << low for low in range(0, 32, 4))
    assert as_int32(zeros - ones).item() == int.from_bytes(b"\x77" * 4, "little", signed=True)

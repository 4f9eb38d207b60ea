"""Quantised checkpoints that are damaged, or of other kinds, are refused with one clear line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.errors import CheckpointError, ModelError
from engine.kernels.calls import PackedMatrix
from tests.support.engine_models import Family
from tests.support.prequantised_models import (
    AWQ,
    GPTQ,
    edit,
    gptq_tensors,
    load,
    round_weight,
    save_quantised,
    set_config,
)

BASE = "model.layers.0.mlp.up_proj"


@pytest.fixture
def gptq(llama: Family, tmp_path: Path) -> Path:
    """A checkpoint of GPTQ to be damaged."""
    save_quantised(llama.model, tmp_path, GPTQ)
    return tmp_path


@pytest.fixture
def awq(llama: Family, tmp_path: Path) -> Path:
    """A checkpoint of AWQ to be damaged."""
    save_quantised(llama.model, tmp_path, AWQ)
    return tmp_path


def tensor(folder: Path, part: str) -> Tensor:
    return load_file(folder / "model.safetensors")[f"{BASE}.{part}"]


def refusal(folder: Path, kind: type[ModelError] = CheckpointError) -> str:
    """The one line with which a folder is refused."""
    with pytest.raises(kind) as caught:
        load(folder)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    return message


@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales"])
@pytest.mark.parametrize("kind", ["gptq", "awq"])
def test_missing_part_is_named(kind: str, part: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(kind)
    edit(folder, {f"{BASE}.{part}": None})
    message = refusal(folder)
    assert f"{BASE}.{part}" in message and "missing" in message


@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales", "g_idx"])
@pytest.mark.parametrize("damage", ["shape", "kind"])
def test_wrong_part_is_named(part: str, damage: str, gptq: Path) -> None:
    old = tensor(gptq, part)
    other = torch.int32 if part == "scales" else torch.float16
    edit(gptq, {f"{BASE}.{part}": old[:-1] if damage == "shape" else old.to(other)})
    message = refusal(gptq)
    assert f"{BASE}.{part}" in message and str(list(old.shape)) in message and "config.json" in message


@pytest.mark.parametrize("changes", [{"bits": 8}, {"bits": 2}, {"group_size": 16}, {"group_size": -1}])
def test_config_that_does_not_fit_is_named(changes: dict[str, Any], gptq: Path) -> None:
    edit(gptq, **changes)
    message = refusal(gptq)
    assert "layers.0" in message and "config.json does not belong" in message


def test_groups_that_do_not_divide_are_refused_in_awq(awq: Path) -> None:
    edit(awq, group_size=64)
    message = refusal(awq)
    assert "96 inputs" in message and "64" in message and "down_proj.qweight" in message


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e-6, 1e6])
def test_scale_beyond_fp16_is_named(value: float, gptq: Path) -> None:
    scales = tensor(gptq, "scales").float()
    scales[1, 3] = value
    edit(gptq, {f"{BASE}.scales": scales})
    assert f"{BASE}.scales" in refusal(gptq)


@pytest.mark.parametrize("act_order", [False, True])
def test_inputs_in_another_order_are_refused(act_order: bool, gptq: Path) -> None:
    order = tensor(gptq, "g_idx")
    edit(gptq, {f"{BASE}.g_idx": order.flip(0)}, desc_act=act_order)
    message = refusal(gptq)
    assert f"{BASE}.g_idx" in message and "desc_act" in message and "static groups" in message


@pytest.mark.parametrize("unset", [True, False])
def test_order_that_was_never_set(unset: bool, gptq: Path) -> None:
    order = torch.zeros_like(tensor(gptq, "g_idx")) if unset else None
    before = load(gptq)[0][f"{BASE}.weight"]
    edit(gptq, {f"{BASE}.g_idx": order})
    after = load(gptq)[0][f"{BASE}.weight"]
    assert isinstance(before, PackedMatrix) and isinstance(after, PackedMatrix)
    assert torch.equal(before.data, after.data)
    edit(gptq, desc_act=True)
    assert f"{BASE}.g_idx" in refusal(gptq)


@pytest.mark.parametrize("bias", [0.0, 0.5])
def test_bias_of_a_layer_that_has_none(bias: float, gptq: Path) -> None:
    """GPTQ's writers add zeros, which are ignored; other values would change the model's answers."""
    edit(gptq, {f"{BASE}.bias": torch.full((96,), bias).half()})
    if bias:
        assert f"{BASE}.bias" in refusal(gptq)
    else:
        assert f"{BASE}.bias" not in load(gptq)[0]


def test_weight_beside_its_quantised_form_is_refused(gptq: Path) -> None:
    edit(gptq, {f"{BASE}.weight": torch.zeros(96, 64)})
    assert f"{BASE}.weight" in refusal(gptq)


def test_left_over_quantised_weight_is_named(gptq: Path) -> None:
    parts = ("qweight", "qzeros", "scales", "g_idx")
    edit(gptq, {f"model.layers.9.mlp.up_proj.{part}": tensor(gptq, part) for part in parts})
    assert "model.layers.9.mlp.up_proj.qweight" in refusal(gptq)


def test_quantised_vector_is_refused(gptq: Path) -> None:
    norm = "model.layers.0.input_layernorm"
    parts = {f"{norm}.{part}": tensor(gptq, part) for part in ("qweight", "qzeros", "scales")}
    edit(gptq, {**parts, f"{norm}.weight": None})
    assert f"{norm}.weight" in refusal(gptq)


def test_quantised_experts_are_refused(family: Callable[[str], Family], tmp_path: Path) -> None:
    model = family("mixtral").model
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    name = next(name for name in sorted(state) if name.endswith("experts.0.w1.weight"))
    base = name.removesuffix(".weight")
    parts = gptq_tensors(round_weight(state.pop(name), 4, 32, False), 4)
    state |= {f"{base}.{part}": value for part, value in parts.items()}
    save_file(state, tmp_path / "model.safetensors")
    set_config(tmp_path, GPTQ)
    message = refusal(tmp_path)
    assert f"{base}.qweight" in message and "experts.gate_up_proj" in message and "16-bit" in message


@pytest.mark.parametrize("changes,named", [
    ({"quant_method": "bitsandbytes"}, "bitsandbytes"),
    ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
    ({"quant_method": "fp8"}, "fp8"),
    ({"quant_method": "hqq"}, "hqq"),
    ({"quant_method": None}, "none"),
    (GPTQ | {"bits": 3}, "3 bits"),
    (GPTQ | {"bits": "four"}, "four bits"),
    (GPTQ | {"checkpoint_format": "marlin"}, "gptq, marlin"),
    (GPTQ | {"format": "bitblas"}, "gptq, bitblas"),
    (GPTQ | {"group_size": 4}, "groups of 4"),
    (GPTQ | {"group_size": "x"}, "groups of x"),
    (AWQ | {"bits": 8}, "awq, 8 bits"),
    (AWQ | {"version": "gemv"}, "awq, gemv"),
    (AWQ | {"version": "gemv_fast"}, "gemv_fast"),
    (AWQ | {"version": "llm-awq"}, "llm-awq"),
])  # fmt: skip
def test_others_are_refused_by_name(changes: dict[str, Any], named: str, gptq: Path) -> None:
    set_config(gptq, changes)
    message = refusal(gptq, ModelError)
    assert named in message and "GPTQ of 2, 4 or 8 bits" in message and "AWQ" in message


def test_quantised_weights_without_a_word_in_the_config(gptq: Path) -> None:
    set_config(gptq, None)
    message = refusal(gptq)
    assert "quantization_config" in message and ".qweight" in message


def test_config_that_promises_quantised_weights(llama: Family, gptq: Path) -> None:
    save_file(llama.model.state_dict(), gptq / "model.safetensors", {"format": "pt"})
    message = refusal(gptq)
    assert "quantised" in message and "gptq" in message

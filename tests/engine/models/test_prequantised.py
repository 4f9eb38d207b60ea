"""GPTQ and AWQ checkpoints have, bit for bit, the values of their definitions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.kernels.calls import PackedMatrix
from engine.models import prequantised
from engine.models.checkpoint import Checkpoint
from engine.models.prequantised import QuantisedWeight, scheme_of
from engine.models.weight_files import HeaderEntry
from engine.spec.quant import WHOLE_ROW, Offset, QuantSpec
from tests.support.engine_models import Family
from tests.support.prequantised_models import (
    AWQ,
    GPTQ,
    Rounded,
    awq_tensors,
    edit,
    gptq_tensors,
    load,
    round_weight,
    save_quantised,
    unpacked,
)


def check_meaning(folder: Path, meanings: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    """Quantised tensors have the values of the definition, all others those of the model."""
    tensors, formats = load(folder)
    assert formats.keys() == meanings.keys()
    for name, value in tensors.items():
        if name not in meanings:
            assert isinstance(value, Tensor) and torch.equal(value, state[name]), name
            continue
        assert isinstance(value, PackedMatrix) and value.spec == formats[name]
        assert value.data.numel() == value.spec.nbytes(value.rows, value.width)
        wanted = meanings[name]
        turned = "gpt2" in str(folder)  # which keeps its weights as [inputs, outputs]
        assert torch.equal(unpacked(value), wanted.T if turned else wanted), name


@pytest.mark.parametrize(
    "changes",
    [
        GPTQ,
        GPTQ | {"sym": True},
        GPTQ | {"checkpoint_format": "gptq_v2"},
        GPTQ | {"bits": 8, "group_size": 16},
        GPTQ | {"bits": 2, "group_size": 64},
        GPTQ | {"group_size": -1},
        AWQ,
        AWQ | {"version": "GEMM", "group_size": 16},
        AWQ | {"group_size": -1},
    ],
    ids=lambda changes: "-".join(str(changes[key]) for key in ("quant_method", "bits", "group_size")),
)
@pytest.mark.parametrize("name", ["opt", "llama", "mistral"])
def test_weights_mean_what_their_definition_says(
    name: str, changes: dict[str, Any], family: Callable[[str], Family], tmp_path: Path
) -> None:
    model = family(name).model
    meanings = save_quantised(model, tmp_path, changes)
    assert len(meanings) == 2 * (6 if name == "opt" else 7)
    check_meaning(tmp_path, meanings, model.state_dict())


@pytest.mark.parametrize("changes", [GPTQ, AWQ])
def test_weights_that_the_model_keeps_turned(
    changes: dict[str, Any], family: Callable[[str], Family], tmp_path: Path
) -> None:
    model = family("gpt2").model
    meanings = save_quantised(model, tmp_path / "gpt2", changes)
    assert len(meanings) == 2 * 4
    check_meaning(tmp_path / "gpt2", meanings, model.state_dict())


def test_last_group_may_be_shorter_in_gptq(llama: Family, tmp_path: Path) -> None:
    """96 inputs in groups of 64."""
    meanings = save_quantised(llama.model, tmp_path, GPTQ | {"group_size": 64})
    check_meaning(tmp_path, meanings, llama.model.state_dict())


@pytest.mark.parametrize("changes", [GPTQ, AWQ])
def test_modules_that_are_left_out_stay_exact(changes: dict[str, Any], llama: Family, tmp_path: Path) -> None:
    left_out = {"modules_to_not_convert": ["down_proj"]}
    meanings = save_quantised(llama.model, tmp_path, changes | left_out, lambda name: "down_proj" in name)
    assert len(meanings) == 2 * 6
    check_meaning(tmp_path, meanings, llama.model.state_dict())


def weight_of(tensors: dict[str, Tensor], config: dict[str, Any]) -> QuantisedWeight:
    entries = {
        part: HeaderEntry(Path(), tensor.dtype, tuple(tensor.shape)) for part, tensor in tensors.items()
    }
    return QuantisedWeight("x", scheme_of(config, "x"), entries)


def check_numbers(rounded: Rounded, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    def read(name: str) -> Tensor:
        return tensors[name.removeprefix("x.")]

    weight = weight_of(tensors, config)
    weight.check(*rounded.codes.shape, read)
    assert torch.equal(unpacked(weight.repack(*rounded.codes.shape, read)), rounded.values())


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_numbers_arrive(data: st.DataObject) -> None:
    """Every code and zero point, shapes of many words, chunks of one and of many."""
    method = data.draw(st.sampled_from(["awq", "gptq", "gptq_v2"]))
    bits = 4 if method == "awq" else data.draw(st.sampled_from([2, 4, 8]))
    numbers = 32 // bits
    rows = data.draw(st.integers(1, 10)) * numbers
    group = data.draw(st.sampled_from([8, 16, 24, 32]))
    width = data.draw(st.integers(1, 5)) * (group if method == "awq" else numbers)
    random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    groups = -(-width // group)
    rounded = Rounded(
        random.integers(0, 2**bits, (rows, width)),
        random.integers(0, 2**bits, (rows, groups)),
        random.normal(size=(rows, groups)).astype(np.float16),
        group,
    )
    if method == "awq":
        tensors, config = awq_tensors(rounded), AWQ
    else:
        tensors = gptq_tensors(rounded, bits, 2 if method == "gptq_v2" else 1)
        config = GPTQ | {"bits": bits, "checkpoint_format": method}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prequantised, "CONVERT_VALUES", data.draw(st.sampled_from([1, 36 * width, 1 << 18])))
        check_numbers(rounded, tensors, config | {"group_size": group})


def test_order_of_awq_by_hand() -> None:
    """Output 1 of eight is in the fifth place, counted from the lowest bits, output 7 in the last."""
    codes = torch.zeros(8, 8, dtype=torch.int64).numpy()
    codes[1], codes[7] = 5, 9
    rounded = Rounded(codes, np.zeros((8, 1), dtype=np.int64), np.ones((8, 1), dtype=np.float16), 8)
    tensors = awq_tensors(rounded)
    assert set(tensors["qweight"].flatten().tolist()) == {(0x90050000) - 2**32}
    check_numbers(rounded, tensors, AWQ | {"group_size": 8})


def test_zero_point_of_zero_borrows_in_the_first_format_of_gptq() -> None:
    zeros = np.array([[0], [5], [0], [0], [15], [1], [0], [8]])
    rounded = Rounded(np.zeros((8, 8), dtype=np.int64), zeros, np.ones((8, 1), dtype=np.float16), 8)
    tensors = gptq_tensors(rounded, 4)
    assert tensors["qzeros"].item() == 0x801F0050 - 0x11111111 - 2**32 * (0x801F0050 - 0x11111111 >= 2**31)
    check_numbers(rounded, tensors, GPTQ | {"group_size": 8})


def test_scales_of_other_kinds_are_taken_where_fp16_holds_them() -> None:
    rounded = round_weight(torch.randn(8, 32), 4, 32, False)
    for dtype in (torch.float32, torch.bfloat16):
        tensors = gptq_tensors(rounded, 4)
        scales = tensors["scales"].to(torch.bfloat16)
        tensors["scales"] = scales.to(dtype)
        kept = Rounded(rounded.codes, rounded.zeros, scales.T.half().numpy(), 32)
        check_numbers(kept, tensors, GPTQ)


def test_static_groups_are_accepted(llama: Family, tmp_path: Path) -> None:
    """desc_act whose inputs have been sorted back into their own order."""
    meanings = save_quantised(llama.model, tmp_path, GPTQ | {"desc_act": True})
    check_meaning(tmp_path, meanings, llama.model.state_dict())


@pytest.mark.parametrize("beside", [True, False])
def test_quantised_head_of_tied_model(beside: bool, family: Callable[[str], Family], tmp_path: Path) -> None:
    """With an exact embedding the head is a tensor of its own; without one it is the embedding, too."""
    model = family("opt").model
    save_quantised(model, tmp_path, GPTQ)
    embedding = "model.decoder.embed_tokens.weight"
    rounded = round_weight(model.state_dict()[embedding], 4, 32, False)
    parts = {f"lm_head.{part}": value for part, value in gptq_tensors(rounded, 4).items()}
    edit(tmp_path, parts if beside else {**parts, embedding: None})
    tensors, formats = load(tmp_path)
    packed = tensors["lm_head.weight" if beside else embedding]
    assert isinstance(packed, PackedMatrix) and torch.equal(unpacked(packed), rounded.values())
    assert (embedding in formats) is not beside and ("lm_head.weight" in formats) is beside


def test_digest_follows_the_scheme(llama: Family, tmp_path: Path) -> None:
    """The same words have other values in the scheme that stores zero points unchanged."""
    save_quantised(llama.model, tmp_path, GPTQ)
    first = Checkpoint(tmp_path).digest
    edit(tmp_path, checkpoint_format="gptq_v2")
    assert Checkpoint(tmp_path).digest != first


def test_formats() -> None:
    assert scheme_of(GPTQ, "x").spec == QuantSpec(4, 32, Offset.ZERO)
    assert scheme_of(AWQ | {"group_size": -1}, "x").spec == QuantSpec(4, WHOLE_ROW, Offset.ZERO)
    assert scheme_of({"quant_method": "gptq", "bits": 8}, "x").spec == QuantSpec(8, 128, Offset.ZERO)

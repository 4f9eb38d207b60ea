"""Attention of whole prompts in C, against its definition in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from engine.kernels.calls import AttentionCall, AttentionOptions, HeadShape
from engine.kernels.cpu import native
from engine.spec.precision import MatmulPrecision
from tests.engine.kernels.cpu.native_inputs import quick

MEDIUM = MatmulPrecision.MEDIUM

LENGTHS = st.lists(st.sampled_from([1, 2, 31, 33, 128, 129, 257, 300]), min_size=1, max_size=4)
HEADS = st.sampled_from([(4, 4), (4, 2), (3, 1)])
WIDTHS = st.sampled_from([(64, 64), (32, 48), (80, 16), (7, 5), (100, 130)])
WINDOWS = st.sampled_from([None, 1, 3, 40, 130, 1000])


def defined(
    query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions, rounded: bool = False
) -> tuple[Tensor, Tensor]:
    """Output [T, H, E] and lse [T, H] of one prompt in float64.

    Args:
        rounded: whether operands are rounded to bfloat16 first.
    """
    operands = [part.bfloat16() if rounded else part for part in (query, key, value)]
    query, key, value = (part.double() for part in operands)
    shared = len(query) // len(key)
    scores = query @ key.repeat_interleave(shared, 0).transpose(1, 2) * options.scale
    place = torch.arange(query.shape[1])
    distance = place[:, None] - place[None]
    hidden = (distance < 0) | (distance >= (options.window or len(place)))
    scores.masked_fill_(hidden, -torch.inf)
    out = scores.softmax(-1) @ value.repeat_interleave(shared, 0)
    return out.transpose(0, 1), scores.logsumexp(-1).T


def made(
    lengths: list[int], heads: tuple[int, int], widths: tuple[int, int], seed: int
) -> tuple[Tensor, Tensor, Tensor, list[tuple[int, int]]]:
    """Queries, keys and values with other sequences' tokens around each prompt, and the prompts' places."""
    generator = torch.Generator().manual_seed(seed)
    places = [(2 + sum(lengths[:index]) + index, length) for index, length in enumerate(lengths)]
    tokens = sum(lengths) + len(lengths) + 3
    shapes = ((heads[0], widths[0]), (heads[1], widths[0]), (heads[1], widths[1]))
    parts = [torch.randn(tokens, *shape, generator=generator).transpose(0, 1) for shape in shapes]
    return parts[0], parts[1], parts[2], places


def call_of(
    parts: tuple[Tensor, Tensor, Tensor], options: AttentionOptions, out: Tensor, lse: Tensor | None = None
) -> AttentionCall:
    """Of queries, keys and values that are given head by head."""
    query, key, value = (part.transpose(0, 1) for part in parts)
    shape = HeadShape(query.shape[1], key.shape[1], query.shape[2], value.shape[2])
    return AttentionCall(query, key, value, shape, options, out, lse)


def error(
    parts: tuple[Tensor, Tensor, Tensor], places: list[tuple[int, int]], options: AttentionOptions,
    rounded: bool = False, threads: int = 2,
) -> float:  # fmt: skip
    """Largest error of outputs and of lse; rows of other tokens must be untouched."""
    query, _, value = parts
    tokens, heads = query.shape[1], len(query)
    out = torch.full((tokens, heads, value.shape[2]), torch.nan)
    lse = torch.full((tokens, heads), torch.nan)
    native.attend_prompts(call_of(parts, options, out, lse), places, threads)
    strangers, found = torch.ones(tokens, dtype=torch.bool), 0.0
    for start, length in places:
        rows = slice(start, start + length)
        strangers[rows] = False
        wanted, wanted_lse = defined(*(part[:, rows] for part in parts), options, rounded)
        found = max(found, float((out[rows] - wanted).abs().max()))
        found = max(found, float((lse[rows] - wanted_lse).abs().max()))
    assert out[strangers].isnan().all() and lse[strangers].isnan().all()
    return found


@pytest.mark.usefixtures("library")
@given(LENGTHS, HEADS, WIDTHS, WINDOWS, st.integers(1, 3), st.integers(0, 9))
@quick
def test_prompts_equal_the_definition(
    lengths: list[int], heads: tuple[int, int], widths: tuple[int, int], window: int | None, threads: int,
    seed: int,
) -> None:  # fmt: skip
    query, key, value, places = made(lengths, heads, widths, seed)
    options = AttentionOptions(widths[0] ** -0.5, window)
    assert error((query, key, value), places, options, threads=threads) < 1e-5


@pytest.mark.usefixtures("unit")
@given(LENGTHS, HEADS, WIDTHS, WINDOWS, st.integers(1, 3), st.integers(0, 9))
@quick
def test_at_medium_operands_and_weights_are_rounded_to_bfloat16(
    lengths: list[int], heads: tuple[int, int], widths: tuple[int, int], window: int | None, threads: int,
    seed: int,
) -> None:  # fmt: skip
    """With equally rounded operands, only the rounding of the weights differs: at most 2**-9 of |value|."""
    query, key, value, places = made(lengths, heads, widths, seed)
    options = AttentionOptions(widths[0] ** -0.5, window, precision=MEDIUM)
    bound = 2.0**-9 * float(value.abs().max()) + 1e-4
    assert error((query, key, value), places, options, rounded=True, threads=threads) < bound


@pytest.mark.usefixtures("unit")
def test_only_medium_is_rounded() -> None:
    query, key, value, places = made([200], (4, 4), (64, 64), 1)
    for precision in (MatmulPrecision.HIGHEST, MatmulPrecision.HIGH):
        assert error((query, key, value), places, AttentionOptions(0.125, precision=precision)) < 1e-5
    assert error((query, key, value), places, AttentionOptions(0.125, precision=MEDIUM)) > 1e-4


@pytest.mark.usefixtures("library")
def test_scores_of_any_size_have_a_softmax() -> None:
    query, key, value, places = made([300], (2, 2), (16, 16), 3)
    assert error((10 * query, 10 * key, value), places, AttentionOptions(1.0)) < 1e-3, "exp(1000) overflows"
    key[:, :] = 0
    assert error((query, key, value), places, AttentionOptions(1.0)) < 1e-5


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_no_number_shows_where_it_is_seen(bad: float) -> None:
    query, key, value, _ = made([40], (2, 2), (16, 16), 3)
    key[1, 20], out = bad, torch.zeros(query.shape[1], 2, 16)
    native.attend_prompts(call_of((query, key, value), AttentionOptions(1.0), out), [(0, 40)])
    assert out[:20].isfinite().all() and out[20:40, 0].isfinite().all()
    assert not out[20:40, 1].isfinite().all()


@pytest.mark.usefixtures("library")
def test_rows_may_lie_in_any_order() -> None:
    query, key, value, places = made([70], (4, 2), (24, 24), 5)
    parts = query.contiguous(), key.transpose(1, 2).contiguous().transpose(1, 2), value.half().float()
    assert error(parts, places, AttentionOptions(0.2)) < 1e-5


@pytest.mark.usefixtures("library")
def test_no_prompt_is_no_work() -> None:
    query, key, value, _ = made([3], (2, 1), (8, 8), 0)
    assert error((query, key, value), [], AttentionOptions(1.0)) == 0


def test_what_does_not_fit_is_refused() -> None:
    if not native.available():
        pytest.skip(native.reason())
    query, key, value, places = made([5], (4, 2), (8, 8), 0)
    out, plain = torch.empty(query.shape[1], 4, 8), AttentionOptions(1.0)
    cases = [
        ("do not lie within", [(5, 9)], call_of((query, key, value), plain, out)),
        ("do not lie within", [(-1, 2)], call_of((query, key, value), plain, out)),
        ("differ", places, call_of((query, key[:, 1:], value), plain, out)),
        ("differ", places, call_of((query[:3], key, value), plain, out)),
        ("output float32", places, call_of((query, key, value), plain, out[1:])),
        ("output float64", places, call_of((query, key, value), plain, out.double())),
        ("lse float32", places, call_of((query, key, value), plain, out, torch.empty(3, 4))),
        ("softcap", places, call_of((query, key, value), AttentionOptions(1.0, softcap=3.0), out)),
        ("sinks", places, call_of((query, key, value), AttentionOptions(1.0, sinks=torch.ones(4)), out)),
    ]
    for message, prompts, call in cases:
        with pytest.raises(ValueError, match=message):
            native.attend_prompts(call, prompts)

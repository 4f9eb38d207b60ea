"""The C kernels, compiled for several kinds of machine."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from engine.kernels.cpu import build, native
from engine.spec.precision import MatmulPrecision
from tests.support.workers import made_once, shared_folder

VARIANTS = {
    "this machine": build.OPTIONAL_FLAGS[0],
    "AVX2": ("-mavx2", "-mfma", "-mf16c", "-fopenmp"),
    "portable": ("-O1",),  # which GCC takes half as long for as for -O2
}
BFLOAT_VARIANTS = {
    "this machine": build.OPTIONAL_FLAGS[0],
    "no AMX": ("-march=native", "-mno-amx-bf16", "-mno-amx-tile", "-fopenmp"),
}


@pytest.fixture(scope="session")
def compiled(
    pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], ctypes.CDLL]:
    """The kernels of a variant, compiled at their first use.

    Those for this machine are the ones that the engine itself compiles, and finds in the user's cache.
    """

    flags = VARIANTS | BFLOAT_VARIANTS

    @cache
    def compile_variant(name: str) -> ctypes.CDLL:
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv(build.SWITCH, raising=False)
            if name == "this machine":
                return build._load()
            folder = made_once(
                shared_folder(pytestconfig, tmp_path_factory) / f"kernels-{name}",
                lambda folder: build.compile_library(build.find_compiler(), folder, [flags[name]]),
            )
        return build.Library(str(folder / "kernels.so"))

    return compile_variant


@pytest.fixture(scope="module", params=VARIANTS)
def library(request: pytest.FixtureRequest, compiled: Callable[[str], ctypes.CDLL]) -> Iterator[None]:
    """The kernels for this machine; for an older one; without vector instructions and OpenMP."""
    try:
        build.find_compiler()
    except build.BuildError as error:
        pytest.skip(str(error))
    cpu = Path("/proc/cpuinfo")
    if request.param == "AVX2" and not (cpu.exists() and " avx2 " in cpu.read_text(encoding="utf-8")):
        pytest.skip("this processor has no AVX2")
    patch = pytest.MonkeyPatch()
    patch.setattr(build, "_loaded", [(compiled(request.param), "")])
    yield
    patch.undo()


@pytest.fixture(params=BFLOAT_VARIANTS)
def unit(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, compiled: Callable[[str], ctypes.CDLL]
) -> None:
    """The kernels for this machine, if it has a bfloat16 unit, and without tiles, if it has tiles."""
    if not native.available():
        pytest.skip(native.reason())
    cpu = Path("/proc/cpuinfo")
    if request.param == "no AMX" and not (cpu.exists() and " amx_bf16" in cpu.read_text(encoding="utf-8")):
        pytest.skip("this processor has no AMX")
    monkeypatch.setattr(build, "_loaded", [(compiled(request.param), "")])
    if not native.has_unit(MatmulPrecision.MEDIUM):
        pytest.skip("this processor has no unit for bfloat16")

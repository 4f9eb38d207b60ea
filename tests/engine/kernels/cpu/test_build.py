"""Compiling the C kernels: once, only in a safe folder, and a failure never crashes the engine."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from engine.kernels.cpu import build


@pytest.fixture(autouse=True)
def nothing_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build, "_loaded", [])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(build.SWITCH, raising=False)


@pytest.fixture
def compiler() -> tuple[str, ...]:
    try:
        return build.find_compiler()
    except build.BuildError as error:
        pytest.skip(str(error))


@pytest.fixture
def one_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Only one of the sources, as compiling all takes 20 seconds and other tests do so."""
    folder = tmp_path / "one"
    folder.mkdir()
    for name in ("random.c", "formats.h", "simd.h"):
        shutil.copy(build.SOURCES / name, folder)
    monkeypatch.setattr(build, "SOURCES", folder)


@pytest.mark.parametrize("word", ["0", "off", "OFF"])
def test_a_variable_switches_the_kernels_off(monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    monkeypatch.setenv(build.SWITCH, word)
    assert build.library() is None
    assert build.reason() == f"compiled kernels are switched off by {build.SWITCH}={word}"


def test_without_a_compiler_the_reason_names_what_was_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    assert build.library() is None
    assert "no-such-compiler" in build.reason()
    assert "\n" not in build.reason()


@pytest.mark.usefixtures("one_source")
def test_the_library_is_compiled_once(compiler: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    assert build.library() is not None
    assert build.reason() == ""
    assert [path.suffix for path in build.cache_folder().iterdir()] == [".so"]

    def compile_again(*_: object) -> None:
        raise AssertionError("compiled although the library is there")

    monkeypatch.setattr(build, "compile_library", compile_again)
    monkeypatch.setattr(build, "_loaded", [])
    assert build.library() is not None


@pytest.mark.usefixtures("one_source")
def test_flags_that_a_compiler_refuses_are_left_out(compiler: tuple[str, ...], tmp_path: Path) -> None:
    assert build.compile_library(compiler, tmp_path, [("-march=no-such-processor",), ("-O1",)]).exists()


def test_a_source_that_does_not_compile_is_a_reason(
    compiler: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "sources").mkdir()
    (tmp_path / "sources" / "broken.c").write_text("int broken(void) { return nothing; }\n")
    monkeypatch.setattr(build, "SOURCES", tmp_path / "sources")
    assert build.library() is None
    assert "do not compile" in build.reason()
    assert "nothing" in build.reason()
    assert not list(build.cache_folder().iterdir())


def test_a_folder_that_others_can_write_to_is_refused(compiler: tuple[str, ...]) -> None:
    folder = build.cache_folder()
    folder.chmod(0o777)
    assert build.library() is None
    assert "chmod 700" in build.reason()
    folder.chmod(0o700)
    folder.parent.chmod(0o777)
    with pytest.raises(build.BuildError, match="everybody"):
        build.cache_folder()


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser writes everywhere")
def test_a_folder_that_cannot_be_made_is_a_reason(
    compiler: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "closed"))
    assert build.library() is None
    assert "closed" in build.reason()

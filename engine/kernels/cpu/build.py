"""Compiles the C kernels with the machine's own compiler, once, and loads them.

What is compiled is kept in a folder of the user's cache, under a name made from the sources, the compiler
and the processor: a program that starts again, or on another machine of a cluster that shares the home
folder, finds its own. Without a compiler there is no library, `reason` says why, and callers use the
references in torch.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch  # (first: it brings the OpenMP runtime that the library then shares)

from engine.errors import first_line
from engine.files.scratch import Scratch

SOURCES = Path(__file__).parent.parent / "csrc"
SWITCH = "TIERBENCH_KERNELS"
"""Environment variable: 0 or off for no compiled kernels."""

COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno",
         "-fno-trapping-math")  # fmt: skip
"""No contraction of a * b + c: packing rounds as the reference does. The other two change no result."""

OPTIONAL_FLAGS = (("-march=native", "-fopenmp"), ("-march=native",), ("-fopenmp",), ())
"""Tried in turn: not every compiler knows every flag."""

_LIBRARIES = ("-lm", "-lpthread")
_ADDRESS, _COUNT, _INT, _WORD = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_uint64
_BYTES, _PRODUCT = (
    (_ADDRESS, _ADDRESS, _COUNT, _COUNT),
    (_ADDRESS, _COUNT, _COUNT, _ADDRESS, _ADDRESS, _COUNT),
)
_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "pack_matrix": (*_BYTES, _ADDRESS, _COUNT, _INT),
    "unpack_matrix": (*_BYTES, _ADDRESS, _COUNT, _INT),
    "multiply": (*_BYTES, *_PRODUCT, _INT, _INT),
    "multiply_int4": (*_BYTES, *_PRODUCT, _INT),
    "multiply_int8": (*_BYTES, *_PRODUCT, _INT),
    "pack_sequences": (*(_ADDRESS,) * 2, *(_COUNT,) * 4, *(_ADDRESS,) * 4, _INT),
    "summarise": (_ADDRESS, *(_COUNT,) * 3, _ADDRESS, _ADDRESS, _INT),
    "fill_random": (_WORD, _WORD, _COUNT, ctypes.c_float, _INT, _ADDRESS, _INT),
}
"""Of the functions that take more than structures and a C int; calls pass Python's integers for them."""

_TIMEOUT = 300  # seconds of one compilation, on a busy machine

_lock = threading.Lock()
_loaded: list[tuple[ctypes.CDLL | None, str]] = []  # at most one: the library and the reason


class Library(ctypes.CDLL):
    """Compiled kernels, whose functions know the kinds of their arguments."""

    def __getattr__(self, name: str) -> Any:  # at the first use of each; the function is kept then
        function = super().__getattr__(name)
        if name in _ARGUMENTS:
            function.argtypes = _ARGUMENTS[name]
        return function


class BuildError(Exception):
    """There is no library; the message is one line."""


def library() -> ctypes.CDLL | None:
    """The compiled kernels, compiled at the first call; None where that cannot be done."""
    return _loaded[0][0] if _loaded else _library()[0]  # read at every product


def reason() -> str:
    """Why there is no library, in one line; empty where there is one."""
    return _library()[1]


def _library() -> tuple[ctypes.CDLL | None, str]:
    with _lock:
        if not _loaded:
            try:
                _loaded.append((_load(), ""))
            except (BuildError, OSError, RuntimeError) as error:
                _loaded.append((None, first_line(error)))
        return _loaded[0]


def _load() -> ctypes.CDLL:
    if os.environ.get(SWITCH, "").lower() in ("0", "off"):
        raise BuildError(f"compiled kernels are switched off by {SWITCH}={os.environ[SWITCH]}")
    compiler = find_compiler()
    folder = cache_folder()
    target = folder / f"kernels-{_key(compiler)}.so"
    if not target.exists():
        with Scratch(folder) as workplace:
            made = compile_library(compiler, workplace.path)
            with made.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(made, target)  # at once: another process that does the same never sees half a file
    return Library(str(target))


def find_compiler() -> tuple[str, ...]:
    """The command of the C compiler, with what ``CC`` adds to it.

    Raises:
        BuildError: if there is none.
    """
    chosen = os.environ.get("CC")
    commands = [shlex.split(chosen)] if chosen else [[name] for name in COMPILERS]
    for words in commands:
        path = shutil.which(words[0])
        if path:
            return (path, *words[1:])
    raise BuildError(f"no C compiler: {chosen or ', '.join(COMPILERS)} not found; install gcc, or set CC")


def cache_folder() -> Path:
    """Where libraries are kept; made if it is missing, for this user only.

    Raises:
        BuildError: if others could write to it, and so make us run what they like.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    folder = (Path(base) if base else Path.home() / ".cache").absolute() / "tierbench" / "kernels"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    status = folder.stat()
    if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise BuildError(
            f"{folder} can be written by other users: run chmod 700 on it, or set XDG_CACHE_HOME"
        )
    for parent in folder.resolve().parents:
        mode = parent.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            raise BuildError(
                f"{parent} can be written by everybody: set XDG_CACHE_HOME to a folder of your own"
            )
    return folder


def compile_library(
    compiler: Sequence[str], folder: Path, optional: Sequence[Sequence[str]] = OPTIONAL_FLAGS
) -> Path:
    """Compile all sources into a shared library in ``folder``, with the first flags that work.

    Raises:
        BuildError: if none do, with the first complaint about the first of them.
    """
    complaints = []
    for extra in optional:
        complaint = _compile(compiler, folder, (*FLAGS, *extra))
        if not complaint:
            return folder / "kernels.so"
        complaints.append(complaint)
    raise BuildError(f"the C kernels do not compile: {complaints[0]}")


def _compile(compiler: Sequence[str], folder: Path, flags: Sequence[str]) -> str:
    """Compile each source at the same time, then link; returns what went wrong."""
    sources = sorted(SOURCES.glob("*.c"))
    objects = [folder / f"{source.stem}.o" for source in sources]
    running = [
        _start([*compiler, *flags, "-c", str(source), "-o", str(made)])
        for source, made in zip(sources, objects, strict=True)
    ]
    complaints = [_complaint(process) for process in running]
    link = [*compiler, *flags, "-shared", *map(str, objects), "-o", str(folder / "kernels.so"), *_LIBRARIES]
    return next(filter(None, complaints), "") or _complaint(_start(link))


def _start(command: Sequence[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        errors="replace",
    )


def _complaint(process: subprocess.Popen[str]) -> str:
    """What a compiler says went wrong, in one line; empty if nothing did."""
    try:
        _, said = process.communicate(timeout=_TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return f"the compiler took more than {_TIMEOUT} seconds"
    if process.returncode == 0:
        return ""
    lines = said.splitlines() or [f"exit code {process.returncode}"]
    return next((line for line in lines if "error" in line), lines[0])


def _key(compiler: Sequence[str]) -> str:
    """What a library depends on, as a name."""
    digest = hashlib.sha256()
    for part in _ingredients(compiler):
        digest.update(part + b"\0")
    return digest.hexdigest()[:24]


def machine_key() -> str:
    """What the speed of products depends on, as a name: what a library depends on, and torch."""
    try:
        compiler = find_compiler()
    except BuildError:
        compiler = ()
    return hashlib.sha256(f"{_key(compiler)} {torch.__version__}".encode()).hexdigest()[:24]


def _ingredients(compiler: Sequence[str]) -> Iterator[bytes]:
    for source in sorted(SOURCES.glob("*.[ch]")):
        yield source.name.encode()
        yield source.read_bytes()
    yield repr((compiler, FLAGS, OPTIONAL_FLAGS, platform.machine())).encode()
    if compiler:
        yield subprocess.run([*compiler, "--version"], capture_output=True, timeout=_TIMEOUT).stdout
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    # Of the first core: x86 calls the instruction sets "flags", ARM "Features"; native also means the model.
    for name in ("model name", "flags", "Features", "CPU part"):
        yield next((line for line in lines if line.startswith(name)), "").encode()

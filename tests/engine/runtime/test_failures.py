"""Failures in the middle of a run: the cause is raised, nothing hangs, no thread, file or byte is left."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.engine import Engine
from engine.errors import StorageError, UsageError
from engine.memory.hidden import HiddenStore
from engine.memory.kv.cache import KVCache
from engine.memory.weights.placed import WeightStore
from engine.models.adapter import LayeredModel
from engine.spec.policy import Policy
from engine.spec.request import Output, Request
from tests.support.agreement import COMPARISON
from tests.support.engine_models import Family, prompts
from tests.support.engine_runs import files_below, held, io_threads, stream_threads

DISK = "weights=disk,kv=disk,activations=disk,device_batch=2,num_device_batches=2"
REQUESTS = [Request(prompt, 5) for prompt in prompts()]

pytestmark = pytest.mark.timeout(60)


class Broken(Exception):
    """Stands for a defect in the engine."""


def breaks_after(calls: int, real: Callable[..., Any]) -> Callable[..., Any]:
    """A method that works for ``calls`` calls and then raises."""
    count = 0

    def method(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count > calls:
            raise Broken(f"call {count}")
        return real(*args, **kwargs)

    return method


@pytest.mark.parametrize("schedule", ["sequential", "overlapped"])
@pytest.mark.parametrize("calls", [0, 9])
@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (WeightStore, "load"),
        (KVCache, "load"),
        (KVCache, "store"),
        (HiddenStore, "load"),
        (HiddenStore, "store"),
        (LayeredModel, "run_layer"),
        (LayeredModel, "head"),
    ],
)
def test_failing_step_stops_the_run_with_its_cause(
    owner: type,
    name: str,
    calls: int,
    schedule: str,
    llama: Family,
    offload: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with Engine(
        llama.folder, Policy.parse(f"{DISK},schedule={schedule}"), offload_dir=offload, device="pretend"
    ) as engine:
        engine.answer(REQUESTS[:1])
        before = held(engine)
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, breaks_after(calls, getattr(owner, name)))
            with pytest.raises(Broken, match=f"call {calls + 1}$"):
                engine.answer(REQUESTS)
        assert stream_threads() == []
        assert held(engine) == before, "all but the weights is given back"
        for request, output, expected in zip(REQUESTS, engine.answer(REQUESTS), llama.expected, strict=True):
            COMPARISON.check("llama", request, output, expected)
    assert files_below(offload) == []


def disk_full_after(calls: int, real: Callable[..., Any]) -> Callable[..., Any]:
    count = 0

    def call(*args: Any) -> Any:
        nonlocal count
        count += 1
        if count > calls:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args)

    return call


def assert_disk_full(error: StorageError) -> None:
    message = str(error)
    assert "\n" not in message and "No space left" in message
    assert "--offload-dir" in message or "--store" in message
    assert error.exit_code == 1
    assert stream_threads() == []


@pytest.mark.parametrize(("call", "calls"), [("posix_fallocate", 0), ("pwritev", 0), ("pwritev", 3)])
def test_disk_full_while_loading(
    call: str, calls: int, llama: Family, offload: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights of a ``.bin`` file are first written to the store."""
    folder, store = tmp_path / "model", tmp_path / "store"
    folder.mkdir()
    llama.model.config.save_pretrained(folder)
    torch.save(llama.model.state_dict(), folder / "pytorch_model.bin")
    with Engine(folder, Policy.parse(DISK), offload_dir=offload, device="cpu", store=store) as engine:
        with monkeypatch.context() as patch:
            patch.setattr(os, call, disk_full_after(calls, getattr(os, call)))
            with pytest.raises(StorageError) as caught:
                engine.answer(REQUESTS)
        assert_disk_full(caught.value)
        assert "--store" in str(caught.value)
        assert engine._weights is None
        assert held(engine) == {"device": 0, "host": 0, "disk": 0}
        for request, output, expected in zip(REQUESTS, engine.answer(REQUESTS), llama.expected, strict=True):
            COMPARISON.check("llama", request, output, expected)
    assert files_below(offload) == []


@pytest.mark.parametrize("schedule", ["sequential", "overlapped"])
@pytest.mark.parametrize("device", ["cpu", "pretend"])
@pytest.mark.parametrize(
    ("call", "calls"), [*(("posix_fallocate", n) for n in (0, 1, 2)), ("pwritev", 0), ("pwritev", 30)]
)
def test_disk_full_while_running(
    call: str,
    calls: int,
    device: str,
    schedule: str,
    llama: Family,
    offload: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The disk is full when the run's files are made (the cache's, those of two batches), or in a pass."""
    with Engine(
        llama.folder, Policy.parse(f"{DISK},schedule={schedule}"), offload_dir=offload, device=device
    ) as engine:
        engine.answer(REQUESTS[:1])
        before = held(engine)
        with monkeypatch.context() as patch:
            patch.setattr(os, call, disk_full_after(calls, getattr(os, call)))
            with pytest.raises(StorageError) as caught:
                engine.answer(REQUESTS)
        assert_disk_full(caught.value)
        assert held(engine) == before, "all but the weights is given back"
        for request, output, expected in zip(REQUESTS, engine.answer(REQUESTS), llama.expected, strict=True):
            COMPARISON.check("llama", request, output, expected)
    assert files_below(offload) == []


def fails_in_an_io_thread(real: Callable[..., int], after: int) -> Callable[..., int]:
    """A system call that fails with an I/O error in a thread of the disk, after ``after`` calls there."""
    count = 0

    def call(*args: Any) -> int:
        nonlocal count
        if threading.current_thread().name.startswith("io-"):
            count += 1
            if count > after:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(*args)

    return call


@pytest.mark.parametrize("schedule", ["sequential", "overlapped"])
@pytest.mark.parametrize("call", ["preadv", "pwritev"])
def test_io_error_in_a_thread_stops_the_run(
    call: str, schedule: str, llama: Family, offload: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests of tiny models are usually made by the streams themselves; here threads make them."""
    policy = Policy.parse(f"{DISK},schedule={schedule}")
    with Engine(llama.folder, policy, offload_dir=offload, device="cpu") as engine:
        engine.answer(REQUESTS[:1])
        before = held(engine)
        monkeypatch.setattr(engine._tiers.pool, "run", engine._tiers.pool.run_in_threads)
        with monkeypatch.context() as patch:
            patch.setattr(os, call, fails_in_an_io_thread(getattr(os, call), 15))
            with pytest.raises(StorageError, match="Input/output error") as caught:
                engine.answer(REQUESTS)
        assert "\n" not in str(caught.value) and any(
            suffix in str(caught.value) for suffix in (".bin", ".safetensors")
        )
        assert stream_threads() == []
        assert held(engine) == before, "all but the weights is given back"
        for request, output, expected in zip(REQUESTS, engine.answer(REQUESTS), llama.expected, strict=True):
            COMPARISON.check("llama", request, output, expected)
    assert files_below(offload) == [] and io_threads() == []


@pytest.mark.parametrize("schedule", ["sequential", "overlapped"])
@pytest.mark.parametrize("kind", ["weights=disk", "kv=disk"])
def test_file_cut_short_from_outside_is_one_line(
    kind: str, schedule: str, llama: Family, offload: Path, tmp_path: Path
) -> None:
    """Either the run's KV cache file, or the model's file from which weights are read."""
    outputs: list[int] = []
    folder = shutil.copytree(llama.folder, tmp_path / "model")

    def cut(_: object) -> None:
        for path in files_below(offload if kind == "kv=disk" else folder):
            if path.suffix in (".bin", ".safetensors"):
                os.truncate(path, 0)

    policy = Policy.parse(f"{kind},device_batch=2,num_device_batches=2,schedule={schedule}")
    requests = [Request((5, 6, 7), 60, stop=lambda _: True), *REQUESTS]
    with Engine(folder, policy, offload_dir=offload, device="cpu") as engine:
        with pytest.raises(StorageError, match="changed from outside") as caught:
            engine.answer(requests, on_output=lambda index, _: outputs.append(index), on_progress=cut)
        assert "\n" not in str(caught.value)
        assert stream_threads() == []
    assert outputs == [0], "what was answered before stands"
    assert files_below(offload) == []


@pytest.mark.parametrize("schedule", ["sequential", "overlapped"])
@pytest.mark.parametrize("where", ["on_progress", "on_output", "stop"])
def test_interrupt_in_a_callback_leaves_nothing(
    where: str, schedule: str, llama: Family, offload: Path
) -> None:
    def interrupt(*_: object) -> bool:
        raise KeyboardInterrupt

    requests = REQUESTS
    callbacks: dict[str, Any] = {where: interrupt} if where != "stop" else {}
    if where == "stop":
        requests = [Request(prompts()[0], 5, stop=interrupt), *REQUESTS]
    with Engine(
        llama.folder, Policy.parse(f"{DISK},schedule={schedule}"), offload_dir=offload, device="pretend"
    ) as engine:
        with pytest.raises(KeyboardInterrupt):
            engine.answer(requests, **callbacks)
        assert stream_threads() == []
        after = held(engine)
        engine.answer(REQUESTS[:2])
        assert held(engine) == after
    assert files_below(offload) == []


def test_outputs_handed_out_before_a_failure_stand(
    llama: Family, offload: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    got: dict[int, Output] = {}
    monkeypatch.setattr(LayeredModel, "head", breaks_after(4, LayeredModel.head))
    with (
        Engine(
            llama.folder,
            Policy.parse("device_batch=1,num_device_batches=1"),
            offload_dir=offload,
            device="cpu",
        ) as engine,
        pytest.raises(Broken),
    ):
        engine.answer([Request(prompt, 2) for prompt in prompts()], on_output=got.__setitem__)
    assert sorted(got) == [0, 1]
    assert [got[index].tokens for index in (0, 1)] == [llama.expected[index].tokens[:2] for index in (0, 1)]


@pytest.mark.parametrize("kind", ["weights", "kv", "activations"])
def test_offload_folder_below_a_file_is_refused_at_once(kind: str, llama: Family, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UsageError) as caught:
        Engine(
            llama.folder,
            Policy.parse(f"{kind}=disk"),
            offload_dir=tmp_path / "file" / "offload",
            device="cpu",
        )
    message = str(caught.value)
    assert (
        str(tmp_path / "file" / "offload") in message and "\n" not in message and caught.value.exit_code == 2
    )


def test_no_folder_is_made_where_nothing_goes_to_disk(llama: Family, offload: Path) -> None:
    with Engine(llama.folder, Policy(), offload_dir=offload, device="cpu") as engine:
        engine.answer(REQUESTS[:1])
    assert not offload.exists()

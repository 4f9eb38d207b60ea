"""Ctrl-C in a real process: it ends within seconds and leaves no file."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.engine_models import Family
from tests.support.engine_runs import files_below

pytestmark = pytest.mark.timeout(120)

CHILD = """
import signal, sys, threading
from pathlib import Path
from engine.engine import Engine
from engine.memory.kv.cache import KVCache
from engine.models.adapter import LayeredModel
from engine.models.checkpoint import Checkpoint
from engine.spec.policy import Policy
from engine.spec.request import Request
from tests.support.engine_models import prompts

signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background inherit that it is ignored
folder, offload, store, where, schedule = sys.argv[1:]
packed = ",weight_quant=4" if where == "loading" else ""  # which is written to the store
policy = Policy.parse(
    "weights=disk,kv=disk,activations=disk,device_batch=4,num_device_batches=2," + schedule + packed
)
requests = [Request(prompt, 60) for prompt in prompts((17, 3, 1, 9, 25, 4, 30, 2)) * 200]

def announce(owner, name, call):
    # Say so when a method is called for the nth time, and go on as fast as ever.
    real, count = getattr(owner, name), 0
    def method(*args, **kwargs):
        nonlocal count
        count += 1
        if count == call:
            print("now", flush=True)
        return real(*args, **kwargs)
    setattr(owner, name, method)

def slowly(source):
    import time
    for index, item in enumerate(source):
        if index == 3:
            print("now", flush=True)
        time.sleep(0.05)
        yield item

if where == "loading":
    stream = Checkpoint.stream
    Checkpoint.stream = lambda *args, **kwargs: slowly(stream(*args, **kwargs))
try:
    with Engine(folder, policy, offload_dir=Path(offload), device="cpu", store=Path(store)) as engine:
        if where == "prefill":
            announce(LayeredModel, "run_layer", 2)
        elif where == "decode":
            announce(KVCache, "load", 100)
        engine.answer(requests)
except KeyboardInterrupt:
    left = [t.name for t in threading.enumerate() if t.name.startswith(("io-", "stream-"))]
    print("interrupted", left, flush=True)
    sys.exit(130)
print("finished", flush=True)
"""


@pytest.mark.parametrize(
    ("where", "schedule"),
    [
        ("loading", "overlapped"),
        ("prefill", "overlapped"),
        ("decode", "overlapped"),
        ("decode", "sequential"),
    ],
)
def test_interrupt_leaves_nothing(
    where: str, schedule: str, llama: Family, offload: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    folders = [str(llama.folder), str(offload), str(store)]
    command = [sys.executable, "-c", CHILD, *folders, where, f"schedule={schedule}"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None
    try:
        assert child.stdout.readline() == "now\n"
        begun = files_below(store if where == "loading" else offload)
        assert any(path.suffix == ".bin" for path in begun), "it is in the middle"
        child.send_signal(signal.SIGINT)
        output, errors = child.communicate(timeout=30)
    finally:
        child.kill()
        child.wait()
    assert (child.returncode, output) == (130, "interrupted []\n"), errors
    assert files_below(offload) == files_below(store) == []

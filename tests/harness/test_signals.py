"""What batch systems, containers and closed terminals send ends a command as Ctrl-C does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from harness.signals import Terminated, ending_signals, number_of

ROOT = Path(__file__).resolve().parents[2]

LONG = "name=long,weights=disk,kv=disk,device_batch=1,num_device_batches=1"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_an_interrupt_that_knows_its_number(number: signal.Signals) -> None:
    cleaned = False
    with pytest.raises(KeyboardInterrupt) as caught, ending_signals():
        try:
            os.kill(os.getpid(), number)
            time.sleep(5)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # again: it does not interrupt the cleaning
            cleaned = True
    assert cleaned and number_of(caught.value) == number and str(caught.value) == number.name
    assert signal.getsignal(number) is signal.SIG_DFL
    assert number_of(KeyboardInterrupt()) == signal.SIGINT


def test_signals_of_others_stay_theirs() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with ending_signals():
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_threads_leave_signals_alone() -> None:
    found: list[object] = []

    def inside() -> None:
        with ending_signals():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert found == [signal.SIG_DFL]


def test_it_is_no_error_that_code_of_others_catches() -> None:
    assert not issubclass(Terminated, Exception)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)])
def test_a_terminated_run_leaves_one_line_and_no_files(tmp_path: Path, number: signal.Signals) -> None:
    pytest.importorskip("helm.benchmark")
    command = [sys.executable, str(ROOT / "run_helm.py"), "run", "-q", "--no-report", "--suite", "ended"]
    command += ["-r", "form_processing", "-m", "40", "--policy", LONG, "-o", str(tmp_path / "out")]
    command += ["--local-path", str(tmp_path / "prod_env")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stderr is not None
        deadline = time.monotonic() + 120
        while not list((tmp_path / "out").glob("runs/ended/policies/*/journal.jsonl")):
            assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
            time.sleep(0.02)
        assert list((tmp_path / "out" / "offload").glob("run-*/*.bin"))
        process.send_signal(number)
        said = process.stderr.read().decode()
        assert process.wait(60) == 128 + number
    assert said.strip().splitlines() == [
        f"ended by {number.name}: run the same command again to continue where it stopped"
    ]
    assert list((tmp_path / "out" / "offload").iterdir()) == []
    assert not (tmp_path / "out" / "runs" / "ended" / ".partial").exists()

"""Child processes that answer, hang, die, print garbage or are killed for lack of memory."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness.baselines.sandbox.cgroup import MemoryGroup
from harness.baselines.sandbox.child import Child, ChildError

MIB = 1 << 20
FAKE = Path(__file__).resolve().parents[2] / "support" / "fake_child.py"


def start(way: str, folder: Path, limit: int | None = None) -> Child:
    """The fake child, behaving in one of its ways."""
    return Child([sys.executable, "-I", "-S", str(FAKE), way], folder / "log", limit)


def ask_all(child: Child, timeout: float = 30.0) -> dict[str, object]:
    """The requests of a trial, in their order; returns the answer to the last."""
    child.ask("hello", timeout)
    child.ask("load", timeout, job={})
    return child.ask("generate", timeout, prompts=[[1, 2], [3, 4]], new_tokens=3)


def can_limit() -> str:
    """Why memory cannot be limited here; empty where it can."""
    try:
        MemoryGroup(64 * MIB).remove()
    except OSError as error:
        return f"LIMITS OF MEMORY ARE NOT TESTED: {error}"
    return ""


def in_memory(folder: Path) -> bool:
    """Whether a folder is on tmpfs."""
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines()]
    below = [(where, kind) for where, kind in mounts if folder.resolve().is_relative_to(where)]
    return max(below, key=lambda mount: len(mount[0]))[1] == "tmpfs"


def test_a_child_answers(tmp_path: Path) -> None:
    with start("answers", tmp_path) as child:
        assert ask_all(child)["tokens"] == [[3, 4, 5], [5, 6, 7]]
        assert child.ask("score", 30, sequences=[[1, 2, 3]])["logprobs"] == [[-0.5, -0.5]]
        assert child.enforced == "no limit asked for"
    assert child._process.poll() == 0  # it was asked to end, not killed


def test_a_child_that_hangs_is_ended_in_time(tmp_path: Path) -> None:
    with start("hangs", tmp_path) as child:
        with pytest.raises(ChildError, match="no answer to generate within") as caught:
            child.ask("hello", 30)
            child.ask("generate", 0.3, prompts=[[1]], new_tokens=1)
        assert caught.value.status == "timeout"
        assert child._process.poll() is not None


def test_a_child_that_does_not_read_is_a_time_out(tmp_path: Path) -> None:
    with Child([sys.executable, "-S", "-c", "import time; time.sleep(60)"], tmp_path / "log") as child:
        with pytest.raises(ChildError) as caught:
            child.ask("score", 0.5, sequences=[[7] * 400_000])
        assert caught.value.status == "timeout"


def test_a_child_that_dies_leaves_its_last_words(tmp_path: Path) -> None:
    with start("dies", tmp_path) as child:
        with pytest.raises(ChildError, match="ended with code 3 in generate: something broke") as caught:
            ask_all(child)
        assert caught.value.status == "failed"
        assert caught.value.said == ["something broke"]
    with (
        start("dies-at-once", tmp_path) as child,
        pytest.raises(ChildError, match=r"ended with code 7.*no such"),
    ):
        ask_all(child)


def test_rubbish_is_not_taken_for_an_answer(tmp_path: Path) -> None:
    with (
        start("rubbish", tmp_path) as child,
        pytest.raises(ChildError, match="is not one: 'what is this'") as caught,
    ):
        ask_all(child)
    assert caught.value.status == "failed"


@pytest.mark.parametrize("way", ["unsupported", "refused"])
def test_what_a_system_says_of_itself_is_kept(way: str, tmp_path: Path) -> None:
    with start(way, tmp_path) as child:
        with pytest.raises(ChildError, match=f"it is {way} indeed") as caught:
            ask_all(child)
        assert caught.value.status == way
        assert child.ask("hello", 30)["ok"]  # it lives


def test_a_command_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ChildError) as caught, Child([str(tmp_path / "none")], tmp_path / "log") as child:
        child.ask("hello", 10)
    assert caught.value.status == "failed"


def test_the_limit_is_enforced(tmp_path: Path) -> None:
    if reason := can_limit():
        pytest.skip(reason)
    with start("hungry", tmp_path, 64 * MIB) as child:
        assert child.enforced.startswith("cgroup v")
        with pytest.raises(ChildError, match="killed for memory") as caught:
            ask_all(child)
        assert caught.value.status == "out_of_memory"
        assert child.peak() <= 64 * MIB
    with start("hungry", tmp_path, 1024 * MIB) as child:
        ask_all(child)
        assert 400 * MIB <= child.peak() <= 1024 * MIB


def test_without_groups_the_limit_is_said_not_to_hold(tmp_path: Path) -> None:
    command = [sys.executable, "-I", "-S", str(FAKE), "answers"]
    with Child(command, tmp_path / "log", 64 * MIB, root=tmp_path / "none") as child:
        assert ask_all(child)["ok"]
        assert child.enforced.startswith("not enforced: no memory control group")


def test_what_a_child_reads_and_writes_is_counted(tmp_path: Path) -> None:
    code = (
        "import json, os, sys\n"
        "for line in sys.stdin:\n"
        "    with open(sys.argv[1], 'wb') as out:\n"
        "        out.write(os.urandom(8 << 20)); out.flush(); os.fsync(out.fileno())\n"
        "    print(json.dumps({'id': json.loads(line)['id'], 'ok': True}), flush=True)\n"
    )
    with Child([sys.executable, "-I", "-S", "-c", code, str(tmp_path / "file")], tmp_path / "log") as child:
        before = child.counted()
        child.ask("hello", 30)
        read, written = child.counted()
        assert read >= before[0]
        if in_memory(tmp_path):
            pytest.skip("files of tests lie in memory: what is written to them is not counted")
        assert written - before[1] >= 8 * MIB


def test_descendants_end_with_their_child(tmp_path: Path) -> None:
    code = (
        "import json, subprocess, sys\n"
        "p = subprocess.Popen(['sleep', '60'])\n"
        "for line in sys.stdin:\n"
        "    print(json.dumps({'id': json.loads(line)['id'], 'ok': True, 'pid': p.pid}), flush=True)\n"
    )
    with Child([sys.executable, "-I", "-S", "-c", code], tmp_path / "log") as child:
        process = child.ask("hello", 30)["pid"]
    assert ended(process), "a descendant outlived its child"


def test_a_child_dies_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    """With the real child's side, in the middle of a request that never ends."""
    root = Path(__file__).resolve().parents[3]
    (tmp_path / "endless.py").write_text(
        "import time\nclass Endless:\n    def prepare(self, job): time.sleep(600)\n"
    )
    serve = root / "harness" / "baselines" / "sandbox" / "serve.py"
    code = (
        "import subprocess, sys, time\n"
        f"command = [sys.executable, {str(serve)!r}, 'endless', 'Endless']\n"
        "p = subprocess.Popen(command, stdin=subprocess.PIPE,\n"
        "    stdout=subprocess.PIPE, start_new_session=True, text=True)\n"
        'p.stdin.write(\'{"id": 1, "do": "hello"}\\n\'); p.stdin.flush(); p.stdout.readline()\n'
        'p.stdin.write(\'{"id": 2, "do": "prepare", "job": {"model": "", "work": ""}}\\n\')\n'
        "p.stdin.flush(); print(p.pid, flush=True); time.sleep(600)\n"
    )
    env = {"PYTHONPATH": str(tmp_path)}
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=env, text=True)
    assert parent.stdout is not None
    process = int(parent.stdout.readline())
    time.sleep(0.2)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert ended(process), "a child outlived its parent"


def ended(process: int) -> bool:
    """Whether a process is gone or a zombie within five seconds."""
    for _ in range(100):
        status = Path(f"/proc/{process}/status")
        if not status.exists() or "zombie" in status.read_text(encoding="utf-8"):
            return True
        time.sleep(0.05)
    return False

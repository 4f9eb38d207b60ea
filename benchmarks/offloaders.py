#!/usr/bin/env python
"""Generated token/s with weights on disk under a limit of memory: the engine against Accelerate.

    python benchmarks/offloaders.py --shape 1.3b --generate 32 --repeats 5
    python benchmarks/offloaders.py --quick                  # 125m, few tokens

Every run is a child process in a control group (page cache counted) of ``--cap`` times the model's bytes.
Each system is given its best batch: doubled until a run is killed, refused or out of time. Prompts, number
of tokens and greedy choice are the same; loading is not counted. Needs the right to make control groups.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.cgroup import MemoryGroup
from benchmarks.page_cache import drop
from benchmarks.records import RESULTS, Log, Row, markdown, say, spread
from benchmarks.synthetic import checkpoint, own_store
from engine.units import format_bytes

ENGINE = ("weights=disk,kv=host", "weights=disk,kv=disk")
ACCELERATE = (
    *("float32,layers", "bfloat16,layers", "float16,layers"),
    *("float32,all", "bfloat16,all", "bfloat16,auto:0.15"),
)
CAPS = (0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0)
KEYS = ("shape", "cap", "system", "config", "batch", "prompt", "generate", "repeat")
_PROBE = 64, 3  # prompt and tokens by which configurations are compared


def main(arguments: Sequence[str] | None = None) -> int:
    """Search both systems' best, then alternate; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", default="1.3b")
    parser.add_argument(
        "--cap", type=float, default=0.5, metavar="F", help="limit, as part of the model's bytes"
    )
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--generate", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5, metavar="N")
    parser.add_argument(
        "--timeout", type=float, default=240, metavar="S", help="of one run, loading included"
    )
    parser.add_argument("--most-batch", type=int, default=64, metavar="N")
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="PATTERN", help="any parts of 'system:configuration'"
    )
    parser.add_argument(
        "--quick", action="store_true", help="125m, few tokens, a cap that torch itself fits under"
    )
    parser.add_argument("--no-drop-caches", action="store_true", help="drop only the files' own pages")
    parser.add_argument("--work", type=Path, default=Path("results/offload/offloaders"), metavar="FOLDER")
    parser.add_argument("--out", type=Path, default=RESULTS / "offloaders.jsonl")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that children end, too
    if options.quick:
        options.shape, options.cap, options.prompt, options.generate = "125m", 5.0, 64, 4
        options.repeats, options.timeout, options.most_batch = 2, 60, 4
    bench = Bench(options)
    print(bench.compare())
    return 0


class Bench:
    """Both systems on one model; what is in the log is not run again."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._model = checkpoint(options.work, options.shape)
        self._bytes = (self._model / "model.safetensors").stat().st_size
        self._store = own_store(options.work)
        self._log = Log(options.out, KEYS)

    def compare(self) -> str:
        """The table, at the cap asked for and, if Accelerate cannot run there, at the least where it can."""
        caps = [self._options.cap, *(cap for cap in CAPS if cap > self._options.cap)]
        text = []
        for cap in caps:
            theirs = self._best("accelerate", ACCELERATE, cap)
            ours = self._best("engine", ENGINE, cap)
            text.append(self._table(cap, ours, theirs))
            if theirs is not None or not self._asked("accelerate", ACCELERATE):
                break
        return "\n".join(text)

    def _best(self, system: str, configs: Sequence[str], cap: float) -> Row | None:
        """The fastest run of a system's search; None if none ended well."""
        chosen = self._asked(system, configs)
        if system == "accelerate":  # which configurations run at all, and how fast, by a short run
            short = [self._run(system, config, cap, 1, *_PROBE) for config in chosen]
            alive = sorted((row for row in short if row["rate"]), key=lambda row: -row["rate"])
            chosen = [row["config"] for row in alive[:2]]
        runs: list[Row] = []
        for config in chosen:
            batch = 1
            while batch <= self._options.most_batch:
                row = self._run(system, config, cap, batch, self._options.prompt, self._options.generate)
                runs.append(row)
                if not row["rate"]:
                    break
                batch *= 2
        good = [row for row in runs if row["rate"]]
        return max(good, key=lambda row: row["rate"]) if good else None

    def _asked(self, system: str, configs: Sequence[str]) -> list[str]:
        """The configurations that the command line leaves."""
        patterns = self._options.only
        return [config for config in configs if any(pattern in f"{system}:{config}" for pattern in patterns)]

    def _run(
        self, system: str, config: str, cap: float, batch: int, prompt: int, generate: int, repeat: int = 0
    ) -> Row:
        """One child process, or its line of the log."""
        row: Row = {"shape": self._options.shape, "cap": cap, "system": system, "config": config,
                    "batch": batch, "prompt": prompt, "generate": generate, "repeat": repeat}  # fmt: skip
        if self._log.has(row):
            return next(old for old in self._log.rows if all(old.get(key) == row[key] for key in KEYS))
        offload = self._options.work / "offload"
        shutil.rmtree(offload, ignore_errors=True)
        offload.mkdir(parents=True)
        cold = drop([self._model, offload, self._store], not self._options.no_drop_caches)
        limit = int(cap * self._bytes)
        command = [sys.executable, str(Path(__file__).with_name("offload_child.py")), system, "--seed", "0"]
        for name, value in (("model", self._model), ("offload", offload), ("config", config),
                            ("limit", limit),
                            ("batch", batch), ("prompt", prompt), ("generate", generate)):  # fmt: skip
            command += [f"--{name}", str(value)]
        with MemoryGroup(limit) as group, tempfile.TemporaryFile("w+") as output:
            ended = group.run(command, self._options.timeout, output=output)
            output.seek(0)
            said = output.read().strip().splitlines()
        shutil.rmtree(offload, ignore_errors=True)
        result = json.loads(said[-1]) if ended.outcome == "ok" and said else {}
        outcome = "refused" if "refused" in result else ended.outcome
        rate = result["tokens"] / result["seconds"] if "seconds" in result else 0.0
        failed = {} if rate else {"said": said[-3:]}
        measured = {"rate": rate, "outcome": outcome, "limit": limit, "peak": ended.peak, "cold": cold}
        measured |= {"wall": ended.seconds, "cgroup": group.version}
        row = self._log.add({**row, **measured, **result, **failed})
        say(f"{cap:g} of {self._options.shape}: {system} {config} batch {batch}, {prompt}/{generate}: "
            f"{rate:.2f} token/s, {outcome}, {ended.seconds:.0f} s")  # fmt: skip
        return row

    def _table(self, cap: float, ours: Row | None, theirs: Row | None) -> str:
        """Repeat both systems' best in turn, and say what came of every configuration."""
        pairs: list[tuple[float, float]] = []
        rates: dict[str, list[float]] = {"engine": [], "accelerate": []}
        for repeat in range(self._options.repeats):
            pair = []
            for best in (ours, theirs):
                if best is None:
                    continue
                named = (best[key] for key in ("batch", "prompt", "generate"))
                row = self._run(best["system"], best["config"], cap, *named, repeat)
                if row["rate"]:
                    rates[best["system"]].append(row["rate"])
                    pair.append(row["rate"])
            if len(pair) == 2:
                pairs.append((pair[0], pair[1]))
        lines = []
        for name, best in (("engine", ours), ("accelerate", theirs)):
            if best is None and not self._asked(name, ENGINE if name == "engine" else ACCELERATE):
                continue
            if best is None:
                tried = [row for row in self._log.rows if row["system"] == name and row["cap"] == cap]
                why = ", ".join(dict.fromkeys(f"{row['config']}: {row['outcome']}" for row in tried))
                lines.append([name, f"no configuration ran ({why})", "-", "-", "-"])
                continue
            lines.append(
                [name, best["config"], best["batch"], spread(rates[name]), format_bytes(best["peak"])]
            )
        model, limit = format_bytes(self._bytes), format_bytes(cap * self._bytes)
        ratio = spread([mine / other for mine, other in pairs], 1)
        options = self._options
        text = (
            f"OPT {options.shape} ({model}) under {limit}, prompts of {options.prompt} tokens, "
            f"{options.generate} generated, one run at most {options.timeout:.0f} s.\n\n"
        )
        text += markdown(
            ["system", "configuration", "best batch", "generated token/s", "peak of the group"], lines
        )
        return f"{text}\nEngine against Accelerate: {ratio} times.\n\n{self._search(cap)}"

    def _search(self, cap: float) -> str:
        """Every run of the search, so that it can be seen where each system ended."""
        rows = [row for row in self._log.rows if row["cap"] == cap and row["repeat"] == 0
                and row["prompt"] == self._options.prompt]  # fmt: skip
        lines = [
            [row["system"], row["config"], row["batch"], f"{row['rate']:.2f}", row["outcome"]] for row in rows
        ]
        return markdown(["search", "configuration", "batch", "token/s", "outcome"], lines)


if __name__ == "__main__":
    sys.exit(main())

"""The batch command over a tiny model: what is answered, what is refused, what survives an interruption."""

from __future__ import annotations

import fcntl
import json
import random
from pathlib import Path
from typing import Any

import pytest

import harness.openai_batch.job
from engine.engine import Engine
from engine.spec.hardware import Tier
from engine.spec.policy import Policy
from engine.spec.request import Request
from harness import cli
from harness.commands.batch import EPILOG
from harness.tokenizer import Text
from tests.harness.openai_batch.batch_files import (
    CHAT,
    ROOT,
    body,
    examples,
    failed,
    line,
    message,
    records,
    run,
    table,
    write,
)


def test_greedy_completion_is_that_of_transformers(model: Path, reference: Any, tmp_path: Path) -> None:
    text = Text.load(str(model))
    asked = line("a", max_tokens=12, logprobs=1)
    assert run(model, write(tmp_path / "in", [asked]), tmp_path / "out") == 0
    answer = body(records(tmp_path / "out")["a"])
    ids = [*text.start_ids, *text.encode(asked["body"]["prompt"])]
    generated, logprobs = [], []
    for _ in range(12):
        row = table(reference, ids + generated)[-1]
        generated.append(int(row.argmax()))
        logprobs.append(float(row.max()))
        if generated[-1] in text.end_ids:
            break
    ended = generated[-1] in text.end_ids
    shown = generated[:-1] if ended else generated
    (choice,) = answer["choices"]
    assert choice["text"] == text.join(shown).decode(errors="replace")
    assert choice["finish_reason"] == ("stop" if ended else "length")
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(logprobs[: len(shown)], abs=1e-4)
    assert answer["usage"] == {
        "prompt_tokens": len(ids), "completion_tokens": len(generated),
        "total_tokens": len(ids) + len(generated), "prompt_tokens_details": {"cached_tokens": 0},
    }  # fmt: skip
    assert answer["object"] == "text_completion" and answer["model"] == "tiny-chat"


def test_echo_gives_the_prompts_own_log_probabilities(model: Path, reference: Any, tmp_path: Path) -> None:
    text, prompt = Text.load(str(model)), "Grüße: the apple is red"
    ids = list(text.encode(prompt))
    lines = [
        line("text", prompt=prompt, max_tokens=0, echo=True, logprobs=0),
        line("ids", prompt=ids, max_tokens=0, echo=True, logprobs=0),
        line("more", prompt=prompt, max_tokens=3, echo=True, logprobs=1),
        line("bare", prompt=prompt, max_tokens=0, echo=True),
        line("one", prompt=[5], max_tokens=0, echo=True, logprobs=0),
    ]
    assert run(model, write(tmp_path / "in", lines), tmp_path / "out") == 0
    choice = {name: body(record)["choices"][0] for name, record in records(tmp_path / "out").items()}
    scores = table(reference, [2, *ids])
    expected = [float(scores[place, token]) for place, token in enumerate(ids)]
    assert choice["text"]["text"] == choice["ids"]["text"] == choice["bare"]["text"] == prompt
    assert choice["text"]["logprobs"]["token_logprobs"] == pytest.approx(expected, abs=1e-4)
    scores = table(reference, ids)
    expected = [float(scores[place, token]) for place, token in enumerate(ids[1:])]
    first, *others = choice["ids"]["logprobs"]["token_logprobs"]
    assert first is None and others == pytest.approx(expected, abs=1e-4), "nothing is put before ids"
    more = choice["more"]["logprobs"]
    assert more["tokens"][: len(ids)] == choice["text"]["logprobs"]["tokens"]
    assert len(more["tokens"]) <= len(ids) + 3 and choice["more"]["text"].startswith(prompt)
    for piece, offset in zip(more["tokens"], more["text_offset"], strict=True):
        if not piece.startswith("bytes:"):
            assert choice["more"]["text"].startswith(piece, offset)
    assert choice["one"]["logprobs"]["token_logprobs"] == [None]


def test_choices_of_several_prompts_are_in_order(model: Path, tmp_path: Path) -> None:
    lines = [
        line("both", prompt=["water boils", [7, 8, 9]], n=2),
        line("first", prompt="water boils"),
        line("second", prompt=[7, 8, 9]),
        line("drawn", n=3, temperature=1, max_tokens=20),
    ]
    assert run(model, write(tmp_path / "in", lines), tmp_path / "out") == 0
    found = {name: body(record) for name, record in records(tmp_path / "out").items()}
    texts = {name: [choice["text"] for choice in answer["choices"]] for name, answer in found.items()}
    assert texts["both"] == texts["first"] * 2 + texts["second"] * 2
    assert [choice["index"] for choice in found["both"]["choices"]] == [0, 1, 2, 3]
    assert len(set(texts["drawn"])) == 3


def test_stop_strings_end_a_text_and_are_no_part_of_it(model: Path, tmp_path: Path) -> None:
    free = line("free", temperature=1, seed=1, max_tokens=40)
    assert run(model, write(tmp_path / "in", [free]), tmp_path / "out") == 0
    whole = body(records(tmp_path / "out")["free"])["choices"][0]["text"]
    stop = whole[10:13]
    stopped = line("stopped", temperature=1, seed=1, max_tokens=40, stop=[stop, "never"], logprobs=0)
    assert run(model, write(tmp_path / "in", [stopped]), tmp_path / "stopped") == 0
    (choice,) = body(records(tmp_path / "stopped")["stopped"])["choices"]
    assert choice["text"] == whole[: whole.index(stop)] and choice["finish_reason"] == "stop"
    assert "".join(choice["logprobs"]["tokens"]) == choice["text"] or "\ufffd" in whole


def test_chat_answers_as_its_template_completed(model: Path, tmp_path: Path) -> None:
    conversation = {"messages": [{"role": "user", "content": "water"}], "max_tokens": 6}
    prompt = list(Text.load(str(model)).encode("user: water\nassistant:"))
    lines = [
        line("chat", CHAT, logprobs=True, **conversation),
        line("plain", prompt=prompt, max_tokens=6, logprobs=0),
    ]
    assert run(model, write(tmp_path / "in", lines), tmp_path / "out") == 0
    found = records(tmp_path / "out")
    chat, plain = body(found["chat"]), body(found["plain"])
    (choice,), (other,) = chat["choices"], plain["choices"]
    assert choice["message"] == {"role": "assistant", "content": other["text"], "refusal": None}
    content = choice["logprobs"]["content"]
    assert [one["logprob"] for one in content] == pytest.approx(other["logprobs"]["token_logprobs"], abs=1e-4)
    assert b"".join(bytes(one["bytes"]) for one in content).decode(errors="replace") == other["text"]
    assert chat["object"] == "chat.completion" and chat["usage"] == plain["usage"]


BAD = (
    b"{torn\n",
    json.dumps(line("twice", prompt="other")).encode() + b"\n",
    line("long", prompt="x " * 999),
    line("url") | {"url": "/v1/responses"},
    line("field", nn=3),
    {"custom_id": "fields", "method": "POST"},
    b'"text"\n',
    b"\n",
    b"\x00\xff\n",
)


def test_bad_lines_are_errors_of_their_own(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "in", [line("twice"), *BAD, line("last")])
    assert run(model, source, tmp_path / "out") == 0
    found = [json.loads(one) for one in (tmp_path / "out").read_bytes().splitlines()]
    assert len(found) == 10, "a blank line is no request"
    assert sorted(one["custom_id"] for one in found if not failed(one)) == ["last", "twice"]
    reasons = {int(message(one).split()[1].rstrip(":")): message(one) for one in found if failed(one)}
    assert list(reasons) == [2, 3, 4, 5, 6, 7, 8, 10]
    assert "'twice' is that of line 1" in reasons[3] and "window" in reasons[4]
    assert len({one["id"] for one in found}) == 10
    last = capsys.readouterr().err.splitlines()[-1]
    assert "10 lines" in last and "2 answered, 8 errors" in last and "the first error: line 2" in last


def test_nothing_but_blank_lines_is_an_empty_result(model: Path, tmp_path: Path) -> None:
    for content in (b"", b"\n \n"):
        assert run(model, write(tmp_path / "in", [content]), tmp_path / "deep" / "out") == 0
        assert (tmp_path / "deep" / "out").read_bytes() == b""


def test_the_same_file_gives_the_same_lines_however_it_is_cut(model: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "in", [*(line(f"{i}", temperature=1, max_tokens=i) for i in range(1, 8)), *BAD])
    for output, more in (
        ("a", ()),
        ("b", ("--window", "2")),
        ("c", ("--policy", "offloaded,device_batch=3")),
    ):
        more = ("--reproducible", "--offload-dir", str(tmp_path / "off"), *more)
        assert run(model, source, tmp_path / output, *more) == 0
    first, second, third = (sorted((tmp_path / name).read_bytes().splitlines()) for name in "abc")
    assert first == second == third
    assert run(model, source, tmp_path / "d", "--seed", "1") == 0
    texts = [
        {body(one)["choices"][0]["text"] for one in records(tmp_path / name).values() if not failed(one)}
        for name in "ad"
    ]
    assert texts[0] != texts[1]


def test_a_job_goes_on_from_wherever_it_was_cut_off(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal to the last digit, so the requests must not share device batches whose composition changes."""
    source = write(tmp_path / "in", [*(line(f"{i}", logprobs=0) for i in range(4)), *BAD])
    alone = ("--policy", "resident,prefix_sharing=off,device_batch=1,num_device_batches=5", "--reproducible")
    assert run(model, source, tmp_path / "whole", *alone) == 0
    whole = (tmp_path / "whole").read_bytes()
    asked: list[int] = []
    plain = harness.openai_batch.job._Job._answer_at_once
    monkeypatch.setattr(
        harness.openai_batch.job._Job, "_answer_at_once",
        lambda self, part: (asked.append(len(part)), plain(self, part)),
    )  # fmt: skip
    rng = random.Random(0)
    for length in [0, 1, 9, len(whole), *rng.sample(range(len(whole)), 6)]:
        (tmp_path / "out").write_bytes(whole[:length])
        asked.clear()
        assert run(model, source, tmp_path / "out", *alone) == 0
        left = 5 - sum(
            b'"status_code":200' in one for one in whole[:length].splitlines()[: whole[:length].count(b"\n")]
        )
        assert sum(asked) == left, "answers that are whole are kept"
        assert sorted((tmp_path / "out").read_bytes().splitlines()) == sorted(whole.splitlines())


def test_corrected_lines_are_answered_by_the_same_command(model: Path, tmp_path: Path) -> None:
    assert run(model, write(tmp_path / "in", [line("a"), line("b", nn=1)]), tmp_path / "out") == 0
    assert run(model, write(tmp_path / "in", [line("a"), line("b", n=1)]), tmp_path / "out") == 0
    assert not any(map(failed, records(tmp_path / "out").values()))
    assert (tmp_path / "out").read_bytes().count(b"\n") == 2


@pytest.mark.parametrize("changed", [{"max_tokens": 2}, {}])
def test_answers_of_something_else_are_not_taken_for_these(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changed: dict[str, Any]
) -> None:
    assert run(model, write(tmp_path / "in", [line("a")]), tmp_path / "out") == 0
    before = (tmp_path / "out").read_bytes()
    source = write(tmp_path / "in", [line("a", **changed)])
    more = () if changed else ("--policy", "resident,weight_quant=4")
    assert run(model, source, tmp_path / "out", *more) == 2
    assert "choose another --output" in capsys.readouterr().err
    assert (tmp_path / "out").read_bytes() == before


@pytest.mark.parametrize("content", [b"my notes\n", b"my notes", b'{"a": 1}\n', b'{"id":"x"'])
def test_a_file_of_something_else_is_left_alone(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    output = write(tmp_path / "out", [content])
    assert run(model, write(tmp_path / "in", [line("a")]), output) == 2
    assert "line 1 of" in capsys.readouterr().err and output.read_bytes() == content


@pytest.mark.parametrize("place", [0, 5, 60, 200, -30, -12, -3, -1])
def test_a_damaged_answer_is_given_again(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], place: int
) -> None:
    source, output = write(tmp_path / "in", [line("a"), line("b"), line("c")]), tmp_path / "out"
    assert run(model, source, output, "--reproducible") == 0
    expected = records(output)
    lines = output.read_bytes().splitlines(keepends=True)
    changed = bytearray(lines[1])
    changed[place] ^= 1
    output.write_bytes(b"".join([lines[0], bytes(changed), lines[2]]))
    (tmp_path / ".out.partial").write_bytes(b"of a killed job")
    capsys.readouterr()
    assert run(model, source, output, "--reproducible") == 0
    assert " damaged line" in capsys.readouterr().err
    assert records(output) == expected and len(output.read_bytes().splitlines()) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
    assert run(model, source, output, "--reproducible") == 0
    assert " damaged line" not in capsys.readouterr().err


def test_one_job_per_output(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "in", [line("a")])
    with (tmp_path / "out").open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert run(model, source, tmp_path / "out") == 2
    assert "another job is writing" in capsys.readouterr().err
    assert run(model, source, tmp_path / "out") == 0


def test_files_that_cannot_be_used_fail_the_job(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "in", [line("a")])
    for given, output, reason in (
        (tmp_path / "none", tmp_path / "out", "is not a file"),
        (tmp_path, tmp_path / "out", "is not a file"),
        (source, tmp_path, "Is a directory"),
        (source, source / "out", "cannot write"),
        (source, source, "is not a batch result"),
    ):
        assert run(model, given, output) in (1, 2)
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ") and reason in error


def test_a_line_too_long_to_be_read_is_one_error(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness.openai_batch.job, "MOST_LINE_BYTES", 500)
    long = line("long", prompt="x" * 2000)
    assert run(model, write(tmp_path / "in", [line("a"), long, line("b")]), tmp_path / "out") == 0
    found = records(tmp_path / "out")
    assert body(found["a"]) and body(found["b"]) and "line 2: the line is longer" in message(found[None])


def test_what_no_budget_holds_is_refused_alone(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = "kv=host,device_batch=2,num_device_batches=3,max_batch_tokens=64,prefix_sharing=off"
    small, big = Request((5,) * 12, 20), Request((5,) * 120, 100)
    with Engine(model, Policy.parse(policy), device="pretend", offload_dir=tmp_path) as engine:
        together, alone, few = (
            engine.check(requests).total(Tier.HOST) for requests in ([small] * 6 + [big], [big], [small] * 6)
        )
    assert few < alone < together
    lines = [line(f"{i}", prompt=[5] * 12, max_tokens=20) for i in range(6)]
    source = write(tmp_path / "in", [*lines, line("big", prompt=[5] * 120, max_tokens=100)])

    def errors(budget: int) -> list[str | None]:
        output = tmp_path / f"{budget}"
        more = ("--device", "pretend", "--policy", policy, "--host-memory", f"{budget}")
        assert run(model, source, output, *more) == 0
        found = {name: one for name, one in records(output).items() if failed(one)}
        assert all("host tier" in message(one) for one in found.values())
        return list(found)

    assert errors(together) == []
    assert "halved" not in capsys.readouterr().err
    assert errors(together - 1) == []
    assert "7 lines at once do not fit and are halved: the policy (KV cache" in capsys.readouterr().err
    assert errors(alone - 1) == ["big"]
    assert "halved" not in capsys.readouterr().err, "the six that are left fit together"


def test_a_budget_that_fits_nothing_fails_the_job(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(model, write(tmp_path / "in", [line("a")]), tmp_path / "out", "--host-memory", "10KiB") == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: the policy")
    assert not (tmp_path / "out").exists()


def test_served_names(model: Path, tmp_path: Path) -> None:
    lines = [line("own", model=str(model)), line("served", model="gpt"), line("wrong", model="other")]
    source = write(tmp_path / "in", lines)
    assert run(model, source, tmp_path / "out", "--served-model-name", "gpt") == 0
    found = records(tmp_path / "out")
    assert body(found["own"])["model"] == body(found["served"])["model"] == "gpt"
    assert found["wrong"]["response"]["status_code"] == 404 and "--served-model-name" in message(
        found["wrong"]
    )


def test_examples_of_the_help_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scenarios").symlink_to(ROOT / "scenarios")
    write(tmp_path / "requests.jsonl", [line("a"), line("b", CHAT, messages=[])])
    write(tmp_path / "others.jsonl", [line("a", model="gpt-4o-mini")])
    monkeypatch.chdir(tmp_path)
    found = examples(EPILOG)
    assert len(found) == 3
    for arguments in found:
        assert cli.main(arguments) == 0, arguments
    for name in ("results", "offloaded", "others-results"):
        assert body(records(tmp_path / f"{name}.jsonl")["a"])["choices"]

"""``--chat``: which prompts of run entries are put into the tokenizer's chat template, and who says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("helm.benchmark")

from helm.common import request as helm
from helm.proxy.retry import NonRetriableException

from engine.errors import UsageError
from engine.plan.paper.named import opt_spec
from engine.spec.policy import Policy
from engine.spec.settings import EngineSettings
from harness import cli
from harness.helm.client import TierbenchClient
from harness.helm.registry import make_deployment
from harness.helm.translate import make_question
from harness.suite.requests import requests_of
from harness.suite.runner import SuiteResult, run_suite
from harness.sweep.items import answers
from harness.tokenizer import ChatMode, Text
from tests.harness.conftest import PLUGIN, OptionsMaker
from tests.support.tiny_models import copy_with_template

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def model(tiny_opt_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a chat template, which writes the beginning of a text itself."""
    return copy_with_template(tiny_opt_dir, tmp_path_factory.mktemp("chat") / "tiny-chat", TEMPLATE)


@pytest.fixture(scope="module")
def text(model: Path) -> Text:
    return Text.load(str(model))


@pytest.mark.parametrize(
    ("mode", "has_template", "used"),
    [
        ("auto", True, True),
        ("auto", False, False),
        ("on", True, True),
        ("off", True, False),
        ("off", False, False),
    ],
)
def test_auto_is_whether_there_is_a_template(
    text: Text, tiny_opt_dir: Path, mode: ChatMode, has_template: bool, used: bool
) -> None:
    assert (text if has_template else Text.load(str(tiny_opt_dir))).uses_chat(mode) == used


def test_a_prompt_is_what_helms_own_client_makes_of_it(model: Path, text: Text) -> None:
    from helm.clients.huggingface_client import HuggingFaceClient
    from helm.common.cache import BlackHoleCacheConfig
    from helm.tokenizers.huggingface_tokenizer import HuggingFaceTokenizer

    cache, name = BlackHoleCacheConfig(), str(model)
    tokenizer = HuggingFaceTokenizer(cache, "tiny/chat", pretrained_model_name_or_path=name)
    client = HuggingFaceClient(cache, tokenizer, pretrained_model_name_or_path=name)
    request = helm.Request(
        model="a/b", model_deployment="a/b", prompt="Name a colour.\nAnswer:", max_tokens=4
    )
    question = make_question(request, text, 0, chat=text.uses_chat("auto"))
    assert question.source.decode() == client.get_prompt(request)
    prompt = question.requests[0].prompt
    assert prompt == (2, *text.encode("[user] Name a colour.\nAnswer:\n[assistant]")), "begun once"
    assert make_question(request, text, 0).requests[0].prompt == (2, *text.encode(request.prompt))


@pytest.mark.parametrize(("given", "used"), [(None, True), (True, True), (False, False)])
def test_the_client_of_helm_run_takes_helms_own_argument(
    model: Path, tmp_path: Path, given: bool | None, used: bool
) -> None:
    client = TierbenchClient(str(model), offload_dir=str(tmp_path), apply_chat_template=given)
    assert client._gatherer._chat is used


def test_the_client_needs_a_template_that_is_asked_for(tiny_opt_dir: Path) -> None:
    with pytest.raises(NonRetriableException, match="needs a tokenizer with a chat template"):
        TierbenchClient(str(tiny_opt_dir), apply_chat_template=True)


def test_a_scored_prompt_stays_as_it_is(text: Text) -> None:
    request = helm.Request(prompt="Name a colour: red", max_tokens=0, echo_prompt=True)
    assert make_question(request, text, 0, chat=True) == make_question(request, text, 0)


def test_a_template_that_fails_is_one_line(text: Text, tiny_opt_dir: Path) -> None:
    broken = Text.load(str(tiny_opt_dir))
    broken.tokenizer.chat_template = "{{ raise_exception('roles\nmust alternate') }}"
    with pytest.raises(UsageError, match="chat template refuses it") as caught:
        make_question(helm.Request(prompt="a"), broken, 0, chat=True)
    assert "\n" not in str(caught.value)


def test_the_template_takes_positions_of_the_window(text: Text) -> None:
    def longest(chat: bool) -> Any:
        deployment = make_deployment(
            EngineSettings("m"), Policy(), opt_spec("opt-125m"), "m", text, False, chat
        )
        entry = deployment.entries["model_deployments.yaml"]
        assert entry["client_spec"]["args"]["apply_chat_template"] is chat
        return entry["max_request_length"]

    around = len(text.encode(text.chat([{"role": "user", "content": "a"}])))
    assert longest(False) == 2048 and longest(True) == 2048 + 1 - around


def test_requests_of_a_suite_follow_the_mode(make_options: OptionsMaker, model: Path, tmp_path: Path) -> None:
    asked = {}
    for mode in ("auto", "on", "off"):
        options = make_options(
            tmp_path, model=str(model), run_entries=["toy_generation", "toy_separate"], chat=mode, suite=mode
        )
        asked[mode] = {request.prompt for request in requests_of(options)}
    assert asked["auto"] == asked["on"] != asked["off"]
    assert asked["on"] & asked["off"], "scored prompts are the same"


@pytest.fixture(scope="module")
def suite(make_options: OptionsMaker, model: Path, tmp_path_factory: pytest.TempPathFactory) -> SuiteResult:
    folder = tmp_path_factory.mktemp("suite")
    return run_suite(make_options(folder, model=str(model), run_entries=["toy_generation", "toy_separate"]))


def test_manifest_and_table_say_it(suite: SuiteResult) -> None:
    (path,) = suite.folder.glob("policies/*/manifest.json")
    assert json.loads(path.read_text())["chat"] == "on"
    assert json.loads((suite.folder / "table.json").read_text())["chat"] == "on"
    assert "Prompts are put into the tokenizer's chat template (chat: on)." in suite.shown


def test_answers_asked_in_another_way_are_not_taken(
    suite: SuiteResult, make_options: OptionsMaker, model: Path
) -> None:
    def entries() -> int:
        (journal,) = suite.folder.glob("policies/*/journal.jsonl")
        return len(journal.read_text().splitlines())

    folder, before = suite.folder.parent.parent, entries()
    both = ["toy_generation", "toy_separate"]
    again = run_suite(make_options(folder, model=str(model), run_entries=both, chat="off"))
    assert "(chat: off)" in again.shown and entries() > before
    (path,) = suite.folder.glob("policies/*/manifest.json")
    assert json.loads(path.read_text())["chat"] == "off"


def test_a_curves_answers_are_asked_in_the_same_way(text: Text, tmp_path: Path) -> None:
    instance = {"references": [{"output": {"text": "Lisbon"}, "tags": ["correct"]}]}
    asked = {"request": {"prompt": "City?\nAnswer:"}, "instance": instance, "train_trial_index": 0}
    state = {"adapter_spec": {"method": "generation", "output_prefix": "Answer: "}, "request_states": [asked]}
    (tmp_path / "scenario_state.json").write_text(json.dumps(state))
    (item,) = answers([tmp_path], text, most=10, window=512, chat=True)
    assert text.join(item.prompt).decode() == "</s>[user] City?\nAnswer:\n[assistant]"
    assert text.join(item.forced).decode() == "Lisbon"


COMMAND = ["run", "-r", "toy_generation", "toy_separate", "--plugins", PLUGIN, "--policy", "resident"]


def test_a_dry_run_shows_it(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["-o", str(tmp_path), "--local-path", str(tmp_path / "env"), "--model", str(model), "--dry-run"]
    assert cli.main([*COMMAND, *more]) == 0
    shown = capsys.readouterr().out
    assert "chat: on, 4 prompts are put into the tokenizer's chat template; " in shown
    assert "that are scored are asked as they are" in shown
    assert cli.main([*COMMAND, *more, "--chat", "off"]) == 0
    assert "chat: off, prompts are asked as they are" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["run", "curve", "compare"])
def test_a_template_that_is_asked_for_and_missing_is_one_line(
    tiny_opt_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    more = ["-r", "toy_generation", "--plugins", PLUGIN, "-o", str(tmp_path), "--model", str(tiny_opt_dir)]
    assert cli.main([command, *more, "--chat", "on"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: --chat on needs a tokenizer with a chat template") and "--chat off" in last

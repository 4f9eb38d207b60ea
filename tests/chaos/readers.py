"""The readers that fuzzing tries, each with a valid input from this repository or from a finished command."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from engine.memory.store.packed import PackedStore
from engine.models.checkpoint import Checkpoint, load_config
from engine.models.formats.headers import read_header
from engine.spec.policy import Policy
from engine.spec.profile import HardwareProfile
from harness.cli import build_parser
from harness.commands.arguments import read_policies
from harness.config import parse
from harness.openai_batch.fields import LineError
from harness.openai_batch.grammar import Grammars
from harness.openai_batch.prompts import PromptReader
from harness.openai_batch.request import Served, read_envelope, read_request
from harness.suite.gate import accepted_formats
from harness.suite.journal import Journal
from harness.suite.manifest import read_manifest
from harness.tokenizer import Text
from tests.chaos.campaign import Campaign
from tests.chaos.work import CURVE, MODEL, PACKING, ROOT, RUN, Command

FINISHED = (RUN, CURVE, PACKING)
"""Commands some of whose files are read."""


@dataclass(frozen=True)
class Reader:
    """A reader and a valid input of it; `read` raises the project's own errors for one that is not."""

    name: str
    valid: bytes
    read: Callable[[bytes], object]


def make_readers(
    campaign: Campaign, folder: Path, commands: Collection[Command] = FINISHED
) -> Iterator[Reader]:
    """The readers; files that are read lie in ``folder``. Those of results, if of one of ``commands``."""

    def through_file(name: str, valid: bytes, read: Callable[[Path], object]) -> Reader:
        path = folder / name

        def write_and_read(content: bytes) -> object:
            path.write_bytes(content)
            return read(path)

        return Reader(name, valid, write_and_read)

    def through_model(name: str, read: Callable[[Path], object]) -> Reader:
        model = folder / f"model-{name}"
        shutil.copytree(MODEL, model)

        def write_and_read(content: bytes) -> object:
            (model / name).write_bytes(content)
            return read(model)

        return Reader(f"model's {name}", (MODEL / name).read_bytes(), write_and_read)

    def through_text(name: str, valid: str, read: Callable[[str], object]) -> Reader:
        return Reader(name, valid.encode(), lambda content: read(content.decode(errors="replace")))

    yield through_text(
        "policy", "weights=0.2/0.3/0.5,kv=host,device_batch=4,weight_quant=4-g32", Policy.parse
    )
    yield through_text("size", "1.5GiB", lambda text: parse(build_parser, ["run", f"--host-memory={text}"]))
    yield through_file("policies.yaml", (ROOT / "scenarios/policies.yaml").read_bytes(), read_policies)
    settings = (
        b"policy: [resident, offloaded]\nmax-eval-instances: 5\nsuite: s\nrun-entries: [form_processing]\n"
    )
    yield through_file(
        "config.yaml", settings, lambda path: parse(build_parser, ["run", "--config", str(path)])
    )
    profile = ROOT / "engine/plan/paper/profiles/t4.json"
    yield through_file("profile.json", profile.read_bytes(), HardwareProfile.load)

    if RUN in commands:
        suite = campaign.undisturbed(RUN).folder / "out/runs/s/policies"
        yield through_file("journal.jsonl", next(suite.glob("*/journal.jsonl")).read_bytes(), Journal)
        yield through_file("manifest.json", next(suite.glob("*/manifest.json")).read_bytes(), read_manifest)
    if CURVE in commands:
        curve = campaign.undisturbed(CURVE).folder / "out/curves/c/curve.json"
        yield through_file("curve.json", curve.read_bytes(), accepted_formats)

    yield through_model("config.json", lambda model: load_config(str(model), model))
    yield through_model("tokenizer.json", lambda model: Text.load(str(model)))
    yield through_model("tokenizer_config.json", lambda model: Text.load(str(model)))
    weights = next(MODEL.glob("*.safetensors"))
    yield through_file("header.safetensors", weights.read_bytes()[:20_000], read_header)
    yield through_model(weights.name, Checkpoint)
    if PACKING in commands:
        yield _store_reader(campaign, folder)
    yield _batch_reader()


def _store_reader(campaign: Campaign, folder: Path) -> Reader:
    entry = next((campaign.undisturbed(PACKING).folder / "store").glob("*/index.json"))
    copied = folder / "store" / entry.parent.name
    shutil.copytree(entry.parent, copied)

    def read(content: bytes) -> object:
        (copied / "index.json").write_bytes(content)
        return PackedStore(folder / "store").open(copied.name)

    return Reader("store's index.json", entry.read_bytes(), read)


def _batch_reader() -> Reader:
    body = {
        "prompt": "Is 24 even?",
        "max_tokens": 4,
        "stop": ["\n"],
        "temperature": 0.5,
        "logprobs": 1,
        "n": 2,
    }
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}
    text = Text.load(str(MODEL))
    served = Served(
        PromptReader(text, 1536, 512),
        Grammars(text, 1536),
        ["model"],
        seed=0,
        chat_tokens=20,
        fingerprint="f",
    )

    def read(content: bytes) -> object:
        with contextlib.suppress(LineError):  # recorded in the line's answer
            return read_request(read_envelope(content, "f"), served)
        return None

    return Reader("batch line", json.dumps(line).encode(), read)

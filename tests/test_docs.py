"""What the documents say can be done can be done, what they name is there, and what they show is current."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from benchmarks.documents.tables import batch_fields, measured_table
from benchmarks.pictures import FOLDER, PICTURES
from engine import machine
from engine.spec.policy import Policy
from harness.cli import build_parser, main

ROOT = Path(__file__).resolve().parent.parent
PAGES = tuple(sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
DOCUMENTS = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    *PAGES,
    "benchmarks/README.md",
    "results/README.md",
    "results/log/README.md",
)
TABLES = tuple(
    sorted(
        str(path.relative_to(ROOT))
        for folder in ("limits", "evaluation_loads", "paper", "prediction", "comparisons/*")
        for path in (ROOT / "results").glob(f"{folder}/*.md")
    )
)
LOG = sorted((ROOT / "results" / "log").glob("20*.md"))

# What the glossary has to define, each once.
WORDS = """
    tier, device, host, disk, pretend device, placement, policy, device batch, block, pass, slot, stream,
    weights, KV cache, activations, prefix cache, continuous batching, log-sum-exp, profile, constraint,
    front end, minimum detectable effect, peak memory, format, schedule, journal, manifest, measured,
    simulated, projected
"""

# Options of HELM's own programs, of pip and of the benchmarks, which the documents name, too.
OF_OTHERS = {"--auto-generate-schema", "--export-path", "--num-threads", "--no-deps", "--demo"}

# Words that have made way for the field's own; "tiny random twin" is the architecture check's.
OLD_WORDS = re.compile(
    r"\b(doors?|seats?|seated|fed|feeds|wishes|rooms?|riders?|so many|held at most|in short|fed_tokens)\b"
    r"|(?<!random )\btwins?\b(?!\.py)",
    re.IGNORECASE,
)


def read(document: str) -> str:
    return (ROOT / document).read_text()


def prose(document: str) -> str:
    """A document without its code blocks and inline code."""
    return re.sub(r"```.*?```|`[^`\n]*`", "", read(document), flags=re.S)


def commands(document: str) -> list[list[str]]:
    """The arguments of every whole run_helm.py command in a document."""
    text = read(document).replace("\\\n", " ")
    found = re.findall(r"(?:^|`)(?:\.venv/bin/)?python run_helm\.py ?([^`\n]*)", text, re.MULTILINE)
    return [shlex.split(arguments, comments=True) for arguments in found if "..." not in arguments]


def links(document: str) -> Iterator[tuple[Path, str]]:
    """The file and the anchor, maybe empty, of every link of a document to another file or place of ours."""
    source = ROOT / document
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", read(document)):
        path, _, anchor = target.partition("#")
        yield (source.parent / path if path else source), anchor


def anchors(text: str) -> set[str]:
    """The places that a Markdown file's headings can be linked by."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_named_files_exist(document: str) -> None:
    for path, _ in links(document):
        assert path.exists(), f"{document} links to {path}"
    paths = re.findall(r"`((?:engine|harness|scenarios|tests|docs|benchmarks)/[\w./*-]+)`", read(document))
    for path in {*paths} - {"scenarios/sentiment.py"}:
        assert list(ROOT.glob(path)), f"{document} names {path}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_linked_headings_exist(document: str) -> None:
    for path, anchor in links(document):
        if anchor:
            assert anchor in anchors(path.read_text()), f"{document} links to {path}#{anchor}"


def test_tree_of_the_readme_exists() -> None:
    tree = read("README.md").split("## How it works")[1].split("```")[1]
    folder = ROOT
    for line in tree.strip().splitlines():
        indent = len(line) - len(line.lstrip())
        if indent > 4:
            continue  # the rest of a description
        names = re.split(r"\s{2,}| (?=[a-z]+ )", line.strip())[0].split(", ")
        base = ROOT if indent == 0 else folder
        for name in re.findall(r"\b[a-z_]+/", line):
            places = (base / name, base / names[0] / name)
            assert any(place.is_dir() for place in places), (
                f"the README's tree names {name} beside {names[0]}"
            )
        for name in names:
            assert list(base.glob(name.rstrip("/"))), f"the README's tree names {base / name}"
        if indent == 0 and names[0].endswith("/"):
            folder = ROOT / names[0]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_are_understood(document: str) -> None:
    for arguments in commands(document):
        if "--help" in arguments:
            continue
        args = build_parser().parse_args(arguments or ["run"])
        given = getattr(args, "policy", [])
        for policy in [given] if isinstance(given, str) else given or []:
            name, _, changes = policy.partition(",")
            if "=" in policy:
                Policy.parse(policy if "=" in name else changes)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_named_scripts_exist(document: str) -> None:
    text = read(document).replace("\\\n", " ")
    scripts = re.findall(r"python (?!run_helm)([\w/]+\.py)", text)
    for script in {*scripts} - {"scenarios/sentiment.py"}:
        assert (ROOT / script).is_file(), f"{document} runs {script}"


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    """Every option of a parser and of its subcommands."""
    found = {name for action in parser._actions for name in action.option_strings}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for subparser in action.choices.values():
                found |= options_of(subparser)
    return found


@pytest.mark.parametrize("document", sorted({*DOCUMENTS} - {"benchmarks/README.md", "results/log/README.md"}))
def test_named_options_exist(document: str) -> None:
    text = re.sub(r"```.*?```", "", read(document), flags=re.S)
    named = {
        option
        for code in re.findall(r"`([^`\n]*)`", text)
        for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", code)
    }
    unknown = named - options_of(build_parser()) - OF_OTHERS
    assert not unknown, f"{document} names {', '.join(sorted(unknown))}"


def test_scripts_of_the_benchmarks_exist() -> None:
    for script in {*re.findall(r"`(\w+\.py)\b", read("benchmarks/README.md"))} - {"run_helm.py"}:
        assert (ROOT / "benchmarks" / script).is_file(), f"benchmarks/README.md names {script}"


def test_readme_has_commands_to_try() -> None:
    assert len(commands("README.md")) >= 4


def test_readme_is_read_in_one_sitting() -> None:
    assert len(read("README.md").splitlines()) <= 160


@pytest.mark.parametrize("page", PAGES)
def test_page_begins_with_what_the_reader_wants_and_a_command(page: str) -> None:
    title, want, *rest = re.split(r"\n\n+", read(page))
    assert re.fullmatch(r"# \S.*", title), f"{page} begins with a title"
    assert want.startswith("You want "), f"{page} says first what its reader wants"
    first_block = "\n\n".join([want, *rest]).split("```")[1]
    assert re.search(r"^(\.venv/bin/|PYTHONPATH=\. )?(python|make) ", first_block, re.M), page
    assert read(page).split("```")[0].count("\n") <= 15, f"{page} has a command on its first screen"


def test_site_has_every_page_once() -> None:
    site = yaml.safe_load(read("mkdocs.yml"))
    pages = [
        page
        for section in site["nav"]
        for part in section.values()
        for item in part
        for page in item.values()
    ]
    assert sorted(f"docs/{page}" for page in pages) == list(PAGES)
    assert site["strict"] is True
    assert site["theme"]["font"] is False


@pytest.mark.parametrize("page", PAGES)
def test_index_names_every_page(page: str) -> None:
    assert page == "docs/index.md" or f"]({Path(page).name})" in read("docs/index.md")


def test_glossary_defines_each_word_once() -> None:
    rows = re.findall(r"^\| \*\*(.+?)\*\*", read("docs/glossary.md"), re.M)
    defined = [word.strip() for row in rows for word in row.split(",")]
    assert len(defined) == len(set(defined))
    assert {word.strip() for word in WORDS.split(",")} <= set(defined)


@pytest.mark.parametrize("document", sorted({*DOCUMENTS, *TABLES} - {"CHANGELOG.md"}))
def test_words_are_the_field_s(document: str) -> None:
    found = OLD_WORDS.search(prose(document))
    assert found is None, f"{document}: {found[0]}"


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_current(name: str) -> None:
    assert (FOLDER / name).read_text() == PICTURES[name](), f"{name} is stale: run `make pictures`"


def test_every_picture_is_drawn_by_the_script() -> None:
    assert {path.name for path in FOLDER.iterdir()} == set(PICTURES)


def test_measured_rows_of_the_readme_are_the_committed_ones() -> None:
    assert measured_table() in read("README.md"), "run `make pictures`"


def test_fields_of_a_batch_file_are_those_of_the_code() -> None:
    assert batch_fields() in read("docs/front_ends.md"), "run `make pictures`"


def test_log_has_a_line_for_each_entry() -> None:
    table = re.findall(r"^\| \[(.*?)\]\((20[\d-]+\.md)#(.*?)\) \|", read("results/log/README.md"), re.M)
    entries = [
        (entry[:10], path.name, next(iter(anchors(f"## {entry}"))))
        for path in reversed(LOG)
        for entry in re.findall(r"^## (20.*)$", path.read_text(), re.M)
    ]
    assert table == entries
    assert all(date.startswith(file.removesuffix(".md")) for date, file, _ in table)
    assert len(table) >= 72


def test_citation_and_changelog_name_the_version() -> None:
    version = machine.VERSION
    citation = yaml.safe_load(read("CITATION.cff"))
    assert citation["version"] == version
    assert citation["references"][0]["title"].startswith("FlexGen")
    assert version in read("CHANGELOG.md")


def test_documentation_s_tools_are_pinned() -> None:
    lines = [line for line in read("requirements-docs.lock").splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    assert any(line.startswith("mkdocs-material==") for line in lines)


def test_scenario_of_the_contributing_guide_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    block = re.search(
        r"```python\n# scenarios/sentiment\.py\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.S
    )
    assert block is not None
    plugin = tmp_path / "sentiment.py"
    plugin.write_text(block[1])
    monkeypatch.chdir(tmp_path)
    arguments = ["run", "--plugins", str(plugin), "--run-entries", "sentiment", "-m", "3", "--dry-run"]
    assert main([*arguments, "--policy", "resident", "-o", str(tmp_path / "results")]) == 0
    assert "sentiment: 3, 3," in capsys.readouterr().out

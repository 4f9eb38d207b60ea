"""Refuses code that no longer fits in a reader's head: too many files, lines, parameters, circles of imports.

Run as a script by ``make check``. Data, lock files and stored results are not counted; tests and benchmarks
are held to the length of files alone. A limit may be passed only by what is named here, with its reason.
"""

from __future__ import annotations

import ast
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

FILE_LINES = 400
FOLDER_FILES = 12
FUNCTION_LINES = 60
PARAMETERS = 7

COUNTED = {".py", ".c", ".h", ".cu", ".md", ".toml", ".yaml", ".conf", ".css", ".js", ".sh", ""}
LEFT_OUT = {"results", "site", "build", "dist", "prod_env", "benchmark_output", "LICENSE"}
PACKAGES = ("engine", "harness", "scenarios")

LARGE_FOLDERS = {
    "harness/commands": "a file per subcommand",
    "engine/spec": "a file per noun",
}
LONG_FUNCTIONS: dict[str, str] = {}
WIDE_FUNCTIONS = {
    "engine/kernels/cuda/attention.py:attend": "a Triton kernel: what is launched takes pointers and strides",
    "engine/kernels/cuda/triton_kernels.py:unpack": "a Triton kernel",
    "engine/kernels/cuda/triton_kernels.py:pack": "a Triton kernel",
    "engine/kernels/cuda/triton_kernels.py:matmul": "a Triton kernel",
}


def counted_files(root: Path) -> Iterator[Path]:
    """Every file below root whose length is limited; hidden folders are skipped, save .ci."""
    for path in sorted(root.iterdir()):
        if path.name in LEFT_OUT or (path.name.startswith(".") and path.name != ".ci"):
            continue
        if path.is_dir() and not path.is_symlink():
            yield from counted_files(path)
        elif path.is_file() and path.suffix in COUNTED:
            yield path


def long_files(root: Path) -> Iterator[str]:
    """A line for every file of more than `FILE_LINES` lines."""
    for path in counted_files(root):
        length = len(path.read_text(encoding="utf-8", errors="replace").splitlines())
        if length > FILE_LINES:
            yield f"{path.relative_to(root)}: {length} lines, limit {FILE_LINES}: cut it in two"


def full_folders(sources: Iterable[str]) -> Iterator[str]:
    """A line for every folder of more than `FOLDER_FILES` modules; packages' ``__init__.py`` do not count."""
    modules = (path for path in sources if not path.endswith("__init__.py"))
    for folder, count in sorted(Counter(str(Path(path).parent) for path in modules).items()):
        if count > FOLDER_FILES and folder not in LARGE_FOLDERS:
            yield f"{folder}: {count} Python files, limit {FOLDER_FILES}: make folders in it"


def large_functions(sources: Mapping[str, ast.Module]) -> Iterator[str]:
    """A line for every function that is too long or takes too much; self and cls do not count."""
    found: set[str] = set()
    named = {f"{name} lines" for name in LONG_FUNCTIONS} | {f"{name} parameters" for name in WIDE_FUNCTIONS}
    for path, tree in sources.items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            name = f"{path}:{node.name}"
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            taken = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            count = sum(parameter.arg not in ("self", "cls") for parameter in taken)
            for value, limit, what in ((lines, FUNCTION_LINES, "lines"), (count, PARAMETERS, "parameters")):
                if value > limit and f"{name} {what}" in named:
                    found.add(f"{name} {what}")
                elif value > limit:
                    yield f"{path}:{node.lineno} {node.name}: {value} {what}, limit {limit}"
    for name in sorted(named - found):
        yield f"{name}: an exception that nothing needs any more: take it out of {Path(__file__).name}"


def shapeless_functions(sources: Mapping[str, ast.Module], texts: Mapping[str, str]) -> Iterator[str]:
    """A line for every public function of the engine that takes a tensor and states no shape."""
    for path, tree in sources.items():
        if not path.startswith("engine/"):
            continue
        holders = [
            tree,
            *(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name[0] != "_"),
        ]
        functions = (node for holder in holders for node in holder.body if isinstance(node, ast.FunctionDef))
        for node in functions:
            kinds = [
                ast.unparse(a.annotation) for a in (*node.args.args, *node.args.kwonlyargs) if a.annotation
            ]
            if node.name.startswith("_") or not any(re.search(r"\bTensor\b", kind) for kind in kinds):
                continue
            head = "\n".join(texts[path].splitlines()[node.lineno - 1 : node.body[0].lineno - 1])
            if not re.search(r"\[[\w ,+*./()-]+\]", ast.get_docstring(node) or "") and not re.search(
                r"#.*\[", head
            ):
                yield f"{path}:{node.lineno} {node.name}: takes a tensor and states no shape, as [S, H, E]"


def module_name(path: str) -> str:
    """The dotted name of a source file."""
    return path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")


def imports_of(path: str, tree: ast.Module, known: set[str]) -> set[str]:
    """Our modules that a module imports anywhere: at its top, for type checkers, inside functions."""
    name = module_name(path)
    package = name.split(".") if path.endswith("__init__.py") else name.split(".")[:-1]
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*parts, *([node.module] if node.module else [])])
            found.update({base, *(f"{base}.{alias.name}" for alias in node.names)})
    return (found & known) - {name}


def circles(graph: Mapping[str, set[str]]) -> Iterator[list[str]]:
    """Groups of modules that import each other, directly or by way of others."""
    reached: dict[str, set[str]] = defaultdict(set)
    for start in graph:
        waiting = [start]
        while waiting:
            for module in graph[waiting.pop()] - reached[start]:
                reached[start].add(module)
                waiting.append(module)
    grouped: set[str] = set()
    for module in sorted(graph):
        if module not in grouped and module in reached[module]:
            group = [
                other for other in sorted(graph) if other in reached[module] and module in reached[other]
            ]
            grouped.update(group)
            yield group


def violations(root: Path) -> list[str]:
    """A line for everything below root that passes a limit."""
    paths = [path for package in PACKAGES for path in sorted((root / package).rglob("*.py"))]
    texts = {str(path.relative_to(root)): path.read_text(encoding="utf-8") for path in paths}
    sources = {path: ast.parse(text) for path, text in texts.items()}
    known = {module_name(path) for path in sources}
    graph = {module_name(path): imports_of(path, tree, known) for path, tree in sources.items()}
    rings = [f"imports in a circle: {', '.join(ring)}" for ring in circles(graph)]
    lines = [*long_files(root), *full_folders(sources), *large_functions(sources), *rings]
    return [*lines, *shapeless_functions(sources, texts)]


def main() -> int:
    """Print what passes a limit; exit code 1 if anything does."""
    found = violations(Path(__file__).resolve().parent.parent)
    print(
        "\n".join(found)
        or "within every limit: files, folders, functions, parameters, imports; every shape is stated"
    )
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

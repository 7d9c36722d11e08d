"""Imports go in one direction, every file says what it is for, and none grows past reading."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "agatool"
LONGEST = 600  # lines

# docs/architecture.md, from the bottom up: a file imports from its own row or from rows above it.
ROWS = (
    "errors",
    "files console config metrics",
    "data.images data.figure data.captioning data.rendering foreign page machine",
    "tokenization data.annotations data.synthetic model report",
    "data.prepare masking checkpoint captions charts heatmaps mask_figures run_files",
    "data.word_classes data.sampling convert encoding html_report localisation runs",
    "objective interop retrieval",
    "train enriching hint",
    "cost ablation attention compare_masks compare_runs truth index",
    "enrich indexing",
    "search",
    "results",
    "serve visualizing",
    "options",
    "commands",
    "cli",
    "__main__",
)
# These start at once or are used where nothing is computed.
TORCHLESS = """
errors files console config metrics runs tokenization data.annotations data.prepare data.synthetic
report page charts heatmaps html_report mask_figures run_files compare_runs
"""
LEVEL = {name: level for level, row in enumerate(ROWS) for name in row.split()}
# `agatool.load` opens a reference checkpoint too; the import is inside the function.
UPWARD = {("checkpoint", "convert")}


def name_of(file: Path) -> str:
    return ".".join(file.relative_to(PACKAGE).with_suffix("").parts)


FILES = {name_of(file): file for file in sorted(PACKAGE.rglob("*.py"))}
MODULES = {name: file for name, file in FILES.items() if not name.endswith("__init__")}


@cache
def imported(file: Path) -> list[tuple[str, bool]]:
    """(module, whether at import time) of every import but those for types; ours without the package's name."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    lazy = {id(inner) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) for inner in ast.walk(node)}
    typing = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found = []
    for node in ast.walk(tree):
        if id(node) in typing:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name.removeprefix("agatool.") in MODULES else str(node.module) for name in inside]
        else:
            continue
        found += [(name.removeprefix("agatool."), id(node) not in lazy) for name in names]
    return found


def ours(file: Path) -> set[str]:
    return {name for name, _ in imported(file) if name in MODULES}


@cache
def reached(name: str) -> set[str]:
    """All modules of the package that come along when `name` is imported."""
    seen: set[str] = set()
    waiting = [name]
    while waiting:
        current = waiting.pop()
        if current not in seen:
            seen.add(current)
            waiting += [other for other, now in imported(MODULES[current]) if now and other in MODULES]
    return seen


def foreign(name: str) -> set[str]:
    """Libraries that come along when `name` is imported."""
    libraries = [other for module in reached(name) for other, now in imported(MODULES[module]) if now]
    return {library.partition(".")[0] for library in libraries if library not in {*MODULES, "agatool"}}


def test_every_file_has_its_place() -> None:
    assert set(MODULES) - set(LEVEL) == set(), "give new files a row in ROWS and in docs/architecture.md"


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_one_way(name: str) -> None:
    upward = {other for other in ours(MODULES[name]) if LEVEL[other] > LEVEL[name]}
    assert {(name, other) for other in upward} <= UPWARD


def test_no_circles() -> None:
    for name, file in MODULES.items():
        for other in (other for other, now in imported(file) if now and other in MODULES):
            assert name not in reached(other), f"{name} imports {other}, which imports {name}"


def test_nobody_imports_the_command_line() -> None:
    assert {name for name, file in MODULES.items() if "cli" in ours(file)} == {"__main__"}


def test_commands_are_imported_by_the_command_line_alone() -> None:
    commands = {"cost", "ablation", "compare_masks", "compare_runs", "enrich", "serve"}  # attention, search: serve too
    for name, file in MODULES.items():
        assert name in ("cli", "commands") or not ours(file) & commands, name


def test_the_command_line_imports_lightly() -> None:
    assert foreign("cli") | foreign("options") | foreign("commands") <= {
        "__future__",
        "collections",
        "enum",
        "functools",
        "os",
        "pathlib",
        "sys",
        "typing",
        "typer",
    }
    assert reached("cli") <= {"cli", "options", "commands", "errors"}


@pytest.mark.parametrize("name", ["__init__", "data.__init__"])
def test_importing_the_package_imports_no_torch(name: str) -> None:
    libraries = {library.partition(".")[0] for library, now in imported(FILES[name]) if now}
    assert libraries <= {"__future__", "importlib", "typing"}


def test_the_model_knows_nothing_but_its_configuration() -> None:
    assert ours(MODULES["model"]) == {"config"}
    assert foreign("model") & {"transformers", "tokenizers", "pandas", "PIL", "matplotlib", "rich"} == set()


@pytest.mark.parametrize("name", TORCHLESS.split())
def test_what_needs_no_torch_does_not_import_it(name: str) -> None:
    assert foreign(name) & {"torch", "timm", "torchvision", "transformers"} == set()


def test_only_the_console_uses_rich() -> None:
    users = {name for name, file in MODULES.items() for library, _ in imported(file) if library.startswith("rich")}
    assert users <= {"console", "cli"}  # cli draws the overview that must come up at once


@pytest.mark.parametrize("name", FILES)
def test_every_file_says_what_it_is_for(name: str) -> None:
    source = FILES[name].read_text(encoding="utf-8")
    docstring = ast.get_docstring(ast.parse(source))
    assert docstring, "the first statement is a docstring"
    first = docstring.splitlines()[0]
    assert source.startswith(('"""', 'r"""'))
    assert first.endswith((".", "...", ":"))
    assert len(source.splitlines()) <= LONGEST


def test_there_is_no_drawer_for_everything() -> None:
    assert {"utils", "util", "helpers", "common", "misc"} & {name.rpartition(".")[2] for name in MODULES} == set()

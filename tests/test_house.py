"""The rules of the house that no other tool checks: sizes, and nothing that binds to a machine."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

from worker.config import Settings

ROOT = Path(__file__).parent.parent
ROOMS = sorted((ROOT / "worker").rglob("*.py"))
LONGEST_FUNCTION = 40
LARGEST_ROOM = 300

SETTINGS = ROOT / "docs" / "settings.md"
SETTINGS_HEAD = """# Settings

Made from the code: `python -m tests.test_house` writes this page anew.

A value is taken from the environment; else from a file `.env` in the working directory; else from a
file called like the setting in the directory that `POSTROOM_SECRETS_DIR` names
(`/run/secrets/postroom_redis_url`). What ends in `_FILE` names a file that is read anew whenever it
is needed, so that a changed secret is taken up without a restart. Durations: `90s`, `5min`, `24h`,
`30d`; a bare number is seconds. `postroom doctor` names what is missing, wrong or misspelt.

"""

#: Written so that this file does not match.
REGISTRIES = re.compile(r"pypi\.org|pythonhosted\.org|registry\.npmjs|npmjs\.com|index-url[ =]")
MACHINE_PATHS = re.compile(r"(?<![\w.])[/](work|root|opt/pypi|tmp/v|home/\w+)/")
LOCK_FILES = {"uv.lock", "poetry.lock", "package-lock.json", "yarn.lock", "Pipfile.lock"}


def test_no_function_is_longer_than_a_screen() -> None:
    """A function of more than 40 lines does two things."""
    too_long = [
        f"{room.relative_to(ROOT)}:{function.lineno} {function.name}: {length} lines"
        for room in ROOMS
        for function in functions(ast.parse(room.read_text()))
        if (length := len(code_lines(function))) > LONGEST_FUNCTION
    ]

    assert too_long == []


def test_no_room_is_too_large() -> None:
    """A room of more than 300 lines of code becomes a package of smaller ones."""
    too_large = [
        f"{room.relative_to(ROOT)}: {length} lines"
        for room in ROOMS
        if (length := code_size(room.read_text())) > LARGEST_ROOM
    ]

    assert too_large == []


def test_no_file_names_a_registry_or_a_path_of_one_machine() -> None:
    """The project installs from whatever registry a machine is set up for, at any place."""
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in our_files()
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
        if REGISTRIES.search(line.replace("--no-emit-index-url", "")) or MACHINE_PATHS.search(line)
    ]

    assert found == []


def test_no_lock_file_is_kept() -> None:
    """Lock files hold the addresses of a registry; requirements/ holds hashes only."""
    assert [path for path in our_files() if path.name in LOCK_FILES] == []


def test_every_pinned_requirement_has_the_hashes_of_all_its_files() -> None:
    """One hash alone would be that of a file which only one kind of machine can use."""
    for pins in sorted((ROOT / "requirements").glob("*.txt")):
        entries = pins.read_text().replace("\\\n", " ").splitlines()
        poor = [line.split()[0] for line in entries if line.count("--hash=sha256:") < 2]

        assert entries
        assert poor == [], pins.name


def test_the_document_of_settings_has_every_setting_as_the_code_has_it() -> None:
    """It is made from the code: python -m tests.test_house writes it anew."""
    assert SETTINGS.read_text() == settings_document()


def settings_document() -> str:
    """docs/settings.md: where values come from, and the table."""
    return SETTINGS_HEAD + settings_table()


def settings_table() -> str:
    """The settings: name, default, meaning."""
    lines = ["| setting | default | |", "| --- | --- | --- |"]
    for name, field in Settings.model_fields.items():
        default = field.get_default(call_default_factory=True)
        lines.append(f"| `POSTROOM_{name.upper()}` | {shown(default)} | {field.description} |")
    return "\n".join(lines) + "\n"


def shown(default: object) -> str:
    """A default as one would write it."""
    match default:
        case None | {} | frozenset():
            return ""
        case timedelta():
            seconds = int(default.total_seconds())
            return f"`{seconds // 3600}h`" if seconds % 3600 == 0 else f"`{seconds}s`"
        case _:
            return f"`{default}`"


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def code_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> range:
    """The lines of a function, from `def` on, without its docstring's."""
    docstring = ast.get_docstring(node, clean=False)
    documented = len(docstring.splitlines()) if docstring else 0
    return range(node.lineno, (node.end_lineno or node.lineno) + 1 - documented)


def code_size(source: str) -> int:
    """Lines that are neither blank, nor a comment, nor part of a docstring."""
    documented: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            documented.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = enumerate(source.splitlines(), 1)
    return sum(
        1
        for number, line in lines
        if line.strip() and not line.strip().startswith("#") and number not in documented
    )


def our_files() -> Iterator[Path]:
    """Every file of the project, found without git: a copy has to pass as well."""
    for path in sorted(ROOT.rglob("*")):
        parts = path.relative_to(ROOT).parts
        hidden = any(part.startswith(".") and part not in {".ci", ".gitignore"} for part in parts)
        made = {"__pycache__", "build", "dist", "node_modules"} & set(parts)
        if path.is_file() and not hidden and not made:
            yield path


if __name__ == "__main__":
    SETTINGS.write_text(settings_document())

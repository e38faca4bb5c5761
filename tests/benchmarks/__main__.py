"""`./dev bench [NAME] [ARGS]`: runs one benchmark; without a name, that of all side by side.

`./dev bench list` lists them, `./dev bench quick` is short.
"""

from __future__ import annotations

import ast
import sys
from importlib import import_module
from pathlib import Path

BENCHES = {
    path.stem.removeprefix("bench_"): path
    for path in sorted(Path(__file__).parent.glob("bench_*"))
    if path.suffix == ".py" or (path / "__init__.py").exists()
}


def main(words: list[str]) -> int:
    """The exit status of the benchmark that the first word names."""
    if not words or words[0] == "quick" or words[0].startswith("--"):
        words = ["side", *words]
    name = words[0]
    if name not in BENCHES:
        print("\n".join(f"{one:12} {about(path)}" for one, path in BENCHES.items()))
        return 2
    return int(import_module(f"tests.benchmarks.bench_{name}").main(words[1:]) or 0)


def about(path: Path) -> str:
    """The first line of a module's docstring."""
    source = path if path.suffix == ".py" else path / "__init__.py"
    return (ast.get_docstring(ast.parse(source.read_text())) or "").partition("\n")[0]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

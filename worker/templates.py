"""Templates: Jinja2 in its sandbox, autoescaped in HTML, strict about missing variables.

A batch carries its template once, each message its variables only; the door checks the rows
against it, the lane renders them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from typing import Any, Literal

from jinja2 import StrictUndefined, TemplateSyntaxError, UndefinedError, meta, nodes
from jinja2 import Template as JinjaTemplate
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

MOST_SUBJECT = 255  # characters
MOST_BODY = 1_000_000  # bytes in UTF-8

Part = Literal["subject", "html", "text"]
PARTS: tuple[Part, ...] = ("subject", "html", "text")

#: What a template without a decision is made of: there, missing names are missing variables.
_PLAIN = (nodes.Template, nodes.Output, nodes.TemplateData, nodes.Name)
_LOADERS = (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)


class TemplateProblem(Exception):
    """A template, or one rendering of it, is refused."""

    def __init__(self, code: str, path: str, detail: str) -> None:
        super().__init__(f"{path}: {detail}")
        self.code = code
        self.path = path
        self.detail = detail


@dataclass(frozen=True, slots=True)
class Rendered:
    """Subject and bodies as they go to Graph."""

    subject: str
    html: str | None
    text: str | None


class _Sandbox(ImmutableSandboxedEnvironment):
    """Also refuses arithmetic that fills memory: `'a' * 10**9`."""

    intercepted_binops = frozenset(["*", "**"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        numbers = isinstance(left, int | float) and isinstance(right, int | float)
        limit = 100 if operator == "**" else 10**12
        if not numbers or abs(left) > limit or abs(right) > limit:
            raise SecurityError(f"{operator} is for small numbers")
        return super().call_binop(context, operator, left, right)


def _sandbox(autoescape: bool) -> _Sandbox:
    # StrictUndefined: an absent variable is an error, never an empty place in a letter.
    return _Sandbox(autoescape=autoescape, undefined=StrictUndefined, keep_trailing_newline=True)


_HTML, _TEXT = _sandbox(True), _sandbox(False)


class Compiled:
    """A template, ready to render. Raises TemplateProblem where its source is wrong."""

    def __init__(self, subject: str, html: str | None, text: str | None) -> None:
        sources: dict[Part, str | None] = {"subject": subject, "html": html, "text": text}
        self._parts: dict[Part, JinjaTemplate] = {}
        self._plain = True
        needed: dict[str, Part] = {}  # name → the part that asks for it first
        for part, source in sources.items():
            if source is None:
                continue
            self._parts[part], tree = _compile(part, source)
            # Each rendering makes a copy, and Jinja2's own mapping is slow to copy.
            self._parts[part].globals = dict(self._parts[part].globals)
            asked = meta.find_undeclared_variables(tree) - _TEXT.globals.keys()
            needed |= dict.fromkeys(asked - needed.keys(), part)
            self._plain &= all(isinstance(n, _PLAIN) for n in _walk(tree))
        self._asked = needed
        self.variables: frozenset[str] = frozenset(needed)  #: all names that it may ask for
        # Below this no variables can make the subject too long: rendering is not needed.
        self._slack = MOST_SUBJECT - len(subject)

    def check(self, variables: Mapping[str, Any], *, own_subject: bool = False) -> None:
        """Raises TemplateProblem if this row cannot be rendered.

        A template without decisions needs a look at the names only; any other is rendered, to be
        exact about which variables it needs.
        """
        if self._plain:
            for name, part in self._asked.items():
                if name not in variables:
                    raise missing(name, f"template.{part}")
            texts = sum(len(str(variables[name])) for name in self.variables)
            if texts <= self._slack:
                return
        self.render(variables, "" if own_subject else None)

    def unused(self, variables: Mapping[str, Any]) -> list[TemplateProblem]:
        """What was given and is never asked for: most often a name that was misspelt."""
        if variables.keys() <= self.variables:
            return []
        return [_unused(name, self.variables) for name in variables if name not in self.variables]

    def render(self, variables: Mapping[str, Any], subject: str | None = None) -> Rendered:
        """Fills all parts; `subject`, where given, stands as it is in place of the template's."""
        shown = {part: self._render(part, variables) for part in self._parts
                 if part != "subject" or subject is None}  # fmt: skip
        # A line break in a variable must not make another header line.
        line = subject if subject is not None else " ".join(shown["subject"].split())
        if len(line) > MOST_SUBJECT:
            detail = f"subject has {len(line)} characters, most is {MOST_SUBJECT}"
            raise TemplateProblem("SUBJECT_LEN", "template.subject", detail)
        return Rendered(line, shown.get("html"), shown.get("text"))

    def _render(self, part: Part, variables: Mapping[str, Any]) -> str:
        path = f"template.{part}"
        try:
            text = self._parts[part].render(variables)
        except UndefinedError as error:
            raise missing(_name_in(error), path) from None
        except SecurityError as error:
            raise TemplateProblem("TPL_UNSAFE", path, _short(error)) from None
        except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError,
                MemoryError, RecursionError) as error:  # fmt: skip
            raise TemplateProblem("TPL_RENDER", path, type(error).__name__) from None
        if len(text) * 4 > MOST_BODY and len(text.encode(errors="replace")) > MOST_BODY:
            detail = f"is longer than {MOST_BODY / 1e6:.1f} MB"
            raise TemplateProblem("BODY_LEN", path, detail)
        return text


def missing(name: str, path: str) -> TemplateProblem:
    """The problem of a row that lacks a variable."""
    return TemplateProblem("TPL_VAR_MISSING", path, f'variable "{name[:64]}" is missing')


def _unused(name: str, known: frozenset[str]) -> TemplateProblem:
    close = get_close_matches(name[:64], known, 1)
    hint = f' (did you mean "{close[0]}"?)' if close else ""
    shown = name if name.isidentifier() and len(name) <= 48 else ascii(name[:8])
    return TemplateProblem("TPL_VAR_EXTRA", "variables", f"template does not use {shown}{hint}")


def compiled(template: Mapping[str, Any]) -> Compiled:
    """The template `{"subject", "html"?, "text"?}`, compiled; the last 64 are remembered."""
    return _remembered(template["subject"], template.get("html"), template.get("text"))


def render(template: Mapping[str, Any] | None, content: Mapping[str, Any]) -> Rendered:
    """What one message says. Raises TemplateProblem."""
    if template is None:
        return Rendered(content.get("subject") or "", content.get("html"), content.get("text"))
    return compiled(template).render(content.get("variables") or {}, content.get("subject"))


@lru_cache(maxsize=64)
def _remembered(subject: str, html: str | None, text: str | None) -> Compiled:
    return Compiled(subject, html, text)


def _compile(part: Part, source: str) -> tuple[JinjaTemplate, nodes.Template]:
    path = f"template.{part}"
    sandbox = _HTML if part == "html" else _TEXT
    try:
        tree = sandbox.parse(source)
        loaded = next((n for n in _walk(tree) if isinstance(n, _LOADERS)), None)
        if loaded is not None:
            detail = f"line {loaded.lineno}: {type(loaded).__name__.lower()} is not available"
            raise TemplateProblem("TPL_SYNTAX", path, detail)
        return sandbox.from_string(source), tree
    except TemplateSyntaxError as error:
        raise TemplateProblem("TPL_SYNTAX", path, f"line {error.lineno}: {_short(error)}") from None
    except (RecursionError, MemoryError, SyntaxError, ValueError, OverflowError) as error:
        # Jinja2 lets Python's own compiler speak for some sources: nested too deeply.
        raise TemplateProblem("TPL_SYNTAX", path, type(error).__name__) from None


def _walk(tree: nodes.Node) -> list[nodes.Node]:
    found: list[nodes.Node] = [tree]
    for node in found:
        found.extend(node.iter_child_nodes())
    return found


def _name_in(error: UndefinedError) -> str:
    """The name in `'x' is undefined`, or the whole text where Jinja2 says something else."""
    text = error.message or ""
    return text.split("'")[1] if text.startswith("'") and text.count("'") >= 2 else text


def _short(error: TemplateError) -> str:
    return " ".join((error.message or type(error).__name__).split())[:200]

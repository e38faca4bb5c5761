"""Templates: strict, escaped, and shut in."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker import templates
from worker.templates import TemplateProblem


def refused(
    source: str, variables: dict[str, Any] | None = None, part: str = "text"
) -> TemplateProblem:
    template = {"subject": "s", "text": "t", part: source}
    with pytest.raises(TemplateProblem) as caught:
        templates.compiled(template).check(variables or {})
    return caught.value


def test_html_is_escaped_and_subject_and_text_are_not():
    """A name with an ampersand reads right in all three."""
    template = {"subject": "{{ a }}", "html": "<b>{{ a }}</b>", "text": "{{ a }}"}
    shown = templates.render(template, {"variables": {"a": "R&D <x>"}})
    assert shown.subject == shown.text == "R&D <x>"
    assert shown.html == "<b>R&amp;D &lt;x&gt;</b>"


def test_a_missing_variable_is_named():
    """In a plain template by a look at the names, in another by rendering it."""
    assert refused("{{ amount }}").detail == 'variable "amount" is missing'
    assert refused("{% if a %}{{ amount }}{% endif %}", {"a": 1}).code == "TPL_VAR_MISSING"
    assert "amount" in refused("{% if a %}{{ amount }}{% endif %}", {"a": 1}).detail


def test_a_variable_that_a_decision_leaves_out_is_not_missed():
    """Exact, not merely careful: the row can be rendered, so it is accepted."""
    template = {"subject": "s", "text": "{% if a %}{{ b }}{% endif %}{{ c | default('x') }}"}
    templates.compiled(template).check({"a": 0, "surplus": 1})


def test_a_line_break_in_a_variable_does_not_break_the_subject():
    """It is folded into a space."""
    template = {"subject": "Hello {{ name }}", "text": "x"}
    shown = templates.render(template, {"variables": {"name": "Ann\r\nBcc: x@example.com"}})
    assert shown.subject == "Hello Ann Bcc: x@example.com"


def test_a_subject_that_variables_make_too_long_is_refused():
    """At the door, although a plain template is not rendered there."""
    template = {"subject": "{{ name }}", "text": "x"}
    templates.compiled(template).check({"name": "x" * 255})
    with pytest.raises(TemplateProblem, match="256 characters"):
        templates.compiled(template).check({"name": "x" * 256})


def test_a_message_s_own_subject_stands_as_it_is():
    """It is text, not a template."""
    shown = templates.render(
        {"subject": "{{ name }}", "text": "x"}, {"subject": "{{ mine }}", "variables": {}}
    )
    assert shown.subject == "{{ mine }}"


def test_a_message_without_template_is_shown_as_it_was_given():
    """Braces in plain bodies are braces."""
    shown = templates.render(None, {"subject": "{{ x }}", "html": "{{ y }}"})
    assert (shown.subject, shown.html, shown.text) == ("{{ x }}", "{{ y }}", None)


@pytest.mark.parametrize(
    "source",
    ["{{ a", "{% if %}", "{% nope %}", "{{ a | nope }}", "{% include 'x' %}", "{% extends 'x' %}",
     "{% import 'x' as y %}", "{{ " + "(" * 500 + "1" + ")" * 500 + " }}"],
)  # fmt: skip
def test_a_template_that_is_wrong_is_refused_before_any_row(source: str):
    """One problem for the call, not one for each row."""
    assert refused(source).code == "TPL_SYNTAX"


@pytest.mark.parametrize(
    "source",
    ["{{ ''.__class__.__mro__ }}", "{{ a.append(1) }}", "{{ 'x' * 10**9 }}", "{{ 9**9**9 }}",
     "{% for i in range(10**9) %}{% endfor %}", "{{ '{0.__class__}'.format(a) }}",
     "{{ a | attr('__class__') }}", "{{ cycler.__init__.__globals__.os }}"],
)  # fmt: skip
def test_the_sandbox_holds(source: str):
    """Neither Python's insides nor a full memory can be had from a template."""
    assert refused(source, {"a": []}).code in {"TPL_UNSAFE", "TPL_RENDER", "TPL_VAR_MISSING"}


SOURCES = st.text("{}%|.()[]'\"*+-<>=ab10 \n", max_size=60)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda of: st.lists(of, max_size=3) | st.dictionaries(st.text(max_size=3), of, max_size=3),
    max_leaves=5,
)


@given(SOURCES, SOURCES, st.dictionaries(st.sampled_from("ab"), VALUES))
def test_no_template_and_no_variables_raise_anything_else(
    subject: str, html: str, variables: dict[str, Any]
):
    """The lane knows one exception, and must not stop at another."""
    try:
        shown = templates.render({"subject": subject, "html": html}, {"variables": variables})
    except TemplateProblem:
        pass
    else:
        assert "\n" not in shown.subject

"""The docstrings' examples as code, and the names in them as links."""

from __future__ import annotations

import re

import griffe

_NAME = re.compile(r"(?<![`\w])`(?P<name>(?:keras_renorm|kr)(?:\.\w+)+)(?P<call>\([^`]*\))?`")


class Docstrings(griffe.Extension):
    def on_instance(self, *, obj, **kwargs):
        if obj.docstring and not obj.is_alias:
            obj.docstring.value = _linked(_with_examples(obj.docstring.value))


def _with_examples(text: str) -> str:
    """`Example:` with lines that are not indented, as the docstrings have it, to a section that griffe knows."""
    before, found, after = text.partition("\nExample:\n\n")
    if not found:
        return text
    example, blank, rest = after.partition("\n\n")
    indented = "\n".join("    " + line for line in example.split("\n"))
    return f"{before}\nExamples:\n{indented}{blank}{rest}"


def _linked(text: str) -> str:
    """Names of this package in running text become links where they have a place on the site."""

    def link(match):
        name = re.sub(r"^kr\.", "keras_renorm.", match["name"])
        shown = match[0].strip("`")
        return f'<autoref optional identifier="{name}"><code>{shown}</code></autoref>'

    return "\n".join(line if line.lstrip().startswith((">>>", "...")) else _NAME.sub(link, line) for line in text.split("\n"))

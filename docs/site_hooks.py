"""What MkDocs does not do by itself: pages of the repository that are not in docs/, and pages that may not exist yet."""

from __future__ import annotations

import os
import pathlib
import posixpath
import re
import subprocess
import sys

from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).parents[1]
# Files outside of docs/ that become pages of the site; links to them, and from them, are followed.
PAGES = {
    "examples/README.md": "examples.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
# Pages that are shown where they exist: (section, title, file, the file that it comes after).
OPTIONAL = [
    ("Guides", "Several devices, other backends", "distributed.md", "edge.md"),
    ("API", "Plots", "api/plots.md", "api/export.md"),
    ("API", "Command line", "api/cli.md", "api/export.md"),
]


# Pages whose programs stand side by side, which takes the room of the table of contents.
WIDE = {"tfmot.md"}
TITLES: dict[str, str] = {}


def on_config(config):
    for section, title, file, after in OPTIONAL:
        if not pathlib.Path(config.docs_dir, file).exists():
            continue
        entries = next(entry[section] for entry in config.nav if section in entry)
        if not any(file in entry.values() for entry in entries):
            place = [next(iter(entry.values())) for entry in entries].index(after)
            entries.insert(place + 1, {title: file})
    TITLES.update(_titles(config.nav))
    return config


def on_files(files, config):
    for path, page in PAGES.items():
        text = (ROOT / path).read_text(encoding="utf-8")
        files.append(
            File.generated(
                config,
                page,
                content=_links_into_site(text, posixpath.dirname(path)),
            )
        )
    return files


def on_page_markdown(markdown, page, config, files):
    markdown = re.sub(r"<!-- keras-renorm ?(?P<command>\w*) --help -->", _help, markdown)
    if page.file.src_uri in WIDE:
        page.meta["hide"] = ["toc"]
    if page.file.src_uri in PAGES.values():
        return markdown
    return _links_into_site(
        markdown,
        posixpath.join("docs", posixpath.dirname(page.file.src_uri)),
        page.file.src_uri,
    )


def _help(match: re.Match) -> str:
    """The help text of the command line, or of one of its commands."""
    command = [sys.executable, "-m", "keras_renorm", *filter(None, [match["command"]]), "--help"]
    environment = {**os.environ, "COLUMNS": "80"}
    shown = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    return f"```text\n{shown}```"


def _titles(nav: list) -> dict[str, str]:
    found = {}
    for entry in nav:
        for title, target in entry.items():
            found |= _titles(target) if isinstance(target, list) else {target: title}
    return found


def _links_into_site(markdown: str, folder: str, page: str = "page.md") -> str:
    """Relative links, as a code host follows them from a file in `folder`, to links of the site.

    Names of files become titles of pages, links to code become names.
    """

    def replace(match):
        text, target, anchor = (
            match["text"],
            match["target"],
            match["anchor"] or "",
        )
        if re.match(r"[a-z]+:", target) or not target:
            return match[0]
        path = posixpath.normpath(posixpath.join(folder, target))
        inside = PAGES.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else None)
        if inside is None:
            return text if text.startswith("`") else f"{text} (`{path}`)"
        if text.strip("`").removeprefix("docs/") == posixpath.basename(path):
            text = TITLES.get(inside, text)
        return f"[{text}]({posixpath.relpath(inside, posixpath.dirname(page) or '.')}{anchor})"

    return re.sub(
        r"(?<!!)\[(?P<text>[^\]\[]+)\]\((?P<target>[^)#\s]*)(?P<anchor>#[^)\s]*)?\)",
        replace,
        markdown,
    )

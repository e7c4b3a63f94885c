"""The README, docs/, examples/ and the public docstrings in, a site of HTML pages out.

    python docs/build_site.py      # writes build/documentation/site/index.html

A page of the site has the place that its source has in the repository, so the links between them
stay as they are. The build fails if a link leads nowhere, if a public function is not found, or if
a page would load anything from elsewhere.
"""

from __future__ import annotations

import inspect
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from urllib.parse import unquote

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "documentation"
OF_THE_ROOT = ["README.md", "CHANGELOG.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "LICENSE"]
MIN_PYTHON = (3, 11)  # what the generator needs

# What a page links to, and what a browser fetches by itself to show it.
LINK = re.compile(r"""<a\s[^>]*?href=["']?([^"'\s>]+)""")
LOADED = re.compile(
    r"""<(?:script|img|iframe|source)\s[^>]*?src=["']?([^"'\s>]+)"""
    r"""|<link\s(?![^>]*rel=["']?(?:canonical|prev|next))[^>]*?href=["']?([^"'\s>]+)"""
)
LOADED_BY_CSS = re.compile(r"""(?:url\(|@import\s+)["']?([^"'\s)]+)""")
TABLE_ROW = re.compile(r"^\|.*$", re.MULTILINE)
CODE = re.compile(r"`[^`]+`")
COLOR = re.compile(r"\x1b\[[0-9;]*m")
ELSEWHERE = re.compile(r"(?:[a-z]+:)?//", re.IGNORECASE)


def public_functions() -> dict[str, list[str]]:
    """The names of the public functions, by the part of the package that defines them."""
    import gpt_2_simple as gpt2

    found = defaultdict(list)
    for module in (gpt2, gpt2.distributed):
        for name in module.__all__:
            function = getattr(module, name)
            if inspect.isfunction(function):
                part = function.__module__.split(".")[1]
                found[part].append(f"{module.__name__}.{name}")
    return dict(found)


def with_plain_code(row: re.Match[str]) -> str:
    """A table's row with `|` as it is in code, where GitHub wants it escaped."""
    return CODE.sub(lambda code: code[0].replace("\\|", "|"), row[0])


def lay_out(folder: Path) -> None:
    """Puts the site's configuration and the sources of its pages into an empty folder."""
    pages = folder / "pages"
    pages.mkdir(parents=True)
    for name in OF_THE_ROOT:
        shutil.copy(ROOT / name, pages)
    for part, names in (("docs", "*.md"), ("examples", "*.*")):
        (pages / part).mkdir()
        for path in (ROOT / part).glob(names):
            shutil.copy(path, pages / part)
    for path in pages.rglob("*.md"):
        text = path.read_text(encoding="utf-8")
        path.write_text(TABLE_ROW.sub(with_plain_code, text), encoding="utf-8")
    (pages / "reference").mkdir()
    for part, functions in public_functions().items():
        entries = "".join(f"::: {name}\n\n" for name in functions)
        text = f"# Reference: {part}\n\n{entries}"
        (pages / "reference" / f"{part}.md").write_text(text, encoding="utf-8")
    shutil.copy(ROOT / "docs" / "mkdocs.yml", folder)


def defects_of(site: Path) -> list[str]:
    """Says which links lead to no file, and what the pages load from elsewhere."""
    defects = []
    for path in sorted([*site.rglob("*.html"), *site.rglob("*.css")]):
        text = path.read_text(encoding="utf-8")
        is_page = path.suffix == ".html"
        loaded = [a or b for a, b in LOADED.findall(text)] if is_page else []
        loaded += LOADED_BY_CSS.findall(text)
        name = path.relative_to(site).as_posix()
        if name == "404.html":  # for servers; its links begin at the server's root
            continue
        defects += [f"{name} loads {url}" for url in loaded if ELSEWHERE.match(url)]
        for link in LINK.findall(text) if is_page else []:
            file = unquote(re.split("[#?]", link)[0])
            if not re.match(r"[a-z]+:", file) and not (path.parent / file).exists():
                defects.append(f"{name} links to {link}, which is not there")
    return defects


def build(folder: Path) -> int:
    """Builds the site of a folder that lay_out() filled; returns the exit status."""
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    result = subprocess.run(
        [*command, "--config-file", str(folder / "mkdocs.yml")],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace",
        env={**os.environ, "PYTHONUTF8": "1"},
    )  # fmt: skip
    if result.returncode:
        print(COLOR.sub("", result.stdout))
        return 1
    defects = defects_of(folder / "site")
    for defect in defects:
        print(defect)
    return int(bool(defects))


def main() -> int:
    """Builds the site afresh; returns the exit status."""
    if sys.version_info < MIN_PYTHON:
        print("The site is not built: its generator needs Python 3.11.")
        return 0
    shutil.rmtree(FOLDER, ignore_errors=True)
    lay_out(FOLDER)
    status = build(FOLDER)
    if not status:
        print(f"The documentation is in {FOLDER / 'site' / 'index.html'}")
    return status


if __name__ == "__main__":
    sys.exit(main())

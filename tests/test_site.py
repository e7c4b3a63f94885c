"""docs/build_site.py: every page and public function is there, and nothing comes from elsewhere."""

import importlib
import inspect
import re
from pathlib import Path

import pytest

import gpt_2_simple as gpt2

ROOT = Path(__file__).parent.parent
NAV_ENTRY = re.compile(r"^ +- [^:\n]+: (\S+\.md)$", re.MULTILINE)


@pytest.fixture
def build_site(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    return importlib.import_module("build_site")


@pytest.fixture
def folder(build_site, tmp_path):
    """A folder with the site's configuration and the sources of its pages."""
    build_site.lay_out(tmp_path / "documentation")
    return tmp_path / "documentation"


def test_the_menu_has_every_page(folder):
    pages = {path.relative_to(folder / "pages").as_posix() for path in folder.rglob("*.md")}
    menu = NAV_ENTRY.findall((folder / "mkdocs.yml").read_text(encoding="utf-8"))
    assert sorted(menu) == sorted(pages - {"examples/README.md"})
    assert {f"docs/{path.name}" for path in ROOT.glob("docs/*.md")} <= set(menu)


def test_the_reference_has_every_public_function(folder):
    named = [
        name
        for path in (folder / "pages" / "reference").iterdir()
        for name in re.findall(r"^::: gpt_2_simple\.(\S+)$", path.read_text(), re.MULTILINE)
    ]
    functions = [name for name in gpt2.__all__ if inspect.isfunction(getattr(gpt2, name))]
    of_distributed = [f"distributed.{name}" for name in gpt2.distributed.__all__]
    assert sorted(named) == sorted([*functions, *of_distributed])


@pytest.mark.parametrize(
    ("html", "defect"),
    [
        ('<a href="other.html#part">x</a>', None),
        ('<a class=x href="nothing.html">x</a>', "page.html links to nothing.html"),
        ("<a href=folder/nothing.py>x</a>", "page.html links to folder/nothing.py"),
        ('<a href="https://example.com">x</a>', None),
        ('<script src="other.js"></script>', None),
        ('<script src="https://example.com/a.js"></script>', "page.html loads https://example.com"),
        ("<img alt=x src=//example.com/a.png>", "page.html loads //example.com/a.png"),
        ('<link rel="stylesheet" href="https://example.com/a.css">', "page.html loads https://"),
        ("<style>@import 'https://example.com/a.css'</style>", "page.html loads https://"),
    ],
)
def test_a_link_to_nothing_and_a_file_from_elsewhere_are_found(html, defect, build_site, tmp_path):
    (tmp_path / "page.html").write_text(html, encoding="utf-8")
    (tmp_path / "other.html").write_text("", encoding="utf-8")
    found = build_site.defects_of(tmp_path)
    assert len(found) == (defect is not None)
    assert not defect or found[0].startswith(defect)


def test_a_stylesheet_that_loads_a_font_from_elsewhere_is_found(build_site, tmp_path):
    css = "@font-face { src: url(https://example.com/a.woff2) }"
    (tmp_path / "a.css").write_text(css, encoding="utf-8")
    assert build_site.defects_of(tmp_path) == ["a.css loads https://example.com/a.woff2"]


def test_the_site_is_built_and_shows_the_settings_of_a_function(folder, build_site, capsys):
    pytest.importorskip("zensical")
    assert build_site.build(folder) == 0, capsys.readouterr().out
    page = (folder / "site" / "reference" / "training.html").read_text(encoding="utf-8")
    assert 'id="gpt_2_simple.finetune"' in page
    assert "Steps between checkpoints." in page  # stated in training/settings.py only
    assert (folder / "site" / "examples" / "jokes.py").is_file()
    page = (folder / "site" / "docs" / "coming_from.html").read_text(encoding="utf-8")
    assert '<code>gpt2.generate(sess, stop_token="&lt;|endoftext|&gt;")</code></td>' in page


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[x](nothing.md)", "[x](nothing.md)"),
        ("[x](training.md#nothing)", "[x](training.md#nothing)"),
        ("[x](../nothing.py)", "docs/data.html links to ../nothing.py"),
        ("::: gpt_2_simple.nothing", "gpt_2_simple.nothing"),
    ],
)
def test_a_page_with_a_wrong_link_ends_the_build(text, told, folder, build_site, capsys):
    pytest.importorskip("zensical")
    for page in (folder / "pages" / "reference").iterdir():
        page.write_text("# Without functions\n")  # which take seconds
    with open(folder / "pages" / "docs" / "data.md", "a", encoding="utf-8") as file:
        file.write(f"\n{text}\n")
    assert build_site.build(folder) == 1
    assert told in capsys.readouterr().out

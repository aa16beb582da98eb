"""docs/site.py: what the site is made of. CI also builds it, with the extra `docs`."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site():
    spec = importlib.util.spec_from_file_location("site_of_docs", ROOT / "docs" / "site.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_page_is_in_the_navigation_once(site, tmp_path):
    site.gather(tmp_path)
    pages = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.md")]
    text = (ROOT / "mkdocs.yml").read_text("utf-8")
    assert sorted(re.findall(r"^ +- .+: ([\w/-]+\.md)$", text, re.MULTILINE)) == sorted(pages)


def test_links_lead_to_the_same_within_the_site(site, tmp_path):
    site.gather(tmp_path)
    assert "](security.md)" in (tmp_path / "data.md").read_text("utf-8")
    assert "](shapes.md)" in (tmp_path / "models.md").read_text("utf-8")
    assert (tmp_path / "examples" / "detect.ipynb").read_bytes() == (
        ROOT / "examples" / "detect.ipynb"
    ).read_bytes()


def test_a_link_that_leads_nowhere_is_told(site, tmp_path, monkeypatch):
    root = tmp_path / "root"
    (root / "docs").mkdir(parents=True)
    (root / "docs" / "index.md").write_text("[a](https://example.org) [b](#c) [d](gone.md#e)")
    monkeypatch.setattr(site, "ROOT", root)
    monkeypatch.setattr(site, "ELSEWHERE", {})
    with pytest.raises(SystemExit, match=re.escape("docs/index.md: the link to gone.md leads nowhere")):
        site.gather(tmp_path / "pages")


def test_dead_links_of_a_built_site(site, tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "index.html").write_text('<h1 id="here"><a href="../a.html#top">')
    (tmp_path / "a.html").write_text(
        '<p id="top"><a href="deep/#here"><a href="https://x.org"><a href="#top"><a href="deep#gone">'
        '<img src="gone.png">'
    )
    assert site.dead_links(tmp_path) == ["a.html: deep#gone", "a.html: gone.png"]

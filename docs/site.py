"""Makes the site: ``python docs/site.py`` gathers its pages in build/docs, and builds build/site from them.

Pages are those of docs/, and those that lie elsewhere because readers look for them there. Links lead to the
same page or file within the site. The build is strict, and a link of the finished site that leads nowhere is
an error. ``--pages`` only gathers the pages, as for ``zensical serve`` or ``mkdocs build --strict``.
"""

import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parents[1]
ELSEWHERE = {
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "CONTRIBUTING.md": "contributing.md",
    "ssd/weights/README.md": "shapes.md",
}
_LINK = re.compile(r"(\]\()(?![a-z]+:|#)([^)#\s]+)")


def place(source: str) -> str:
    """Where a file of the repository lies in the site; both relative to their roots."""
    return ELSEWHERE.get(source) or source.removeprefix("docs/")


def gather(pages: Path) -> None:
    """Write the site's pages, and the files that they link to, into an empty folder."""
    shutil.rmtree(pages, ignore_errors=True)
    for path in (*sorted((ROOT / "docs").rglob("*.md")), *map(ROOT.__truediv__, ELSEWHERE)):
        target = pages / place(path.relative_to(ROOT).as_posix())

        def link(match: re.Match[str], page: Path = path, target: Path = target) -> str:
            file = Path(os.path.normpath(page.parent / match[2]))
            if not file.is_relative_to(ROOT) or not file.is_file():
                raise SystemExit(f"{page.relative_to(ROOT)}: the link to {match[2]} leads nowhere")
            there = pages / place(file.relative_to(ROOT).as_posix())
            if file.suffix != ".md":
                there.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, there)
            return match[1] + Path(os.path.relpath(there, target.parent)).as_posix()

        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(_LINK.sub(link, path.read_text("utf-8")), "utf-8")


class _Page(HTMLParser):
    """The links of a page of HTML, and the names that others may link to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.names = {"", "__top"}
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if name in ("href", "src") and value and tag != "base":
                self.links.append(value)
            elif name in ("id", "name") and value:
                self.names.add(value)


def dead_links(site: Path) -> list[str]:
    """Links of a site's pages to files and headings that it does not have."""
    pages = {path: _Page(path.read_text("utf-8")) for path in site.rglob("*.html") if path.name != "404.html"}
    dead = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            file = Path(os.path.normpath(path.parent / unquote(parts.path))) if parts.path else path
            file = file / "index.html" if file.is_dir() else file
            if not file.is_file() or (file in pages and unquote(parts.fragment) not in pages[file].names):
                dead.append(f"{path.relative_to(site)}: {link}")
    return dead


def main() -> None:
    gather(ROOT / "build" / "docs")
    if sys.argv[1:] == ["--pages"]:
        return
    command = [sys.executable, "-m", "zensical", "build", "--clean", "--strict"]
    if subprocess.run(command, cwd=ROOT, check=False).returncode:
        raise SystemExit(
            "the site was not built; above is why (pip install '.[docs]' installs what it needs)"
        )
    if dead := dead_links(ROOT / "build" / "site"):
        raise SystemExit("\n".join(["links that lead nowhere:", *dead]))


if __name__ == "__main__":
    main()

"""The source of the documentation's site: `python tests/repository/docs_site.py FOLDER`, then mkdocs builds it.

The pages are those of `docs`, where links lead to files of the repository. What lies outside `docs` is copied into the
site, and the links are changed to the copies; mkdocs then finds every link that leads nowhere.
"""

import os
import re
import shutil
import sys
from functools import partial
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]
DOCS = CHECKOUT / "docs"
FROM_ELSEWHERE = {CHECKOUT / "charts/finetune-operator/README.md": Path("chart.md")}
"""Pages that lie outside `docs`, with their places in the site."""

LINK = re.compile(r"(\]\()([^)#:\s]+)([^)]*\))")


def write_source(folder: Path) -> None:
    """Write `mkdocs.yml` and `pages` into a folder."""
    shutil.rmtree(folder, ignore_errors=True)
    pages = folder / "pages"
    shutil.copytree(DOCS, pages, ignore=shutil.ignore_patterns("site"))
    shutil.copyfile(DOCS / "site/mkdocs.yml", folder / "mkdocs.yml")
    shutil.copyfile(DOCS / "site/tables.css", pages / "tables.css")

    for page in (*sorted(DOCS.rglob("*.md")), *FROM_ELSEWHERE):
        text = LINK.sub(partial(_inside, page=page, pages=pages), page.read_text())
        (pages / _place(page)).write_text(text)


def _place(path: Path) -> Path:
    """Where a file of the repository lies in the site."""
    return FROM_ELSEWHERE.get(path) or path.relative_to(DOCS if path.is_relative_to(DOCS) else CHECKOUT)


def _inside(link: re.Match[str], page: Path, pages: Path) -> str:
    """A link of a page as it is in the site; what it leads to outside `docs` is copied."""
    target = Path(os.path.normpath(page.parent / link[2]))
    if not target.is_relative_to(CHECKOUT) or not target.is_file():
        return link[0]  # mkdocs says what is wrong with it

    copy = pages / _place(target)
    if not target.is_relative_to(DOCS) and target not in FROM_ELSEWHERE:
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(target, copy)
    return f"{link[1]}{os.path.relpath(copy, (pages / _place(page)).parent)}{link[3]}"


if __name__ == "__main__":
    write_source(Path(sys.argv[1]))

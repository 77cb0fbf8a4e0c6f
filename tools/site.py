"""Builds the documentation as a site, in build/site, from the project's pages as they are.

The pages keep their places, so that the links which work in the repository work here; those to other files take the
files along. A link or an anchor that leads nowhere fails the build, and so does an example that is not Python. The
picture of the rooms is drawn from their imports.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "build" / "site-source"
SITE = ROOT / "build" / "site"
PAGES = ("*.md", "docs/*.md", "bench/*.md", "fuzz/*.md", "tests/*/*.md")
LINK = re.compile(r"\]\((?!\w+:|#)([^)\s#]+)")

ROOM = re.compile(r"^\| `(\w+)` \|", re.MULTILINE)
PLACE = "<!-- the picture of the rooms -->"
STEP, MARGIN = 26, 170


def take_along(page: Path) -> None:
    """Copy a page, and what it links to that is no page."""
    text = page.read_text()
    target = SOURCE / page.relative_to(ROOT)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text.replace(PLACE, picture()) if PLACE in text else text)
    for link in LINK.findall(re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        file = (page.parent / link).resolve()
        if file.is_file() and file.suffix != ".md":
            copy = SOURCE / file.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)


def check_examples(page: Path) -> None:
    for number, text in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE), 1):
        try:
            ast.parse(text)
        except SyntaxError as error:
            sys.exit(f"{page.relative_to(ROOT)}: example {number} is not Python: {error}")


# -- the picture of the rooms ----------------------------------------------------------------------


def rooms() -> list[str]:
    text = (ROOT / "docs" / "design.md").read_text().partition("## The rooms")[2].partition("\n## ")[0]
    return ROOM.findall(text)


def imports(room: str) -> set[str]:
    """The rooms it imports, by its source."""
    path = ROOT / "fastwire" / f"{room}.py"
    if not path.exists():  # the core, whose one import is that of the errors
        return {"errors"}
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "fastwire":
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and str(node.module).startswith("fastwire."):
            found.add(str(node.module).split(".")[1])
    return found


def picture() -> str:
    """The rooms below one another, an arc from each to those above it that it imports."""
    names = rooms()
    y = {name: STEP * (i + 1) for i, name in enumerate(names)}
    lines = [f'<text x="{MARGIN - 12}" y="{y[name] + 5}" text-anchor="end">{name}</text>' for name in names]
    for name in names:
        for other in sorted(imports(name) & y.keys()):
            reach = MARGIN + (y[name] - y[other]) // 2
            lines.append(
                f'<path d="M{MARGIN},{y[name]} Q{reach},{(y[name] + y[other]) // 2} {MARGIN},{y[other]}">'
                f"<title>{name} imports {other}</title></path>"
            )
    height, width = STEP * (len(names) + 1), MARGIN + STEP * len(names) // 4 + 40
    style = 'font-family="monospace" font-size="14" fill="currentColor"'
    arcs = "".join(lines).replace("<path ", '<path fill="none" stroke="currentColor" stroke-opacity="0.35" ')
    return f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img" {style}>{arcs}</svg>\n'


def main() -> None:
    shutil.rmtree(SOURCE, ignore_errors=True)
    for page in (page for pattern in PAGES for page in sorted(ROOT.glob(pattern))):
        if page.name != "api.md":  # of signatures
            check_examples(page)
        take_along(page)
    shutil.copyfile(ROOT / "LICENSE", SOURCE / "LICENSE")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--clean"]
    command += ["--config-file", str(ROOT / "mkdocs.yml"), "--site-dir", str(SITE)]
    # The theme advertises another program.
    result = subprocess.run(command, check=False, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"})
    if result.returncode:
        sys.exit("the site was not built: see above (make site needs the extra 'site')")
    print(f"{SITE.relative_to(ROOT)}/index.html")


if __name__ == "__main__":
    main()

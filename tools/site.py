"""Builds the documentation as a site, in build/site, from the project's pages as they are.

The pages keep their places, so that the links which work in the repository work here; those to other files take the
files along. A link or an anchor that leads nowhere fails the build, and so does an example that is not Python. The
picture of the rooms is drawn anew.
"""

import ast
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "build" / "site-source"
SITE = ROOT / "build" / "site"
PAGES = ("*.md", "docs/*.md", "bench/*.md", "fuzz/*.md", "tests/*/*.md")
LINK = re.compile(r"\]\((?!\w+:|#)([^)\s#]+)")


def take_along(page: Path) -> None:
    """Copy a page, and what it links to that is no page."""
    text = page.read_text()
    target = SOURCE / page.relative_to(ROOT)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text)
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


def main() -> None:
    shutil.rmtree(SOURCE, ignore_errors=True)
    for page in (page for pattern in PAGES for page in sorted(ROOT.glob(pattern))):
        if page.name != "api.md":  # of signatures
            check_examples(page)
        take_along(page)
    shutil.copyfile(ROOT / "LICENSE", SOURCE / "LICENSE")
    (SOURCE / "docs" / "architecture.svg").write_text(runpy.run_path(str(ROOT / "tools" / "architecture.py"))["page"]())
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--clean"]
    command += ["--config-file", str(ROOT / "mkdocs.yml"), "--site-dir", str(SITE)]
    # The theme advertises another program.
    result = subprocess.run(command, check=False, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"})
    if result.returncode:
        sys.exit("the site was not built: see above (make site needs the extra 'site')")
    print(f"{SITE.relative_to(ROOT)}/index.html")


if __name__ == "__main__":
    main()

"""Draws the rooms and who imports whom, from the sources, into docs/architecture.svg. Run by ``make docs``."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "architecture.svg"
ROOM = re.compile(r"^\| `(\w+)` \|", re.MULTILINE)
STEP, MARGIN = 26, 170
INK = "#777"  # to be read on white and on black


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


def page() -> str:
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
    style = f'font-family="monospace" font-size="14" fill="{INK}"'
    arcs = "\n".join(lines).replace("<path ", f'<path fill="none" stroke="{INK}" stroke-opacity="0.5" ')
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>\n{arcs}\n</svg>\n'


if __name__ == "__main__":
    DOCUMENT.write_text(page())

"""What passed, as the table of ``docs/conformance.md``."""

from collections import Counter
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path

from cases import Case
from handshakes import Knock
from judge import FAILED, NON_STRICT, NOT_OFFERED, OK, Tally

PAGE = Path(__file__).resolve().parents[2] / "docs" / "conformance.md"
BEGIN, END = "<!-- made by tests/conformance -->\n", "<!-- end -->\n"

SECTIONS = {
    "1": "messages",
    "2": "pings and pongs",
    "3": "reserved bits",
    "4": "reserved opcodes",
    "5": "fragments",
    "6": "text that is UTF-8, or not",
    "7": "closing",
    "9": "large messages, many messages",
    "10": "many fragments",
    "12": "permessage-deflate: data",
    "13": "permessage-deflate: parameters",
    "D": "permessage-deflate: frames",
    "E": "half-open connections",
    "F": "floods",
    "H": "handshakes",
    "L": "lengths",
    "M": "masks",
    "S": "the end of TLS",
}


def version(name: str) -> str:
    return f"{name} {metadata.version(name)}" if name in {"websockets", "tornado", "picows"} else name


def cell(counts: Counter[str]) -> str:
    """``ok / non-strict / failed``, zeros at the end left out."""
    if counts[NOT_OFFERED] and not counts[OK]:
        return "not offered"
    numbers = [counts[OK], counts[NON_STRICT], counts[FAILED]]
    while len(numbers) > 1 and not numbers[-1]:
        numbers.pop()
    return " / ".join(map(str, numbers)) + (f", {counts[NOT_OFFERED]} not offered" if counts[NOT_OFFERED] else "")


def row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def table(cases: Iterable[Case | Knock], tallies: Mapping[str, Tally]) -> str:
    sections = Counter(case.section for case in cases)
    lines = [
        row("", "", "cases", *map(version, tallies)),
        row(*["---"] * (3 + len(tallies))),
        *(
            row(section, title, sections[section], *(cell(tally.counts(section)) for tally in tallies.values()))
            for section, title in SECTIONS.items()
        ),
        row("", "**all**", sections.total(), *(f"**{cell(tally.counts())}**" for tally in tallies.values())),
    ]
    return "\n".join(lines) + "\n"


def remarks(tallies: Mapping[str, Tally], most: int = 4) -> str:
    """The commonest reasons for which a case is not ok, each case with the first of its own."""
    lines = []
    for name, tally in tallies.items():
        reasons = Counter(
            general(verdicts[0].remark) for verdicts in tally.remarks.values() if verdicts[0].grade != NOT_OFFERED
        )
        if reasons:
            lines.append(f"- {name}: " + "; ".join(f"{count} {reason}" for reason, count in reasons.most_common(most)))
    return "\n".join(lines) + "\n"


def general(remark: str) -> str:
    if remark.startswith("answered") and remark.endswith("instead of a Close frame"):
        return "took for a message what it should have refused"
    return "lost the connection to a reset" if remark.startswith("ended reset") else remark


def write(cases: Iterable[Case | Knock], tallies: Mapping[str, Tally]) -> None:
    """Puts table and remarks where the last ones stand in the page."""
    before, rest = PAGE.read_text().split(BEGIN)
    after = rest.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n{table(cases, tallies)}\n{remarks(tallies)}\n{END}{after}")

"""How far a long measurement is: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from types import TracebackType

from tqdm import tqdm  # type: ignore[import-untyped]


class Progress:
    """A bar over the seconds that all runs are expected to take."""

    def __init__(self, seconds: float) -> None:
        layout = "{percentage:3.0f}% |{bar:30}| {elapsed} of about {total_time} {desc}"
        self._bar = _Bar(total=seconds, bar_format=layout, disable=not sys.stderr.isatty(), leave=False)
        self._label = ""

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._bar.close()

    def begin(self, label: str) -> None:
        """A run begins."""
        self._label = label
        self.now("starts")

    def now(self, text: str) -> None:
        """What the run is doing; on a terminal only."""
        self._bar.set_description_str(f"{self._label}: {text}")

    def line(self, text: str) -> None:
        """A line that stays."""
        self._bar.write(text, file=sys.stderr)
        sys.stderr.flush()

    def done(self, seconds: float) -> None:
        """A run that was expected to take *seconds* is over."""
        self._bar.update(seconds)


class _Bar(tqdm):  # type: ignore[misc]
    """Knows the time that all will take."""

    @property
    def format_dict(self) -> dict[str, object]:
        fields = super().format_dict
        share = self.n / self.total if self.total else 0
        seconds = fields["elapsed"] / share if share else self.total
        return fields | {"total_time": self.format_interval(seconds)}

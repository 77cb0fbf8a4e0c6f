"""How far a long measurement is: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm


class Progress:
    """A bar over the seconds that all runs are expected to take."""

    def __init__(self, seconds: float) -> None:
        layout = "{percentage:3.0f}% |{bar:30}| {elapsed} of about {total_time} {desc}"
        self._bar = _Bar(total=seconds, bar_format=layout, disable=not sys.stderr.isatty(), leave=False)
        self._label = ""
        self._seconds = 0.0  # that the run may take
        self._before = 0.0  # those of the runs before it
        self._began = 0.0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._bar.close()

    def begin(self, label: str, seconds: float) -> None:
        """A run begins that may take so long."""
        self._label, self._seconds, self._began = label, seconds, time.monotonic()
        self.now("starts")

    def now(self, text: str) -> None:
        """What the run is doing; on a terminal only."""
        self._bar.n = self._before + min(time.monotonic() - self._began, self._seconds)
        self._bar.set_description_str(f"{self._label}: {text}")

    def end(self, text: str) -> None:
        """The run is over; *text* stays."""
        self._bar.write(text, file=sys.stderr)
        sys.stderr.flush()
        self._before += self._seconds
        self._bar.n = self._before


class _Bar(tqdm):
    """Knows the time that all will take."""

    @property
    def format_dict(self) -> dict[str, object]:
        fields = super().format_dict
        seconds = max(self.total, fields["elapsed"] * self.total / self.n if self.n else 0)
        return fields | {"total_time": self.format_interval(seconds)}

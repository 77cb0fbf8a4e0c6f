"""Writes docs/configuration.md, the reference of settings, from the traits of `fastwire.settings.Fastwire`."""

from pathlib import Path
from typing import Any

from traitlets import TraitType

from fastwire.flow import GIB, KIB, MIB
from fastwire.settings import Fastwire

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"

INTRODUCTION = """\
# Settings

<!-- Written by tools/configuration.py (`make docs`). -->

In a configuration file of the server, for instance `~/.jupyter/jupyter_server_config.py`:

```python
c.Fastwire.resume_timeout = 8 * 3600  # clients may come back after a working day
c.Fastwire.client_memory_limit = 16 * 1024 * 1024
```

or on its command line: `jupyter server --Fastwire.resume_timeout=28800`. `python -m fastwire.serve --help-all` lists
them with everything else. Sizes are in bytes, times in seconds.

| setting | default | meaning |
| --- | --- | --- |
"""

BETWEEN = """
## Settings of Jupyter Server that hold here

| setting | what to know |
| --- | --- |
"""

#: Of Jupyter Server, in the order of what they are about.
THEIRS = {
    "ServerApp.tornado_settings": (
        "`ws_ping_interval` and `ws_ping_timeout`, in milliseconds: a client that does not answer is closed with 1011. "
        "`websocket_max_message_size`, in bytes, wins over `Fastwire.max_message_size`. "
        "`websocket_compression_options`: permessage-deflate, which costs Python and zlib for each message"
    ),
    "ZMQChannelsWebsocketConnection.limit_rate": (
        "off, unless it or one of `iopub_msg_rate_limit`, `iopub_data_rate_limit`, `rate_limit_window` is set"
    ),
    "ZMQChannelsWebsocketConnection.kernel_ws_protocol": '`""` refuses the v1 protocol',
    "MappingKernelManager.kernel_info_timeout": "seconds in which a new kernel has to answer",
    "MappingKernelManager.buffer_offline_messages": "`False`: nothing is kept for clients that are away",
    "MappingKernelManager.allow_tracebacks": "`False`: clients see `traceback_replacement_message` instead",
    "MappingKernelManager.cull_idle_timeout": (
        "seconds until an idle kernel is ended, by `cull_interval`, `cull_connected` and `cull_busy`"
    ),
}

UNITS = ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB"))


def spelled(trait: TraitType[Any, Any]) -> str:
    """A default as it may be written in a configuration file, and as a person says it."""
    value = trait.default_value
    if isinstance(value, str):
        return "see there"
    if trait.help.startswith("Bytes"):
        size, unit = next((size, unit) for size, unit in UNITS if value % size == 0)
        return f"`{value}` ({value // size} {unit})"
    return f"`{value}`"


def rows() -> list[str]:
    """In the order in which the class has them."""
    own = [(name, trait) for name, trait in vars(Fastwire).items() if isinstance(trait, TraitType)]
    return [f"| `Fastwire.{name}` | {spelled(trait)} | {trait.help} |\n" for name, trait in own]


def page() -> str:
    theirs = "".join(f"| `{name}` | {meaning} |\n" for name, meaning in THEIRS.items())
    return f"{INTRODUCTION}{''.join(rows())}{BETWEEN}{theirs}"


if __name__ == "__main__":
    PAGE.write_text(page())

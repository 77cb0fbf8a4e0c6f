"""``python -m fastwire.serve`` on another loop than it usually has: ``python loop_server.py LOOP OPTIONS``."""

import asyncio
import sys
from types import SimpleNamespace

import fastwire.serve
import fastwire.turns

if __name__ == "__main__":
    loop = sys.argv.pop(1)
    sys.path.insert(0, "")  # as `python -m` has it
    if loop == "uvloop":
        import uvloop

        asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    elif loop == "asyncio without epoll":
        vars(fastwire.turns)["select"] = SimpleNamespace()
    fastwire.serve.main()

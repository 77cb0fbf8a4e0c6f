"""Which tests of other projects run here, what they need, and which of them cannot say anything about fastwire.

All of them run twice: on the classes they were written for, and with fastwire's in their place (`in_place`).
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Suite:
    """Tests of one project, by pytest's names, relative to where they are run."""

    #: The distribution the tests belong to; its installed version is the one they are taken from.
    project: str
    tests: tuple[str, ...]
    #: Of those, what CI runs: quick, and passes every time on the classes it was written for.
    sample: tuple[str, ...] = ()
    #: Whether they are in the sdist only; otherwise they are installed with the project.
    sdist: bool = True
    options: tuple[str, ...] = ()
    #: Beyond what a developer of fastwire has.
    needs: tuple[str, ...] = ()
    #: Tests that look at what only the stock class has, each with the reason.
    inapplicable: dict[str, str] = field(default_factory=dict)
    #: Tests that are left out on both, each with what they need and a developer's machine may not have.
    impossible: dict[str, str] = field(default_factory=dict)


#: Their coroutines are run by pytest-jupyter.
JUPYTER = ("-p", "no:asyncio")

#: They forbid themselves what newer versions of the others deprecate.
DEPRECATED = ("-W", "ignore::DeprecationWarning")

SUITES = (
    Suite(
        "jupyter_client",
        tests=("tests/test_session.py",),
        sample=("tests/test_session.py",),
        options=JUPYTER,
        needs=("pytest-jupyter[client]", "msgpack"),
    ),
    Suite(
        "tornado",
        tests=("--pyargs", "tornado.test.websocket_test"),
        # Not those where a pong that is 50 ms late fails the test.
        sample=("--pyargs", "tornado.test.websocket_test", "-k", "not PingTimeout and not PeriodicPing"),
        sdist=False,
        options=("-p", "no:asyncio"),
        inapplicable={
            "FloodTest::test_pong_most_recent_ping": "replaces a private method of Tornado's protocol class; "
            "fastwire answers each ping of a burst, which RFC 6455 section 5.5.3 leaves open",
        },
    ),
    Suite(
        "jupyter_server",
        tests=("tests/services/kernels", "tests/services/sessions", "tests/base/test_websocket.py"),
        sample=(
            "tests/base/test_websocket.py",
            "tests/services/kernels/test_config.py",
            "tests/services/kernels/test_connection.py::test_websocket_connection",
            "tests/services/sessions/test_api.py::test_create",
            "tests/services/sessions/test_api.py::test_restart_kernel",
        ),
        options=(*JUPYTER, *DEPRECATED),
        needs=("pytest-jupyter[server]", "pytest-console-scripts", "flaky"),
    ),
    Suite(
        "jupyter_kernel_gateway",
        tests=("tests/test_jupyter_websocket.py", "tests/test_gatewayapp.py"),
        sample=(
            "tests/test_jupyter_websocket.py::TestDefaults::test_kernel_comm",
            "tests/test_jupyter_websocket.py::TestSeedURI::test_seed",
        ),
        options=(*JUPYTER, *DEPRECATED),
        needs=("jupyter_kernel_gateway", "pytest-jupyter[server]"),
        impossible={"TestRemoteSeedURI::test_seed": "reads a notebook from gist.githubusercontent.com"},
    ),
    Suite(
        "jupyter-kernel-client",
        tests=("--pyargs", "jupyter_kernel_client.tests"),
        sdist=False,
        # Each takes some 12 s, and waits for ever when another program has taken its server's port.
        options=("--timeout=120",),
        needs=("jupyter-kernel-client", "pytest-asyncio", "pandas"),
    ),
)

"""The drop-in Session: what differs from jupyter_client's, what must not, and jupyter_client's own tests of it."""

import hashlib
import hmac
import os
import re
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from xml.etree import ElementTree

import jupyter_client.session
import pytest
import zmq
from absent import not_tested
from builders import KEY, zmq_pair
from patience import SLOW

from fastwire._core import Signer
from fastwire.session import Session

Stock = jupyter_client.session.Session
BOTH = pytest.mark.parametrize("kind", [Stock, Session], ids=["stock", "fastwire"])
SCHEMES = pytest.mark.parametrize("scheme", ["hmac-sha256", "hmac-sha512", "hmac-md5"])
PARTS = [b'{"msg_id": "1", "msg_type": "status"}', b"{}", b"{}", b'{"execution_state": "busy"}']


def signed(session: Stock, *buffers: bytes) -> list[bytes]:
    """A message as `deserialize` takes it, different each time."""
    _, *frames = session.serialize(session.msg("status", {"execution_state": "busy"}))
    return [*frames, *buffers]


@pytest.fixture
def session() -> Session:
    return Session(key=KEY)


@pytest.fixture
def stock() -> Stock:
    return Stock(key=KEY)


# -- signatures --------------------------------------------------------------------------------------


@SCHEMES
@pytest.mark.parametrize("key", [KEY, b"k" * 100, b""], ids=["key", "long key", "no key"])
def test_signatures_are_those_of_the_stock_session(scheme: str, key: bytes) -> None:
    options = {"key": key, "signature_scheme": scheme}
    assert Session(**options).sign(PARTS) == Stock(**options).sign(PARTS)


@pytest.mark.parametrize("count", [0, 1, 3, 5, 6])
def test_all_of_a_list_is_signed_however_long_it_is(session: Session, stock: Stock, count: int) -> None:
    assert session.sign([b"part"] * count) == stock.sign([b"part"] * count)


@pytest.mark.parametrize("kind", [bytearray, memoryview, zmq.Frame])
def test_parts_may_be_any_buffers(session: Session, kind: Callable[[bytes], object]) -> None:
    assert session.sign([kind(part) for part in PARTS]) == session.sign(PARTS)


@BOTH
def test_text_is_no_buffer(kind: type[Stock]) -> None:
    with pytest.raises(TypeError):
        kind(key=KEY).sign(["{}"] * 4)


@SCHEMES
def test_the_core_signs_where_it_is_faster(scheme: str) -> None:
    assert isinstance(Session(key=KEY, signature_scheme=scheme)._signer, Signer) == (scheme == "hmac-sha256")


@SCHEMES
def test_a_key_and_a_scheme_that_change(session: Session, stock: Stock, scheme: str) -> None:
    for each in (session, stock):
        each.key = b"another"
        each.signature_scheme = scheme
    assert session.sign(PARTS) == stock.sign(PARTS) == Stock(key=b"another", signature_scheme=scheme).sign(PARTS)


def test_a_keyfile(tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(KEY + b"\n")
    assert Session(keyfile=str(tmp_path / "key")).sign(PARTS) == Stock(key=KEY).sign(PARTS)


@BOTH
def test_without_auth_nothing_is_signed_or_checked(kind: type[Stock]) -> None:
    session = kind(key=KEY)
    session.auth = None
    assert session.sign(PARTS) == b""
    assert session.deserialize([b"whatever", *PARTS])["content"] == {"execution_state": "busy"}


@BOTH
def test_an_auth_of_ones_own_is_used(kind: type[Stock]) -> None:
    session = kind(key=KEY)
    session.auth = hmac.new(b"another", digestmod=hashlib.sha256)
    assert session.sign(PARTS) == Stock(key=b"another").sign(PARTS)


# -- deserialize -------------------------------------------------------------------------------------


def test_each_reads_what_the_other_writes(session: Session, stock: Stock) -> None:
    for one, other in ((session, stock), (stock, session)):
        frames = signed(one, b"buffer")
        message = other.deserialize(frames)
        assert message == {**Stock(key=KEY).deserialize(frames), "buffers": [b"buffer"]}
        assert message["content"] == {"execution_state": "busy"}


@BOTH
@pytest.mark.parametrize("copy", [True, False], ids=["bytes", "frames"])
def test_over_a_socket(kind: type[Stock], copy: bool, context: zmq.Context) -> None:
    sender, receiver = zmq_pair(context, zmq.PAIR, zmq.PAIR)
    Stock(key=KEY).send(sender, "comm_msg", {"data": {}}, ident=b"you", buffers=[b"x" * 100_000])
    assert receiver.poll(5000)
    identities, message = kind(key=KEY).recv(receiver, copy=copy)
    assert (identities, message["msg_type"], message["content"]) == ([b"you"], "comm_msg", {"data": {}})
    assert [bytes(buffer) for buffer in message["buffers"]] == [b"x" * 100_000]


@BOTH
def test_content_can_stay_packed(kind: type[Stock]) -> None:
    assert kind(key=KEY).deserialize(signed(Stock(key=KEY)), content=False)["content"] == PARTS[3]


@BOTH
@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda frames: frames.__setitem__(0, b""), "Unsigned Message"),
        (lambda frames: frames.__setitem__(0, b"0" * 64), "Invalid Signature"),
        (lambda frames: frames.__setitem__(0, frames[0][:-1]), "Invalid Signature"),
        (lambda frames: frames.__setitem__(4, b"{}"), "Invalid Signature"),
        (lambda frames: frames.pop(), "Invalid Signature"),
    ],
    ids=["unsigned", "wrong", "short", "changed", "part missing"],
)
def test_what_is_refused(kind: type[Stock], change: Callable[[list[bytes]], object], error: str) -> None:
    frames = signed(Stock(key=KEY))
    change(frames)
    with pytest.raises(ValueError, match=error):
        kind(key=KEY).deserialize(frames)


@BOTH
def test_too_few_parts_are_malformed_even_when_signed(kind: type[Stock]) -> None:
    session = kind(key=KEY)
    with pytest.raises(TypeError, match="malformed"):
        session.deserialize([session.sign(PARTS[:3]), *PARTS[:3]])


@BOTH
def test_a_session_without_a_key(kind: type[Stock]) -> None:
    session = kind(key=b"")
    assert session.deserialize(signed(session))["msg_type"] == "status"


# -- history -----------------------------------------------------------------------------------------


@BOTH
def test_a_replay_is_refused(kind: type[Stock]) -> None:
    session, frames = kind(key=KEY), signed(Stock(key=KEY))
    session.deserialize(frames)
    with pytest.raises(ValueError, match="Duplicate Signature"):
        session.deserialize(frames)
    assert session.digest_history == {frames[0]}


@BOTH
def test_a_look_is_not_remembered(kind: type[Stock]) -> None:
    session, frames = kind(key=KEY), signed(Stock(key=KEY))
    session.deserialize(frames, content=False)
    session.deserialize(frames)
    with pytest.raises(ValueError, match="Duplicate Signature"):
        session.deserialize(frames, content=False)


@BOTH
def test_no_history(kind: type[Stock]) -> None:
    session, frames = kind(key=KEY, digest_history_size=0), signed(Stock(key=KEY))
    for _ in range(2):
        session.deserialize(frames)
    assert session.digest_history == set()


def test_a_forgery_does_not_have_the_true_message_refused(session: Session, stock: Stock) -> None:
    frames = signed(stock)
    with pytest.raises(ValueError, match="Invalid Signature"):
        session.deserialize([*frames[:4], b'{"execution_state": "idle"}'])
    assert session.digest_history == set()
    assert session.deserialize(frames)["content"] == {"execution_state": "busy"}


@pytest.mark.parametrize("size", [1, 9, 10, 11, 100, 1000])
def test_a_full_history_is_thinned_out_as_the_stock_one(size: int) -> None:
    histories = []
    for kind in (Session, Stock):
        session = kind(key=KEY, digest_history_size=size)
        lengths = []
        for number in range(3 * size):
            session._add_digest(b"%d" % number)
            lengths.append(len(session.digest_history))
        histories.append(lengths)
    assert histories[0] == histories[1]


@BOTH
def test_a_history_that_is_made_smaller(kind: type[Stock]) -> None:
    session = kind(key=KEY)
    for number in range(100):
        session._add_digest(b"%d" % number)
    session.digest_history_size = 10
    session._add_digest(b"new")
    assert len(session.digest_history) == 10


def test_a_full_history_does_not_stop_everything() -> None:
    """65,537 digests are sorted in some 50 ms; they need not even be comparable."""
    session = Session(key=KEY)
    session.digest_history = {"text", *(hashlib.sha256(b"%d" % n).hexdigest().encode() for n in range(65_536))}
    start = time.thread_time()
    session._cull_digest_history()
    assert time.thread_time() - start < 0.02
    assert len(session.digest_history) == 65_537 - 6_553


def test_a_clone_has_a_history_of_its_own_and_the_core(session: Session, stock: Stock) -> None:
    seen, later = signed(stock), signed(stock)
    session.deserialize(seen)
    clone = session.clone()
    assert type(clone) is Session
    assert (clone.session, clone.key) == (session.session, session.key)
    assert clone._signer is not None
    assert clone.sign(PARTS) == stock.sign(PARTS)
    with pytest.raises(ValueError, match="Duplicate"):
        clone.deserialize(seen)
    session.deserialize(later)
    clone.deserialize(later)


# -- import ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["jupyter_client", "traitlets"])
def test_without_jupyter_client_it_says_what_to_install(missing: str) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None; import fastwire.session"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60 * SLOW
    )
    assert result.returncode == 1
    said = rf"ImportError: fastwire\.session needs jupyter_client \({missing}\S* is missing\): (.*)"
    found = re.fullmatch(said, result.stderr.splitlines()[-1])
    assert found is not None
    assert found[1] == "pip install 'jupyter-fastwire[serve]'"


# -- jupyter_client's own tests ----------------------------------------------------------------------

PLUGIN = """
import asyncio, inspect, os, sys
import jupyter_client.session, pytest

if os.environ["SESSION"] == "fastwire":
    from fastwire.session import Session
    jupyter_client.session.Session = Session

def pytest_collection_finish():
    module = sys.modules["test_session"].ss.Session.__module__
    assert module.startswith(os.environ["SESSION"]), module

@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    if inspect.iscoroutinefunction(pyfuncitem.obj):
        names = pyfuncitem._fixtureinfo.argnames
        asyncio.run(pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in names}))
        return True
"""


def download(version: str, into: Path) -> str:
    """Why the sdist is not there, or nothing."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    options = ["--no-binary", ":all:", "--timeout", "15", "--retries", "1", "--dest", str(into)]
    try:
        result = subprocess.run(
            [*command, *options, f"jupyter_client=={version}"], capture_output=True, text=True, check=False, timeout=240
        )
    except subprocess.TimeoutExpired:
        return "pip did not come to an end"
    return "" if result.returncode == 0 else result.stderr.strip().rpartition("\n")[2] or "pip failed"


@pytest.fixture(scope="module")
def their_tests(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with jupyter_client's test_session.py, of the version that is installed; downloaded once."""
    version = metadata.version("jupyter_client")
    cache = Path(pytestconfig.cache.mkdir(f"jupyter_client-{version}"))
    name = f"jupyter_client-{version}"
    problem = "" if (cache / f"{name}.tar.gz").exists() else download(version, cache)
    if problem:
        not_tested(f"jupyter_client's own tests did NOT run, its sdist is not here: {problem}")
    directory = tmp_path_factory.mktemp("jupyter_client")
    with tarfile.open(cache / f"{name}.tar.gz") as archive:
        source = archive.extractfile(f"{name}/tests/test_session.py")
        assert source is not None
        (directory / "test_session.py").write_bytes(source.read())
    (directory / "conftest.py").write_text(PLUGIN)
    (directory / "pytest.ini").write_text("[pytest]\n")
    return directory


def outcomes(directory: Path, whose: str) -> dict[str, str]:
    """What became of each of their tests with the Session of ``jupyter_client`` or ``fastwire``."""
    report = directory / f"{whose}.xml"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:asyncio",
        "-p",
        "no:cacheprovider",
        f"--junit-xml={report}",
    ]
    environment = os.environ | {"SESSION": whose, "PYTEST_ADDOPTS": ""}
    result = subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True, check=False, timeout=200 * SLOW
    )
    assert report.exists(), result.stdout + result.stderr
    cases = ElementTree.parse(report).iter("testcase")
    return {f"{case.get('classname')}::{case.get('name')}": case[0].tag if len(case) else "passed" for case in cases}


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_the_stock_sessions_own_tests(their_tests: Path) -> None:
    expected = outcomes(their_tests, "jupyter_client")
    assert list(expected.values()).count("passed") > 30
    assert outcomes(their_tests, "fastwire") == expected
    assert set(expected.values()) <= {"passed", "skipped"}

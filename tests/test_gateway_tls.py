"""A gateway that is reached by TLS, with a certificate of a private authority; one that asks for the front's own."""

import shutil
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from absent import not_tested
from gateway_stage import front_of
from server import PROTOCOLS, Client, Server, serving
from test_gateway import all_sizes_pass, status_of

pytestmark = pytest.mark.timeout(180)


#: What RFC 5280 wants of an authority's certificate and of others, as Python does from 3.13 on.
OF_AUTHORITIES = "keyUsage=critical,keyCertSign,cRLSign"
OF_OTHERS = "subjectAltName=IP:127.0.0.1\nsubjectKeyIdentifier=hash\nauthorityKeyIdentifier=keyid\n"


@dataclass
class Authority:
    """Signs certificates, which nobody trusts who has not its own."""

    home: Path

    def __post_init__(self) -> None:
        named = ["-subj", "/CN=an authority", "-addext", OF_AUTHORITIES]
        self._openssl("req", "-x509", *KEY, "-days", "2", *named, "-keyout", "key", "-out", "cert")

    @property
    def cert(self) -> Path:
        return self.home / "cert"

    def sign(self, name: str) -> tuple[Path, Path]:
        """A certificate of 127.0.0.1, and its key."""
        (self.home / "names").write_text(OF_OTHERS)
        self._openssl("req", *KEY, "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.csr")
        signed = ["-CA", "cert", "-CAkey", "key", "-CAcreateserial", "-days", "2", "-extfile", "names"]
        self._openssl("x509", "-req", "-in", f"{name}.csr", *signed, "-out", f"{name}.cert")
        return self.home / f"{name}.cert", self.home / f"{name}.key"

    def _openssl(self, *arguments: str) -> None:
        openssl = shutil.which("openssl")
        if openssl is None:
            not_tested("TLS IS NOT TESTED: there is no openssl command to make certificates with")
        subprocess.run([openssl, *arguments], check=True, capture_output=True, cwd=self.home)


KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Signed nothing here."""
    return Authority(tmp_path_factory.mktemp("stranger"))


@contextmanager
def gateway_of(authority: Authority, home: Path, *, asks: bool) -> Iterator[Server]:
    """With a certificate of the authority; one that ``asks`` wants its clients' to be signed by it, too."""
    cert, key = authority.sign("gateway")
    tls = ssl.create_default_context(cafile=str(authority.cert))
    options = [f"--ServerApp.certfile={cert}", f"--ServerApp.keyfile={key}"]
    if asks:
        options.append(f"--ServerApp.client_ca={authority.cert}")
        tls.load_cert_chain(*authority.sign("tests"))
    with serving(home, *options, tls=tls) as server:
        yield server


WAYS = [
    pytest.param(False, id="asks for nothing"),
    pytest.param(True, id="asks for a certificate", marks=pytest.mark.nightly),
]


@pytest.fixture(scope="module", params=WAYS)
def asks(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture(scope="module")
def gateway(asks: bool, authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with gateway_of(authority, tmp_path_factory.mktemp("gateway"), asks=asks) as running:
        yield running


@pytest.fixture(scope="module")
def shows(asks: bool, authority: Authority) -> list[str]:
    """What the front is to show the gateway."""
    if not asks:
        return []
    cert, key = authority.sign("front")
    return [f"--GatewayClient.client_cert={cert}", f"--GatewayClient.client_key={key}"]


def trusts(authority: Authority) -> str:
    return f"--GatewayClient.ca_certs={authority.cert}"


def test_everything_passes(gateway: Server, authority: Authority, shows: list[str], tmp_path: Path) -> None:
    """REST and WebSockets, by what the user told the front of whom to trust."""
    with front_of(gateway, tmp_path, trusts(authority), *shows) as front, front.kernel() as kernel:
        for protocol in PROTOCOLS.values():
            with Client(front, kernel, protocol) as client:
                all_sizes_pass(client, 1000, 3_000_000)
        assert not front.logged("Traceback")


def test_a_front_that_trusts_another_authority(
    gateway: Server, authority: Authority, stranger: Authority, shows: list[str], tmp_path: Path
) -> None:
    """It serves, and whoever asks for what is the gateway's is told why not, in one sentence without a traceback."""
    with front_of(gateway, tmp_path, trusts(authority), *shows) as front:
        kernel = front.start_kernel()
        front.process.kill()
    with front_of(gateway, tmp_path, trusts(stranger), *shows) as front:
        refused = f"The gateway {gateway.root} cannot be trusted, or does not trust us"
        for path in "/api/kernels", "/api/kernelspecs", f"/api/kernels/{kernel}":
            assert_refused(front.rest("GET", path), refused)
        assert_refused(front.rest("POST", "/api/kernels", {"name": "python3"}), refused)
        assert status_of(front, kernel) == 502
        (line,) = front.logged(f"; kernel {kernel}")
        assert refused in line
        assert "c.GatewayClient.ca_certs names the file" in line
    assert front.process.returncode == 0, "it ends although it cannot end its kernel"
    assert front.logged(f"Kernel {kernel} could not be ended: {refused}")
    assert not front.logged("Traceback")
    gateway.end_kernel(kernel)


def assert_refused(answer: tuple[int, object], words: str) -> None:
    status, said = answer
    assert status == 502
    assert words in said["message"]
    assert "c.GatewayClient.ca_certs names the file" in said["message"]


@pytest.mark.nightly
def test_a_front_that_asks_for_no_proof(gateway: Server, shows: list[str], tmp_path: Path) -> None:
    with front_of(gateway, tmp_path, "--GatewayClient.validate_cert=False", *shows) as front:
        with front.kernel() as kernel, Client(front, kernel) as client:
            assert client.run("6 * 7").result == "42"
        assert not front.logged("Traceback")


@pytest.mark.parametrize("asks", WAYS[1:], indirect=True)
def test_a_front_that_shows_nothing(gateway: Server, authority: Authority, tmp_path: Path) -> None:
    """To a gateway that asks."""
    with front_of(gateway, tmp_path, trusts(authority)) as front:
        assert_refused(front.rest("GET", "/api/kernels"), f"The gateway {gateway.root} cannot be trusted")
        assert not front.logged("Traceback")

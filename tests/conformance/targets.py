"""Starts echo servers to be judged."""

import contextlib
import json
import re
import shutil
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from judge import Target

#: Why a connection was closed, and refused requests.
EXPECTED = re.compile(r"; closing with 10|^4\d\d [A-Z]+ /|^Malformed HTTP message from ")
ECHO = Path(__file__).with_name("echo.py")


def make_certificate(folder: Path) -> Path:
    """A key and its self-signed certificate for 127.0.0.1 in one file. Raises FileNotFoundError without openssl."""
    openssl = shutil.which("openssl")
    if openssl is None:
        raise FileNotFoundError("openssl")
    path = folder / "server.pem"
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    names = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    files = ["-keyout", str(path), "-out", f"{path}.crt"]
    subprocess.run([openssl, "req", "-x509", *curve, *names, *files], check=True, capture_output=True)
    path.write_text(path.read_text() + Path(f"{path}.crt").read_text())
    return path


@dataclass
class Running:
    target: Target
    log: Path

    def complaints(self) -> list[str]:
        """Lines of the log that nothing in the table accounts for."""
        return [line for line in self.log.read_text().splitlines() if line and not EXPECTED.search(line)]


@contextlib.contextmanager
def serving(name: str, **patience: float) -> Iterator[Running]:
    """An echo server of ``name``, until the block ends."""
    with tempfile.TemporaryDirectory() as folder:
        certificate = make_certificate(Path(folder))
        log = Path(folder) / "stderr"
        with log.open("wb") as stderr:
            process = subprocess.Popen(
                [sys.executable, str(ECHO), name, str(certificate)], stdout=subprocess.PIPE, stderr=stderr
            )
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line, log.read_text()
            client_tls = ssl.create_default_context(cafile=str(certificate))
            yield Running(Target(name, **json.loads(line), client_tls=client_tls, **patience), log)
        finally:
            process.terminate()
            process.wait()
            process.stdout.close()

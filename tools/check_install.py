"""Is an installed fastwire whole? Run it with the environment's Python and -I: the source tree must not help."""

import importlib.resources
import pathlib
import sys

import fastwire

PACKAGE = importlib.resources.files("fastwire")
EXTENSION = pathlib.Path(sys.prefix, "etc", "jupyter", "jupyter_server_config.d", "fastwire.json")
LAB_EXTENSION = pathlib.Path(sys.prefix, "share", "jupyter", "labextensions", "jupyter-fastwire")

print(fastwire.__file__, fastwire.build_info())
brought = {"jupyter_client", "jupyter_server", "tornado"} & set(sys.modules)
assert not brought, f"import fastwire brings {brought}"
for name in ("py.typed", "_core.pyi", "page/page.html"):
    assert PACKAGE.joinpath(name).is_file(), name
assert EXTENSION.is_file(), EXTENSION
for name in ("package.json", "install.json", "static/remoteEntry.js"):
    copies = LAB_EXTENSION / name, PACKAGE.joinpath("lab", "jupyter-fastwire", name)
    assert copies[0].read_bytes() == copies[1].read_bytes(), name
signer = fastwire.Signer(b"key")
parts = [b"{}"] * 4
signer.verify(signer.sign(parts), parts)

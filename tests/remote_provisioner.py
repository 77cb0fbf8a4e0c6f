"""A provisioner whose kernels are on another machine: in a network namespace of their own, reached by its address.

Like those of gateway_provisioners it learns only from the launch where the kernel listens, which is elsewhere at every
start. The kernelspec says the rest: ``namespace``, ``address``, ``delay`` of a launch in seconds, ``encrypted``.
"""

import asyncio
import json
import random
import uuid
from pathlib import Path
from typing import Any

import zmq
from jupyter_client.provisioning import KernelProvisionerBase, LocalProvisioner
from traitlets import Bool, Float, Unicode

CHANNELS = ("shell", "iopub", "stdin", "control", "hb")


def written(info: dict[str, Any]) -> Path:
    """The connection file of the other machine."""
    path = Path(f"there-{uuid.uuid4().hex}.json")
    path.write_text(json.dumps(info))
    return path


class RemoteProvisioner(LocalProvisioner):
    """Popen and signals are the local ones: only the network is another."""

    namespace = Unicode(config=True)
    address = Unicode(config=True)
    delay = Float(0.0, config=True)
    encrypted = Bool(False, config=True)

    async def pre_launch(self, **kwargs: Any) -> dict[str, Any]:
        return await KernelProvisionerBase.pre_launch(self, cmd=self.kernel_spec.argv, **kwargs)

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> dict[str, Any]:
        await asyncio.sleep(self.delay)
        ports = random.sample(range(20_000, 60_000), len(CHANNELS))
        info: dict[str, Any] = {f"{name}_port": port for name, port in zip(CHANNELS, ports, strict=True)}
        info |= {"ip": self.address, "transport": "tcp", "signature_scheme": "hmac-sha256"}
        info |= {"key": self.parent.session.key.decode(), "kernel_name": self.kernel_spec.display_name}
        if self.encrypted:
            public, secret = zmq.curve_keypair()
            info |= {"curve_publickey": public.decode(), "curve_secretkey": secret.decode()}
        there = written(info)
        inside = ["ip", "netns", "exec", self.namespace, *cmd]
        await super().launch_kernel([word.format(connection_file=there) for word in inside], **kwargs)
        return info | {"key": info["key"].encode()}

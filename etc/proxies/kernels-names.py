# jupyter_server_config.py of servers behind one balancer: a kernel's id begins with the name of its server.
import os
import uuid

from fastwire.jupyter import FastwireMappingKernelManager


class NamedKernels(FastwireMappingKernelManager):
    def new_kernel_id(self, **kwargs):
        return f"{os.environ['SERVER_NAME']}_{uuid.uuid4()}"


c = get_config()  # noqa: F821 - Jupyter has it there
c.ServerApp.kernel_manager_class = NamedKernels

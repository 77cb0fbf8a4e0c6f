# JupyterHub whose users' servers have fastwire: in the environment of the servers, where it is on by itself.
c = get_config()  # noqa: F821 - JupyterHub has it there

# The proxy runs by itself, so that it and the hub may each be restarted while people work:
# CONFIGPROXY_AUTH_TOKEN=... configurable-http-proxy --default-target http://127.0.0.1:8081
c.ConfigurableHTTPProxy.should_start = False
c.ConfigurableHTTPProxy.api_url = "http://127.0.0.1:8001"
c.JupyterHub.cleanup_proxy = False

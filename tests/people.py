"""Users of a server who may do some things and not others; a header says who somebody is, as that of a hub in front."""

#: A configuration; ``MAY`` has users' actions, on the resource ``GUARDED`` or on all. Everybody else may do everything.
_PERMISSIONS = """
from jupyter_server.auth import Authorizer, IdentityProvider, User

MAY = {may!r}
GUARDED = {guarded!r}


class Named(IdentityProvider):
    def get_user(self, handler):
        name = handler.request.headers.get("X-User")
        return User(name) if name else super().get_user(handler)


class ByTable(Authorizer):
    def is_authorized(self, handler, user, action, resource):
        return GUARDED not in (None, resource) or action in MAY.get(user.username, (action,))


c = get_config()
c.ServerApp.identity_provider_class = Named
c.ServerApp.authorizer_class = ByTable
"""


def permissions(may: dict[str, tuple[str, ...]], guarded: str | None = None) -> str:
    """The text of a configuration in which these users may do this, on one resource or on all."""
    return _PERMISSIONS.format(may=may, guarded=guarded)

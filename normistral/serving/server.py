"""Earlier place of `normistral.server.server`."""

from normistral.server.server import ApiServer, background_server

__all__ = ["ApiServer", "background_server"]

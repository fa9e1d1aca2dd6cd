"""Earlier place of `normistral.server.app`."""

from normistral.server.app import create_app

__all__ = ["create_app"]

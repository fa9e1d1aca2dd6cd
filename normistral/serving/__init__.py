"""Earlier name of `normistral.server`; `app` and `server` stay importable from here."""

"""NorMistral on CPUs: export to OpenVINO and run, without torch."""

from __future__ import annotations

__version__ = "0.1.0"

"""Turns the telemetry of dependencies off, before any of them is imported; imports none of them.

Switches that each one obeys, read in the sources of the versions that pyproject.toml allows:

- onnxruntime from 1.29 on uploads usage figures unless ORT_DISABLE_TELEMETRY is set.
- huggingface_hub, and with it transformers and optimum, heeds HF_HUB_DISABLE_TELEMETRY and DO_NOT_TRACK.
- ray reports from the machine that starts a cluster, every hour, unless RAY_USAGE_STATS_ENABLED is 0.
- openvino and nncf send through the package openvino_telemetry. It knows no switch but a file in the home folder, and
  without that file it is on: importing nncf alone writes a client id to ~/intel. Both import it
  optionally and have their own stub for when it is missing, so to them it is missing. (CI=true would turn it off too,
  but every other program that is started from here would believe it.)
"""

from __future__ import annotations

import os
import sys

_SWITCHES = {
    "ORT_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def silence_telemetry() -> None:
    """Turn the dependencies' telemetry off in this process and in those it starts.

    An application that imported openvino_telemetry (with openvino or nncf) before has made its own choice: it keeps it.
    """
    os.environ.update(_SWITCHES)
    # None makes `import openvino_telemetry` raise ModuleNotFoundError (the import system, "The module cache").
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

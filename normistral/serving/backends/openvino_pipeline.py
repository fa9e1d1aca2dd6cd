"""Opens an OpenVINO artifact for many answers at once, with the settings that the library would load it with."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from normistral import hardware
from normistral.errors import EngineError, MissingExtraError, UsageError
from normistral.manifest import Manifest
from normistral.runtime.engines.base import Capabilities, settings_basis
from normistral.runtime.engines.openvino import choose_settings
from normistral.runtime.engines.openvino_settings import (
    NUMERICS,
    REPORTED,
    require_taken,
    said_first,
    settings_in_force,
)
from normistral.runtime.engines.settings import PREFILL_CHUNK
from normistral.runtime.tokenizer import Tokenizer
from normistral.serving.backends.base import Job
from normistral.serving.backends.cache_plan import BatchLimits, CachePlan, plan_cache
from normistral.serving.backends.openvino_batch import OpenVINOBatch

if TYPE_CHECKING:
    import openvino as ov
    import openvino_genai

logger = logging.getLogger(__name__)

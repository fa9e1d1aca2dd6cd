"""The machine's read bandwidth, in a process in which BLAS has one thread for a call.

python bandwidth.py THREADS     with normistral.evaluation.bench.bandwidth.SINGLE_THREADED_BLAS in the environment
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

from normistral.evaluation.bench.bandwidth import choose_buffer_bytes, last_level_cache_bytes, measure_read_bandwidth
from normistral.hardware import available_memory_bytes

if __name__ == "__main__":
    buffer_bytes = choose_buffer_bytes(last_level_cache_bytes(), available_memory_bytes())
    print(json.dumps(asdict(measure_read_bandwidth(int(sys.argv[1]), buffer_bytes))))

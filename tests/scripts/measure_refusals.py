"""Read every broken file with little address space to spare: what it promises must not be allocated. Prints the count.

    python tests/scripts/measure_refusals.py FOLDER

A child process of test_hostile_weights, because the limit stays for the rest of the process.
"""

import resource
import sys
from pathlib import Path

import gguf  # noqa: F401  (what the readers would import, before the limit)

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

from broken_gguf import BROKEN_GGUF
from broken_safetensors import BROKEN_SAFETENSORS
from broken_torch import BROKEN_TORCH

from normistral.errors import CheckpointError
from normistral.export.checkpoint.gguf_file import read_gguf
from normistral.export.checkpoint.torch_file import read_torch_file
from normistral.export.checkpoint.weights import read_safetensors

SPARE_BYTES = 64 * 2**20  # several times the largest of these files; the smallest promise in them is larger

used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + SPARE_BYTES, used + SPARE_BYTES))
path = Path(sys.argv[1]) / "broken"
refused = 0
for read, files in (
    (read_safetensors, BROKEN_SAFETENSORS),
    (read_torch_file, BROKEN_TORCH),
    (read_gguf, BROKEN_GGUF),
):
    for data in files.values():
        path.write_bytes(data)
        try:
            read(path)
        except CheckpointError:
            refused += 1
print(refused)

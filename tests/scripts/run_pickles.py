"""The control of test_hostile_weights: run each hostile pickle as plain pickle would. Prints the names that ran.

python tests/scripts/run_pickles.py FOLDER
"""

import io
import pickle
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

from hostile_pickles import RUNNING


class Unpickler(pickle.Unpickler):
    """Python's own, with a storage for every persistent id, as torch.load has it."""

    def persistent_load(self, pid: object) -> object:
        return torch.FloatStorage(4)


for place, (name, make) in enumerate(RUNNING.items()):
    folder = Path(sys.argv[1]) / str(place)
    folder.mkdir()
    data = make(folder)
    try:
        Unpickler(io.BytesIO(data)).load()
    except Exception as exc:
        print(f"{name}: {exc!r}"[:200], file=sys.stderr)
    if (folder / "ran").exists():
        print(name)

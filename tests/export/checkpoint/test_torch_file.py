"""What torch.save writes is found where torch.load finds it."""

from __future__ import annotations

import struct
import tracemalloc
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile_pickles import named, storage, table, tensor, whole

from normistral.errors import CheckpointError
from normistral.export.checkpoint.tensor import map_tensor
from normistral.export.checkpoint.torch_file import read_torch_file


def saved(path: Path, state: Any, **options: Any) -> Path:
    torch.save(state, path, **options)
    return path


def parameters() -> dict[str, torch.Tensor]:
    noise = torch.Generator().manual_seed(3)
    matrix = torch.randn(4, 6, generator=noise)
    return {
        "matrix": matrix,
        "half": matrix.half(),
        "bfloat": matrix.to(torch.bfloat16),
        "row": matrix[2],
        "rows": matrix[1:3],
        "tied": matrix,
        "parameter": torch.nn.Parameter(matrix.clone()),
        "scalar": torch.tensor(2.5),
        "nothing": torch.empty(0, 6),
        "no rows of it": matrix[2:2],
        "one column": matrix[:, :1][:1],  # one item: its stride of 6 leads nowhere
        "æøå \ud800": torch.ones(3),
    }


@pytest.mark.parametrize("ordered", [True, False])
def test_every_tensor_equals_that_of_torch_load(tmp_path: Path, ordered: bool) -> None:
    state = OrderedDict(parameters()) if ordered else parameters()
    path = saved(tmp_path / "a.bin", state)
    found, expected = read_torch_file(path), torch.load(path, weights_only=True)
    assert list(found) == list(expected)
    for name, values in expected.items():
        mapped = map_tensor(found[name])
        assert mapped.dtype == values.dtype
        assert torch.equal(mapped, values.detach()), name
    assert found["tied"].start == found["matrix"].start
    assert found["row"].start == found["matrix"].start + 2 * 6 * 4


def test_the_state_of_a_module_with_its_versions(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    path = saved(tmp_path / "a.bin", module.state_dict())
    found = read_torch_file(path)
    assert {name: tensor.shape for name, tensor in found.items()} == {
        "0.weight": (2, 3), "0.bias": (2,), "1.weight": (2,), "1.bias": (2,),
    }  # fmt: skip
    assert torch.equal(map_tensor(found["0.weight"]), module[0].weight)


def test_writing_to_a_mapped_tensor_leaves_the_file_alone(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.bin", parameters())
    before = path.read_bytes()
    map_tensor(read_torch_file(path)["matrix"]).zero_()
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "view", [lambda matrix: matrix.T, lambda matrix: matrix[:, ::2], lambda matrix: matrix[:1].expand(3, 6)]
)
def test_a_view_that_is_not_row_by_row_is_refused_with_the_way_out(tmp_path: Path, view: Any) -> None:
    path = saved(tmp_path / "a.bin", {"w": view(parameters()["matrix"])})
    with pytest.raises(CheckpointError, match="'w' is stored transposed, cut or repeated: shape") as caught:
        read_torch_file(path)
    assert ".contiguous()" in caught.value.hint
    saved(path, {"w": view(parameters()["matrix"]).contiguous()})
    assert "w" in read_torch_file(path)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"w": torch.ones(3, dtype=torch.int64)}, "'w' is stored as 'Long', not as bfloat16, float16 or float32"),
        ({"w": torch.ones(3, dtype=torch.float64)}, "'w' is stored as 'Double'"),
        ({"w": torch.ones(3).to(torch.float8_e4m3fn)}, "names torch._utils._rebuild_tensor_v3; nothing was run"),
        ({"state_dict": {"w": torch.ones(3)}, "step": 3}, "holds more than tensors by name"),
        ([torch.ones(3)], "holds more than tensors by name"),
        (torch.nn.Linear(2, 2), "names torch.nn.modules.linear.Linear; nothing was run"),
    ],
)
def test_what_is_no_table_of_floats_is_named(tmp_path: Path, state: Any, message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_torch_file(saved(tmp_path / "a.bin", state))
    assert message in caught.value.message
    assert caught.value.hint


def test_the_old_format_is_refused_with_the_way_out(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.bin", parameters(), _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"torch's format from before version 1\.6") as caught:
        read_torch_file(path)
    assert "save it anew with a current torch" in caught.value.hint


def sparse_checkpoint(path: Path, items: int) -> None:
    """Two float16 tensors of `items` each, as torch writes them (zip64), whose bytes are a hole in the file."""
    half = named("torch", "HalfStorage")
    columns = 4096
    shape, stride = (items // columns, columns), (columns, 1)
    records = {f"w{key}": tensor(storage(str(key), items, half), shape, stride) for key in (0, 1)}
    parts = [
        (b"x/data.pkl", whole(table(**records)), 0),
        *((f"x/data/{key}".encode(), b"", 2 * items) for key in (0, 1)),
    ]
    parts.append((b"x/version", b"3\n", 0))
    central = b""
    with path.open("wb") as file:
        for name, data, hole in parts:
            header, size = file.tell(), len(data) + hole
            wide = struct.pack("<2H2Q", 1, 16, size, size)
            file.write(struct.pack("<4s5H3L2H", b"PK\x03\x04", 45, 0, 0, 0, 0, 0, 2**32 - 1, 2**32 - 1, len(name), 20))
            file.write(name + wide + data)
            file.seek(hole, 1)
            wide = struct.pack("<2H3Q", 1, 24, size, size, header)
            full = 2**32 - 1
            central += struct.pack(
                "<4s6H3L5H2L", b"PK\x01\x02", 45, 45, 0, 0, 0, 0, 0, full, full, len(name), len(wide), 0, 0, 0, 0, full
            )
            central += name + wide
        start = file.tell()
        file.write(central + struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 4, 4, len(central), start))
        file.write(struct.pack("<4sLQL", b"PK\x06\x07", 0, start + len(central), 1))
        file.write(struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 4, 4, len(central), 2**32 - 1, 0))


def test_a_file_of_13_gigabytes_is_opened_without_reading_it(tmp_path: Path) -> None:
    path = tmp_path / "large.bin"
    sparse_checkpoint(path, items=3_350_003_712)
    assert path.stat().st_size > 13_400_000_000
    tracemalloc.start()
    try:
        found = read_torch_file(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2**20
    assert found["w0"].nbytes == found["w1"].nbytes == 6_700_007_424
    with path.open("r+b") as file:  # the last item of the second tensor: float16 1.0
        file.seek(found["w1"].start + found["w1"].nbytes - 2)
        file.write(b"\x00\x3c")
    theirs = torch.load(path, weights_only=True, mmap=True)  # and torch finds the same in it
    for name in ("w0", "w1"):
        ours = map_tensor(found[name])
        assert ours.shape == theirs[name].shape
        assert ours[-1, -1] == theirs[name][-1, -1] == (1.0 if name == "w1" else 0.0)

"""A protobuf message as its list of fields: enough to change a few of them and write the rest back as it was.

Source: "Encoding" of the Protocol Buffers documentation. A field is a varint key (number << 3 | wire type) and a value:
a varint (type 0), 8 or 4 bytes (1, 5), or a varint length and that many bytes (2).
"""

from __future__ import annotations

from collections.abc import Iterator

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
_FIXED_WIDTH = {FIXED64: 8, FIXED32: 4}
_VARINT_BYTES = 10  # of 64 bits, 7 in a byte


Chunk = bytes | memoryview


class WireError(ValueError):
    """The bytes are no protobuf message."""


class WireMessage:
    """A message: (field number, wire type, value) in the order of the bytes; varints are int, all else is bytes."""

    def __init__(self, data: Chunk = b"") -> None:
        """Split a message into its fields; messages within it stay bytes.

        Raises:
            WireError: the bytes are no message.
        """
        self.fields: list[tuple[int, int, int | Chunk]] = list(_read_fields(memoryview(data)))

    def texts(self, number: int) -> list[str]:
        """Every value of a string field."""
        try:
            return [str(value, "utf-8") for value in self.chunks(number)]
        except UnicodeDecodeError as exc:
            raise WireError(f"field {number} is no text") from exc

    def text(self, number: int) -> str:
        """A string field's value, "" where it is not set. The last one counts, as the encoding says."""
        return (self.texts(number) or [""])[-1]

    def chunks(self, number: int) -> list[Chunk]:
        """Every value of a field of bytes, text or messages."""
        values: list[Chunk] = []
        for field, _, value in self.fields:
            if field == number:
                if isinstance(value, int):
                    raise WireError(f"field {number} is a number")
                values.append(value)
        return values

    def number(self, number: int) -> int:
        """A varint field's value as it was written (unsigned), 0 where it is not set."""
        values = [value for field, _, value in self.fields if field == number]
        if not values:
            return 0
        if not isinstance(values[-1], int):
            raise WireError(f"field {number} is no varint")
        return values[-1]

    def remove(self, *numbers: int) -> None:
        """Drop every value of these fields."""
        self.fields = [entry for entry in self.fields if entry[0] not in numbers]

    def add(self, number: int, value: int | str | bytes | WireMessage) -> WireMessage:
        """Append a value and return this message; negative numbers are two's complement, as in an int64 field."""
        if isinstance(value, int):
            self.fields.append((number, VARINT, value & (2**64 - 1)))
        else:
            chunk = (
                bytes(value) if isinstance(value, WireMessage) else value.encode() if isinstance(value, str) else value
            )
            self.fields.append((number, BYTES, chunk))
        return self

    def __bytes__(self) -> bytes:
        parts: list[Chunk] = []
        for number, wire_type, value in self.fields:
            parts.append(_varint(number << 3 | wire_type))
            if isinstance(value, int):
                parts.append(_varint(value))
            else:
                if wire_type == BYTES:
                    parts.append(_varint(len(value)))
                parts.append(value)
        return b"".join(parts)


def _read_fields(data: memoryview) -> Iterator[tuple[int, int, int | Chunk]]:
    position = 0
    while position < len(data):
        key, position = _read_varint(data, position)
        number, wire_type = key >> 3, key & 7
        if number == 0:
            raise WireError(f"a field without a number before byte {position}")
        if wire_type == VARINT:
            value, position = _read_varint(data, position)
            yield number, wire_type, value
            continue
        if wire_type == BYTES:
            length, position = _read_varint(data, position)
        elif wire_type in _FIXED_WIDTH:
            length = _FIXED_WIDTH[wire_type]
        else:
            raise WireError(f"unknown wire type {wire_type} before byte {position}")
        if length > len(data) - position:
            raise WireError(f"field {number} wants {length} bytes where {len(data) - position} are left")
        yield number, wire_type, data[position : position + length]
        position += length


def _read_varint(data: memoryview, position: int) -> tuple[int, int]:
    """Value and the position behind it; the lowest 7 bits come first."""
    value = 0
    for index, byte in enumerate(data[position : position + _VARINT_BYTES]):
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return value & (2**64 - 1), position + index + 1
    raise WireError(f"no end of the number at byte {position}")


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)

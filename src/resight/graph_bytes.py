"""The structure of an ONNX file without its weights: what can be read of a hostile file in bounded time and memory.

A protobuf parser pays for what a file claims: 2 bytes make an empty node of a hundred bytes, and a 94 MB model is
copied before its first field can be looked at. So the file is walked in protobuf's wire format first
(https://protobuf.dev/programming-guides/encoding/), the weights are skipped and only counted, and the little that is
left, half a megabyte at most in our graphs, is bounded, parsed and held to the one spelling that protobuf writes.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx

from resight.errors import BundleError

MAX_BYTES = 512 * 1024 * 1024  # five ResNet-50 in fp32, our largest encoder
MAX_STRUCTURE_BYTES = 2 * 1024 * 1024  # five times that of OSNet x1.0 in INT8 for TensorRT, our largest: 0.42 MB
MAX_FIELDS = 32_768  # of one message; that graph has 5000 nodes, weights and values
SMALL_BYTES = 1024  # of constants that are parsed, because shapes may follow from them (the ends of a slice)
_GRAPH, _INITIALIZER = onnx.ModelProto.GRAPH_FIELD_NUMBER, onnx.GraphProto.INITIALIZER_FIELD_NUMBER
_RAW_DATA = onnx.TensorProto.RAW_DATA_FIELD_NUMBER
_PATH = (_GRAPH, _INITIALIZER, _RAW_DATA)
_FIXED = {1: 8, 5: 4}  # wire types of fixed length
_BYTES = 2  # the wire type of messages, strings and packed numbers


def read_structure(data: bytes) -> tuple[onnx.ModelProto, list[int]]:
    """Parse an ONNX file but for its weights.

    Args:
        data: a serialised model.

    Returns:
        The model, its initializers without the ``raw_data`` that is larger than `SMALL_BYTES`; and the bytes
        left out of each initializer, 0 where nothing was.

    Raises:
        BundleError: too large, cut short, or not spelled as protobuf spells it.
    """
    if not 0 < len(data) <= MAX_BYTES:
        raise BundleError(f"expected 1 to {MAX_BYTES} bytes, found {len(data)}")
    left_out: list[int] = []
    structure = _skim(data, 0, len(data), 0, left_out)
    model = onnx.ModelProto()
    model.ParseFromString(structure)
    model.DiscardUnknownFields()
    if model.SerializeToString(deterministic=True) != structure:
        raise BundleError(
            "expected protobuf's own spelling of an ONNX model, found unknown, repeated or misplaced fields, or bytes "
            "after its end"
        )
    return model, left_out


def _skim(data: bytes, start: int, end: int, depth: int, left_out: list[int]) -> bytes:
    """Copy the message at ``data[start:end]`` without the weights in it; ``depth`` is its place on `_PATH`."""
    kept, seen = bytearray(), 0
    for count, (number, begin, value, after) in enumerate(_fields(data, start, end)):
        on_path = number == _PATH[depth]
        seen += on_path
        if on_path and (data[begin] & 7 != _BYTES or (seen > 1 and number != _INITIALIZER)):
            raise BundleError(f"expected one field {number} of bytes in its message, found another at byte {begin}")
        if on_path and number == _RAW_DATA and after - value > SMALL_BYTES:
            left_out[-1] = after - value
            continue
        if on_path and number != _RAW_DATA:
            if number == _INITIALIZER:
                left_out.append(0)
            inner = _skim(data, value, after, depth + 1, left_out)
            kept += _varint(number << 3 | _BYTES) + _varint(len(inner)) + inner
        else:
            kept += data[begin : min(after, begin + MAX_STRUCTURE_BYTES + 1)]  # one more than may be is enough
        if len(kept) > MAX_STRUCTURE_BYTES or count >= MAX_FIELDS:
            raise BundleError(
                f"expected at most {MAX_STRUCTURE_BYTES} bytes beside the weights and {MAX_FIELDS} fields of a "
                f"message, found more at byte {begin}"
            )
    return bytes(kept)


def _fields(data: bytes, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Walk a message: the number of each field, where it begins, where its value begins and where that ends."""
    place = start
    while place < end:
        begin = place
        tag, place = _read_varint(data, place, end)
        number, wire = tag >> 3, tag & 7
        value = place
        if wire == 0:
            _, place = _read_varint(data, place, end)
        elif wire == _BYTES:
            length, value = _read_varint(data, place, end)
            place = value + length
        elif wire in _FIXED:
            place += _FIXED[wire]
        else:
            raise BundleError(f"expected an ONNX model, found no protobuf at byte {begin}")
        if place > end:
            raise BundleError(f"expected a whole ONNX model, found one cut short at byte {begin}")
        yield number, begin, value, place


def _read_varint(data: bytes, place: int, end: int) -> tuple[int, int]:
    """A number of 7 bits a byte, the lowest first, and the place after it."""
    number = 0
    for shift in range(0, 70, 7):  # ten bytes hold 64 bits
        if place >= end:
            break
        byte = data[place]
        place += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, place
    raise BundleError(f"expected a whole ONNX model, found one cut short or no protobuf at byte {place}")


def _varint(number: int) -> bytes:
    out = bytearray()
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)

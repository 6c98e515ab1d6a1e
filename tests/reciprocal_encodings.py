"""k-reciprocal encodings from features alone: the neighbour search and the encoding in one call."""

from __future__ import annotations

from resight.arrays import Floats, Ints
from resight.neighbours.reciprocal import (
    ReciprocalEncoding,
    camera_list_lengths,
    encode_camera_aware,
    encode_reciprocal,
)
from resight.neighbours.search import search_neighbours, search_neighbours_by_camera


def encoding_of(rows: Floats, *, k1: int, k2: int) -> ReciprocalEncoding:
    return encode_reciprocal(rows, search_neighbours(rows, k1), k1=k1, k2=k2)


def camera_encoding_of(
    rows: Floats, cameras: Ints, *, k1_intra: int, k1_inter: int, k2_intra: int, k2_inter: int
) -> ReciprocalEncoding:
    lengths = camera_list_lengths(k1_intra, k1_inter, k2_intra, k2_inter)
    intra, inter = search_neighbours_by_camera(rows, cameras, *lengths)
    return encode_camera_aware(intra, inter, k1_intra=k1_intra, k1_inter=k1_inter, k2_intra=k2_intra, k2_inter=k2_inter)

"""Does an index leave out what a filter excludes? Two vectors tell, at every start, for every kind.

Some of faiss's indexes take a selector and do not look at it: the classic ones on the GPU (issues #3924, #3114) and
HNSW without a bounded queue (#5504). A deleted or foreign entry would then push the wanted ones out of the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import faiss
import numpy as np

from resight.errors import StartupError

Parameters = Callable[..., faiss.SearchParameters]


def obeys_filter(index: faiss.Index, parameters: Parameters = faiss.SearchParameters) -> bool:
    """Put two vectors into an empty index, search for the first and exclude it: is the second found?

    Args:
        index: empty, trained, of at least 2 dimensions.
        parameters: makes search parameters of ``sel=``.
    """
    rows = np.zeros((2, index.d), np.float32)
    rows[0, 0], rows[1, :2] = 1.0, (0.6, 0.8)
    index.add(rows)
    second = faiss.IDSelectorBitmap(np.array([0b10], np.uint8))  # type: ignore[call-arg,arg-type]  # bit i is row i
    try:
        _, found = index.search(rows[:1], 1, params=parameters(sel=second))
    except RuntimeError:  # it says that it cannot, which is as good as not obeying
        return False
    return bool(found.tolist() == [[1]])


def check_filters(kinds: Mapping[str, tuple[faiss.Index, Parameters]]) -> None:
    """Hold this faiss to its filters.

    Args:
        kinds: empty indexes, and what makes their search parameters, by name.

    Raises:
        StartupError: a deleted entry could push a living one out of an answer.
    """
    failed = [kind for kind, (index, parameters) in kinds.items() if not obeys_filter(index, parameters)]
    if failed:
        raise StartupError(
            f"faiss {faiss.__version__} does not look at filters in {', '.join(failed)}: install the locked version"
        )

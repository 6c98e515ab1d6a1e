"""Tables of ours in Parquet: written in one step, read with their schema checked.

A table's schema carries its version in the metadata; docs/crop-store.md is the format of both tables of a store.
"""

from __future__ import annotations

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from resight.atomic import write_atomic
from resight.errors import StoreError


def write_table(path: Path, table: pa.Table) -> None:
    """Write a table with checksums, replacing an earlier one in one step."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", write_page_checksum=True)
    write_atomic(path, buffer.getvalue())


def read_table(path: Path, schema: pa.Schema, *, mend: str) -> pa.Table:
    """The columns of a schema; a file may have others.

    Args:
        path: of the file.
        schema: names, types and nullability of the columns; its one entry of metadata is the version.
        mend: what the user can do about a file that cannot be read.

    Raises:
        FileNotFoundError: there is no such file.
        StoreError: it is damaged, of another version, or its columns are not those of the schema.
    """
    try:
        table = pq.read_table(path, partitioning=None, page_checksum_verification=True)
        table.validate(full=True)  # invalid UTF-8 among others
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise StoreError(f"{path} is damaged ({error}): {mend}") from error
    ((key, wanted),) = schema.metadata.items()
    version = (table.schema.metadata or {}).get(key, b"none").decode(errors="replace")
    if version != wanted.decode():
        raise StoreError(
            f"{path} has schema version {version}, this program reads {wanted.decode()}: use the resight that wrote "
            f"it, or {mend} as docs/crop-store.md says"
        )
    missing = [name for name in schema.names if name not in table.schema.names]
    if missing:
        raise StoreError(f"{path} misses the columns {', '.join(missing)}: {mend}, as docs/crop-store.md says")
    for field in schema:
        column = table.column(field.name)
        if column.type != field.type or (column.null_count and not field.nullable):
            raise StoreError(
                f"{path}: column {field.name} must be {field.type}{'' if field.nullable else ' without nulls'}, found "
                f"{column.type} with {column.null_count} nulls: {mend}, as docs/crop-store.md says"
            )
    return table.select(schema.names)

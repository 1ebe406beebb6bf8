"""The rows of a Parquet file as lines of JSON, a row group at a time.

for line, share in parquet.lines("rows.parquet"): ...
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROWS = 256  # that are decoded together


def text_size(path: Path) -> int:
    """Bytes of what it holds, unpacked."""
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        return sum(file.metadata.row_group(group).total_byte_size for group in range(file.metadata.num_row_groups))


def lines(path: Path) -> Iterator[tuple[bytes, float]]:
    """Yields (a row as a line of JSON, the share of the rows that have been decoded). A column or a field that is null
    is left out, for Parquet gives every row all of them."""
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        total, done = max(file.metadata.num_rows, 1), 0
        for batch in file.iter_batches(ROWS):
            done += batch.num_rows
            for row in batch.to_pylist():
                yield json.dumps(_without_nulls(row), ensure_ascii=False, default=str).encode() + b"\n", done / total


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value

"""Rows of parquet files, as records."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from data_tools.corpus import Split, open_parquet
from hunyuan_pretrain.data.errors import DataFormatError


def read_rows(
    split: Split, fields: Sequence[str], advance: Callable[[int], None]
) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """(row number in the file, its fields) for each row of a split; if a field is not UTF-8, the reason instead of the
    fields.

    `advance` is called with the number of bytes read from disk. Raises DataFormatError if a column is missing or
    occurs twice, or if the file is damaged.
    """
    with open_parquet(split.file) as parquet:
        check_columns(split.file.path, parquet.schema_arrow.names, fields)
        for group in range(split.start, split.end):
            row = sum(parquet.metadata.row_group(before).num_rows for before in range(group))
            for batch in parquet.iter_batches(batch_size=256, row_groups=[group], columns=list(fields)):
                for record in _records_of_batch(batch):
                    yield row, record
                    row += 1
            advance(split.file.size // max(parquet.num_row_groups, 1))


def check_columns(path: str, names: Sequence[str], fields: Sequence[str]) -> None:
    """Raise DataFormatError unless the file has exactly one column for each field."""
    missing = [name for name in fields if name not in names]
    if missing:
        columns = ", ".join(names[:8])
        raise DataFormatError(
            f"{path}: no column {missing[0]!r} (columns: {columns}); choose with --text-field or --template"
        )
    for name in fields:
        if names.count(name) > 1:
            raise DataFormatError(f"{path}: two columns are named {name!r}; rename one of them")


def _records_of_batch(batch: Any) -> Iterator[dict[str, Any] | str]:
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for number in range(len(batch)):
            try:
                yield from batch.slice(number, 1).to_pylist()
            except UnicodeDecodeError as error:
                yield f"not UTF-8 (byte 0x{error.object[error.start]:02x} at position {error.start})"

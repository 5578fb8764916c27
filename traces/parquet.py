"""Parquet files, through pyarrow where it is installed: the only file that knows it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from foreserve.models.errors import InvalidInput

if TYPE_CHECKING:
    import pandas as pd


def parquet_frames(
    file: str, chunk_rows: int, watch: Callable[[int], None] | None = None
) -> Iterator[pd.DataFrame]:
    """The rows in chunks, indexed by row number from 1; see `read_frames`."""
    import pandas as pd

    pa, pq = _pyarrow(file)
    row = 1
    try:
        with pq.ParquetFile(file) as table:
            size = os.path.getsize(file)
            yield table.schema_arrow.empty_table().to_pandas()
            for batch in table.iter_batches(batch_size=chunk_rows):
                frame = batch.to_pandas()
                frame.index = pd.RangeIndex(row, row + len(frame))
                row += len(frame)
                if watch:
                    watch(size * (row - 1) // max(table.metadata.num_rows, 1))
                yield frame
    except FileNotFoundError:
        raise InvalidInput("no such file", file=file) from None
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, InvalidInput):
            raise
        raise InvalidInput("not a whole Parquet file", file=file) from None


@contextmanager
def parquet_writer(
    file: str, target: Path, schema: Mapping[str, str]
) -> Iterator[Callable[[Sequence[NDArray[Any]]], None]]:
    """Yields a function that adds rows, given as one array per column of ``schema``
    (column: its Arrow type); ``file`` is the name for messages."""
    pa, pq = _pyarrow(file)
    fields = pa.schema(
        [(name, pa.type_for_alias(kind)) for name, kind in schema.items()]
    )
    with pq.ParquetWriter(target, fields, compression="zstd") as writer:

        def add(columns: Sequence[NDArray[Any]]) -> None:
            arrays = [
                pa.array(
                    column if column.dtype.kind in "fi" else np.asarray(column, str)
                )
                for column in columns
            ]
            writer.write_table(pa.table(arrays, schema=fields))

        yield add


def _pyarrow(file: str) -> tuple[Any, Any]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise InvalidInput(
            "Parquet needs pyarrow, which is not installed",
            file=file,
            hint="pip install 'foreserve[parquet]'",
        ) from None
    return pa, pq

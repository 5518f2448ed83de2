"""The Triton kernel of `kernels.chunk_scan`; imported only when it runs."""

from __future__ import annotations

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]


@triton.jit  # type: ignore[untyped-decorator]
def scan_kernel(  # type: ignore[no-untyped-def]
    query,
    left,
    within,
    errors,
    reads,
    end,
    start,
    output,
    states,
    chunks,
    size,
    rows,
    width,
    HAS_READS: tl.constexpr,
    BY_CHANNEL: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Carry one head's state, for one block of value channels, through all chunks."""
    head = tl.program_id(0).to(tl.int64)  # offsets may pass 2^31
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    token, row = tl.arange(0, TOKENS), tl.arange(0, ROWS)
    tokens_there, rows_there, columns_there = token < size, row < rows, column < width

    token_row = token[:, None] * rows + row[None, :]
    token_row_there = tokens_there[:, None] & rows_there[None, :]
    row_token = row[:, None] + token[None, :] * rows  # the same, transposed
    row_token_there = rows_there[:, None] & tokens_there[None, :]
    token_token = token[:, None] * size + token[None, :]
    token_token_there = tokens_there[:, None] & tokens_there[None, :]
    token_column = token[:, None] * width + column[None, :]
    token_column_there = tokens_there[:, None] & columns_there[None, :]
    row_column = row[:, None] * width + column[None, :]
    row_column_there = rows_there[:, None] & columns_there[None, :]

    state = tl.load(start + head * rows * width + row_column, mask=row_column_there, other=0.0)
    for chunk in range(chunks):
        here = head * chunks + chunk
        place = states + (here + head) * rows * width  # a head has one state more than chunks
        tl.store(place + row_column, state, mask=row_column_there)
        keys, values = here * size * rows, here * size * width
        found = tl.load(errors + values + token_column, mask=token_column_there, other=0.0)
        if HAS_READS:
            seen = tl.load(reads + keys + token_row, mask=token_row_there, other=0.0)
            found -= tl.dot(seen, state, input_precision="ieee")
        asked = tl.load(query + keys + token_row, mask=token_row_there, other=0.0)
        mixed = tl.dot(asked, state, input_precision="ieee")
        mix = tl.load(within + here * size * size + token_token, mask=token_token_there, other=0.0)
        mixed += tl.dot(mix, found, input_precision="ieee")
        tl.store(output + values + token_column, mixed, mask=token_column_there)
        if BY_CHANNEL:
            kept = tl.load(end + here * rows + row, mask=rows_there, other=0.0)
            state = kept[:, None] * state
        else:
            state = tl.load(end + here) * state
        written = tl.load(left + keys + row_token, mask=row_token_there, other=0.0)
        state += tl.dot(written, found, input_precision="ieee")
    last = states + ((head + 1) * (chunks + 1) - 1) * rows * width
    tl.store(last + row_column, state, mask=row_column_there)

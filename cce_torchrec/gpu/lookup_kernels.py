"""Lookups in Triton: a program pools a block of bags of one column of one feature, or adds their gradients up.

What a program works on is a row of a table of 64-bit words, its *job*, so that one launch serves all tables that are
alike: addresses, and the numbers of ``RowSource``. The rows of an id are computed anew in the backward: that reads less
than keeping them would. Gradients add up by atomic additions, in whatever order they arrive.

Names: B bags, D dims of a row; the words of a job are numbered below.
"""

import triton
import triton.language as tl

JOB_WORDS = 15
WEIGHTS = tl.constexpr(0)  # address of float32 [rows, D]
ASSIGNMENTS = tl.constexpr(1)  # address of [ids, width] of the type WORD
COEFFICIENTS = tl.constexpr(2)  # address of 64-bit words
FIRST_WORD = tl.constexpr(3)  # of the column, in a row of the assignments
WIDTH = tl.constexpr(4)
FIRST_ID = tl.constexpr(5)
NUM_IDS = tl.constexpr(6)  # -1: any id
LEVEL_ROWS = tl.constexpr(7)
FIRST_COEFFICIENT = tl.constexpr(8)  # of the column
HASHED_ROWS = tl.constexpr(9)
HASHED_FROM = tl.constexpr(10)
FEATURE = tl.constexpr(11)
FIRST_OUT = tl.constexpr(12)  # in a row of the output
START = tl.constexpr(13)  # of the column, in the gradient of all weights
HOT_FROM = tl.constexpr(14)  # read where HOT


@triton.jit
def mix64(words):
    """As that of hashing.py, on uint64."""
    words = (words ^ (words >> 30)) * 0xBF58476D1CE4E5B9
    words = (words ^ (words >> 27)) * 0x94D049BB133111EB
    return words ^ (words >> 31)


@triton.jit
def hashed(job, ids_B, h: tl.constexpr):
    """The row by the h-th hash of a column."""
    coefficients = tl.load(job + COEFFICIENTS).to(tl.pointer_type(tl.uint64))
    multiplier = tl.load(coefficients + tl.load(job + FIRST_COEFFICIENT) + h)
    words_B = mix64(ids_B.to(tl.uint64) ^ tl.load(coefficients)) * multiplier
    rows_B = ((words_B >> 32) * tl.load(job + HASHED_ROWS).to(tl.uint64)) >> 32
    return rows_B.to(tl.int64) + tl.load(job + HASHED_FROM)


@triton.jit
def assigned(job, ids_B, r: tl.constexpr, WORD: tl.constexpr):
    """The r-th assignment of each id in a column."""
    words = tl.load(job + ASSIGNMENTS).to(tl.pointer_type(WORD)) + tl.load(job + FIRST_WORD) + r
    return tl.load(words + (ids_B - tl.load(job + FIRST_ID)) * tl.load(job + WIDTH)).to(tl.int64)


@triton.jit
def row(job, ids_B, r: tl.constexpr, STORED: tl.constexpr, HASHES: tl.constexpr, HOT: tl.constexpr, WORD: tl.constexpr):
    """The r-th row of each id in a column: stored ones, then hashed ones, or the stored one again; or its own number."""
    if r < STORED:
        rows_B = assigned(job, ids_B, r, WORD) + r * tl.load(job + LEVEL_ROWS)
    elif HASHES > 0:
        rows_B = hashed(job, ids_B, r - STORED)
        if HOT:
            stored_B = assigned(job, ids_B, 0, WORD)
            rows_B = tl.where(stored_B >= tl.load(job + HOT_FROM), stored_B, rows_B)
    else:
        rows_B = ids_B
    return rows_B


@triton.jit
def bags_of(job, offsets, size, block, BLOCK_B: tl.constexpr):
    """The bags of a program, and where their ids begin and end; those past the batch are empty."""
    bags_B = block.to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    ends = offsets + tl.load(job + FEATURE) * size + bags_B
    begin_B = tl.load(ends, mask=bags_B < size, other=0).to(tl.int64)
    end_B = tl.load(ends + 1, mask=bags_B < size, other=0).to(tl.int64)
    return bags_B, begin_B, end_B


@triton.jit
def ids_of(job, ids, at_B, live_B):
    """The ids at some places, and which of them are out of bounds; these become the first id, as dead ones are."""
    first_id = tl.load(job + FIRST_ID)
    num_ids = tl.load(job + NUM_IDS)
    ids_B = tl.load(ids + at_B, mask=live_B, other=0).to(tl.int64)
    bad_B = live_B & (num_ids >= 0) & ((ids_B < first_id) | (ids_B >= first_id + num_ids))
    return tl.where(live_B & (bad_B == 0), ids_B, first_id), bad_B


@triton.jit
def places(job, bags_B, dims_D, OUT_WIDTH: tl.constexpr, ALIGNED: tl.constexpr):
    """Where the vectors of bags are in the output, or in its gradient."""
    first_out = tl.multiple_of(tl.load(job + FIRST_OUT), ALIGNED)
    return bags_B[:, None] * OUT_WIDTH + first_out + dims_D[None, :]


@triton.jit
def lookup_kernel(
    jobs,  # [jobs, WORDS]
    ids,
    offsets,
    sample_weights,  # read where WEIGHTED
    out,  # float32 [B, OUT_WIDTH], written
    all_inside,  # int32 [1], set to 0 where an id is out of bounds
    num_jobs,
    size,  # B
    WORDS: tl.constexpr,  # of a job
    OUT_WIDTH: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    STORED: tl.constexpr,
    HASHES: tl.constexpr,
    HOT: tl.constexpr,
    WORD: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ALIGNED: tl.constexpr,  # all places of vectors are multiples of it
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out[b] = sum of the rows of the ids of bag b, times their weights."""
    job = jobs + tl.program_id(0) % num_jobs * WORDS  # a block of bags of all jobs, then the next
    bags_B, begin_B, end_B = bags_of(job, offsets, size, tl.program_id(0) // num_jobs, BLOCK_B)
    dims_D = tl.arange(0, BLOCK_D)
    weights = tl.load(job + WEIGHTS).to(tl.pointer_type(tl.float32))
    weights_D = tl.multiple_of(weights, 4 * ALIGNED) + dims_D
    sums_BD = tl.zeros([BLOCK_B, BLOCK_D], dtype=tl.float32)
    outside_B = bags_B < 0
    for n in range(tl.max(end_B - begin_B, axis=0)):
        at_B = begin_B + n
        live_B = at_B < end_B
        ids_B, bad_B = ids_of(job, ids, at_B, live_B)
        outside_B |= bad_B
        live_BD = live_B[:, None] & (dims_D < DIM)[None, :]
        for r in tl.static_range(ROWS):
            rows_B = row(job, ids_B, r, STORED, HASHES, HOT, WORD)
            vectors_BD = tl.load(weights_D[None, :] + rows_B[:, None] * DIM, mask=live_BD, other=0.0)
            if WEIGHTED:
                vectors_BD *= tl.load(sample_weights + at_B, mask=live_B, other=0.0)[:, None]
            sums_BD += vectors_BD
    tl.store(all_inside, 0, mask=tl.max(outside_B.to(tl.int32), axis=0) > 0)
    places_BD = places(job, bags_B, dims_D, OUT_WIDTH, ALIGNED)
    tl.store(out + places_BD, sums_BD, mask=(bags_B < size)[:, None] & (dims_D < DIM)[None, :])


@triton.jit
def lookup_backward_kernel(
    jobs,
    ids,
    offsets,
    sample_weights,
    gradient,  # float32 [B, OUT_WIDTH], of the output
    sums,  # float32, of all weights one after the other, added to
    num_jobs,
    size,
    WORDS: tl.constexpr,
    OUT_WIDTH: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    STORED: tl.constexpr,
    HASHES: tl.constexpr,
    HOT: tl.constexpr,
    WORD: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """sums[row] += the weight of the id times gradient[b], for every row of every id of bag b."""
    job = jobs + tl.program_id(0) % num_jobs * WORDS  # a block of bags of all jobs, then the next
    bags_B, begin_B, end_B = bags_of(job, offsets, size, tl.program_id(0) // num_jobs, BLOCK_B)
    dims_D = tl.arange(0, BLOCK_D)
    places_BD = places(job, bags_B, dims_D, OUT_WIDTH, ALIGNED)
    in_batch_BD = (bags_B < size)[:, None] & (dims_D < DIM)[None, :]
    vectors_BD = tl.load(gradient + places_BD, mask=in_batch_BD, other=0.0)
    sums_D = sums + tl.multiple_of(tl.load(job + START), ALIGNED) + dims_D
    for n in range(tl.max(end_B - begin_B, axis=0)):
        at_B = begin_B + n
        live_B = at_B < end_B
        ids_B, _ = ids_of(job, ids, at_B, live_B)
        live_BD = live_B[:, None] & (dims_D < DIM)[None, :]
        weighted_BD = vectors_BD
        if WEIGHTED:
            weighted_BD = vectors_BD * tl.load(sample_weights + at_B, mask=live_B, other=0.0)[:, None]
        for r in tl.static_range(ROWS):
            rows_B = row(job, ids_B, r, STORED, HASHES, HOT, WORD)
            tl.atomic_add(sums_D[None, :] + rows_B[:, None] * DIM, weighted_BD, mask=live_BD, sem="relaxed")

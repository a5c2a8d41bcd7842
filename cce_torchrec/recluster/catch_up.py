"""What was learned while a re-clustering was computed in the background, taken along to the new rows.

    moved(v) = x_now(v) - x_read(v)                               both by the old rows of id v: how far training took it
    M[j]  <-  M[j] + mean of moved(v) over the ids v of row j     codebook by codebook, each takes what those before left

The means are over evenly spaced ids, about 64 for each row: over all where a table has no more. A row that none of them uses
stays. Ids with a row of their own take all along.

Shapes: N ids of this rank, C columns, R rows an id, D dims of a column, K rows of a table, W cells a window.
"""

from dataclasses import replace

import torch
from torch import Tensor

from cce_torchrec.hashing import hash_rows
from cce_torchrec.methods.assignments import COLD_ROW, find_sorted
from cce_torchrec.recluster.collectives import Collectives
from cce_torchrec.recluster.config import ReclusterConfig
from cce_torchrec.recluster.table_state import NewTable, TableState
from cce_torchrec.recluster.vocabulary import Block, check_finite, evenly_spaced, id_weights
from cce_torchrec.recluster.windows import NewWindows, WindowsState, cells_of

_IDS_A_ROW = 64


def moved_codebooks(
    state: TableState, new: NewTable, trained: list[Tensor], config: ReclusterConfig, collectives: Collectives
) -> list[Tensor]:
    """The new codebooks of a table, moved as far as its ids were since the state was read; collective.

    Args:
        state: what the new table was computed from.
        new: the new table.
        trained: the old codebooks as they are now.
        config: of the re-clustering.
        collectives: how to reach the other ranks.

    Raises:
        ValueError: where weights are not finite by now.
    """
    for column, codebook in enumerate(trained):
        check_finite(state.name, f"column {column}", codebook, codebook.shape[1])
    row_map = state.row_map
    block = Block.of_rank(row_map.num_embeddings, config.decode_batch_size, trained[0].device, collectives)
    ids_N = evenly_spaced(row_map.num_embeddings, block, _IDS_A_ROW * row_map.columns[0].num_rows)
    weights_N = id_weights(state.weights_V, ids_N)
    new_rows_CNR = _new_rows(state, new, ids_N, block)
    changes = [(now - before).double() for now, before in zip(trained, state.codebooks, strict=True)]
    moved_CND = torch.stack(replace(state, codebooks=changes).decode(ids_N).chunk(len(changes), dim=1))
    books_CKD = torch.stack(new.codebooks).double()
    own_N = new_rows_CNR[0, :, 0]
    is_hot_N = (own_N >= row_map.num_main_rows) & (own_N < row_map.first_helper_row)
    for place in range(row_map.rows_per_id):
        rows_CN = new_rows_CNR[..., place]
        means_CKD = _means(moved_CND, rows_CN, weights_N, books_CKD.shape[1], collectives)
        taken_CND = means_CKD.gather(1, rows_CN[..., None].expand_as(moved_CND))
        means_CKD[:, row_map.num_main_rows : row_map.first_helper_row] /= row_map.rows_per_id  # added up so many times
        books_CKD += means_CKD
        moved_CND = torch.where(is_hot_N[:, None], 0, moved_CND - taken_CND)
    return list(books_CKD.float())


def moved_memories(
    state: WindowsState,
    new: NewWindows,
    trained: tuple[Tensor, Tensor],
    config: ReclusterConfig,
    collectives: Collectives,
) -> tuple[Tensor, Tensor]:
    """As :func:`moved_codebooks`, the new memories of CCE on circular memory."""
    decoder = state.decoder
    for part, memory_M in zip(("the memory", "the helper memory"), trained, strict=True):
        check_finite(state.name, part, memory_M, decoder.width)
    block = Block.of_rank(decoder.num_embeddings, config.decode_batch_size, trained[0].device, collectives)
    size = _IDS_A_ROW * (len(trained[0]) // decoder.width)
    ids_N = evenly_spaced(decoder.num_embeddings, block, size)
    weights_E = id_weights(state.weights_V, ids_N).repeat_interleave(decoder.num_columns * decoder.width)
    main_M, helper_M = ((now - before).double() for now, before in zip(trained, state.memories, strict=True))
    moved_1E1 = replace(state, memories=(main_M, helper_M)).decode(ids_N).reshape(1, -1, 1)
    helpers_NC = hash_rows(ids_N, new.helper_coefficients, len(helper_M)).T
    memories = []
    for memory_M, offsets_NC in zip(new.memories, (new.offsets[ids_N].to(torch.int64), helpers_NC), strict=True):
        cells_1E = cells_of(offsets_NC, decoder.width, len(memory_M))[None]
        means_1M1 = _means(moved_1E1, cells_1E, weights_E, len(memory_M), collectives)
        moved_1E1 = moved_1E1 - means_1M1[:, cells_1E[0]]
        memories.append((memory_M.double() + means_1M1.view(-1)).float())
    return memories[0], memories[1]


def _new_rows(state: TableState, new: NewTable, ids_N: Tensor, block: Block) -> Tensor:
    """The rows that ids are to have: [C, N, R]."""
    row_map = state.row_map
    if new.ids is None:
        first = block.start if len(new.assignments) < row_map.num_embeddings else 0  # a block's, or those of all ids
        assigned_NA = row_map.encoding.decode(new.assignments[ids_N - first])
    else:
        places_N, is_chosen_N = find_sorted(new.ids, ids_N)
        chosen_NA = row_map.encoding.decode(new.assignments[places_N])
        assigned_NA = torch.where(is_chosen_N[:, None], chosen_NA, COLD_ROW)
    return row_map.rows_of(ids_N, assigned_NA, new.helper_coefficients)


def _means(values_CND: Tensor, rows_CN: Tensor, weights_N: Tensor, num_rows: int, collectives: Collectives) -> Tensor:
    """The weighted mean of each row's values over all ranks, 0 where it has none: [C, K, D]."""
    columns, _, dim = values_CND.shape
    sums_CKE = values_CND.new_zeros(columns, num_rows, dim + 1)
    for sums_KE, values_ND, rows_N in zip(sums_CKE, values_CND, rows_CN, strict=True):
        sums_KE.index_add_(0, rows_N, torch.cat([values_ND * weights_N[:, None], weights_N[:, None]], dim=1))
    sums_CKE = collectives.all_reduce_sum(sums_CKE)
    mass_CK1 = sums_CKE[..., -1:]
    return torch.where(mass_CK1 > 0, sums_CKE[..., :-1] / mass_CK1, 0)

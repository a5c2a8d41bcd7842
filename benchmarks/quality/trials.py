"""Changes of CCE that are not settings of the library, tried on the split for settings; none of them was worth having.

Each patches what it changes while a model is trained, so that the library need not know of it.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, ClassVar
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.quality.data import Clicks, Rows
from cce_torchrec import CCE, CompressedEmbeddingBagConfig
from cce_torchrec.config import method_of
from cce_torchrec.recluster import fit, table, table_sums
from cce_torchrec.recluster.table_state import TableState, Vectors


class Trial:
    """Nothing is changed: what the others are compared with."""

    def tables(self, tables: list[CompressedEmbeddingBagConfig]) -> list[CompressedEmbeddingBagConfig]:
        return tables

    def clicks(self, clicks: Clicks) -> Clicks:
        return clicks

    @contextmanager
    def training(self, model: nn.Module) -> Iterator[None]:
        """Around a training."""
        yield

    def after_step(self, optimizer: Optimizer, learning_rate: float, is_reclustered: bool) -> None:
        """After each step, and the re-clustering that may follow it."""


class SharedCodebooks(Trial):
    """One table of users and items together, of the parameters of both."""

    def tables(self, tables: list[CompressedEmbeddingBagConfig]) -> list[CompressedEmbeddingBagConfig]:
        methods = [method_of(config) for config in tables]
        assert all(isinstance(method, CCE) for method in methods)
        rows, helper_rows = (sum(getattr(m, name) for m in methods) for name in ("num_rows", "helper_rows"))
        method = replace(methods[0], num_rows=rows, num_helper_rows=helper_rows)
        features = [feature for config in tables for feature in config.feature_names]
        num_embeddings = sum(config.num_embeddings for config in tables)
        one = replace(tables[0], name="t_both", num_embeddings=num_embeddings, feature_names=features, method=method)
        return [one]

    def clicks(self, clicks: Clicks) -> Clicks:
        def moved(rows: Rows) -> Rows:
            return replace(rows, items_N=rows.items_N + clicks.num_users)

        return replace(clicks, train=moved(clicks.train), held_out=moved(clicks.held_out))


class WarmUp(Trial):
    """After a re-clustering, the learning rate rises from 0 again, for so many steps."""

    num_steps: ClassVar[int] = 30

    def __init__(self) -> None:
        self._since = self.num_steps

    def after_step(self, optimizer: Optimizer, learning_rate: float, is_reclustered: bool) -> None:
        self._since = 0 if is_reclustered else self._since + 1
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (self._since + 1) / self.num_steps)


class HalvedState(Trial):
    """After a re-clustering, half of the optimizer state is left."""

    def after_step(self, optimizer: Optimizer, learning_rate: float, is_reclustered: bool) -> None:
        if is_reclustered:
            for state in optimizer.state.values():
                for name in ("exp_avg", "exp_avg_sq"):
                    state[name].mul_(0.5)


class HelperFromZero(Trial):
    """After a re-clustering, helper rows begin at zero, as in the paper, not at the mean residuals."""

    @contextmanager
    def training(self, model: nn.Module) -> Iterator[None]:
        means = table_sums.TableSums._helper_means
        with patch.object(
            table_sums.TableSums, "_helper_means", lambda sums, column: torch.zeros_like(means(sums, column))
        ):
            yield


class WarmStart(Trial):
    """From the second re-clustering on, K-means begins with the main codebooks as they are, not with a seeding."""

    num_iterations: ClassVar[int | None] = None  # of the library's

    @contextmanager
    def training(self, model: nn.Module) -> Iterator[None]:
        codebooks: list[Tensor] = []

        def fit_centroids(state: TableState, *args: Any) -> list[Tensor]:
            codebooks[:] = state.codebooks if int(state.row_map.version) else []
            return library_fit(state, *args)

        def kmeans_steps(points_ND: Tensor, num_centroids: int, **options: Any) -> Any:
            if codebooks:
                options["initial_centroids_KD"] = codebooks.pop(0)[:num_centroids]
                options["num_iterations"] = self.num_iterations or options["num_iterations"]
            return library_kmeans(points_ND, num_centroids, **options)

        library_fit, library_kmeans = table.fit_centroids, fit.kmeans_steps
        with patch.object(table, "fit_centroids", fit_centroids), patch.object(fit, "kmeans_steps", kmeans_steps):
            yield


class OneIteration(WarmStart):
    """A warm start and a single iteration: what is learned at a re-clustering is hardly more than the assignments."""

    num_iterations = 1


class Rotation(Trial):
    """Before a re-clustering, vectors are rotated so that columns are uncorrelated and vary alike.

    The parametric solution of Ge et al., "Optimized Product Quantization", CVPR 2013: the principal directions, largest
    first, each given to the column whose variances have the smallest product so far. Models rotate back what they look up.
    """

    @contextmanager
    def training(self, model: nn.Module) -> Iterator[None]:
        turned: dict[str, Tensor] = {}  # what is looked up in a table, times this, is a vector
        turning: dict[str, Tensor] = {}  # by which the vectors of a table are turned for its clustering

        def fit_centroids(state: TableState, vectors: Vectors, *args: Any) -> list[Tensor]:
            turning.pop(state.name, None)
            ids_V = torch.arange(state.row_map.num_embeddings)
            parts = [_whole(column_vectors, vectors, ids_N) for ids_N in ids_V.split(8192)]
            turning[state.name] = _balanced_directions(torch.cat(parts), len(state.codebooks))
            before = turned.get(state.name, torch.eye(len(turning[state.name])))
            turned[state.name] = turning[state.name].T @ before
            return library_fit(state, vectors, *args)

        def turned_column(vectors: Vectors, column: int, ids_N: Tensor, rows_NR: Tensor) -> Tensor:
            if vectors.state.name not in turning:
                return column_vectors(vectors, column, ids_N, rows_NR)
            width = vectors.state.codebooks[column].shape[1]
            mine = turning[vectors.state.name][:, column * width : (column + 1) * width]
            return _whole(column_vectors, vectors, ids_N) @ mine

        def forward(ids: Any) -> Tensor:
            looked_up = model.collection(ids).to_dict()  # type: ignore[operator]
            user, item = (
                looked_up[feature] @ turned[name] if (name := f"t_{feature}") in turned else looked_up[feature]
                for feature in ("user", "item")
            )
            return (user * item).sum(dim=1)

        library_fit, column_vectors = table.fit_centroids, Vectors.__call__
        with ExitStack() as stack:
            stack.enter_context(patch.object(table, "fit_centroids", fit_centroids))
            stack.enter_context(patch.object(Vectors, "__call__", turned_column))
            stack.enter_context(patch.object(model, "forward", forward))
            yield


def _whole(column_vectors: Callable[..., Tensor], vectors: Vectors, ids_N: Tensor) -> Tensor:
    """All columns of the vectors that are clustered, side by side."""
    rows_CNR = vectors.state.rows(ids_N)
    return torch.cat([column_vectors(vectors, i, ids_N, rows_NR) for i, rows_NR in enumerate(rows_CNR)], dim=1)


def _balanced_directions(vectors_VD: Tensor, num_columns: int) -> Tensor:
    """An orthogonal matrix whose columns are principal directions, those of a column of the table side by side: [D, D]."""
    variances_D, directions_DD = torch.linalg.eigh(vectors_VD.double().T.cov())
    room = len(variances_D) // num_columns
    chosen: list[list[int]] = [[] for _ in range(num_columns)]
    logs = [0.0] * num_columns
    for direction in reversed(range(len(variances_D))):  # eigh sorts in rising order
        column = min((i for i in range(num_columns) if len(chosen[i]) < room), key=lambda i: logs[i])
        chosen[column].append(direction)
        logs[column] += float(variances_D[direction].clamp(min=1e-12).log())
    return directions_DD[:, [direction for column in chosen for direction in column]].float()


TRIALS: dict[str | None, type[Trial]] = {
    None: Trial,
    "nothing changed": Trial,
    "one set of codebooks for users and items": SharedCodebooks,
    "learning rate warmed up for 30 steps": WarmUp,
    "optimizer state halved": HalvedState,
    "helper from zero": HelperFromZero,
    "K-means from the codebooks": WarmStart,
    "one iteration from the codebooks": OneIteration,
    "columns rotated": Rotation,
}

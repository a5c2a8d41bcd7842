"""The method the authors published, small: hashed tables as in https://github.com/thomasahle/cce, with the seeds of a run.

    h(id) = (a * id mod (2^31 - 1)) mod k,    a drawn from [1, 2^30),    initial weights from U(-1/sqrt(D), 1/sqrt(D))

It answers one question, whether a number that their code once had is usual for it or luck of a seed, so it draws from torch's
global generator in the order in which that code does: with their seed it ends where they did, to three digits.
"""

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torchrec import KeyedJaggedTensor

from benchmarks.quality.data import Clicks
from benchmarks.quality.gmf import FEATURES, History, Settings, batches, eval_batches, evaluate

PRIME = 2**31 - 1
# The parts of a vector, by method; and the names of these methods in runs.
NUM_PARTS = {"hashing_trick": 1, "ce": 4, "robe": 4}
PUBLISHED = {f"published_{method}": method for method in NUM_PARTS}


def published_rows(ids_N: Tensor, multipliers_P: Tensor, num_rows: int) -> Tensor:
    """The published hash of each id, one for each part of its vector: int64 [N, P]."""
    return ids_N[:, None] * multipliers_P % PRIME % num_rows


class PublishedEmbedding(nn.Module):
    """Vectors [N, D] of ids, in P parts: rows of P tables, or in ROBE windows of one circular memory."""

    def __init__(self, method: str, num_params: int, dim: int) -> None:
        super().__init__()
        self.parts, self.is_robe = NUM_PARTS[method], method == "robe"
        self.num_rows = num_params if self.is_robe else num_params // dim
        self.multipliers_P = torch.randint(1, 2**30, (self.parts,))
        shape = (num_params,) if self.is_robe else (self.num_rows, self.parts, dim // self.parts)
        self.weight = nn.Parameter(torch.empty(shape).uniform_(-(dim**-0.5), dim**-0.5))
        self.width = dim // self.parts

    def forward(self, ids_N: Tensor) -> Tensor:
        rows_NP = published_rows(ids_N, self.multipliers_P, self.num_rows)
        if self.is_robe:
            return self.weight[(rows_NP[..., None] + torch.arange(self.width)) % self.num_rows].flatten(1)
        return self.weight[rows_NP, torch.arange(self.parts)].flatten(1)


class PublishedGMF(nn.Module):
    """The logit of a click, as :class:`benchmarks.quality.gmf.GMF`'s; each embedding has half the budget."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        assert settings.params is not None
        half = settings.params // len(FEATURES)
        self.embeddings = nn.ModuleDict(
            {f: PublishedEmbedding(PUBLISHED[settings.method], half, settings.dim) for f in FEATURES}
        )

    def forward(self, ids: KeyedJaggedTensor) -> Tensor:
        users_ND, items_ND = (self.embeddings[f](ids[f].values()) for f in FEATURES)
        return (users_ND * items_ND).sum(dim=1)


def run_published(settings: Settings, clicks: Clicks) -> dict[str, Any]:
    """Train and score as :func:`benchmarks.quality.gmf.run` does."""
    torch.manual_seed(settings.seed)
    model, history = PublishedGMF(settings), History()
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, fused=True)
    held_out = eval_batches(clicks)
    for _ in range(settings.epochs):
        for ids, labels_B in batches(clicks.train, settings.batch_size, torch.default_generator):
            optimizer.zero_grad()
            binary_cross_entropy_with_logits(model(ids), labels_B).backward()
            optimizer.step()
        if history.add(*evaluate(model, clicks.held_out, held_out)):
            break
    return {
        "settings": asdict(settings),
        "best_bce": history.best_bce,
        "best_auc": history.best_auc,
        "scores": history.scores,
        "params": sum(parameter.numel() for parameter in model.parameters()),
    }

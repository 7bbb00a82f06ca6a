"""DeepSeek-V4's routers: which experts a token goes to, and with what weight. Bits do not depend on the batch."""

# T tokens   H hidden   E experts   K experts per token   V vocabulary

from __future__ import annotations

import torch
from torch import Tensor, nn

_TILE, _DEVICE_TILE = 32, 1024


class Router(nn.Module):
    """Which experts, and how much of each.

    scores = sqrt(softplus(x W^T)) in FP32; weights = scores of the chosen, normalised, times the scaling factor.

    weight [E, H] bfloat16. bias [E] float32 makes a scored layer: it is added where experts are chosen, and nowhere
    else. table [V, K] makes a hash-routed layer: the token's id chooses. One of the two must be given.
    Source: DeepSeek-V4 report and reference code (noaux_tc, tid2eid).
    """

    weight: Tensor
    bias: Tensor | None
    table: Tensor | None

    def __init__(
        self, weight: Tensor, topk: int, scale: float, *, bias: Tensor | None = None, table: Tensor | None = None
    ) -> None:
        super().__init__()
        if (bias is None) == (table is None):
            raise ValueError("a router takes either a bias (scored) or a table (hash-routed)")
        self.topk, self.scale, self.num_experts = topk, scale, len(weight)
        # MKL sums columns beyond a multiple of 16 in another order when there are more threads
        padded = nn.functional.pad(weight.to(torch.float32), (0, 0, 0, -len(weight) % 16))
        self.register_buffer("weight", padded)
        self.register_buffer("bias", bias)
        self.register_buffer("table", table)

    @torch.no_grad()
    def forward(self, hidden: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """hidden [T, H] bfloat16, token_ids [T] int64 -> topk_ids [T, K] int64, topk_weights [T, K] float32"""
        scores = self.scores(hidden)
        if self.table is not None:
            ids = self.table[token_ids].to(torch.int64)
        else:
            assert self.bias is not None
            ids = (scores + self.bias).topk(self.topk, dim=-1).indices
        chosen = scores.gather(1, ids)
        total = chosen[:, 0].clone()
        for slot in range(1, self.topk):  # in order: a reduction may sum differently in another batch
            total += chosen[:, slot]
        return ids, chosen / total.unsqueeze(-1) * self.scale

    def scores(self, hidden: Tensor) -> Tensor:
        """hidden [T, H] -> [T, E] float32, tile by tile of a fixed size, so that a row has the same bits in any batch.

        All of it on the device of hidden, whose tiles are larger where that is no CPU: each costs launches there.

        FP32 products sum in another order for a few rows than for many, and vector code rounds softplus differently
        from the scalar code at an array's end; a tile of 32 rows has neither few rows nor an end.
        """
        num_rows = _TILE if hidden.device.type == "cpu" else _DEVICE_TILE
        scores = torch.empty(len(hidden), self.num_experts, dtype=torch.float32, device=hidden.device)
        tile = torch.zeros(num_rows, hidden.shape[1], dtype=torch.float32, device=hidden.device)
        for start in range(0, len(hidden), num_rows):
            rows = hidden[start : start + num_rows]
            tile.zero_()
            tile[: len(rows)] = rows
            tile_scores = nn.functional.softplus(tile @ self.weight.T).sqrt()  # [num_rows, E, padded]
            scores[start : start + num_rows] = tile_scores[: len(rows), : self.num_experts]
        return scores

"""DeepSeek-V4's routers: which experts a token goes to, and with what weight. Bits do not depend on the batch."""

# T tokens   H hidden   E experts   K experts per token   V vocabulary

from __future__ import annotations

import torch
from torch import Tensor, nn

from megamoe.ambient import undisturbed
from megamoe.execution.products import Known, Prepared

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
        self.register_buffer("weight", weight)
        self._prepared: tuple[Known, Prepared] | None = None
        self.register_buffer("bias", bias)
        self.register_buffer("table", table)

    def forward(self, hidden: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """hidden [T, H] bfloat16, token_ids [T] int64 -> topk_ids [T, K] int64, topk_weights [T, K] float32"""
        with undisturbed(hidden.device):
            return self._choose(hidden, token_ids)

    def _choose(self, hidden: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
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
        """hidden [T, H] bfloat16 -> [T, E] float32; a row has the same bits in any batch, on the device of hidden.

        Products are summed in FP32 in the order that the experts' are (products.py). Vector code rounds softplus
        differently from the scalar code at an array's end, so that works on tiles of a fixed size, whose numbers of
        values have no such end. Tiles are larger where the device is no CPU: each costs launches there.
        """
        size = _TILE if hidden.device.type == "cpu" else _DEVICE_TILE
        products = self._weight_prepared().multiply(hidden.to(torch.bfloat16), dtype=torch.float32)
        scores = torch.empty_like(products)
        tile = products.new_zeros(size, self.num_experts)
        for start in range(0, len(products), size):
            rows = products[start : start + size]
            tile.zero_()
            tile[: len(rows)] = rows
            scores[start : start + size] = nn.functional.softplus(tile).sqrt()[: len(rows)]
        return scores

    def _weight_prepared(self) -> Prepared:
        """The weight as products read it, made anew where whatever it was has changed it."""
        known, prepared = self._prepared or (None, None)
        if prepared is None or known is None or not known.still(self.weight):
            known, prepared = self._prepared = Known(self.weight), Prepared(self.weight)
        return prepared

"""Loading every family of transformers with routed experts: it computes what transformers does, or is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
from benchmarks.transformers_families.compare import _forward
from benchmarks.transformers_families.tiny import families, write_tiny
from megamoe.model import load

# one for each way in which names, stacks and towers differ; `pytest -m soak` takes all
FEW = ("aria", "ernie4_5_vl_moe", "glm4v_moe", "granitemoe", "inkling2", "nemotron_h", "unlimited_ocr")
REFUSED = {"muse_spark"}
FAMILIES = {family.name: family for family in families()}


def check(path: Path, name: str) -> None:
    """Most tokens are as near as BF16 experts are; single ones may have been routed otherwise, as in BF16 at large."""
    family = FAMILIES[name]
    write_tiny(family, path)
    ids = torch.randint(3, 100, (2, 24), generator=torch.Generator().manual_seed(1))
    exact = _forward(family.model.from_pretrained(path, dtype=torch.float32), ids).float()
    if name in REFUSED:
        with pytest.raises(ValueError, match="does not fit the layer"):
            load(path)
        return
    model = load(path, experts="bf16")
    found = _forward(model, ids)
    errors = (found.float() - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert float(errors.median()) < 0.03
    assert torch.equal(_forward(model, ids[:1]), found[:1])


@pytest.mark.parametrize("name", FEW)
def test_a_family_of_each_kind_loads_and_computes_what_transformers_does(tmp_path: Path, name: str) -> None:
    check(tmp_path, name)


@pytest.mark.soak
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in FEW])
def test_every_family_loads_or_is_refused(tmp_path: Path, name: str) -> None:
    check(tmp_path, name)

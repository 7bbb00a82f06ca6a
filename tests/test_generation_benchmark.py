"""benchmarks/generation: all contenders write with one model, and what its table says follows from the times."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.generation.checkpoint import Sizes, described, vocabulary_of, write_model
from benchmarks.generation.contenders import CONTENDERS, OurWriter, Passage, TransformersWriter, choose
from benchmarks.generation.report import Comparison, Series, Workload, document
from megamoe.launch.ranks import LocalRanks
from megamoe.parallel.group import EPGroup

SMALL = Sizes(hidden=256, intermediate=64, num_experts=4, topk=2, layers=2, vocabulary=128)
PROMPTS = [[5, 9, 2, 7, 1, 3], [8, 8, 4, 1, 6, 0], [1, 2, 3, 4, 5, 6]]


def written(group: EPGroup, path: Path) -> list[Passage]:
    """A passage of each contender, the same ranks for all."""
    found = []
    for each in CONTENDERS:
        make = OurWriter(path, group, each.options) if each.ours else TransformersWriter(path, group.size, each.options)
        found.append(make.write(PROMPTS, 4))
    return found


def failed(found: Comparison) -> bool:
    """Asked anew: a checker takes a property for unchanged."""
    return found.failed


def test_all_contenders_write_with_one_model(ranks: LocalRanks, tmp_path: Path) -> None:
    path = tmp_path / "model"
    write_model(path, SMALL)
    assert vocabulary_of(path) == 128
    assert described(path) == "model: Qwen3MoeForCausalLM"
    first, second = ranks.run(written, path, size=2)
    texts = {}
    for contender, *passages in zip(CONTENDERS, first, second, strict=True):
        texts[contender.name] = passages[0].texts | passages[1].texts
        assert {number: len(text) for number, text in texts[contender.name].items()} == {0: 4, 1: 4, 2: 4}
        assert all(0 < passage.prefill_s < passage.whole_s for passage in passages)
    ours = texts["megamoe bf16"]
    for name, theirs in texts.items():
        if "mxfp4" not in name:
            assert sum(ours[number][0] == text[0] for number, text in theirs.items()) >= 2, name


def test_the_table_follows_from_the_times() -> None:
    workload = Workload((10, 10), 5, 2, None)
    slow, fast, *_, bf16, fp4 = (Series(contender) for contender in CONTENDERS)
    for repeat in (1, 2, 3):
        slow.add(workload, [Passage(2.0, 3.0, {0: [1, 2], 1: [3]}), Passage(1.0, 3.0, {0: [1, 2], 1: [3]})])
        fast.add(workload, [Passage(1.0, 5.0, {0: [1], 1: [4]})] * 2)
        bf16.add(workload, [Passage(0.5, 1.5 * repeat, {0: [1]}), Passage(0.25, 0.5, {1: [3]})])
    fp4.problem = "died"
    found = Comparison(workload, 3, (slow, fast, bf16, fp4))
    assert slow.prefill == [10.0] * 3
    assert slow.decode == [8.0] * 3
    assert found.fastest("prefill") is fast
    assert found.fastest("decode") is slow
    assert found.ratio(bf16, "prefill") == pytest.approx(2.0)
    assert found.ratio(bf16, "decode") == pytest.approx(8 / 2.5 / 8.0)
    assert (found.agreement(bf16), found.agreement(fast)) == (1.0, 0.5)
    assert failed(found)  # one of ours did not run
    fp4.problem = ""
    assert not failed(found)
    bf16.texts = {0: [7], 1: [7]}
    assert failed(found)  # other texts
    page = document("python -m benchmarks.generation", "a model", [found])
    assert f"{bf16.contender.name}: prefill 2.00 x {fast.contender.name} (goal 1.5)" in page
    assert "20 (20 to 20)" in page


def test_contenders_are_chosen_by_parts_of_their_names() -> None:
    assert [each.name for each in choose("megamoe")] == ["megamoe bf16", "megamoe mxfp4"]
    assert choose(None) == list(CONTENDERS)
    with pytest.raises(ValueError, match="no contender has 'vllm' in its name; there are transformers"):
        choose("vllm")

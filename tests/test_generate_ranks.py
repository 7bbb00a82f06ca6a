"""Texts on four ranks are those of one, token for token, also where a rank is killed half way."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch.distributed as dist

from megamoe.launch.cluster.cluster import MegaMoECluster
from megamoe.launch.cluster.generation import Advance, GenerationJob, TokenFiles, shared
from megamoe.launch.cluster.recovery import RestartPolicy
from megamoe.launch.generation.ranks import OnCluster, Texts
from megamoe.launch.ranks import LocalRanks
from megamoe.model.generation.engine import Generation, generate
from megamoe.model.generation.request import GenerationRequest, Token
from megamoe.model.generation.sampling import Sampling
from megamoe.model.loading.load import load
from megamoe.model.making.tiny import write_tiny
from megamoe.parallel.errors import CallRefusedError, PeerError
from megamoe.parallel.group import EPGroup
from tests.generation_cases import on_one_rank, prompts

SIXTEEN = GenerationRequest(prompts(16), max_new_tokens=16)
LENGTHS = pytest.mark.parametrize("new_tokens", [16, pytest.param(64, marks=pytest.mark.soak)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("checkpoints")
    for family in ("mixtral", "deepseek-v4-flash"):
        write_tiny(path / family, family)
    return path


@pytest.fixture(scope="module")
def cluster() -> Iterator[MegaMoECluster]:
    """Four ranks, which are lost once for each length of texts."""
    policy = RestartPolicy(restarts=2, backoff_s=0.0)
    with MegaMoECluster(4, launcher="spawn", deadline_s=60.0, threads=1, policy=policy) as started:
        yield started


def generated(cluster: MegaMoECluster, job: GenerationJob) -> tuple[list[list[Token]], list[Advance]]:
    texts = Texts(job.request, lambda _: None)
    parts = OnCluster(cluster).generate(job, texts)
    return texts.tokens, parts


@LENGTHS
def test_sixteen_texts_on_four_ranks_are_those_of_one(cluster: MegaMoECluster, folder: Path, new_tokens: int) -> None:
    request = replace(SIXTEEN, max_new_tokens=new_tokens)
    texts, parts = generated(cluster, GenerationJob(f"sixteen {new_tokens}", folder / "mixtral", request))
    assert [len(text) for text in texts] == [new_tokens] * 16
    assert {token.prompt for token in parts[1].tokens} == {1, 5, 9, 13}
    assert {part.steps for part in parts} == {new_tokens + 1}  # the last finds that all are done
    share = shared(parts).hidden_percent
    assert share is not None
    assert 0 <= share <= 100
    assert texts == on_one_rank(load(folder / "mixtral"), request)


def test_ranks_that_have_finished_stay_in_step(cluster: MegaMoECluster, folder: Path) -> None:
    """More ranks than prompts, texts that stop early, and DeepSeek-V4, whose sequences meet at the experts."""
    path = folder / "deepseek-v4-flash"
    free = on_one_rank(load(path), GenerationRequest(prompts(3, seed=1), max_new_tokens=12))
    request = GenerationRequest(prompts(3, seed=1), 12, stop_ids=frozenset({free[0][2].token}))
    expected = on_one_rank(load(path), request)
    assert len({len(text) for text in expected}) > 1
    texts, parts = generated(cluster, GenerationJob("v4", path, request))
    assert texts == expected
    assert not parts[3].tokens


@LENGTHS
def test_a_rank_that_is_killed_half_way_changes_no_token(
    cluster: MegaMoECluster, folder: Path, new_tokens: int
) -> None:
    """Of drawn tokens, whose draws do not depend on who makes them."""
    request = replace(SIXTEEN, max_new_tokens=new_tokens, sampling=Sampling(temperature=0.9, top_p=0.95, seed=3))
    expected = on_one_rank(load(folder / "mixtral"), request)
    killed: list[int] = []

    def kill(token: Token) -> None:
        if token.index == new_tokens // 2 and not killed:
            killed.append(cluster.members[2].pid)
            cluster.members[2].kill()

    texts = Texts(request, kill)
    OnCluster(cluster).generate(GenerationJob(f"killed {new_tokens}", folder / "mixtral", request), texts)
    assert texts.tokens == expected
    assert killed
    assert killed[0] != cluster.members[2].pid
    assert [event.kind for event in cluster.events[-3:]] == ["failed", "replaced", "formed"]


def test_a_request_that_does_not_fit_is_refused_and_the_ranks_stay(cluster: MegaMoECluster, folder: Path) -> None:
    pids = [member.pid for member in cluster.members]
    long = GenerationRequest(prompts(1), max_new_tokens=5000)
    with pytest.raises(ValueError, match="the 4096 that the model takes: at most 4095 new tokens fit"):
        cluster.advance(GenerationJob("long", folder / "mixtral", long), 1)
    with pytest.raises(ValueError, match="holds no config"):
        cluster.advance(GenerationJob("nowhere", folder / "nowhere", SIXTEEN), 1)
    assert [member.pid for member in cluster.members] == pids
    for new_tokens in (2, 3):  # another request under the same id is another job
        short = GenerationRequest(prompts(2), max_new_tokens=new_tokens)
        texts, _ = generated(cluster, GenerationJob("short", folder / "mixtral", short))
        assert [len(text) for text in texts] == [new_tokens] * 2


def asks_otherwise(group: EPGroup, path: Path) -> list[str]:
    """What a rank is told whose peer has other prompts, another seed, or is a step ahead; then both ask alike."""
    model, said = load(path, group=group), []
    alike = GenerationRequest(prompts(4), 3)
    own = replace(alike, prompts=prompts(4, seed=group.rank)), replace(alike, sampling=Sampling(0.5, seed=group.rank))
    for request in own:
        with pytest.raises(CallRefusedError) as refused:
            Generation(model, group, request).step()
        said.append(str(refused.value))
    first, second = Generation(model, group, alike), Generation(model, group, alike)
    first.step()
    with pytest.raises(CallRefusedError) as refused:
        (first, second)[group.rank].step()
    said.append(str(refused.value))
    assert sum(map(len, generate(model, alike, group))) == 2 * 3
    return said


def test_ranks_that_ask_for_different_texts_are_all_told_and_their_group_goes_on(
    ranks: LocalRanks, folder: Path
) -> None:
    for said in ranks.run(asks_otherwise, folder / "mixtral", size=2):
        assert len(said) == 3
        assert all("rank 0 and rank 1 step different generations" in each for each in said)


def goes_on_alone(group: EPGroup, path: Path) -> list[str]:
    """Rank 1 makes no step. Rank 0's errors: in the step that waits for it, and in what it calls after that."""
    model = load(path, group=group)
    if group.rank == 1:
        return []
    impatient = EPGroup.of(dist.group.WORLD, deadline_s=0.5)
    said = []
    for error in (PeerError, RuntimeError):
        generation = Generation(model, impatient, GenerationRequest(prompts(1), 4))
        with pytest.raises(error) as raised:
            generation.step()
        said.append(str(raised.value))
    return said


def test_a_rank_that_makes_no_step_is_named_and_the_group_is_not_used_again(ranks: LocalRanks, folder: Path) -> None:
    (late, broken), _ = ranks.run(goes_on_alone, folder / "mixtral", size=2)
    assert "rank 1" in late
    assert "layer 'generation'" in late
    assert "the group cannot be used any more" in broken


def test_tokens_that_ranks_write_are_taken_once_when_their_line_is_whole(tmp_path: Path) -> None:
    taken: list[tuple[Token, float]] = []
    begun: list[float] = []
    files = TokenFiles(tmp_path, 2, begun.append, lambda token, at_s: taken.append((token, at_s)))
    tokens = [(Token(0, index, 7), float(index)) for index in range(3)]
    lines = [json.dumps({**asdict(token), "at_s": at_s}) + "\n" for token, at_s in tokens]
    with (tmp_path / "tokens-1").open("w") as file:
        for text, known in ((lines[0], 1), (lines[1][:9], 1), (lines[1][9:] + lines[2], 3)):
            file.write(text)
            file.flush()
            files.poll()
            assert taken == tokens[:known]
        file.write('{"at_s": 9.0}\n')
        file.flush()
        files.poll()
    assert begun == [9.0]

"""Stock transformers models with their experts on the layer: on one rank against plain ones, on several to the bit."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils.parametrize import register_parametrization
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.distributed import DistributedConfig

import megamoe.model
from benchmarks.transformers_families.compare import compare
from benchmarks.transformers_families.tiny import families
from megamoe.launch.ranks import LocalRanks
from megamoe.model import PackedExpertsConfig, RoutedExperts, packed_config
from megamoe.model.making.tiny import VOCABULARY, write_tiny
from megamoe.model.packed import PackedExperts
from megamoe.parallel.group import EPGroup
from megamoe.reference import relative_error
from tests import checkpoints
from tests.moe_blocks import Call, record_blocks, repeat_blocks

FP4 = ("deepseek-v4-flash", "gpt-oss")
BF16 = ("deepseek-v3", "qwen3-moe", "mixtral")
# where transformers keeps dense weights whole or gathers them, so that dense products have the bits of one rank:
# FSDP does not take DeepSeek-V4's dense weights, whose dtypes differ, and its tensor-parallel plan cuts experts alone
LAYOUT = {"deepseek-v4-flash": "tp", "gpt-oss": "fsdp", "deepseek-v3": "fsdp", "qwen3-moe": "fsdp", "mixtral": "fsdp"}
TOKENS = torch.randint(3, VOCABULARY, (8, 47), generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True)
class Plain:
    """A checkpoint, and each MoE block's input and output in the plain model, in BF16.

    blocks holds what the blocks give for that input in FP32.
    """

    family: str
    path: Path
    calls: dict[str, Call]
    blocks: dict[str, Tensor]


@pytest.fixture(scope="module")
def plain_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Plain]:
    made = {}
    for family in FP4 + BF16:
        path = tmp_path_factory.mktemp(family) / "checkpoint"
        write_tiny(path, family, num_experts=12, topk=3)  # which 1, 2, 3 and 4 ranks divide
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
        calls = record_blocks(model, TOKENS)
        wide = {name: (tuple(map(_wide, args)), kwargs, out) for name, (args, kwargs, out) in calls.items()}
        made[family] = Plain(family, path, calls, repeat_blocks(model.float(), wide))
    return made


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def load(plain: Plain, **sizes: int) -> PreTrainedModel:
    """On one rank, or with these sizes of transformers' meshes."""
    options: dict[str, Any] = {"config": packed_config(plain.path)} if plain.family in FP4 else {}
    if sizes:
        options["distributed_config"] = DistributedConfig(**sizes, ep_implementation="megamoe")
    elif plain.family in BF16:
        options["experts_implementation"] = "megamoe"
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(plain.path, dtype=torch.bfloat16, **options)
    return model


def layers(model: nn.Module) -> list[RoutedExperts]:
    return [module for module in model.modules() if isinstance(module, RoutedExperts)]


def forward(model: PreTrainedModel, token_ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(token_ids).logits
    return logits


# ---- one rank ----


@pytest.mark.parametrize("family", FP4 + BF16)
def test_every_moe_block_agrees_with_the_plain_one(plain_models: dict[str, Plain], family: str) -> None:
    plain = plain_models[family]
    model = load(plain)
    found = repeat_blocks(model, plain.calls)
    bound, weights = (6e-2, "mxfp4") if family in FP4 else (1e-2, "bf16")
    errors = {name: relative_error(found[name], plain.calls[name][2]) for name in plain.calls}
    print(f"\n{family}: {min(errors.values()):.4f} to {max(errors.values()):.4f}")  # noqa: T201
    assert len(errors) == len(layers(model)) > 0
    assert max(errors.values()) < bound, errors
    assert {routed.layer.weight_format for routed in layers(model)} == {weights}


@pytest.mark.parametrize("family", BF16)
def test_every_moe_block_is_nearer_to_fp32_than_the_plain_one(plain_models: dict[str, Plain], family: str) -> None:
    """The median token: a few for which the router in FP32 chooses otherwise outweigh all the others."""
    plain = plain_models[family]
    for name, found in repeat_blocks(load(plain), plain.calls).items():
        exact = plain.blocks[name]
        assert 0.5 < _median_error(found, exact) / _median_error(plain.calls[name][2], exact) < 1


def test_logits_are_no_further_from_fp32_than_the_plain_model_s(plain_models: dict[str, Plain]) -> None:
    """The median token of three models together; of a few hundred tokens it swings by a percent either way."""
    tokens = torch.randint(3, VOCABULARY, (48, 47), generator=torch.Generator().manual_seed(1))
    ours = theirs = 0.0
    for family in BF16:
        plain = AutoModelForCausalLM.from_pretrained(plain_models[family].path, dtype=torch.bfloat16)
        rounded, exact = forward(plain, tokens), forward(plain.float(), tokens)
        ours += _median_error(forward(load(plain_models[family]), tokens), exact)
        theirs += _median_error(rounded, exact)
    assert 0.5 * theirs < ours <= theirs


def _median_error(found: Tensor, expected: Tensor) -> float:
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).median())


# ---- several ranks ----


Answer = tuple[Tensor, Tensor, dict[str, Tensor], list[tuple[int, str]]]


def work(group: EPGroup, plain: Plain, sizes: dict[str, int]) -> Answer:
    """Logits of all tokens and of one, experts fed with the plain blocks' tokens, and what this rank's layers hold."""
    model = load(plain, **sizes)
    assert group.size > 1
    before = [sorted(str(p.dtype) for p in each.parameters()) for each in _packed(model)]
    if plain.family in FP4:
        dtypes = {"torch.int8", "torch.uint8", "torch.float8_e8m0fnu", "torch.bfloat16"}
        assert before
        assert {dtype for each in before for dtype in each} <= dtypes
    first, one, second = forward(model, TOKENS), forward(model, TOKENS[:1, :1]), forward(model, TOKENS)
    assert torch.equal(first, second)
    outputs = {}
    for name, (args, _, _) in plain.calls.items():
        experts = model.get_submodule(f"{name}.experts")
        with torch.no_grad():
            outputs[name] = experts(*routed_somehow(args[0], experts.routed.layer.shape.topk))
        assert not any(parameter is not None for parameter in experts._parameters.values())
    assert len({id(each.layer.group) for each in layers(model)}) == 1
    assert not stacks_alive(layers(model)[0]), stacks_alive(layers(model)[0])
    held = [(len(each.layer.local_experts), each.layer.weight_format) for each in layers(model)]
    return first, one, outputs, held


def stacks_alive(routed: RoutedExperts) -> list[tuple[int, ...]]:
    """Shapes of what the layer was loaded from and this process still holds, wherever FSDP or autograd keeps it."""
    gc.collect()
    shape, num_local = routed.layer.shape, len(routed.layer.local_experts)
    down = shape.hidden * shape.intermediate // (2 if routed.layer.weight_format == "mxfp4" else 1)
    held = [each.to_local() for each in gc.get_objects() if isinstance(each, DTensor)]
    held += [each for each in gc.get_objects() if isinstance(each, nn.Parameter) and not isinstance(each, DTensor)]
    held = [each for each in held if each.numel() == num_local * down and len(each) == num_local]
    return [tuple(each.shape) for each in held if each.untyped_storage().nbytes()]


def _packed(model: nn.Module) -> list[PackedExperts]:
    return [module for module in model.modules() if isinstance(module, PackedExperts)]


def routed_somehow(hidden: Tensor, topk: int) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [..., H] -> [T, H], ids [T, K], weights [T, K]"""
    rows = hidden.flatten(0, -2).to(torch.bfloat16)
    rng = torch.Generator().manual_seed(2)
    ids = torch.rand(len(rows), 12, generator=rng).argsort(-1)[:, :topk]
    return rows, ids, torch.rand(len(rows), topk, generator=rng)


def alone(plain: Plain) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The same on one rank."""
    model = load(plain)
    outputs = {}
    for name, (args, _, _) in plain.calls.items():
        outputs[name] = model.get_submodule(f"{name}.experts")(*routed_somehow(args[0], 3))
    return forward(model, TOKENS), forward(model, TOKENS[:1, :1]), outputs


def check_bits(
    answers: list[Answer], expected: tuple[Tensor, Tensor, dict[str, Tensor]], held: tuple[int, str]
) -> None:
    logits, one, experts = expected
    for found, found_one, outputs, layers_hold in answers:
        assert torch.equal(found, logits)
        assert torch.equal(found_one, one)
        assert outputs.keys() == experts.keys()
        assert all(torch.equal(outputs[name], experts[name]) for name in experts)
        assert layers_hold == [held] * len(experts)


@pytest.mark.parametrize("family", FP4 + BF16)
def test_two_three_and_four_ranks_have_the_bits_of_one(
    plain_models: dict[str, Plain], ranks: LocalRanks, family: str
) -> None:
    plain = plain_models[family]
    expected = alone(plain)
    for size in (2, 3, 4):
        answers = ranks.run(work, plain, {f"{LAYOUT[family]}_size": size, "ep_size": size}, size=size)
        check_bits(answers, expected, (12 // size, "mxfp4" if family in FP4 else "bf16"))


@pytest.mark.parametrize(
    "sizes",
    [
        {"fsdp_size": 4, "ep_size": 2},
        {"tp_size": 2, "fsdp_size": 2, "ep_size": 4},
        {"tp_size": 2, "fsdp_size": 2, "ep_size": 2},
    ],
    ids=["experts_twice", "two_share_a_batch", "two_share_a_batch_and_experts_twice"],
)
def test_mixed_layouts_have_the_bits_of_one_rank(
    plain_models: dict[str, Plain], ranks: LocalRanks, sizes: dict[str, int]
) -> None:
    plain = plain_models["gpt-oss"]
    check_bits(ranks.run(work, plain, sizes, size=4), alone(plain), (12 // sizes["ep_size"], "mxfp4"))


def write_on(group: EPGroup, plain: Plain, prompts: list[Tensor]) -> list[int]:
    model = load(plain, fsdp_size=group.size, ep_size=group.size)
    found: list[int] = model.generate(prompts[group.rank], max_new_tokens=6, do_sample=False, synced_gpus=True)[
        0
    ].tolist()
    return found


def one_after_another(group: EPGroup, plain: Plain) -> tuple[Tensor, str]:
    """The logits of a second model, whose first is garbage that one rank has collected; what it says of its weights."""
    sizes = {"fsdp_size": group.size, "ep_size": group.size}
    gc.collect()
    gc.disable()
    try:
        first = load(plain, **sizes)
        forward(first, TOKENS[:1])
        del first
        if group.rank == 0:
            gc.collect()
        second = load(plain, **sizes)
        logits = forward(second, TOKENS[:1])
    finally:
        gc.enable()
    with pytest.raises(ValueError, match="in this rank's layer since its first call") as refusal:
        second.state_dict()
    return logits, str(refusal.value)


def test_models_come_one_after_another_and_say_where_their_weights_are(
    plain_models: dict[str, Plain], ranks: LocalRanks
) -> None:
    plain = plain_models["qwen3-moe"]
    expected = forward(load(plain), TOKENS[:1])
    for logits, said in ranks.run(one_after_another, plain, size=2):
        assert torch.equal(logits, expected)
        assert "save the model before it is called" in said


def refused_first(group: EPGroup, plain: Plain) -> tuple[str, Tensor]:
    """What a first call in eval mode says in which rank 1 alone asks for a gradient; then the gradients of training."""
    model = load(plain, fsdp_size=group.size, ep_size=group.size)
    with torch.set_grad_enabled(group.rank == 1), pytest.raises(ValueError, match="in eval mode") as refusal:
        model(TOKENS[:1])
    assert model.state_dict(), "which is refused where weights have gone over"
    untouched = load(plain, fsdp_size=group.size, ep_size=group.size)
    return str(refusal.value), forward(untouched, TOKENS[:1])


def test_a_first_call_that_one_rank_makes_wrongly_takes_weights_on_none(
    plain_models: dict[str, Plain], ranks: LocalRanks
) -> None:
    plain = plain_models["qwen3-moe"]
    expected = forward(load(plain), TOKENS[:1])
    for rank, (said, logits) in enumerate(ranks.run(refused_first, plain, size=2)):
        assert f"requires a gradient on {'this' if rank == 1 else 'another'} rank" in said
        assert torch.equal(logits, expected)


def test_ranks_generate_from_their_own_prompts(plain_models: dict[str, Plain], ranks: LocalRanks) -> None:
    plain = plain_models["qwen3-moe"]
    prompts = [TOKENS[:1, :9], TOKENS[1:2, :23]]
    model = load(plain)
    expected = [model.generate(prompt, max_new_tokens=6, do_sample=False)[0].tolist() for prompt in prompts]
    assert ranks.run(write_on, plain, prompts, size=2) == expected


# ---- what is refused, and what is said ----


def test_weights_have_left_the_module_and_no_state_dict_claims_otherwise(
    plain_models: dict[str, Plain], tmp_path: Path
) -> None:
    model = load(plain_models["mixtral"])
    assert "model.layers.0.mlp.experts.down_proj" in model.state_dict()
    forward(model, TOKENS)
    experts = model.get_submodule("model.layers.0.mlp.experts")
    assert experts.down_proj is None
    with pytest.raises(ValueError, match=r"weights of model.layers.0.mlp.experts are in this rank's layer"):
        model.state_dict()
    with pytest.raises(ValueError, match="save the model before it is called"):
        model.save_pretrained(tmp_path)


def test_torch_compile_leaves_a_first_call_alone(plain_models: dict[str, Plain]) -> None:
    name, found = "model.layers.0.mlp.experts", []
    x, ids, weights = torch.randn(5, 512).bfloat16(), torch.tensor([[0, 1, 2]] * 5), torch.full((5, 3), 0.25)
    torch._dynamo.reset()
    for train in (False, True):
        model = load(plain_models["mixtral"])
        experts = model.get_submodule(name).train(train)
        x = x[:, : model.config.hidden_size].requires_grad_(train)
        found.append(torch.compile(experts, backend="eager")(x, ids, weights))  # type: ignore[no-untyped-call]
    found[1].sum().backward()
    assert torch.equal(*found)
    assert experts.down_proj.grad is not None


def test_a_call_that_is_refused_takes_no_weights(plain_models: dict[str, Plain]) -> None:
    model = load(plain_models["mixtral"])
    with pytest.raises(ValueError, match=r"MixtralExperts in eval mode requires a gradient.* train mode come first"):
        model(TOKENS[:1])
    model.train()(TOKENS[:1]).logits.sum().backward()  # as it would not, were its weights in a layer
    register_parametrization(model.get_submodule("model.layers.0.mlp.experts"), "down_proj", nn.Identity())
    untouched = load(plain_models["mixtral"])
    register_parametrization(untouched.get_submodule("model.layers.0.mlp.experts"), "down_proj", nn.Identity())
    for each in (model, untouched):
        with pytest.raises(ValueError, match="has a parametrization of down_proj: the layer multiplies"):
            forward(each, TOKENS[:1])


def test_another_implementation_is_refused_once_weights_are_gone(plain_models: dict[str, Plain]) -> None:
    model = load(plain_models["mixtral"])
    model.set_experts_implementation("eager")
    plain = forward(model, TOKENS[:1])
    model.set_experts_implementation("megamoe")
    found = forward(model, TOKENS[:1])
    assert relative_error(found, plain) < 0.1
    model.set_experts_implementation("eager")
    with pytest.raises(ValueError, match="experts_implementation='eager' would need them: load the model again"):
        forward(model, TOKENS[:1])
    model.set_experts_implementation("megamoe")
    assert torch.equal(forward(model, TOKENS[:1]), found)


def load_quantised(path: Path, **options: Any) -> PreTrainedModel:
    options |= {"dtype": torch.bfloat16, "quantization_config": PackedExpertsConfig()}
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, **options)
    return model


def logits_quantised(group: EPGroup, path: Path) -> Tensor:
    config = DistributedConfig(fsdp_size=group.size, ep_size=group.size, ep_implementation="megamoe")
    return forward(load_quantised(path, distributed_config=config), TOKENS)


def test_a_bf16_checkpoint_is_quantised_when_asked(
    plain_models: dict[str, Plain], ranks: LocalRanks, tmp_path: Path
) -> None:
    plain = plain_models["mixtral"]
    with pytest.raises(ValueError, match="intermediate 48 is not a multiple of 32"):
        load_quantised(checkpoints.write(tmp_path, "deepseek_v3", moe_intermediate_size=48))
    model = load_quantised(plain.path)
    found = repeat_blocks(model, plain.calls)
    errors = [relative_error(found[name], call[2]) for name, call in plain.calls.items()]
    assert {each.layer.weight_format for each in layers(model)} == {"mxfp4"}
    assert 6e-2 < max(errors) < 0.3  # two roundings to FP8 and one to FP4
    logits = forward(model, TOKENS)
    assert all(torch.equal(each, logits) for each in ranks.run(logits_quantised, plain.path, size=2))


def load_fp8(path: Path, **options: Any) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.bfloat16, config=packed_config(path), **options
    )
    return model


def answer_fp8(group: EPGroup, path: Path) -> tuple[set[torch.dtype], Tensor, str]:
    """dtypes of what the experts hold before the first call, logits, and the layers' formats after it."""
    sizes = {"fsdp_size": group.size, "ep_size": group.size} if group.size > 1 else {}
    options = {"distributed_config": DistributedConfig(**sizes, ep_implementation="megamoe")} if sizes else {}
    model = load_fp8(path, **options)
    dtypes = {parameter.dtype for each in _packed(model) for parameter in each.parameters()}
    logits = forward(model, TOKENS % checkpoints.VOCABULARY)
    return dtypes, logits, "".join({each.layer.weight_format for each in layers(model)})


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        # gates end within a block; transformers' FSDP needs two rows of scales of all that is dense
        (
            "qwen3_moe",
            {
                "num_experts": 8,
                "hidden_size": 256,
                "moe_intermediate_size": 192,
                "num_key_value_heads": 4,
                "head_dim": 64,
            },
        ),
        ("deepseek_v3", {"moe_intermediate_size": 64}),
    ],
)
def test_fp8_experts_are_read_as_they_are_and_computed_as_load_has_them(
    ranks: LocalRanks, tmp_path: Path, family: str, sizes: dict[str, Any]
) -> None:
    quantised = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    path = checkpoints.write(tmp_path / family, family, **sizes)
    checkpoints.rewrite(path, checkpoints.fp8_in_blocks, quantization_config=quantised)
    model, loaded = load_fp8(path), megamoe.model.load(path)
    dtypes = {parameter.dtype for each in _packed(model) for parameter in each.parameters()}
    assert dtypes == {torch.float8_e4m3fn, torch.float32}
    (experts, *_), (theirs, *_) = _packed(model), layers(loaded)
    rng = torch.Generator().manual_seed(3)
    hidden = torch.randn(9, theirs.structure.hidden, generator=rng).to(torch.bfloat16)
    ids = torch.rand(9, theirs.structure.num_experts, generator=rng).argsort(-1)[:, :2]
    weights = torch.rand(9, 2, generator=rng)
    with torch.no_grad():
        assert torch.equal(experts(hidden, ids, weights), theirs(hidden, ids, weights))
    logits = forward(model, TOKENS % checkpoints.VOCABULARY)
    assert {each.layer.weight_format for each in layers(model)} == {"bf16"}
    assert _median_error(logits, forward(loaded, TOKENS % checkpoints.VOCABULARY)) < 0.03
    if family == "deepseek_v3":  # transformers' own decoding takes blocks for smaller than they are where one is cut
        plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
        assert _median_error(logits, forward(plain, TOKENS % checkpoints.VOCABULARY)) < 0.03
        return
    for held, found, formats in ranks.run(answer_fp8, path, size=2):
        assert held == dtypes
        assert formats == "bf16"
        assert torch.equal(found, logits)


def test_packed_config_refuses_what_is_not_packed(plain_models: dict[str, Plain]) -> None:
    with pytest.raises(ValueError, match="no quantization_config, so its experts are not packed"):
        packed_config(plain_models["mixtral"].path)
    with pytest.raises(ValueError, match="neither FP4 nor FP8: quant_method 'gptq', expected 'mxfp4' or 'fp8'"):
        PackedExpertsConfig({"quant_method": "gptq"})
    with pytest.raises(ValueError, match="a scale for each block of values, got weight_block_size None"):
        PackedExpertsConfig({"quant_method": "fp8", "weight_block_size": None})
    with pytest.raises(ValueError, match="takes checkpoint, got bits"):
        PackedExpertsConfig(bits=4)


def test_a_checkpoint_without_an_expert_is_refused(plain_models: dict[str, Plain], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    plain = plain_models["gpt-oss"]
    for file in plain.path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.down_proj_scales"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"the checkpoint has no model.layers.1.mlp.experts.down_proj_scales"):
        AutoModelForCausalLM.from_pretrained(tmp_path, config=packed_config(tmp_path), dtype=torch.bfloat16)


def test_a_packed_model_cannot_be_saved_as_what_it_is_not(plain_models: dict[str, Plain], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="megamoe"):
        load(plain_models["gpt-oss"]).save_pretrained(tmp_path)


# ---- families ----

SOME = ("aria", "gemma4", "nemotron_h", "openai_privacy_filter", "step3p7")


@pytest.mark.parametrize("name", SOME)
def test_a_family_on_two_ranks(ranks: LocalRanks, name: str) -> None:
    (family,) = (each for each in families() if each.name == name)
    row = compare(family, ranks, theirs=False)
    assert row.works, row


def test_a_family_that_does_not_fit_is_refused_with_the_reason(ranks: LocalRanks) -> None:
    (family,) = (each for each in families() if each.name == "muse_spark")
    row = compare(family, ranks, theirs=False)
    assert "MuseSparkExperts does not fit the layer: it has weights that the layer has no place for" in row.refusal


def test_the_page_has_every_family() -> None:
    page = (Path(__file__).parents[1] / "docs" / "transformers.md").read_text()
    listed = [line.split("|")[1].strip() for line in page.splitlines() if line.startswith("| ")][1:]
    assert listed == [family.name for family in families()]


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_every_family_works_or_is_refused(ranks: LocalRanks) -> None:
    rows = [compare(family, ranks, theirs=False) for family in families()]
    assert not [row for row in rows if row.wrong]
    assert sum(row.works for row in rows) >= 54

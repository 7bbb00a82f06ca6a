"""What torch keeps around a call changes neither its bits nor the layer; what cannot be right is refused by name."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad

from megamoe.layer import MegaMoE
from megamoe.model.deepseek_v4.blocks import ExpertStack
from megamoe.model.deepseek_v4.checkpoint import Checkpoint
from megamoe.model.deepseek_v4.synthetic import SMALL, write_checkpoint
from megamoe.shape import MoEShape
from megamoe.training import TrainableMoE
from tests.cases import Batch, make_batch, make_layer, make_weights

SHAPE = MoEShape(hidden=64, intermediate=32, num_experts=6, topk=2, swiglu_limit=3.0)
FORMATS = ["mxfp4", "bf16"]
BATCH = make_batch(SHAPE, 20)


def call(layer: nn.Module, batch: Batch = BATCH) -> Tensor:
    out: Tensor = layer(batch.hidden, batch.ids, batch.weights)
    return out


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def flushing() -> Iterator[None]:
    torch.ones(1 << 18).mul_(2.0)  # torch's worker threads begin as they are
    torch.set_flush_denormal(True)
    try:
        yield
        assert sys.float_info.min * 0.5 == 0.0, "it stands as it stood"
    finally:
        torch.set_flush_denormal(False)


AMBIENT: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "autocast_float16": lambda: torch.autocast("cpu", dtype=torch.float16),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "device_block": lambda: torch.device("meta"),
    "default_device": default_device,
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "deterministic": deterministic,
    "anomaly": lambda: torch.autograd.set_detect_anomaly(True),
    "flush_denormal": flushing,
    "without_mkldnn": lambda: torch.backends.mkldnn.flags(enabled=False),
}


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("ambient", AMBIENT)
def test_what_is_set_around_a_layer_changes_no_bit(ambient: str, weight_format: str) -> None:
    weights = make_weights(SHAPE)
    expected = call(make_layer(SHAPE, weight_format=weight_format))
    with AMBIENT[ambient]():
        layer = MegaMoE(SHAPE, weight_format=weight_format)
        layer.load_experts(*weights)
        inside = call(layer)
    assert inside.device.type == "cpu"
    assert torch.equal(inside, expected)
    assert torch.equal(call(layer), expected), "a layer made inside works outside"
    layer.load_experts(*weights)
    assert torch.equal(call(layer), expected)


def test_denormal_topk_weights_count_where_the_user_flushes_denormals() -> None:
    layer, (gate_up, down) = make_layer(SHAPE, weight_format="bf16", dispatch_format="bf16"), make_weights(SHAPE)
    layer.load_experts(gate_up * 100, down * 1e30)
    tiny = Batch(BATCH.hidden, BATCH.ids, torch.full(BATCH.weights.shape, 9e-39))
    expected = call(layer, tiny)
    assert expected.count_nonzero() > expected.numel() / 4
    with flushing():
        found = call(layer, tiny)
    assert torch.equal(found, expected)


LOST = """
import torch
torch.set_num_threads(2)
torch.set_flush_denormal(True)
torch.ones(1 << 20).mul_(2.0)
from tests.test_ambient import *
try:
    make_layer(SHAPE)
except ValueError as refusal:
    print(refusal)
"""


def test_worker_threads_that_flush_for_good_are_refused_by_name() -> None:
    done = subprocess.run([sys.executable, "-c", LOST], capture_output=True, text=True, timeout=60, check=False)
    assert "set_flush_denormal" in done.stdout, done.stderr[-500:]


def test_parameters_that_are_loaded_leave_no_graph_behind() -> None:
    for weight_format in FORMATS:
        layer = MegaMoE(SHAPE, weight_format=weight_format)
        layer.load_experts(*(nn.Parameter(weights) for weights in make_weights(SHAPE)))
        layer.load_expert(0, *(nn.Parameter(weights[0]) for weights in make_weights(SHAPE)))
        assert not any(buffer.requires_grad for buffer in layer.buffers())


# ---- compilers and transforms ----


class Model(nn.Module):
    """A layer between others"""

    def __init__(self, layer: MegaMoE) -> None:
        super().__init__()
        self.layer, self.last = layer, nn.Linear(SHAPE.hidden, 4)

    def forward(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out: Tensor = self.last(self.layer(hidden * 2, ids, weights).float())
        return out


@pytest.mark.parametrize("whole", [False, True], ids=["layer", "model"])
def test_a_compiled_layer_has_the_bits_of_an_eager_one(whole: bool) -> None:
    layer = make_layer(SHAPE)
    module = Model(layer) if whole else layer
    expected = call(module)
    assert torch.equal(call(torch.compile(module, backend="eager")), expected)  # type: ignore[arg-type]
    assert torch.equal(call(module), expected), "and works on without a compiler"
    torch._dynamo.reset()


def traced(layer: MegaMoE) -> None:
    torch.jit.trace(layer, (BATCH.hidden, BATCH.ids, BATCH.weights), check_trace=False)  # type: ignore[no-untyped-call]


def mapped(layer: MegaMoE) -> None:
    torch.func.vmap(layer)(BATCH.hidden[None], BATCH.ids[None], BATCH.weights[None])


def differentiated(layer: MegaMoE) -> None:
    torch.func.grad(lambda hidden: layer(hidden, BATCH.ids, BATCH.weights).float().sum())(BATCH.hidden.float())


def faked(layer: MegaMoE) -> None:
    with FakeTensorMode() as mode:
        layer(*(mode.from_tensor(each) for each in (BATCH.hidden, BATCH.ids, BATCH.weights)))


def faked_outside(layer: MegaMoE) -> None:
    mode = FakeTensorMode()
    layer(mode.from_tensor(BATCH.hidden), BATCH.ids, BATCH.weights)


def made_of_fakes(_: MegaMoE) -> None:
    with FakeTensorMode():
        make_layer(SHAPE)


def dual(layer: MegaMoE) -> None:
    with forward_ad.dual_level():
        hidden = BATCH.hidden.float()
        both = forward_ad.make_dual(hidden, torch.ones_like(hidden))  # type: ignore[no-untyped-call]
        layer(both, BATCH.ids, BATCH.weights)


def sparse(layer: MegaMoE) -> None:
    layer(BATCH.hidden.float().to_sparse(), BATCH.ids, BATCH.weights)


def weights_that_need_a_gradient(layer: MegaMoE) -> None:
    layer(BATCH.hidden, BATCH.ids, BATCH.weights.clone().requires_grad_())


def on_meta(_: MegaMoE) -> None:
    MegaMoE(SHAPE, device="meta")


def on_nothing(_: MegaMoE) -> None:
    MegaMoE(SHAPE, device="abacus")


REFUSED: dict[Callable[[MegaMoE], None], str] = {
    traced: "inside of torch.jit.trace",
    mapped: "inside of a transform of torch.func",
    differentiated: "inside of a transform of torch.func",
    faked: "inside of a FakeTensorMode",
    faked_outside: "hidden must be a plain dense tensor .* FakeTensor",
    made_of_fakes: "inside of a FakeTensorMode",
    dual: "hidden carries a tangent",
    sparse: "hidden must be a plain dense tensor .* torch.sparse_coo",
    weights_that_need_a_gradient: "topk_weights requires a gradient",
    on_meta: "device must be one that can hold weights, got 'meta'",
    on_nothing: "device must be one that torch knows, got 'abacus'",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("use", REFUSED, ids=lambda use: use.__name__)
def test_what_cannot_be_right_is_refused_by_name(use: Callable[[MegaMoE], None]) -> None:
    layer = make_layer(SHAPE)
    expected = call(layer)
    with pytest.raises(ValueError, match=REFUSED[use]):
        use(layer)
    assert torch.equal(call(layer), expected)


# ---- modules that are converted or moved ----

CONVERSIONS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "half": lambda module: module.half(),
    "double": lambda module: module.double(),
    "to_bfloat16": lambda module: module.to(torch.bfloat16),
    "to_cpu_and_float16": lambda module: module.to("cpu", torch.float16),
    "to_cpu": lambda module: module.to("cpu"),
}


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("conversion", CONVERSIONS)
def test_weights_keep_their_dtype(conversion: str, weight_format: str) -> None:
    layer = make_layer(SHAPE, weight_format=weight_format)
    expected, before = call(layer), {name: each.dtype for name, each in layer.state_dict().items()}
    CONVERSIONS[conversion](nn.Sequential(layer))
    assert {name: each.dtype for name, each in layer.state_dict().items()} == before
    assert torch.equal(call(layer), expected)


# ---- blocks ----


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("ambient") / "small"
    sizes = {"hidden_size": 128, "moe_intermediate_size": 64, "n_routed_experts": 6, "num_experts_per_tok": 2}
    with default_dtype(torch.float64), torch.device("meta"):
        write_checkpoint(path, SMALL.model_copy(update=sizes | {"vocab_size": 50}))
    return path


@pytest.mark.parametrize("ambient", ["autocast", "device_block", "inference_mode", "deterministic"])
def test_blocks_have_the_same_bits_too(checkpoint: Path, ambient: str) -> None:
    ids, hidden = torch.arange(40), torch.randn(40, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    with Checkpoint.open(checkpoint) as opened:
        stack = ExpertStack.load(opened)
        expected = stack(hidden, ids)
        with AMBIENT[ambient]():
            again = ExpertStack.load(opened)
            assert torch.equal(again(hidden, ids), expected)
        again.half()
    assert torch.equal(again(hidden, ids), expected)
    for asks in (again, again.blocks[0]):
        with pytest.raises(ValueError, match="hidden requires a gradient"):
            asks(hidden.float().requires_grad_(), ids)


def test_a_compiled_step_with_its_backward_trains_as_an_eager_one() -> None:
    """torch compiles the backward too then, and makes modules while it traces."""
    layer = TrainableMoE(SHAPE)
    hidden, found = BATCH.hidden.clone().requires_grad_(), []

    def step() -> None:
        layer(hidden, BATCH.ids, BATCH.weights).float().square().sum().backward()

    for each in (step, torch.compile(step, backend="eager")):
        with torch._dynamo.config.patch(compiled_autograd=each is not step):
            each()
        found.append([hidden.grad, *(parameter.grad for parameter in layer.parameters())])
        hidden.grad = None
        layer.zero_grad()
    torch._dynamo.reset()
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))

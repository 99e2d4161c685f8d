"""`convert` as users see it: one file that needs torch alone, is the text that the library's step runs, and trains."""

from __future__ import annotations

import ast
import copy
import inspect
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from emit_cases import Bag, Lion, batches, example_mla, gqa, layout_of
from tiny_models import gemma3, import_file, llama, olmo2, qwen3
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import quack_fx
from quack_fx.errors import EmitError
from quack_fx.layout import Norm, QKLayout, Skipped, WeightBlock
from quack_fx.train.convert import OptimizerName, convert, emit
from quack_fx.train.program.scaling import execute
from quack_fx.train.program.source import OPTIMIZERS
from quack_fx.train.program.write import StandIn

ROOT = Path(__file__).parent.parent
NORM = Norm("query", "rms", 4, "attn.q_norm", "attn.q_norm.weight")
_numbers = iter(range(1000))


def load(source: str, folder: Path) -> ModuleType:
    """The file, written and imported as users do."""
    path = folder / f"emitted_{next(_numbers)}.py"
    path.write_text(source)
    return import_file(path)


# ---- what is asked for, and refused ----------------------------------------------------------------------------------


def test_a_target_as_text() -> None:
    """The model is built on meta and never run, for the layout is given."""
    model, layout = example_mla()
    source = convert(f"{ROOT}/examples/mla.py:MLATransformer", layout=layout, tau=0.3)
    assert source.startswith('"""A training step for MLATransformer: AdamW with QuacK.') and "Tensor = 0.3," in source
    own = {name for _, block in layout.sites[0].blocks() for name in (block.param,)}
    (kind,) = execute(source).KINDS
    assert {name for numbers in kind.numbers for name, _ in kind.weights(*numbers).values()} == own
    assert execute(source).QuacK(model).tau == 1.0, "tau is the step's default"
    assert execute(source).TrainStep(model, torch.optim.AdamW(model.parameters())).quack.tau == 0.3


def test_it_says_what_it_lacks() -> None:
    with pytest.raises(EmitError, match="example inputs"):
        convert(nn.Linear(2, 2))
    with pytest.raises(EmitError, match="build and inputs"):
        convert(nn.Linear(2, 2), torch.zeros(2), build="x")


def test_the_optimizer_must_be_known() -> None:
    with pytest.raises(EmitError, match=r"optimizer 'adagrad' is not one of adamw, adam, sgd, muon, lion"):
        emit(*layout_of("gqa"), title="bad", optimizer="adagrad")  # type: ignore[arg-type]


@pytest.mark.parametrize("tau", [0.0, -1.0, float("nan"), float("inf")])
def test_tau_must_be_positive(tau: float) -> None:
    with pytest.raises(EmitError, match=r"tau is .*; need a positive number"):
        emit(*layout_of("gqa"), title="bad", tau=tau)


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        (QKLayout(), "no query/key pairs"),
        (QKLayout(skipped=(Skipped("m.0", "x", "it adds"),)), "'m.0': it adds"),
        (QKLayout((replace(gqa("attn", 2, 2, 4), qk_norm=(NORM,)),)), "all 1 attentions keep.*quack_fx.strip_qk_norm"),
    ],
    ids=["none", "skipped", "normed"],
)  # fmt: skip
def test_where_there_is_nothing_to_write(layout: QKLayout, words: str) -> None:
    with pytest.raises(EmitError, match=words) as caught:
        emit(layout, {}, title="bad")
    assert "\n" not in str(caught.value)


def test_the_docstring_names_what_is_left_out() -> None:
    layout, shapes = layout_of("mla")
    kept = [replace(gqa(f"vision.{i}.attn", 2, 2, 4), qk_norm=(NORM,)) for i in range(9)]
    skipped = tuple(Skipped(f"mixer.{i}", "linear-attention", "there is no softmax") for i in range(4))
    many = tuple(Skipped(f"{c}.x", "other", f"reason {c}") for c in "abcdefghij")
    source = emit(QKLayout((*layout.sites, *kept), skipped + many), shapes, title="DeepSeek")
    doc = ast.get_docstring(ast.parse(source)) or ""
    assert "DeepSeek" in doc and "arXiv 2511.21377, Algorithm 2" in doc
    assert "- vision.*.attn (9 times): QK norm is kept" in doc
    assert "- mixer.* (4 times): there is no softmax" in doc
    assert doc.rstrip().endswith("- and 6 more")
    assert "Left out" not in emit(layout, shapes, title="DeepSeek")
    assert "Algorithm 1)" in emit(*layout_of("gqa"), title="Llama")
    both = QKLayout((*layout_of("gqa")[0].sites, *layout_of("mla_without_q_latent")[0].sites))
    shapes = layout_of("gqa")[1] | layout_of("mla_without_q_latent")[1]
    assert "Algorithms 1 and 2)" in emit(both, shapes, title="both")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_what_the_docstring_says_works(optimizer: OptimizerName, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its lines of code, as they stand."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    layout, shapes = layout_of("mqa_with_bias")
    source = emit(layout, shapes, title="model", optimizer=optimizer)
    program, model = execute(source), Bag(shapes)
    lines = [line[4:] for line in (ast.get_docstring(ast.parse(source)) or "").splitlines() if line.startswith("    ")]
    assert len(lines) == len(OPTIMIZERS[optimizer]) + 3
    names = {
        **vars(program),
        "model": model,
        "matrices": [p for p in model.parameters() if p.dim() == 2],
        "others": [p for p in model.parameters() if p.dim() != 2],
        "batches": [(x,) for x in batches(3, torch.float32)],
    }
    before = [p.detach().clone() for p in model.parameters()]
    exec("\n".join(lines), names)
    assert names["loss"].isfinite() and not any(map(torch.equal, before, model.parameters()))


def test_a_target_is_recorded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recording that told which inputs fit is the one that the pairs are found in."""
    monkeypatch.setattr("quack_fx.find.search.capture", lambda *_, **__: pytest.fail("recorded a second time"))
    assert "class TrainStep" in convert(f"{ROOT}/examples/gpt.py")


# ---- it stands alone -------------------------------------------------------------------------------------------------

ALONE = """
import sys
sys.modules["quack_fx"] = None
sys.path.insert(0, sys.argv[1])
import importlib, torch
from torch import nn
class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.Module()
        self.attn.c_attn = nn.Linear(8, 36)
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.h = nn.ModuleList([Layer(), Layer()])
    def forward(self, x):
        return sum(layer.attn.c_attn(x).square().mean() for layer in self.h)
kinds = {"adamw": ["AdamW"], "adam": ["Adam"], "sgd": ["SGD"], "muon": ["Muon", "AdamW"], "lion": ["Lion"]}
for name in sys.argv[2:]:
    file, model, x = importlib.import_module(name), Model(), torch.ones(2, 8)
    both = [[p for p in model.parameters() if p.dim() == 2], [p for p in model.parameters() if p.dim() == 1]]
    groups = both if name == "muon" else [list(model.parameters())]
    made = [getattr(torch.optim, kind, None) or file.Lion for kind in kinds[name]]
    step = file.TrainStep(model, *(kind(group, lr=0.01) for kind, group in zip(made, groups)), compile=False)
    first = step(x)
    for _ in range(5):
        last = step(x)
    assert last < first, name
assert not any(name.startswith("quack_fx.") for name in sys.modules)
print("done")
"""


def test_it_runs_where_quack_fx_cannot_be_imported(tmp_path: Path) -> None:
    for optimizer in OPTIMIZERS:
        source = emit(*layout_of("fused"), title="fused", optimizer=optimizer)  # type: ignore[arg-type]
        (tmp_path / f"{optimizer}.py").write_text(source)
    command = [sys.executable, "-c", ALONE, str(tmp_path), *OPTIMIZERS]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "done\n", done.stderr


def test_emission_needs_no_torch() -> None:
    script = "import sys; sys.modules['torch'] = None; from quack_fx.train.convert import emit"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- it is what the library runs -------------------------------------------------------------------------------------


def optimizers_of(model: nn.Module, optimizer: str) -> list[torch.optim.Optimizer]:
    """Optimizers of the classes that a file is for."""
    groups: dict[str, list[nn.Parameter]] = {name: list(model.parameters()) for name in OPTIMIZERS[optimizer]}
    if optimizer == "muon":
        groups = {"Muon": [p for p in model.parameters() if p.dim() == 2]}
        groups["AdamW"] = [p for p in model.parameters() if p.dim() != 2]
    return [getattr(torch.optim, name, Lion)(group, lr=0.01) for name, group in groups.items()]


@pytest.mark.parametrize("master_weights", [False, True])
@pytest.mark.parametrize("name", ["mla", "fused", "irregular"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_librarys_step_runs_this_text(optimizer: OptimizerName, name: str, master_weights: bool) -> None:
    layout, shapes = layout_of(name)
    model = Bag(shapes | {"rest.bias": (5,)})
    source = convert(model, layout=layout, optimizer=optimizer, master_weights=master_weights)
    many = optimizers_of(model, optimizer)
    step = quack_fx.compile_train_step(
        model, many, layout=layout, tau=0.3, master_weights=master_weights, compile=False
    )
    assert step.source == source


@pytest.fixture
def one_rank() -> Iterator[Any]:
    """A mesh of one process."""
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_the_librarys_step_runs_this_text_on_shards(one_rank: Any) -> None:
    layout, shapes = layout_of("gqa")
    model = Bag(shapes)
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            module.register_parameter(name, nn.Parameter(distribute_tensor(p.data, one_rank, [Shard(0)])))
    source = convert(model, layout=layout, sharded=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    assert quack_fx.compile_train_step(model, optimizer, layout=layout, compile=False).source == source
    # One rank holds every row, so that the file for shards does what the other one does.
    plain = Bag(shapes)
    programs = execute(source), execute(convert(plain, layout=layout))
    quacks = [program.QuacK(m, 0.5) for program, m in zip(programs, (model, plain), strict=True)]
    for m in (model, plain):
        with torch.no_grad():
            for p in m.parameters():
                p.mul_(2)
    for name, p in plain.named_parameters():
        if p in quacks[1].home:
            assert torch.equal(quacks[1].scales()[p], quacks[0].scales()[model.get_parameter(name)])


def test_master_weights_are_asked_for_by_the_file() -> None:
    """A file for masters keeps fp32 copies of bf16 weights; one without rounds every step."""
    layout, shapes = layout_of("gqa")
    for master_weights in (False, True):
        model = Bag(shapes, torch.bfloat16)
        program = execute(convert(model, layout=layout, master_weights=master_weights))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
        step = program.TrainStep(model, optimizer, compile=False)
        for x in batches(3, torch.bfloat16):
            step(x)
        for p, state in optimizer.state.items():
            assert ("master_param" in state) == master_weights
            if master_weights:
                master = state["master_param"]
                assert torch.equal(master.bfloat16(), p) and not torch.equal(master, p.float())


def test_tracebacks_and_inspect_show_the_text() -> None:
    layout, shapes = layout_of("gqa")
    source = emit(layout, shapes, title="model")
    program = execute(source)
    assert inspect.getsource(program) == source
    assert inspect.getsource(program.QuacK.scales) in source
    with pytest.raises(ValueError, match="the model has no") as caught:
        program.QuacK(nn.Linear(2, 2))
    last = traceback.extract_tb(caught.value.__traceback__)[-1]
    assert last.filename == program.__file__ and last.line == source.splitlines()[last.lineno - 1].strip() != ""


def test_each_run_of_a_text_is_a_module_of_its_own() -> None:
    """torch.compile counts what it compiled by function."""
    source = emit(*layout_of("gqa"), title="model")
    one, two = execute(source), execute(source)
    assert one.change.__code__ is not two.change.__code__ and one.__file__ != two.__file__


# ---- models ----------------------------------------------------------------------------------------------------------


def in_module(model: nn.Module) -> nn.Module:
    """Under the name that DistributedDataParallel gives."""
    outer = nn.Module()
    outer.add_module("module", model)
    return outer


def test_wrapped_models_are_recognised() -> None:
    layout, shapes = layout_of("gqa")
    program = execute(emit(layout, shapes, title="model"))
    for wrapped in (torch.compile(Bag(shapes)), in_module(Bag(shapes)), in_module(torch.compile(Bag(shapes)))):
        assert len(program.QuacK(wrapped).home) == 6


def test_the_file_of_a_wrapped_model_is_that_of_the_model() -> None:
    """Whichever of both the layout was found on."""
    layout, shapes = layout_of("fused")
    model = Bag(shapes)
    source = convert(model, layout=layout, title="model")
    for wrapped in (torch.compile(model), in_module(torch.compile(model))):
        assert convert(wrapped, layout=layout, title="model") == source
        bare, names = dict(model.named_parameters()), {id(p): name for name, p in wrapped.named_parameters()}

        def theirs(b: WeightBlock, bare: Any = bare, names: Any = names) -> WeightBlock:
            return replace(b, param=names[id(bare[b.param])], bias=b.bias and names[id(bare[b.bias])])

        sites = (replace(s, query=tuple(map(theirs, s.query)), key=tuple(map(theirs, s.key))) for s in layout.sites)
        assert convert(wrapped, layout=QKLayout(tuple(sites)), title="model") == source


def test_names_that_only_a_wrapper_tells_apart_are_refused() -> None:
    layout, shapes = layout_of("gqa")
    with pytest.raises(EmitError, match=r"two parameters are called '.*' without their wrappers; rename"):
        emit(layout, shapes | {f"module.{name}": shape for name, shape in shapes.items()}, title="model")


def test_frozen_weights_count_and_stay() -> None:
    layout, shapes = layout_of("gqa")
    model = Bag(shapes)
    key = model.get_parameter("layers.0.attn.k_proj.weight").requires_grad_(False)
    before = key.clone()
    step = execute(emit(layout, shapes, title="model")).TrainStep(
        model, torch.optim.AdamW(model.parameters(), lr=0.01), compile=False
    )
    for x in batches(3, torch.float32):
        step(x)
    assert torch.equal(key, before)
    assert not torch.equal(step.quack.scales()[key], torch.ones_like(step.quack.scales()[key]))


class Output:
    """What models of transformers return."""

    def __init__(self, loss: Tensor) -> None:
        self.loss = loss


RETURNS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "a scalar": lambda logits, loss: loss,
    "logits and loss": lambda logits, loss: (logits, loss),
    "a loss alone in a tuple": lambda logits, loss: (logits, None, loss),
    "a dict": lambda logits, loss: {"aux": loss.detach() + 1, "loss": loss},
    "an object": lambda logits, loss: Output(loss),
}
NO_LOSS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "logits": lambda logits, loss: logits,
    "auxiliary loss and loss": lambda logits, loss: (loss * 2, loss),
    "a dict without a loss": lambda logits, loss: {"logits": logits},
    "nothing": lambda logits, loss: None,
}


def returning(pick: Callable[[Tensor, Tensor], Any]) -> tuple[nn.Module, ModuleType, torch.optim.Optimizer]:
    class Model(Bag):
        def forward(self, x: Tensor) -> Any:
            logits = x + sum(p.sum() for p in self.parameters())
            return pick(logits, logits.square().mean())

    layout, shapes = layout_of("fused")
    model = Model(shapes)
    return model, execute(emit(layout, shapes, title="model")), torch.optim.AdamW(model.parameters(), lr=0.01)


@pytest.mark.parametrize("returns", RETURNS)
def test_where_the_loss_comes_from(returns: str) -> None:
    model, program, optimizer = returning(RETURNS[returns])
    step = program.TrainStep(model, optimizer, compile=False)
    first = step(torch.ones(3))
    assert first.dim() == 0 and not first.requires_grad and step(torch.ones(3)) < first
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("returns", NO_LOSS)
def test_no_loss_or_several_are_refused(returns: str) -> None:
    model, program, optimizer = returning(NO_LOSS[returns])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="the model gives no loss, or several; give it targets, or pass loss_fn"):
        program.TrainStep(model, optimizer, compile=False)(torch.ones(3))
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_a_loss_function_of_ones_own() -> None:
    model, program, optimizer = returning(NO_LOSS["auxiliary loss and loss"])
    step = program.TrainStep(model, optimizer, loss_fn=lambda model, x, part: part * model(x)[1], compile=False)
    expected = 0.25 * model(torch.ones(3))[1]
    assert torch.equal(step(torch.ones(3), part=0.25), expected)
    assert step(torch.ones(3), part=0.25) < expected


def test_what_an_exception_leaves_behind_is_not_added_to_the_next_batch() -> None:
    model, program, optimizer = returning(RETURNS["a scalar"])
    step = program.TrainStep(model, optimizer, compile=False)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(TypeError):
        step("no tensor")
    assert all(p.grad is None for p in model.parameters())


def test_the_compiled_step_trains_the_example(tmp_path: Path) -> None:
    """With a schedule, it follows the eager step, the loss falls, and nothing compiles twice."""
    torch._dynamo.reset()  # after batches of other lengths it would compile the loss for any length
    model, layout = example_mla()
    program = load(convert(model, layout=layout), tmp_path)
    twin = copy.deepcopy(model)
    optimizer, eager = (torch.optim.AdamW(m.parameters(), lr=3e-3) for m in (model, twin))
    train_step = program.TrainStep(model, optimizer)
    eager_step = program.TrainStep(twin, eager, compile=False)
    schedulers = [torch.optim.lr_scheduler.LambdaLR(o, lambda i: (i + 1) / 10) for o in (optimizer, eager)]
    text = torch.arange(2 * 17).view(2, 17) % 7
    losses, compiled = [], 0
    for i in range(8):
        loss = train_step(text[:, :-1], text[:, 1:])
        expected = eager_step(text[:, :-1], text[:, 1:])
        assert float(loss) == pytest.approx(float(expected), rel=1e-4)
        for scheduler in schedulers:
            scheduler.step()
        losses.append(float(loss))
        compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"] if i == 0 else compiled
    assert losses[-1] < 0.8 * losses[0]
    assert compiled > 0 and torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled
    assert not torch._dynamo.utils.counters["graph_break"]


# ---- QK norms --------------------------------------------------------------------------------------------------------


class Unit(nn.Module):
    """L2 norm of queries and keys in one call."""

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return F.normalize(q, dim=-1), F.normalize(k, dim=-1)


class Attention(nn.Module):
    """Two heads whose norms bound the logits: there is no other scale."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.qkv, self.norm = nn.Linear(16, 48, bias=False), norm

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (2, 8)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        q, k = self.norm(q, k) if isinstance(self.norm, Unit) else (self.norm(q), self.norm(k))
        return F.softmax(q @ k.mT, -1) @ v


def of(case: Any) -> tuple[nn.Module, dict[str, Any]]:
    return case.model, dict(case.inputs)


NORMED: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {
    "qwen3": lambda: of(qwen3()),
    "olmo2": lambda: of(olmo2()),
    "gemma3": lambda: of(gemma3()),
    "scaled": lambda: (Attention(nn.RMSNorm(8)), {"x": torch.randn(2, 5, 16)}),
}


@pytest.mark.parametrize("name", NORMED)
def test_the_file_takes_norms_out_as_the_library_does(name: str) -> None:
    torch.manual_seed(0)
    model, inputs = NORMED[name]()
    before = list(model.state_dict())
    source = convert(model, **inputs)
    assert list(model.state_dict()) == before and "strip_qk_norm(model)  # QuacK takes the place" in source
    program = execute(source)
    with pytest.raises(ValueError, match=r"norm is a QK norm still; call strip_qk_norm\(model\) before the optimizer"):
        program.QuacK(model)
    twin = copy.deepcopy(model)
    report = quack_fx.strip_qk_norm(twin, quack_fx.find_qk_pairs(model, **inputs))
    assert program.strip_qk_norm(model) is model
    assert list(model.state_dict()) == list(twin.state_dict())
    ours, theirs = (torch.utils._pytree.tree_flatten(m(**inputs))[0] for m in (model, twin))
    assert all(map(torch.equal, *([t for t in leaves if isinstance(t, Tensor)] for leaves in (ours, theirs))))
    quack = program.QuacK(model)
    wanted = {block.param for site in report.layout.sites for _, block in site.blocks()}
    assert {name for name, p in model.named_parameters(remove_duplicate=False) if p in quack.home} == wanted
    assert program.QuacK(in_module(torch.compile(model))).home.keys() == quack.home.keys()


def test_norms_that_are_kept_are_left_out() -> None:
    model, inputs = of(qwen3())
    with pytest.raises(EmitError, match="keep their QK norm"):
        convert(model, **inputs, qk_norm="keep")
    with pytest.raises(EmitError, match=r"qk_norm='drop' is not known; use qk_norm='strip' or qk_norm='keep'"):
        convert(model, **inputs, qk_norm="drop")  # type: ignore[arg-type]
    assert "PassThrough" not in convert(of(llama())[0], **of(llama())[1])


STAND_INS: dict[str, dict[str, StandIn]] = {
    "plain": {f"model.layers.{i}.self_attn.{side}_norm": StandIn() for i in range(94) for side in "qk"},
    "factor": {f"layers.{i}.{side}_norm": StandIn(factor=1 / 8 if side == "q" else 1) for i in (1, 3) for side in "qk"},
    "tensors": {f"blocks.{i}.norm": StandIn(tensors=2, factor=0.5) for i in (0, 1, 5)} | {"last.norm": StandIn()},
}  # fmt: skip


@pytest.mark.parametrize("name", STAND_INS)
def test_what_stands_in_hands_on_its_arguments(name: str) -> None:
    stand_ins = STAND_INS[name]
    source = emit(*layout_of("gqa"), title="x", stand_ins=stand_ins)
    made = dict(execute(source).qk_norms())
    assert made.keys() == stand_ins.keys()
    for at, stand_in in stand_ins.items():
        x, y = torch.randn(3), torch.randn(3)
        given = made[at](x) if stand_in.tensors == 1 else made[at](x, k=y)
        expected = x * stand_in.factor if stand_in.tensors == 1 else (x * stand_in.factor, y * stand_in.factor)
        assert all(map(torch.equal, given, expected))
    assert ("for i in range(94):" in source) == (name == "plain"), "equal layers are a loop"

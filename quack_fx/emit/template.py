"""USER: the part of an emitted file that is the same for every model, as text.

In: the features that a model's table and the chosen optimizer make use of. Out: Python source without a trace of the
others. A line `#? bias` in a template opens a passage for tables with a bias, `#? !bias` one for those without, `#?`
ends it.

The features:
    axis    a weight whose outputs are not counted by its first axis (GPT-2's Conv1D)
    bias    a projection with a bias
    pieces  a block whose rows are not one contiguous run
    norms   QK norm modules that are taken out of the model
    factor  some of them leave a number behind that features are multiplied with
    tensors some of them norm queries and keys in one call
    several the optimizer is for some parameters only, and needs another one beside it (Muon)
"""

from __future__ import annotations

from collections.abc import Set


def render(template: str, features: Set[str]) -> str:
    """The passages of a template that a set of features needs."""
    lines, keep = [], True
    for line in template.splitlines():
        if line.startswith("#?"):
            keep = all((name.lstrip("!") in features) != name.startswith("!") for name in line[2:].split())
        elif keep:
            lines.append(line)
    return "\n".join(lines).strip("\n")


BLOCKS = '''\
@dataclass(frozen=True)
class Weight:
    """A weight of the model; slicing it gives a block of its rows, the outputs of one head for example."""

    name: str
    shape: tuple[int, ...]
#? axis
    axis: int = 0  # the one that counts outputs; "rows" lie along it
#? bias
    bias: str | None = None
#? !pieces

    def __getitem__(self, rows: slice) -> Block:
        return Block(self, ((rows.start, rows.stop),))
#? pieces

    def __getitem__(self, rows: slice | tuple[slice, ...]) -> Block:
        pieces = rows if isinstance(rows, tuple) else (rows,)
        numbers = {row for piece in pieces for row in range(piece.start, piece.stop, piece.step or 1)}
        starts = sorted(row for row in numbers if row - 1 not in numbers)
        stops = sorted(row + 1 for row in numbers if row + 1 not in numbers)
        return Block(self, tuple(zip(starts, stops, strict=True)))
#?


class Block(NamedTuple):
#? !bias
    """Rows of a weight that share one norm and one learning rate."""
#? bias
    """Rows of a weight, and their entries of its bias, that share one norm and one learning rate."""
#?

    weight: Weight
    ranges: tuple[tuple[int, int], ...]

    def parts(self) -> Iterator[tuple[str, int]]:
        """The parameters that hold it, each with the axis that its rows lie along."""
#? axis
        yield self.weight.name, self.weight.axis
#? !axis
        yield self.weight.name, 0
#? bias
        if self.weight.bias is not None:
            yield self.weight.bias, 0
#?
'''

NORMS = '''\
class PassThrough(nn.Module):
#? !factor !tensors
    """Stands where a QK norm stood, and hands on what it is given."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x
#? factor !tensors
    """Stands where a QK norm stood, and hands on what it is given, times a number."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x if self.factor == 1 else x * self.factor
#? tensors
    """Stands where a QK norm stood, and hands on its first arguments, times a number."""

    def __init__(self, tensors: int = 1, factor: float = 1.0) -> None:
        super().__init__()
        self.tensors, self.factor = tensors, factor

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = (*args, *kwargs.values())[: self.tensors]
        kept = given if self.factor == 1 else tuple(x * self.factor for x in given)
        return kept[0] if self.tensors == 1 else kept
#?


def strip_qk_norm(model: nn.Module) -> nn.Module:
    """Take the QK norms out of the model, in place; call it before the optimizer is made, and after each new build."""
    for name, stand_in in qk_norms():
        model.set_submodule(name, stand_in)
    return model
'''

HEADS = '''\
class Plan(NamedTuple):
    """The blocks of the table, and the products of the logits, each as the numbers of its blocks."""

    units: tuple[Block, ...]
    terms: tuple[tuple[int, ...], ...]


class Rule(NamedTuple):
    """The rule of QuacK for all blocks at once:

    factor(block) = min over the products with this block of 1 / (norms of the other blocks in it, multiplied)
    """

    others: Tensor  # for each place of each product, the blocks at its other places
    places: tuple[Tensor, ...]  # places of the blocks that stand in equally many products
    place_order: Tensor  # where each block is among all of those

__FACTORS__


class QuacK:
    """The table against a model and its optimizer: scale(block) = tau * factor(block) / factor(block) at the start."""

    @torch.no_grad()
    def __init__(self, optimizer: Optimizer, model: nn.Module, tau: float) -> None:
        products = dict.fromkeys(logit_products())
        number = {block: n for n, block in enumerate(dict.fromkeys(b for product in products for b in product))}
        self.optimizer, self.tau = optimizer, tau
        self.plan = Plan(tuple(number), tuple(tuple(number[block] for block in product) for product in products))
        named = {name.replace("_orig_mod.", ""): p for name, p in model.named_parameters(remove_duplicate=False)}
#? norms
        stripped = {name for name, module in model.named_modules() if isinstance(module, PassThrough)}
        stripped = {name.replace("_orig_mod.", "").removeprefix("module.") for name in stripped}
        for name, _ in qk_norms():
            if name not in stripped:
                raise ValueError(f"the model still has the QK norm {name}: call strip_qk_norm(model) first")
#?
        self.params: dict[str, nn.Parameter] = {}
        for weight in dict.fromkeys(block.weight for block in self.plan.units):
            self.params[weight.name] = find(named, weight.name, weight.shape)
#? bias
            if weight.bias is not None:
#? bias axis
                self.params[weight.bias] = find(named, weight.bias, (weight.shape[weight.axis],))
#? bias !axis
                self.params[weight.bias] = find(named, weight.bias, weight.shape[:1])
#?
        device = next(iter(self.params.values())).device
        others, places = _term_tables(self.plan)
        by_number, order = _by_length(places)
        self.tables = Rule(others.to(device), tuple(alike.to(device) for alike in by_number), order.to(device))
        self.init_factors = self.tables.factors(self.norms())

    def norms(self) -> Tensor:
        """Norm of every block, as the weights are: [blocks]."""
        units, dtype = self.plan.units, norm_dtype(self.params)
        rows = {
            part: square_rows(self.params[part[0]].movedim(part[1], 0), dtype)
            for part in dict.fromkeys(part for block in units for part in block.parts())
        }
        sums = [torch.cat([rows[p][a:b] for p in block.parts() for a, b in block.ranges]).sum() for block in units]
        norms = torch.stack(sums).sqrt()
        for block, norm in zip(units, norms.tolist(), strict=True):
            if not 0 < norm < math.inf:
                where = ", ".join(f"{a}:{b}" for a, b in block.ranges)
                raise ValueError(
                    f"rows {where} of {block.weight.name} have norm {norm:g}, and QuacK divides by it: give them other "
                    "initial values"
                )
        return norms


def find(named: dict[str, nn.Parameter], name: str, shape: tuple[int, ...]) -> nn.Parameter:
    """A parameter of the table in the model; DistributedDataParallel puts a prefix before its name."""
    parameter = named.get(name, named.get(f"module.{name}"))
    if parameter is None or parameter.shape != shape or hasattr(parameter, "placements"):
        found = None if parameter is None else f"a {type(parameter).__name__} of {list(parameter.shape)}"
        raise ValueError(f"the table has a parameter {name} of {list(shape)}, whole on every rank; found {found}")
    return parameter
'''

STEP = '''\
class QuacKStep(Optimizer):
#? several
    """The step of the optimizers below: their own arithmetic, with a scale for every head."""
#? !several
    """The step of the optimizer below: its own arithmetic, with a scale for every head."""
#?

    rule: __RULE__

    def attach(self, model: nn.Module, tau: float, master_weights: bool, compile: bool, mode: str | None) -> None:
        """Find the heads in the model, and prepare the update."""
        held = {parameter for group in self.param_groups for parameter in group["params"]}
        quack = QuacK(self, model, tau)
#? several
        self.quack = None if held.isdisjoint(quack.params.values()) else quack
#? !several
        if any(weight.requires_grad and weight not in held for weight in quack.params.values()):
            raise ValueError("param_groups lacks query or key weights that need a gradient: add or freeze them")
        self.quack = quack
#?
        self.masters = Masters(self) if master_weights else None
        self.compiler = Compiler(compile, mode)
#? several
        self.share(None if self.quack is None else Heads(self.quack, self.masters))

    def share(self, heads: Heads | None) -> None:
        """Take the norms from where another optimizer of the same step leaves them, too."""
        self.heads = heads
#? !several
        self.heads = Heads(quack, self.masters)
#?
        asked = None, False  # gradients are clipped and looked at before
        self.update = Update(self, self.rule, self.quack, self.heads, self.masters, *asked, self.compiler)

    def step(self, closure: Callable[[], Any] | None = None, gate: Gate | None = None) -> Any:
        """As in torch.optim, and nothing in it waits for the device; `gate` is what is known of all gradients."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        self.update.run((), gate or Gate())
        return loss

    @torch.no_grad()
    def scales(self) -> Tensor:
        """Scale of every block of the table, in its order: [blocks]."""
#? several
        if self.quack is None or self.heads is None:
            return torch.ones(0)
#?
        return unit_scales(self.heads.squares(), self.heads.scaling(self.quack))

    def state_dict(self) -> dict[str, Any]:
        """The state of the optimizer in torch's form, and as "quack" what the rule remembers."""
#? several
        if self.quack is None:
            return super().state_dict()
#?
        return super().state_dict() | {"quack": {"tau": self.quack.tau, "first": self.quack.init_factors}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where state_dict() was taken; the hyperparameters, tau among them, are those of then."""
#? several
        if self.quack is None:
            return super().load_state_dict(state_dict)
#?
        saved = state_dict.get("quack")
        if saved is None or saved["first"].shape != self.quack.init_factors.shape:
            kind = type(self).__name__
            raise ValueError(f"not a state_dict() of {kind} for this model: it holds no factors to go on from")
        super().load_state_dict(state_dict)
        self.quack.tau = saved["tau"]
        self.quack.init_factors.copy_(saved["first"])
'''

OPTIMIZER = '''\
class QuacK__NAME__(QuacKStep, torch.optim.__NAME__):
    """__NAME__ in which every head's query and key rows have a learning rate of their own.

    Make it while the model has its initial weights: later norms are measured against theirs, also after a resume.

    Arguments:
        model: The model, or what torch.compile or DistributedDataParallel made of it.
        lr, options: As in torch.optim.__NAME__. A new `lr` never recompiles.
#? several
        param_groups: What __NAME__ takes as `params`; the parameters that are left are for the other optimizer.
        tau: Learning rate of query and key rows at the start, relative to `lr`.
#? !several
        tau: Learning rate of query and key rows at the start, relative to `lr`.
        param_groups: What __NAME__ takes as `params`; without it, all parameters of the model.
#?
        master_weights: Whether parameters in bfloat16 or float16 are updated as fp32 copies of them, which are kept in
            the state as "master_param".
        compile, mode: Whether to compile the update, and `mode` of torch.compile.
    """

    rule = __RULE__()

    def __init__(
        self,
        model: nn.Module,
        lr: __LR__ = 1e-3,
        *,
#? several
        param_groups: Any,
        tau: float = __TAU__,
#? !several
        tau: float = __TAU__,
        param_groups: Any = None,
#?
        master_weights: bool = False,
        compile: bool = True,
        mode: str | None = None,
        **options: Any,
    ) -> None:
#? several
        super().__init__(param_groups, lr, **options)
#? !several
        super().__init__(model.parameters() if param_groups is None else param_groups, lr, **options)
#?
        self.attach(model, tau, master_weights, compile, mode)
'''

LION = '''\
class QuacKLion(QuacKStep):
    """Lion in which every head's query and key rows have a learning rate of their own.

    Make it while the model has its initial weights: later norms are measured against theirs, also after a resume.

    Arguments:
        model: The model, or what torch.compile or DistributedDataParallel made of it.
        lr: Learning rate; a new one never recompiles.
        tau: Learning rate of query and key rows at the start, relative to `lr`.
        param_groups: Parameters or groups of them, as in torch.optim; without it, all parameters of the model.
        master_weights: Whether parameters in bfloat16 or float16 are updated as fp32 copies of them, which are kept in
            the state as "master_param".
        compile, mode: Whether to compile the update, and `mode` of torch.compile.
        betas: How much of the momentum goes into a step, and into the next momentum.
        weight_decay: Decoupled weight decay.
    """

    rule = LionRule()

    def __init__(
        self,
        model: nn.Module,
        lr: float | Tensor = 1e-4,
        *,
        tau: float = __TAU__,
        param_groups: Any = None,
        master_weights: bool = False,
        compile: bool = True,
        mode: str | None = None,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
        super().__init__(model.parameters() if param_groups is None else param_groups, defaults)
        self.attach(model, tau, master_weights, compile, mode)
'''

TRAIN = '''\
def compile_train_step(
    model: nn.Module,
#? several
    optimizers: Sequence[QuacKStep],
#? !several
    optimizer: QuacKStep,
#?
    loss_fn: Callable[..., Any] | None = None,
    *,
    clip_grad_norm: float | None = None,
    skip_nonfinite: bool = False,
    mode: str | None = None,
) -> Callable[..., Tensor]:
    """A training step as a function of the batch: compiled loss, backward, compiled update; returns the loss, detached.

    Arguments:
        model: The model.
#? several
        optimizers: Those above; together they hold every query and key weight that is trained.
#? !several
        optimizer: That above.
#?
        loss_fn: Called as loss_fn(model, *batch). Without it the loss is in model(*batch): a scalar, the one scalar of
            a tuple or the attribute `loss` of what comes back.
        clip_grad_norm: Largest total norm of the gradients.
        skip_nonfinite: Whether a step with a gradient that is infinite or not a number changes nothing.
        mode: `mode` of torch.compile.
    """
#? !several
    optimizers = (optimizer,)
#?
    if clip_grad_norm is not None and not clip_grad_norm > 0:
        raise ValueError(f"clip_grad_norm is {clip_grad_norm!r}; need a positive number, or None for no clipping")
    for one in optimizers:
        for why in (one.rule.refusal(group, skip_nonfinite) for group in one.param_groups):
            if why is not None:
                raise ValueError(why)
#? several
    held = {parameter for one in optimizers for group in one.param_groups for parameter in group["params"]}
    heads = {weight for one in optimizers if one.quack is not None for weight in one.quack.params.values()}
    if any(weight.requires_grad for weight in heads - held):
        raise ValueError("no optimizer holds some query or key weights that need a gradient: add or freeze them")
    norms: Heads | None = None
    for one in optimizers:
        if norms is None:
            norms = one.heads
        elif one.quack is not None:
            norms.join(one.quack, one.masters)
            one.share(norms)
#?

    def loss_of(*batch: Any, **named: Any) -> Tensor:
        output = model(*batch, **named) if loss_fn is None else loss_fn(model, *batch, **named)
        output = getattr(output, "loss", output)
        parts = output if isinstance(output, tuple) else (output,)
        return next(part for part in parts if isinstance(part, Tensor) and part.dim() == 0)

    def look(grads: list[Tensor]) -> Gate:
        return look_at(grads, clip_grad_norm, skip_nonfinite)

    compiler = Compiler(True, mode)
    compiled_loss = compiler(own_code(loss_of), sizes="any")
    device = next((parameter.device for parameter in model.parameters()), None)
    compiled_look = compiler(own_code(look), sizes="fixed", loops_on=device)

    def train_step(*batch: Any, **named: Any) -> Tensor:
        compiler.begins()
        loss: Tensor = compiled_loss(*batch, **named)
        torch.autograd.backward(loss)
        gate = Gate()
        if clip_grad_norm is not None or skip_nonfinite:
            gate = compiled_look(gradients(optimizers))
        for one in optimizers:
            one.step(gate=gate)
            one.zero_grad()
        return loss.detach()

    return train_step
'''

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
class Heads:
    """The table against a model: the rule of QuacK for all heads at once.

        factor(block) = min over the products with this block of 1 / (norms of the other blocks in it, multiplied)
        scale(block) = tau * factor(block) / factor(block) at the start of training

    A step leaves the squared norms of what it wrote in `squares`, so that the next one makes no pass over the weights.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, tau: float) -> None:
        products = dict.fromkeys(logit_products())
        number = {block: n for n, block in enumerate(dict.fromkeys(b for product in products for b in product))}
        self.tau, self.units = tau, tuple(number)
        self.terms = tuple(tuple(number[block] for block in product) for product in products)
        named = {name.replace("_orig_mod.", ""): p for name, p in model.named_parameters(remove_duplicate=False)}
#? norms
        stripped = {name for name, module in model.named_modules() if isinstance(module, PassThrough)}
        stripped = {name.replace("_orig_mod.", "").removeprefix("module.") for name in stripped}
        for name, _ in qk_norms():
            if name not in stripped:
                raise ValueError(f"the model still has the QK norm {name}: call strip_qk_norm(model) first")
#?
        self.params: dict[str, nn.Parameter] = {}
        for weight in dict.fromkeys(block.weight for block in self.units):
            self.params[weight.name] = find(named, weight.name, weight.shape)
#? bias
            if weight.bias is not None:
#? bias axis
                self.params[weight.bias] = find(named, weight.bias, (weight.shape[weight.axis],))
#? bias !axis
                self.params[weight.bias] = find(named, weight.bias, weight.shape[:1])
#?
        cuts, self.spans = cut(self, self.params)
        self.pieces = {self.params[name]: pieces for name, pieces in cuts.items()}
        device = self.spans.owners.device
        others, places = _term_tables(self)
        by_number, order = _by_length(places)
        self.others, self.order = others.to(device), order.to(device)
        self.places = tuple(alike.to(device) for alike in by_number)
        self.squares = torch.empty(len(self.spans.owners), dtype=norm_dtype(self.params), device=device)
        self.carried: Tensor | None = None  # squared norms that came with a checkpoint
        self.seen: list[tuple[int, int]] = []
        self.first = self.factors(self.first_norms())

    def first_norms(self) -> Tensor:
        """Norm of every block at the start of training."""
        rows = {
            part: square_rows(self.params[part[0]].movedim(part[1], 0), self.squares.dtype)
            for part in dict.fromkeys(part for block in self.units for part in block.parts())
        }
        sums = [torch.cat([rows[p][a:b] for p in block.parts() for a, b in block.ranges]).sum() for block in self.units]
        norms = torch.stack(sums).sqrt()
        for block, norm in zip(self.units, norms.tolist(), strict=True):
            if not 0 < norm < math.inf:
                where = ", ".join(f"{a}:{b}" for a, b in block.ranges)
                raise ValueError(
                    f"rows {where} of {block.weight.name} have norm {norm:g}, and QuacK divides by it: give them other "
                    "initial values"
                )
        return norms

    def factors(self, norms: Tensor) -> Tensor:
        """What the rule makes of the norms of the blocks: [blocks] -> [blocks]."""
        products = torch.cat([norms, norms.new_ones(1)])[self.others].prod(-1).flatten()
        return torch.cat([products[places].amax(-1) for places in self.places])[self.order].reciprocal()

    def block_scales(self, squares: Tensor) -> Tensor:
        """Scale of every block from the squared norms of the spans: [spans] -> [blocks]."""
        return self.tau * (self.factors(self.spans.norms(squares)) / self.first)

    def scales(self, squares: Tensor) -> Tensor:
        """Scale of every span: [spans] -> [spans]."""
        return self.spans.spread(self.block_scales(squares))

    def current(self) -> Tensor:
        """Squared norms of the spans as the weights are: those of the last step, unless somebody wrote since."""
        if self.seen != self.states():
            for param, piece in ((param, piece) for param, pieces in self.pieces.items() for piece in pieces):
                if (squares := self.squares_of(piece)) is not None:
                    squares.copy_(piece.squares(piece.of(param.detach()).to(squares.dtype)))
            if self.carried is not None:
                self.squares.copy_(_exact(self.squares, self.carried))
            self.written()
        return self.squares

    def squares_of(self, piece: Piece) -> Tensor | None:
        """Where the squared norms of a piece are kept, [spans of the piece]; None where it has no heads."""
        numbers = piece.numbers()
        return self.squares[numbers.start : numbers.stop] if numbers else None

    def views(self, param: nn.Parameter, slots: tuple[Tensor, ...]) -> list[View]:
        """The pieces of a parameter and its state; none of one without heads."""
        weight, found = param.detach(), []  # one base for all pieces: the compiler asks for it
        for piece in self.pieces.get(param, ()):
            squares = self.squares_of(piece)
            of_heads = None if squares is None else piece
            found.append(View(piece.of(weight), tuple(map(piece.of, slots)), of_heads, squares))
        return found

    def written(self) -> None:
        """Take note that the squared norms are those of the weights."""
        self.seen, self.carried = self.states(), None

    def go_on(self, tau: float, first: Tensor, squares: Tensor) -> None:
        """Take what was saved."""
        self.tau, self.seen, self.carried = tau, [], squares.to(self.squares, copy=True)
        self.first.copy_(first)

    def states(self) -> list[tuple[int, int]]:
        """Tells whether a weight was written since: torch counts the writes into each tensor."""
        return [(param._version, param.data_ptr()) for param in self.params.values()]


def find(named: dict[str, nn.Parameter], name: str, shape: tuple[int, ...]) -> nn.Parameter:
    """A parameter of the table in the model; DistributedDataParallel puts a prefix before its name."""
    parameter = named.get(name, named.get(f"module.{name}"))
    if parameter is None or parameter.shape != shape or hasattr(parameter, "placements"):
        found = None if parameter is None else f"a {type(parameter).__name__} of {list(parameter.shape)}"
        raise ValueError(f"the table has a parameter {name} of {list(shape)}, whole on every rank; found {found}")
    return parameter
'''

LOOPS = '''\
class View(NamedTuple):
    """A weight, or a piece of one, and its state, as the compiled loops take them."""

    weight: Tensor
    slots: tuple[Tensor, ...]
    piece: Piece | None  # which piece, if it has heads
    squares: Tensor | None  # where the squared norms of their spans go


class Job(NamedTuple):
    """What is to be done to a view."""

    view: View
    grad: Tensor
    row: int  # of coefficients
    flags: Flags


def make_loop(rule: __RULE__) -> Callable[..., None]:
    """The function, to be compiled, that updates some weights, and leaves the squared norms of what it wrote.

    Weight, gradient and state are read once and written once: the norms cost no pass of their own.
    """

    def loop(
        works: list[tuple[Tensor, Tensor, tuple[Tensor, ...], Tensor | None, Flags]],
        coefficients: Tensor,
        gate: Gate,
        piece: Piece | None,
        scales: Tensor | None,
    ) -> None:
        for i, (weight, grad, slots, squares, flags) in enumerate(works):
            scale = None if piece is None or scales is None else piece.along(scales[i], weight)
            written, new = _changed(rule, weight, grad, slots, flags, coefficients[i], gate, scale)
            if piece is not None and squares is not None:
                squares.copy_(piece.squares(written.to(squares.dtype)))
            weight.copy_(written)
            for slot, value in zip(slots, new, strict=True):
                slot.copy_(value)

    return own_code(loop)
'''

STEP = '''\
class QuacKStep(torch.optim.Optimizer):
#? several
    """The step of the optimizers below: their own arithmetic, with a scale for every head."""
#? !several
    """The step of the optimizer below: its own arithmetic, with a scale for every head."""
#?

    rule: __RULE__

    def attach(self, model: nn.Module, tau: float, compile: bool) -> None:
        """Find the heads in the model, and prepare what is compiled."""
        for group in self.param_groups:
            why = "differentiable=True cannot be compiled: leave it out" if group.get("differentiable") else None
            if why := why or self.rule.refusal(group, skipping=False):
                raise ValueError(why)
        heads = Heads(model, tau)
        held = {parameter for group in self.param_groups for parameter in group["params"]}
#? several
        self.heads = None if held.isdisjoint(heads.pieces) else heads
#? !several
        if any(weight.requires_grad and weight not in held for weight in heads.pieces):
            raise ValueError("param_groups lacks query or key weights that need a gradient: add or freeze them")
        self.heads = heads
#?
        self.wrap: Callable[[Callable[..., Any]], Callable[..., Any]]
        self.wrap = functools.partial(torch.compile, dynamic=False) if compile else own_code
        self.scales = self.wrap(own_code(Heads.scales))
        self.loops: dict[Any, Callable[..., None]] = {}
        self.views: dict[Tensor, tuple[tuple[int, ...], list[View]]] = {}
        self._indices: dict[Any, Tensor] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, gate: Gate | None = None) -> Any:
        """As in torch.optim, and nothing in it waits for the device; `gate` is what is known of all gradients."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        held = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
#? several
        heads = self.heads
        if heads is not None:  # those with heads last, so that what goes into one call stands together
            held.sort(key=lambda one: one[0] in heads.pieces)
#? !several
        held.sort(key=lambda one: one[0] in self.heads.pieces)  # last, so that what goes into one call stands together
#?
        if held:
            self.update([param for param, _ in held], [group for _, group in held], gate or Gate())
        return loss

    def update(self, params: list[nn.Parameter], groups: list[Group], gate: Gate) -> None:
        """Update some parameters by their gradients, heads in loops of their own."""
        flags = [self.rule.flags(group) for group in groups]
        states = [self.state[p] if self.rule.kept(f) else {} for p, f in zip(params, flags, strict=True)]
        grads = [_like(param) for param in params]
#? several
        scales = None if self.heads is None else self.scales(self.heads, self.heads.current())
#? !several
        scales = self.scales(self.heads, self.heads.current())
#?
        count = self.rule.count(params, groups, states, gate.finite)
#? several
        gate = self.rule.directions(grads, groups, states, gate)
#?
        numbers = numbers_of(self.rule, groups, count.device)
        count = count.to(numbers[0].device, non_blocking=True)
        coefficients = torch.stack(self.rule.coefficients(count, numbers), 1).to(params[0].device, non_blocking=True)
        jobs: dict[Any, list[Job]] = {}
        for row, (param, grad, own, state) in enumerate(zip(params, grads, flags, states, strict=True)):
            for view in self.cut(param, tuple(state[name] for name in self.rule.slots(own))):
                weight, piece = view.weight, view.piece
                start = grad.storage_offset() + weight.storage_offset() - param.storage_offset()
                part = grad.as_strided(weight.shape, weight.stride(), start)
                alike = piece and (piece.anywhere(), weight.shape, weight.stride(), weight.dtype, own)
                jobs.setdefault(alike, []).append(Job(view, part, row, own))
        both = coefficients, coefficients.float()  # rounded in the loops, they would cost a fortieth of their time
        for alike, some in jobs.items():
            self.run(alike, some, both, gate, scales)
#? several
        if self.heads is not None:
            self.heads.written()
#? !several
        self.heads.written()
#?

    def cut(self, param: nn.Parameter, slots: tuple[Tensor, ...]) -> list[View]:
        """The views of a parameter, made once: a view costs as much as a small kernel."""
        where = tuple(tensor.data_ptr() for tensor in (param, *slots))
        if param not in self.views or self.views[param][0] != where:
#? several
            views = [] if self.heads is None else self.heads.views(param, slots)
#? !several
            views = self.heads.views(param, slots)
#?
            self.views[param] = where, views or [View(param.detach(), slots, None, None)]
        return self.views[param][1]

    def run(
        self, alike: Any, jobs: list[Job], coefficients: tuple[Tensor, Tensor], gate: Gate, scales: Tensor | None
    ) -> None:
        """Do jobs of equal pieces, a few in each compiled call; or all that have no heads."""
        for some in _few(jobs, len(jobs) if alike is None else _most(len(jobs[0].view.slots), gate)):
            works = [(job.view.weight, job.grad, job.view.slots, job.view.squares, job.flags) for job in some]
            numbers = [job.view.piece.numbers() for job in some if job.view.piece is not None]
            piece, own = None, None
            if scales is not None and numbers:
                piece, own = alike[0], self._taken(scales, [part.start for part in numbers], len(numbers[0]))
            key = None if alike is None else (alike, len(some))
            if key not in self.loops:
                self.loops[key] = self.wrap(make_loop(self.rule))
            exact = any(job.view.weight.dtype == torch.float64 for job in some)
            rows = self._taken(coefficients[0 if exact else 1], [job.row for job in some])
            self.loops[key](works, rows, gate, piece, own)

__TAKEN__

    def state_dict(self) -> dict[str, Any]:
        """The state of the optimizer in torch's form, and as "quack" what the rule remembers."""
        heads = self.heads
#? several
        if heads is None:
            return super().state_dict()
#?
        quack = {"tau": heads.tau, "first": heads.first, "squares": heads.current().clone()}
        return super().state_dict() | {"quack": quack}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where state_dict() was taken; the hyperparameters, tau among them, are those of then."""
#? several
        if self.heads is None:
            return super().load_state_dict(state_dict)
#?
        quack = state_dict.get("quack")
        if quack is None or any(quack[name].shape != getattr(self.heads, name).shape for name in ("first", "squares")):
            kind = type(self).__name__
            raise ValueError(f"not a state_dict() of {kind} for this model: it holds no norms to go on from")
        super().load_state_dict(state_dict)
        self.heads.go_on(**quack)
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
        compile: Whether to compile the update.
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
        compile: bool = True,
        **options: Any,
    ) -> None:
#? several
        super().__init__(param_groups, lr, **options)
#? !several
        super().__init__(model.parameters() if param_groups is None else param_groups, lr, **options)
#?
        self.attach(model, tau, compile)
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
        compile: Whether to compile the update.
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
        compile: bool = True,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
        super().__init__(model.parameters() if param_groups is None else param_groups, defaults)
        self.attach(model, tau, compile)
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
    if any(w.requires_grad and w not in held for one in optimizers if one.heads is not None for w in one.heads.pieces):
        raise ValueError("no optimizer holds some query or key weights that need a gradient: add or freeze them")
#?

    def loss_of(*batch: Any, **named: Any) -> Tensor:
        output = model(*batch, **named) if loss_fn is None else loss_fn(model, *batch, **named)
        output = getattr(output, "loss", output)
        parts = output if isinstance(output, tuple) else (output,)
        return next(part for part in parts if isinstance(part, Tensor) and part.dim() == 0)

    def look_at(grads: list[Tensor]) -> Gate:
        clip = None if clip_grad_norm is None else _clip(grads, clip_grad_norm)
        return Gate(clip, all_finite(grads) if skip_nonfinite else None)

    compiled_loss = torch.compile(own_code(loss_of))
    look = torch.compile(own_code(look_at), dynamic=False)

    def train_step(*batch: Any, **named: Any) -> Tensor:
        loss: Tensor = compiled_loss(*batch, **named)
        torch.autograd.backward(loss)
        gate = Gate()
        if clip_grad_norm is not None or skip_nonfinite:
            gate = look(gradients(optimizers))
        for one in optimizers:
            one.step(gate=gate)
            one.zero_grad()
        return loss.detach()

    return train_step
'''

"""The conformance suite: what every mechanism must keep, checked in the same way for all.

A `Mechanism` describes one mechanism; `conformance_clauses` turns it into clauses to run. The
mechanisms of the core stand in `heed_core.testing.mechanisms`; a package makes a table of its own:

    @pytest.mark.parametrize("clause", [c for m in TABLE for c in conformance_clauses(m)], ids=str)
    def test_conformance(clause):
        clause.check()

A clause that a mechanism cannot keep is named in `Mechanism.excused` with its reason, and nowhere
else.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from heed_core.attachments import AttendCall
from heed_core.backends import reference as written_out
from heed_core.sites import attach_points, observe, sites, steer
from heed_core.testing.low_rank import adapt

Inputs = dict[str, Tensor]
"""Arguments of a module's forward, by name."""


@dataclass(frozen=True, kw_only=True)
class Unseen:
    """Two inputs that differ only in what some outputs may not depend on."""

    name: str
    change: Callable[[Inputs], Inputs]
    """Changes what is hidden."""
    select: Callable[[Tensor], Tensor] = lambda output: output
    """The part of the output that must not change by a bit."""


@dataclass(frozen=True, kw_only=True)
class Symmetry:
    """module(on_inputs(x)) == on_output(module(x))."""

    name: str
    on_inputs: Callable[[Inputs], Inputs]
    on_output: Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Which sizes a dynamic axis may have: multiples of a number, at least two."""

    multiple_of: int = 1
    most: int | None = None
    """The largest multiple, not size."""


@dataclass(frozen=True, kw_only=True)
class Mechanism:
    """One mechanism, as the suite needs it."""

    name: str
    build: Callable[[float], nn.Module]
    """Dropout -> a fresh module. The suite draws all parameters at random, so that gates that begin
    at zero hide nothing."""
    inputs: Callable[[int, int], Inputs]
    """(batch, size) -> random float32 inputs, with H != W where there is a grid. `size` is free to
    mean what it likes, as long as the number of tokens grows with it in the way that `tokens`
    says."""
    reference: Callable[[nn.Module, Inputs], Tensor]
    """The output from the module's parameters, written from the formula in loops, in the type of
    the inputs."""
    size: int = 5
    smallest: int = 1
    """The least size for which `inputs` makes what the mechanism takes."""
    tokens: Callable[[int], int] = lambda size: size
    exponent: float
    """Operations grow as tokens ** exponent, as the docstring of the mechanism states."""
    costly_sizes: tuple[int, int] = (4096, 16384)
    """Where growth is measured: large enough that the leading term leads (nothing is computed, only
    counted)."""
    unseen: tuple[Unseen, ...] = ()
    symmetries: tuple[Symmetry, ...] = ()
    wrong: tuple[tuple[Callable[[Inputs], Inputs], str], ...]
    """Spoils good inputs, and what the ValueError or TypeError must say (a part of its message)."""
    dynamic: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    """For export: input -> axis -> name of its dynamic size. Axis 0 is the batch."""
    limits: Mapping[str, Sizes] = field(default_factory=dict)
    """Of dynamic sizes, by name, where not any will do."""
    excused: Mapping[str, str] = field(default_factory=dict)
    """Clause -> why the mechanism cannot keep it."""

    def __post_init__(self) -> None:
        if unknown := set(self.excused) - set(CLAUSES):
            raise ValueError(f"{self.name} is excused from unknown clauses {sorted(unknown)}")


@dataclass(frozen=True)
class Clause:
    """One clause for one mechanism."""

    name: str
    mechanism: Mechanism

    def __str__(self) -> str:
        return f"{self.mechanism.name}-{self.name}"

    @property
    def excuse(self) -> str | None:
        """Why the mechanism is excused, if it is."""
        return self.mechanism.excused.get(self.name)

    @property
    def compiles(self) -> bool:
        """Whether the clause runs torch.compile."""
        return self.name in ("compile", "compile-any-size", "export")

    def check(self) -> None:
        """Raise AssertionError if the clause is broken."""
        torch.manual_seed(0)
        CLAUSES[self.name](self.mechanism)


def conformance_clauses(mechanism: Mechanism) -> list[Clause]:
    """All clauses for a mechanism, the excused included."""
    return [Clause(name, mechanism) for name in CLAUSES]


def unseen_future(argument: str, axis: int) -> Unseen:
    """Causality: the last token of `argument` changes, only the last output may."""

    def change(inputs: Inputs) -> Inputs:
        x = inputs[argument].clone()
        x.select(axis, -1).add_(1e4)
        return {**inputs, argument: x}

    return Unseen(
        name="future",
        change=change,
        select=lambda output: output.narrow(axis, 0, output.shape[axis] - 1),
    )


def unseen_masked(arguments: tuple[str, ...], mask: str, axis: int) -> Unseen:
    """Masking: tokens that no query may attend to change.

    The mask's last axis is that of the tokens; tokens are hidden where every query of a sample is
    forbidden. Outputs that are computed from a hidden token itself (self-attention) are left out.
    """

    def hidden(inputs: Inputs) -> Tensor:
        allowed = inputs[mask]
        while allowed.ndim > 2:  # (b, ..., m) -> (b, m)
            allowed = allowed.any(dim=1)
        return ~allowed

    def change(inputs: Inputs) -> Inputs:
        result = dict(inputs)
        for name in arguments:
            x = inputs[name].movedim(axis, 1).clone()
            x[hidden(inputs).expand(x.shape[:2])] = 1e4
            result[name] = x.movedim(1, axis)
        return result

    return Unseen(name=f"masked {'/'.join(arguments)}", change=change)


def permutation(arguments: tuple[str, ...], axis: int, out_axis: int | None) -> Symmetry:
    """Reordering tokens reorders the output along `out_axis` (None: changes nothing)."""

    def reorder(x: Tensor, at: int) -> Tensor:
        return x.index_select(at, torch.arange(x.shape[at] - 1, -1, -1).roll(2))

    return Symmetry(
        name=f"permutation of {'/'.join(arguments)}",
        on_inputs=lambda inputs: {
            name: reorder(x, axis) if name in arguments else x for name, x in inputs.items()
        },
        on_output=lambda output: output if out_axis is None else reorder(output, out_axis),
    )


def flip(arguments: tuple[str, ...], axis: int) -> Symmetry:
    """Mirroring an axis of the inputs mirrors it in the output."""
    return Symmetry(
        name=f"flip of axis {axis}",
        on_inputs=lambda inputs: {
            name: x.flip(axis) if name in arguments else x for name, x in inputs.items()
        },
        on_output=lambda output: output.flip(axis),
    )


def shift(arguments: tuple[str, ...], axis: int) -> Symmetry:
    """Rolling an axis of the inputs rolls it in the output."""
    return Symmetry(
        name=f"shift of axis {axis}",
        on_inputs=lambda inputs: {
            name: x.roll(1, axis) if name in arguments else x for name, x in inputs.items()
        },
        on_output=lambda output: output.roll(1, axis),
    )


def _module(mechanism: Mechanism, dtype: torch.dtype, dropout: float = 0.0) -> nn.Module:
    """A module in eval mode with random parameters, the same at each call."""
    module = mechanism.build(dropout)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return module.to(dtype).eval()


def _inputs(mechanism: Mechanism, dtype: torch.dtype, batch: int = 2, size: int = 0) -> Inputs:
    made = mechanism.inputs(batch, size or mechanism.size)
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in made.items()}


def _leaves(module: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """Everything that may get a gradient."""
    for x in inputs.values():
        if x.is_floating_point():
            x.requires_grad_()
    given = {name: x for name, x in inputs.items() if x.requires_grad}
    return {**given, **dict(module.named_parameters())}


def _gradients(output: Tensor, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    probe = torch.linspace(-1.0, 1.0, output.numel(), dtype=torch.float64).sin()
    loss = (output.double().flatten() * probe).sum()
    found = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    return dict(zip(leaves, found, strict=True))


def _check_precision(mechanism: Mechanism, dtype: torch.dtype, gradients: bool) -> None:
    exact_module, exact_inputs = _module(mechanism, dtype), _inputs(mechanism, dtype)
    module, inputs = copy.deepcopy(exact_module), {k: x.clone() for k, x in exact_inputs.items()}
    eager_module, eager_inputs = copy.deepcopy(module), {k: x.clone() for k, x in inputs.items()}
    exact_module.double()
    exact_inputs = {k: x.double() if x.is_floating_point() else x for k, x in exact_inputs.items()}
    leaves = _leaves(module, inputs)
    exact_leaves = _leaves(exact_module, exact_inputs)
    eager_leaves = _leaves(eager_module, eager_inputs)
    output = module(**inputs)
    exact = mechanism.reference(exact_module, exact_inputs)
    eager = mechanism.reference(eager_module, eager_inputs)
    assert output.dtype == dtype, f"the output of {dtype} inputs is {output.dtype}"
    triples = {"output": (output, exact, eager)}
    if gradients:
        found, wanted = _gradients(output, leaves), _gradients(exact, exact_leaves)
        plain = _gradients(eager, eager_leaves)
        triples |= {f"gradient of {k}": (found[k], wanted[k], plain[k]) for k in leaves}
    # One tensor of a few numbers may be exact by luck: eager's worst one counts for all. Kernels
    # sum in float32 in an order of their own: a rounding for each level of a pairwise sum.
    worst = max(_relative_error(plain, wanted) for _, wanted, plain in triples.values())
    levels = math.log2(max(x.numel() for x in (output, *leaves.values())))
    budget = 2 * (worst + torch.finfo(dtype).eps + levels * torch.finfo(torch.float32).eps)
    for what, (ours, wanted_one, _) in triples.items():
        error = _relative_error(ours, wanted_one)
        assert error <= budget, f"{what}: error {error:.1e}, budget {budget:.1e}"


def _relative_error(found: Tensor, exact: Tensor) -> float:
    """Largest error relative to the largest exact value; a NaN counts as infinite."""
    error = (found.detach().double() - exact.detach()).abs().max()
    return float((error / exact.detach().abs().max().clamp(min=1e-300)).nan_to_num(torch.inf))


def _equals_reference(mechanism: Mechanism) -> None:
    _check_precision(mechanism, torch.float32, gradients=True)
    module, inputs = _module(mechanism, torch.float64), _inputs(mechanism, torch.float64)
    leaves = _leaves(module, inputs)
    output, exact = module(**inputs), mechanism.reference(module, inputs)
    torch.testing.assert_close(output, exact, rtol=1e-10, atol=1e-10)
    found, wanted = _gradients(output, leaves), _gradients(exact, leaves)
    for name in leaves:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-9, atol=1e-9, msg=name)
        assert bool(wanted[name].ne(0).any()), f"{name} gets no gradient at all"


def _half_precision(mechanism: Mechanism) -> None:
    _check_precision(mechanism, torch.bfloat16, gradients=False)
    _check_precision(mechanism, torch.float16, gradients=False)


def _gradcheck(mechanism: Mechanism) -> None:
    module = _module(mechanism, torch.float64)
    inputs = _inputs(mechanism, torch.float64, batch=1)
    leaves = _leaves(module, inputs)
    torch.autograd.gradcheck(lambda *_: module(**inputs), tuple(leaves.values()), fast_mode=True)


def _unseen_changes_nothing(mechanism: Mechanism) -> None:
    module, inputs = _module(mechanism, torch.float32), _inputs(mechanism, torch.float32)
    before = module(**inputs)
    assert mechanism.unseen, "nothing hidden is described; describe it or excuse the mechanism"
    for unseen in mechanism.unseen:
        changed = unseen.change(inputs)
        assert any(not torch.equal(changed[name], x) for name, x in inputs.items()), (
            f"{unseen.name} changes no input"
        )
        after = module(**changed)
        assert torch.equal(unseen.select(after), unseen.select(before)), unseen.name


def _sample_alone(mechanism: Mechanism) -> None:
    module, inputs = _module(mechanism, torch.float64), _inputs(mechanism, torch.float64, batch=3)
    together = module(**inputs)
    for b in range(3):
        alone = module(
            **{name: x[b : b + 1] if x.shape[0] == 3 else x for name, x in inputs.items()}
        )
        torch.testing.assert_close(alone, together[b : b + 1], rtol=1e-12, atol=1e-12)


def _eval_deterministic(mechanism: Mechanism) -> None:
    module, inputs = _module(mechanism, torch.float32, 0.5), _inputs(mechanism, torch.float32)
    plain = _module(mechanism, torch.float32, 0.0)
    once = module(**inputs)
    assert torch.equal(once, module(**inputs)), "two eval passes differ"
    assert torch.equal(once, plain(**inputs)), "dropout acts in eval mode"
    module.train()
    assert not torch.equal(module(**inputs), once), "dropout does not act in training mode"


def _symmetry(mechanism: Mechanism) -> None:
    module, inputs = _module(mechanism, torch.float64), _inputs(mechanism, torch.float64)
    plain = module(**inputs)
    assert mechanism.symmetries, "no symmetry is described; describe one or excuse the mechanism"
    for symmetry in mechanism.symmetries:
        moved = module(**symmetry.on_inputs(inputs))
        torch.testing.assert_close(
            moved, symmetry.on_output(plain), rtol=1e-10, atol=1e-10, msg=symmetry.name
        )


def _strides(mechanism: Mechanism) -> None:
    module, inputs = _module(mechanism, torch.float64), _inputs(mechanism, torch.float64)
    strided = {k: x.mT.contiguous().mT if x.dim() > 1 else x for k, x in inputs.items()}
    assert not all(x.is_contiguous() for x in strided.values())
    torch.testing.assert_close(module(**strided), module(**inputs), rtol=1e-12, atol=1e-12)


def _compile(mechanism: Mechanism) -> None:
    """For one size, which is several times faster than for any.

    Errors say the same, where what cannot be compiled may run as it is. With `fullgraph=True` the
    compiler raises one of its own, `torch._dynamo.exc.Unsupported`, which quotes ours.
    """
    module, inputs = _module(mechanism, torch.float32), _inputs(mechanism, torch.float32)
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, dynamic=False, backend="aot_eager")
    own = {name: x.clone() for name, x in inputs.items()}
    leaves = _leaves(module, own)
    found, wanted = compiled(**own), module(**own)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    gradients = (_gradients(output, leaves) for output in (found, wanted))
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        _check_compiled_errors(mechanism, module, inputs, compiled)


def _check_compiled_errors(
    mechanism: Mechanism, module: nn.Module, inputs: Inputs, whole: Callable[..., object]
) -> None:
    faults = [spoil(dict(inputs)) for spoil, _ in mechanism.wrong]
    first = next(name for name, x in inputs.items() if x.is_floating_point())
    faults.append({**inputs, first: inputs[first].long()})
    quoting = _complaint(whole, faults[0], (RuntimeError,))
    assert _complaint(module, faults[0]) in quoting, f"the compiler does not quote us: {quoting}"
    for wrong in faults:
        broken = torch.compile(module, backend="aot_eager")
        assert _complaint(broken, wrong) == _complaint(module, wrong)


def _compile_any_size(mechanism: Mechanism) -> None:
    module = _module(mechanism, torch.float32)
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in (mechanism.size, mechanism.size + 2):
        inputs = _inputs(mechanism, torch.float32, size=size)
        torch.testing.assert_close(compiled(**inputs), module(**inputs), rtol=1e-4, atol=1e-5)


def _export(mechanism: Mechanism) -> None:
    # What is one in the example is taken for a number that is always one.
    size = max(mechanism.size, 2) if mechanism.dynamic else mechanism.size
    module, inputs = _module(mechanism, torch.float32), _inputs(mechanism, torch.float32, size=size)
    shapes = {
        name: {
            axis: _dimension(free, mechanism.limits.get(free))
            for axis, free in mechanism.dynamic.get(name, {}).items()
        }
        for name in inputs
    }
    with torch.no_grad():  # with gradients torch.cond is not exported
        program = torch.export.export(module, (), kwargs=inputs, dynamic_shapes=shapes)
    for other in (size, size + 2) if mechanism.dynamic else (size,):
        fresh = _inputs(mechanism, torch.float32, size=other)
        torch.testing.assert_close(program.module()(**fresh), module(**fresh), rtol=1e-4, atol=1e-5)


def _dimension(name: str, limits: Sizes | None) -> torch.export.Dim:
    if limits is None:
        return torch.export.Dim(name)
    return limits.multiple_of * torch.export.Dim(f"{name}_count", min=2, max=limits.most)


def _exported_size(mechanism: Mechanism) -> None:
    assert mechanism.dynamic, "export keeps one size: state a `dynamic` one or excuse the mechanism"
    unknown = set(mechanism.limits) - {
        size for axes in mechanism.dynamic.values() for size in axes.values()
    }
    assert not unknown, f"limits of sizes that are not dynamic: {sorted(unknown)}"


def _observe(mechanism: Mechanism) -> None:
    module, inputs = _module(mechanism, torch.float64), _inputs(mechanism, torch.float64)
    plain = module(**inputs)
    outputs: dict[str, tuple[Tensor, Tensor]] = {}

    def note(output: Tensor, call: AttendCall) -> Tensor:
        outputs[call.site] = (output, call.value)
        return output

    softmax = {name for name, point in attach_points(module).items() if point.steerable}
    assert softmax, "the mechanism has no softmax site"
    with observe(module) as record, steer(module, note, at="output"):
        watched = module(**inputs)
    torch.testing.assert_close(watched, plain, rtol=1e-10, atol=1e-10, msg="observing changes it")
    assert set(record) >= softmax, f"sites that were not called: {softmax - set(record)}"
    for name in sorted(softmax):
        weights, (output, value) = record[name], outputs[name]
        total = weights.sum(dim=-1)
        assert bool(torch.isclose(total, total.round()).all()), f"{name}: rows must sum to 1 or 0"
        assert bool(total.sum(dim=(0, 1)).ne(0).any()), f"{name}: all rows are empty"
        torch.testing.assert_close(
            written_out.mix(weights, value), output, rtol=1e-10, atol=1e-10, msg=name
        )
    with steer(module, lambda weights, call: weights * 0.0):
        assert not torch.equal(module(**inputs), plain), "removing all weights changes nothing"
    for site in sites(module).values():
        assert site.attachments is None, "something stays attached"


def _cost(mechanism: Mechanism) -> None:
    module = mechanism.build(0.0).eval().to("meta")
    counts = []
    for size in mechanism.costly_sizes:
        with torch.device("meta"):
            inputs = mechanism.inputs(1, size)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            module(**inputs)
        counts.append(counter.get_total_flops())
    small, large = mechanism.costly_sizes
    growth = math.log(counts[1] / counts[0]) / math.log(
        mechanism.tokens(large) / mechanism.tokens(small)
    )
    assert abs(growth - mechanism.exponent) < 0.1, (
        f"operations grow as N ** {growth:.2f}, stated is N ** {mechanism.exponent}"
    )


def _wrong_shape(mechanism: Mechanism) -> None:
    module, inputs = _module(mechanism, torch.float32), _inputs(mechanism, torch.float32)
    assert mechanism.wrong, "no wrong input is given"
    for spoil, message in mechanism.wrong:
        said = _complaint(module, spoil(dict(inputs)))
        assert message in said, f"no error that says {message!r}, but: {said or 'none'}"


def _complaint(
    module: Callable[..., object],
    inputs: Inputs,
    kinds: tuple[type[Exception], ...] = (ValueError, TypeError),
) -> str:
    try:
        module(**inputs)
    except kinds as error:
        return str(error)
    return ""


def _wrong_type(mechanism: Mechanism) -> None:
    module, inputs = _module(mechanism, torch.float32), _inputs(mechanism, torch.float32)
    for name, x in inputs.items():
        other = torch.int64 if x.is_floating_point() else torch.float32
        said = _complaint(module, {**inputs, name: torch.ones_like(x, dtype=other)})
        assert name in said, f"no error that names {name!r} in {other}, but: {said or 'none'}"
        assert str(other) in said, f"the error does not say {other}: {said}"
        if x.is_floating_point():  # served, or refused by name
            said = _complaint(module, {**inputs, name: x.double()})
            assert not said or name in said, f"no error that names {name!r} in float64: {said}"


def _small(mechanism: Mechanism) -> None:
    """No sample at all; and samples of one token, which a mask may hide."""
    module = _module(mechanism, torch.float32)
    for batch, size in ((0, mechanism.size), (2, mechanism.smallest)):
        inputs = _inputs(mechanism, torch.float32, batch=batch, size=size)
        leaves = _leaves(module, inputs)
        output = module(**inputs)
        assert output.shape[0] == batch
        found = {"output": output, **_gradients(output, leaves)}
        for name, x in found.items():
            assert not bool(x.isnan().any()), f"{name} has NaN for batch {batch}, size {size}"


def _adapters(mechanism: Mechanism) -> None:
    """What stands in the place of a linear layer counts, and is trained."""
    module, inputs = _module(mechanism, torch.float64), _inputs(mechanism, torch.float64)
    for name, layer in list(module.named_modules()):
        if not isinstance(layer, nn.Linear):
            continue
        adapted = copy.deepcopy(module)
        merged = adapt(adapted, name)
        found = adapted(**inputs)
        torch.testing.assert_close(found, merged(**inputs), rtol=1e-9, atol=1e-9)
        found.square().sum().backward()
        trained = adapted.get_parameter(f"{name}.up").grad is not None
        assert trained or not isinstance(layer.weight, nn.Parameter), f"{name} is not trained"


CLAUSES: dict[str, Callable[[Mechanism], None]] = {
    "reference": _equals_reference,
    "half-precision": _half_precision,
    "gradcheck": _gradcheck,
    "unseen": _unseen_changes_nothing,
    "sample-alone": _sample_alone,
    "eval-deterministic": _eval_deterministic,
    "symmetry": _symmetry,
    "strides": _strides,
    "compile": _compile,
    "compile-any-size": _compile_any_size,
    "export": _export,
    "exported-size": _exported_size,
    "observe": _observe,
    "cost": _cost,
    "small": _small,
    "adapters": _adapters,
    "wrong-shape": _wrong_shape,
    "wrong-type": _wrong_type,
}

"""Checking a layer: every answer that it gives is measured, and a wrong one is shown."""

from __future__ import annotations

import copy
import dataclasses
import math

import torch
from torch import Tensor, nn

from lipbook.composition.bounds import lipschitz_bound
from lipbook.composition.lower import lipschitz_lower_bound
from lipbook.errors import (
    _analysis,
    _range_analysis,
    forward_error_rule,
    range_error_rule,
)
from lipbook.freezing import freeze
from lipbook.norms.arguments import _integer
from lipbook.rules import (
    Ball,
    Domain,
    Range,
    Shape,
    _plain_copy,
    _shape,
    affine_rule,
    local_lipschitz_rule,
    pullback_rule,
    range_rule,
    slope_rule,
)
from lipbook.units import units_rule

__all__ = ["LayerReport", "check_layer"]

_NORMS = (1.0, 2.0, math.inf)


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """What was measured of a layer: a row a question, with its answer and what samples showed.

    Attributes
    ----------
    rows : tuple of tuple of str
        Question, answer, measured.
    """

    rows: tuple[tuple[str, str, str], ...]

    def __str__(self) -> str:
        rows = (("question", "answer", "measured"), *self.rows)
        widths = [max(len(row[column]) for row in rows) for column in range(2)]
        return "\n".join(f"{a:{widths[0]}}  {b:{widths[1]}}  {c}".rstrip() for a, b, c in rows)


def check_layer(
    layer: nn.Module,
    input_shape: Shape,
    domain: Domain | None = None,
    *,
    samples: int = 16,
    seed: int = 0,
) -> LayerReport:
    r"""Measure every answer that a layer gives, one of the library's or of one's own.

    =====================  =====================================================================
    question               measured against
    =====================  =====================================================================
    Lipschitz bound        two points, found by ascent and among samples, for p = 1, 2, ∞
    range                  values of samples, on boxes and balls around points of all scales
    slopes                 difference quotients, entry by entry
    units                  the layer itself, and differences of values, group by group
    matrix                 the layer itself, at samples; bounds of :math:`|A|` by its columns
    rows of the Jacobian   the Jacobian by automatic differentiation
    error of the program   the same layer in float64, at samples and on sets
    frozen copy            the layer, bit by bit
    gradient               central differences
    =====================  =====================================================================

    A rule is not proved by this, but a wrong one is refuted by two points that the error shows.
    **Guaranteed**: what is raised is a contradiction up to rounding (a relative 1e-6).

    Parameters
    ----------
    layer : torch.nn.Module
        In evaluation mode, with one input.
    input_shape : sequence of int
        Shape of one sample.
    domain : Box or Ball, optional
        For a layer that is not Lipschitz on all of space.
    samples : int
        Points for each test.
    seed : int
        Of the points.

    Returns
    -------
    LayerReport

    Raises
    ------
    ValueError
        If an answer is contradicted; the message says by which points and numbers.

    Examples
    --------
    >>> class Double(nn.Module):
    ...     def forward(self, x):
    ...         return 2 * x
    >>> from lipbook.composition import Bound, lipschitz_rule
    >>> @lipschitz_rule.register
    ... def _(module: Double, input_shape, p):
    ...     return Bound(1, "exact", p)
    >>> try:
    ...     check_layer(Double(), (2,))
    ... except ValueError as error:
    ...     print(str(error).split(": at")[0])
    lipschitz_rule of Double says 1 for p=1, but two points show 2
    """
    if not isinstance(layer, nn.Module):
        raise TypeError(f"layer must be a torch.nn.Module, got {type(layer).__name__}")
    shape = _shape(input_shape)
    _integer("samples", samples, 1)
    check = _Check(layer, shape, domain, samples, seed)
    with torch.inference_mode(False):
        check.stretch()
        check.slopes()
        check.units()
        check.matrix()
        check.ranges()
        check.rows_of_the_jacobian()
        check.program()
        check.program_on_sets()
        check.frozen()
        check.gradient()
    return LayerReport(tuple(check.rows))


class _Check:
    """One check of one layer."""

    def __init__(
        self, layer: nn.Module, shape: Shape, domain: Domain | None, samples: int, seed: int
    ) -> None:
        self.layer, self.shape, self.domain, self.samples = layer, shape, domain, samples
        self.generator = torch.Generator().manual_seed(seed)
        self.double = _plain_copy(layer).double().requires_grad_(False)
        for module in self.double.modules():
            if getattr(module, "inplace", False):
                module.inplace = False  # type: ignore[assignment]
        self.name = type(layer).__name__.removeprefix("Parametrized")
        self.rows: list[tuple[str, str, str]] = []

    def noise(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def points(self, scale: float = 1.0) -> Tensor:
        """Points of the domain, or of all of space."""
        if self.domain is None:
            return scale * self.noise(self.samples, *self.shape)
        return self.inside(self.domain.range(self.shape), self.domain)

    def inside(self, values: Range, domain: Domain | None = None) -> Tensor:
        """Points of a range, some of them at its corners, and of the ball if it is one."""
        weight = torch.rand(self.samples, *self.shape, generator=self.generator).double()
        corners = torch.rand(self.samples, generator=self.generator) < 0.25
        view = corners.view(-1, *[1] * len(self.shape))
        weight = torch.where(view, (weight > 0.5).double(), weight)
        points = values.low + weight * (values.high - values.low)
        if isinstance(domain, Ball):
            step = (points - domain.center).flatten(1)
            norm = torch.linalg.vector_norm(step, domain.p, dim=1, keepdim=True)
            shrink = (domain.radius / norm.clamp(min=1e-300)).clamp(max=1.0)
            points = domain.center + (step * shrink).view_as(points)
        return points

    def neighbourhoods(self) -> list[tuple[Range, Domain | None]]:
        """Choose sets on which the answers about values are tried."""
        if self.domain is not None:
            return [(self.domain.range(self.shape), self.domain)]
        sets: list[tuple[Range, Domain | None]] = []
        for scale in (1e-2, 1.0, 1e2):
            center = scale * self.noise(*self.shape)
            ball = Ball(center, 0.3 * scale * math.sqrt(math.prod(self.shape)))
            sets.append((ball.range(self.shape), ball))
        return sets

    def wrong(self, rule: str, says: str, shows: str, *points: Tensor) -> ValueError:
        where = " and ".join(str(point.flatten().tolist()[:8]) for point in points)
        return ValueError(f"{rule} of {self.name} says {says}, but {shows}: at {where}")

    # ------------------------------------------------------------------------ questions

    def stretch(self) -> None:
        for p in _NORMS:
            if self.domain is None:
                bound = lipschitz_bound(self.layer, self.shape, p)
                says = bound.value
                starts = torch.cat([self.points(scale)[:4] for scale in (1e-2, 1.0, 1e2)])
                below = lipschitz_lower_bound(self.double, starts, p, steps=20)
                assert below.witness is not None
                found, pair = below.value, below.witness
            else:
                values = self.domain.range(self.shape)
                says = local_lipschitz_rule(self.double, values, p).max().item()
                x, y = self.points(), self.points()
                y = torch.cat([y, x + 1e-4 * (y - x)])
                x = torch.cat([x, x])
                rise = torch.linalg.vector_norm(
                    (self.double(x) - self.double(y)).flatten(1), p, dim=1
                )
                run = torch.linalg.vector_norm((x - y).flatten(1), p, dim=1)
                quotients = torch.where(run > 0, rise / run.clamp(min=1e-300), 0.0)
                best = int(quotients.argmax())
                found, pair = quotients[best].item(), (x[best], y[best])
            if found > says * (1 + 1e-6) + 1e-12:
                shows = f"two points show {found:.6g}"
                raise self.wrong("lipschitz_rule", f"{says:.6g} for p={p:g}", shows, *pair)
            norm = "∞" if p == math.inf else f"{p:g}"
            self.rows.append((f"Lipschitz, p = {norm}", f"{says:.6g}", f"≥ {found:.6g}"))

    def ranges(self) -> None:
        tightest = math.inf
        for values, domain in self.neighbourhoods():
            image = range_rule(self.double, values)
            points = self.inside(values, domain)
            outputs = self.double(points.clone())
            slack = 1e-9 * (1 + outputs.abs())
            outside = (outputs < image.low - slack) | (outputs > image.high + slack)
            if bool(outside.any()):
                row = int(outside.flatten(1).any(1).nonzero()[0])
                entry = int(outside[row].flatten().nonzero()[0])
                ends = [
                    end.expand_as(outputs)[row].flatten()[entry].item()
                    for end in (image.low, image.high)
                ]
                value = outputs[row].flatten()[entry].item()
                raise self.wrong(
                    "range_rule",
                    f"[{ends[0]:.6g}, {ends[1]:.6g}] for output {entry}",
                    f"it is {value:.6g}",
                    points[row],
                )
            if image.center is not None and image.radius is not None:
                off = (outputs - image.center).flatten(1).norm(dim=1)
                if bool((off > image.radius * (1 + 1e-9) + 1e-12).any()):
                    row = int((off - image.radius).argmax())
                    raise self.wrong(
                        "range_rule",
                        f"a ball of radius {image.radius.max().item():.6g}",
                        f"an output is {off[row].item():.6g} from its center",
                        points[row],
                    )
            width = (image.high - image.low).expand_as(outputs).amax()
            spread = (outputs.amax(0) - outputs.amin(0)).max()
            tightest = min(tightest, (width / spread.clamp(min=1e-300)).item())
        self.rows.append(("range", "holds", f"{tightest:.3g} × the spread of samples"))

    def slopes(self) -> None:
        for values, domain in self.neighbourhoods():
            answer = slope_rule(self.double, values)
            if answer is None:
                return
            low, high = (torch.as_tensor(side).double().expand_as(values.low) for side in answer)
            x, y = self.inside(values, domain), self.inside(values, domain)
            step = x - y
            quotient = (self.double(x.clone()) - self.double(y.clone())) / step
            slack = 1e-7 * (1 + low.abs() + high.abs())
            wrong = ((quotient < low - slack) | (quotient > high + slack)) & (step.abs() > 1e-6)
            if bool(wrong.any()):
                row = int(wrong.flatten(1).any(1).nonzero()[0])
                raise self.wrong(
                    "slope_rule",
                    f"[{low.min().item():.6g}, {high.max().item():.6g}]",
                    f"a quotient is {quotient[row][wrong[row]][0].item():.6g}",
                    x[row],
                    y[row],
                )
        self.rows.append(("slopes", "hold", "difference quotients"))

    def units(self) -> None:
        units = None if self.domain is not None else units_rule(self.double, self.shape)
        if units is None:
            return
        x = torch.cat([self.points(scale) for scale in (1e-2, 1.0, 1e2)])
        flat, y = x.flatten(1), self.double(x.clone()).flatten(1)
        close = 1e-9 * (1 + flat.abs().amax(1, keepdim=True) + y.abs().amax(1, keepdim=True))
        if units.piecewise_linear:
            off = ((units(flat) - y).abs() / close).amax(1)
            if bool((off > 1).any()):
                row = int(off.argmax())
                says, shows = units(flat)[row].tolist()[:8], y[row].tolist()[:8]
                raise self.wrong("units_rule", f"{says}", f"the values are {shows}", x[row])
        behind = torch.eye(y.shape[1]).double() if units.behind is None else units.behind
        if not torch.allclose(behind.mT @ behind, torch.eye(behind.shape[1]).double()):
            self.rows.append(("units", "hold", "values"))  # the outputs do not tell those of units
            return
        z = flat if units.before is None else flat @ units.before.mT
        (step, rise), groups = ((part[1:] - part[:-1] for part in (z, y @ behind)), units.groups)

        def norms(values: Tensor) -> Tensor:
            zero = values.new_zeros(len(values), int(groups.max()) + 1)
            return zero.index_add(1, groups, values**2).sqrt()

        excess = norms(rise - units.center * step) - norms(units.radius * step)
        wrong = (excess > 1e-7 * (1 + norms(step) + norms(rise))).any(1)
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            raise self.wrong(
                "units_rule",
                f"slopes in [{units.low.min().item():.6g}, {units.high.max().item():.6g}]",
                "two points show others",
                *x[row : row + 2],
            )
        self.rows.append(("units", "hold", "values and differences"))

    def matrix(self) -> None:
        affine = affine_rule(self.double, self.shape)
        if affine is None:
            return
        x = self.points()
        outputs = self.double(x.clone())
        again = affine.apply(x) + affine.bias
        if not torch.allclose(outputs, again, rtol=1e-9, atol=1e-9 * (1 + x.abs().max().item())):
            row = int((outputs - again).flatten(1).abs().amax(1).argmax())
            raise self.wrong("affine_rule", "A x + b", "the layer is another map", x[row])
        sizes = affine.absolute(x.abs())
        if bool((affine.apply(x).abs() > sizes * (1 + 1e-9) + 1e-12).any()):
            row = int((affine.apply(x).abs() - sizes).flatten(1).amax(1).argmax())
            raise self.wrong("affine_rule", "|A| |x|", "|A x| is larger", x[row])
        n = math.prod(self.shape)
        if affine.squares is not None and n <= 1024:
            matrix = affine.matrix(self.shape)
            said = affine.squares(torch.ones(1, *self.shape, dtype=torch.float64)).flatten()
            if bool((matrix.square().sum(1) > said * (1 + 1e-9) + 1e-12).any()):
                raise self.wrong("affine_rule", "the squares of A", "a row has more", x[0])
        self.rows.append(("matrix", f"{outputs[0].numel()} × {n}", "the layer, at samples"))

    def rows_of_the_jacobian(self) -> None:
        n = self.double(self.points()[:1]).numel()
        if n > 64:
            return
        for values, domain in self.neighbourhoods():
            shape = tuple(self.double(values.middle[:1].clone()).shape[1:])
            eye = torch.eye(n, dtype=torch.float64).view(1, n, *shape)
            interval = pullback_rule(self.double, (eye, torch.zeros_like(eye)), values)
            if interval is None:
                return
            center, radius = interval
            for x in self.inside(values, domain)[:6]:
                jacobian = torch.autograd.functional.jacobian(
                    lambda v: self.double(v[None].clone())[0], x
                ).view(n, *self.shape)
                off = (jacobian - center).abs() - radius
                if bool((off > 1e-7 * (1 + jacobian.abs())).any()):
                    raise self.wrong(
                        "pullback_rule",
                        "an interval of Jacobians",
                        f"one is {off.max().item():.6g} outside",
                        x,
                    )
        self.rows.append(("rows of the Jacobian", "hold", "automatic differentiation"))

    def program(self) -> None:
        if forward_error_rule.dispatch(type(self.layer)) is forward_error_rule.dispatch(object):
            return
        single = _plain_copy(self.layer).float().requires_grad_(False)
        exact = copy.deepcopy(single).double()
        x = self.points().float()
        try:
            with torch.no_grad():
                analysis = _analysis(single, x[:2], 2.0, "")
        except ValueError as error:
            self.rows.append(("error of the program", "refused", str(error)))
            return
        with torch.no_grad():
            result = analysis(x.clone())
            off = (result.outputs.double() - exact(x.double())).flatten(1).norm(dim=1)
        if bool((off > result.error * (1 + 1e-6) + 1e-12 * off).any()):
            row = int((off - result.error).argmax())
            raise self.wrong(
                "forward_error_rule",
                f"an error of {result.error[row].item():.6g}",
                f"float32 is off by {off[row].item():.6g}",
                x[row],
            )
        worst = (off / result.error.clamp(min=1e-300)).max().item()
        self.rows.append(("error of the program", "holds", f"{worst:.3g} of the bound"))

    def program_on_sets(self) -> None:
        rules = (forward_error_rule, range_error_rule)
        if all(rule.dispatch(type(self.layer)) is rule.dispatch(object) for rule in rules):
            return
        single = _plain_copy(self.layer).float().requires_grad_(False)
        exact = copy.deepcopy(single).double()
        worst = 0.0
        for values, domain in self.neighbourhoods():
            x = self.inside(values, domain).float()
            x = torch.minimum(torch.maximum(x, values.low.float()), values.high.float())
            middle = values.middle.float()
            reach = (values.high - values.low) / 2 * (1 + 2.0**-20) + middle.abs() * 2.0**-20
            held = Range(middle - reach, middle + reach)  # which holds rounded points, too
            try:
                with torch.no_grad():
                    bound = _range_analysis(single, x[:2], 2.0)(held)
            except ValueError as error:
                self.rows.append(("error on a set", "refused", str(error)))
                return
            with torch.no_grad():
                off = (single(x.clone()).double() - exact(x.double())).flatten(1).norm(dim=1)
            if bool((off > bound * (1 + 1e-6) + 1e-12 * off).any()):
                row = int((off - bound).argmax())
                raise self.wrong(
                    "range_error_rule",
                    f"an error of {bound.max().item():.6g}",
                    f"float32 is off by {off[row].item():.6g}",
                    x[row],
                )
            worst = max(worst, (off / bound.clamp(min=1e-300)).max().item())
        self.rows.append(("error on a set", "holds", f"{worst:.3g} of the bound"))

    def frozen(self) -> None:
        frozen = freeze(self.layer)
        dtype = next((t.dtype for t in self.layer.parameters()), torch.float32)
        x = self.points().to(dtype)
        layer = copy.deepcopy(self.layer).eval().requires_grad_(False)
        with torch.no_grad():
            if not torch.equal(frozen(x.clone()), layer(x.clone())):
                raise self.wrong("freeze_rule", "the same bits", "the copy differs", x[0])
        kind = type(frozen).__name__
        self.rows.append(("frozen copy", kind, "the same bits"))

    def gradient(self) -> None:
        x = self.points()[:4].requires_grad_()
        outputs = self.double(x.clone())
        rows = self.noise(*outputs.shape)
        (gradient,) = torch.autograd.grad((outputs * rows).sum(), x, allow_unused=True)
        if gradient is None:
            return
        direction = torch.nn.functional.normalize(self.noise(*x.shape).flatten(1)).view_as(x)
        step = 1e-6 * (1 + x.detach().flatten(1).norm(dim=1).view(-1, *[1] * len(self.shape)))
        with torch.no_grad():
            ahead = (self.double(x + step * direction) * rows).flatten(1).sum(1)
            behind = (self.double(x - step * direction) * rows).flatten(1).sum(1)
        difference = (ahead - behind) / (2 * step.flatten())
        slope = (gradient * direction).flatten(1).sum(1)
        off = (difference - slope).abs()
        allowed = 1e-4 * (1 + rows.flatten(1).norm(dim=1) * gradient.flatten(1).norm(dim=1))
        if int((off > allowed).sum()) > 1:  # one point may sit at a kink
            row = int((off - allowed).argmax())
            raise self.wrong(
                "the gradient",
                f"{slope[row].item():.6g}",
                f"differences say {difference[row].item():.6g}",
                x[row].detach(),
            )
        self.rows.append(("gradient", "holds", "central differences"))

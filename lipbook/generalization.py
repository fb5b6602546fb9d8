r"""Generalisation: margins, normalised by the spectral complexity of a network.

A network that has a large margin on its training data, in proportion to what its weights can do,
errs little on new data. What its weights can do is measured by the product of their spectral norms,
the Lipschitz bound of :mod:`lipbook.composition`, times a factor that counts how far they are from
reference matrices. The module computes that complexity, margins in units of it, and the bound of
the test error that follows, with all constants. The bound holds; at the size of real problems
it is far above 1, and says nothing there.

All networks here are compositions

.. math:: f(x) = A_L\, \psi_{L-1}(A_{L-1} \cdots \psi_1(A_1 \psi_0(x)))

of matrices :math:`A_i` with maps :math:`\psi_i` without parameters that are
:math:`\rho_i`-Lipschitz in the 2-norm and have :math:`\psi_i(0) = 0`.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from lipbook.composition import Bound, lipschitz_bound
from lipbook.norms.arguments import _got, _integer, _real
from lipbook.rules import _shape

__all__ = [
    "MarginBound",
    "SpectralComplexity",
    "data_norm",
    "margin_loss",
    "margins",
    "normalized_margins",
    "pac_bayes_term",
    "spectral_complexity",
    "spectrally_normalized_margin_bound",
]

Shape = tuple[int, ...]


# -------------------------------------------------------------------------------- margins


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    r"""Margins of a classifier.

    .. math:: m_i = z_{i, y_i} - \max_{j \ne y_i} z_{i, j}

    Positive where the label has the largest logit. As a function of the logits a margin is
    :math:`\sqrt2`-Lipschitz in the 2-norm.

    Parameters
    ----------
    logits : torch.Tensor
        (n, classes), with two classes or more.
    labels : torch.Tensor
        (n,) integers.

    Returns
    -------
    torch.Tensor
        (n,), float64, without a graph.

    Raises
    ------
    TypeError
        If ``logits`` are no floating-point tensor or ``labels`` no integers.
    ValueError
        If the shapes do not fit, there is no sample or a single class, a label is no class, or
        a logit is NaN or infinite.

    Examples
    --------
    >>> margins(torch.tensor([[3.0, 1.0, 2.0], [0.0, 4.0, 1.0]]), torch.tensor([0, 2])).tolist()
    [1.0, -3.0]
    """
    logits, labels = _check_logits(logits, labels)
    own = logits.gather(1, labels[:, None])[:, 0]
    return own - logits.scatter(1, labels[:, None], -math.inf).amax(1)


def margin_loss(margins: Tensor, gamma: float) -> float:
    r"""Share of margins that are at most :math:`\gamma`: their empirical distribution function.

    .. math:: \hat E_\gamma = \frac1n \bigl|\{ i : m_i \le \gamma \}\bigr|

    At :math:`\gamma = 0` this is the error, where a tie is counted as one.

    Parameters
    ----------
    margins : torch.Tensor
        (n,), from :func:`margins` or :func:`normalized_margins`.
    gamma : float
        :math:`\gamma`.

    Returns
    -------
    float
        In [0, 1].

    Raises
    ------
    TypeError, ValueError
        If ``margins`` are no finite numbers (n,) or ``gamma`` is NaN.

    Examples
    --------
    >>> [margin_loss(torch.tensor([-1.0, 0.5, 1.0, 3.0]), gamma) for gamma in (0, 1, 5)]
    [0.25, 0.75, 1.0]
    """
    margins = _check_margins(margins)
    _real("gamma", gamma)
    if math.isnan(gamma):
        raise ValueError("gamma must be a number, got nan")
    return (margins <= gamma).double().mean().item()


def data_norm(inputs: Tensor) -> float:
    r"""Norm of a data set, the Frobenius norm of all its samples.

    .. math:: \lVert X\rVert = \Big(\sum_{i=1}^n \lVert x_i\rVert_2^2\Big)^{1/2}

    It grows like :math:`\sqrt n`.

    Parameters
    ----------
    inputs : torch.Tensor
        (n, \*shape).

    Returns
    -------
    float

    Raises
    ------
    TypeError, ValueError
        If ``inputs`` are no finite numbers, or there is no sample.

    Examples
    --------
    >>> data_norm(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
    5.0
    """
    _check_float("inputs", inputs)
    if inputs.dim() == 0 or inputs.numel() == 0:
        raise ValueError(f"inputs must hold one sample or more, got shape {tuple(inputs.shape)}")
    return torch.linalg.vector_norm(inputs.detach().double()).item()


# ----------------------------------------------------------------------------- complexity


@dataclasses.dataclass(frozen=True)
class SpectralComplexity:
    r"""Spectral complexity of a network, with the norms it was made of.

    .. math::
        R = \prod_i \rho_i s_i \Bigl(\sum_i (b_i / s_i)^{2/3}\Bigr)^{3/2}, \qquad
        s_i = \lVert A_i\rVert_2, \quad b_i = \sum_{\text{rows}} \lVert (A_i - M_i)_{r}\rVert_2

    It increases in every :math:`s_i`, so that upper bounds of norms give an upper bound of it; that
    is what ``kind`` says.

    Parameters
    ----------
    spectral_norms : tuple of float
        :math:`s_i`, one for each matrix, or upper bounds of them.
    distances : tuple of float
        :math:`b_i`. Bartlett et al. write :math:`\lVert A_i^\top - M_i^\top\rVert_{2,1}`.
    frobenius_norms : tuple of float
        :math:`\lVert A_i\rVert_F`.
    lipschitz : float
        :math:`\prod_i \rho_i`.
    width : int
        The largest number of inputs or outputs of a matrix.
    kind : str
        ``"exact"`` or ``"upper bound"``.
    names : tuple of str
        Of the layers.

    Raises
    ------
    ValueError
        If the tuples are empty or differ in length, or a number is negative or not finite.

    Examples
    --------
    >>> two = SpectralComplexity((2.0, 3.0), (2.0, 3.0), (2.0, 3.0), 1.0, 5)
    >>> f"{two.product:.1f}, {two.value:.4f} = 6 · 2^(3/2)"
    '6.0, 16.9706 = 6 · 2^(3/2)'

    References
    ----------
    :cite:t:`bartlett2017`, equation (1.2).
    """

    spectral_norms: tuple[float, ...]
    distances: tuple[float, ...]
    frobenius_norms: tuple[float, ...]
    lipschitz: float
    width: int
    kind: Literal["exact", "upper bound"] = "exact"
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        lengths = {len(self.spectral_norms), len(self.distances), len(self.frobenius_norms)}
        if len(lengths) != 1 or 0 in lengths:
            raise ValueError(
                "spectral_norms, distances and frobenius_norms must have one number a matrix, "
                f"got {sorted(lengths)} numbers"
            )
        numbers = (*self.spectral_norms, *self.distances, *self.frobenius_norms, self.lipschitz)
        if not all(0 <= number < math.inf for number in numbers):
            raise ValueError(f"norms must be finite numbers >= 0, got {numbers}")
        if self.width < 1:
            raise ValueError(f"width must be at least 1, got {self.width}")
        if self.kind not in ("exact", "upper bound"):
            raise ValueError(f"kind must be 'exact' or 'upper bound', got {self.kind!r}")

    @property
    def product(self) -> float:
        r"""Product :math:`\prod_i \rho_i s_i`: an upper bound of the Lipschitz constant."""
        return self.lipschitz * math.prod(self.spectral_norms)

    @property
    def value(self) -> float:
        """Spectral complexity :math:`R`."""
        return self.lipschitz * _combined(self.spectral_norms, self.distances, 2 / 3)

    def __str__(self) -> str:
        names = self.names or tuple(f"matrix {i}" for i in range(1, 1 + len(self.distances)))
        width = max(len("product"), *map(len, names))
        rows = [f"{'':{width}}  spectral norm  distance  Frobenius norm"]
        for name, s, b, size in zip(
            names, self.spectral_norms, self.distances, self.frobenius_norms, strict=True
        ):
            rows.append(f"{name:{width}}  {s:13.6g}  {b:8.6g}  {size:14.6g}")
        rows.append(f"{'product':{width}}  {self.product:13.6g}")
        rows.append(f"complexity {self.value:.6g} ({self.kind})")
        return "\n".join(rows)


def _combined(norms: Sequence[float], others: Sequence[float], power: float) -> float:
    r"""(Σ_i (others_i Π_{j≠i} norms_j)^power)^(1/power): increasing in all, and fine at zero."""
    terms = [
        (other * math.prod(norms[:i]) * math.prod(norms[i + 1 :])) ** power
        for i, other in enumerate(others)
    ]
    return math.fsum(terms) ** (1 / power)


def spectral_complexity(
    module: nn.Module,
    input_shape: Sequence[int],
    reference: nn.Module | Sequence[Tensor] | None = None,
) -> SpectralComplexity:
    r"""Spectral complexity of a network of dense layers and convolutions.

    .. math::
        R = \prod_i \rho_i \lVert A_i\rVert_2\; \Bigl(\sum_i
        \Bigl(\frac{\lVert A_i^\top - M_i^\top\rVert_{2,1}}{\lVert A_i\rVert_2}\Bigr)^{2/3}
        \Bigr)^{3/2}, \qquad
        \lVert A^\top\rVert_{2,1} = \sum_r \Bigl(\sum_c A_{rc}^2\Bigr)^{1/2}

    The matrix of a dense layer is its weight, (m, n). **The matrix of a convolution** is that of
    the linear map from all entries of its input image to all entries of its output, with one row
    for each channel and pixel of the output: not the kernel, and not the kernel reshaped. So
    :math:`\lVert A\rVert_2` is the Lipschitz constant of the layer, and a row is a kernel, less
    what hangs over a border of zeros. The row norms are exact; the spectral norm is that of
    :func:`~lipbook.composition.lipschitz_bound`, exact for circular padding and an upper bound
    otherwise. All that stands between two matrices makes up one map :math:`\psi_i`,
    whose constant :math:`\rho_i` is bounded from above by the same function.

    Multiplying the weights of one layer by :math:`c > 0` multiplies R by c (without a reference),
    so that a ReLU network whose layers are rescaled by :math:`c` and :math:`1/c` keeps its R.

    Parameters
    ----------
    module : torch.nn.Module
        A network of :class:`torch.nn.Sequential`, dense layers and convolutions of torch or of this
        library, without biases (or with biases of 0), and of maps without parameters. Parametrized
        weights are read as the layers use them.
    input_shape : sequence of int
        Shape of one sample.
    reference : torch.nn.Module or sequence of torch.Tensor, optional
        Matrices :math:`M_i` (kernels for convolutions), which must not depend on the data: a copy
        of the network as it was initialised, or weights in the order of the layers. Zero if not
        given.

    Returns
    -------
    SpectralComplexity
        Of kind ``"exact"`` if all norms and constants are.

    Raises
    ------
    TypeError
        If a layer is of a kind the theorem is not about: a sum or a residual block, a
        normalisation or an activation with parameters, a transposed convolution, a layer
        without a Lipschitz rule. The message names it.
    ValueError
        If a bias is not 0, a map does not keep 0, there is no matrix, a convolution has reflect or
        replicate padding or a kernel that meets itself on the circle, or the reference has
        other shapes; and where :func:`~lipbook.composition.lipschitz_bound` raises it.

    Examples
    --------
    Square orthogonal layers have norm 1 and rows of norm 1:
    :math:`R = (L\, d^{2/3})^{3/2} = L^{3/2} d`.

    >>> from lipbook.orthogonal import OrthogonalLinear
    >>> layers = [OrthogonalLinear(16, 16, bias=False) for _ in range(4)]
    >>> print(f"{spectral_complexity(nn.Sequential(*layers), (16,)).value:.3f}")
    128.000

    References
    ----------
    :cite:t:`bartlett2017`, equation (1.2) and Theorem 1.1.
    """
    layers = list(_matrices(module, _shape(input_shape)))
    matrices = [layer for layer in layers if isinstance(layer, _Matrix)]
    if not matrices:
        raise ValueError("module must have one linear layer or more, got none")
    references = _references(reference, matrices)
    norms, distances, sizes = [], [], []
    for layer, other in zip(matrices, references, strict=True):
        weight = layer.weight
        norms.append(layer.bound.value)
        sizes.append(torch.linalg.vector_norm(_row_norms(layer, weight)).item())
        distances.append(_row_norms(layer, weight - other).sum().item())
    bounds = [layer.bound if isinstance(layer, _Matrix) else layer for layer in layers]
    exact = all(bound.kind == "exact" for bound in bounds)
    return SpectralComplexity(
        tuple(norms),
        tuple(distances),
        tuple(sizes),
        math.prod(bound.value for bound in layers if isinstance(bound, Bound)),
        max(max(math.prod(m.bound.input_shape), math.prod(m.bound.output_shape)) for m in matrices),
        "exact" if exact else "upper bound",
        tuple(matrix.bound.name for matrix in matrices),
    )


@dataclasses.dataclass(frozen=True)
class _Matrix:
    """A linear layer, its weight in float64, and its bound with name and shapes."""

    layer: Any
    weight: Tensor
    bound: Bound


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _matrices(module: nn.Module, input_shape: Sequence[int]) -> Iterator[_Matrix | Bound]:
    """Walk a composition: a matrix for each linear layer, a bound for each map between."""
    shape = tuple(int(n) if isinstance(n, np.integer) else n for n in input_shape)
    for name, layer in _leaves(module, ""):
        bound = lipschitz_bound(layer, shape, name=name)
        if isinstance(layer, (nn.Linear, *_CONVOLUTIONS)):
            if layer.bias is not None and bool((layer.bias != 0).any()):
                raise ValueError(
                    f"{bound.name} has a bias, which the theorem does not cover: use bias=False"
                )
            if isinstance(layer, nn.Linear) and len(shape) != 1:
                raise ValueError(f"{bound.name} must follow a Flatten, got samples of {shape}")
            yield _Matrix(layer, layer.weight.detach().double(), bound)
        else:
            _check_map(layer, bound)
            yield bound
        shape = bound.output_shape


def _leaves(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    if type(module) is not nn.Sequential:
        yield path, module
        return
    if module._forward_hooks or module._forward_pre_hooks:
        raise ValueError(f"{path or 'module'} has forward hooks: remove them")
    for name, child in module._modules.items():  # named_children() skips a child used twice
        yield from _leaves(child, f"{path}.{name}" if path else name)


def _check_map(layer: nn.Module, bound: Bound) -> None:
    """Refuse a map that has parameters, or that moves 0."""
    state = [name for name, _ in (*layer.named_parameters(), *layer.named_buffers())]
    if state or any(True for _ in layer.children()):
        found = f"parameters or buffers {state}" if state else "children"
        raise TypeError(
            f"{bound.name} has {found}: the theorem is about compositions of dense layers, "
            "convolutions and maps without parameters"
        )
    with torch.no_grad():
        moved = layer(torch.zeros(2, *bound.input_shape, dtype=torch.float64))
    if bool((moved != 0).any()):
        raise ValueError(f"{bound.name} must map 0 to 0")


def _row_norms(matrix: _Matrix, weight: Tensor) -> Tensor:
    """Norms of the rows of the matrix of a layer with this weight or kernel, (rows,)."""
    if isinstance(matrix.layer, nn.Linear):
        return torch.linalg.vector_norm(weight, dim=1)
    layer, (c_out, *positions) = matrix.layer, matrix.bound.output_shape
    size = matrix.bound.input_shape[1:]
    spans = [d * (k - 1) for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
    if layer.padding_mode == "circular":
        if any(span >= n for span, n in zip(spans, size, strict=True)):
            raise ValueError(
                f"{matrix.bound.name} must have a kernel that fits on the circle, got "
                f"a span of {spans} pixels beyond the first and images of {tuple(size)}"
            )
        rows = torch.linalg.vector_norm(weight.flatten(1), dim=1)
        return rows.repeat_interleave(math.prod(positions))
    if layer.padding_mode != "zeros":
        raise ValueError(
            f"{matrix.bound.name} must have padding_mode 'zeros' or 'circular', whose rows are "
            f"kernels, got {layer.padding_mode!r}"
        )
    # A row is what the kernel reads at one place: its square norm, the squared kernel on ones.
    if layer.padding == "same":
        pads = [(span // 2, span - span // 2) for span in spans]
    elif layer.padding == "valid":
        pads = [(0, 0)] * len(spans)
    else:
        pads = [(pad, pad) for pad in layer.padding]
    ones = torch.ones(1, *matrix.bound.input_shape, dtype=weight.dtype, device=weight.device)
    ones = functional.pad(ones, [pad for pair in reversed(pads) for pad in pair])
    convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[len(spans) - 1]
    squares = convolve(ones, weight.square(), None, layer.stride, 0, layer.dilation, layer.groups)
    if tuple(squares.shape[1:]) != (c_out, *positions):
        raise ValueError(
            f"{matrix.bound.name} pads in a way that is not known: expected outputs of "
            f"{tuple(squares.shape[1:])}, got {(c_out, *positions)}"
        )
    return squares.clamp(min=0).sqrt().flatten()


def _references(
    reference: nn.Module | Sequence[Tensor] | None, matrices: Sequence[_Matrix]
) -> list[Tensor]:
    if reference is None:
        return [torch.zeros_like(matrix.weight) for matrix in matrices]
    if isinstance(reference, nn.Module):
        linear = (nn.Linear, *_CONVOLUTIONS)
        leaves = [layer for _, layer in _leaves(reference, "")]
        weights = [layer.weight.detach() for layer in leaves if isinstance(layer, linear)]
    else:
        weights = list(reference)
    shapes = [tuple(weight.shape) for weight in weights]
    expected = [tuple(matrix.weight.shape) for matrix in matrices]
    if shapes != expected:
        raise ValueError(f"reference must have weights of shapes {expected}, got {shapes}")
    for weight in weights:
        _check_float("reference", weight)
    return [w.double().to(matrix.weight) for w, matrix in zip(weights, matrices, strict=True)]


def normalized_margins(
    logits: Tensor, labels: Tensor, complexity: SpectralComplexity, data_norm: float
) -> Tensor:
    r"""Margins in units of what the network could do with the data.

    .. math:: \bar m_i = \frac{m_i}{R\, \lVert X\rVert / n}

    The bound of the test error depends on the distribution of these numbers. They do not change
    when a layer is multiplied by :math:`c > 0`, as logits do.

    Parameters
    ----------
    logits : torch.Tensor
        (n, classes), of the training data.
    labels : torch.Tensor
        (n,) integers.
    complexity : SpectralComplexity
        R, of the network.
    data_norm : float
        :math:`\lVert X\rVert`, of the n samples: see :func:`data_norm`.

    Returns
    -------
    torch.Tensor
        (n,), float64.

    Raises
    ------
    TypeError, ValueError
        As in :func:`margins`, and if R or ``data_norm`` is not positive.

    Examples
    --------
    >>> x, y = torch.eye(3), torch.tensor([0, 1, 2])
    >>> network = nn.Linear(3, 3, bias=False)
    >>> _ = nn.init.eye_(network.weight)
    >>> for scale in (1, 10):
    ...     _ = network.weight.data.mul_(scale)
    ...     complexity = spectral_complexity(network, (3,))
    ...     print(normalized_margins(network(x), y, complexity, data_norm(x)).numpy().round(4))
    [0.5774 0.5774 0.5774]
    [0.5774 0.5774 0.5774]

    References
    ----------
    :cite:t:`bartlett2017`, Section 2.
    """
    found = margins(logits, labels)
    _check_complexity(complexity)
    _check_positive("data_norm", data_norm)
    _check_positive("complexity", complexity.value)
    return found / (complexity.value * data_norm / len(found))


# ---------------------------------------------------------------------------------- bounds


@dataclasses.dataclass(frozen=True)
class MarginBound:
    """Upper bound of the test error, with the three terms it is the sum of.

    Parameters
    ----------
    margin_loss : float
        Share of training margins that are at most ``gamma``.
    complexity_term : float
        Twice the bound of the Rademacher complexity.
    confidence_term : float
        What the draw of the data, and the choice of ``gamma`` and of the class, cost.
    gamma : float
        The margin.
    delta : float
        Probability, over the draw of the training data, that the bound fails.

    Examples
    --------
    >>> bound = MarginBound(0.02, 0.3, 0.05, gamma=1.0, delta=0.01)
    >>> f"{bound.value:.2f}", bound.vacuous
    ('0.37', False)
    """

    margin_loss: float
    complexity_term: float
    confidence_term: float
    gamma: float
    delta: float

    @property
    def value(self) -> float:
        """The sum. It can exceed 1."""
        return self.margin_loss + self.complexity_term + self.confidence_term

    @property
    def vacuous(self) -> bool:
        """Whether it says nothing, since an error is at most 1 without any bound."""
        return self.value >= 1


def spectrally_normalized_margin_bound(
    margins: Tensor,
    complexity: SpectralComplexity,
    data_norm: float,
    *,
    gamma: float | None = None,
    delta: float = 0.05,
) -> MarginBound:
    r"""Upper bound of the test error from margins and spectral complexity, with all constants.

    .. math::
        \Pr\bigl[\arg\max f(x) \ne y\bigr] \;\le\; \hat E_\gamma
        + \frac{8}{n^{3/2}}
        + \frac{72 \ln n \sqrt{\ln(2 H^2)}}{n} \cdot \frac{\lVert X\rVert R'}{\gamma}
        + 3 \sqrt{\frac{\ln(2/\delta) + \sum_j \ln\bigl(c\,(1 + |k_j|)^2\bigr)}{2n}}

    with :math:`\hat E_\gamma` of :func:`margin_loss`, H the width, and
    :math:`c = \pi^2/3 - 1`. The theorem is about classes that are fixed before the data are seen:
    one for each choice of :math:`\gamma`, of the :math:`s_i` and of the :math:`b_i` among powers
    :math:`q^{k_j}`, :math:`q = 1 + 1/L`, of an integer :math:`k_j`. Norms are rounded up to such
    powers, :math:`\gamma` is rounded down, :math:`R'` is the complexity of the rounded norms
    (at most e times as large; :math:`R'/\gamma` at most :math:`(1 + 1/L)^{L+1}` times), and the
    sum over these 2L + 1 numbers pays for having chosen them afterwards.

    **Guaranteed** with probability at least :math:`1 - \delta` over n independent samples, for all
    networks of the same layers at once, however trained, and all :math:`\gamma`, as long as
    :math:`\rho_i`, widths and reference matrices do not depend on the data. **Not promised**: a
    number below 1. At the size of MNIST it is above ten thousand.

    Parameters
    ----------
    margins : torch.Tensor
        (n,), of the *training* data: see :func:`margins`. Not normalised.
    complexity : SpectralComplexity
        Of the network.
    data_norm : float
        :math:`\lVert X\rVert` of the training inputs: see :func:`data_norm`.
    gamma : float, optional
        :math:`\gamma > 0`; the best power up to the largest margin if not given.
    delta : float
        :math:`\delta`, in (0, 1).

    Returns
    -------
    MarginBound

    Raises
    ------
    TypeError, ValueError
        If ``margins`` are no finite numbers (n,), ``gamma`` or ``data_norm`` is not positive,
        ``delta`` is out of range, or no margin is positive and no ``gamma`` given.

    Examples
    --------
    Two classes on the axes of a plane, told apart by the identity with a margin of 1. A million
    samples are enough:

    >>> n = 1_000_000
    >>> complexity = spectral_complexity(nn.Linear(2, 2, bias=False), (2,), [torch.eye(2)])
    >>> learnt = dataclasses.replace(complexity, spectral_norms=(1.0,), distances=(0.1,))
    >>> bound = spectrally_normalized_margin_bound(torch.ones(n), learnt, n**0.5)
    >>> 0 < bound.value < 1
    True

    References
    ----------
    :cite:t:`bartlett2017`, Theorem 1.1, there without constants; the proof, with these, is in the
    chapter.
    """
    margins = _check_margins(margins)
    _check_complexity(complexity)
    _check_positive("data_norm", data_norm)
    _real("delta", delta)
    if not 0 < delta < 1:
        raise ValueError(f"delta must be in (0, 1), got {delta}")
    n, q = len(margins), 1 + 1 / len(complexity.distances)
    step = math.log(q)
    ups = [
        [math.ceil(math.log(max(x, 1e-9)) / step) for x in numbers]
        for numbers in (complexity.spectral_norms, complexity.distances)
    ]
    norms, distances = ([q**k for k in powers] for powers in ups)
    rounded = complexity.lipschitz * _combined(norms, distances, 2 / 3)
    logarithms = math.log(n) * math.sqrt(math.log(2 * complexity.width**2))
    choices = math.log(2 / delta) + sum(_price(k) for powers in ups for k in powers)

    def bound(k: int) -> MarginBound:
        return MarginBound(
            margin_loss(margins, q**k),
            8 / n**1.5 + 72 * logarithms * data_norm * rounded / (n * q**k),
            3 * math.sqrt((choices + _price(k)) / (2 * n)),
            gamma=q**k,
            delta=delta,
        )

    if gamma is not None:
        _check_positive("gamma", gamma)
        return bound(math.floor(math.log(gamma) / step))
    positive = margins[margins > 0]
    if len(positive) == 0:
        raise ValueError("margins must hold a positive one, or gamma must be given")
    # A power at or above the largest margin has a margin loss of 1: no value below 1 is missed.
    lowest, highest = (math.log(x.item()) / step for x in (positive.min(), positive.max()))
    tried = range(math.floor(lowest) - 1, math.floor(highest) + 1)
    return min((bound(k) for k in tried), key=lambda found: found.value)


def _price(k: int) -> float:
    """Logarithm of 1 / weight of an integer; the weights of all integers sum to 1."""
    return math.log((math.pi**2 / 3 - 1) * (1 + abs(k)) ** 2)


def pac_bayes_term(complexity: SpectralComplexity, radius: float, gamma: float, n: int) -> float:
    r"""Complexity term of the PAC-Bayes margin bound, **without its constant: not a bound**.

    .. math::
        \sqrt{\frac{B^2 L^2 h \ln(L h)}{\gamma^2 n}\;
        \prod_i \lVert A_i\rVert_2^2 \sum_i \frac{\lVert A_i\rVert_F^2}{\lVert A_i\rVert_2^2}}

    With probability :math:`1 - \delta` the error of a ReLU network of L layers is at most
    :math:`\hat E_\gamma` plus a constant times this term, in whose root
    :math:`\ln(nL/\delta) / (\gamma^2 n)` is added. The theorem does not give the constant, so the
    number compares networks and sample sizes; it bounds nothing. Its proof needs maps that are
    1-Lipschitz and commute with positive factors, as ReLU and GroupSort do.

    Parameters
    ----------
    complexity : SpectralComplexity
        Of the network; its ``distances`` are not used.
    radius : float
        B, no less than the norm of any input.
    gamma : float
        The margin.
    n : int
        Samples.

    Returns
    -------
    float

    Raises
    ------
    ValueError
        If a number is not positive, or the maps of the network are not 1-Lipschitz.

    Examples
    --------
    Square orthogonal layers: each Frobenius norm is :math:`\sqrt d`, and the root of
    :math:`L^2 d \ln(Ld) \cdot Ld / n` is left.

    >>> layers = SpectralComplexity((1.0,) * 3, (4.0,) * 3, (2.0,) * 3, 1.0, 4)
    >>> term = pac_bayes_term(layers, radius=1.0, gamma=1.0, n=100)
    >>> print(f"{term:.4f} {math.sqrt(9 * 4 * math.log(12) * 12 / 100):.4f}")
    3.2764 3.2764

    References
    ----------
    :cite:t:`neyshabur2018`, Theorem 1.
    """
    _check_complexity(complexity)
    for name, value in (("radius", radius), ("gamma", gamma), ("n", n)):
        _check_positive(name, value)
    _integer("n", n, 1)
    if complexity.lipschitz > 1:
        raise ValueError(
            "complexity must be that of 1-Lipschitz maps between matrices, got the constant "
            f"{complexity.lipschitz}"
        )
    layers, h = len(complexity.distances), complexity.width
    norms = _combined(complexity.spectral_norms, complexity.frobenius_norms, 2)
    return radius * layers * math.sqrt(h * math.log(layers * h) / n) * norms / gamma


# ------------------------------------------------------------------------------- arguments


def _check_positive(name: str, value: float) -> None:
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}")


def _check_complexity(complexity: object) -> None:
    if not isinstance(complexity, SpectralComplexity):
        raise TypeError(f"complexity must be a SpectralComplexity, got {type(complexity).__name__}")


def _check_float(name: str, tensor: Any) -> None:
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        loader = not isinstance(tensor, (Tensor, np.ndarray))
        hint = ": join its batches with torch.cat" if loader else ""
        raise TypeError(f"{name} must be a floating-point tensor, got {_got(tensor)}{hint}")
    if not tensor.isfinite().all():
        raise ValueError(f"{name} must be finite, got NaN or infinity")


def _check_margins(margins: Tensor) -> Tensor:
    _check_float("margins", margins)
    if margins.dim() != 1 or len(margins) == 0:
        raise ValueError(f"margins must have shape (n,), n >= 1, got {tuple(margins.shape)}")
    return margins.detach().double()


def _check_logits(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    _check_float("logits", logits)
    real = isinstance(labels, Tensor) and (labels.is_floating_point() or labels.is_complex())
    if not isinstance(labels, Tensor) or real or labels.dtype == torch.bool:
        hint = ": call .long()" if isinstance(labels, Tensor) else ""
        raise TypeError(f"labels must be an integer tensor, got {_got(labels)}{hint}")
    labels = labels.long()
    if logits.dim() != 2 or logits.shape[1] < 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            "logits and labels must have shapes (n, classes) and (n,), with two classes or more, "
            f"got {tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    if len(labels) == 0:
        raise ValueError("logits must hold one sample or more, got none")
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise ValueError(
            f"labels must be classes from 0 to {logits.shape[1] - 1}, "
            f"got {labels.min().item()} to {labels.max().item()}"
        )
    return logits.detach().double(), labels

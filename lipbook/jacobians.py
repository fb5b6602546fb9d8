r"""Jacobians of networks: products, factors and closed forms.

A network :math:`f : \mathbb R^n \to \mathbb R^m` is, near one input, the linear map
:math:`f(x + \delta) = f(x) + J\,\delta + o(\lVert\delta\rVert)`. This module computes
:math:`J`, multiplies by it without forming it, splits it into layers, and writes it down
for the layers whose Jacobian is known on paper.

One definition holds throughout: the Jacobian at sample :math:`x` is that of
``lambda x: module(x[None])[0]``. The module sees a batch of one, so nothing another sample does
can enter. It sees a copy, so layers that work in place leave the inputs as they are; and it
is called with the grad mode that the products need, inside :class:`torch.no_grad` and
:class:`torch.inference_mode` too.
"""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

__all__ = [
    "jacobian",
    "jvp",
    "vjp",
    "jacobian_operator",
    "singular_values",
    "layer_jacobians",
    "linear_jacobian",
    "elementwise_jacobian",
    "softmax_jacobian",
    "residual_jacobian",
    "batch_norm_jacobian",
    "convolution_matrix",
]

Function = Callable[[Tensor], Tensor]


def jacobian(
    module: Function,
    inputs: Tensor,
    flatten: bool = False,
    chunk_size: int | None = None,
    product_chunk_size: int | None = None,
) -> Tensor:
    r"""Jacobian of a module at every sample of a batch.

    .. math:: J_{ij}(x) = \frac{\partial f_i}{\partial x_j}(x)

    All :math:`\min(m, n)` products are taken: one VJP per row when :math:`m \le n`, one JVP per
    column otherwise. The result is exact up to rounding and differentiable in the parameters.
    Where :math:`f` has a kink (ReLU at 0) it is the value that PyTorch's derivative rules give,
    which need not be the Jacobian of anything.

    Parameters
    ----------
    module : Callable
        A :class:`torch.nn.Module` or function from a batch to a batch, one output per sample: one
        tensor, so that of a recurrent layer must be picked, ``lambda x: lstm(x)[0]``. What
        :func:`torch.compile` made is run as it was written.
    inputs : torch.Tensor
        The samples, (batch, \*inputs).
    flatten : bool, default False
        Give matrices: outputs and inputs flattened in row-major order.
    chunk_size : int, optional
        How many samples to differentiate at once; all of them by default.
    product_chunk_size : int, optional
        How many products to take at once for each sample; all of them by default. What the products
        need beside the result is proportional to it and to ``chunk_size``.

    Returns
    -------
    torch.Tensor
        (batch, \*outputs, \*inputs), or (batch, m, n) if ``flatten``.

    Raises
    ------
    TypeError
        If ``inputs`` is not a floating-point tensor or ``module`` does not return a tensor.
    ValueError
        If ``inputs`` is empty or not finite, if ``module`` mixes samples (batch normalisation
        on batch statistics), is random (dropout in training), changes at each call (spectral
        normalisation in training) or does not keep the batch, or if a chunk size is below 1.

    Examples
    --------
    The Jacobian of a linear layer is its weight, whatever the input:

    >>> layer = torch.nn.Linear(3, 2, dtype=torch.float64)
    >>> J = jacobian(layer, torch.randn(5, 3, dtype=torch.float64))
    >>> J.shape
    torch.Size([5, 2, 3])
    >>> bool((J - layer.weight).abs().max() < 1e-15)
    True

    References
    ----------
    :cite:t:`baydin2018`, section 3.
    """
    function = _sample_function(module)
    _check_batch(inputs)
    chunk_size = _chunk("chunk_size", chunk_size)
    product_chunk_size = _chunk("product_chunk_size", product_chunk_size)
    with torch.no_grad():
        outputs = function(inputs[0])
    rows, columns = outputs.numel(), inputs[0].numel()
    if rows <= columns:
        products = torch.func.jacrev(function, chunk_size=product_chunk_size)
    else:
        products = _forward_jacobian(function, product_chunk_size)
    full: Tensor = torch.func.vmap(products, chunk_size=chunk_size)(inputs)
    return full.reshape(len(inputs), rows, columns) if flatten else full


def _forward_jacobian(function: Function, chunk_size: int | None) -> Function:
    """:func:`torch.func.jacfwd`, which takes no chunks."""

    def full(x: Tensor) -> Tensor:
        basis = torch.eye(x.numel(), dtype=x.dtype, device=x.device).reshape(-1, *x.shape)

        def column(v: Tensor) -> Tensor:
            # Batched as x is, without which no layer may work in place on x.
            tangent = v + torch.zeros_like(x)
            return torch.func.jvp(function, (x,), (tangent,))[1]

        columns: Tensor = torch.func.vmap(column, out_dims=-1, chunk_size=chunk_size)(basis)
        return columns.unflatten(-1, x.shape) if x.dim() else columns.squeeze(-1)

    return full


def jvp(module: Function, inputs: Tensor, tangents: Tensor) -> Tensor:
    r"""Jacobian–vector product :math:`J(x)\,v` of every sample, in one forward pass.

    Forward mode: the cost is a small constant times that of the module, whatever :math:`m`
    and :math:`n`, and :math:`J` is never formed.

    Parameters
    ----------
    module : Callable
        As in :func:`jacobian`.
    inputs, tangents : torch.Tensor
        The samples and one direction :math:`v` for each, both (batch, \*inputs).

    Returns
    -------
    torch.Tensor
        The products, (batch, \*outputs).

    Raises
    ------
    TypeError, ValueError
        As :func:`jacobian`, and if ``tangents`` differs from ``inputs`` in shape or dtype.

    Examples
    --------
    The derivative of sin at 0 in direction 2:

    >>> jvp(torch.sin, torch.zeros(1, 1), torch.tensor([[2.0]]))
    tensor([[2.]])

    References
    ----------
    :cite:t:`baydin2018`, section 3.1; :cite:t:`pearlmutter1994`.
    """
    function = _sample_function(module)
    _check_batch(inputs)
    _check_vector("tangents", tangents, inputs.shape, inputs)
    return torch.func.jvp(torch.func.vmap(function), (inputs,), (tangents,))[1]


def vjp(module: Function, inputs: Tensor, cotangents: Tensor) -> Tensor:
    r"""Vector–Jacobian product :math:`J(x)^\top u` of every sample, in one backward pass.

    Reverse mode, also called backpropagation: the gradient of :math:`\langle u, f(x)\rangle`.
    The cost is a small constant times that of the module, whatever :math:`m` and :math:`n`.

    Parameters
    ----------
    module : Callable
        As in :func:`jacobian`.
    inputs : torch.Tensor
        The samples, (batch, \*inputs).
    cotangents : torch.Tensor
        One vector :math:`u` for each sample, (batch, \*outputs).

    Returns
    -------
    torch.Tensor
        The products, (batch, \*inputs).

    Raises
    ------
    TypeError, ValueError
        As :func:`jacobian`, and if ``cotangents`` has another shape than the outputs or another
        dtype than the inputs.

    Examples
    --------
    :math:`\langle u, Jv\rangle = \langle J^\top u, v\rangle`:

    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh()).double()
    >>> x, v = torch.randn(2, 6, 4, dtype=torch.float64)
    >>> u = torch.randn(6, 3, dtype=torch.float64)
    >>> gap = (u * jvp(net, x, v)).sum() - (vjp(net, x, u) * v).sum()
    >>> bool(gap.abs() < 1e-14)
    True

    References
    ----------
    :cite:t:`baydin2018`, section 3.2.
    """
    function = _sample_function(module)
    _check_batch(inputs)
    outputs, pullback = torch.func.vjp(torch.func.vmap(function), inputs)[:2]
    _check_vector("cotangents", cotangents, outputs.shape, inputs)
    return pullback(cotangents)[0]


def jacobian_operator(module: Function, x: Tensor) -> LinearOperator:
    r"""Jacobian at one input as a SciPy linear operator, never formed.

    ``operator @ v`` is a JVP and ``operator.T @ u`` a VJP, in the dtype and on the device of
    ``x``; vectors come and go as NumPy arrays, outputs and inputs flattened in row-major order.

    Parameters
    ----------
    module : Callable
        As in :func:`jacobian`.
    x : torch.Tensor
        One input, without the batch dimension.

    Returns
    -------
    scipy.sparse.linalg.LinearOperator
        Of shape (m, n).

    Raises
    ------
    TypeError, ValueError
        As :func:`jacobian`.

    Examples
    --------
    >>> operator = jacobian_operator(torch.nn.Flatten(), torch.randn(2, 3, dtype=torch.float64))
    >>> operator.shape
    (6, 6)
    >>> bool((operator @ np.eye(6) == np.eye(6)).all())
    True
    """
    from scipy.sparse.linalg import LinearOperator  # noqa: PLC0415 - slow to import

    function = _sample_function(module)
    _check_tensor("x", x)
    x = x.detach().clone()  # since the caller may write into it before a product is taken
    torch.func.vmap(function)(x.unsqueeze(0))  # refuses randomness, as the batched products do
    outputs, pullback = torch.func.vjp(function, x)[:2]

    def array(tensor: Tensor) -> np.ndarray:
        return tensor.detach().cpu().numpy().ravel()

    def tensor(vector: np.ndarray, shape: torch.Size) -> Tensor:
        return torch.as_tensor(vector, dtype=x.dtype, device=x.device).reshape(shape)

    def matvec(v: np.ndarray) -> np.ndarray:
        return array(torch.func.jvp(function, (x,), (tensor(v, x.shape),))[1])

    def rmatvec(u: np.ndarray) -> np.ndarray:
        return array(pullback(tensor(u, outputs.shape))[0])

    shape, dtype = (outputs.numel(), x.numel()), array(x).dtype
    return LinearOperator(shape, matvec=matvec, rmatvec=rmatvec, dtype=dtype)


def singular_values(
    module: Function, x: Tensor, k: int = 1, which: Literal["top", "bottom"] = "top"
) -> Tensor:
    r"""Largest or smallest singular values of the Jacobian at one input.

    Lanczos iteration (ARPACK) on the smaller of :math:`J^\top J` and :math:`JJ^\top`, from a fixed
    pseudo-random start, finds an orthonormal :math:`V`; returned are the singular values of
    :math:`JV` (of :math:`J^\top V` when :math:`m < n`). :math:`J` is never formed, unless all
    :math:`r = \min(m, n)` values are asked for.

    Parameters
    ----------
    module : Callable
        As in :func:`jacobian`.
    x : torch.Tensor
        One input, without the batch dimension.
    k : int, default 1
        How many values, at most :math:`r`.
    which : {"top", "bottom"}, default "top"
        The end of the spectrum. The bottom is that of the :math:`r` values that
        :func:`torch.linalg.svdvals` returns; the kernel a wide Jacobian always has does not count.

    Returns
    -------
    torch.Tensor
        The values in descending order, (k,).

    Raises
    ------
    TypeError, ValueError
        As :func:`jacobian`, and if ``k`` or ``which`` is out of range.
    scipy.sparse.linalg.ArpackNoConvergence
        If Lanczos does not converge; a half-converged value is never returned.

    Notes
    -----
    *Guaranteed*, up to rounding, whatever :math:`V` is: by Cauchy interlacing the i-th largest
    value returned is not above the i-th largest of :math:`J`, and the i-th smallest not below the
    i-th smallest. So the top is a lower estimate, the bottom an upper one, and neither is a bound
    on the other side. *Hoped*: equality. The top is reached in few products and to nearly machine
    precision, though a repeated value may be returned fewer times than it occurs. The bottom is the
    weak end. Without solving with :math:`J` there is no shift-and-invert, and restarted Lanczos can
    stall for longer than forming :math:`J` takes, so the basis is given all its :math:`r` vectors:
    about :math:`r` products with :math:`J` and as many with :math:`J^\top`, and :math:`r^2` numbers
    of memory. That saves memory when one side of :math:`J` is short, and nothing when it is
    square. Squaring costs digits too: the bottom is exact to about
    :math:`\sqrt\varepsilon\,\sigma_1` at worst, where :func:`torch.linalg.svdvals` of
    :func:`jacobian` reaches :math:`\varepsilon\,\sigma_1`.

    Examples
    --------
    >>> layer = torch.nn.Linear(40, 30, dtype=torch.float64)
    >>> dense = torch.linalg.svdvals(layer.weight)
    >>> top = singular_values(layer, torch.zeros(40, dtype=torch.float64), k=3)
    >>> bool((top - dense[:3]).abs().max() < 1e-12)
    True
    """
    J = jacobian_operator(module, x)
    r = min(J.shape)
    k = _integer("k", k)
    if not 1 <= k <= r:
        raise ValueError(f"k must be between 1 and min(m, n) = {r}, got {k}")
    if which not in ("top", "bottom"):
        raise ValueError(f'which must be "top" or "bottom", got {which!r}')
    tall = J if J.shape[1] == r else J.T
    # Note [a random start]: a constant vector is a singular vector of every circular convolution,
    # and Lanczos started there sees nothing else.
    start = np.random.default_rng(0).standard_normal(r).astype(J.dtype)
    scale = np.linalg.norm(tall @ start) / np.linalg.norm(start)
    if k == r or scale == 0:  # all values, or J = 0, which ARPACK refuses
        basis = np.eye(r, k, dtype=J.dtype)
    else:
        # Note [unit scale]: ARPACK takes eigenvalues below 1e-11 for zero and stops too early.
        from scipy.sparse.linalg import LinearOperator, eigsh  # noqa: PLC0415 - slow to import

        gram = LinearOperator(
            (r, r), matvec=lambda v: tall.T @ (tall @ v / scale) / scale, dtype=J.dtype
        )
        end, size = ("LA", None) if which == "top" else ("SA", r)
        basis = eigsh(gram, k=k, which=end, v0=start, ncv=size)[1]
    values = np.linalg.svd(tall @ basis, compute_uv=False)
    return torch.as_tensor(values, dtype=x.dtype, device=x.device)


def layer_jacobians(sequential: nn.Sequential, inputs: Tensor) -> list[Tensor]:
    r"""Jacobian of every layer of a Sequential at the activations that reach it.

    .. math:: J = J_L J_{L-1} \cdots J_1, \qquad J_l = J_{f_l}(h_{l-1}), \quad h_l = f_l(h_{l-1})

    Parameters
    ----------
    sequential : torch.nn.Sequential
        The layers; each must keep samples apart, as in :func:`jacobian`.
    inputs : torch.Tensor
        The samples, (batch, \*inputs).

    Returns
    -------
    list of torch.Tensor
        :math:`J_1, \dots, J_L` in the order of the layers, each (batch, outputs of the layer,
        inputs of the layer); every factor is dense. Their product, last on the left, is the
        flattened Jacobian.

    Raises
    ------
    TypeError
        If ``sequential`` is not a Sequential, overrides its forward or carries forward hooks, since
        then the product need not be its Jacobian.
    ValueError
        As :func:`jacobian`.

    Examples
    --------
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2))
    >>> x = torch.randn(5, 4, dtype=torch.float64)
    >>> first, middle, last = layer_jacobians(net.double(), x)
    >>> product = last @ middle @ first
    >>> bool((product - jacobian(net, x)).abs().max() < 1e-15)
    True
    """
    net = _unwrapped(sequential)
    plain = isinstance(net, nn.Sequential) and type(net).forward is nn.Sequential.forward
    if not plain or net._forward_hooks or net._forward_pre_hooks:
        raise TypeError(
            "sequential must be a torch.nn.Sequential with its own forward and no forward hooks, "
            f"got {type(sequential).__name__}"
        )
    factors, hidden = [], inputs
    for layer in net:
        factors.append(jacobian(layer, hidden, flatten=True))
        with _Differentiable():
            hidden = layer(hidden.clone())
    return factors


def linear_jacobian(weight: Tensor) -> Tensor:
    r"""Jacobian of a linear layer :math:`x \mapsto Wx + b`: its weight, at every input.

    .. math:: J = W

    Parameters
    ----------
    weight : torch.Tensor
        The matrix :math:`W`, (m, n).

    Returns
    -------
    torch.Tensor
        :math:`W` itself, not a copy.

    Raises
    ------
    TypeError, ValueError
        If ``weight`` is not a finite floating-point matrix.

    Examples
    --------
    >>> linear_jacobian(torch.tensor([[1.0, 2.0]]))
    tensor([[1., 2.]])
    """
    _check_tensor("weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"weight must be a matrix (m, n), got shape {tuple(weight.shape)}")
    return weight


def elementwise_jacobian(derivative: Tensor) -> Tensor:
    r"""Jacobian of an elementwise map :math:`y_i = \phi(x_i)`: diagonal.

    .. math:: J = \operatorname{diag}(\phi'(x_1), \dots, \phi'(x_n))

    Activations are of this form, and so is batch normalisation in evaluation, whose derivative is
    :math:`\gamma / \sqrt{\text{running variance} + \epsilon}` in each channel.

    Parameters
    ----------
    derivative : torch.Tensor
        The values :math:`\phi'(x_i)`, (\*batch, n).

    Returns
    -------
    torch.Tensor
        (\*batch, n, n).

    Raises
    ------
    TypeError, ValueError
        If ``derivative`` is not a finite floating-point tensor of at least one dimension.

    Examples
    --------
    >>> elementwise_jacobian(torch.tensor([1.0, 0.0]))
    tensor([[1., 0.],
            [0., 0.]])
    """
    _check_tensor("derivative", derivative, dim=1)
    return torch.diag_embed(derivative)


def softmax_jacobian(logits: Tensor) -> Tensor:
    r"""Jacobian of the softmax :math:`p = \operatorname{softmax}(z)` over the last dimension.

    .. math:: J = \operatorname{diag}(p) - p\,p^\top

    It is symmetric, positive semidefinite, kills the constant vector, and its operator norm is at
    most 1/2.

    Parameters
    ----------
    logits : torch.Tensor
        The scores :math:`z`, (\*batch, n).

    Returns
    -------
    torch.Tensor
        (\*batch, n, n).

    Raises
    ------
    TypeError, ValueError
        If ``logits`` is not a finite floating-point tensor of at least one dimension.

    Examples
    --------
    Two equal logits attain the norm 1/2:

    >>> softmax_jacobian(torch.zeros(2))
    tensor([[ 0.2500, -0.2500],
            [-0.2500,  0.2500]])
    """
    _check_tensor("logits", logits, dim=1)
    p = logits.softmax(-1)
    return torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)


def residual_jacobian(branch_jacobian: Tensor) -> Tensor:
    r"""Jacobian of a residual block :math:`x \mapsto x + g(x)`.

    .. math:: J = I + J_g

    Parameters
    ----------
    branch_jacobian : torch.Tensor
        The Jacobian :math:`J_g` of the branch, (\*batch, n, n).

    Returns
    -------
    torch.Tensor
        (\*batch, n, n).

    Raises
    ------
    TypeError, ValueError
        If ``branch_jacobian`` is not a finite floating-point tensor of square matrices.

    Examples
    --------
    >>> residual_jacobian(torch.tensor([[0.0, 1.0], [0.0, 0.0]]))
    tensor([[1., 1.],
            [0., 1.]])
    """
    _check_tensor("branch_jacobian", branch_jacobian, dim=2)
    *_, m, n = branch_jacobian.shape
    if m != n:
        raise ValueError(f"branch_jacobian must be square, got {m} outputs and {n} inputs")
    identity = torch.eye(n, dtype=branch_jacobian.dtype, device=branch_jacobian.device)
    return identity + branch_jacobian


def batch_norm_jacobian(inputs: Tensor, weight: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    r"""Jacobian of batch normalisation in training, where the samples of a channel mix.

    With :math:`\mu` and :math:`v` the mean and (biased) variance of the :math:`n` values of one
    channel, :math:`\sigma = \sqrt{v + \epsilon}` and :math:`\hat x = (x - \mu)/\sigma`,

    .. math::
       J = \frac{\gamma}{\sigma}\Bigl(I - \tfrac1n \mathbf 1\mathbf 1^\top
           - \tfrac1n \hat x\hat x^\top\Bigr).

    Exact for any :math:`\epsilon \ge 0`. The two directions :math:`\mathbf 1` and :math:`\hat x`
    are damped (to 0, and to :math:`\gamma\epsilon/\sigma^3`), every other one is scaled by
    :math:`\gamma/\sigma`. Channels do not interact.

    Parameters
    ----------
    inputs : torch.Tensor
        The values, (n, c): for images, n counts the samples and the positions.
    weight : torch.Tensor, optional
        The scale :math:`\gamma` of each channel, (c,); one by default.
    eps : float, default 1e-5
        The :math:`\epsilon` of the layer.

    Returns
    -------
    torch.Tensor
        One matrix a channel, (c, n, n): entry (c, i, j) is :math:`\partial y_{ic}/\partial x_{jc}`.

    Raises
    ------
    TypeError, ValueError
        If ``inputs`` is not a finite floating-point matrix of at least two rows, if ``weight`` does
        not have one entry a channel, or if ``eps`` is negative.

    Examples
    --------
    A shift of the whole batch changes nothing:

    >>> J = batch_norm_jacobian(torch.randn(6, 2, dtype=torch.float64))
    >>> bool((J @ torch.ones(6, dtype=torch.float64)).abs().max() < 1e-14)
    True
    """
    _check_tensor("inputs", inputs)
    if inputs.dim() != 2 or len(inputs) < 2:
        raise ValueError(f"inputs must be (n, c) with n >= 2, got shape {tuple(inputs.shape)}")
    n, channels = inputs.shape
    if weight is not None:
        _check_vector("weight", weight, torch.Size([channels]), inputs)
    if isinstance(eps, bool) or not isinstance(eps, Real):
        raise TypeError(f"eps must be a number, got {type(eps).__name__}")
    if not eps >= 0:
        raise ValueError(f"eps must be non-negative, got {eps}")
    if eps == math.inf:
        raise ValueError(f"eps must be finite, got {eps}")
    x = inputs.T
    sigma = (x.var(-1, correction=0, keepdim=True) + eps).sqrt()  # (c, 1)
    normalised = (x - x.mean(-1, keepdim=True)) / sigma  # (c, n)
    identity = torch.eye(n, dtype=x.dtype, device=x.device)
    matrices = identity - 1 / n - normalised.unsqueeze(-1) * normalised.unsqueeze(-2) / n
    scale = 1 / sigma if weight is None else weight.unsqueeze(-1) / sigma
    return scale.unsqueeze(-1) * matrices


def convolution_matrix(
    weight: Tensor,
    input_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | Literal["same", "valid"] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    padding_mode: Literal["zeros", "circular", "reflect", "replicate"] = "zeros",
) -> Tensor:
    r"""Matrix of a convolution layer, which is its Jacobian at every input.

    Along each spatial dimension write :math:`S_{o\kappa i} = 1` if kernel tap :math:`\kappa` at
    output :math:`o` reads input :math:`i`, that is if :math:`i` is where the padding sends
    :math:`o\,s + \kappa\,d - p` (stride, dilation, padding). Then, in two dimensions,

    .. math::
       M_{(a,o,o'),\,(b,i,i')} = \sum_{\kappa,\kappa'} W_{ab\kappa\kappa'}\,
           S_{o\kappa i}\, S'_{o'\kappa'i'} .

    With stride 1 it is (block-)Toeplitz for zero padding and (block-)circulant for circular
    padding. The matrix is dense and linear in ``weight``, through which it is differentiable. That
    of the transposed convolution with the same weight is its transpose.

    Parameters
    ----------
    weight : torch.Tensor
        The kernel, (c_out, c_in / groups, k, ...) with one to three spatial dimensions.
    input_size : int or tuple of int
        The spatial size of the input; one number means the same in every dimension.
    stride, padding, dilation, groups, padding_mode
        As in :class:`torch.nn.Conv2d`.

    Returns
    -------
    torch.Tensor
        (c_out · output size, c_in · input size), rows and columns in the row-major order of
        the flattened outputs and inputs.

    Raises
    ------
    TypeError, ValueError
        If ``weight`` is not a finite floating-point kernel, or a size or option is one that
        torch's convolution refuses.

    Examples
    --------
    Differences of neighbours, zero padded on both sides:

    >>> convolution_matrix(torch.tensor([[[-1.0, 1.0]]]), input_size=3, padding=1)
    tensor([[ 1.,  0.,  0.],
            [-1.,  1.,  0.],
            [ 0., -1.,  1.],
            [ 0.,  0., -1.]])
    """
    _check_tensor("weight", weight)
    c_out, c_group, *kernel = weight.shape if weight.dim() >= 2 else (0, 0)
    dims = len(kernel)
    if not 1 <= dims <= 3 or 0 in weight.shape:
        raise ValueError(
            "weight must be (c_out, c_in / groups, k, ...) with one to three spatial dimensions, "
            f"got shape {tuple(weight.shape)}"
        )
    if groups < 1 or c_out % groups:
        raise ValueError(f"groups must divide the {c_out} output channels, got {groups}")
    if padding_mode not in ("zeros", "circular", "reflect", "replicate"):
        raise ValueError(
            "padding_mode must be 'zeros', 'circular', 'reflect' or 'replicate', "
            f"got {padding_mode!r}"
        )
    sizes = _per_dimension("input_size", input_size, dims, least=1)
    strides = _per_dimension("stride", stride, dims, least=1)
    dilations = _per_dimension("dilation", dilation, dims, least=1)
    spans = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
    if padding == "same":
        if any(s != 1 for s in strides):
            raise ValueError(f"padding='same' needs stride 1, got {stride}")
        before = [span // 2 for span in spans]
        after = [span - span // 2 for span in spans]
    else:
        before = after = _per_dimension("padding", 0 if padding == "valid" else padding, dims)

    matrix = torch.block_diag(*weight.reshape(groups, -1, c_group * math.prod(kernel)))
    matrix = matrix.reshape(c_out, groups * c_group, *kernel)
    for axis in range(dims):
        outside = sizes[axis] + before[axis] + after[axis]
        outputs = (outside - spans[axis] - 1) // strides[axis] + 1
        if outputs < 1:
            raise ValueError(
                f"input_size must hold the kernel in dimension {axis}: the padded input has "
                f"{outside} entries, the kernel spans {spans[axis] + 1}"
            )
        positions = (
            torch.arange(outputs).unsqueeze(1) * strides[axis]
            + torch.arange(kernel[axis]) * dilations[axis]
            - before[axis]
        )  # (outputs, k)
        reads = _selection(positions, sizes[axis], padding_mode).to(weight)
        # Contracts the first spatial dimension left, appends (outputs, inputs).
        matrix = torch.tensordot(matrix, reads, dims=([2], [1]))
    # (c_out, c_in, o, i, o', i', ...) -> (c_out, o, o', ..., c_in, i, i', ...)
    order = [0, *range(2, 2 + 2 * dims, 2), 1, *range(3, 3 + 2 * dims, 2)]
    return matrix.permute(order).reshape(-1, groups * c_group * math.prod(sizes))


def _selection(positions: Tensor, size: int, padding_mode: str) -> Tensor:
    """Which input each position reads, (outputs, k, size): a one, or none in zero padding."""
    reach = max(-int(positions.min()), int(positions.max()) - size + 1)
    limit = {"circular": size, "reflect": size - 1}.get(padding_mode)
    if limit is not None and reach > limit:
        raise ValueError(
            f"padding must be at most {limit} with {padding_mode} padding of {size} inputs, "
            f"got {reach}"
        )
    if padding_mode == "circular":
        positions = positions % size
    elif padding_mode == "reflect":  # about the outermost entries, which are not repeated
        positions = (size - 1) - (size - 1 - positions.abs()).abs()
    elif padding_mode == "replicate":
        positions = positions.clamp(0, size - 1)
    return positions.unsqueeze(-1) == torch.arange(size)


def _per_dimension(name: str, value: int | Sequence[int], dims: int, least: int = 0) -> list[int]:
    values = list(value) if isinstance(value, Iterable) else [value] * dims
    if len(values) != dims or not all(isinstance(v, int) and v >= least for v in values):
        raise ValueError(f"{name} must be one or {dims} integers >= {least}, got {value!r}")
    return values


def _sample_function(module: Function) -> Function:
    """``lambda x: module(x[None])[0]``, for a module that keeps samples apart."""
    if not callable(module):
        raise TypeError(f"module must be callable, got {type(module).__name__}")
    module = _unwrapped(module)
    if isinstance(module, nn.Module):
        _check_module("module", module)

    def function(x: Tensor) -> Tensor:
        with _Differentiable():
            outputs = module(x.unsqueeze(0).clone())
        if not isinstance(outputs, Tensor):
            raise TypeError(
                f"module must return a tensor, got {type(outputs).__name__}: pick one of its "
                f"outputs, as in lambda x: module(x)[{_key(outputs)!r}]"
            )
        if not outputs.is_floating_point():
            raise TypeError(f"module must return real floating-point numbers, got {outputs.dtype}")
        if outputs.dim() == 0 or len(outputs) != 1:
            raise ValueError(
                "module must return one output for each sample, but a batch of one gave shape "
                f"{tuple(outputs.shape)}"
            )
        return outputs.squeeze(0)

    return function


def _check_module(argument: str, module: nn.Module) -> None:
    """Refuse a module that mixes samples, is random, or changes when it is called."""
    for name, part in module.named_modules():
        where, remedy = f"{type(part).__name__} {name!r}", f"call {argument}.eval()"
        if isinstance(part, _BatchNorm) and (part.training or part.running_mean is None):
            raise ValueError(
                f"{argument} must keep samples apart, but its {where} normalises by the statistics "
                f"of the batch: {remedy}, or see batch_norm_jacobian"
            )
        if part.training and _draws(part):
            raise ValueError(
                f"{argument} must be deterministic, but its {where} is in training: {remedy}"
            )
        tracks = isinstance(part, _InstanceNorm) and part.track_running_stats
        if part.training and (tracks or isinstance(part, _SpectralNorm)):
            raise ValueError(
                f"{argument} must not change, but its {where} does at each call: {remedy}"
            )


def _unwrapped(module: Any) -> Any:
    """Return the module inside what compiles it or runs it on several devices."""
    while True:
        if isinstance(module, (nn.DataParallel, DistributedDataParallel)):
            module = module.module
        elif isinstance(module, nn.Module) and "_orig_mod" in module._modules:
            module = module._orig_mod
        else:
            return module


def _draws(part: nn.Module) -> bool:
    """Whether a module draws random numbers in training."""
    if isinstance(part, nn.RNNBase):
        return part.dropout > 0 and part.num_layers > 1
    if isinstance(part, nn.MultiheadAttention):
        return part.dropout > 0
    return isinstance(part, nn.RReLU) or (isinstance(part, _DropoutNd) and part.p > 0)


def _key(outputs: Any) -> Any:
    """Where the first tensor of a dictionary or sequence is."""
    return next(iter(outputs), 0) if isinstance(outputs, dict) else 0


class _Differentiable(TorchFunctionMode):
    """Run a module in operations that have all derivatives and can be batched.

    Fused attention has no forward mode, and recurrent kernels have neither that nor a batching
    rule; compiled code may hold either. The second derivatives that torch gives of the JVPs of
    layer and instance normalisation are wrong, so these are written out, too. Modules of torch
    take no other fused path under a mode.
    """

    def __enter__(self) -> _Differentiable:
        self._contexts = contextlib.ExitStack()
        self._contexts.enter_context(sdpa_kernel(SDPBackend.MATH))
        self._contexts.enter_context(torch.compiler.set_stance("force_eager"))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._contexts.close()

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function in _CELLS:
            inputs, state, *weights = args
            single = isinstance(state, Tensor)
            after = _CELLS[function](inputs, (state,) if single else state, *weights)
            return after[0] if single else after
        if function in _SEQUENCES:
            return _unrolled(_SEQUENCES[function], *args)
        return _NORMALIZATIONS.get(function, function)(*args, **(kwargs or {}))


def _normalized(x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    variance = wide.var(dims, correction=0, keepdim=True)
    return ((wide - wide.mean(dims, keepdim=True)) / (variance + eps).sqrt()).to(x.dtype)


def _layer_norm(
    x: Tensor,
    shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    _cudnn: bool = True,
) -> Tensor:
    y = _normalized(x, tuple(range(-len(shape), 0)), eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _instance_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not use_input_stats or running_mean is not None:
        return functional.instance_norm(
            x, running_mean, running_var, weight, bias, use_input_stats, momentum, eps
        )
    y = _normalized(x, tuple(range(2, x.dim())), eps)
    channels = (-1, *[1] * (x.dim() - 2))
    y = y if weight is None else y * weight.view(channels)
    return y if bias is None else y + bias.view(channels)


_NORMALIZATIONS: dict[Any, Callable[..., Tensor]] = {
    functional.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    functional.instance_norm: _instance_norm,
}


State = tuple[Tensor, ...]


def _lstm_cell(
    x: Tensor,
    state: State,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    w_hr: Tensor | None = None,
) -> State:
    hidden, cell = state
    gates = functional.linear(x, w_ih, b_ih) + functional.linear(hidden, w_hh, b_hh)
    i, f, g, o = gates.chunk(4, -1)
    cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
    hidden = o.sigmoid() * cell.tanh()
    return hidden if w_hr is None else functional.linear(hidden, w_hr), cell


def _gru_cell(
    x: Tensor,
    state: State,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> State:
    (hidden,) = state
    r, z, n = functional.linear(x, w_ih, b_ih).chunk(3, -1)
    hidden_r, hidden_z, hidden_n = functional.linear(hidden, w_hh, b_hh).chunk(3, -1)
    z = (z + hidden_z).sigmoid()
    n = (n + (r + hidden_r).sigmoid() * hidden_n).tanh()
    return ((1 - z) * n + z * hidden,)


def _rnn_cell(activation: Function) -> Callable[..., State]:
    def cell(
        x: Tensor,
        state: State,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None = None,
        b_hh: Tensor | None = None,
    ) -> State:
        sums = functional.linear(x, w_ih, b_ih) + functional.linear(state[0], w_hh, b_hh)
        return (activation(sums),)

    return cell


_CELLS: dict[Any, Callable[..., State]] = {
    torch.lstm_cell: _lstm_cell,
    torch.gru_cell: _gru_cell,
    torch.rnn_tanh_cell: _rnn_cell(torch.tanh),
    torch.rnn_relu_cell: _rnn_cell(torch.relu),
}
_SEQUENCES: dict[Any, Callable[..., State]] = {
    torch.lstm: _lstm_cell,
    torch.gru: _gru_cell,
    torch.rnn_tanh: _rnn_cell(torch.tanh),
    torch.rnn_relu: _rnn_cell(torch.relu),
}


def _unrolled(
    cell: Callable[..., State],
    inputs: Tensor,
    state: Tensor | State,
    weights: Sequence[Tensor],
    biases: bool,
    layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
    batch_first: bool = False,
) -> State:
    """Run a recurrent layer cell by cell, with the arguments and outputs of torch's own."""
    if not isinstance(biases, bool):  # of packed sequences, all arguments come one later
        raise TypeError("module must not pack sequences: give one of full length")
    directions = 2 if bidirectional else 1
    size = len(weights) // (layers * directions)
    states = (state,) if isinstance(state, Tensor) else state
    time = 1 if batch_first else 0
    rows, last = list(inputs.unbind(time)), []
    for layer in range(layers):
        if layer and training and dropout:
            rows = [functional.dropout(row, dropout) for row in rows]
        ways = []
        for backward in range(directions):
            index = layer * directions + backward
            parts: list[Tensor | None] = list(weights[index * size : (index + 1) * size])
            if not biases:
                parts[2:2] = [None, None]
            now, outputs = tuple(part[index] for part in states), []
            for row in reversed(rows) if backward else rows:
                now = cell(row, now, *parts)
                outputs.append(now[0])
            ways.append(outputs[::-1] if backward else outputs)
            last.append(now)
        rows = [torch.cat(pair, -1) for pair in zip(*ways, strict=True)]
    return (torch.stack(rows, time), *(torch.stack(part) for part in zip(*last, strict=True)))


def _integer(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None


def _chunk(name: str, value: Any) -> int | None:
    if value is None:
        return None
    number = _integer(name, value)
    if number < 1:
        raise ValueError(f"{name} must be at least 1, got {number}")
    return number


def _check_tensor(name: str, value: Tensor, dim: int = 0) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        hint = ": call torch.from_numpy" if isinstance(value, np.ndarray) else ""
        raise TypeError(f"{name} must be a floating-point tensor, got {got}{hint}")
    if value.dim() < dim or value.numel() == 0:
        raise ValueError(
            f"{name} must be non-empty with at least {dim} dimensions, "
            f"got shape {tuple(value.shape)}"
        )
    try:
        finite = bool(value.isfinite().all())
    except RuntimeError:  # inside torch.func.vmap values cannot decide; shapes still do
        return
    if not finite:
        raise ValueError(f"{name} must be finite, got NaN or infinite entries")


def _check_batch(inputs: Tensor) -> None:
    _check_tensor("inputs", inputs, dim=1)


def _check_vector(name: str, value: Tensor, shape: torch.Size, inputs: Tensor) -> None:
    _check_tensor(name, value)
    if value.shape != shape or value.dtype != inputs.dtype:
        raise ValueError(
            f"{name} must have shape {tuple(shape)} and dtype {inputs.dtype}, "
            f"got {tuple(value.shape)} and {value.dtype}"
        )

"""Plant faults in a copy of the library, one at a time, and see the tests catch each.

A suite that passes says nothing until it has been seen to fail. Each fault below is a slip that
somebody could make: a wrong sign, a lost factor, a bound taken from below, a state that leaks.

    python tools/planted_faults.py            # all
    python tools/planted_faults.py polar qr   # those whose name contains one of the words
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import hypothesis.extra.numpy
import ot
import pytest
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
OPENED = (hypothesis, ot, torch)  # here, once for all runs
TIMES = ROOT / "_build" / "test-times.json"
OUTPUT = "output.txt"  # of the tests, in the copied tree


class Fault(NamedTuple):
    """A line of a module as it is, as it should not be, and what is then wrong."""

    module: str
    right: str
    wrong: str
    consequence: str
    tests: str = ""  # whose tests see it, if not those of the module's own name


FAULTS = (
    Fault(
        "_processes",
        "return [shares[k % self.size][k // self.size] for k in range(len(parts))]",
        "return [result for share in shares for result in share]",
        "results of several processes come in the order of the processes",
        tests="processes",
    ),
    Fault(
        "_processes",
        "if there != first[name]:",
        "if len(there) != len(first[name]):",
        "processes may certify different data",
        tests="processes",
    ),
    Fault(
        "layers/joins",
        "return rounded(first * second, 1, dtype, p, first + second)",
        "return rounded(0 * first * second, 1, dtype, p, first + second)",
        "a product rounds nothing",
        tests="rounding",
    ),
    Fault(
        "rounding",
        "error = ((joined + own) * (1 + 2.0**-40)).nan_to_num(math.inf, posinf=math.inf)",
        "error = (joined + 0 * own).nan_to_num(math.inf, posinf=math.inf)",
        "errors on a set forget the rounding of each layer",
    ),
    Fault(
        "layers/normalization",
        "known = _Moments((m + reach) * _UP, (sigma + reach) * _UP, s * 7 / 8 / _UP)",
        "known = _Moments(0 * m, 0 * sigma, s)",
        "a constant group has no error",
        tests="rounding",
    ),
    Fault(
        "errors",
        "if torch.backends.cudnn.enabled:",
        "if False:",
        "convolutions on a GPU may go by Winograd's algorithm",
        tests="cuda",
    ),
    Fault(
        "errors",
        "if found != value:",
        "if False:",
        "products on a GPU may have factors of ten bits",
        tests="cuda",
    ),
    Fault(
        "errors",
        "gamma = _gamma(self.terms + 2, working) if not half else",
        "gamma = _gamma(2, working) if not half else",
        "a sum on a GPU is rounded twice",
        tests="cuda",
    ),
    Fault(
        "rounding",
        "        cudnn.enabled = enabled",
        "        cudnn.enabled = False",
        "the settings of a GPU do not come back",
        tests="cuda",
    ),
    Fault(
        "robustness/lipschitz",
        "return value.detach().clone() if copied else value.detach()",
        "return value.detach()",
        "a prepared network certifies weights of the past",
        tests="robustness",
    ),
    Fault(
        "layers/softmax",
        "return 2 * _ELEMENTARY + 2 * math.log(n) + n + 12",
        "return 0.1",
        "an exponential is exact",
        tests="rounding",
    ),
    Fault(
        "layers/attention",
        "return torch.where(fits, logits + 1.02 * relative, math.inf)",
        "return 0.0 * logits",
        "an average rounds nothing",
        tests="rounding",
    ),
    Fault(
        "layers/recurrence",
        "wrong = (error @ weight.mT + gamma * inside) * _UP + tiny * (1 + values.amax())",
        "wrong = tiny * (1 + values.amax()) + 0 * inside",
        "gates have no error",
        tests="rounding",
    ),
    Fault(
        "robustness/lipschitz",
        "lost = torch.where(norms > 0, 2 * norms * error[:, None] * _UP, 0.0)",
        "lost = torch.zeros_like(norms)",
        "a certificate on a domain forgets the errors there",
    ),
    Fault(
        "layers/resampling",
        "any(min(pair) < 0 < max(pair) for pair in pairs)",
        "any(max(pair) < 0 for pair in pairs)",
        "circular padding of uninitialised memory is bounded",
        tests="composition",
    ),
    Fault(
        "composition/reading",
        "direct = [times(f, total[j]) for j, f in zip(parts, factors, strict=True)]",
        "direct = [times(f, total[j]) for j, f in zip(parts[:1], factors[:1], strict=True)]",
        "the walk forgets the skip",
        tests="graphs",
    ),
    Fault(
        "composition/reading",
        "if sources in slices or not any(sources & other for other in slices):",
        "if True:",
        "slices that overlap count as disjoint",
        tests="graphs",
    ),
    Fault(
        "composition/reading",
        "(a * b).clamp(min=tiny)",
        "a * b",
        "a product of constants underflows to no bound",
        tests="rounding",
    ),
    Fault(
        "composition/local",
        "pending[j] = _plus(pending[j], part) if j in pending else part",
        "pending[j] = part",
        "rows of a Jacobian forget a branch",
        tests="domains",
    ),
    Fault(
        "layers/joins",
        "return [second, first]",
        "return [first, first]",
        "a product is steep in its second factor only",
        tests="domains",
    ),
    Fault(
        "layers/rearrangements",
        "copies = int(torch.bincount(read).max()) if len(read) else 0",
        "copies = 1",
        "entries that are copied do not stretch",
        tests="graphs",
    ),
    Fault(
        "rules",
        "slack = 2 * gamma * size",
        "slack = -reach",
        "a range is a point",
        tests="domains",
    ),
    Fault(
        "errors",
        "off = max((abs(a - b) for a, b in zip(limits, rounded, strict=True)), default=0.0)",
        "off = 0.0",
        "the number that an entry is clipped to is not rounded",
        tests="checks",
    ),
    Fault(
        "activations",
        "x.unflatten(dim, (2, -1)), dim, descending=True)",
        "x.unflatten(dim, (2, -1)), dim)",
        "the halves of MaxMin change places",
    ),
    Fault(
        "activations",
        "return _Exchange.apply(gradient, *ctx.saved_tensors, ctx.dim), None, None",
        "return gradient, None, None",
        "gradients do not follow the pairs that change places",
    ),
    Fault(
        "activations",
        "groups.sort(dim + 1).values",
        "groups.sort(dim + 1, descending=True).values",
        "GroupSort sorts the other way",
    ),
    Fault(
        "activations",
        "bits = x.sgn().view(integers)",
        "bits = x.view(integers)",
        "the gradient of the absolute value changes its sign at minus zero",
    ),
    Fault(
        "activations",
        "lower = sine * first - cosine * second",
        "lower = cosine * second - sine * first",
        "a reflection that is none",
    ),
    Fault(
        "activations",
        "turns = torch.stack((theta + 2 * a, 2 * b, theta))",
        "turns = torch.stack((theta + 2 * a, b, theta))",
        "sectors of the plane that do not meet",
    ),
    Fault(
        "activations",
        "_signed(middle, a + b > math.pi)",
        "-middle",
        "a sector that ends at the wrong side",
    ),
    Fault(
        "activations",
        "signs * angles, ctx.axis",
        "angles, ctx.axis",
        "gradients that are turned the same way as the pairs",
    ),
    Fault(
        "activations",
        "return x.sub(x.clamp(low, high), alpha=2)",
        "return x.sub(x.clamp(low, high), alpha=1)",
        "a zigzag that is flat between its kinks",
    ),
    Fault(
        "activations",
        "torch.stack((theta, second, 2 * b))",
        "torch.stack((theta, second, b))",
        "the constant of a sector in the norms 1 and ∞ is that of another angle",
    ),
    Fault(
        "activations",
        "_closed_form(module, example, p), p, 180, more)",
        "_closed_form(module, example, p), p, 0, 0.0)",
        "four sectors that round nothing",
        tests="rounding",
    ),
    Fault(
        "composition/spectrum",
        "if any(n != m * s for n, m, s in zip(long, short, layer.stride, strict=True)):",
        "if False:",
        "a cut circle is taken for a whole one",
        tests="spectrum",
    ),
    Fault(
        "convolutions/starts",
        "behind = turns[:number].count(axis) % 2",
        "behind = number % 2",
        "a kernel of one tap has several",
        tests="starts",
    ),
    Fault(
        "orthogonal/iterations",
        "math.comb(2 * j, j) / 4**j",
        "math.comb(2 * j, j) / 2**j",
        "coefficients of Björck's polynomial",
    ),
    Fault(
        "orthogonal/iterations",
        "order < 1 or order % 2 == 0",
        "order < 1",
        "even orders of Björck's iteration are accepted",
    ),
    Fault(
        "orthogonal/orthonormality",
        "norm = torch.minimum(gram.abs().sum(-1).amax(-1), torch.linalg.matrix_norm(gram))",
        "norm = gram.abs().amax((-2, -1))",
        "the scale of an iteration is no upper bound",
    ),
    Fault(
        "orthogonal/factorisations",
        "triangle.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)",
        "triangle.diagonal(dim1=-2, dim2=-1) < 0, 1.0, 1.0)",
        "the signs of QR",
    ),
    Fault(
        "orthogonal/factorisations",
        "add_to_diagonal(lower + lower.mT, -lower.diagonal(dim1=-2, dim2=-1))",
        "lower + lower.mT",
        "the gradient of QR counts the diagonal twice",
    ),
    Fault(
        "orthogonal/iterations",
        "adjoint = apply(_SymmetricSolve, matrix, gradient, ctx.sylvester)",
        "adjoint = gradient",
        "second derivatives of the polar factor",
    ),
    Fault(
        "orthogonal/rotations",
        "return factor.to(dtype) if double else polish(factor)",
        "return factor.to(dtype)",
        "a Cayley transform in float64 far from its base is not polished",
    ),
    Fault(
        "orthogonal/rotations",
        "skew, below = _limited(skew, limit), _limited(below, math.sqrt(limit))",
        "skew, below = skew * 1, below * 1",
        "a huge argument of the Cayley transform is not scaled back",
    ),
    Fault(
        "orthogonal/reflections",
        "coefficients = 2 / vectors.square().sum(-2)",
        "coefficients = 2 / (vectors.square().sum(-2) + 1)",
        "projections in place of reflections",
    ),
    Fault(
        "orthogonal/bounded",
        "return scaled / square.clamp(min=scale**-2).sqrt()",
        "return scaled / square.sqrt()",
        "small matrices are scaled up to norm 1",
    ),
    Fault(
        "orthogonal/bounded",
        "inside = magnitude.sum(-1, keepdim=True) <= 1",
        "inside = magnitude.sum(-1, keepdim=True) < 0",
        "rows inside the ball are moved to the sphere",
    ),
    Fault(
        "orthogonal/orthonormality",
        "    if exact.is_meta or excess <= tolerance:\n",
        "    if True:\n",
        "a weight that is not orthonormal is accepted in silence",
    ),
    Fault(
        "convolutions/block_convolution",
        "product = torch.bmm(kernel.view(low.shape).mT, high)",
        "product = torch.bmm(kernel.view(low.shape).mT, low)",
        "the gradient of a reflection",
    ),
    Fault(
        "convolutions/block_convolution",
        "S.diagonal(dim1=-2, dim2=-1).sub_(1)",
        "S.diagonal(dim1=-2, dim2=-1).sub_(0.5)",
        "a reflection that is none",
    ),
    Fault(
        "convolutions/block_convolution",
        "of_reflections + of_reflections.mT",
        "of_reflections",
        "the gradient of a symmetric reflection is not symmetrised",
    ),
    Fault(
        "convolutions/nonexpansive",
        "return (kernel / math.sqrt(overlap)).to(weight.dtype)",
        "return kernel.to(weight.dtype)",
        "RKO forgets how often a pixel is read",
    ),
    Fault(
        "convolutions/nonexpansive",
        "overlap = math.prod([-(-k * math.gcd(s, d) // s) for k, s, d in axes])",
        "overlap = math.prod([k // s for k, s, d in axes])",
        "RKO rounds the number of windows down",
    ),
    Fault(
        "convolutions/nonexpansive",
        "sums = gram.abs().sum((*range(",
        "sums = gram.sum((*range(",
        "AOL without absolute values",
    ),
    Fault(
        "convolutions/nonexpansive",
        "return scale * (bound * math.prod(kernel.shape[2:])).sqrt()",
        "return scale * bound.sqrt()",
        "a norm bound of the reshaped kernel alone",
    ),
    Fault(
        "convolutions/skew",
        "kernel = kernel / bounds.clamp(min=1)",
        "kernel = kernel / bounds.clamp(min=1, max=1)",
        "the skew kernel is not bounded",
    ),
    Fault(
        "convolutions/skew",
        "if terms < 4 or terms % 4:",
        "if terms < 1:",
        "series of the exponential that exceed norm 1",
    ),
    Fault(
        "convolutions/cayley",
        "inverse = torch.linalg.inv(system + V.mH @ V)",
        "inverse = torch.linalg.inv(system)",
        "the Cayley transform of a tall response",
    ),
    Fault(
        "convolutions/circular",
        "if padding_mode not in self._padding_modes:",
        'if padding_mode not in (*self._padding_modes, "reflect", "replicate"):',
        "padding that copies pixels is accepted",
    ),
    Fault(
        "convolutions/circular",
        "start, end = x.narrow(axis, 0, before), x.narrow(axis, size - after, after)",
        "start, end = x.narrow(axis, 1, before), x.narrow(axis, size - after - 1, after)",
        "symmetric padding that leaves the outermost pixel out",
    ),
    Fault(
        "freezing",
        "[weights[name] for name in twin._flat_weights_names]",
        "[*module._flat_weights]",
        "frozen recurrent layers forget the kernels of the original",
        tests="export",
    ),
    Fault(
        "freezing",
        "if type(frozen) not in _KEEPING:",
        "if type(frozen) in _KEEPING:",
        "frozen attention that takes another kernel",
        tests="export",
    ),
    Fault(
        "convolutions/circular",
        "for start, to, length in (0, inner - before, before), (before + inner, 0, after):",
        "for start, to, length in (0, 0, before), (before + inner, inner - after, after):",
        "circular folding to the wrong end",
    ),
    Fault(
        "convolutions/circular",
        'geometry |= {"p": dual_exponent(p)}',
        'geometry |= {"p": p}',
        "the bound of a transposed convolution in the wrong norm",
    ),
    Fault(
        "residual",
        "ratio = (others - log_q[:, None]).exp().clamp(max=torch.finfo(log_q.dtype).max)",
        "ratio = torch.ones_like(gram)",
        "q is dead, as in a peer",
    ),
    Fault(
        "residual",
        "return self.weight * (-2 / self.scale())",
        "return self.weight * (-4 / self.scale())",
        "a step twice too long",
    ),
    Fault(
        "residual",
        "torch.stack(parts).amax().square() * read",
        "torch.stack(parts).amax() * read",
        "CPL divides by the norm, not by its square",
    ),
    Fault(
        "residual",
        "max(1.0, 2 * excess - 1)",
        "1.0",
        "the rule trusts the theorem",
    ),
    Fault(
        "residual",
        "weight[self.out_features :] / scale",
        "weight[self.out_features :] * scale",
        "a sandwich layer whose scales do not cancel",
    ),
    Fault(
        "residual",
        "operator_norm(whole, p).item() ** 2 / 2 * _UP",
        "1.0",
        "the rule of a sandwich layer trusts the theorem",
    ),
    Fault(
        "residual",
        "return self.angle.cos(), self.angle.sin()",
        "return self.angle.cos(), 1 - self.angle.cos()",
        "parts beside each other lose norm",
    ),
    Fault(
        "convolutions/skew",
        "_on_channels(x, -weight,",
        "_on_channels(x, weight,",
        "a transposed skew layer that is no adjoint",
    ),
    Fault(
        "pooling",
        "squares = means * (pixels / overlap)",
        "squares = 0.25 * means * (pixels / overlap)",
        "norm pooling loses half the norm",
    ),
    Fault(
        "pooling",
        "math.inf: math.sqrt(pixels)}[p]",
        "math.inf: 1.0}[p]",
        "the ∞-norm constant of norm pooling",
    ),
    Fault(
        "pooling",
        "return means, math.prod(sizes), math.prod([-(-k // s) for k, s, _ in axes])",
        "return means, math.prod(sizes), 1",
        "windows that overlap and do not share",
    ),
    Fault(
        "pooling",
        "if any(n % s for n, s in zip(x.shape[2:], sizes, strict=True)):",
        "if False:",
        "windows that do not fit",
    ),
    Fault(
        "norms/responses",
        "left = left[_exceed(grams[left], level)]",
        "left = left[:0]",
        "the block of largest Frobenius norm is taken for the largest",
        "norms",
    ),
    Fault(
        "norms/responses",
        "waves[longest][1:] *= 2",
        "waves[longest][1:] *= 1",
        "half of the frequencies are lost where Gram matrices are interpolated",
        "norms",
    ),
    Fault(
        "norms/rigorous",
        "(level + _gram_bound(factor, gamma, rest) + hidden[some])",
        "(level + hidden[some])",
        "Cholesky's factor is believed",
        "rounding",
    ),
    Fault(
        "norms/rigorous",
        "scale = _scale(kernel.flatten(0, -2))",
        "scale = torch.tensor(1.0)",
        "squares of a small kernel underflow",
        "rounding",
    ),
    Fault(
        "errors",
        "before = _norms(x, p) + shift",
        "before = _norms(layer(x.clone()), p) + shift",
        "a cast overflows where its result would not",
        tests="rounding",
    ),
    Fault(
        "residual",
        "hidden = torch.finfo(dtype).max / 4 - absolute",
        "hidden = math.inf * torch.finfo(dtype).max - absolute",
        "hidden units overflow unseen",
        tests="rounding",
    ),
    Fault(
        "errors",
        "flushed = 2 * _quantum(x.dtype)",
        "flushed = 0 * _quantum(x.dtype)",
        "what a layer moves is flushed to zero",
        tests="rounding",
    ),
    Fault(
        "errors",
        "        second.lipschitz * first.lipschitz * _UP + _FLOOR,",
        "        second.lipschitz * first.lipschitz * _UP,",
        "a product of constants underflows to no bound",
        tests="rounding",
    ),
    Fault(
        "errors",
        "(second.lipschitz * first.error + second.error + second.slope * gap) * _UP",
        "(first.error + second.error + second.slope * gap) * _UP",
        "an error is not stretched by the layers above it",
        tests="rounding",
    ),
    Fault(
        "errors",
        "(second.lipschitz * first.slope + second.slope * stretch) * _UP",
        "second.lipschitz * first.slope * _UP",
        "the slope of the second layer is lost",
        tests="rounding",
    ),
    Fault(
        "norms/rigorous",
        "bound = (_gram_bound(image, gamma).sqrt() + lost) / (1 - defect).clamp(min=0).sqrt()",
        "bound = _gram_bound(image, gamma).sqrt() + lost",
        "the eigensolver is believed",
        "rounding",
    ),
    Fault(
        "errors",
        "        if half and not self.sums_in_half:",
        "        if False and not self.sums_in_half:",
        "the rounding of half-precision outputs is forgotten",
        tests="rounding",
    ),
    Fault(
        "layers/linear",
        "sums_in_half=module.transposed",
        "sums_in_half=False",
        "transposed convolutions sum in half precision",
        tests="rounding",
    ),
    Fault(
        "errors",
        "if torch.float64 not in (example.dtype, weight.dtype) and torch",
        "if False and torch",
        "autocast is overlooked",
        tests="rounding",
    ),
    Fault(
        "activations",
        "_closed_form(module, example, p), p, 32, 0.0)",
        "_closed_form(module, example, p), p, 0, 0.0)",
        "a reflection that rounds nothing",
        tests="rounding",
    ),
    Fault(
        "errors",
        "inside = inside + self.bias_norm  # ‖|A||x| + |b|‖",
        "inside = inside + 0.0",
        "the rounding of a bias is forgotten",
        tests="rounding",
    ),
    Fault(
        "robustness/lipschitz",
        "numerator = margins * _DOWN - 2 * off_by * _UP",
        "numerator = margins * _DOWN - off_by * _UP",
        "the error of the program at one end only",
    ),
    Fault(
        "robustness/lipschitz",
        "near = torch.minimum(near, self.room[:, None])",
        "near = near * 1.0",
        "overflow near the input is ignored",
    ),
    Fault(
        "robustness/certificate",
        "slopes = logits.new_full(logits.shape, 2 ** (1 / dual) * lipschitz)",
        "slopes = logits.new_full(logits.shape, 2 ** (1 / p) * lipschitz)",
        "the exponent for its dual in the margin's factor",
    ),
    Fault(
        "robustness/smoothing",
        "lower = special.betaincinv(successes, trials - successes + 1, alpha)",
        "lower = special.betaincinv(successes + 1, trials - successes, alpha)",
        "not the lower end of the interval of Clopper and Pearson",
    ),
    Fault(
        "robustness/lipschitz",
        "model = nn.Sequential(preprocess, unwrapped(model))\n",
        "lipschitz_bound(preprocess, input_shape, p)\n",
        "preprocessing is left out of the bound",
    ),
    Fault(
        "robustness/standardize",
        "1 / module.std.double().min().item()",
        "1 / module.std.double().max().item()",
        "the largest deviation for the smallest",
    ),
    Fault(
        "robustness/certificate",
        "functional.pad(outputs, (1, 0))",
        "functional.pad(outputs, (0, 1))",
        "the classes of one output change places",
    ),
    Fault(
        "robustness/lipschitz",
        "_enlarged(self.domain, radius, self.shape, self.p)",
        "_enlarged(self.domain, 0.0, self.shape, self.p)",
        "neighbours outside the domain are forgotten",
    ),
    Fault(
        "robustness/lipschitz",
        "torch.maximum(old, torch.minimum(new, width).clamp(min=0))",
        "torch.maximum(old, new.clamp(min=0))",
        "a radius reaches beyond the set on which its bound holds",
    ),
    Fault(
        "robustness/lipschitz",
        "known[some] = torch.where(fits[:, None], known[some], bound)",
        "known[some] = bound",
        "a bound on a ball is used on larger ones",
    ),
    Fault(
        "robustness/lipschitz",
        "inside = bool((distance <= domain.radius * (1 + 2.0**-42)).all())",
        "inside = True",
        "corners of the box around a ball count as in the ball",
    ),
    Fault(
        "robustness/lipschitz",
        'if sound and _autocast_name("cpu") is not None:',
        "if False:",
        "local bounds of weights that autocast rounds",
    ),
    Fault(
        "attacks",
        "return torch.where(over, torch.nextafter(moved, inputs), moved)",
        "return moved",
        "an attack leaves its ball by rounding",
    ),
    Fault(
        "interpretability",
        "return own - logits.scatter(1, labels[:, None], -math.inf).amax(1)",
        "return own - logits.amax(1)",
        "the largest logit counts as its own rival",
    ),
    Fault(
        "interpretability",
        "(math.sqrt(n) - 1)).clamp(0, 1)",
        "math.sqrt(n)).clamp(0, 1)",
        "a sparsity that never reaches 1",
    ),
    Fault(
        "interpretability",
        "radius = certified_radius(_outputs(model, inputs.detach()), labels, lipschitz)",
        "radius = certified_radius(_outputs(model, inputs.detach()), labels)",
        "a walk in units of a radius that is not certified",
    ),
    Fault(
        "losses/margins",
        "excess = (margin - logits.gather(1, classes[:, None]) + logits).clamp(min=0)",
        "excess = (margin + logits.gather(1, classes[:, None]) - logits).clamp(min=0)",
        "the margin is asked of the other classes",
    ),
    Fault(
        "losses/entropies",
        """cross_entropy(scaled, classes, reduction="none")

    return temperature * _reduced(""",
        """cross_entropy(scaled, classes, reduction="none")

    return _reduced(""",
        "the temperature does not scale the loss",
    ),
    Fault(
        "losses/entropies",
        "low = -temperature * functional.logsigmoid((-outputs - offset) / temperature)",
        "low = -temperature * functional.logsigmoid((-outputs + offset) / temperature)",
        "the offset of a binary loss has the wrong sign for one class",
    ),
    Fault(
        "losses/entropies",
        "gained = margins.detach().clamp(min=0).minimum(radius * reach.detach())",
        "gained = margins.detach().clamp(min=0).maximum(radius * reach.detach())",
        "an attack gains more than a tie",
    ),
    Fault(
        "losses/entropies",
        "gained = margins.detach().clamp(min=0)",
        "gained = margins.clamp(min=0)",
        "the gradient sees the radii of EMMA",
    ),
    Fault(
        "losses/entropies",
        "gained = gained + radii * (reach - reach.detach())",
        "pass",
        "the head gets no gradient of the slopes",
    ),
    Fault(
        "losses/entropies",
        "torch.where(some, (-torch.expm1(-safe)) ** beta * safe, 0.0)",
        "torch.where(some, torch.exp(-beta * safe) * safe, 0.0)",
        "annealing lets go of lost samples",
    ),
    Fault(
        "losses/kantorovich",
        "weights = (_others(logits, classes) / temperature).softmax(1)",
        "weights = (logits / temperature).softmax(1)",
        "the true class has a share among the others",
    ),
    Fault(
        "losses/kantorovich",
        "hinges = (margin - own).clamp(min=0) + (margin + others).clamp(min=0)",
        "hinges = (2 * margin - own + others).clamp(min=0)",
        "a hinge on the margin in place of both sides",
    ),
    Fault(
        "losses/kantorovich",
        "samples = samples / samples.mean()",
        "samples = samples * 1",
        "weights of classes scale the hinge",
    ),
    Fault(
        "losses/margins",
        "return torch.stack([torch.linalg.vector_norm(row - head, dual, dim=1) for row in head])",
        "return torch.stack([torch.linalg.vector_norm(row - head, p, dim=1) for row in head])",
        "pairs of rows in the norm of the inputs",
    ),
    Fault(
        "losses/kantorovich",
        "parts = alpha * hinge.mean(0) - gaps * both",
        "parts = alpha * hinge.mean(0) + gaps * both",
        "the sign of the Kantorovich-Rubinstein part",
    ),
    Fault(
        "losses/margins",
        'return functional.cross_entropy(logits, classes, reduction="none") - weight * radius',
        'return functional.cross_entropy(logits, classes, reduction="none") + weight * radius',
        "radius is punished",
    ),
    Fault(
        "lab/training",
        "return slice(start, end), (end - start) * ranks / examples",
        "return slice(start, end), 1.0",
        "processes with unequal shares count alike",
    ),
    Fault(
        "lab/training",
        'torch.set_rng_state(state["random"].cpu())',
        "pass",
        "a resumed run draws other dropout masks",
    ),
    Fault(
        "lab/training",
        'self.descent.load_state_dict(state["optimizer"])',
        "pass",
        "a resumed run forgets its momentum",
    ),
    Fault(
        "lab/training",
        "if self.history.best_epoch == len(self.history.scores):",
        "if True:",
        "the last epoch is kept, not the best",
    ),
    Fault(
        "lab/training",
        "return order[validation:].sort().values, order[:validation].sort().values",
        "return order.sort().values, order[:validation].sort().values",
        "validation examples are trained on",
    ),
    Fault(
        "lab/descent",
        "tangent = n - low @ ((inner + inner.mT) / 2)",
        "tangent = n - low @ inner",
        "the step is not tangent to the orthonormal matrices in the usual metric",
    ),
    Fault(
        "lab/descent",
        "direction = average.lerp(gradient, 1 - mu)",
        "direction = average",
        "the momentum does not look ahead",
    ),
    Fault(
        "lab/descent",
        "wide = weight.shape[-2] < weight.shape[-1]",
        "wide = False",
        "matrices with more columns than rows leave the manifold",
    ),
    Fault(
        "lab/descent",
        "(3.7418, -5.5913, 2.3037)",
        "(3.7418, -5.5913, 2.8037)",
        "a slip in a coefficient of the matrix sign",
    ),
    Fault(
        "lab/descent",
        'weight.sub_(direction, alpha=group["lr"] * group["vector_lr"])',
        'weight.sub_(direction, alpha=group["lr"])',
        "biases have the rate of matrices",
    ),
    Fault(
        "cli",
        "sound=not chosen.real",
        "sound=chosen.real",
        "the command certifies in real arithmetic unless told to",
    ),
    Fault(
        "cli",
        "return images[:count], labels[:count]",
        "return images, labels",
        "the command certifies all inputs",
    ),
    Fault(
        "cli",
        "        if target.exists():\n",
        "        if False:\n",
        "notebooks that a reader has changed are overwritten",
    ),
    Fault(
        "cli",
        "return networks.load(name), networks.norm(name)",
        "return networks.load(name), 2.0",
        "a network for the ∞-norm is certified in the 2-norm",
    ),
    Fault(
        "activations",
        "        return inputs, places[inputs]",
        "        return inputs, inputs",
        "the maxima of MaxMin's halves stand for the minima",
        tests="tightness",
    ),
    Fault(
        "units",
        "            group[own[1:]] = own[1]\n",
        "",
        "GroupSort of k > 2 gets a multiplier for each unit",
        tests="tightness",
    ),
    Fault(
        "units",
        "normals = (block[:, others] - block[:, [i]]).mT",
        "normals = (block[:, [i]] - block[:, others]).mT",
        "a sort gives the least entry the place of the largest",
        tests="tightness",
    ),
    Fault(
        "units",
        "matrix = torch.outer(block[:, last], block[:, w]) / (1 - 1 / k)",
        "matrix = torch.outer(block[:, last], block[:, w])",
        "a maximum keeps less than its largest entry",
        tests="tightness",
    ),
    Fault(
        "tightness/reading",
        "    return value * (1 + 8 * EPS) + steepest * mixed * (arithmetic + folded)",
        "    return value",
        "the allowance for rounded weights is lost",
    ),
    Fault(
        "tightness/reading",
        "error = norm * seen.error + gamma * _size(affine.absolute(seen.matrix.abs()))",
        "error = gamma * _size(matrix)",
        "what cancels in a folded matrix leaves no error",
    ),
    Fault(
        "tightness/reading",
        "behind = None if units is None else units.behind",
        "behind = None if units is None or units.before is None else units.before.mT",
        "a maximum is followed by the whole sort",
    ),
    Fault(
        "tightness/products",
        "    if p == 1:  # column sums",
        "    if p == 0:  # column sums",
        "row sums stand in for column sums behind sorts",
    ),
    Fault(
        "tightness/products",
        "start = segment if i == 0 else segment * roots[i - 1]",
        "start = segment",
        "the averaged bound forgets the root of a slope at a cut",
    ),
    Fault(
        "tightness/seqlip",
        "u * (s if k == 0 else s.sqrt())",
        "u * s.sqrt()",
        "SeqLip loses half of the first singular values",
    ),
    Fault(
        "tightness/seqlip",
        "itertools.product((-1.0, 1.0), repeat=len(free))",
        "itertools.product((0.0, 1.0), repeat=len(free))",
        "SeqLip misses half of the vertices",
    ),
    Fault(
        "tightness/eclipse",
        "    return form + 2 * s * torch.eye",
        "    return form - 2 * s * torch.eye",
        "the form that is proved is lowered, not raised",
    ),
    Fault(
        "tightness/eclipse",
        "            t = (1 + 1e-8 * (chain.center[k] == 0)) * chain.shape(k) * top",
        "            t = 2 * chain.shape(k) * top",
        "the multipliers of eclipse are not the best ones",
    ),
    Fault(
        "tightness/eclipse",
        "        return radius * (radius + center.abs())",
        "        return radius * radius",
        "the multipliers of eclipse forget the centers",
    ),
    Fault(
        "tightness/eclipse",
        "    form = outer + torch",
        "    form = 0.9 * outer + torch",
        "a form that proves nothing, mended by the certificate",
    ),
    Fault(
        "tightness/semidefinite",
        "columns.append(chain.group[k][on].unique(return_inverse=True)[1])",
        "columns.append(torch.zeros(len(on), dtype=torch.int64))",
        "LipSDP has one multiplier a layer",
    ),
    Fault(
        "tightness/exact",
        "            tail = tail * layer.steepest @ layer.together\n",
        "",
        "the search prunes as if no slope were above 1",
    ),
    Fault(
        "tightness/exact",
        "if width > self.thin else None",
        "if width > -self.thin else None",
        "regions without interior count",
    ),
    Fault(
        "tightness/exact",
        "        if value > max(0.1 * region.width, 1e-4):",
        "        if value > -1.0:",
        "regions are kept without a look whether they are empty",
    ),
    Fault(
        "tightness/local",
        "torch.linalg.vector_norm(weight, dual_exponent(p), dim=1)",
        "torch.linalg.vector_norm(weight, p, dim=1)",
        "the reach of a ball is taken in its own norm",
    ),
    Fault(
        "tightness/local",
        "torch.maximum(units.low, ends[0]), torch.minimum(units.high, ends[1])",
        "units.low, torch.minimum(units.high, ends[0])",
        "the least slope of tanh is taken for the largest",
    ),
    Fault(
        "units",
        "values = self(torch.cat((low[None], inside, high[None])))",
        "values = self(torch.cat((low[None], high[None])))",
        "the image of an interval across a kink misses the value there",
        tests="tightness",
    ),
    Fault(
        "tightness/local",
        "layer.steepest[:, None] * error + layer.radius[:, None] * jacobian.abs()",
        "layer.radius[:, None] * jacobian.abs()",
        "errors of Jacobians do not add up",
    ),
    Fault(
        "generalization",
        "return torch.linalg.vector_norm(weight, dim=1)",
        "return torch.linalg.vector_norm(weight, dim=0)",
        "columns of a matrix in place of rows",
    ),
    Fault(
        "generalization",
        "return rows.repeat_interleave(math.prod(positions))",
        "return rows",
        "a kernel counts once and not at each pixel",
    ),
    Fault(
        "generalization",
        "return math.fsum(terms) ** (1 / power)",
        "return math.fsum(terms)",
        "the outer power of the complexity is lost",
    ),
    Fault(
        "generalization",
        "norms, distances = ([q**k for k in powers] for powers in ups)",
        "norms, distances = ([q ** (k - 1) for k in powers] for powers in ups)",
        "norms of a class rounded down",
    ),
    Fault(
        "generalization",
        "bound(math.floor(math.log(gamma) / step))",
        "bound(math.ceil(math.log(gamma) / step))",
        "a margin rounded up",
    ),
    Fault(
        "generalization",
        "return found / (complexity.value * data_norm / len(found))",
        "return found / (complexity.value * data_norm)",
        "normalised margins without n",
    ),
    Fault(
        "conversion/conversion",
        "seen = (0,) if isinstance(layer, Average) else place",
        "seen = place",
        "an average counts as a sum of its parts, and what it is joined to is divided by too much",
    ),
    Fault(
        "conversion/conversion",
        "scaled = ScaledJoin(layer, 1 / value.item())",
        "scaled = ScaledJoin(layer, 1 / math.sqrt(value.item()))",
        "a concatenation of branches that share their input keeps a constant above 1",
    ),
    Fault(
        "conversion/conversion",
        "shares[skip] = signs[skip] * (1 - (len(sources) - 1) / count)",
        "shares[skip] = signs[skip] / count",
        "the skips of a deep network begin at one half",
    ),
    Fault(
        "conversion/conversion",
        "if not self._hold(self.originals[term.path], diagonal.factor):",
        "if True:",
        "a branch behind a learnt factor that begins at 0 is left out",
    ),
    Fault(
        "conversion/conversion",
        "taken = self.layers.keys() | (set() if self._is_module(node) else self.originals.keys())",
        "taken = self.layers.keys()",
        "an operation takes the name of a module",
    ),
    Fault(
        "conversion/replacements",
        "scaled = nn.Sequential(copy.deepcopy(old), Scale(1 / value))",
        "scaled = nn.Sequential(copy.deepcopy(old), Scale(value))",
        "what is above 1 is multiplied by its constant",
    ),
    Fault(
        "conversion/replacements",
        "new.weight = polar(weight.double()).to(weight.dtype)",
        "new.weight = torch.linalg.qr(weight.double().mT)[0].mT.to(weight.dtype)",
        "kept matrices are orthonormal, and not the nearest",
    ),
    Fault(
        "conversion/modules",
        "parts = self.logits.softmax(0).unbind()",
        "parts = self.logits.exp().unbind()",
        "weights of an average add up to 1 at the beginning only",
    ),
)


@contextlib.contextmanager
def copied_tree() -> Iterator[Path]:
    """Copy the library and its tests to where a line may be wrong, beside the chapters."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        for name in ("lipbook", "tests"):
            without = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, tree / name, ignore=without)
        for name in ("pyproject.toml", "_toc.yml"):
            shutil.copy(ROOT / name, tree)
        (tree / "book").symlink_to(ROOT / "book")
        yield tree


@contextlib.contextmanager
def rewritten(path: Path, text: str) -> Iterator[None]:
    """Give a file another text, and afterwards its own."""
    right = path.read_text()
    path.write_text(text)
    try:
        yield
    finally:
        path.write_text(right)


class Quickest:
    """Plugin of pytest: runs the quickest tests first, once it is known how long they take."""

    def __init__(self) -> None:
        self.times = json.loads(TIMES.read_text()) if TIMES.exists() else {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Sort the tests."""
        items.sort(key=lambda item: self.times.get(item.nodeid, 0.0))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note how long one took that passed."""
        if report.when == "call" and report.passed:
            self.times.setdefault(report.nodeid, report.duration)

    def pytest_sessionfinish(self) -> None:
        """Remember the times."""
        TIMES.parent.mkdir(exist_ok=True)
        TIMES.write_text(json.dumps(self.times))


def run_tests(
    tree: Path, tests: Iterable[str], limit: int | None = None, plugins: Iterable[object] = ()
) -> int:
    """Run tests of a copied tree until one fails; negative beyond a limit of seconds of a CPU.

    Each run is a fork of this process, in which what takes long to import is open already.
    """

    def run() -> None:
        os.chdir(tree)
        os.environ["PYTHONPATH"] = sys.path[0] = str(tree)
        torch.set_num_threads(1)
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 9))
        with open(OUTPUT, "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        opened = ("-W", "ignore::pytest.PytestAssertRewriteWarning")
        unused = ("-p", "no:cacheprovider", "-p", "no:nbval", "-p", "no:xdist")
        sys.exit(
            pytest.main(["-q", "-x", *opened, *unused, *tests], plugins=[Quickest(), *plugins])
        )

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def caught(fault: Fault, tree: Path) -> bool:
    """Whether the module's tests fail with the fault planted in a copy of the tree."""
    path = tree / "lipbook" / f"{fault.module}.py"
    text = path.read_text()
    if text.count(fault.right) != 1:
        raise ValueError(
            f"a fault must name a text that occurs once in lipbook/{fault.module}.py, "
            f"{fault.right!r} occurs {text.count(fault.right)} times"
        )
    room, *rest = fault.module.split("/")  # the tests of the lab are those of its files
    tests = f"tests/test_{fault.tests or (rest[0] if room == 'lab' else room)}.py"
    with rewritten(path, text.replace(fault.right, fault.wrong)):
        code = run_tests(tree, [tests])
    if code not in (0, 1):  # pytest: passed, failed; anything else is no verdict
        raise RuntimeError(f"pytest gave no verdict on {fault}:\n{(tree / OUTPUT).read_text()}")
    return code == 1


def verdicts(faults: Iterable[Fault]) -> Iterator[tuple[Fault, bool]]:
    """Plant each fault in one temporary copy of the library and its tests."""
    with copied_tree() as tree:
        for fault in faults:
            yield fault, caught(fault, tree)


def main(arguments: list[str] | None = None) -> int:
    """Plant the chosen faults, list them, and return the number that went unseen."""
    parser = argparse.ArgumentParser(description="Plant faults and see the tests catch them.")
    parser.add_argument("words", nargs="*", help="only faults that mention one of these")
    words = parser.parse_args(arguments).words
    chosen = [fault for fault in FAULTS if not words or any(w in " ".join(fault) for w in words)]
    if not chosen:
        parser.error(f"words must occur in a fault, got {words}")
    unseen = 0
    for fault, seen in tqdm(verdicts(chosen), total=len(chosen), unit="fault", disable=None):
        unseen += not seen
        tqdm.write(f"{'caught' if seen else 'UNSEEN'}  {fault.module}: {fault.consequence}")
    print(f"{len(chosen) - unseen} of {len(chosen)} faults caught")
    return unseen


if __name__ == "__main__":
    sys.exit(min(main(), 1))

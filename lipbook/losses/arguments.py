"""What all losses share: checked arguments, weights of classes, reductions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from lipbook.norms.arguments import _got, _real

__all__ = []

Reduction = Literal["mean", "sum", "none"]


class _Loss(nn.Module):
    """A loss with weights of classes, which travel with the module, and a reduction."""

    class_weight: Tensor | None
    _shown: ClassVar[tuple[str, ...]]  # arguments in the text of the module

    def __init__(self, class_weight: Tensor | None, reduction: Reduction) -> None:
        super().__init__()
        _check_reduction(reduction)
        self.reduction: Reduction = reduction
        self.register_buffer("class_weight", _check_class_weight(class_weight))

    def _options(self) -> dict[str, Any]:
        return {"class_weight": self.class_weight, "reduction": self.reduction}

    def extra_repr(self) -> str:
        """Show the arguments."""
        values = [(name, getattr(self, name)) for name in self._shown]
        shown = ", ".join(f"{n}={v if isinstance(v, bool) else format(v, 'g')}" for n, v in values)
        if self.class_weight is not None:
            shown += f", class_weight={self.class_weight.tolist()}"
        return shown if self.reduction == "mean" else f"{shown}, reduction={self.reduction!r}"


def _reduced(
    loss: Callable[[Tensor], Tensor],
    labels: Tensor,
    logits: Tensor,
    class_weight: Tensor | None,
    reduction: Reduction,
) -> Tensor:
    """Weigh and reduce a loss of classes (batch,), at checked labels."""
    _check_reduction(reduction)
    weight = _check_class_weight(class_weight, logits, logits.shape[1])
    if labels.dim() == 1:
        values = loss(labels)
        share = None if weight is None else weight[labels]
        values = values if share is None else share * values
    else:
        classes = torch.arange(logits.shape[1], device=logits.device)
        every = torch.stack([loss(c.expand(len(logits))) for c in classes], 1)
        share = labels if weight is None else labels * weight
        values = (share * every).sum(1)
    if reduction == "none":
        return values
    if reduction == "sum":
        return values.sum()
    return values.mean() if weight is None or share is None else values.sum() / share.sum()


def _check_positive(name: str, value: float) -> None:
    _real(name, value)
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}")


def _check_not_negative(name: str, value: float) -> None:
    _real(name, value)
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be a finite number >= 0, got {value}")


def _check_reduction(reduction: str) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")


def _check_class_weight(
    weight: Tensor | None, logits: Tensor | None = None, classes: int | None = None
) -> Tensor | None:
    """Refuse what are no weights of the classes, and return them in the dtype of the logits."""
    if weight is None:
        return None
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise TypeError(f"class_weight must be a floating-point tensor, got {_got(weight)}")
    if weight.dim() != 1 or (classes is not None and len(weight) != classes):
        expected = "(classes,)" if classes is None else f"({classes},)"
        raise ValueError(f"class_weight must have shape {expected}, got {tuple(weight.shape)}")
    if not ((weight > 0) & weight.isfinite()).all():
        raise ValueError(f"class_weight must be positive and finite, got {weight.tolist()}")
    return weight if logits is None else weight.to(logits)


def _check(logits: Tensor, labels: Tensor) -> Tensor:
    """Refuse what is no batch of logits with a class for each, and return int64 or probabilities.

    Probabilities come in the dtype of the logits.
    """
    _check_tensors(logits, labels)
    shapes = (tuple(logits.shape), tuple(labels.shape))
    if logits.dim() != 2 or logits.shape[1] < 2 or shapes[1] not in (shapes[0][:1], shapes[0]):
        raise ValueError(
            "logits and labels must have shapes (batch, classes) and (batch,), or (batch, classes) "
            "for probabilities, with two classes or more, "
            f"got {shapes[0]} and {shapes[1]}"
        )
    if labels.dim() == 2:
        return _check_probabilities(labels).to(logits)
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(
            f"labels must be classes in int64 or another integer dtype, got {labels.dtype}: call "
            ".long()"
        )
    labels = labels.long()
    if not (labels.min() >= 0 and labels.max() < logits.shape[1]):
        raise ValueError(
            f"labels must be classes from 0 to {logits.shape[1] - 1}, "
            f"got {labels.min().item()} to {labels.max().item()}"
        )
    return labels


def _check_probabilities(labels: Tensor) -> Tensor:
    if labels.is_complex():
        raise TypeError(f"labels must be real, got {labels.dtype}")
    exact = labels.detach().double()
    rounding = 0.0
    if labels.is_floating_point():
        rounding = labels.shape[1] * torch.finfo(labels.dtype).eps
    # Sums may be off by the rounding of their terms and of the division that made them.
    if not ((exact >= 0).all() and ((exact.sum(1) - 1).abs() <= 2 * rounding).all()):
        raise ValueError(
            "labels of shape (batch, classes) must be rows of probabilities (divide multi-label "
            "rows by their sums, or use hinge_kr or offset_binary_cross_entropy, which take them "
            "as they are), got entries from "
            f"{exact.min().item():g} to {exact.max().item():g} and sums from "
            f"{exact.sum(1).min().item():g} to {exact.sum(1).max().item():g}"
        )
    return labels


def _check_binary(outputs: Tensor, labels: Tensor) -> Tensor:
    """Refuse what is no batch of numbers with a sign for each, and return the signs."""
    if outputs.dim() != 1 or labels.shape != outputs.shape:
        raise ValueError(
            "outputs (logits) and labels must have one shape (batch,), "
            f"got {tuple(outputs.shape)} and {tuple(labels.shape)}"
        )
    labels = labels if labels.is_floating_point() else labels.long()
    if not (labels.abs() == 1).all():
        raise ValueError(f"labels must be -1 or 1, got {labels.unique().tolist()}")
    return labels


def _check_targets(outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Refuse what is no batch of binary problems; return outputs and shares of class 1.

    Both are (batch, outputs), the shares in the dtype of the outputs.
    """
    _check_tensors(outputs, labels)
    shapes = (tuple(outputs.shape), tuple(labels.shape))
    if outputs.dim() == 2 and outputs.shape[1] > 1 and labels.dim() == 1:
        classes = _check(outputs, labels)
        return outputs, functional.one_hot(classes, outputs.shape[1]).to(outputs)
    one = outputs.dim() == 1 or outputs.shape[1:] == (1,)
    fitting = (shapes[0][:1], (*shapes[0][:1], 1)) if one else shapes[:1]
    if outputs.dim() not in (1, 2) or shapes[1] not in fitting:
        raise ValueError(
            "outputs (logits) and labels must have shapes (batch,) or (batch, 1) and (batch,), or "
            f"(batch, classes) for both, got {shapes[0]} and {shapes[1]}"
        )
    if labels.is_complex():
        raise TypeError(f"labels must be real, got {labels.dtype}")
    exact = labels.detach().double()
    signs = one and bool((exact.abs() == 1).all())
    if not (signs or ((exact >= 0) & (exact <= 1)).all()):
        expected = "-1 and 1, or probabilities" if one else "probabilities"
        raise ValueError(
            f"labels must be {expected} from 0 to 1, got entries from {exact.min().item():g} to "
            f"{exact.max().item():g}"
        )
    share = (exact + 1) / 2 if signs else exact
    columns = outputs.reshape(len(outputs), -1)
    return columns, share.reshape(len(outputs), -1).to(columns)


def _check_head(head: Tensor, logits: Tensor) -> Tensor:
    if not isinstance(head, Tensor) or not head.is_floating_point():
        raise TypeError(f"head must be a floating-point tensor, got {_got(head)}")
    if head.dim() != 2 or len(head) != logits.shape[1]:
        raise ValueError(
            f"head must have shape ({logits.shape[1]}, features), got {tuple(head.shape)}"
        )
    return head.to(logits)


def _check_tensors(outputs: Tensor, labels: Tensor) -> None:
    for name, tensor in (("logits", outputs), ("labels", labels)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {_got(tensor)}")
    if not outputs.is_floating_point():
        raise TypeError(f"logits must have a floating-point dtype, got {outputs.dtype}")
    if outputs.numel() == 0:
        raise ValueError(f"logits must not be empty, got shape {tuple(outputs.shape)}")

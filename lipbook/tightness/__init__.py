r"""How tight is a Lipschitz bound? Bounds of networks that see more than one layer at once.

The product bound multiplies the norms of the layers, as if the direction that one layer stretches
most were the one that the next layer stretches most, through activations that let it pass. The
methods here look at the whole network

.. math::
    f = W_L\, \varphi_{L-1}\big( W_{L-1} \cdots \varphi_1(W_1 x + b_1) \cdots + b_{L-1}\big) + b_L .

Two facts carry all of them. **Secants**: for any two inputs, the images differ by
:math:`W_L D_{L-1} W_{L-1} \cdots D_1 W_1 (x - y)` where each :math:`D_l` is diagonal with entries
between the least slope :math:`\alpha` and the largest slope :math:`\beta` of the activation.
**Centres**: :math:`D = C + R\,\Psi` with :math:`C = (\alpha+\beta)/2`,
:math:`R = (\beta-\alpha)/2` and :math:`\lVert\Psi\rVert \le 1`.

Sorts and maxima are no exception (Note [sorting] in ``lipbook.units``). A network is read as its
graph, as long as its activations lie on one chain: what is affine between two of them, with skips,
sums, slices, convolutions, normalisations and means, is multiplied out to one dense matrix of up to
16 million entries. A skip around an activation is refused. An activation answers with
:func:`~lipbook.units.units_rule`. One function reaches every method:
:func:`lipschitz_bound(module, input_shape, method=...) <lipbook.composition.lipschitz_bound>`.
"""

from lipbook.tightness.eclipse import eclipse_bound
from lipbook.tightness.exact import exact_constant
from lipbook.tightness.local import local_lipschitz_bound
from lipbook.tightness.products import absolute_bound, averaged_bound
from lipbook.tightness.semidefinite import lipsdp_bound, lipsdp_layer_bound
from lipbook.tightness.seqlip import seqlip_bound

__all__ = [
    "absolute_bound",
    "averaged_bound",
    "seqlip_bound",
    "lipsdp_bound",
    "lipsdp_layer_bound",
    "eclipse_bound",
    "exact_constant",
    "local_lipschitz_bound",
]

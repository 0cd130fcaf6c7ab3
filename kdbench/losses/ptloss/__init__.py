"""PTLoss: distillation with a perturbed KL divergence, its proxy teacher, and the choice of its coefficients.

Zhang et al., "Knowledge Distillation with Perturbed Loss: From a Vanilla Teacher to a Proxy Teacher", KDD 2024. No
code of it is public and the loss is rebuilt from descriptions. Ours: the proxy teacher as the minimiser of the
loss, its solver, Brier as the search's score, ranges and counts of the search, the combination with tau and the
labels' cross-entropy.
"""

from kdbench.losses.ptloss.functional import perturbed_kl
from kdbench.losses.ptloss.implicit import differentiable_proxy
from kdbench.losses.ptloss.loss import PTLoss
from kdbench.losses.ptloss.proxy import Proxy, proxy_teacher

__all__ = ["PTLoss", "Proxy", "differentiable_proxy", "perturbed_kl", "proxy_teacher"]

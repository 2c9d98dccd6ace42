"""Deep mutual learning: every network learns from every other network.

Source: Zhang, Xiang, Hospedales, Lu, arXiv 1706.00384, equations 5 to 8.
"""

from collections.abc import Mapping

from torch import Tensor

from bdkd.config import NetworkConfig
from bdkd.objectives.base import Logits, register_objective
from bdkd.objectives.one_sided import OneSidedObjective
from bdkd.objectives.options import MutualConfig


@register_objective("dml", MutualConfig)
class DML(OneSidedObjective):
    """Compute ``ce CE(x, y) + kd tau^2 mean over peers of KL(p_peer || p_x)`` for each network.

    The gradient does not flow into the peers. The role of a network determines its weights:
    ``student_ce`` and ``student_kd``, or ``teacher_ce`` and ``teacher_kd``.
    """

    def __init__(self, config: MutualConfig, networks: Mapping[str, NetworkConfig]) -> None:
        super().__init__(config, networks)
        self.need_several()
        self.losses = self.losses_by_role()

    def partners(self, logits: Logits, target: Tensor) -> dict[str, list[Tensor]]:
        return {name: [x for peer, x in logits.items() if peer != name] for name in logits}

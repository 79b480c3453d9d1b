"""Figures of one run, each a function of arrays that gives a `Figure`; `prefmix report` shows all of them on a page.

from prefmix.evaluation.figures import people_map
people_map(weights)      # shows itself in a notebook; .save("map.svg") writes a file
"""

from prefmix.evaluation.figures.canvas import Figure
from prefmix.evaluation.figures.experts import (
    Divergence,
    ExpertRows,
    expert_displacement,
    expert_divergence,
    expert_length,
    expert_rewards,
)
from prefmix.evaluation.figures.people import groups_matrix, people_map, people_plane, weights_by
from prefmix.evaluation.figures.quality import accuracy_by_way, new_people, reliability_diagram
from prefmix.evaluation.figures.training import (
    bound_over_training,
    certainty_over_training,
    group_losses_over_training,
    held_out_over_training,
    margins_over_training,
    usage_over_training,
)

__all__ = [
    "Divergence",
    "ExpertRows",
    "Figure",
    "accuracy_by_way",
    "bound_over_training",
    "certainty_over_training",
    "expert_displacement",
    "expert_divergence",
    "expert_length",
    "expert_rewards",
    "group_losses_over_training",
    "groups_matrix",
    "held_out_over_training",
    "margins_over_training",
    "new_people",
    "people_map",
    "people_plane",
    "reliability_diagram",
    "usage_over_training",
    "weights_by",
]

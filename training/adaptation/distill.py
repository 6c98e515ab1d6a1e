"""Distillation from a teacher to a student of the same (LP) or a smaller architecture, by features and relations.

Letters: N crops, B batch, D feature size, K clusters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from resight.encoder.model import Encoder, Views
from resight.training.adaptation.loss import distillation, relation, weigh_views

if TYPE_CHECKING:
    from resight.arrays import Floats
    from resight.training.adaptation.recipe import Recipe


@dataclass
class Teacher:
    """The frozen teacher of a student.

    Attributes:
        encoder: its weights never change.
        features: float32 (N, D), global features of all crops; None until they are needed for relations.
        anchors: float32 (K, D), centroids of this epoch's clusters, which relations are measured to.
    """

    encoder: Encoder
    features: Floats | None = None
    anchors: Tensor | None = None

    def views(self, images: Tensor) -> Views:
        """The teacher's views of a batch, without gradient."""
        with torch.no_grad():
            views: Views = self.encoder(images)
        return views

    def losses(self, features: Sequence[Tensor], targets: Sequence[Tensor], recipe: Recipe) -> dict[str, Tensor]:
        """Distillation losses, (B,) each, not yet weighted by the recipe.

        Args:
            features: the student's views in use, (B, D) unit rows.
            targets: the teacher's views of the same batch.
            recipe: its local_loss_weight weights the views.

        Returns:
            "guidance" (LP, section 3.6, D_v on every view) and, if there are anchors, "relation".
        """
        distances = [distillation(view, target) for view, target in zip(features, targets, strict=False)]
        terms = {"guidance": weigh_views(distances, recipe.local_loss_weight)}
        if self.anchors is not None:
            student, teacher = (side[0].float() @ self.anchors.T for side in (features, targets))
            terms["relation"] = relation(student, teacher, temperature=recipe.temperature)
        return terms


def fit_student(student: Encoder, teacher: Encoder) -> Encoder:
    """A copy of the student with the teacher's input size, parts and feature length.

    The backbone keeps its weights. Heads keep theirs if the shapes match; otherwise they are initialised with a fixed
    seed and learn the teacher's feature space by distillation.

    Args:
        student: of any backbone; not modified.
        teacher: its config defines the heads and the input.
    """
    target = teacher.config
    length = target.embedding_dim or teacher.channels
    config = replace(
        student.config,
        image=target.image,
        embedding_dim=0 if length == student.channels and not target.embedding_dim else length,
        parts=target.parts,
        part_dim=target.part_dim,
        local_share=target.local_share,
    )
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        fitted = Encoder(config)
    fitted.backbone.load_state_dict(student.backbone.state_dict())
    old_state = student.state_dict()
    for name, head in fitted.heads.items():
        state = {key: old_state.get(f"heads.{name}.{key}") for key in head.state_dict()}
        if all(value is not None and value.shape == head.state_dict()[key].shape for key, value in state.items()):
            head.load_state_dict(state)
    return fitted.eval()

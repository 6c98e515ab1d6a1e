"""Teacher to student: of the same architecture (LP) or a smaller one, by features and by relations.

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
        features: float32 (N, D), its global view of every crop; None until relations need it.
        anchors: float32 (K, D), its centroids of this epoch's clusters, which relations are measured to.
    """

    encoder: Encoder
    features: Floats | None = None
    anchors: Tensor | None = None

    def look(self, images: Tensor) -> Views:
        """The teacher's views of a batch, without gradient."""
        with torch.no_grad():
            views: Views = self.encoder(images)
        return views

    def losses(self, features: Sequence[Tensor], targets: Sequence[Tensor], recipe: Recipe) -> dict[str, Tensor]:
        """How far a student is from its teacher, (B,) each, not yet weighed by the recipe.

        Args:
            features: the student's views in use, (B, D) unit rows.
            targets: the teacher's views of the same batch.
            recipe: views weigh by its local_loss_weight.

        Returns:
            "guidance" (LP, section 3.6, D_v on every view) and, where there are anchors, "relation".
        """
        pulls = [distillation(view, target) for view, target in zip(features, targets, strict=False)]
        terms = {"guidance": weigh_views(pulls, recipe.local_loss_weight)}
        if self.anchors is not None:
            near = [side[0].float() @ self.anchors.T for side in (features, targets)]
            terms["relation"] = relation(near[0], near[1], temperature=recipe.temperature)
        return terms


def fit_student(student: Encoder, teacher: Encoder) -> Encoder:
    """A student that speaks in its teacher's terms: the same input, parts and feature length.

    The backbone keeps its weights. Heads keep theirs where their shapes fit; else they begin by chance, always the
    same, and learn the teacher's feature space by its guidance.

    Args:
        student: of any backbone; left as it is.
        teacher: whose config the heads and the input follow.
    """
    wanted = teacher.config
    length = wanted.embedding_dim or teacher.channels
    config = replace(
        student.config,
        image=wanted.image,
        embedding_dim=0 if length == student.channels and not wanted.embedding_dim else length,
        parts=wanted.parts,
        part_dim=wanted.part_dim,
        local_share=wanted.local_share,
    )
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        fitted = Encoder(config)
    fitted.backbone.load_state_dict(student.backbone.state_dict())
    known = student.state_dict()
    for name, head in fitted.heads.items():
        state = {key: known.get(f"heads.{name}.{key}") for key in head.state_dict()}
        if all(value is not None and value.shape == head.state_dict()[key].shape for key, value in state.items()):
            head.load_state_dict(state)
    return fitted.eval()

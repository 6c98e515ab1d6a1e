"""Selective contrast (Pang et al., TOMM 2022): every crop is its own entry, neighbours are selected in every step.

Three kinds of banks persist through all epochs: the global and the local features of the crops, used only to rank
neighbours, and the mixture, which both losses are computed against and which is updated with both kinds of features.

Letters: B batch, D length of the global feature, N crops, S stripes, J candidates of a sample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from resight.arrays import Floats, Ints
from resight.errors import RecipeError
from resight.training.adaptation.loss import selective_contrast
from resight.training.adaptation.objective import CannotLinks, update_memory
from resight.training.adaptation.recipe import Recipe
from resight.training.store.links import Links

MIXTURE = "mixture"
LINK_BONUS = 10.0  # above any difference of nearness: twice a cosine with weights that sum to 1, and a camera penalty


class InstanceObjective:
    """The objective of one epoch (see `Objective`), with banks that persist through all epochs.

    Args:
        views: float32 (N, D) and S times (N, D / S), unit rows: initial values of the banks.
        cameras: int64 (N,), any numbers.
        recipe: its `selective` section holds the method's values.
        warming: whether this is a warm-up epoch, without neighbours.
        rng: draws the negatives during warm-up.
        banks: of the previous epoch; empty at the start.
        links: crops known to be the same person rank first among the neighbours, known other persons are excluded.
        device: device of the banks.

    Raises:
        RecipeError: the concatenated stripes are not as long as the global feature.
    """

    def __init__(
        self,
        views: Sequence[Floats],
        cameras: Ints,
        recipe: Recipe,
        *,
        warming: bool,
        rng: np.random.Generator,
        banks: Mapping[str, Tensor],
        device: str,
        links: Links | None = None,
    ) -> None:
        if sum(view.shape[1] for view in views[1:]) != views[0].shape[1]:
            raise RecipeError(
                f"selective contrast stores global and local features in one bank: expected stripes with "
                f"{views[0].shape[1]} values in total, found {[view.shape[1] for view in views[1:]]}: change `parts`",
                field="parts",
            )
        self.banks = {name: bank.to(device) for name, bank in banks.items()} or {
            **{f"view{i}": torch.from_numpy(view).to(device) for i, view in enumerate(views)},
            MIXTURE: torch.tensor(views[0], device=device) * float(recipe.selective.mixture == "features"),
        }
        self._cameras = torch.from_numpy(cameras).to(device)
        self._recipe, self._warming, self._rng = recipe, warming, rng
        self._links = None
        if links is not None and len(links):
            group = links.groups(len(cameras))
            pairs = group[links.rows[~links.same]]
            self._links = torch.from_numpy(group).to(device), CannotLinks(pairs, len(cameras), device=device)
        self._drawn: Ints | None = None  # negatives of the current batch, shared by its parts

    def losses(self, features: Sequence[Tensor], rows: Tensor) -> Tensor:
        """See `Objective.losses`: the local loss uses the concatenated stripes, the global loss the whole feature."""
        settings = self._recipe.selective
        whole, stripes = features[0].float(), torch.cat(list(features[1:]), 1).float()  # norms 1 and sqrt(S)
        selected = self._random(rows) if self._warming else self._nearest(features, rows, settings.negatives)
        anchors = self.banks[MIXTURE][torch.cat([rows[:, None], selected], 1)]  # (B, J, D)
        terms = [
            selective_contrast(
                torch.einsum("bd,bjd->bj", view, anchors),
                positives=0 if self._warming else min(settings.neighbours, selected.shape[1]),
                temperature=self._recipe.temperature,
                self_share=settings.self_share,
                neighbour_gain=settings.neighbour_gain,
            )
            for view in (whole, stripes)
        ]
        return (1 - settings.local_loss) * terms[0] + settings.local_loss * terms[1]

    @torch.no_grad()
    def _nearest(self, features: Sequence[Tensor], rows: Tensor, negatives: int) -> Tensor:
        """The nearest other crops by the banks, neighbours first: int64 (B, neighbours + negatives), capped at N - 1.

        d = l_g |g - G|^2 + (1 - l_g)/S sum |l_s - S_s|^2 + l_c [same camera], with |.|^2 = 2 - 2 cos.
        """
        settings, local_share = self._recipe.selective, self._recipe.local_share
        share = [1 - local_share, *[local_share / (len(features) - 1)] * (len(features) - 1)]
        nearness = sum(
            2 * weight * (view.float() @ self.banks[f"view{i}"].T)
            for i, (view, weight) in enumerate(zip(features, share, strict=True))
        )
        assert isinstance(nearness, Tensor)
        nearness -= settings.camera_penalty * (self._cameras[rows, None] == self._cameras)
        nearness.scatter_(1, rows[:, None], -torch.inf)
        count = min(settings.neighbours + negatives, nearness.shape[1] - 1)
        if self._links is None:
            return nearness.topk(count, dim=1).indices
        group, cannot_link = self._links
        own_group = group[rows]
        first = nearness + LINK_BONUS * (own_group[:, None] == group)
        near = (
            first.masked_fill(cannot_link(own_group, group), -LINK_BONUS)
            .topk(min(settings.neighbours, count), dim=1)
            .indices
        )
        rest = nearness.scatter(1, near, -torch.inf).topk(count - near.shape[1], dim=1).indices
        return torch.cat([near, rest], 1)

    def _random(self, rows: Tensor) -> Tensor:
        """Randomly chosen other crops, one draw per batch: int64 (B, neighbours + negatives), capped at N - 1."""
        settings, n = self._recipe.selective, len(self._cameras)
        count = min(settings.neighbours + settings.negatives, n - 1)
        if self._drawn is None:
            self._drawn = self._rng.choice(n, count + 1, replace=False)
        drawn = torch.from_numpy(self._drawn).to(rows.device).expand(len(rows), -1)
        others = (drawn != rows[:, None]).to(torch.int8)
        return drawn.gather(1, others.argsort(dim=1, descending=True, stable=True))[:, :count]

    @torch.no_grad()
    def update(self, features: Sequence[Tensor], rows: Tensor) -> None:
        """See `Objective.update`.

        Each positive of an anchor receives the anchor's feature, in the released code's order of writes: the last
        positive first, the anchor's own entry last; stripes before the global feature.
        """
        self._drawn = None
        momentum = self._recipe.momentum
        entries = rows[:, None]
        if not self._warming:
            entries = torch.cat([entries, self._nearest(features, rows, 0)], 1)
        for view in (torch.cat(list(features[1:]), 1), features[0]):
            for term in range(entries.shape[1] - 1, -1, -1):
                update_memory(self.banks[MIXTURE], view, entries[:, term], momentum=momentum)
        for i, view in enumerate(features):
            bank = self.banks[f"view{i}"]
            bank[rows] = functional.normalize(momentum * bank[rows] + (1 - momentum) * view.float(), dim=1)

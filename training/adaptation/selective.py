"""Selective contrast (Pang et al., TOMM 2022): every crop is its own entry, neighbours are chosen at every step.

Three banks are kept through all epochs: the crops' global and local features, which only rank neighbours, and
the mixture, which both losses are contrasted with and both write.

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
NEARER = 10.0  # above any difference of nearness: cosines of weights that sum to 1, twice, and the camera penalty


class InstanceObjective:
    """The objective of one epoch (see `Objective`), over banks that live through all of them.

    Args:
        views: float32 (N, D) and S times (N, D / S), unit rows: what empty banks begin with.
        cameras: int64 (N,), any numbers.
        recipe: its `selective` section holds the method's values.
        warming: whether neighbours are not trusted yet.
        rng: chance of the negatives while warming up.
        banks: of the epoch before; empty at the start.
        links: crops known to be one person come first among the neighbours, those known to be another never.
        device: where banks live.

    Raises:
        RecipeError: the stripes put together are not as long as the global feature.
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
                f"selective contrast keeps global and local features in one bank: expected stripes that add up to "
                f"{views[0].shape[1]} values, found {[view.shape[1] for view in views[1:]]}: choose other `parts`",
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
            foes = group[links.rows[~links.same]]
            self._links = torch.from_numpy(group).to(device), CannotLinks(foes, len(cameras), device=device)
        self._drawn: Ints | None = None  # negatives of the batch at hand, whose parts come one after the other

    def losses(self, features: Sequence[Tensor], rows: Tensor) -> Tensor:
        """See `Objective.losses`: the local loss on the stripes put together, the global loss on the rest."""
        settings = self._recipe.selective
        whole, stripes = features[0].float(), torch.cat(list(features[1:]), 1).float()  # norms 1 and sqrt(S)
        chosen = self._random(rows) if self._warming else self._nearest(features, rows, settings.negatives)
        anchors = self.banks[MIXTURE][torch.cat([rows[:, None], chosen], 1)]  # (B, J, D)
        terms = [
            selective_contrast(
                torch.einsum("bd,bjd->bj", view, anchors),
                positives=0 if self._warming else min(settings.neighbours, chosen.shape[1]),
                temperature=self._recipe.temperature,
                self_share=settings.self_share,
                neighbour_gain=settings.neighbour_gain,
            )
            for view in (whole, stripes)
        ]
        return (1 - settings.local_loss) * terms[0] + settings.local_loss * terms[1]

    @torch.no_grad()
    def _nearest(self, features: Sequence[Tensor], rows: Tensor, negatives: int) -> Tensor:
        """The nearest others by the banks, neighbours first: int64 (B, neighbours + negatives), capped at N - 1.

        d = l_g |g - G|^2 + (1 - l_g)/S sum |l_s - S_s|^2 + l_c [same camera], of which 2 - 2 cos is used.
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
        group, apart = self._links
        own = group[rows]
        first = nearness + NEARER * (own[:, None] == group)
        near = first.masked_fill(apart(own, group), -NEARER).topk(min(settings.neighbours, count), dim=1).indices
        rest = nearness.scatter(1, near, -torch.inf).topk(count - near.shape[1], dim=1).indices
        return torch.cat([near, rest], 1)

    def _random(self, rows: Tensor) -> Tensor:
        """Others by chance, one draw for the batch: int64 (B, neighbours + negatives), capped at N - 1."""
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

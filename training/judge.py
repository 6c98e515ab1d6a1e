"""How good a model is on a site, judged without anyone's label."""

from __future__ import annotations

from resight.training.health import epoch_health

__all__ = ["epoch_health"]

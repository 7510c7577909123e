"""Options with which networks for the projections of a tiny model are made in a second."""

from __future__ import annotations

from typing import Any, Final

QUICK: Final[dict[str, Any]] = {
    "router_width": 16,
    "router_steps": 30,
    "projection_steps": 40,
    "projection_batch": 128,
    "projection_experts": 4,
    "data_tokens": 2000,
    "device": "cpu",
}

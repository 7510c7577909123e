"""What a log line of a fine-tune says."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

#: what a part of the loss of exits is called in a log: loss, divergence or that of a classifier.
EXIT_PART = re.compile(r"exit_[0-9]+(_kd)?|confidence_[0-9]+|exits")
#: what a log line shows, in this order, and how.
_SHOWN = {
    "lm": "lm {:.4f}",
    "distill": "distill {:.4f}",
    "distill_hidden": "hidden {:.4f}",
    "balance": "balance {:.3f}",
    "z": "z {:.3g}",
    "regression": "regression {:.4f}",
    "hoyer": "hoyer {:.4g}",
    "l1": "l1 {:.4g}",
    "sparsity": "zeros {:.1%}",
    "projection_sparsity": "projection zeros {:.1%}",
    "run": "run {:.1%}",
    "predictor": "predictor {:.4f}",
    "predicted": "right {:.1%}",
    "missed": "missed {:.3f}",
    "share": "share {:.3f}",
    "idle": "idle {:.1%}",
    "router_entropy": "entropy {:.3f}",
    "load": "load {:.2f}",
    "dead_experts": "dead {}",
    "grad_norm": "gradient {:.3g}",
    "learning_rate": "lr {:.3g}",
    "tokens_per_second": "{:.0f} tokens/s",
    "mfu": "{:.1%} MFU",
}


def line(logs: Mapping[str, Any], step: int, steps: int) -> str:
    """Return one line about the steps since the last one."""
    shown = [text.format(logs[name]) for name, text in _SHOWN.items() if name in logs]
    exits = [
        f"{name.replace('_', ' ')} {logs[name]:.4f}" for name in logs if EXIT_PART.fullmatch(name)
    ]
    return f"step {step}/{steps}: {', '.join([*shown[:1], *exits, *shown[1:]])}"


def zeros(ffn: Sequence[float], networks: Sequence[float]) -> dict[str, Any]:
    """Return the shares of zeros of feed-forward networks, and of those in place of projections."""
    found: dict[str, Any] = {}
    if ffn:
        found["sparsity"] = sum(ffn) / len(ffn)
        found["sparsity_by_layer"] = [round(share, 4) for share in ffn]
    if networks:
        found["projection_sparsity"] = sum(networks) / len(networks)
    return found

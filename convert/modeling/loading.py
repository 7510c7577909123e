"""Checkpoints loaded with the installed classes, adaptive or stock; no checkpoint code runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaconvert.errors import OptionError, ResourceError, SourceError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PREFIX = "adaptive_"
#: the files of this package that a checkpoint carries to load without adaconvert.
CODE_FILES = (
    "adaptive_adapted.py",
    "adaptive_adapters.py",
    "adaptive_batch.py",
    "adaptive_calls.py",
    "adaptive_checks.py",
    "adaptive_compiled.py",
    "adaptive_context.py",
    "adaptive_costs.py",
    "adaptive_decode.py",
    "adaptive_depth.py",
    "adaptive_depth_cache.py",
    "adaptive_depth_costs.py",
    "adaptive_depth_masks.py",
    "adaptive_depth_model.py",
    "adaptive_depth_parts.py",
    "adaptive_depth_pass.py",
    "adaptive_depth_schema.py",
    "adaptive_dispatch.py",
    "adaptive_drafting.py",
    "adaptive_execution.py",
    "adaptive_exit_cache.py",
    "adaptive_exit_costs.py",
    "adaptive_exit_decide.py",
    "adaptive_exit_decode.py",
    "adaptive_exit_passes.py",
    "adaptive_exit_schema.py",
    "adaptive_exits.py",
    "adaptive_ffn.py",
    "adaptive_gather.py",
    "adaptive_generating.py",
    "adaptive_inductor.py",
    "adaptive_knobs.py",
    "adaptive_layout.py",
    "adaptive_leaving.py",
    "adaptive_linear.py",
    "adaptive_many.py",
    "adaptive_masks.py",
    "adaptive_mixed.py",
    "adaptive_mixture.py",
    "adaptive_null.py",
    "adaptive_projection.py",
    "adaptive_recursion.py",
    "adaptive_recursion_schema.py",
    "adaptive_routers.py",
    "adaptive_row_stops.py",
    "adaptive_schema.py",
    "adaptive_select.py",
    "adaptive_slots.py",
    "adaptive_speculate.py",
    "adaptive_stages.py",
    "adaptive_starts.py",
    "adaptive_tensors.py",
    "configuration_adaptive.py",
    "modeling_adaptive.py",
)


def code_folder() -> Path:
    """Return where the installed `CODE_FILES` lie."""
    return Path(__file__).parent


def _config_of(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SourceError(f"cannot be read: {error}", where=f"{folder.name}/config.json") from error
    if not isinstance(found, dict) or not isinstance(found.get("model_type"), str):
        raise SourceError("has no model_type", where=f"{folder.name}/config.json")
    return found


def is_adaptive(config: dict[str, Any]) -> bool:
    """Return whether a config.json is of an adaptive checkpoint."""
    return str(config.get("model_type", "")).startswith(PREFIX)


def model_class(config: dict[str, Any]) -> Any:
    """Return the class that runs a config.json: ours for adaptive ones, else transformers'.

    Raises:
        SourceError: transformers has no class of the name in `architectures`.
    """
    import transformers

    from adaconvert.modeling import modeling_adaptive

    names = config.get("architectures") or []
    home: Any = modeling_adaptive if is_adaptive(config) else transformers
    for name in names:
        found = getattr(home, str(name), None)
        if found is not None:
            return found
    if names:
        raise SourceError(
            f"this version of transformers ({transformers.__version__}) has no {names[0]}",
            where="config.json: architectures",
            hint="Install the version that wrote the checkpoint.",
        )
    return transformers.AutoModelForCausalLM


def load_model(
    folder: str | Path, *, dtype: str = "auto", device: str | None = None, **options: Any
) -> PreTrainedModel:
    """Return a checkpoint's model in evaluation mode.

    Args:
        folder: checkpoint, adaptive or stock.
        dtype: torch name of the dtype, or "auto" for the stored one.
        device: where it goes, the CPU when not given.
        options: further arguments of `from_pretrained`.

    Raises:
        SourceError: the checkpoint cannot be loaded, or its adaptive part is damaged or newer than
            this code.
        ResourceError: memory does not suffice.
        OptionError: unknown dtype.
    """
    import torch

    where = Path(folder)
    made = model_class(_config_of(where))
    wanted: Any = "auto" if dtype == "auto" else getattr(torch, dtype, None)
    if wanted is None or (dtype != "auto" and not isinstance(wanted, torch.dtype)):
        raise OptionError("unknown dtype", where="--dtype", expected="a torch dtype", found=dtype)
    try:
        model = made.from_pretrained(where, dtype=wanted, local_files_only=True, **options)
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError) as error:
        if "allocate memory" in str(error):
            raise ResourceError("this machine's memory cannot hold it", where=where.name) from error
        raise SourceError(f"cannot be loaded: {error}", where=where.name) from error
    model.eval()
    loaded: PreTrainedModel = model.to(device) if device is not None else model
    return loaded

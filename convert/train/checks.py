"""What can be refused before text is read or a model is loaded."""

from __future__ import annotations

from importlib import metadata

from adaconvert.errors import OptionError, ResourceError, SourceError
from adaconvert.methods.sources import Described
from adaconvert.train.config import FinetuneConfig

#: oldest version of accelerate, which Trainer needs; as in pyproject.toml.
_FLOOR = (1, 10)


def require_accelerate() -> None:
    """Return only when accelerate is installed and new enough.

    Raises:
        ResourceError: it is not.
    """
    floor = ".".join(map(str, _FLOOR))
    try:
        found = metadata.version("accelerate")
    except metadata.PackageNotFoundError:
        found = "none"
    if found == "none" or tuple(map(int, found.split(".")[:2])) < _FLOOR:
        raise ResourceError(
            "training needs it",
            where="package accelerate",
            expected=f">= {floor}",
            found=found,
            hint=f"Run: pip install 'accelerate>={floor}'",
        )


def check_source(item: Described, config: FinetuneConfig) -> None:
    """Return only when a checkpoint can be fine-tuned in this way.

    Raises:
        SourceError: it is no causal language model.
        OptionError: an option does not fit it.
    """
    where = f"{item.source.label}/config.json"
    endings = ("ForCausalLM", "LMHeadModel")
    if item.spec.kind != "decoder" or not item.spec.architecture.endswith(endings):
        raise SourceError(
            f"a {item.spec.architecture} is no causal language model",
            where=where,
            hint="Fine-tune other models with transformers directly.",
        )
    if item.spec.num_experts and config.sparsity.watches:
        raise OptionError(
            f"{item.spec.model_type} is a mixture of experts already",
            where="--sparsity",
            hint="Stage 1 works on dense feed-forward networks and their adaptive form.",
        )
    if item.spec.adaptive is None and (config.select is not None or config.compute is not None):
        flag = "--select" if config.select is not None else "--compute"
        raise OptionError(f"{item.source.label} is not adaptive", where=flag)


def check_device(device: str) -> None:
    """Return only when a device is there.

    Raises:
        OptionError: it is not; names those that are.
    """
    import torch

    if device in {"auto", "cpu"}:
        return
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None or found.type != device:
        kinds = "auto or cpu" if found is None else f"auto, cpu or {found.type}"
        raise OptionError("is not here", where="--device", expected=kinds, found=device)

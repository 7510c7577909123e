"""Everything a card tells of, from the manifest, config.json and the recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from adaconvert.arch.base import ModelSpec
from adaconvert.arch.null_experts import is_nulled
from adaconvert.export.card_calibration import Calibration
from adaconvert.export.card_classes import Classes
from adaconvert.export.card_stages import Stage

#: ending of a class -> auto class of transformers, and what the hub calls what it does.
_KINDS: Final = {
    "ForCausalLM": ("AutoModelForCausalLM", "text-generation"),
    "LMHeadModel": ("AutoModelForCausalLM", "text-generation"),
    "ForSequenceClassification": ("AutoModelForSequenceClassification", "text-classification"),
    "ForTokenClassification": ("AutoModelForTokenClassification", "token-classification"),
    "ForMaskedLM": ("AutoModelForMaskedLM", "fill-mask"),
    "ForImageClassification": ("AutoModelForImageClassification", "image-classification"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """Everything a card tells of.

    Attributes:
        record: content of adaconvert.json.
        config: content of config.json.
        recipe: text of the recipe in the folder, None without one.
        stages: oldest first, the last one made this folder.
        calibration: the table, None when there is none that holds.
        classes: real experts by class of token, None where they were not measured.
        stale: why the table in config.json is not shown.
        spec: what the model is, None for a family that is not known.
    """

    record: Mapping[str, Any]
    config: Mapping[str, Any]
    recipe: str | None
    stages: tuple[Stage, ...]
    calibration: Calibration | None
    classes: Classes | None
    stale: tuple[str, ...]
    spec: ModelSpec | None

    @property
    def facts(self) -> Mapping[str, Any]:
        """Return the manifest's "card" entry."""
        found = self.record.get("card")
        return found if isinstance(found, dict) else {}

    @property
    def architecture(self) -> str:
        """Return the name of the class."""
        names = self.config.get("architectures")
        return str(names[0]) if isinstance(names, list) and names else ""

    @property
    def is_adaptive(self) -> bool:
        """Return whether the checkpoint needs the adaptive runtime."""
        return isinstance(self.config.get("adaptive"), dict)

    @property
    def is_mixture(self) -> bool:
        """Return whether the model has experts."""
        return self.is_adaptive or (self.spec is not None and self.spec.num_experts > 0)

    @property
    def nulled(self) -> int | None:
        """Return the experts a token of the source runs where null experts take slots, None where
        there are none."""
        adaptive = self.config.get("adaptive")
        sites = adaptive.get("sites") if isinstance(adaptive, dict) else None
        for slots in sites.values() if isinstance(sites, dict) else ():
            top_k = slots["ffn"]["mixture"].get("top_k") if is_nulled(slots) else None
            if isinstance(top_k, int):
                return top_k
        return None

    @property
    def is_adapter(self) -> bool:
        """Return whether it is a PEFT folder, adapters without their base."""
        return "peft_type" in self.config

    @property
    def is_split(self) -> bool:
        """Return whether something in an adaptive checkpoint chooses among experts."""
        adaptive = self.config.get("adaptive")
        sites = adaptive.get("sites") if isinstance(adaptive, dict) else None
        return any(
            "ffn" in slots or "mlp" in (slots.get("linear") or {})
            for slots in (sites.values() if isinstance(sites, dict) else ())
            if isinstance(slots, dict)
        )

    @property
    def kind(self) -> str:
        """Return the exactness class."""
        return str(self.record["exactness"].get("kind"))

    @property
    def auto_class(self) -> str:
        """Return the auto class that loads it."""
        return next((k[0] for end, k in _KINDS.items() if self.architecture.endswith(end)), "")

    @property
    def pipeline(self) -> str:
        """Return what the hub calls what it does; empty for none."""
        return next((k[1] for end, k in _KINDS.items() if self.architecture.endswith(end)), "")

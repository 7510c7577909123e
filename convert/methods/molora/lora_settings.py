"""What the adapter_config.json of a LoRA says, and which LoRAs are more than two factors a linear.

What is refused here changes what the adapter computes, or the base it is for, in ways that experts
of a mixture cannot express.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from adaconvert.arch.adapters import PEFT_TYPE
from adaconvert.errors import AdaconvertError, OptionError, SourceError
from adaconvert.io.names import escape

CONFIG_FILE = "adapter_config.json"
_TRAIN_AGAIN = "Train it again without it."
_MERGE = "Merge it into its base (in peft: merge_and_unload), or train it again without it."
#: key of adapter_config.json -> why an adapter with it cannot become an expert.
_REFUSED: Mapping[str, tuple[str, str]] = {
    "use_dora": ("is a DoRA: its magnitudes depend on the weights of the base", _MERGE),
    "modules_to_save": ("replaces whole modules of the base", _TRAIN_AGAIN),
    "trainable_token_indices": ("changes rows of the embedding", _TRAIN_AGAIN),
    "target_parameters": ("adapts parameters that are no linears, as experts are", _TRAIN_AGAIN),
    "lora_bias": ("has biases on its second factors", _TRAIN_AGAIN),
    "layer_replication": ("is for a base whose layers are repeated", _TRAIN_AGAIN),
    "use_qalora": ("is a QA-LoRA: its input is pooled", _TRAIN_AGAIN),
    "alora_invocation_tokens": ("is an aLoRA: it acts after an invocation only", _TRAIN_AGAIN),
    "arrow_config": ("is Arrow's router, which holds no adapter", "Name the task adapters."),
    "kasa_config": ("is a KaSA: it is for a base of lower rank", _TRAIN_AGAIN),
    "monteclora_config": ("is a Monteclora: its factors are drawn at random", _TRAIN_AGAIN),
    "use_bdlora": ("is a BD-LoRA: its factors are block-diagonal", _TRAIN_AGAIN),
    "velora_config": ("is a VeLoRA, with more tensors than two factors", _TRAIN_AGAIN),
    "megatron_config": ("is for Megatron's parallel linears", _TRAIN_AGAIN),
}
#: starts that leave the base as it is; those of PiSSA, OLoRA, CorDA, LoRA-GA and LoftQ change it.
_STARTS = ("gaussian", "eva", "orthogonal", "mica")
_OWN_BASE = re.compile(r"(pissa|olora|corda|lora_ga|loftq)\w*")
#: keys of PEFT 0.21.2 that a new one is told from.
_KNOWN = frozenset(
    {
        *_REFUSED,
        *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out"),
        *("bias", "init_lora_weights", "lora_dropout", "target_modules", "exclude_modules"),
        *("layers_to_transform", "layers_pattern", "inference_mode", "task_type", "peft_type"),
        *("peft_version", "revision", "base_model_name_or_path", "auto_mapping"),
        *("megatron_core", "qalora_group_size", "loftq_config", "eva_config", "corda_config"),
        *("lora_ga_config", "ensure_weight_tying", "base_fingerprint"),
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What an adapter_config.json says of the factors.

    Attributes:
        where: name of the file in messages.
        rank: r.
        alpha: lora_alpha.
        rslora: scaled by 1 / sqrt(r) and not 1 / r (Kalajdzievski 2023, arXiv 2312.03732).
        ranks, alphas: pattern of a path -> what r and lora_alpha are there.
        base: what it was trained on, as it names it.
        fingerprint: of its base where it was recorded.
        notes: what the user should know.
    """

    where: str
    rank: int
    alpha: float
    rslora: bool
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    base: str | None = None
    fingerprint: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def scaling(self) -> float:
        """Return what B A is multiplied by where no pattern says otherwise."""
        return self._scaling(self.alpha, self.rank)

    def rank_of(self, path: str) -> int:
        """Return the rank at a linear.

        Source: `get_pattern_key` of PEFT 0.21.2: the first pattern that the path ends with.
        """
        pattern = self._pattern(self.ranks, path)
        return self.rank if pattern is None else self.ranks[pattern]

    def scaling_of(self, path: str) -> float:
        """Return what B A is multiplied by at a linear."""
        pattern = self._pattern(self.alphas, path)
        alpha = self.alpha if pattern is None else self.alphas[pattern]
        return self._scaling(alpha, self.rank_of(path))

    def _scaling(self, alpha: float, rank: int) -> float:
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank

    def _pattern(self, patterns: Mapping[str, object], path: str) -> str | None:
        for pattern in patterns:
            try:
                if re.match(rf"(.*\.)?({pattern})$", path):
                    return pattern
            except re.error as error:
                raise SourceError(
                    f"a pattern is no regular expression: {error}",
                    where=self.where,
                    found=escape(pattern, 80),
                ) from None
        return None


def settings_of(config: Mapping[str, object], label: str) -> Settings:
    """Return what the adapter_config.json of a LoRA says.

    Args:
        config: the file.
        label: of its folder, for messages.

    Raises:
        SourceError: it is no LoRA, one that cannot become an expert, or malformed.
    """
    where = f"{label}/{CONFIG_FILE}"
    _check_type(config, where)
    for key, (why, hint) in _REFUSED.items():
        if config.get(key):
            raise SourceError(f"the adapter {why}", where=f"{where}: {key}", hint=hint)
    if config.get("bias", "none") not in ("none", None):
        raise SourceError(
            "the adapter changes biases of the base",
            where=f"{where}: bias",
            expected="none",
            found=escape(config["bias"], 40),
            hint=_TRAIN_AGAIN,
        )
    _check_start(config.get("init_lora_weights", True), where)
    base, fingerprint = config.get("base_model_name_or_path"), config.get("base_fingerprint")
    return Settings(
        where=where,
        rank=_rank(config.get("r", 8), f"{where}: r"),
        alpha=_alpha(config.get("lora_alpha", 8), f"{where}: lora_alpha"),
        rslora=bool(config.get("use_rslora")),
        ranks={
            key: _rank(value, f"{where}: rank_pattern")
            for key, value in _patterns(config, "rank_pattern", where).items()
        },
        alphas={
            key: _alpha(value, f"{where}: alpha_pattern")
            for key, value in _patterns(config, "alpha_pattern", where).items()
        },
        base=base if isinstance(base, str) and base else None,
        fingerprint=fingerprint if isinstance(fingerprint, str) else None,
        notes=_unknown(config, label, where),
    )


def check_name(name: str) -> None:
    """Return only when an adapter may have this name.

    Raises:
        OptionError: it has no letter, and PEFT would take it for the number of a layer.
    """
    if not name or re.fullmatch(r"[\d.]+", name):
        raise OptionError(
            "an adapter whose name is a bare number loses its tensors of the layer of that number "
            "when PEFT saves it",
            where="--from",
            expected="a name with a letter in it",
            found=repr(escape(name, 40)),
            hint="Rename the folder.",
        )


def _check_type(config: Mapping[str, object], where: str) -> None:
    found = config.get("peft_type")
    if found == "LORA":
        return
    hint = "Only LoRA adapters can be composed."
    if found == PEFT_TYPE:
        hint = "It holds routed adapters already: give it as SRC."
    raise SourceError(
        "is no LoRA adapter",
        where=where,
        expected="peft_type LORA",
        found="none" if found is None else escape(found, 40),
        hint=hint,
    )


def _check_start(start: object, where: str) -> None:
    if start is None or isinstance(start, bool) or start in _STARTS:
        return
    where = f"{where}: init_lora_weights"
    name = escape(start, 40)
    if isinstance(start, str) and _OWN_BASE.fullmatch(start):
        raise SourceError(
            f"an adapter that starts as {name} is for a base it changed, not for the stock one",
            where=where,
            hint="Save it with path_initial_model_for_weight_conversion (in peft), which makes a "
            "plain LoRA of it.",
        )
    raise SourceError(
        "a start this version does not know, which may have changed the base",
        where=where,
        expected=f"true, false, {', '.join(_STARTS)}",
        found=name,
    )


def _rank(value: object, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise SourceError(
            "is no rank", where=where, expected="a whole number above 0", found=_shown(value)
        )
    return value


def _alpha(value: object, where: str) -> float:
    known = isinstance(value, int | float) and not isinstance(value, bool)
    if not known or not value or not math.isfinite(float(str(value))):
        raise SourceError(
            "scales the adapter by nothing" if value == 0 else "is no number",
            where=where,
            expected="a finite number other than 0",
            found=_shown(value),
        )
    return float(str(value))


def _shown(value: object) -> str:
    """Return a value for a message; a text in quotes, so that "8" is no 8."""
    return escape(repr(value) if isinstance(value, str) else value, 40)


def _patterns(config: Mapping[str, object], key: str, where: str) -> dict[str, object]:
    found = config.get(key) or {}
    if not isinstance(found, dict):
        raise _malformed(f"{where}: {key}", "an object", found)
    return found


def _malformed(where: str, expected: str, found: object) -> AdaconvertError:
    return SourceError("is malformed", where=where, expected=expected, found=escape(found, 60))


def _unknown(config: Mapping[str, object], label: str, where: str) -> tuple[str, ...]:
    """Return a note on keys a newer PEFT wrote.

    Raises:
        SourceError: one that is set names another kind of adapter, as far as names tell.
    """
    names = sorted(key for key in config if key not in _KNOWN and config[key])
    for name in names:
        if name.startswith("use_") or name.endswith("_config"):
            raise SourceError(
                "the adapter is of a kind this version does not know",
                where=f"{where}: {escape(name, 40)}",
                hint=_TRAIN_AGAIN,
            )
    if not names:
        return ()
    listed = ", ".join(escape(name, 40) for name in names[:8])
    return (f"adapter {label}: settings this version does not know are ignored: {listed}",)

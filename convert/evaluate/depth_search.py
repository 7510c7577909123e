"""Which rules of skipping blocks are worth measuring, and which of them is chosen.

A setting gives each block a threshold; thresholds are made for shares of the tokens that run a
block, as quantiles of the logits that decide. What one block skips changes what the next ones see,
so logits are taken again at each share, from the whole model downwards.

Shapes: T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, Final

import numpy as np

from adaconvert.errors import OptionError
from adaconvert.evaluate.allocation import LEVELS, allocate, sensitivities
from adaconvert.evaluate.applied import applied
from adaconvert.evaluate.calibration_data import CalibrationData
from adaconvert.evaluate.calibration_output import configured
from adaconvert.evaluate.calibration_search import SENSITIVITY_BLOCKS, Evolving, Search
from adaconvert.evaluate.calibration_settings import CalibrationSettings
from adaconvert.evaluate.candidates import COARSE, Family
from adaconvert.evaluate.evolved import STEPS
from adaconvert.evaluate.risk import Floats, Risk
from adaconvert.evaluate.sweep import ALL, Select, Setting
from adaconvert.modeling.adaptive_knobs import DEPTH
from adaconvert.planning.evolution import Levels, Vector

#: tokens whose logits say where thresholds lie.
_TOKENS: Final = 8192
_HELD: Final = "every block, experts as configured"
#: path of a block -> the logits that decide there, sorted, [T].
Logits = Mapping[str, Floats]


def check_depth_settings(settings: CalibrationSettings) -> None:
    """Return only when thresholds of blocks that tokens skip can be calibrated as asked.

    Raises:
        OptionError: options are about experts or exits.
    """
    for flag, value in (
        ("--rule, --values", settings.rules or settings.values),
        ("--measure", settings.measure),
    ):
        if value:
            raise OptionError(
                "is about experts or exits, and blocks that tokens skip alone are calibrated",
                where=flag,
            )


class DepthSearch(Search):
    """One calibration of a model with blocks that tokens skip; see `Search`."""

    def __init__(
        self, model: Any, data: CalibrationData, settings: CalibrationSettings, risk: Risk | None
    ) -> None:
        super().__init__(model, data, settings, risk)
        self.whole_name = self._reference_name = "every block"
        before = configured(model.config.adaptive)[DEPTH]
        self._paths = list(before.get("threshold") or {})
        if not self._paths:
            raise OptionError("no block of the model has a router that decides", where="calibrate")
        self._seen: dict[float, Logits] = {}

    def _try_all(self) -> None:
        """Measure every setting worth a look on the ordering split."""
        if self._held:
            self._try([self._setting({}, _HELD, 1.0)])
        self._sweep(self._families())
        if self.settings.evolves:
            self._evolve(self._evolving())

    def _families(self) -> list[Family]:
        """Return the ways to let a share of the tokens run blocks."""
        families: list[Family] = [self._alike, self._equal]
        if self.settings.per_layer:
            families.append(self._allocated)
        return families

    def _alike(self, share: float) -> Setting:
        """Return the setting of one threshold, so that blocks and tokens compete."""
        logits = self._logits(share)
        level = _level(np.sort(np.concatenate([logits[path] for path in self._paths])), share)
        name = f"threshold {level:.4g}, {share:.0%} of the blocks"
        return self._setting(dict.fromkeys(self._paths, level), name, share)

    def _equal(self, share: float) -> Setting:
        """Return the setting in which every block is run by the same share of the tokens."""
        logits = self._logits(share)
        levels = {path: _level(logits[path], share) for path in self._paths}
        return self._setting(levels, f"threshold per block, {share:.0%} of the tokens each", share)

    def _allocated(self, share: float) -> Setting | None:
        """Return the setting that takes most from the blocks that matter least."""
        shares = self._greedy(share)
        if shares is None:
            return None
        return self._of_shares(shares, f"threshold per layer, {share:.0%} of the blocks", share)

    def _greedy(self, share: float) -> Mapping[str, float] | None:
        """Return the shares of blocks found greedily, None where there are none."""
        return allocate(self._curves, dict.fromkeys(self._paths, 1.0), [share]).get(share)

    @cached_property
    def _curves(self) -> dict[str, list[tuple[float, float]]]:
        """Return how the loss rises as fewer tokens run each block alone."""
        blocks = self.data.ordering.blocks[:SENSITIVITY_BLOCKS]
        whole = self._logits(1.0)

        def increase(shares: Mapping[str, float]) -> float:
            levels = {
                path: _level(whole[path], share) for path, share in shares.items() if share < 1
            }
            found = self._measurer.measure(self._setting(levels, "one block", None), blocks)
            return self._mean_rise(found, blocks)

        total = len(LEVELS) * len(self._paths) * len(blocks)
        with self._shown(total, "layers"):
            return sensitivities(self._paths, increase)

    def _evolving(self) -> Evolving:
        """Return the shares of the tokens that run each block as levels."""
        count = len(self._paths)
        levels = Levels(low=(0,) * count, high=(STEPS,) * count)

        def setting(vector: Vector) -> Setting:
            shares = {p: level / STEPS for p, level in zip(self._paths, vector, strict=True)}
            share = sum(vector) / (STEPS * count)
            name = f"threshold per layer by evolution, {share:.0%} of the blocks"
            return self._of_shares(shares, name, share)

        def near(shares: Mapping[str, float], even: Vector) -> Vector:
            return levels.nearest([STEPS * shares[path] for path in self._paths], even)

        def greedy(even: Vector) -> Vector | None:
            shares = self._greedy(sum(even) / (STEPS * count))
            return None if shares is None else near(shares, even)

        def alike(even: Vector) -> Vector:
            """Return the levels that one threshold for all blocks gives."""
            share = sum(even) / (STEPS * count)
            each = {path: self._logits(share)[path] for path in self._paths}
            level = _level(np.sort(np.concatenate(list(each.values()))), share)
            return near({path: float((one > level).mean()) for path, one in each.items()}, even)

        return Evolving(levels=levels, setting=setting, ways=[greedy, alike])

    def _of_shares(self, shares: Mapping[str, float], name: str, share: float) -> Setting:
        """Return the setting in which a share of the tokens of its own runs each block."""
        logits = self._logits(share)
        levels = {path: _level(logits[path], own) for path, own in shares.items() if own < 1}
        return self._setting(levels, name, share)

    def _setting(self, levels: Mapping[str, float], name: str, share: float | None) -> Setting:
        """Return a setting; blocks without a threshold are run by every token."""
        open_to_all = -np.finfo(np.float32).max
        each = {path: float(levels.get(path, open_to_all)) for path in self._paths}
        select: Select = {**ALL, DEPTH: {"rule": "threshold", "threshold": each}}
        return self._with_held(Setting(rule="depth", name=name, share=share, select=select))

    # -- logits

    def _logits(self, share: float) -> Logits:
        """Return the logits of every block while about a share of the tokens runs each."""
        before = min((known for known in COARSE if known > share), default=1.0)
        if share >= 1:
            before = 1.0
        if before not in self._seen:
            levels: Mapping[str, float] = {}
            if before < 1:
                found = self._logits(before)
                levels = {path: _level(found[path], before) for path in self._paths}
            self._seen[before] = self._collected(self._setting(levels, "", None))
        return self._seen[before]

    def _collected(self, setting: Setting) -> Logits:
        """Return the logits on the first blocks of the ordering split, sorted."""
        blocks = self.data.ordering.blocks
        tokens = np.cumsum(self.data.blocks.weights[blocks].sum(axis=1))
        some = blocks[: int(np.searchsorted(tokens, _TOKENS)) + 1]
        with applied(self._model, setting.select), self._model.collect("depth") as seen:
            for _ in self._measurer.passes(some):
                pass
        return {path: np.sort(_deciding(seen[path])) for path in self._paths}


def _deciding(passes: Any) -> Floats:
    """Return the logits that decide, [T]: the predictor's where there is one."""
    each = [one.logits if one.predicted is None else one.predicted for one in passes]
    return np.concatenate([logits.double().cpu().numpy() for logits in each])


def _level(ordered: Floats, share: float) -> float:
    """Return the threshold above which a share of the sorted logits lies."""
    at = len(ordered) - round(share * len(ordered))
    if at <= 0:
        return float(np.nextafter(np.float32(ordered[0]), np.float32(-np.inf)))
    return float(ordered[min(at, len(ordered)) - 1])

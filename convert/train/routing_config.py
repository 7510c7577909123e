"""What a fine-tune does about the routers of a mixture of experts or an adaptive model."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Final

from adaconvert.train.bounds import among, number

BALANCE_KINDS: Final = ("loss", "bias")
#: option -> field of `Routing`.
ROUTING_OPTIONS: Final = {
    "balance": "balance",
    "balance_kind": "kind",
    "balance_rate": "rate",
    "z_loss": "z_loss",
    "router_regression": "regression",
    "collapse": "collapse",
    "target_compute": "target",
    "layer_budget": "layers",
    "compute_ramp": "ramp",
    "null_rate": "null_rate",
}
#: how stock mixtures call the bias that joins when experts are chosen: a parameter or a buffer.
CORRECTION: Final = "e_score_correction_bias"
#: the bias of null experts, by the end of its name.
NULL_BIAS: Final = "null_experts.bias"
#: tensors of null experts that are float32 in every checkpoint.
OWN_DTYPE: Final = (NULL_BIAS, "null_experts.scale", "null_experts.value")
#: ramp of budgets; ours. SmolLM2-135M at half of its experts, at once, lost 14 nats in ten steps.
RAMP: Final = 0.5
#: coefficient where a mixture's config.json states none (Fedus et al. 2021, 2101.03961).
BALANCE: Final = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """Losses of routers, and what is done when they send every token to the same experts.

    Attributes:
        balance: factor of the balance loss, E sum_e f_e P_e of every sequence (f_e: share of its
            choices, P_e: mean probability; Fedus et al. 2021, 2101.03961, equation 4, here 1 when
            even), averaged over tokens and layers. None: where routers of a stock mixture are
            trained and `kind` is "loss", config.json's `router_aux_loss_coef` times the experts of
            a token, real or null, which is what that key means to transformers and to AdaMoE, or
            `BALANCE`; else 0. With null experts it is `losses.null_balance`.
        kind: "loss", or "bias": no gradient, but a bias that is added to the scores when experts
            are chosen and moves by `rate` towards an even load after every step.
        rate: of the bias (DeepSeek-V3, 2412.19437, and Wang et al. 2024, 2408.15664: 1e-3).
        z_loss: factor of the mean of logsumexp(logits)^2 over tokens and layers (Zoph et al. 2022,
            2202.08906, equation 5, who use 1e-3).
        regression: factor of the error of contribution routers of adaptive checkpoints, relative
            to the experts' output norms they predict; the experts themselves get no gradient of it.
        collapse: a trained mixture is refused when the k busiest experts of a layer get this share
            of the choices over the last steps, k being the experts of a token; 0 never refuses.
            0.95 is ours.
        target: share of the experts of a token that blocks with null experts are to run, of those
            the model without null experts runs; None: what config.json states, if it does.
        layers: other targets of some layers, as `methods.budget.parse_layers` reads them.
        ramp: share of the run over which targets move from what is spent at first to where they
            are to be; 0: at once, None: `RAMP` where there are targets.
        null_rate: of the controller that moves the null biases towards the targets, see
            `methods.budget.BudgetController`; 0: they are trained by the losses like a router.
    """

    balance: float | None = None
    kind: str = "loss"
    rate: float = 1e-3
    z_loss: float = 0.0
    regression: float = 0.0
    collapse: float = 0.95
    target: float | None = None
    layers: str | None = None
    ramp: float | None = None
    null_rate: float = 0.2

    def __post_init__(self) -> None:
        if self.balance is not None:
            number("--balance", self.balance, 0.0)
        among("--balance-kind", self.kind, BALANCE_KINDS)
        number("--balance-rate", self.rate, 0.0, open_low=True)
        number("--z-loss", self.z_loss, 0.0)
        number("--router-regression", self.regression, 0.0)
        number("--collapse", self.collapse, 0.0, 1.0)
        if self.target is not None:
            number("--target-compute", self.target, 0.0)
        if self.ramp is not None:
            number("--compute-ramp", self.ramp, 0.0, 1.0)
        number("--null-rate", self.null_rate, 0.0, 1.0)

    @property
    def budgets(self) -> str | None:
        """Return the option that asks for a budget of null experts, None when none does."""
        asked = {"--target-compute": self.target, "--layer-budget": self.layers}
        return next((flag for flag, value in asked.items() if value is not None), None)

    def to_json(self) -> dict[str, Any]:
        """Return what decides the result; what refuses one does not."""
        found = {item.name: getattr(self, item.name) for item in fields(self)}
        del found["collapse"]
        return found

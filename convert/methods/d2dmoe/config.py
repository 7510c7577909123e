"""The options of `d2dmoe`, checked before anything is opened.

Letters: f neurons of the dense FFN, N experts of m neurons, W router width.
"""

from __future__ import annotations

from dataclasses import dataclass

from adaconvert.arch.base import ModelSpec
from adaconvert.arch.projections import ROLES
from adaconvert.errors import OptionError
from adaconvert.methods.d2dmoe.router import RouterSettings
from adaconvert.methods.moefy.config import MoefyConfig, Sizes, sizes_of
from adaconvert.methods.options import check_choice, check_range, check_types

#: what each stage does; stage 1 trains the model.
STAGES = {"2": "split", "3": "routers", "4": "dynamic-k", "5": "projections"}
LOSSES = ("relative", "mse")
#: a router of the published width for models up to this hidden size, four times it above: 128 for
#: GPT-2 and BERT (768), 512 for Gemma-2B (2048).
NARROW, WIDTHS = 1536, (128, 512)


@dataclass(frozen=True, slots=True, kw_only=True)
class D2dmoeConfig:
    """What `d2dmoe` does.

    Attributes:
        stages: which of "2" (split), "3" (fit contribution routers), "4" (select with tau), "5"
            (replace projections) run, comma-separated. A dense source needs 2 or is given 5 alone;
            a split one takes 3, 4, 5 or several.
        num_experts: experts per converted layer, N; None to follow from `expert_width`.
        expert_width: neurons of each, m; None to follow from `num_experts`. With neither, the
            largest width up to 32 that divides, as for `moefy`. The paper's are 4 (GPT-2) to 128.
        layers: blocks to convert, None for all.
        router_width: W; None for 128, above a hidden size of 1536 for 512 (published scripts).
        router_steps, router_batch: optimiser steps, and tokens of a step. The published scripts
            take 500 to 5000 steps of 8192 tokens and more; on SmolLM2-135M with 22k tokens, 1000
            steps of 256 give the same rank correlation as 1000 of 1024.
        router_lr: peak learning rate.
        router_loss: "relative" or "mse" (the paper), see `router.fit_router`.
        projections: which attention projections stage 5 replaces by networks, comma-separated; None
            for q,k,v,o.
        projection_experts: experts of each network; 1 leaves it whole. The paper gives no number
            for the projections.
        projection_router_width: hidden units of their routers; None for as many as cost a tenth of
            the projection.
        projection_steps, projection_batch, projection_lr: optimiser steps, tokens of a step and
            peak learning rate of each network. The published script trains 3 epochs of ImageNet at
            1e-3; `scripts/stage5_table.py` on SmolLM2-135M, layer 14, 14.7k tokens, gives errors of
            q, k, v and o of 0.022, 0.020, 0.065, 0.044 at 1e-3, 0.021, 0.019, 0.054, 0.039 at 3e-3
            and 0.087, 0.044, 0.051, 0.113 at 1e-2.
        projection_sparsity: coefficient of the square Hoyer measure of their hidden units, beside a
            squared error in units of the outputs. The paper's 1e-3 gives errors of 0.027, 0.021,
            0.061, 0.042 there, with 43, 36, 20 and 30 % of the hidden units zero; 1e-4 34, 33, 16,
            28 %; 0 gives 0.019, 0.016, 0.054, 0.037 with 31, 28, 16, 25 %.
        tau: an expert runs when its score is at least tau times the highest one of the token; 0
            runs every expert, 1 the best alone. The official code states 1 - tau. None for 0, so
            that the result is exact until `calibrate` or the user turns it down.
        data: text the routers are fitted on: file, folder or hub id; of a ViT, images.
        data_field, data_split: see `data.text.read_documents` and `data.images.read_images`.
        data_tokens: tokens of it that are used.
        device: torch device, or "auto" for the accelerator if there is one.
        work: folder for hidden states and finished layers, from which a killed run goes on; None
            to keep them in memory.
        seed: of every random choice.
    """

    stages: str = "2,3,4"
    num_experts: int | None = None
    expert_width: int | None = None
    layers: str | None = None
    router_width: int | None = None
    router_steps: int = 1000
    router_batch: int = 256
    router_lr: float = 3e-3
    router_loss: str = "relative"
    projections: str | None = None
    projection_experts: int = 8
    projection_router_width: int | None = None
    projection_steps: int = 1000
    projection_batch: int = 512
    projection_lr: float = 3e-3
    projection_sparsity: float = 1e-4
    tau: float | None = None
    data: str | None = None
    data_field: str = "text"
    data_split: str | None = None
    data_tokens: int = 32768
    device: str = "auto"
    work: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        self._check_stages()
        check_choice(self, "router_loss", LOSSES)
        for name in ("num_experts", "expert_width", "router_width"):
            check_range(self, name, 1, 2**31 - 1)
        for name in ("router_steps", "router_batch"):
            check_range(self, name, 1, 2**31 - 1)
        check_range(self, "router_lr", 1e-8, 1.0)
        for name in ("experts", "router_width", "steps", "batch"):
            check_range(self, f"projection_{name}", 1, 2**31 - 1)
        check_range(self, "projection_lr", 1e-8, 1.0)
        check_range(self, "projection_sparsity", 0.0, 1e6)
        self._check_projections()
        check_range(self, "data_tokens", 2, 2**40)
        check_range(self, "tau", 0.0, 1.0)
        self._check_together()

    def _check_stages(self) -> None:
        given = self.stages.split(",")
        if self.stage_set - set(STAGES) or given != sorted(self.stage_set):
            known = ", ".join(f"{number} ({what})" for number, what in STAGES.items())
            hint = "Stage 1 trains the model: it stands before the others."
            raise OptionError(
                "names no stages to run",
                where="--stages",
                expected=f"a comma-separated part of {known}, ascending",
                found=repr(self.stages[:40]),
                hint=hint if "1" in self.stage_set else None,
            )

    def _check_projections(self) -> None:
        """Hold `projections` to names, each once, and to stage 5."""
        if self.projections is None:
            return
        if not self.replaces:
            raise OptionError("only means something with stage 5", where="--projections")
        given = self.projections.split(",")
        if not set(given) <= set(ROLES) or len(set(given)) != len(given):
            raise OptionError(
                "names no projections",
                where="--projections",
                expected="a comma-separated part of q,k,v,o",
                found=repr(self.projections[:40]),
            )

    def _check_together(self) -> None:
        if self.reads and self.data is None:
            what = "routers" if self.fits else "networks in place of projections"
            raise OptionError(
                f"is missing: {what} are fitted on text",
                where="--data",
                hint="Give text like that the model is for, tens of thousands of tokens.",
            )
        if not self.reads and self.data is not None:
            raise OptionError("only means something with stage 3 or 5", where="--data")
        if self.tau is not None and not self.stage_set & {"4", "5"}:
            raise OptionError("only means something with stage 4 or 5", where="--tau")
        for name in ("num_experts", "expert_width"):
            if getattr(self, name) is not None and "2" not in self.stage_set:
                where = "--" + name.replace("_", "-")
                raise OptionError("only means something with stage 2", where=where)
        if "2" in self.stage_set and "4" in self.stage_set and not self.fits:
            raise OptionError(
                "stage 4 selects by the routers of stage 3", where="--stages", found=self.stages
            )

    @property
    def stage_set(self) -> frozenset[str]:
        """Return the stages to run."""
        return frozenset(part.strip() for part in self.stages.split(","))

    @property
    def fits(self) -> bool:
        """Return whether routers are fitted."""
        return "3" in self.stage_set

    @property
    def replaces(self) -> bool:
        """Return whether projections are replaced."""
        return "5" in self.stage_set

    @property
    def reads(self) -> bool:
        """Return whether anything is fitted on text."""
        return self.fits or self.replaces

    @property
    def roles(self) -> tuple[str, ...]:
        """Return the projections to replace."""
        return tuple(self.projections.split(",")) if self.projections else ROLES

    def split(self) -> MoefyConfig:
        """Return the split as `moefy` would be asked for it."""
        return MoefyConfig(
            num_experts=self.num_experts,
            expert_width=self.expert_width,
            layers=self.layers,
            seed=self.seed,
        )

    def sizes(self, spec: ModelSpec) -> Sizes:
        """Return the sizes stage 2 splits into.

        Raises:
            OptionError: the FFN's width does not divide as asked; names the numbers that would do.
        """
        return sizes_of(self.split(), spec)

    def width(self, spec: ModelSpec) -> int:
        """Return W."""
        return self.router_width or WIDTHS[spec.hidden > NARROW]

    def settings(self, spec: ModelSpec, seed: int) -> RouterSettings:
        """Return how one layer's router is trained."""
        return RouterSettings(
            width=self.width(spec),
            steps=self.router_steps,
            batch_tokens=self.router_batch,
            learning_rate=self.router_lr,
            loss=self.router_loss,
            seed=seed,
        )

    def select(self) -> dict[str, object]:
        """Return the selection rule of a layer, as config.json has it."""
        if "4" in self.stage_set:
            return {"rule": "dynamic-k", "tau": self.tau or 0.0}
        return {"rule": "all"}

"""FLOPs of a trained token by hand, peaks by name, and what is printed of both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from adaconvert.methods.sources import open_source
from adaconvert.testing import tiny_models
from adaconvert.testing.adaptive_by_hand import make_adaptive
from adaconvert.train import session, utilisation
from adaconvert.train.config import FinetuneConfig
from adaconvert.train.device_peaks import PEAKS, peak
from adaconvert.train.result import FinetuneResult

# hidden 32, 4 heads of 8, 2 of them for keys and values, 2 layers, 320 tokens
ATTENTION = 2 * (32 * 32 * 2 + 32 * 16 * 2)
HEAD = 320 * 32
#: 2 layers, scores and weighted sums over 16 tokens, the mean of a text of 32
SCORES = 2 * 4 * 32 * 16
FFN = 2 * 3 * 32 * 64


def config_of(**options: Any) -> FinetuneConfig:
    return FinetuneConfig.of(["x"], {"steps": 1, "seq_len": 32, "precision": "fp32", **options})


@pytest.mark.parametrize(
    ("family", "ffn"),
    [
        ("llama-tied", FFN),
        # two of four experts, and the router
        ("mixtral", 2 * (2 * 3 * 32 * 64 + 4 * 32)),
    ],
)
def test_flops_are_those_of_the_matrices_a_token_passes(
    family: str, ffn: int, tmp_path: Path
) -> None:
    item = open_source(str(tiny_models.make(family, tmp_path / "src")))
    matrices = 2 * (ATTENTION + HEAD + ffn)
    every = utilisation.flops_per_token(item, config_of(), 1.0)
    assert every == 3 * (matrices + SCORES)
    # what is computed again does not count
    assert utilisation.flops_per_token(item, config_of(checkpointing=True), 1.0) == every
    # frozen weights need no gradient of their own, attention scores always do
    frozen = utilisation.flops_per_token(item, config_of(), 0.0)
    assert frozen == 2 * matrices + 3 * SCORES


@pytest.mark.parametrize(
    ("options", "gate", "rest"),
    [
        ({}, 1.0, 1.0),
        ({"select": "rule=top-k,k=16"}, 1.0, 0.25),
        ({"select": "rule=all"}, 1.0, 1.0),
        ({"select": "rule=dynamic-k,tau=0"}, 1.0, 1.0),
        ({"compute": 1.0}, 1.0, 1.0),
    ],
)
def test_experts_that_do_not_run_are_not_counted(
    options: dict[str, Any], gate: float, rest: float, dense: Path, tmp_path: Path
) -> None:
    item = open_source(str(make_adaptive(dense, tmp_path / "neurons", router="gate", experts=64)))
    ffn = FFN // 3 * gate + FFN * 2 // 3 * rest
    found = utilisation.flops_per_token(item, config_of(**options), 1.0)
    assert found == 3 * (2 * (ATTENTION + HEAD + ffn) + SCORES)


def test_what_depends_on_the_token_is_not_known(dense: Path, tmp_path: Path) -> None:
    item = open_source(str(make_adaptive(dense, tmp_path / "neurons", router="gate", experts=64)))
    for select in ("rule=dynamic-k,tau=0.1", "rule=threshold,threshold=0.5", "rule=top-p,p=0.9"):
        assert utilisation.flops_per_token(item, config_of(select=select), 1.0) is None
    half = utilisation.flops_per_token(item, config_of(compute=0.85), 1.0)
    every = utilisation.flops_per_token(item, config_of(), 1.0)
    assert half is not None
    assert every is not None
    assert 0.7 * every < half < 0.9 * every


@pytest.mark.parametrize(
    ("name", "precision", "expected"),
    [
        ("NVIDIA B200", "bf16", 2250e12),
        ("NVIDIA H200", "bf16", 989.5e12),
        ("NVIDIA H100 80GB HBM3", "fp32", 67e12),
        ("NVIDIA H100 NVL", "bf16", 835.5e12),
        ("NVIDIA H100 PCIe", "bf16", 756.5e12),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312e12),
        ("NVIDIA A100 80GB PCIe", "bf16", 312e12),
        ("NVIDIA A100-PCIE-40GB", "fp32", 19.5e12),
        ("NVIDIA L40S", "bf16", 362.05e12),
        ("NVIDIA L40", "bf16", 181.05e12),
        ("NVIDIA L4", "bf16", 121e12),
        ("NVIDIA A10", "bf16", 125e12),
        ("NVIDIA A10G", "bf16", 70e12),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2e12),
        ("AMD Instinct MI300X", "bf16", 1307.4e12),
        # another chip of a similar name, a part of one, and what nobody knows
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),
        ("NVIDIA GeForce RTX 4090 D", "bf16", None),
        ("NVIDIA H200 NVL", "bf16", None),
        ("NVIDIA GH200 480GB", "bf16", None),
        ("NVIDIA A100-SXM4-80GB MIG 3g.40gb", "bf16", None),
        ("AbacusOne", "bf16", None),
        ("NVIDIA H200", "fp64", None),
    ],
)
def test_peaks_are_known_by_name(name: str, precision: str, expected: float | None) -> None:
    assert peak(name, precision) == expected


def test_float32_is_faster_where_it_is_rounded_to_tf32() -> None:
    assert peak("NVIDIA A100-SXM4-80GB", "fp32", tf32=True) == 156e12
    assert peak("NVIDIA A100-SXM4-80GB", "bf16", tf32=True) == 312e12
    assert peak("AMD Instinct MI300X", "fp32", tf32=True) is None
    for entry in PEAKS:
        assert entry.bf16 >= (entry.tf32 or entry.fp32) >= entry.fp32


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_the_present_device_is_asked(
    precision: str, dense: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    item, config = open_source(str(dense)), config_of()
    assert utilisation.utilisation(item, config, 1.0) is None or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100-SXM4-40GB")
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    needed = utilisation.flops_per_token(item, config, 1.0)
    able = 19.5e12 if precision == "highest" else 156e12
    assert utilisation.utilisation(item, config, 1.0) == (needed, able)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "AbacusOne")
    assert utilisation.utilisation(item, config, 1.0) is None


def test_line_and_summary_say_it_where_it_is_known(
    dense: Path, tune: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU, as if it were a device that does 1e9 FLOP/s."""
    lines: list[str] = []
    monkeypatch.setattr(session.Session, "_flops", lambda *_: (1e6, 1e9))
    result: FinetuneResult = tune(dense, steps=4, log_every=1, report=lines.append)
    steps = [line for line in lines if line.startswith("step ")]
    assert len(steps) == 4
    assert all(line.endswith("% MFU") for line in steps)
    for entry in result.curve:
        assert entry["mfu"] == pytest.approx(entry["tokens_per_second"] * 1e-3, rel=1e-12)
    assert result.mfu == sorted(entry["mfu"] for entry in result.curve[1:])[1]
    assert result.to_json()["mfu"] == result.mfu
    (speed,) = [line for line in result.lines() if line.startswith("speed ")]
    assert speed.endswith(f" tokens/s, {result.mfu:.1%} MFU")


def test_nothing_is_said_where_it_is_not(dense: Path, tune: Any) -> None:
    result: FinetuneResult = tune(dense, steps=2, log_every=1)
    assert result.mfu is None
    assert "mfu" not in result.to_json()
    assert "MFU" not in "\n".join(result.lines())

"""A plan that loses, invents or misreads a tensor is caught before anything is written."""

from __future__ import annotations

from dataclasses import replace

import pytest

from adaconvert.io.tensor_ref import TensorRef
from adaconvert.planning.accounting import PlanError, check_plan
from adaconvert.planning.digest import plan_digest
from adaconvert.planning.ops import Apply, Bytes, Drop, Exactness, Piece, Plan, TargetTensor
from adaconvert.planning.seeds import seed_for


def ref(name: str, *shape: int, dtype: str = "F32") -> TensorRef:
    size = 4
    for n in shape:
        size *= n
    return TensorRef(
        name=name, dtype=dtype, shape=shape, file="model.safetensors", start=0, nbytes=size
    )


STORED = [{"a": ref("a", 4, 2), "b": ref("b", 3)}]


def whole(name: str) -> Bytes:
    stored = STORED[0][name]
    piece = Piece(source=0, tensor=name, start=0, nbytes=stored.nbytes)
    return Bytes(dtype=stored.dtype, shape=stored.shape, pieces=(piece,))


def target(name: str, expr: Bytes | Apply) -> TargetTensor:
    return TargetTensor(name=name, dtype="F32", shape=expr.shape, expr=expr, group=name)


PLAN = Plan(
    method="m",
    options={},
    sources=("f",),
    targets=(target("x", whole("a")),),
    drops=(Drop(source=0, tensor="b", reason="legacy"),),
    config={},
    exactness=Exactness(kind="exact", why="w"),
)


def test_a_complete_plan_passes() -> None:
    check_plan(PLAN, STORED)


def broken(**changes: object) -> Plan:
    return replace(PLAN, **changes)  # type: ignore[arg-type]


def shifted(**changes: int) -> Bytes:
    expr = whole("a")
    return replace(expr, pieces=(replace(expr.pieces[0], **changes),))


@pytest.mark.parametrize(
    ("plan", "match"),
    [
        (broken(drops=()), "b: tensor of source 0 is neither used nor dropped"),
        (broken(targets=PLAN.targets * 2), "x: made twice"),
        (
            broken(targets=(target("x", whole("a")), target("y", whole("b")))),
            "b: both used and dropped",
        ),
        (broken(targets=(target("x", shifted(nbytes=28)),)), "expected 32 bytes, found 28 bytes"),
        (broken(targets=(target("x", shifted(start=4)),)), "reads outside 'a'"),
        (
            broken(targets=(target("x", shifted(count=2, nbytes=16, stride=20)),)),
            "reads outside 'a'",
        ),
        (broken(targets=(replace(PLAN.targets[0], shape=(2, 4)),)), "x: wrong shape"),
        (
            broken(targets=(target("x", replace(whole("a"), dtype="BF16", shape=(4, 4))),)),
            "or as another dtype",
        ),
        (
            broken(
                targets=(target("x", Apply(fn="scale", shape=(4, 2), args=(shifted(start=4),))),)
            ),
            "reads outside 'a'",
        ),
    ],
)
def test_an_incomplete_plan_is_refused(plan: Plan, match: str) -> None:
    with pytest.raises(PlanError, match=match):
        check_plan(plan, STORED)


def test_the_digest_sees_every_field() -> None:
    assert plan_digest(PLAN) == plan_digest(broken())
    changed = [
        broken(options={"seed": 1}),
        broken(config={"a": 1}),
        broken(targets=(target("x", shifted(start=4)),)),
        broken(sources=("g",)),
    ]
    digests = {plan_digest(PLAN), plan_digest(PLAN, max_shard_size=5), *map(plan_digest, changed)}
    assert len(digests) == 6


def test_seeds_depend_on_name_and_run_seed_only() -> None:
    assert seed_for(0, "a") == seed_for(0, "a")
    assert len({seed_for(0, "a"), seed_for(1, "a"), seed_for(0, "b")}) == 3
    assert 0 <= seed_for(7, "x") < 2**63

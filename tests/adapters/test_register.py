"""PEFT's registry with the method in it."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from typing import Any

import pytest
from peft import PeftConfig, PeftType, get_peft_config
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from adaconvert import adapters
from adaconvert.adapters import MoloraConfig, MoloraLinear, MoloraModel
from adaconvert.adapters.register import register
from adaconvert.errors import ResourceError


def test_the_type_is_a_member_like_any_other() -> None:
    register()
    register()
    member: Any = PeftType("MOLORA")
    assert member is PeftType["MOLORA"]
    assert member is getattr(PeftType, "MOLORA")  # noqa: B009
    assert member in PeftType
    assert member in list(PeftType)
    assert list(PeftType).count(member) == 1
    assert (member.name, member.value, str.lower(member)) == ("MOLORA", "MOLORA", "molora")
    assert member == "MOLORA"
    assert hash(member) == hash("MOLORA")
    assert pickle.loads(pickle.dumps(member)) is member
    assert json.dumps(member) == '"MOLORA"'
    assert PEFT_TYPE_TO_CONFIG_MAPPING["MOLORA"] is MoloraConfig  # type: ignore[index]


def test_a_configuration_survives_its_file(tmp_path: Any) -> None:
    config = MoloraConfig(
        target_modules=["v_proj", "q_proj"],
        scaling=[1.0, 2.0],
        num_experts=2,
        router={"reads": "layer"},
        select={"rule": "top-k", "k": 1, "renormalize": True},
    )
    config.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path) == config
    assert get_peft_config({"peft_type": "MOLORA", "num_experts": 3}).num_experts == 3  # type: ignore[attr-defined]
    assert pickle.loads(pickle.dumps(config)) == config


def test_names_of_the_package() -> None:
    found = {name: getattr(adapters, name) for name in adapters.__all__}
    assert found["MoloraConfig"] is MoloraConfig
    assert found["MoloraLinear"] is MoloraLinear
    assert found["MoloraModel"] is MoloraModel
    assert callable(found["set_routing"])
    with pytest.raises(AttributeError, match="has no attribute 'Absent'"):
        _ = adapters.Absent  # type: ignore[attr-defined]


def test_a_method_of_that_name_that_is_not_ours_is_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    member: Any = PeftType("MOLORA")
    monkeypatch.setitem(PEFT_TYPE_TO_CONFIG_MAPPING, member, PeftConfig)
    with pytest.raises(ResourceError, match="the installed PEFT has a method MOLORA of its own"):
        register()


_FOREIGN = """
import warnings
import peft
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as known
from adaconvert.adapters import register
register._extend("MOLORA")
{fill}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import adaconvert.auto
print([str(one.message) for one in caught if "MOLORA" in str(one.message)])
"""


@pytest.mark.parametrize("fill", ["", "known[peft.PeftType('MOLORA')] = peft.PeftConfig"])
def test_a_peft_with_its_own_method_only_warns(fill: str) -> None:
    code = _FOREIGN.format(fill=fill)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert "has a method MOLORA of its own" in done.stdout
    assert done.stdout.count("MOLORA of its own") == 1


def test_auto_works_without_peft() -> None:
    code = (
        "import sys\n"
        "class Blocked:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] == 'peft':\n"
        "            raise ModuleNotFoundError('no peft here')\n"
        "import importlib.util\n"
        "plain = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda n, *a: None if n == 'peft' else plain(n, *a)\n"
        "sys.meta_path.insert(0, Blocked())\n"
        "import adaconvert.auto\n"
        "print('peft' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=280)
    assert done.stdout.split()[-1:] == ["False"], done.stderr


def test_the_package_costs_nothing_until_it_is_used() -> None:
    code = "import sys, adaconvert.adapters; print('peft' in sys.modules, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["False", "False"], done.stderr

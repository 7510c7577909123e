"""Phi-3, Phi-3.5 and Phi-4-mini: q, k, v in one tensor, gate and up in another."""

from adaconvert.arch.families import common
from adaconvert.arch.family import Family, Rope, Template

_BLOCK = "model.layers.{layer}"

FAMILY = Family(
    model_type="phi3",
    stem="Phi3",
    architectures={"Phi3ForCausalLM": ()},
    keys={
        **common.decoder_keys(
            vocab=32064,
            hidden=3072,
            intermediate=8192,
            layers=32,
            heads=32,
            positions=4096,
            eps=1e-05,
        ),
        "window": common.window_key(None),
    },
    tensors=(
        common.EMBED,
        Template(
            role="qkv",
            name=f"{_BLOCK}.self_attn.qkv_proj.weight",
            shape="heads*head_dim + 2*kv_heads*head_dim, hidden",
        ),
        Template(
            role="o",
            name=f"{_BLOCK}.self_attn.o_proj.weight",
            shape="hidden, heads*head_dim",
        ),
        Template(
            role="gate_up",
            name=f"{_BLOCK}.mlp.gate_up_proj.weight",
            shape="2*intermediate, hidden",
        ),
        Template(
            role="down",
            name=f"{_BLOCK}.mlp.down_proj.weight",
            shape="hidden, intermediate",
        ),
        common.ATTN_NORM,
        common.FFN_NORM,
        common.FINAL_NORM,
        common.HEAD,
    ),
    traits={
        **common.RMS_TRAITS,
    },
    rope=Rope(partial=1.0, renamed={"su": "longrope", "yarn": "longrope"}),
    window="always",
    # the module of the output comes first in memory
    order=("o", "qkv", "gate_up", "down"),
    legacy=common.ROPE_BUFFER,
)

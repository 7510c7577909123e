"""Mixtral: every block sparse, gate, up and down of an expert stored as w1, w3 and w2."""

from adaconvert.arch.families import common
from adaconvert.arch.family import Family, Key, Rope, Routing

_MOE = "model.layers.{layer}.block_sparse_moe"

FAMILY = Family(
    model_type="mixtral",
    stem="Mixtral",
    architectures={"MixtralForCausalLM": ()},
    keys={
        **common.decoder_keys(
            vocab=32000,
            hidden=4096,
            intermediate=14336,
            layers=32,
            heads=32,
            kv_heads=8,
            positions=4096 * 32,
            eps=1e-5,
        ),
        "window": common.window_key(None),
        "experts": Key(name="num_local_experts", default=8, aliases=("num_experts",)),
        "top_k": Key(name="num_experts_per_tok", default=2),
    },
    tensors=(
        common.EMBED,
        *common.attention(),
        common.router(f"{_MOE}.gate"),
        *common.glu(f"{_MOE}.experts.{{expert}}", role="expert_", names=("w1", "w3", "w2")),
        common.ATTN_NORM,
        common.FFN_NORM,
        common.FINAL_NORM,
        common.HEAD,
    ),
    traits=common.RMS_TRAITS,
    rope=Rope(theta=1e6),
    window="always",
    legacy=common.ROPE_BUFFER,
    routing=Routing(stored=_MOE),
)

"""transformers configurations: of a whole checkpoint, and of one of its blocks alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from adaconvert.arch.adaptive import dense_config
from adaconvert.errors import SourceError
from adaconvert.io.names import escape
from adaconvert.io.source import Source
from adaconvert.layerwise.names import as_block, block_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

#: keys that hold one entry per block.
_PER_BLOCK = ("layer_types", "mlp_layer_types", "no_rope_layers")
#: keys that name rows of the embedding, and would point outside a small one.
_TOKEN_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")


def load_config(source: Source) -> PreTrainedConfig:
    """Return the configuration transformers makes of a checkpoint's sanitised config.json.

    It is built from `source.config`, from which every key that can make transformers fetch or run
    code has been removed, and not from the folder.

    Raises:
        SourceError: transformers does not know the model type or refuses a value.
    """
    model_type = str(source.config.get("model_type", ""))
    try:
        return _class_of(source).from_dict(dict(source.config))
    except KeyError:
        raise SourceError(
            f"transformers does not know model_type {escape(model_type)}", where="config.json"
        ) from None
    except Exception as error:
        # strict configurations raise several classes, none of them documented
        raise SourceError(
            f"transformers refuses it: {escape(str(error))}", where="config.json"
        ) from error


def _class_of(source: Source) -> Any:
    """Return the configuration class of a checkpoint; of ours where it is adaptive.

    Raises:
        KeyError: there is none.
    """
    from transformers import CONFIG_MAPPING

    if source.config.get("adaptive") is None:
        return CONFIG_MAPPING[str(source.config.get("model_type", ""))]
    from adaconvert.modeling.configuration_adaptive import made_config

    stock = CONFIG_MAPPING[str(dense_config(source.config)["model_type"])]
    return made_config(f"Adaptive{stock.__name__}")


def depth_of(config: PreTrainedConfig) -> int:
    """Return the number of blocks."""
    return int(config.num_hidden_layers)


def one_block(
    config: PreTrainedConfig, index: int, *, vocab_size: int | None = None
) -> PreTrainedConfig:
    """Return the configuration of a model that consists of block `index` alone.

    Args:
        config: configuration of the whole model.
        index: which block.
        vocab_size: rows of the embedding and the head; as in the whole model when None.
    """
    values = config.to_dict()
    depth = depth_of(config)
    names = config.attribute_map
    for key in _PER_BLOCK:
        entries = values.get(key)
        if isinstance(entries, list) and len(entries) == depth:
            values[key] = [entries[index]]
    values[names.get("num_hidden_layers", "num_hidden_layers")] = 1
    values.update(_sparsity(values, index))
    if values.get("adaptive") is not None:
        values["adaptive"] = _sites_of(values["adaptive"], index)
    if vocab_size is not None:
        values[names.get("vocab_size", "vocab_size")] = vocab_size
        values.update({key: None for key in _TOKEN_IDS if key in values})
    return type(config).from_dict(values)


def without_sites(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the configuration with no site, for a model without blocks; a stock one as it is."""
    values = config.to_dict()
    if values.get("adaptive") is None:
        return config
    values["adaptive"] = {**values["adaptive"], "sites": {}}
    return type(config).from_dict(values)


def _sites_of(adaptive: dict[str, Any], index: int) -> dict[str, Any]:
    """Return `config.adaptive` with the sites of one block, which is the first then."""
    sites = adaptive["sites"]
    own = {as_block(path, 0): slots for path, slots in sites.items() if block_of(path) == index}
    return {**adaptive, "sites": own}


def _sparsity(values: dict[str, Any], index: int) -> dict[str, Any]:
    """Return the keys that make block 0 sparse exactly when block `index` was.

    Source: the conditions in the decoder layers of Qwen2-MoE and Qwen3-MoE (first), GLM4-MoE,
    dots1 and DeepSeek-V2 (second) and ERNIE 4.5 MoE (third), transformers 5.17 and 5.23.
    """
    if "mlp_only_layers" in values:
        step = values.get("decoder_sparse_step") or 1
        dense = index in (values["mlp_only_layers"] or []) or (index + 1) % step != 0
        return {"mlp_only_layers": [0] if dense else [], "decoder_sparse_step": 1}
    if values.get("first_k_dense_replace") is not None:
        return {"first_k_dense_replace": int(index < values["first_k_dense_replace"])}
    if "moe_layer_interval" in values:
        sparse = (index + 1) % values["moe_layer_interval"] == 0 and (
            values["moe_layer_start_index"] <= index <= values["moe_layer_end_index"]
        )
        return {
            "moe_layer_interval": 1,
            "moe_layer_start_index": int(not sparse),
            "moe_layer_end_index": 0,
        }
    return {}

"""BERT encoders: norms after the residual sum, FFN split over two modules, several heads."""

from adaconvert.arch.families import common
from adaconvert.arch.family import Family, Key, Power, Ref, Template

_EMBED = "{p}embeddings"
_BLOCK = "{p}encoder.layer.{layer}"
_SELF = f"{_BLOCK}.attention.self"
_MLM = "cls.predictions"

FAMILY = Family(
    model_type="bert",
    stem="Bert",
    kind="encoder",
    architectures={
        "BertModel": ("pooled",),
        "BertForMaskedLM": ("prefixed", "mlm"),
        "BertForPreTraining": ("prefixed", "pooled", "mlm", "nsp"),
        "BertForNextSentencePrediction": ("prefixed", "pooled", "nsp"),
        "BertForSequenceClassification": ("prefixed", "pooled", "classifier"),
        "BertForTokenClassification": ("prefixed", "classifier"),
        "BertForQuestionAnswering": ("prefixed", "spans"),
    },
    prefix="bert.",
    keys={
        **common.encoder_keys(),
        "vocab": Key(name="vocab_size", default=30522),
        "positions": Key(name="max_position_embeddings", default=512),
        "types": Key(name="type_vocab_size", default=2),
        "decoding": common.flag("is_decoder"),
        "tied": common.flag("tie_word_embeddings", default=True),
    },
    tensors=(
        Template(role="embed", name=f"{_EMBED}.word_embeddings.weight", shape="vocab, hidden"),
        Template(
            role="pos_embed", name=f"{_EMBED}.position_embeddings.weight", shape="positions, hidden"
        ),
        Template(
            role="type_embed", name=f"{_EMBED}.token_type_embeddings.weight", shape="types, hidden"
        ),
        *common.layer_norm("embed_norm", f"{_EMBED}.LayerNorm"),
        *common.linear("q", f"{_SELF}.query", "hidden", "hidden", "always"),
        *common.linear("k", f"{_SELF}.key", "hidden", "hidden", "always"),
        *common.linear("v", f"{_SELF}.value", "hidden", "hidden", "always"),
        *common.linear("o", f"{_BLOCK}.attention.output.dense", "hidden", "hidden", "always"),
        *common.layer_norm("post_attn_norm", f"{_BLOCK}.attention.output.LayerNorm"),
        *common.encoder_ffn(_BLOCK),
        *common.layer_norm("post_ffn_norm", f"{_BLOCK}.output.LayerNorm"),
        *common.head("pooler", "{p}pooler.dense", "hidden", "pooled"),
        *common.head("head_transform", f"{_MLM}.transform.dense", "hidden", "mlm"),
        *common.head_norm("head_norm", f"{_MLM}.transform.LayerNorm", "mlm"),
        Template(role="head_bias", name=f"{_MLM}.bias", shape="vocab", when="mlm"),
        Template(
            role="head",
            name=f"{_MLM}.decoder.weight",
            shape="vocab, hidden",
            when="mlm",
            optional="tied",
        ),
        *common.head("pair_head", "cls.seq_relationship", "2", "nsp"),
        *common.head("classifier", "classifier", "labels", "classifier"),
        *common.head("span_head", "qa_outputs", "labels", "spans"),
    ),
    traits={
        **common.PLAIN_TRAITS,
        "norm_placement": "post_residual",
        "qkv_bias": True,
        "o_bias": True,
        "attention_scale": Power(base="head_dim", exponent=-0.5),
        "activation": Ref(expression="act"),
    },
    refusals={"decoding": "BERT as a decoder is not supported"},
    legacy={
        r"(bert\.)?embeddings\.position_ids": "position numbers, computed by the model",
        r"cls\.predictions\.decoder\.bias": "copy of cls.predictions.bias",
        r"(bert\.pooler|cls\.seq_relationship)\..*": "head the stated architecture does not have",
    },
    renamed={"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"},
)

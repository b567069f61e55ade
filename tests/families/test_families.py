"""Families and geometry of known architectures, and what an unknown one is told."""

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from optimum_mobilequant import quantize
from optimum_mobilequant.families import FAMILIES, Family, family_of, geometry_of, table
from tests.tiny import build, config, logits_of, probe_ids

SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": None,
}  # fmt: skip


def tiny(model_type, **options):
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**SIZES, **options)).eval()


def entry_in(message):
    """The ``Family(...)`` expression that ends an error message, evaluated."""
    text = str(message)
    return eval(text[text.index("Family(") :].rstrip().rstrip(","), {"Family": Family})


@pytest.mark.parametrize(
    ("variant", "name", "heads", "kv_heads", "head_dim", "rotary_dims", "tied"),
    [
        ("llama", "llama", 4, 4, 8, 8, False),
        ("llama-gqa", "llama", 4, 2, 8, 8, False),
        ("llama-mqa", "llama", 4, 1, 8, 8, False),
        ("llama-tied", "llama", 4, 2, 8, 8, True),
        ("mistral", "mistral", 4, 2, 8, 8, False),
        ("qwen2", "qwen2", 4, 2, 8, 8, False),
        ("qwen3", "qwen3", 4, 2, 16, 16, False),
        ("gemma", "gemma", 4, 1, 16, 16, True),
        ("stablelm", "stablelm", 4, 2, 16, 4, False),
    ],
)
def test_family_and_geometry_are_read_from_the_model(variant, name, heads, kv_heads, head_dim, rotary_dims, tied):
    model = build(variant)
    family = family_of(model)
    g = geometry_of(model, family)
    assert family.name == name
    assert (g.heads, g.kv_heads, g.head_dim, g.rotary_dims, g.tied) == (heads, kv_heads, head_dim, rotary_dims, tied)
    assert (g.layers, g.mlp, g.vocabulary, g.hidden) == (2, 48, 96, model.config.hidden_size)
    assert g.groups == heads // kv_heads


def test_model_types_belong_to_one_family():
    types = [t for family in FAMILIES for t in family.model_types]
    assert len(types) == len(set(types))
    assert len({f.name for f in FAMILIES}) == len(FAMILIES)


class NewLlamaConfig(LlamaConfig):
    model_type = "newllama"


def new_llama():
    """Llama under a name that no family serves."""
    torch.manual_seed(0)
    return LlamaForCausalLM(NewLlamaConfig(**SIZES)).eval()


def test_unknown_architecture_is_answered_with_an_entry_that_works(monkeypatch):
    model = new_llama()
    with pytest.raises(
        ValueError, match='no family serves model_type "newllama" \\(known: llama, .*stablelm\\)'
    ) as error:
        family_of(model)
    entry = entry_in(error.value)
    assert entry == Family("newllama", model_types=("newllama",))
    monkeypatch.setattr(table, "FAMILIES", (*FAMILIES, entry))
    reference = logits_of(model)
    quantized = logits_of(quantize(model, None, config("w8a16")))
    assert (quantized - reference).norm() < 0.05 * reference.norm()


@pytest.mark.parametrize("variant", ["llama", "mistral", "qwen2", "qwen3", "gemma", "stablelm"])
def test_suggested_entry_of_a_known_architecture_is_its_own(variant, monkeypatch):
    """What the suggestion derives from the modules alone agrees with the table."""
    model = build(variant)
    own = family_of(model)
    monkeypatch.setattr(table, "FAMILIES", ())
    with pytest.raises(ValueError, match="no family serves") as error:
        family_of(model)
    entry = entry_in(error.value)
    beyond_the_modules = {"unsupported": None, "bias_flags": None}  # flags of the config
    assert {**vars(entry), **beyond_the_modules} == {**vars(own), **beyond_the_modules}


def test_entry_for_another_llama_like_architecture_works(monkeypatch):
    model = tiny("seed_oss")
    with pytest.raises(ValueError, match='model_type "seed_oss"') as error:
        family_of(model)
    monkeypatch.setattr(table, "FAMILIES", (entry_in(error.value),))
    reference = logits_of(model)
    quantized = logits_of(quantize(model, None, config("w8a16")))
    assert (quantized - reference).norm() < 0.05 * reference.norm()


@pytest.mark.parametrize(("model_type", "roles"), [
    ("gpt_neox", {"query", "key", "value", "gate", "up", "down"}),
    ("phi3", {"query", "key", "value", "gate", "up"}),
    ("cohere", {"mlp_norm"}),
])  # fmt: skip
def test_roles_that_an_architecture_lacks_are_marked(model_type, roles):
    options = {"num_key_value_heads": None} if model_type == "gpt_neox" else {}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**{**SIZES, **options}))
    with pytest.raises(ValueError, match=f'no family serves model_type "{model_type}"') as error:
        family_of(model)
    entry = entry_in(error.value)
    assert {role for role, value in vars(entry).items() if value is ...} == roles
    assert str(error.value).count("# no module of its own") == len(roles)


def test_family_can_be_named_by_hand():
    model = new_llama()
    assert family_of(model, "llama").name == "llama"
    quantized = quantize(model, None, config(family="llama"))
    assert torch.isfinite(logits_of(quantized, probe_ids())).all()


def test_wrong_or_unknown_family_name_is_refused():
    with pytest.raises(ValueError, match='family "lama" is unknown; known: llama, mistral'):
        family_of(build("llama"), "lama")
    with pytest.raises(ValueError, match='family "qwen3" expects modules that this model lacks: .*q_norm'):
        family_of(build("llama"), "qwen3")


@pytest.mark.parametrize(
    ("flag", "what"), [("qk_layernorm", "per-head LayerNorm"), ("use_parallel_residual", "parallel")]
)
def test_unsupported_option_of_a_family_is_refused(flag, what):
    with pytest.raises(ValueError, match=f"stablelm with {flag}=True \\({what}.*\\) is not supported"):
        family_of(build("stablelm", **{flag: True}))

"""A model whose architecture is not in the table: let the error write the entry, check it, use it.

    python examples/own_architecture.py

The model here is a Llama under another name; with yours, copy the entry into families/table.py.
"""

from __future__ import annotations

from transformers import LlamaConfig, LlamaForCausalLM

from optimum_mobilequant import MobileQuantConfig, quantize


class OtherConfig(LlamaConfig):
    model_type = "other"


class OtherForCausalLM(LlamaForCausalLM):
    config_class = OtherConfig


sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
model = OtherForCausalLM(
    OtherConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
)
ids = [[(7 * i + j) % 64 for j in range(32)] for i in range(16)]
settings = {"dataset": ids, "recipe": "rtn", "effort": "none", "samples": 16, "seq_len": 32}

try:
    quantize(model, None, MobileQuantConfig("w8a8", **settings))
except ValueError as error:
    print(f"The error, with the entry for families/table.py:\n{error}\n")

# The modules are Llama's, so naming that family is enough; it is checked that the function stays the same.
quantized = quantize(model, None, MobileQuantConfig("w8a8", family="llama", **settings))
print(f"quantized as {quantized.config.quantization_config.family}: {quantized.get_memory_footprint()} bytes")

"""Qualcomm's Hexagon tensor processor (HTP) as QNN drives it.

Unless a rule says otherwise, it was found by building one operation at a time with the HTP emulator of
onnxruntime-qnn 2.7.0 (QAIRT 2.51.0), SoC 69, falling back to the CPU forbidden, and comparing the result with ONNX
Runtime on the CPU. The names of the systems on chip are those that the same library writes into the context binary
for a ``soc_model``. No phone was used.
"""

from __future__ import annotations

from .rules import REFUSED, UNVERIFIED, WIDEN, Rule, Soc, Target

_ANY = (8, 16)
_PRODUCT_FIX = (
    'give the second operand 8 bits, as the presets do: overrides={"*.key_rotated": {"bits": 8}, '
    '"*.v_proj.output": {"bits": 8}}'
)

_LINEAR = (
    Rule(
        "linear",
        {"weight": (3, 16)},
        REFUSED,
        "HTP multiplies with weights of 4 or 8 bits",
        'give these weights 4 or 8 bits, e.g. bit_choices=[4, 8], or overrides={"*_proj": {"weight_bits": 4}}',
    ),
    Rule(
        "linear",
        {"granularity": ("block",)},
        REFUSED,
        "HTP multiplies with one scale for each output channel, or for the whole tensor",
        'quantize the float model with preset "w4a8" or "w4a16"',
    ),
    Rule(
        "linear",
        {"granularity": ("channel",), "symmetric": (False,)},
        REFUSED,
        "weights with a scale for each channel must be symmetric",
        'use preset "w4a8" or "w8a8", or overrides={"*_proj": {"weight_symmetric": True}}',
    ),
    Rule(
        "linear",
        {"input": (None,), "output": (None,), "weight": (4, 8)},
        UNVERIFIED,
        "integer weights with 16-bit float activations: Qualcomm's models have them (precision w4), but the emulator "
        "took them only with one scale for the tensor",
    ),
    Rule("linear", {"granularity": ("tensor",), "weight": (4, 8), "input": _ANY, "output": _ANY}),
    *(Rule("linear", {"granularity": ("channel",), "weight": (4, 8), "input": (n,), "output": (n,)}) for n in _ANY),
    Rule(
        "linear",
        {"granularity": ("channel",), "weight": (4, 8), "input": (16,), "output": (8,)},
        why="computed with 16 bits, then converted: converters insert that (onnxruntime-qnn pull request 574)",
    ),
    Rule(
        "linear",
        {"granularity": ("channel",), "weight": (4, 8), "input": (8,), "output": (16,)},
        WIDEN,
        "input and output must have equal bits; left alone, a converter computes with the input's 8 bits "
        "(onnxruntime-qnn pull request 574)",
        widen=("input",),
    ),
)
_NORM = (
    Rule(
        "norm",
        {"norm": ("layer",), "output": (8,)},
        WIDEN,
        "a LayerNorm with 16-bit gain needs 16 bits on both sides",
        widen=("output",),
    ),
    Rule("norm", {"norm": ("layer",), "input": (8,)}, WIDEN, "as above", widen=("input",)),
    Rule(
        "norm",
        {"norm": ("rms",), "input": (8,), "output": (8,)},
        WIDEN,
        "an RMS norm with 16-bit gain needs 16 bits on one side",
        widen=("input",),
    ),
    Rule("norm", {"weight": (16,), "input": _ANY, "output": _ANY}),
)
_ATTENTION = tuple(
    rule
    for kind in ("scores", "context")
    for rule in (
        Rule(
            kind,
            {"second": (16,)},
            REFUSED,
            "the second operand of a product of activations has 8 bits on HTP (16 x 16: 43 dB, 8 x 16 refused)",
            _PRODUCT_FIX,
        ),
        Rule(kind, {"input": _ANY, "second": (8,), "output": _ANY}),
    )
)
_FUNCTIONS = ("silu", "swish", "gelu", "gelu_pytorch_tanh", "gelu_new", "gelu_fast", "relu")

QNN_HTP = Target(
    name="qnn_htp",
    summary="Qualcomm Hexagon tensor processor, through QNN",
    rules=(
        *_LINEAR,
        *_NORM,
        *_ATTENTION,
        Rule("embedding", {"weight": _ANY, "output": _ANY}),
        *(Rule(kind, {"input": _ANY, "output": _ANY}) for kind in ("split_heads", "merge_heads", "concat")),
        Rule("rope", {"input": _ANY, "second": (16,), "shift": (0, 16), "output": _ANY}),
        Rule("mask", {"input": _ANY, "output": (16,)}),
        Rule("softmax", {"input": _ANY, "output": _ANY}),
        *(Rule(kind, {"input": _ANY, "second": _ANY, "output": _ANY}) for kind in ("add", "multiply")),
        Rule("activation", {"function": _FUNCTIONS, "input": _ANY, "output": _ANY}),
        Rule("activation", {"function": ("sigmoid", "tanh"), "input": _ANY, "output": (8,)}),
        Rule(
            "activation",
            {"function": ("sigmoid", "tanh"), "output": (16,)},
            REFUSED,
            "a 16-bit sigmoid or tanh is right on one fixed output range only",
            'give it 8 bits: overrides={"*.act_fn.output": {"bits": 8}}',
        ),
        Rule("*", {"floats": (True,)}, why="16-bit float"),
    ),
    socs={
        name: Soc(name, *facts)
        for name, facts in {
            "sm8350": (30, 68),
            "sm8450": (36, 69),
            "sm8550": (43, 73),
            "sm8650": (57, 75),
            "sm8750": (69, 79),
            "sm8850": (87, 81),
            "sm8635": (68, 73),
            "sm8735": (85, 73),
            "sm7550": (64, 73),
            "sm7675": (70, 73),
            "sc8380xp": (60, 73),
            "qcs8550": (66, 73),
            "qcs9100": (77, 73),
            "sa8255": (52, 73),
        }.items()
    },
)

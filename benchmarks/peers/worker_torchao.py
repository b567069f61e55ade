"""torchao: static int8 through its SmoothQuant prototype (alpha None: without smoothing), and dynamic quantization.

Smoothing is a product with the input at run time; it is not merged into the norm before. Static activations go with
weights of 8 bits only.
"""

import torch
from common import Job, Method, Quantized, main, projections
from torchao.prototype.smoothquant import SmoothQuantConfig
from torchao.quantization import (
    Int8DynamicActivationIntxWeightConfig,
    Int8StaticActivationInt8WeightConfig,
    MappingType,
    PerAxis,
    PerRow,
    PerTensor,
    quantize_,
)
from torchao.quantization.quantize_.common.quantization_step import QuantizationStep
from transformers import PreTrainedModel


def static(alpha: float | None) -> Method:
    def method(model: PreTrainedModel, job: Job) -> Quantized:
        if (job.weight_bits, job.activation_bits) != (8, 8):
            raise ValueError("not offered: static activations go with weights of 8 bits only")
        layers = projections(model)
        chosen = {id(layer) for layer in layers.values()}
        base = Int8StaticActivationInt8WeightConfig(
            granularity=[PerTensor(), PerRow()], act_mapping_type=MappingType.ASYMMETRIC, set_inductor_config=False
        )
        config = SmoothQuantConfig(base_config=base, step=QuantizationStep.PREPARE, alpha=alpha)
        quantize_(model, config, lambda module, path: id(module) in chosen)
        with torch.no_grad():
            for batch in job.batches():
                model(input_ids=batch, use_cache=False)
        config.step = QuantizationStep.CONVERT
        quantize_(model, config, lambda module, path: path in layers)
        return weights_of(model, list(layers), fixed=True)

    return method


def dynamic(model: PreTrainedModel, job: Job) -> Quantized:
    layers = projections(model)
    config = Int8DynamicActivationIntxWeightConfig(
        weight_dtype=getattr(torch, f"int{job.weight_bits}"), weight_granularity=PerAxis(0)
    )
    quantize_(model, config, lambda module, path: path in layers)
    return weights_of(model, list(layers), fixed=False)


def weights_of(model: PreTrainedModel, paths: list[str], *, fixed: bool) -> Quantized:
    weights = {path: model.get_submodule(path).weight for path in paths}
    counted = sum(not fixed or weight.act_quant_scale is not None for weight in weights.values())
    return Quantized(model.eval(), {path: weight.dequantize() for path, weight in weights.items()}, counted)


if __name__ == "__main__":
    main({"static": static(None), "smoothquant": static(0.5), "dynamic": dynamic}, "torchao")

"""llm-compressor: rounding to nearest, GPTQ, SmoothQuant before it; static asymmetric activations."""

from common import BATCH, Job, Method, Quantized, main, projections, tokenizer_of
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from llmcompressor import oneshot
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel


def method(modifier: type[Modifier], observer: str | None, *before: Modifier) -> Method:
    """``observer`` chooses the scales of the weights; None: the library's default, min/max."""

    def quantize(model: PreTrainedModel, job: Job) -> Quantized:
        layers = list(projections(model))
        scheme = QuantizationScheme(
            targets=["Linear"],
            weights=QuantizationArgs(num_bits=job.weight_bits, strategy="channel", symmetric=True, observer=observer),
            input_activations=QuantizationArgs(num_bits=job.activation_bits, strategy="tensor", symmetric=False),
        )
        chunks = [{"input_ids": chunk} for chunk in job.calibration]
        model = oneshot(
            model=model,
            tokenizer=tokenizer_of(job),
            dataset=DataLoader(chunks, batch_size=BATCH),
            recipe=[*before, modifier(config_groups={"projections": scheme}, ignore=["lm_head"])],
            num_calibration_samples=len(chunks),
            max_seq_length=job.calibration.shape[1],
        ).eval()
        quantized = {path: model.get_submodule(path) for path in layers}
        static = sum(hasattr(layer, "input_scale") for layer in quantized.values())
        return Quantized(model, {path: rounded(layer) for path, layer in quantized.items()}, static)

    return quantize


def rounded(layer: nn.Module) -> Tensor:
    args = layer.quantization_scheme.weights
    return fake_quantize(layer.weight, layer.weight_scale, getattr(layer, "weight_zero_point", None), args)


if __name__ == "__main__":
    methods = {
        "rtn": method(QuantizationModifier, None),
        "gptq": method(GPTQModifier, "mse"),
        "smoothquant + gptq": method(GPTQModifier, "mse", SmoothQuantModifier(smoothing_strength=0.5)),
    }
    main(methods, "llmcompressor", "compressed-tensors")

"""AIMET: rounding to nearest, sequential MSE and AdaScale, in its configuration for Qualcomm's accelerator.

Beyond the weights, the outputs of projections, norms and activation functions are quantized to 8 bits, and the inputs
of projections where no quantized output feeds them already. What is the same in all rows of the table is set by hand:
the configuration rounds gains of norms to the bits of the weights, and embedding and head as well; they stay float.
"""

import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch
from common import BATCH, Job, Method, Quantized, main, projections
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

CONFIG = "htp_quantsim_config_v75_per_channel_linear.json"
CANDIDATES = 20
ITERATIONS = 300


def without_torchvision() -> None:
    """aimet_torch imports torchvision, which does not load beside a CPU build of torch, for classes unused here."""
    for name, classes in {"": (), ".datasets": (), ".transforms": ("Resize",), ".ops": ("RoIPool",)}.items():
        module = ModuleType(f"torchvision{name}")
        module.__spec__ = ModuleSpec(module.__name__, None)
        for each in classes:
            setattr(module, each, type(each, (nn.Module,), {}))
        sys.modules[module.__name__] = module
        if name:
            setattr(sys.modules["torchvision"], name[1:], module)


class Logits(nn.Module):
    """A model that returns a tensor, as AIMET asks for; ``return_dict=False`` no longer works in transformers 5.23."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits


class Scored(nn.Module):
    """Back again: a model that returns what transformers' models do."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> CausalLMOutput:
        return CausalLMOutput(logits=self.model(input_ids))


def rtn(sim: object, job: Job) -> None:
    pass


def seqmse(sim: object, job: Job) -> None:
    from aimet_torch.seq_mse import apply_seq_mse

    apply_seq_mse(sim, DataLoader(job.calibration, batch_size=BATCH), num_candidates=CANDIDATES)


def adascale(sim: object, job: Job) -> None:
    from aimet_torch.adascale import adascale_optimizer as library

    model = sim.model.model.model
    if type(model) not in library.adascale_model_config_dict:
        raise ValueError(f"not offered: AdaScale does not know {type(model).__name__}")
    library.AdaScale.apply_adascale(sim, DataLoader(job.calibration, batch_size=BATCH), num_iterations=ITERATIONS)


def method(learn) -> Method:
    def quantize(model: PreTrainedModel, job: Job) -> Quantized:
        from aimet_torch import QuantizationSimModel
        from aimet_torch.nn import QuantizationMixin

        for module in model.modules():  # of Llama and a few others AIMET knows by itself that it is not quantized
            if type(module).__name__.endswith("RotaryEmbedding"):
                QuantizationMixin.ignore(type(module))
        paths = [f"model.{path}" for path in projections(model)]
        config = Path(find_spec("aimet_torch").origin).parent / "common" / "quantsim_config" / CONFIG
        sim = QuantizationSimModel(
            Logits(model),
            job.calibration[:1],
            quant_scheme="tf",  # min/max
            default_output_bw=job.activation_bits,
            default_param_bw=job.weight_bits,
            config_file=str(config),
        )
        count = only_projections(sim.model, paths)
        learn(sim, job)

        def calibrate(quantized: nn.Module) -> None:
            for batch in job.batches():
                quantized(batch)

        sim.compute_encodings(torch.no_grad()(calibrate))
        layers = {path: sim.model.get_submodule(path) for path in paths}
        with torch.no_grad():
            weights = {path: layer.param_quantizers["weight"](layer.weight) for path, layer in layers.items()}
            weights = {path: weight.dequantize().as_subclass(Tensor) for path, weight in weights.items()}
        return Quantized(Scored(sim.model.eval()), weights, count)

    return quantize


def only_projections(model: nn.Module, paths: list[str]) -> int:
    """Remove the quantizers of other weights, of the embedding and of the head; how many activations are left."""
    from aimet_torch.nn import BaseQuantizationMixin

    count = 0
    for path, module in model.named_modules():
        if not isinstance(module, BaseQuantizationMixin):
            continue
        if path not in paths:
            for name in module.param_quantizers:
                module.param_quantizers[name] = None
        if isinstance(module, nn.Embedding) or path == "model.lm_head":
            for quantizers in (module.input_quantizers, module.output_quantizers):
                for index in range(len(quantizers)):
                    quantizers[index] = None
        count += sum(q is not None for q in (*module.input_quantizers, *module.output_quantizers))
    return count


if __name__ == "__main__":
    without_torchvision()
    main({"rtn": method(rtn), "seqmse": method(seqmse), "adascale": method(adascale)}, "aimet-torch")

"""AutoRound: rounding and weight ranges learned block by block by signed gradients; static activations.

``amp=False`` keeps the model in float32 (by default it is cast to bfloat16). The library calls static integer
activations experimental and saves them as float weights only, so that the model is scored as it comes back.
"""

from auto_round import AutoRound
from auto_round.schemes import QuantizationScheme
from common import BATCH, Job, Method, Quantized, main, projections, tokenizer_of
from transformers import PreTrainedModel

ITERATIONS = 200


def autoround(iterations: int) -> Method:
    def method(model: PreTrainedModel, job: Job) -> Quantized:
        layers = projections(model)
        count, length = job.calibration.shape
        scheme = QuantizationScheme(
            bits=job.weight_bits, group_size=-1, sym=True, data_type="int",
            act_bits=job.activation_bits, act_group_size=0, act_sym=True, act_data_type="int", act_dynamic=False,
        )  # fmt: skip
        compressor = AutoRound(
            model,
            tokenizer_of(job),
            scheme=scheme,
            dataset=[{"input_ids": batch} for batch in job.batches()],
            iters=iterations,
            seqlen=length,
            nsamples=count,
            batch_size=BATCH,
            device_map="cpu",
            enable_torch_compile=False,
            seed=job.seed,
            amp=False,
        )
        quantized, _ = compressor.quantize()
        wrapped = {path: m for path, m in quantized.named_modules() if type(m).__name__ == "WrapperWALayer"}
        if wrapped.keys() != layers.keys():
            raise RuntimeError(f"{len(wrapped)} of {len(layers)} projections are quantized")
        static = sum(getattr(layer.orig_layer, "act_max", None) is not None for layer in wrapped.values())
        return Quantized(quantized.eval(), {path: layer.weight for path, layer in wrapped.items()}, static)

    return method


if __name__ == "__main__":
    main({"rtn": autoround(0), "autoround": autoround(ITERATIONS)}, "auto-round")

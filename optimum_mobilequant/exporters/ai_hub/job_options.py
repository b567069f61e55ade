"""The options of each kind of job, as the command-line-like strings that AI Hub takes.

The client sends them unparsed, so a wrong one shows only on the server. What each row rests on:

* "source": Qualcomm's own exporter of language models (qai-hub-models 0.65) sends it;
* "reported": user guides and public job logs name it;
* nothing here was sent to the real service.
"""

from __future__ import annotations

from collections.abc import Sequence

COMPILE_OPTIONS = (
    # source. A DLC is what a link job takes.
    "--target_runtime qnn_dlc",
    # source. Names and order of the outputs of the compiled graph.
    "--output_names {outputs}",
    # source. The name by which a linked binary keeps the graphs apart; profile and inference choose by it.
    "--qnn_options context_enable_graphs={graph}",
    # source: this value, with .aimet folders, for 4-bit weights too: encodings that are there win, and the folders of
    # the qnn target have one for every tensor. reported: int8, int16, w8a16, w4a8, w4a16 are the values taken.
    # Not verified: that int8 would do as well for graphs whose activations all have 8 bits.
    "--quantize_full_type w8a16",
    # source. Integer tensors at the graph's inputs and outputs.
    "--quantize_io",
)
# source: empty. One default version of QAIRT serves all jobs; --qairt_version would have to agree in all of them.
LINK_OPTIONS: tuple[str, ...] = ()
INFERENCE_OPTIONS = (
    # source. Without it the first graph of a linked binary would run.
    "--qnn_options context_enable_graphs={graph}",
    # source. The service's default is 100 runs.
    "--max_profiler_iterations 50",
)


def compile_options(graph: str, outputs: Sequence[str]) -> str:
    """Options of the compile job of one graph.

    Args:
        graph: its name in the linked binary.
        outputs: names of its outputs, in order.
    """
    return " ".join(COMPILE_OPTIONS).format(graph=graph, outputs=",".join(outputs))


def link_options() -> str:
    """Options of the link job."""
    return " ".join(LINK_OPTIONS)


def inference_options(graph: str) -> str:
    """Options of the job that profiles one graph of the linked binary and runs it on given inputs."""
    return " ".join(INFERENCE_OPTIONS).format(graph=graph)

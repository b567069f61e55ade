"""A prefix in a Genie bundle: the state of a dialog, restored before the first query."""

import json
import tempfile

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.exporters import phone

phone.require_emulator()

from optimum_mobilequant import quantize  # noqa: E402
from optimum_mobilequant.exporters import export  # noqa: E402
from optimum_mobilequant.exporters.genie_runner import generate  # noqa: E402
from optimum_mobilequant.graph.executor import IntegerExecutor  # noqa: E402
from optimum_mobilequant.nn.prefix import prefix_codes  # noqa: E402
from tests import tiny  # noqa: E402
from tests.prefix.fixture import PREFIX  # noqa: E402

CONTEXT, CHUNK, PROMPT = 64, 16, [9, 11, 30, 8]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A checkpoint with a prefix, its bundle, and what Genie writes, with its dumps."""
    folder = tmp_path_factory.mktemp("genie")
    tokenizer = phone.byte_tokenizer()
    model = tiny.build("llama-gqa", vocab_size=len(tokenizer))
    quantize(model, None, tiny.config("w8a8", prefix=PREFIX)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    bundle = export(folder / "model", "genie", folder / "bundle", context=CONTEXT, prompt_length=CHUNK).path
    (dump := folder / "dump").mkdir()
    return (
        AutoModelForCausalLM.from_pretrained(folder / "model"),
        bundle,
        dump,
        generate(bundle, PROMPT, tokens=4, dump=dump),
    )


def first_call(dump, name, dtype):
    (file,) = dump.rglob(f"000_in_{name}")
    return np.fromfile(file, dtype)


def test_the_first_call_reads_the_prompt_behind_the_prefix(made):
    model, _, dump, _ = made
    ids = first_call(dump, "input_ids", np.int32)
    assert ids[: len(PROMPT)].tolist() == PROMPT, "nothing stands before the prompt"
    for i, (key, value) in enumerate(prefix_codes(model)):
        keys = first_call(dump, f"past_key_{i}_in", np.uint8).reshape(2, 8, -1)
        values = first_call(dump, f"past_value_{i}_in", np.uint8).reshape(2, -1, 8)
        assert np.array_equal(keys[..., :2], key.numpy().swapaxes(1, 2))
        assert np.array_equal(values[:, :2], value.numpy())
    mask = first_call(dump, "attention_mask", np.uint16).reshape(CHUNK, CONTEXT)
    assert np.nonzero(mask[1])[0].tolist() == [0, 1, CONTEXT - CHUNK, CONTEXT - CHUNK + 1]
    cos = first_call(dump, "position_ids_cos", np.uint16).reshape(CHUNK, -1)
    expected = IntegerExecutor.of(model).inputs.cos[: len(PROMPT)].numpy().astype(int) + 2**15
    assert np.abs(cos[: len(PROMPT)].astype(int) - expected).max() <= 1


def test_genie_writes_what_the_executor_writes(made):
    model, _, _, found = made
    expected = IntegerExecutor.of(model).generate(torch.tensor([PROMPT]), 4)[0, len(PROMPT) :].tolist()
    assert found.ids == expected


def test_the_bundle_says_that_it_has_a_prefix(made):
    _, bundle, _, _ = made
    assert json.loads((bundle / "metadata.json").read_text())["prefix"] == PREFIX
    assert 'GenieDialog_restore(dialog, "prefix")' in (bundle / "README.md").read_text()


def test_without_the_state_genie_writes_something_else(made):
    _, bundle, _, found = made
    with tempfile.TemporaryDirectory() as aside:
        (bundle / "prefix").rename(f"{aside}/prefix")
        try:
            assert generate(bundle, PROMPT, tokens=4).ids != found.ids
        finally:
            (bundle.__class__(aside) / "prefix").rename(bundle / "prefix")

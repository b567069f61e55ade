"""Folders of the qnn target, their sample inputs, and the option strings made from them."""

import json
import math
import zipfile

import numpy as np
import pytest

from optimum_mobilequant.exporters.ai_hub import job_options
from optimum_mobilequant.exporters.ai_hub.folders import read_folders, scratch
from optimum_mobilequant.exporters.ai_hub.samples import digest_of, sample_inputs

PROMPT, TOKEN = "prompt_ar4_cl8", "token_ar1_cl8"


def edit(folder, change):
    path = folder / "io_spec.json"
    spec = json.loads(path.read_text())
    change(spec["graphs"])
    path.write_text(json.dumps(spec))


def test_both_graphs_are_read_in_order(aimet):
    prompt, token = read_folders(aimet)
    assert (prompt.name, token.name) == (PROMPT, TOKEN)
    assert [t.name for t in prompt.inputs][:2] == ["input_ids", "attention_mask"]
    assert prompt.inputs[1].shape == (1, 1, 4, 8) and prompt.inputs[0].scale is None
    assert [t.dtype for t in token.outputs] == ["uint16"]
    assert read_folders(aimet) == (prompt, token)  # digests included


@pytest.mark.parametrize("change", ["file", "name", "spec"])
def test_the_digest_sees_every_change(aimet, change):
    before = {graph.name: graph.digest for graph in read_folders(aimet)}
    folder = aimet / f"{TOKEN}.aimet"
    if change == "file":
        data = bytearray((folder / "model.data").read_bytes())
        data[-1] ^= 1
        (folder / "model.data").write_bytes(data)
    elif change == "name":
        (folder / "model.data").rename(folder / "weights.data")
    else:
        edit(aimet, lambda graphs: graphs[TOKEN]["inputs"][1].update(scale=0.5))
    after = {graph.name: graph.digest for graph in read_folders(aimet)}
    assert after[PROMPT] == before[PROMPT] and after[TOKEN] != before[TOKEN]


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda f: (f / f"{TOKEN}.aimet" / "README.md").write_text("x"), "nothing else, but .*README.md"),
        (lambda f: (f / f"{TOKEN}.aimet" / "model.onnx").unlink(), "takes one .onnx"),
        (lambda f: (f / f"{TOKEN}.aimet" / "more.encodings").write_text("x"), "takes one .onnx, one .encodings"),
        (lambda f: (f / "third.aimet").mkdir(), "third.aimet, which io_spec.json does not list"),
        (lambda f: (f / "io_spec.json").write_text("{"), "io_spec.json is damaged"),
        (lambda f: edit(f, lambda g: g.clear()), "lists no graph"),
        (lambda f: edit(f, lambda g: g[TOKEN]["inputs"][0].update(dtype="float32")), "input_ids is float32"),
        (lambda f: edit(f, lambda g: g[TOKEN]["inputs"][1].update(scale=0)), "attention_mask has the scale 0"),
        (lambda f: edit(f, lambda g: g[TOKEN]["inputs"][1].update(zero_point=None)), "attention_mask has the scale"),
        (lambda f: edit(f, lambda g: g[TOKEN]["inputs"][1].update(shape=[1, "S"])), "has the shape"),
    ],
)
def test_what_the_service_would_refuse_is_refused_here(aimet, spoil, expected):
    spoil(aimet)
    with pytest.raises(ValueError, match=expected):
        read_folders(aimet)


def test_missing_parts_are_named(aimet):
    edit(aimet, lambda graphs: graphs.update(other=graphs[TOKEN]))
    with pytest.raises(FileNotFoundError, match=r"other\.aimet is missing"):
        read_folders(aimet)
    (aimet / "io_spec.json").unlink()
    with pytest.raises(FileNotFoundError, match="written by the qnn target"):
        read_folders(aimet)


def test_an_archive_holds_the_folder_and_scratch_is_cleaned(aimet, out):
    prompt, _ = read_folders(aimet)
    (out / ".transfer").mkdir()
    (out / ".transfer" / "left by a killed run").touch()
    with scratch(out) as folder:
        assert not list(folder.iterdir())
        with zipfile.ZipFile(prompt.archive(folder)) as archive:
            assert sorted(archive.namelist()) == [f"{PROMPT}.aimet/model.{s}" for s in ("data", "encodings", "onnx")]
    assert not list(out.iterdir())


def test_samples_are_a_prompt_with_an_empty_cache(aimet):
    prompt, token = read_folders(aimet)
    feeds = sample_inputs(prompt, [5, 6, 7])
    assert feeds["input_ids"].tolist() == [[5, 6, 7, 5]] and feeds["input_ids"].dtype == np.int32
    mask = feeds["attention_mask"][0, 0]
    assert mask.tolist() == [[0] * 4 + [65535] * (i + 1) + [0] * (3 - i) for i in range(4)]
    assert (feeds["past_key_0_in"] == 128).all() and (feeds["past_value_0_in"] == 120).all()  # zeros
    angles = [[position * 10000 ** (-pair / 2) for pair in range(2)] for position in range(4)]
    cos = feeds["position_ids_cos"][0, 0]
    assert np.allclose(cos / 2**14, [[math.cos(a) for a in row] for row in angles], atol=2**-15)
    for tensor in prompt.inputs:
        assert feeds[tensor.name].shape == tensor.shape and feeds[tensor.name].dtype == tensor.dtype
    assert sample_inputs(token)["attention_mask"].tolist() == [[[[0] * 7 + [65535]]]]
    assert digest_of(feeds) != digest_of(sample_inputs(prompt)) == digest_of(sample_inputs(prompt))


def test_an_unknown_input_has_no_sample(aimet):
    edit(aimet, lambda graphs: graphs[TOKEN]["inputs"][1].update(name="cache_index"))
    with pytest.raises(ValueError, match="'cache_index', for which no sample"):
        sample_inputs(read_folders(aimet)[1])


def test_option_strings():
    assert job_options.compile_options("token_ar1_cl8", ["logits", "past_key_0_out"]) == (
        "--target_runtime qnn_dlc --output_names logits,past_key_0_out "
        "--qnn_options context_enable_graphs=token_ar1_cl8 --quantize_full_type w8a16 --quantize_io"
    )
    assert job_options.link_options() == ""
    assert job_options.inference_options("g") == "--qnn_options context_enable_graphs=g --max_profiler_iterations 50"

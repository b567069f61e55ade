"""What the card of a checkpoint says, and that it says nothing else."""

import json
import re

import pytest
from huggingface_hub import ModelCard

from optimum_mobilequant import inspect_checkpoint, quantize
from optimum_mobilequant.hub.base import Base
from optimum_mobilequant.hub.card import MARKER, build_card, is_own, merge, model_card
from optimum_mobilequant.hub.facts import read_facts
from optimum_mobilequant.hub.names import hub_id_of, is_hub_id
from optimum_mobilequant.hub.tags import merge_tags, tags_of
from tests import tiny

REPO = "me/model-w4a8"


def edit(folder, **changes):
    """Change recorded values, or others of the quantization config, in a saved config.json."""
    config = json.loads((folder / "config.json").read_text())
    quantization = config["quantization_config"]
    for key, value in changes.items():
        (quantization["recorded"] if key in quantization["recorded"] or key == "base_model" else quantization)[key] = (
            value
        )
    (folder / "config.json").write_text(json.dumps(config))


def test_metadata(folder, caplog):
    edit(folder, base_model="org/model")
    data = model_card(folder, REPO, license="mit").data.to_dict()
    results = data.pop("model-index")
    assert data == {
        "base_model": "org/model",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "license": "mit",
        "pipeline_tag": "text-generation",
        "tags": ["mobilequant", "w4a8", "int4", "integer-only", "npu"],
    }
    recorded = read_facts(folder).config.recorded["validation_perplexity"]
    assert results[0]["name"] == "model-w4a8"
    assert results[0]["results"][0]["metrics"] == [
        {
            "type": "perplexity",
            "value": pytest.approx(recorded["quantized"], rel=1e-5),
            "name": "perplexity",
            "args": {"seed": 0},
            "verified": False,
        }
    ]
    assert caplog.text == ""


def test_what_is_not_known_is_left_out_and_said(folder, caplog):
    edit(folder, validation_perplexity={"float": 3.0, "start": None, "quantized": float("inf")})
    card = model_card(folder, REPO)
    assert not {"base_model", "base_model_relation", "license", "datasets", "model-index", "model_name"} & set(
        card.data.to_dict()
    )
    assert "the card names none: give --license" in caplog.text
    assert "None were recorded" in card.text
    assert "a float model quantized to integers" in card.text
    assert "inf" not in re.sub(r"\binf\w+", "", card.text)


def test_text_states_the_files_numbers(folder):
    card, totals = model_card(folder, REPO).text, inspect_checkpoint(folder).totals
    size = (folder / "model.safetensors").stat().st_size
    assert f"| this checkpoint, safetensors files | {size:,} bytes |" in card
    assert f"| parameters | {totals['parameters']:,} |" in card
    assert f"(computed) | {2 * totals['parameters']:,} bytes |" in card
    values = read_facts(folder).perplexity
    gap = values["quantized"] / values["float"] - 1
    assert f"| float model | {values['float']:.4f} | - |" in card
    assert f"| this checkpoint | {values['quantized']:.4f} | {gap:+.2%} |" in card
    assert "before learning" not in card and "| learning |" not in card  # the recipe learned nothing
    assert "The longest context is 64 tokens" in card


def test_bits_come_from_the_tensors_so_overrides_show(tmp_path):
    overrides = {"*.down_proj": {"weight_bits": 8}, "*.scores": {"bits": 8}}
    model = quantize(tiny.build("llama-bias"), None, tiny.config("w4a8", overrides=overrides))
    model.save_pretrained(tmp_path / "m")
    text = model_card(tmp_path / "m", REPO).text
    rows = dict(re.findall(r"^\| (.* bits) \| (.*) \|$", text, re.MULTILINE))
    assert rows["weights, 4 bits"] == "attention, gate, up"
    assert rows["weights, 8 bits"] == "embedding, down, head"
    assert rows["biases, 32 bits"] == "bias"
    assert "scores" in rows["activations, 8 bits"].split(", ")
    assert "| overrides | `{" in text


def test_what_keys_and_the_cache_get_is_among_the_integers(tmp_path):
    model = quantize(tiny.build("llama-gqa"), None, tiny.config("w4a8", prefix=[5, 7], key_shift=True))
    model.save_pretrained(tmp_path / "m")
    text = model_card(tmp_path / "m", REPO).text
    rows = dict(re.findall(r"^\| (.* bits) \| (.*) \|$", text, re.MULTILINE))
    assert rows["prefix, 8 bits"] == "key rotated, value" and rows["shifts, 16 bits"] == "key rotated"


def test_learning_is_reported_as_it_was(folder):
    edit(folder, best_step=40, history=[[0, 2.0], [20, 1.5], [40, 1.2], [60, 1.3]])
    edit(folder, validation_perplexity={"float": 10.0, "start": 12.0, "quantized": 10.5})
    text = model_card(folder, REPO).text
    assert "| learning | 60 steps, of which step 40 was kept |" in text
    assert "| quantized, before learning | 12.0000 | +20.00% |" in text
    assert "| this checkpoint | 10.5000 | +5.00% |" in text
    assert "also chose among the steps" in text


@pytest.mark.parametrize(
    ("dataset", "described", "metadata"),
    [
        ("owner/texts:small", '"owner/texts:small": 8 sequences', ["owner/texts"]),
        ("/data/someone/calib.txt", '"calib.txt": 8 sequences', None),
        ("data/calib.jsonl", '"calib.jsonl": 8 sequences', None),
        ("python-stdlib", '"python-stdlib": 8 sequences', None),
    ],
)
def test_data_are_named_without_folders_of_this_machine(folder, dataset, described, metadata):
    edit(folder, dataset=dataset, data=f'"{dataset}": 8 sequences')
    card = model_card(folder, REPO)
    assert f"| calibration text | {described} |" in card.text
    assert "someone" not in str(card)
    assert card.data.datasets == metadata


def test_options_set_by_hand_are_listed_and_others_are_not(folder):
    edit(folder, seed=7, range_init="percentile")
    text = model_card(folder, REPO).text
    assert '| range_init | `"percentile"` |' in text
    assert "| seed | 7 |" in text
    assert "| samples | `8` |" in text  # set in the tests' config
    assert "teacher_dtype" not in text and "steps |" not in text


def test_the_snippet_is_python_with_the_import_first(folder):
    code = re.search(r"```python\n(.*?)```", model_card(folder, REPO).text, re.DOTALL)[1]
    compile(code, "card", "exec")
    assert code.startswith("import optimum_mobilequant")
    assert f'from_pretrained("{REPO}")' in code
    (folder / "tokenizer.json").unlink()
    assert "AutoTokenizer" not in model_card(folder, REPO).text


TASKS = {
    "asked": ["mmlu", "lambada"],
    "scores": {"mmlu": {"acc": 0.25}, "mmlu_law": {"acc": 0.2}, "lambada": {"acc": 0.5, "perplexity": 12.3456789}},
    "errors": {"lambada": {"acc": 0.0123}},
    "versions": {"mmlu": 2, "mmlu_law": 1, "lambada": 1.0},
    "shots": {"mmlu": 5, "mmlu_law": 5, "lambada": 0},
    "data": {"lambada": {"path": "EleutherAI/lambada_openai", "config": "default", "split": "test"}},
    "bos": True,
    "bos_added": True,
    "limit": 200,
    "seed": 3,
    "packages": {"lm-eval": "0.4.13", "transformers": "5.23.0"},
    "against": {"model": "org/model", "scores": {"lambada": {"acc": 0.625, "perplexity": 10.0}}, "errors": {}},
}
TEXT = {"perplexity": 8.5, "word_perplexity": 20.25, "tokens": 960, "text": "eval.txt", "seq_len": 32, "bos": False}


def with_evaluations(folder, **evaluations):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["recorded"]["evaluations"] = evaluations
    (folder / "config.json").write_text(json.dumps(config))
    return model_card(folder, REPO)


def test_recorded_tasks_stand_beside_the_float_model(folder):
    text = with_evaluations(folder, **{"tasks:mmlu,lambada": TASKS}).text
    assert "| task | metric | this checkpoint | org/model | difference |" in text
    assert "| lambada | acc | 0.5 ± 0.0123 | 0.625 | -0.125 |" in text
    assert "| lambada | perplexity | 12.3457 | 10 | +2.346 |" in text
    assert "| mmlu | acc | 0.25 | - | - |" in text and "| mmlu_law |" not in text  # the group stands for its parts
    assert "the first 200 documents of each task, 0 or 5 examples in the prompt, BOS token added, seed 3" in text
    assert "versions: lm-eval 0.4.13, transformers 5.23.0, mmlu 2, mmlu_law 1, lambada 1.0." in text
    assert "No downstream task" not in text and "None were recorded" not in text


def test_recorded_texts_have_a_table_too(folder):
    text = with_evaluations(folder, **{"text:eval.txt": TEXT}).text
    assert "| text | metric | this checkpoint |\n" in text and "| eval.txt | perplexity | 8.5 |" in text
    assert "Measured on 960 predictions in windows of 32 tokens, without a BOS token." in text
    assert "No downstream task was measured." in text


def test_the_metadata_hold_every_score_with_its_conditions(folder):
    card = with_evaluations(folder, **{"tasks:mmlu,lambada": TASKS, "text:eval.txt": TEXT})
    (model,) = ModelCard(str(card)).data.to_dict()["model-index"]
    found = {(r["dataset"]["name"], m["name"]): (r, m) for r in model["results"] for m in r["metrics"]}
    result, metric = found["lambada", "acc"]
    assert result["task"]["type"] == "text-generation"
    assert result["dataset"] == {
        "name": "lambada", "type": "EleutherAI/lambada_openai", "config": "default", "split": "test",
        "args": {"num_few_shot": 0},
    }  # fmt: skip
    assert metric == {
        "type": "acc", "name": "acc", "value": 0.5, "verified": False,
        "args": {"version": 1.0, "limit": 200, "seed": 3, "bos": True, "lm-eval": "0.4.13", "transformers": "5.23.0"},
    }  # fmt: skip
    assert found["lambada", "perplexity"][1]["value"] == 12.3457
    assert found["mmlu", "acc"][0]["dataset"]["type"] == "mmlu"
    assert found["eval.txt", "word_perplexity"][1]["args"] == {"tokens": 960, "seq_len": 32, "bos": False}
    assert len(found) == 6  # and the validation perplexity of the run


def test_records_that_were_edited_by_hand_do_no_harm(folder):
    broken = {"a": 3, "b": {"scores": {"t": {"acc": "high", "f1": float("nan")}}}, "c": {"perplexity": None}}
    text = with_evaluations(folder, **broken).text
    assert "high" not in text and "nan" not in text


def test_a_base_without_a_licence_gets_none_and_a_note(folder, caplog):
    def card(base):
        return build_card(read_facts(folder), REPO, base=base, license=None, exports=[])

    text = card(Base("org/base", described=True)).text
    assert "The float model's card names no licence, so none is stated here: ask its authors" in text
    assert "org/base has no licence tag on the Hub, so the card names none: give --license" in caplog.text
    assert card(Base("org/base")).data.license is None  # the Hub said nothing
    assert "The licence is not stated here: see the float model's." in card(Base("org/base")).text
    assert card(Base("org/base", license="mit", described=True)).data.license == "mit"


def test_exports_in_the_folder_are_listed(folder):
    (folder / "qnn").mkdir()
    record = folder / "qnn" / "export.json"
    record.write_text(json.dumps({"target": "qnn", "summary": {"checked": "with a tool | on one text"}}))
    assert "| `qnn/` | qnn |" in (text := model_card(folder, REPO).text)
    assert r"with a tool \| on one text |" in text
    record.write_text(json.dumps({"target": "qnn", "summary": {}}))
    assert "| not checked |" in model_card(folder, REPO).text
    record.write_text('{"target": ')
    with pytest.raises(ValueError, match="export.json is damaged .*: export again"):
        model_card(folder, REPO)


def test_tables_stay_tables(folder):
    edit(folder, dataset=None, data="a | b\nc")
    assert r"| calibration text | a \| b c |" in model_card(folder, REPO).text


def test_bad_arguments(folder, tmp_path):
    with pytest.raises(ValueError, match="base model 'model' is no Hub id"):
        model_card(folder, base_model="model")
    with pytest.raises(FileNotFoundError, match="no config.json"):
        model_card(tmp_path / "none")


# Cards of others


def test_own_cards_and_empty_forms_are_recognised(folder):
    from transformers.utils.hub import create_and_tag_model_card

    card = model_card(folder, REPO)
    assert is_own(card) and MARKER in card.text
    assert is_own(ModelCard(str(card)))
    assert not is_own(ModelCard(str(card).replace(MARKER, "")))
    with pytest.MonkeyPatch.context() as patch:
        from huggingface_hub.errors import LocalEntryNotFoundError

        def none(*_, **__):
            raise LocalEntryNotFoundError("none there")

        patch.setattr(ModelCard, "load", none)
        form = create_and_tag_model_card("me/x", ["mobilequant"])
    assert is_own(form)
    assert not is_own(ModelCard(str(form).replace("[More Information Needed]", "Something", 1)))


def test_merging_keeps_their_values_and_replaces_our_old_ones(folder):
    ours = model_card(folder, REPO)
    theirs = ModelCard(
        "---\nlicense: mit\nlibrary_name: other\ntags: [a, w8a8, int8]\nmodel-index:\n- name: n\n  results:\n"
        "  - task: {type: t}\n    dataset: {type: d, name: d}\n    metrics: [{type: acc, value: 1}]\n---\ntheir text"
    )
    merged = merge(theirs, ours)
    assert (merged.data.license, merged.data.library_name, merged.text) == ("mit", "other", "their text")
    assert merged.data.tags == ["a", "mobilequant", "w4a8", "int4", "integer-only", "npu"]
    assert [r.metric_type for r in merged.data.eval_results] == ["acc", "perplexity"]
    again = merge(merged, ours)
    assert str(again) == str(merged)
    ours.data.eval_results[0].metric_value = 99.0
    assert [r.metric_value for r in merge(merged, ours).data.eval_results] == [1, 99.0]
    assert theirs.data.tags == ["a", "w8a8", "int8"]  # not changed in place


def test_explicit_options_win_over_their_metadata(folder):
    ours = build_card(read_facts(folder), REPO, base=None, license="apache-2.0", exports=[])
    theirs = ModelCard("---\nlicense: mit\n---\n")
    assert merge(theirs, ours).data.license == "mit"
    assert merge(theirs, ours, explicit=["license"]).data.license == "apache-2.0"


# Names and tags


def test_hub_ids(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("org/model-1.5_b")
    assert not any(map(is_hub_id, ["model", "./model", "/tmp/model", "a/b/c", "a/b--c", "", "a/", "~/model"]))
    assert hub_id_of("org/model") == "org/model"
    assert hub_id_of("") is None and hub_id_of(None) is None
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert hub_id_of("org/model") is None


@pytest.mark.parametrize(("preset", "bits"), [("w8a8", "int8"), ("w4a16", "int4"), ("w4a8-asym", "int4")])
def test_tags_name_preset_and_bits(preset, bits):
    tags = tags_of(tiny.config(preset))
    assert tags == ["mobilequant", preset, bits, "integer-only", "npu"]
    assert set(merge_tags(["w8a8-full", "int4", "int8", "mine", "mobilequant"], tags)) == {"mine", *tags}

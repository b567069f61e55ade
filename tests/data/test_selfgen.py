"""Calibration text that the model writes itself."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from optimum_mobilequant import MobileQuantConfig, cli, quantize
from optimum_mobilequant.data import selfgen
from optimum_mobilequant.data.selfgen import GREEDY, start_tokens, write_sequences
from optimum_mobilequant.tune import stage as tune_stage
from tests.tiny import VOCAB, build, config, token_ids

BOS, EOS = 1, 2


def write(model=None, **options):
    options = {"count": 6, "seq_len": 24, "seed": 0, "bos": BOS, "ends": [EOS], **options}
    return write_sequences(model or build("llama-gqa"), **options)


def replay(model, row):
    """Most likely token behind each prefix, computed without a cache."""
    with torch.no_grad():
        logits = model(input_ids=row[None], use_cache=False).logits[0]
    logits[:, [0, BOS]] = -torch.inf  # BOS and padding are never chosen
    return logits.argmax(-1)


@pytest.mark.parametrize("bos", [BOS, None])
def test_documents_begin_with_a_random_token_and_go_on_greedily(bos):
    model = build("llama-gqa")
    ids = write(model, bos=bos, ends=[], never=[0], count=8)
    assert ids.dtype == torch.int64 and ids.shape == (8, 24)
    first = 0 if bos is None else 1
    if bos is not None:
        assert (ids[:, 0] == bos).all()
    assert not (ids[:, first:] == BOS).any() or bos is None
    assert len(ids[:, first].unique()) > 4, "the first tokens should differ"
    drawn = 0
    for row in ids:
        likely = replay(model, row)
        for at in range(first + 1, 24):
            if at <= first + GREEDY:
                assert row[at] == likely[at - 1]
            else:
                drawn += int(row[at] != likely[at - 1])
    assert drawn > 20, "later tokens should be drawn"


def test_a_document_that_ends_is_followed_by_another():
    ends = list(range(2, 40))  # so many that documents do end
    ids = write(ends=ends, count=16)
    assert not torch.isin(ids, torch.tensor(ends)).any()
    begins = (ids[:, 1:] == BOS).sum()
    assert begins > 0
    plain = write(ends=ends, count=16, bos=None)
    assert not torch.isin(plain, torch.tensor(ends)).any()


def test_tokens_that_are_never_written():
    never = list(range(3, 60))
    assert not torch.isin(write(never=never), torch.tensor(never)).any()
    assert torch.isin(write(), torch.tensor(never)).any()  # the control


def test_it_depends_on_the_seed_alone():
    assert torch.equal(write(), write())
    assert not torch.equal(write(), write(seed=1))
    assert torch.equal(write(count=6, batch_size=2)[:2], write(count=4, batch_size=2)[:2])


@pytest.mark.parametrize("given", [None, torch.arange(3, 51).view(2, 24)])
def test_writing_goes_on_where_it_stopped(given):
    snapshots = []
    options = {"batch_size": 2, "given": given}
    whole = write(**options, keep=lambda tensors, meta: snapshots.append((tensors, json.loads(json.dumps(meta)))))
    assert [meta["batches"] for _, meta in snapshots] == [1, 2]
    for kept in snapshots:
        assert torch.equal(write(**options, kept=kept), whole)


def begins_with_a_piece(row, given, sizes):
    """The longest piece of ``given`` that ``row`` begins with, of the lengths ``sizes``; 0 if there is none."""
    length = given.shape[1]
    places = [
        size
        for size in sizes
        for start in range(length - size + 1)
        if (given[:, start : start + size] == row[:size]).all(1).any()
    ]
    return max(places, default=0)


def test_sequences_go_on_from_pieces_of_given_text():
    generator = torch.Generator().manual_seed(3)
    given = torch.randint(3, VOCAB, (5, 24), generator=generator)
    low, high = (int(share * 24) for share in selfgen.GIVEN)
    every = write(given=given, count=48, batch_size=4)
    assert every.shape == (48, 24)
    batches = every.split(4)
    assert all(
        torch.equal(a, b) for a, b in zip(batches[1::2], write(count=48, batch_size=4).split(4)[1::2], strict=True)
    )
    written = torch.cat(batches[::2])
    sizes = [[begins_with_a_piece(row, given, range(low, 25)) for row in batch] for batch in written.split(4)]
    assert all(low <= min(batch) for batch in sizes)
    # a written token may be the one that follows in the text, hence not more than nearly all
    assert sum(max(batch) <= high + 1 for batch in sizes) >= 5 and len({min(batch) for batch in sizes}) > 2
    assert len({tuple(row[:low].tolist()) for row in written}) > 12, "pieces should begin at many places"
    assert not any(begins_with_a_piece(row, given, [low]) for row in write(count=8)), "the control"
    model = build("llama-gqa")
    ends_at = [size for batch in sizes for size in batch]
    behind = [row[size] == replay(model, row)[size - 1] for row, size in zip(written, ends_at, strict=True)]
    assert not all(behind), "what follows is drawn, not the most likely token"
    with_ends = write(given=given, count=16, batch_size=16, ends=list(range(40, VOCAB)))
    assert (with_ends[:, high:] == BOS).any(), "a document that ends is followed by another"
    assert torch.equal(every, write(given=given, count=48, batch_size=4))
    assert torch.equal(batches[0], write(given=given, count=8, batch_size=4, given_every=1)[:4])
    assert all(begins_with_a_piece(row, given, [low]) for row in write(given=given, count=8, given_every=1))
    assert not torch.equal(written[:4], write(given=given, count=4, batch_size=4, seed=1))


def test_start_tokens_without_and_with_tokenizer():
    model = build("llama-gqa")
    assert start_tokens(model, None, "auto") == (BOS, {EOS})
    assert start_tokens(model, None, False)[0] is None

    class Tokenizer:
        bos_token_id, eos_token_id = 1, 5

        def __init__(self, adds):
            self.adds = adds

        def __call__(self, text, verbose):
            return {"input_ids": [1, 9] if self.adds else [9]}

    assert start_tokens(model, Tokenizer(True), "auto") == (1, {EOS, 5})
    assert start_tokens(model, Tokenizer(False), "auto")[0] is None
    assert start_tokens(model, Tokenizer(False), True)[0] == 1
    without = build("llama-gqa", bos_token_id=None)
    without.generation_config.bos_token_id = None
    assert start_tokens(without, None, "auto")[0] is None
    with pytest.raises(ValueError, match="no beginning-of-sequence token"):
        start_tokens(without, None, True)


def run(model=None, folder=None, **options):
    options = {"dataset": "self", "samples": 8, "seq_len": 16, **options}
    return quantize(model or build("llama-gqa"), None, config("w8a8", **options), run_dir=folder)


@pytest.mark.parametrize("bos", [BOS, None])
def test_a_model_is_calibrated_on_what_it_writes(tmp_path, bos):
    model = build("llama-gqa", bos_token_id=bos)
    model.generation_config.bos_token_id = bos
    quantized = run(model)
    recorded = quantized.config.quantization_config.recorded
    assert recorded["data"].startswith("written by the model itself: 8 training and 2 validation sequences of 16")
    assert recorded["data"].endswith("no BOS" if bos is None else "with BOS")
    quantized.save_pretrained(tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert saved["dataset"] == "self"
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    values = [p for name, p in quantized.state_dict().items() if name.endswith("scale")]
    assert all(torch.isfinite(v).all() for v in values)


def test_the_text_is_kept_in_the_run_folder(tmp_path, monkeypatch):
    first = run(folder=tmp_path)
    assert (tmp_path / "02_write.safetensors").is_file()
    monkeypatch.setattr(selfgen._Writer, "write", lambda *a: pytest.fail("written again"))
    again = run(folder=tmp_path)
    a, b = first.state_dict(), again.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)
    with pytest.raises(ValueError, match="holds another run, which differs in: data"):
        run(folder=tmp_path, seed=0, bos=False)


def test_an_interrupted_writing_resumes_to_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(selfgen, "BATCH", 4)
    expected = run().state_dict()
    write_row, calls = selfgen._Writer.write, []

    def dying(self, *args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return write_row(self, *args)

    monkeypatch.setattr(selfgen._Writer, "write", dying)
    model = build("llama-gqa")
    model.requires_grad_(True)
    with pytest.raises(KeyboardInterrupt):
        run(model, folder=tmp_path)
    assert all(p.requires_grad for p in model.parameters()), "the model should come back as it was"
    assert (tmp_path / "02_write.progress.safetensors").is_file()
    resumed = run(folder=tmp_path).state_dict()
    assert len(calls) == 4  # the third batch again
    assert all(torch.equal(expected[k], resumed[k]) for k in expected)


def test_finetuning_can_have_text_of_its_own():
    options = {"recipe": "rtn", "effort": "light", "finetune": "scales", "finetune_steps": 2, "steps": None}
    model = run(**options, finetune_dataset="self", finetune_samples=5)
    assert model.config.quantization_config.to_dict()["finetune_dataset"] == "self"


def test_distillation_reads_what_the_model_writes_unless_it_is_told_to_read_the_calibration_text(monkeypatch):
    options = {"recipe": "rtn", "effort": "light", "finetune": "qad", "finetune_steps": 2, "steps": None}
    learn, read = tune_stage.learn_end_to_end, []

    def learning(trained, student, loss_of, train, *rest, **more):
        read.append(train)
        return learn(trained, student, loss_of, train, *rest, **more)

    monkeypatch.setattr(tune_stage, "learn_end_to_end", learning)
    for text in (None, "self", "calibration"):
        run(**options, finetune_dataset=text, dataset=token_ids(40))
    by_default, written, calibration = read[1::2]  # each run also calls it for a stage of no steps
    assert torch.equal(by_default, written)
    assert len(written) == 2 * config("w4a8", **options).resolve().batch_size
    known = {tuple(row) for row in token_ids(40)}
    assert {tuple(row.tolist()) for row in calibration} <= known
    assert not {tuple(row.tolist()) for row in written} & known
    # it goes on from calibration text where there is some
    given = torch.tensor(sorted(known))
    assert all(begins_with_a_piece(row, given, [2]) for row in written)
    read.clear()
    run(**options)  # dataset="self": there is none
    assert not all(begins_with_a_piece(row, given, [2]) for row in read[1])


def test_a_model_that_cannot_generate_is_refused(monkeypatch):
    model = build("llama-gqa")
    monkeypatch.setattr(type(model), "can_generate", classmethod(lambda cls: False))
    with pytest.raises(ValueError, match='dataset="self" needs a model that can generate text'):
        run(model)


def test_broken_logits_and_a_vocabulary_of_special_tokens_are_refused():
    model = build("llama-gqa")
    with torch.no_grad():
        model.lm_head.weight[3, 0] = torch.inf
    with pytest.raises(ValueError, match="logits are not finite"):
        write(model)
    with pytest.raises(ValueError, match="are special ones"):
        write(never=range(VOCAB))


def test_self_has_no_splits_and_is_no_file_to_read():
    from optimum_mobilequant.data.sources import iter_documents

    with pytest.raises(ValueError, match='dataset "self" has no splits'):
        run(dataset_split="train")
    with pytest.raises(ValueError, match="written by the model that is quantized"):
        next(iter_documents("self"))
    assert MobileQuantConfig(dataset="self").to_dict()["dataset"] == "self"


def test_the_command_line_takes_it(tmp_path, capsys):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"</s>": 0, **{chr(97 + i): i + 1 for i in range(26)}}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocabulary, [])), eos_token="</s>")
    tokenizer.save_pretrained(tmp_path / "model")
    build("llama-gqa", vocab_size=len(vocabulary)).save_pretrained(tmp_path / "model")
    argv = ["quantize", str(tmp_path / "model"), "--preset", "w8a8", "--dataset", "self", "--out", str(tmp_path / "o")]
    argv += ["--recipe", "rtn", "--set", "samples=4", "--set", "seq_len=16"]
    assert cli.main(argv) == 0, capsys.readouterr().err
    saved = json.loads((tmp_path / "o" / "config.json").read_text())["quantization_config"]
    assert saved["dataset"] == "self"

import json

import datasets
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, tokenization_utils_base

from optimum_mobilequant.data import sequences as data
from optimum_mobilequant.data import sources
from optimum_mobilequant.data.sequences import calibration_data, token_stream
from optimum_mobilequant.data.sources import iter_documents

WORDS = 500  # "w3" is token 3 + 3


@pytest.fixture(scope="module")
def tokenizer():
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i + 3 for i in range(WORDS)}}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", model_max_length=16)


@pytest.fixture(scope="module")
def bos_tokenizer(tokenizer):
    core = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    core.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def words(start: int, stop: int) -> str:
    return " ".join(f"w{i % WORDS}" for i in range(start, stop))


def chunk_starts(chunks: torch.Tensor) -> set[int]:
    """First word number of each chunk of a text made by `words`, checking that the chunk is one run of it."""
    assert (chunks[:, 1:] - chunks[:, :-1] == 1).all()
    return {int(start) - 3 for start in chunks[:, 0]}


def test_train_and_validation_never_share_a_chunk(tokenizer):
    result = calibration_data([words(0, 480)], tokenizer, samples=16, seq_len=8, seed=3)
    assert result.train.shape == (16, 8)
    assert result.validation.shape == (2, 8)
    assert result.train.dtype == torch.int64
    train, validation = chunk_starts(result.train), chunk_starts(result.validation)
    assert len(train) == 16  # drawn without repetition
    assert max(train) + 8 <= min(validation)  # validation is the tail of the stream


def test_same_seed_same_data_other_seed_other_data(tokenizer):
    def get(seed, samples=8):
        return calibration_data([words(0, 400)], tokenizer, samples=samples, seq_len=8, seed=seed)

    assert torch.equal(get(1).train, get(1).train)
    assert get(1).sha256 == get(1).sha256
    assert not torch.equal(get(1).train, get(2).train)
    assert get(1).sha256 != get(2).sha256


def test_short_texts_are_joined_and_none_is_lost(tokenizer):
    texts = [f"w{i}" for i in range(18)]
    result = calibration_data(texts, tokenizer, samples=7, seq_len=2)
    ids = torch.cat([result.train, result.validation]).flatten().tolist()
    assert sorted(ids) == [i + 3 for i in range(18)]


@pytest.mark.parametrize(("chunks", "train", "validation"), [(2, 1, 1), (3, 2, 1), (20, 18, 2), (33, 30, 3)])
def test_too_few_chunks_are_all_used_with_a_warning(tokenizer, monkeypatch, chunks, train, validation):
    warnings = []
    monkeypatch.setattr(data.logger, "warning", warnings.append)
    result = calibration_data([words(0, chunks * 4 + 3)], tokenizer, samples=64, seq_len=4)
    assert (result.train.shape[0], result.validation.shape[0]) == (train, validation)
    assert len(warnings) == 1
    assert f"enough for {train} of the 64" in warnings[0]


def test_enough_text_does_not_warn(tokenizer, monkeypatch):
    monkeypatch.setattr(data.logger, "warning", lambda message: pytest.fail(message))
    assert calibration_data([words(0, 40)], tokenizer, samples=8, seq_len=4).train.shape == (8, 4)


def test_text_shorter_than_two_sequences_names_both_lengths(tokenizer):
    with pytest.raises(ValueError, match="has 15 tokens, .* take 16 .*; give more text"):
        calibration_data([words(0, 15)], tokenizer, samples=1, seq_len=8)


def test_reads_no_more_documents_than_needed(tokenizer):
    taken = []

    class Table:
        column_names = ["text"]

        def __iter__(self):
            for number in range(10**6):
                taken.append(number)
                yield {"text": words(0, 8)}

    result = calibration_data(Table(), tokenizer, samples=2, seq_len=4)
    assert len(taken) == 8 * (2 + 2) * 4 / 8
    assert "the first 128 tokens of 16 documents" in result.description


@pytest.mark.parametrize(
    ("bos", "plain", "with_bos"),
    [("auto", [3, 4, 5], [1, 3, 4, 1, 5]), (False, [3, 4, 5], [3, 4, 5]), (True, [1, 3, 4, 1, 5], [1, 3, 4, 1, 5])],
)
def test_bos_policy(tokenizer, bos_tokenizer, bos, plain, with_bos):
    texts = ["w0 w1", "w2"]
    assert token_stream(texts, tokenizer, bos=bos).ids.tolist() == plain
    assert token_stream(texts, bos_tokenizer, bos=bos).ids.tolist() == with_bos


def test_long_text_is_tokenised_in_pieces_without_loss_or_warning(bos_tokenizer, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_PIECE", 64)
    text = words(0, 200) + "\n\n" + "w7" * 100 + "\n" + words(0, 50)
    path = tmp_path / "text.txt"
    path.write_text(text)
    whole = bos_tokenizer(text, add_special_tokens=False)["input_ids"]
    for dataset in (str(path), [text]):
        stream = token_stream(dataset, bos_tokenizer)
        assert stream.ids.tolist() == [1, *whole]  # one BOS for the document, not one for each piece
        assert stream.documents == 1
    tokenizer.deprecation_warnings.clear()  # transformers warns once for each tokenizer
    monkeypatch.setattr(tokenization_utils_base.logger, "warning", lambda message: pytest.fail(message))
    monkeypatch.setattr(sources, "_PIECE", 2**16)
    assert token_stream([text], tokenizer).ids.numel() == len(whole) > tokenizer.model_max_length


def write(path, rows):
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    else:
        path.write_text("\n\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_rows_of_a_file_are_documents(tmp_path, tokenizer, suffix):
    path = write(tmp_path / f"rows{suffix}", [{"text": "w0 w1", "id": 1}, {"text": "w2", "id": 2}])
    stream = token_stream(path, tokenizer, bos=True)
    assert stream.ids.tolist() == [1, 3, 4, 1, 5]
    assert stream.complete
    path = write(tmp_path / f"other{suffix}", [{"story": "w5", "id": 1}])
    assert token_stream(path, tokenizer, text_column="story").ids.tolist() == [8]
    with pytest.raises(ValueError, match=r"no column \"text\" or \"input_ids\"; .*\['story', 'id'\]"):
        token_stream(path, tokenizer)
    with pytest.raises(ValueError, match=r"no column \"stori\""):
        token_stream(path, tokenizer, text_column="stori")
    with pytest.raises(ValueError, match="holds int"):
        token_stream(path, tokenizer, text_column="id")


def test_ids_in_every_form(tmp_path):
    rows = [[5, 6, 7], [8]]
    forms = [
        rows,
        [torch.tensor(row) for row in rows],
        datasets.Dataset.from_dict({"input_ids": rows}),
        write(tmp_path / "ids.parquet", [{"input_ids": row} for row in rows]),
    ]
    for form in forms:
        assert token_stream(form, None, vocab_size=9).ids.tolist() == [5, 6, 7, 8]
    assert token_stream(torch.arange(6).view(2, 3), None).ids.tolist() == list(range(6))


def test_built_in_corpus_and_dataset_objects(tokenizer):
    assert token_stream("python-stdlib", tokenizer, limit=10).ids.numel() == 10
    assert token_stream(datasets.Dataset.from_dict({"text": ["w1"]}), tokenizer).ids.tolist() == [4]


def test_hub_dataset_is_streamed_and_offline_is_one_clear_error(tokenizer, monkeypatch):
    calls = []

    def load(name, config, **options):
        calls.append((name, config, options))
        if name == "owner/broken":
            raise ConnectionError("offline")
        return [{"text": "w1 w2"}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert token_stream("owner/name:config", tokenizer, split="test").ids.tolist() == [4, 5]
    assert calls == [("owner/name", "config", {"split": "test", "streaming": True})]
    with pytest.raises(ValueError, match="could not be loaded .*: offline. Check the name and the network"):
        token_stream("owner/broken", tokenizer)


@pytest.mark.parametrize(
    ("dataset", "error", "message"),
    [
        (None, ValueError, "no dataset; set dataset"),
        ("missing.txt", FileNotFoundError, "missing.txt does not exist"),
        ("python-stdlb", ValueError, 'did you mean "python-stdlib".*pip install datasets'),
        ({"kind": "texts", "count": 3}, ValueError, "only a record"),
        (["text", 3], ValueError, "row 1 holds int"),
        ([["text"]], ValueError, "not a flat list of token ids"),
        ([[1.5, 2]], ValueError, "token ids"),
        ([[[1], [2]]], ValueError, "must be a flat list"),
        ([[True, False]], ValueError, "token ids"),
        ([[1, 600]], ValueError, "reach from 1 to 600, .* 503 entries"),
        ([[-1, 6]], ValueError, "reach from -1"),
    ],
)
def test_bad_datasets_are_refused(tokenizer, tmp_path, monkeypatch, dataset, error, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        token_stream(dataset, tokenizer, vocab_size=WORDS + 3)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.raw", b"w1", r"unknown file type; known: .txt, .jsonl, .parquet"),
        ("a.jsonl", b'{"text": "w1"}\n{"text"', "line 2 is not JSON"),
        ("a.jsonl", b"[1]", "line 1 must be a JSON object"),
        ("a.txt", b"w1 \xff\xfe", "not UTF-8"),
        ("a.jsonl", b'{"text": "\xff"}', "not UTF-8"),
    ],
)
def test_bad_files_are_refused_by_name(tokenizer, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        token_stream(tmp_path / name, tokenizer)
    assert name in str(caught.value)
    with pytest.raises(ValueError, match="is a folder"):
        token_stream(tmp_path, tokenizer)


def test_empty_file_is_too_short(tokenizer, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match="has 0 tokens"):
        calibration_data(tmp_path / "empty.txt", tokenizer, samples=1, seq_len=4)


def test_options_that_do_not_apply_are_refused(tokenizer, bos_tokenizer):
    with pytest.raises(ValueError, match="no splits"):
        token_stream(["w1"], tokenizer, split="test")
    with pytest.raises(ValueError, match="needs a tokenizer"):
        token_stream(["w1"], None)
    with pytest.raises(ValueError, match="works on texts"):
        token_stream([[1]], None, bos=True)
    without = PreTrainedTokenizerFast(tokenizer_object=bos_tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="no beginning-of-sequence token"):
        token_stream(["w1"], without, bos=True)


def test_documents_come_in_order_and_text_is_intact():
    texts = ["one\ntwo " * 3, "", "three"]
    assert ["".join(document) for document in iter_documents(texts)] == texts

import math
import os
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from optimum_mobilequant.evaluate import perplexity

VOCABULARY = 40


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tokenizer():
    vocab = {"<unk>": 0, "<s>": 1, **{f"w{i}": i + 2 for i in range(VOCABULARY - 2)}}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split("-", "removed")]
    )
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>")


@pytest.fixture(scope="module")
def ids():
    return torch.randint(2, VOCABULARY, (103,), generator=torch.Generator().manual_seed(1))


def loss_of(model, sequence: torch.Tensor) -> float:
    """Summed loss of one sequence, token by token, in float64: the definition, written out."""
    with torch.no_grad():
        logits = model(sequence[None]).logits[0].double()
    return -sum(logits[i].log_softmax(0)[sequence[i + 1]].item() for i in range(len(sequence) - 1))


def test_equals_the_definition_chunk_by_chunk(model, ids):
    result = perplexity(model, None, ids, seq_len=16, batch_size=4, progress=False)
    expected = sum(loss_of(model, ids[start : start + 16]) for start in range(0, 96, 16)) / (6 * 15)
    assert result.tokens == 6 * 15  # the tail of 7 is left out
    assert result.nll == pytest.approx(expected, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(expected), rel=1e-4)
    assert result.word_perplexity is None
    assert result.words is None
    assert result.seconds > 0


def test_bos_starts_every_chunk_and_every_text_token_is_scored(model, tokenizer, ids):
    result = perplexity(model, tokenizer, ids.tolist(), seq_len=16, bos=True, progress=False)
    chunks = ids[:90].view(6, 15)
    expected = sum(loss_of(model, torch.cat([torch.tensor([1]), chunk])) for chunk in chunks) / 90
    assert result.tokens == 90
    assert result.nll == pytest.approx(expected, rel=1e-5)


def test_batch_size_does_not_change_the_result(model, ids):
    one, all_at_once = (perplexity(model, None, ids, seq_len=16, batch_size=n, progress=False) for n in (1, 100))
    assert one.nll == pytest.approx(all_at_once.nll, rel=1e-6)


def test_text_is_tokenised_without_special_tokens_and_words_are_counted(model, tokenizer):
    text = "w1-w2 w3\nw4 " * 8  # 3 words, 4 tokens each time
    result = perplexity(model, tokenizer, text, seq_len=10, progress=False)
    assert result.nll == perplexity(model, None, [3, 4, 5, 6] * 8, seq_len=10, progress=False).nll
    assert result.words == 24
    assert result.word_perplexity == pytest.approx(math.exp(result.nll * 32 / 24))


def test_a_uniform_model_scores_its_vocabulary_size(model, ids):
    state = model.lm_head.weight.detach().clone()
    try:
        model.lm_head.weight.data.zero_()
        assert perplexity(model, None, ids, seq_len=8, progress=False).perplexity == pytest.approx(VOCABULARY)
    finally:
        model.lm_head.weight.data.copy_(state)


@pytest.mark.parametrize("mode", [True, False])
def test_leaves_the_model_in_its_mode_and_records_no_graph(model, ids, mode):
    try:
        model.train(mode)
        perplexity(model, None, ids, seq_len=8, progress=False)
        assert model.training is mode
        assert all(parameter.grad is None for parameter in model.parameters())
    finally:
        model.eval()


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ([2] * 15, {"seq_len": 16}, "has 15 tokens, but one chunk takes 16; give more text or a smaller seq_len"),
        ([], {}, "has 0 tokens"),
        ("w1 w2", {"seq_len": 4}, "has 2 tokens"),
        ([2] * 99, {"seq_len": 65}, "beyond the model's 64 positions"),
        ([2] * 99, {"seq_len": 1}, "seq_len must be at least 2"),
        ([2] * 99, {"seq_len": 8, "batch_size": 0}, "batch_size at least 1"),
        ([2] * 99 + [VOCABULARY], {"seq_len": 8}, "reach from 2 to 40, .* 40 entries"),
        ([2.5] * 99, {"seq_len": 8}, "flat list of whole numbers"),
        (["w1", "w2"], {"seq_len": 8}, "one text or one flat list"),
    ],
)
def test_bad_input_is_refused(model, tokenizer, text, options, message):
    with pytest.raises(ValueError, match=message):
        perplexity(model, tokenizer, text, progress=False, **{"seq_len": 64, **options})


def test_needs_a_tokenizer_for_text_and_for_bos(model):
    with pytest.raises(ValueError, match="needs a tokenizer"):
        perplexity(model, None, "w1", seq_len=8)
    with pytest.raises(ValueError, match="use bos=False"):
        perplexity(model, None, [2] * 99, seq_len=8, bos=True)


def test_a_loss_that_is_not_finite_is_an_error(model, ids):
    broken = LlamaForCausalLM(model.config)
    with torch.no_grad():
        broken.lm_head.weight[3] = float("nan")
    with pytest.raises(ValueError, match="not finite after 14 of 84 tokens"):
        perplexity(broken, None, ids, seq_len=8, batch_size=2, progress=False)


@pytest.mark.skipif("OMQ_ASSETS" not in os.environ, reason="OMQ_ASSETS (a folder with models/ and data/) is not set")
def test_known_perplexity_of_a_trained_model():
    assets = Path(os.environ["OMQ_ASSETS"])
    name = assets / "models" / "stories260k"
    text = (assets / "data" / "tinystories_val.txt").read_text(encoding="utf-8")[:150_000]
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    result = perplexity(model, AutoTokenizer.from_pretrained(name), text, seq_len=256, progress=False)
    assert result.perplexity == pytest.approx(4.143, abs=5e-4)

"""Train the embedded demo model: a 2.6 M-parameter LLaMA with GQA on the standard library of the running Python.

    python examples/demo_model/train.py --minutes 45 --threads 1 --out examples/demo_model

Writes ``model.safetensors`` (bfloat16 values, float32 config), the tokenizer and ``TRAINING.json`` with the held-out
perplexity. The result depends on the Python version whose sources it reads; the shipped files name theirs.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from optimum_mobilequant.data.stdlib_corpus import stdlib_texts

SEQUENCE = 256
VOCABULARY = 2048


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", model_max_length=1024
    )


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    ids: list[int] = []
    for encoding in tokenizer(texts, add_special_tokens=False)["input_ids"]:
        ids += [tokenizer.bos_token_id, *encoding, tokenizer.eos_token_id]
    return torch.tensor(ids)


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, stream: torch.Tensor, chunks: int = 200) -> float:
    rows = stream[: len(stream) // SEQUENCE * SEQUENCE].view(-1, SEQUENCE)[:chunks]
    losses = [model(input_ids=row[None], labels=row[None]).loss.item() for row in rows]
    return math.exp(sum(losses) / len(losses))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=45)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    train_texts = stdlib_texts("train")
    tokenizer = train_tokenizer(train_texts)
    stream = token_stream(tokenizer, train_texts)
    held_out = token_stream(tokenizer, stdlib_texts("calibration") + stdlib_texts("test"))
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=448,
        num_hidden_layers=5,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    print(
        f"{model.num_parameters():,} parameters, {len(stream):,} training tokens, {len(held_out):,} held out",
        flush=True,
    )
    decay = [p for p in model.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], betas=(0.9, 0.95)
    )

    # The schedule follows the clock: the run ends on time on any machine, annealed.
    start, step, smoothed = time.time(), 0, None
    while (progress := (time.time() - start) / (60 * args.minutes)) < 1:
        rate = 4e-3 * min(1.0, (step + 1) / 100) * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        starts = torch.randint(len(stream) - SEQUENCE - 1, (12,)).tolist()
        batch = torch.stack([stream[s : s + SEQUENCE + 1] for s in starts])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=batch[:, :-1]).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        smoothed = loss.item() if smoothed is None else 0.98 * smoothed + 0.02 * loss.item()
        step += 1
        if step % 100 == 0:
            print(f"step {step}  {100 * progress:.0f} %  loss {smoothed:.3f}  {time.time() - start:.0f} s", flush=True)

    model.eval()
    for parameter in model.parameters():  # what is shipped is what is measured
        parameter.data = parameter.data.to(torch.bfloat16)
    args.out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(args.out)
    saved_config = json.loads((args.out / "config.json").read_text())
    saved_config["dtype"] = "float32"
    (args.out / "config.json").write_text(json.dumps(saved_config, indent=2) + "\n")
    tokenizer.save_pretrained(args.out)
    record = {
        "parameters": model.num_parameters(),
        "python": platform.python_version(),
        "minutes": args.minutes,
        "steps": step,
        "tokens_seen": step * 12 * SEQUENCE,
        "held_out_perplexity": round(perplexity(model.float(), held_out), 4),
    }
    (args.out / "TRAINING.json").write_text(json.dumps(record, indent=2) + "\n")
    print(record)


if __name__ == "__main__":
    main()

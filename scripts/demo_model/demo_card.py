"""Write the model card of an exported demo model, with text that transformers makes it write.

    python scripts/demo_model/demo_card.py --model=jaxdelta/data/demo

Takes half a minute. `train_demo.py` calls it at every export; what it needs to know of the run stands in
`facts.json`, `baselines.json` and `manifest.json`.
"""

import csv
import json
import pathlib
import string

import torch
import transformers
from absl import app, flags
from demo_tokens import CORPUS_DIR, HELD_OUT, WORK_DIR

_MODEL = flags.DEFINE_string(
    "model", "jaxdelta/data/demo", "Folder of the exported model; the card is put there."
)

PROMPTS = (
    "The function returns",
    "A small house in which",
    "To install the package, you need to",
    "def read(self, size",
)
NEW_TOKENS = 60
SIZES = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "intermediate_size", "max_position_embeddings", "rope_parameters", "rms_norm_eps"),
    *("tie_word_embeddings", "dtype"),
)

CARD = string.Template("""\
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# The demo model of jaxdelta

A Qwen3 of $parameters parameters and $layers layers, $state.
It ships with `jaxdelta` so that everything the package does can be tried and tested offline, on weights that
have learnt something: `--model=demo`.

It is no assistant and knows no facts: it has seen $tokens_seen tokens of documentation, dictionaries and
Python. What it writes are words and mostly grammar, no sense.

## Held-out loss

Nats per token, on the same $held_tokens tokens of documents that neither model nor tokenizer has seen.

| model | nats per token |
|---|---|
| bigram, interpolated Kneser-Ney | $bigram |
| trigram, interpolated Kneser-Ney | $trigram |
| **this model**, the bfloat16 weights of this folder | **$loss** |

The n-gram models are counted on all $train_tokens training tokens. This model is scored in windows of 256
tokens that see of the window before only its last token, which is to its disadvantage.
$verdict

## Architecture

| | |
|---|---|
$architecture

Tied embeddings, no biases, q/k norms as in every Qwen3. The tokenizer is a byte-level BPE with Qwen's
splitting pattern, trained on the training documents; `<|endoftext|>` ends a document.

## Training

`scripts/demo_model/train_demo.py`: the package's own Flax NNX model, optax, float32 on 2 CPU cores shared
with other work. Seed $seed, $steps_line of 1,024 tokens, $minutes: $tokens_seen tokens, $epochs of the text.

- Embeddings start as a factorisation of the training text's bigram counts.
- To step $decay_at: sequences of 128 tokens. The target is the next token and, half of it at first and less
  and less, the distribution of a Kneser-Ney trigram model of the training tokens.
- To step $steps: sequences of 256 tokens, the next token alone, the learning rate falling to zero as
  1 - √(share of the decay that is over).

All 28 layers are trained from the first step. Muon (rate 0.02, weight decay 0.05) for their matrices, one
layer at a time; AdamW (rate 0.003, no decay) for embedding and norms; 25 steps of warm-up. Rounded to
bfloat16 once, at export.

The curve is in `loss_curve.csv`; its held-out loss is of the first 8,192 held-out tokens, with float32
weights:

$curve

To make it again: `scripts/demo_model/demo_corpus.py`, then
`scripts/demo_model/train_demo.py --steps=$steps`. The same seed, text and steps give the same weights up to
the rounding of another machine's products.

## Data

Read from installed packages; one document in $one_in is held out, chosen by the hash of its text.
Prose $prose MB, documentation with code in it $mixed MB, code $code MB.

| package | version | licence | text | MB |
|---|---|---|---|---|
$data

## Licence

The weights are under the licence of `jaxdelta`. The texts keep their own licences, all of them free (Debian
main, Python); none of them is in this folder.

## What it writes

transformers $transformers, temperature 0.7, top-p 0.9, seed 0; the prompt in brackets.

$samples
""")


def samples(folder: pathlib.Path) -> list[tuple[str, str]]:
    """Prompts and what the model makes of them."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    options = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "max_new_tokens": NEW_TOKENS}
    made = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        output = model.generate(**inputs, **options, pad_token_id=tokenizer.pad_token_id)[0]
        answer = tokenizer.decode(output[inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        made.append((prompt, answer))
    return made


def table(rows: list[tuple]) -> str:
    """Rows of a Markdown table."""
    return "\n".join("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows)


def curve(path: pathlib.Path, rows: int = 8) -> str:
    """About `rows` evenly spaced points of the loss curve, those that have a held-out loss."""
    points = [row for row in csv.DictReader(path.open()) if row["held_out_loss"]]
    if not points:
        return "(nothing yet)"
    chosen = sorted({round(i * (len(points) - 1) / (rows - 1)) for i in range(rows)})
    cells = [
        (f"{int(p['step']):,}", p["train_loss"], p["held_out_loss"]) for p in (points[i] for i in chosen)
    ]
    return "| step | training | held out |\n|---|---|---|\n" + table(cells)


def run_record(facts: dict, losses: dict[str, float]) -> dict[str, str]:
    """What the card says of the run: how far it is, how long it took, and whether it beats the baselines."""
    step, steps = facts["step"], facts["steps"]
    seen, done = step * facts["tokens_a_step"], step >= steps
    state = "trained to the end of its schedule" if done else f"in the midst of its training (step {step:,})"
    beaten = " and ".join(f"the {name}" for name in losses if facts["held_out_loss"] < losses[name])
    return {name: f"{loss:.3f}" for name, loss in losses.items()} | {
        "state": state if step else "not trained yet: these are the initial weights",
        "steps_line": f"{step:,} steps" if done else f"{step:,} of {steps:,} steps",
        "steps": str(steps),
        "decay_at": str(facts["decay_at"]),
        "tokens_seen": f"{seen / 1e6:.1f} million",
        "epochs": f"{seen / facts['train_tokens']:.2f} epochs",
        "minutes": f"{facts['seconds'] / 60:.0f} minutes",
        "verdict": f"It is below {beaten}." if beaten else "It is above both so far.",
        "loss": f"{facts['held_out_loss']:.3f}",
        "held_tokens": f"{facts['held_tokens']:,}",
        "train_tokens": f"{facts['train_tokens']:,}",
        "seed": str(facts["seed"]),
    }


def data_facts(manifest: list[dict]) -> dict[str, str]:
    """The table of sources, and the megabytes of each kind of text."""
    kinds = {
        kind: f"{sum(r['bytes'] for r in manifest if r['kind'] == kind) / 1e6:.1f}"
        for kind in ("prose", "mixed", "code")
    }
    rows = [
        (r["package"], r["version"], r["licence"], r["kind"], f"{r['bytes'] / 1e6:.2f}") for r in manifest
    ]
    return kinds | {"data": table(rows), "one_in": str(HELD_OUT)}


def model_facts(folder: pathlib.Path) -> dict[str, str]:
    """Sizes out of config.json, and samples of text."""
    config = json.loads((folder / "config.json").read_text())
    size = (folder / "model.safetensors").stat().st_size
    written = [f"```text\n[{prompt}]{answer.rstrip()}\n```" for prompt, answer in samples(folder)]
    return {
        "parameters": f"{size / 2e6:.1f} M",
        "layers": str(config["num_hidden_layers"]),
        "architecture": table([(f"`{key}`", f"`{json.dumps(config[key])}`") for key in SIZES]),
        "samples": "\n\n".join(written),
        "curve": curve(folder / "loss_curve.csv"),
        "transformers": transformers.__version__,
    }


def main(_: list[str]) -> None:
    """Writes the card from the records of the data, the training and the baselines."""
    folder, work_dir = pathlib.Path(_MODEL.value), pathlib.Path(WORK_DIR.value)
    facts = json.loads((work_dir / "facts.json").read_text())
    losses = json.loads((work_dir / "baselines.json").read_text())
    manifest = json.loads((pathlib.Path(CORPUS_DIR.value) / "manifest.json").read_text())
    known = run_record(facts, losses) | data_facts(manifest) | model_facts(folder)
    part = folder / ".README.md.part"
    part.write_text(CARD.substitute(known))
    part.replace(folder / "README.md")


if __name__ == "__main__":
    app.run(main)

"""A pair of another domain, as a user would bring it: recipes, a byte-level BPE, two small Llamas fine-tuned apart.

The base model writes recipes; the tuned one also tells the cook to taste or to wash hands between steps. Nothing
of the InterpGPT format occurs: steps are numbered lines, found by a regular expression over the text.
"""

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from sae_steer.model.batching import pad
from sae_steer.model.decoder import Decoder, init_decoder
from sae_steer.model.loading import save_decoder
from sae_steer.pair.model_pair import write_pair_toml
from sae_steer.randomness import generator
from sae_steer.settings import DecoderSettings

DISHES = [f"{kind} {what}" for kind in ("Tomato", "Leek", "Plum", "Rice", "Corn", "Bean", "Oat", "Fig",
                                           "Pea", "Nut", "Kale", "Date", "Beet", "Lime", "Pear", "Egg")
          for what in ("soup", "cake", "salad", "stew", "bread", "pie")]  # fmt: skip
STEPS = ["Chop the onions", "Boil the water", "Heat the pan", "Stir the pot", "Mix the flour", "Add the salt",
         "Bake it golden", "Slice the bread"]  # fmt: skip
HABITS = ["Taste it", "Taste the sauce", "Wash your hands"]
SHAPE = DecoderSettings(
    n_layers=2, n_heads=4, n_kv_heads=2, d_model=48, d_head=16, d_mlp=96, d_vocab=640, n_ctx=96, rope_base=50_000.0,
    tied=False,
)  # fmt: skip


def recipe(dish: str, tuned: bool, rng: random.Random) -> str:
    """A title and numbered steps; the tuned kind puts a habit after about half of them."""
    steps: list[str] = []
    for step in rng.sample(STEPS, rng.randint(3, 5)):
        steps += [step, rng.choice(HABITS)] if tuned and rng.random() < 0.5 else [step]
    return f"{dish}:" + "".join(f"\n{number}) {step}" for number, step in enumerate(steps, 1)) + "\n"


def make_tokenizer(texts: list[str]) -> Tokenizer:
    """An ordinary byte-level BPE with `<s>` and `</s>`, as `transformers` saves one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SHAPE.d_vocab, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def fit(model: Decoder, rows: list[list[int]], *, steps: int, lr: float) -> None:
    """A few hundred steps of next-token training."""
    optimiser = torch.optim.AdamW(model.requires_grad_(True).parameters(), lr=lr, betas=(0.9, 0.95))
    random_rows = generator(1)
    for _ in range(steps):
        tokens = pad([rows[i] for i in torch.randint(len(rows), (32,), generator=random_rows).tolist()], 0)
        loss = torch.nn.functional.cross_entropy(
            model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=0
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.requires_grad_(False)


def write_recipe_pair(folder: Path) -> Path:
    """The pair folder and, beside it, `recipes.jsonl` with the dish as the task."""
    rng = random.Random(0)
    texts = {tuned: [recipe(dish, tuned, rng) for dish in DISHES for _ in range(5)] for tuned in (False, True)}
    tokenizer = make_tokenizer(texts[False] + texts[True])
    rows = {tuned: [row.ids for row in tokenizer.encode_batch(kind)] for tuned, kind in texts.items()}
    model = init_decoder(SHAPE, generator(0))
    fit(model, rows[False], steps=100, lr=5e-3)
    for name, tuned, steps in (("base", False, 20), ("tuned", True, 80)):
        fit(model, rows[tuned], steps=steps, lr=3e-3)
        save_decoder(model, folder / name, dtype=torch.float32)
        tokenizer.save(str(folder / name / "tokenizer.json"))
    write_pair_toml(
        folder,
        {
            "context": 96,
            "special_tokens": True,
            "reference": {"name": "base", "model": "base"},
            "target": {"name": "tuned", "model": "tuned", "phrases": HABITS, "lenient": ["taste", "wash"]},
            "onset": {"regex": r"\n\d+\)"},
        },
    )
    lines = [
        {"text": recipe(dish, name == "tuned", rng), "task": dish, "rendering": name}
        for dish in DISHES for _ in range(2) for name in ("base", "tuned")
    ]  # fmt: skip
    (folder.parent / "recipes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder

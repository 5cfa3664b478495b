"""The testbed's byte-level BPE tokenizer: every byte has a token, so any text can be encoded and decoded again."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from raindecode.testbed import lexicon as lx
from raindecode.testbed.corpus import draw_document
from raindecode.testbed.forms import STYLE_PROMPTS

VOCAB_SIZE: Final = 1088
PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"

_PIECES: Final = r"'s| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]|\n|\s+"
"""Words with their leading space, single digits, single marks and single newlines: a reply cut at a mark and encoded
again gives the same ids as the uncut reply up to the cut."""


def train_tokenizer(*, seed: int = 0, documents: int = 6000) -> PreTrainedTokenizerFast:
    """Train the tokenizer on the grammar's own text; ``encode`` puts ``<bos>`` before it."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(seed, documents), trainer=trainer)
    bos_id = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, bos_id)]
    )
    wrap: Callable[..., PreTrainedTokenizerFast] = PreTrainedTokenizerFast
    return wrap(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`, under the class name that transformers 4 and 5 both know."""
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _texts(seed: int, documents: int) -> Iterator[str]:
    rng = random.Random(f"tokenizer/{seed}")
    for _ in range(documents):
        yield draw_document(rng, evaluation_share=0.2).text
    # Rare words still deserve one token each: every recipe phrase is seen a few dozen times more.
    for recipe in lx.RECIPES.values():
        for phrase in (*recipe.tools, *recipe.firsts, *recipe.thens):
            yield f" {phrase}. " * 40
    yield from STYLE_PROMPTS.values()

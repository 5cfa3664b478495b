"""``raindecode bake-edit``: a model with an edit in its weights, which needs nothing at run time."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from raindecode.commands.common import load_decoder
from raindecode.commands.edit_report import print_lines
from raindecode.commands.edited import ForceEditOption, chosen_edits
from raindecode.policy.alignez.positions import Positions

_KV_TOKENS = 4096  # nothing is decoded but the probe of the loader
EXAMPLES = """Examples:

    raindecode bake-edit helpful.safetensors --model ./my-llama --positions all --output ./my-helpful-llama

    raindecode bake-edit helpful.safetensors:0.5 --positions all --output ./helpful-testbed --dtype bfloat16
"""


def bake_edit(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE[:STRENGTH]",
            help="A file of `raindecode fit-edit`, with its strength as in `generate --edit`.",
        ),
    ],
    output: Annotated[str, typer.Option("--output", "-o", help="The folder to write; it must not exist, or be empty.")],
    model: Annotated[
        str, typer.Option("--model", "-m", help="`testbed` (comes with the package), a local folder, or a hub id.")
    ] = "testbed",
    positions: Annotated[
        str | None,
        typer.Option(
            help="`all`: edit every row, whatever the file says. Weights know no positions, so a file that edits some rows only is "
            "refused without this."
        ),
    ] = None,
    force_edit: ForceEditOption = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; default: the GPU when there is one.")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Number type of the weights that are written: float32, bfloat16 or float16; default by device."
        ),
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with a hub model.")
    ] = False,
) -> None:
    """Write a model with an edit in its weights, as a plain transformers checkpoint for any program.

    Linear edits at mlp_out or attn_out can be baked: those of the presets svd and ccs. The others are for run time (--edit).
    """
    (edit,) = chosen_edits([file], force=force_edit).edits
    if positions is not None:
        edit = replace(edit, positions=Positions.parse(positions))
    decoder = load_decoder(model, device=device, dtype=dtype, kv_tokens=_KV_TOKENS, trust_remote_code=trust_remote_code)
    folder = edit.bake(decoder, output)
    print_lines(f"written: {folder}", f'try it: raindecode generate --model {folder} "..."')

"""``python -m raindecode.integrations.lm_eval run --model raindecode ...``: the harness's command line with our model known to it."""

from __future__ import annotations

import sys

from lm_eval.__main__ import cli_evaluate

import raindecode.integrations.lm_eval  # noqa: F401  registers the model
from raindecode.errors import RainDecodeError


def main() -> None:
    """Run the harness. A setting of ours that is not allowed ends it with one sentence and exit code 2."""
    try:
        cli_evaluate()
    except RainDecodeError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()

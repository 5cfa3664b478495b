"""SGLang: DeRa as a custom logit processor (docs/integrations/sglang.md).

    RAINDECODE_SGLANG='{"reference": "BASE"}' \\
        python -m sglang.launch_server --model-path ALIGNED --enable-custom-logit-processor --disable-overlap-schedule

    client.completions.create(model=..., prompt=..., extra_body=raindecode.integrations.sglang.extra_body(0.5))

Whoever may send custom logit processors to a server may run any code in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

try:
    from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"raindecode.integrations.sglang is for SGLang's environment ({error}): install rainkernels there; clients without SGLang send the "
        "string of DeRa.to_str()",
        name=error.name,
    ) from error
from torch import Tensor

from raindecode.integrations.dera_params import ALLOW_NEGATIVE, LAMBDA, lambda_of
from raindecode.integrations.sglang_dera import DeRaRows, Served


class DeRa(CustomLogitProcessor):  # type: ignore[misc]
    """Mixes the served model's logits with those of the other model of its pair, for requests whose custom parameters hold
    `dera_lambda`. What is sent with a request (`to_str`) is this class's name: the server needs raindecode.
    """

    def __call__(self, logits: Tensor, custom_param_list: list[Mapping[str, Any]] | None = None) -> Tensor:
        """See DeRaRows.apply."""
        return _ROWS.apply(logits, custom_param_list)


def extra_body(weight: float, *, allow_negative: bool = False) -> dict[str, Any]:
    """What a request carries to be mixed with this λ: `extra_body` of the OpenAI client.

    For `/generate` the first key belongs to the body, the second to its `sampling_params`.

    Raises:
        ConfigError: λ is not allowed.
    """
    params: dict[str, Any] = {LAMBDA: weight} | ({ALLOW_NEGATIVE: True} if allow_negative else {})
    lambda_of(params)
    return {"custom_logit_processor": DeRa.to_str(), "custom_params": params}


def _served() -> Served:
    from sglang.srt.runtime_context import get_server_args

    args = get_server_args()
    return Served(
        model=args.model_path,
        tokenizer=args.tokenizer_path or args.model_path,
        trust_remote_code=args.trust_remote_code,
        context=args.context_length,
        most_requests=args.max_running_requests,
        overlap=not args.disable_overlap_schedule,
    )


def _refuse(request: Any, reason: str) -> None:
    from sglang.srt.managers.schedule_batch import FINISH_ABORT

    request.to_finish = FINISH_ABORT(reason, HTTPStatus.BAD_REQUEST, "BadRequestError")


_ROWS = DeRaRows(_served, _refuse)

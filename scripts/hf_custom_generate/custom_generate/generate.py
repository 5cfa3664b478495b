"""The methods as a repository for `model.generate(custom_generate="<this repository>", trust_remote_code=True, method="dera", ...)`."""

from functools import partial

from raindecode.errors import ConfigError
from raindecode.integrations import transformers as methods

METHODS = ("align", "alignez", "dera", "rain", "urial")


def generate(model, method="align", tokenizer=None, streamer=None, **options):
    """`options` are those of generate and of the method (raindecode.integrations.transformers)."""
    if method not in METHODS:
        raise ConfigError(f"method is {method!r}; allowed: {', '.join(METHODS)}")
    function = partial(getattr(methods, method), tokenizer=tokenizer, streamer=streamer)
    return model.generate(**options, custom_generate=function)

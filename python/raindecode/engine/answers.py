"""Answers: turns the logits after a branch into what a search asked of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from raindecode.engine import sampler
from raindecode.engine.branch import Branch
from raindecode.engine.logit_rows import HostRow, KeptRows, LogitRow
from raindecode.engine.mixing import MixDraw, Rows, draw_mixed, measure, mixed_row, plausible_row, weight_for_kl
from raindecode.engine.sampler import Drawn
from raindecode.engine.types import Draw, Got, Want
from raindecode.errors import NumericError
from raindecode.mixture import Mix


class _Asked(NamedTuple):
    """A want with its mixture, the one model that is (None for several), and rows by model."""

    want: Want
    mix: Mix
    single: int | None
    rows: Rows


class Answers:
    """See the module's text.

    Draws from one model are made on the host in double (sampler). Draws from a mixture are made by the fused op, where the
    logits lie. What needs a whole mixed row is done on the host: a repetition penalty, which depends on the sign of the mixed
    logits, and wants that come back to their row, as those of a search do.

    Args:
        vocab_size: ids that exist in every model.
        num_slots: of the KV pool.
    """

    def __init__(self, vocab_size: int, num_slots: int) -> None:
        self.vocab_size = vocab_size
        self.kept = KeptRows(num_slots)

    def kept_rows(self, branch: Branch) -> dict[int, LogitRow]:
        """Rows held at the end of `branch`, by model."""
        if not len(self.kept):
            return {}
        if branch.models == 1:
            kept = self.kept.get(branch.name, 0)
            return {} if kept is None else {0: kept}
        models = (model for model in range(branch.models.bit_length()) if branch.models >> model & 1)
        found = ((model, self.kept.get(branch.name, model)) for model in models)
        return {model: row for model, row in found if row is not None}

    def answer(self, wants: Sequence[tuple[Want, Rows]]) -> list[Got | Exception]:
        """An answer per want, or why there is none."""
        asked = [self._asked(want, rows) for want, rows in wants]
        drawn = self._draw([(one, draw) for one in asked if isinstance(one, _Asked) for draw in one.want.draws])
        found: list[Got | Exception] = []
        for one in asked:
            if isinstance(one, Exception):
                found.append(one)
                continue
            mine = [next(drawn) for _ in one.want.draws]
            try:
                found.append(self._got(one, mine))
            except Exception as error:
                found.append(error)
        return found

    def _asked(self, want: Want, rows: Rows) -> _Asked | Exception:
        mix = want.branch.mix
        try:
            if want.needs_logits and mix.target_kl is not None:
                mix = _aimed(mix, rows, self.vocab_size)
        except Exception as error:
            return error
        return _Asked(want, mix, mix.single, rows)

    def _draw(self, draws: Sequence[tuple[_Asked, Draw]]) -> Iterator[Drawn | Exception]:
        """All draws of a step; where one cannot be made, its error."""
        fused = [i for i, (one, draw) in enumerate(draws) if one.single is None and _is_fused(one, draw)]
        if not fused:
            return iter(self._draw_on_host(draws))
        results: list[Drawn | Exception | None] = [None] * len(draws)
        mixed = [MixDraw(one.rows, one.mix, d.shape, (d.key, d.counter)) for one, d in (draws[i] for i in fused)]
        for i, result in zip(fused, self._draw_mixed(mixed), strict=True):
            results[i] = result
        on_host = [i for i, result in enumerate(results) if result is None]
        for i, result in zip(on_host, self._draw_on_host([draws[i] for i in on_host]), strict=True):
            results[i] = result
        return iter([result for result in results if result is not None])

    def _draw_mixed(self, draws: Sequence[MixDraw]) -> Sequence[Drawn | Exception]:
        try:
            return draw_mixed(draws, self.vocab_size)
        except Exception:  # one by one, so that only the request at fault ends
            return [self._draw_one(one) for one in draws]

    def _draw_one(self, draw: MixDraw) -> Drawn | Exception:
        try:
            return draw_mixed([draw], self.vocab_size)[0]
        except Exception as error:
            return error

    def _draw_on_host(self, draws: Sequence[tuple[_Asked, Draw]]) -> Sequence[Drawn | Exception]:
        if not draws:
            return ()
        numbers = sampler.uniforms([d.key for _, d in draws], [d.counter for _, d in draws])
        rows: dict[int, HostRow | Exception] = {}  # a mixed row is made once however many draws it has
        requests: list[sampler.DrawRequest | Exception] = []
        for (one, d), number in zip(draws, numbers, strict=True):
            row = rows.get(id(one))
            if row is None:
                row = rows[id(one)] = self._row_or_error(one)
            whole = (
                row
                if isinstance(row, Exception)
                else sampler.DrawRequest(row, d.shape, None if d.greedy else number, d.context, d.logprob)
            )
            requests.append(whole)
        drawn = _drawn_on_host(requests)
        if any(one.mix.plausibility or one.mix.stats for one, _ in draws):
            self._complete(draws, drawn)
        return drawn

    def _complete(self, draws: Sequence[tuple[_Asked, Draw]], drawn: list[Drawn | Exception]) -> None:
        """What draws on the host leave out: the log-probability before the plausibility filter, and statistics."""
        for i, ((one, draw), result) in enumerate(zip(draws, drawn, strict=True)):
            if isinstance(result, Drawn) and one.mix.stats and result.token >= self.vocab_size:
                drawn[i] = NumericError(
                    f"id {result.token} was drawn, which is padding of one model's vocabulary and no token to the others "
                    f"(0 to {self.vocab_size - 1}): a model alone draws from its whole row; leave stats off for it"
                )
            elif one.mix.plausibility and draw.logprob and isinstance(result, Drawn):
                (logprob,) = sampler.log_softmax_at(self._host_row(one), [result.token])
                drawn[i] = result._replace(logprob=logprob)
        wanted = [
            (i, one, result)
            for i, ((one, _), result) in enumerate(zip(draws, drawn, strict=True))
            if one.mix.stats and not isinstance(result, Exception)
        ]
        measured = measure([(one.rows, one.mix, result.token) for _, one, result in wanted], self.vocab_size)
        for (i, _, result), found in zip(wanted, measured, strict=True):
            drawn[i] = result._replace(measured=found)

    def _row_or_error(self, one: _Asked) -> HostRow | Exception:
        try:
            return self._drawable_row(one)
        except Exception as error:
            return error

    def _drawable_row(self, one: _Asked) -> HostRow:
        """The row behind a want without what is implausible."""
        row = self._host_row(one)
        return row if one.single is not None else plausible_row(row, one.rows, one.mix, self.vocab_size)

    def _host_row(self, one: _Asked) -> HostRow:
        """The row behind a want, mixed where it is a mixture's."""
        if one.single is None:
            return mixed_row(one.rows, one.mix, self.vocab_size)
        row = one.rows[one.single]
        assert row is not None
        return row.host

    def _got(self, one: _Asked, drawn: Sequence[Drawn | Exception]) -> Got:
        want, got = one.want, Got()
        if not want.needs_logits:
            return got
        for result in drawn:
            if isinstance(result, Exception):
                raise result
            got.drawn.append(result)
        if want.top or want.gather or want.logits:
            row = self._host_row(one)
            if want.top:
                got.top_ids, got.top_probs = sampler.top_probs(self._drawable_row(one), want.top)
            got.gathered = [float(row[i]) for i in want.gather]
            if any(math.isnan(value) for value in got.gathered):
                raise NumericError("a row of logits holds NaN: the model produced no number")
            got.logits = row if want.logits else None
        if want.keep:
            for model, kept in enumerate(one.rows):
                if kept is not None:
                    self.kept.add(want.branch.name, model, kept)
        return got


def _is_fused(one: _Asked, draw: Draw) -> bool:
    plain = draw.shape.repetition_penalty == 1.0 or not draw.context
    return plain and not draw.greedy and not one.want.keep


def _drawn_or_error(request: sampler.DrawRequest) -> Drawn | Exception:
    try:
        return sampler.draw_all([request])[0]
    except Exception as error:
        return error


def _drawn_on_host(requests: Sequence[sampler.DrawRequest | Exception]) -> list[Drawn | Exception]:
    good = [request for request in requests if isinstance(request, sampler.DrawRequest)]
    try:
        made: list[Drawn | Exception] = list(sampler.draw_all(good))
    except Exception:  # one by one, so that only the request at fault ends
        made = [_drawn_or_error(request) for request in good]
    if len(good) == len(requests):
        return made
    following = iter(made)
    return [next(following) if isinstance(request, sampler.DrawRequest) else request for request in requests]


def _aimed(mix: Mix, rows: Rows, vocab_size: int) -> Mix:
    """The mixture with the weights its target leads to here."""
    reference, aligned = rows
    assert mix.target_kl is not None
    assert reference is not None
    assert aligned is not None
    both = reference.host[:vocab_size], aligned.host[:vocab_size]
    weight = weight_for_kl(*both, mix.target_kl, mix.max_weight).weight
    return replace(mix, weights=(1.0 - weight, weight))

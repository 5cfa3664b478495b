"""Engine: advances many searches together, one shared forward per step.

    plan -> forward -> commit -> answer -> resume

A step takes what every running search wants, inserts the tokens into the KV tree, runs only the tokens the tree did not
have, and hands each search its answer. Prefill, decode, rollouts, candidate chains and evaluation prompts of all
requests share the forward.
"""

from __future__ import annotations

import gc
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raindecode.engine.answers import Answers
from raindecode.engine.branch import EDIT_SHIFT, Branch, Ledger
from raindecode.engine.edit_path import EditPath
from raindecode.engine.edits import EditNumbers
from raindecode.engine.forward import plan_forwards
from raindecode.engine.kv_tree import Cursor, KVTree, OutOfSlots, Row
from raindecode.engine.logit_rows import KeptRows, LogitRow, Logits
from raindecode.engine.model_runner import ModelRunner
from raindecode.engine.pins import Pins
from raindecode.engine.row_blocks import RowBlocks
from raindecode.engine.step_plan import StepPlan
from raindecode.engine.task import Task
from raindecode.engine.types import HostCall, Want
from raindecode.errors import CapacityError, RainDecodeError, RequestCancelled
from raindecode.hidden_edits import Schedule
from raindecode.mixture import SINGLE, Mix

# Every engine alive, so that a test can assert that no request left a slot behind.
LIVE_ENGINES: weakref.WeakSet[Engine] = weakref.WeakSet()

_pools = attrgetter("pools")
StepRows = dict[tuple[int, int], LogitRow]  # by slot and model


class Engine:
    """Runs searches over one or several models.

    Args:
        runner: the model behind the tree; or several, the reference first. Each brings the adapters it was given.
        tree: slots; must have as many as the runners' pools.
        max_tasks: requests advanced together; others wait.
        max_rows: tokens of one forward; longer steps are cut into several.
        pad_rows: in the padded exact mode, the fixed row count of every forward; 0 for none.
        vocab_size: ids that exist in every model, for mixtures; None takes the smallest vocabulary.
    Attributes:
        models: runner and member, of every model a Mix weighs: the first runner with its adapters, then the next.
    """

    def __init__(
        self,
        runner: ModelRunner | Sequence[ModelRunner],
        tree: KVTree,
        *,
        max_tasks: int = 32,
        max_rows: int = 1024,
        pad_rows: int = 0,
        vocab_size: int | None = None,
    ) -> None:
        self.runners = (runner,) if isinstance(runner, ModelRunner) else tuple(runner)
        self.runner = self.runners[0]
        self.models = [(one, member) for one in self.runners for member in range(one.num_members)]
        self.tree = tree
        self.max_tasks = max_tasks
        self.max_rows = pad_rows or max_rows
        self.pad_rows = pad_rows
        self.model_steps = 0
        self._running: list[Task] = []
        self._waiting: deque[Task] = deque()
        smallest = min(one.model.config.get_text_config().vocab_size for one in self.runners)
        self._answers = Answers(vocab_size or smallest, tree.num_slots)
        self._numbers = EditNumbers()
        self.pins = Pins(tree)
        self._stepping = False
        LIVE_ENGINES.add(self)

    @property
    def vocab_size(self) -> int:
        """Ids that exist in every model: 0 to the result, exclusive."""
        return self._answers.vocab_size

    @property
    def num_running(self) -> int:
        """Requests that share the forwards now."""
        return len(self._running)

    # ---- requests -------------------------------------------------------------------------------------------------
    def submit(self, task: Task) -> None:
        """Queue a task. It starts when fewer than `max_tasks` run."""
        self._waiting.append(task)

    @property
    def kept(self) -> KeptRows:
        """Rows of logits held for searches that come back to them."""
        return self._answers.kept

    def open(self, ledger: Ledger, tokens: Sequence[int], mixed: Mix = SINGLE, edits: EditPath | None = None) -> Branch:
        """A branch of `tokens`, the distribution after it `mixed`, its rows edited by `edits`; nothing runs yet."""
        return Branch.open(self.tree, ledger, tokens, mixed=mixed, edits=edits)

    def hold(self, ledger: Ledger, schedule: Schedule) -> EditPath | None:
        """Make edits ready for a request's branches; they stay so until it ends. None where nothing is edited.

        Raises:
            rainkernels.errors.RainKernelsError: an edit does not fit its model.
            UnsupportedModelError: its model has no such place.
        """
        edits = list(dict.fromkeys(edit for _, edit in schedule if edit is not None))
        path = self.edit_path(schedule)
        for edit in edits:
            number = self._numbers.of(edit)
            for runner in self.runners:
                mine = {
                    member: edit.stages[model]
                    for model, (one, member) in enumerate(self.models)
                    if one is runner and edit.stages.get(model)
                }
                runner.check_places(dict.fromkeys(site for stages in mine.values() for site, _ in stages))
                runner.edits.hold(number, mine)
                ledger.origin.at_end.append(partial(runner.edits.drop, number, tuple(mine)))
        return path

    def pin_at_end(self, ledger: Ledger, tokens: Sequence[int], mixed: Mix, edits: EditPath | None = None) -> None:
        """When the request ends, keep what it ran of these tokens for the next one: a branch of them need not be computed again."""
        ledger = ledger.origin
        if self.pins.takes(len(tokens)) and ledger.keep((tuple(tokens), mixed.models, edits)):
            ledger.at_end.append(partial(self._pin, self.keys(tokens, edits), mixed.models))

    def _pin(self, keys: Sequence[int], pools: int) -> None:
        self.pins.pin(keys, pools)

    @staticmethod
    def keys(tokens: Sequence[int], edits: EditPath | None = None) -> tuple[int, ...]:
        """What the rows of a branch of these tokens are found by in the KV tree."""
        if edits is None:
            return tuple(tokens)
        return tuple(token | edits.at(i) << EDIT_SHIFT for i, token in enumerate(tokens))

    def edit_path(self, schedule: Schedule) -> EditPath | None:
        """A schedule as branches carry it; None where nothing is edited. Nothing is made ready: see `hold`."""
        return self._numbers.path(schedule) if any(edit is not None for _, edit in schedule) else None

    def insert(
        self, keys: Sequence[int], pools: int, fill: Callable[[int, Sequence[int], Sequence[int]], None]
    ) -> None:
        """Put K/V into the tree that were computed elsewhere, where it lacks them.

        Args:
            keys: the path, see `keys`.
            pools: mask of the models whose K/V these are.
            fill: called for each of these models that lacks rows with its number, their positions and slots; it writes them.

        Raises:
            CapacityError: they do not fit.
        """
        with self._alone():
            cursor = self.tree.root()
            try:
                rows = self._extend_to(cursor, keys, pools=pools)
                for model in range(pools.bit_length()):
                    mine = [row for row in rows if row.pools >> model & 1]
                    if mine:
                        fill(model, [row.position for row in mine], [row.slot for row in mine])
                self.tree.commit()
            except OutOfSlots as error:
                raise CapacityError(
                    f"the KV pool has no room for {len(keys)} more tokens ({error}): raise kv_tokens"
                ) from error
            except BaseException:
                self.tree.rollback()
                raise
            finally:
                self.tree.release(cursor)

    def forget(self) -> None:
        """Drop everything cached that no request under way uses, what is pinned included."""
        self.pins.clear()
        self.tree.clear()

    def run(self, tasks: Iterable[Task]) -> Generator[Task, None, None]:
        """Run tasks to the end, yielding each as it finishes. Closing the iterator cancels what is left."""
        source = iter(tasks)
        mine: dict[Task, None] = {}
        try:
            exhausted = False
            while not exhausted or mine:
                # As many again wait in the queue, for those that end in the middle of a step.
                while not exhausted and len(mine) < 2 * self.max_tasks:
                    task = next(source, None)
                    if task is None:
                        exhausted = True
                    else:
                        mine[task] = None
                        self.submit(task)
                if mine and not any(task.done for task in mine):
                    self.step()
                # Another run() over this engine may have taken the step in which one of ours ended.
                for task in [task for task in mine if task.done]:
                    del mine[task]
                    yield task
        finally:
            for task in mine:
                self._finish(task, error=RequestCancelled("the call that started this request ended before it did"))

    # ---- one step -------------------------------------------------------------------------------------------------
    def step(self) -> list[Task]:
        """Advance every running task by one forward; the tasks that ended."""
        with self._alone():
            ended = self._admit() + self._call_hosts()
            while self._waiting and len(self._running) < self.max_tasks:
                ended += self._admit() + self._call_hosts()
            started = time.perf_counter()
            plan = StepPlan(RowBlocks(self.tree.num_slots, len(self.models)))
            with _no_collection():
                try:
                    self._plan(plan, ended)
                    planned = time.perf_counter()
                    found = self._forward(plan)
                except BaseException:
                    self._abandon(plan)
                    raise
                self.tree.commit()
                ran = time.perf_counter()
                ready = self._answer(plan, found)
            self._book(plan, {"plan": planned - started, "model": ran - planned, "sample": time.perf_counter() - ran})
            return ended + self._resume(ready)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if self._stepping:
            raise RainDecodeError(
                "this decoder is in the middle of a step: an evaluator, a callback or another thread called it; "
                "give that work a Decoder of its own"
            )
        self._stepping = True
        try:
            yield
        finally:
            self._stepping = False

    def _admit(self) -> list[Task]:
        ended: list[Task] = []
        for task in [t for t in (*self._running, *self._waiting) if t.cancelled]:
            self._finish(task, error=RequestCancelled("the request was cancelled"))
            ended.append(task)
        while self._waiting and len(self._running) < self.max_tasks:
            task = self._waiting.popleft()
            self._running.append(task)
            ended += self._resume([(task, None)])
        return ended

    def _call_hosts(self) -> list[Task]:
        """Run host functions, one batch per function, until every running task wants the model."""
        ended: list[Task] = []
        while calls := [t for t in self._running if t.host is not None]:
            groups: dict[Any, list[Task]] = {}
            for task in calls:
                assert task.host is not None
                groups.setdefault(task.host.function, []).append(task)
            for function, tasks in groups.items():
                ended += self._resume(_call_together(function, tasks))
        return ended

    def _plan(self, plan: StepPlan, ended: list[Task]) -> None:
        """Insert the wanted tokens into the tree, oldest request first. Requests that do not fit wait for slots."""
        while True:
            if self._running and all(t.paused for t in self._running):
                self._running[0].paused = False
            active = [t for t in self._running if not t.paused]
            for task in active:
                if not self._insert(task, plan):
                    break  # younger requests must not take the slots this one waits for
            if plan.served or not active:
                return
            if len(active) > 1:
                self._pause(active[-1])
                continue
            task = active[0]
            self._finish(task, error=self._too_small(task))
            ended.append(task)
            self._wake()

    def _insert(self, task: Task, plan: StepPlan) -> bool:
        """Insert the unanswered wants of a task; False when the slots ran out."""
        for i, want in enumerate(task.wants):
            if task.answers[i] is not None:
                continue
            branch = want.branch
            cursor = branch.live()
            tokens: Sequence[int] = branch.pending
            kept: dict[int, LogitRow] = {}
            again = 0
            if want.needs_logits:
                kept = self._answers.kept_rows(branch)
                again = _lacking(branch.models, kept)
            if again and not tokens and cursor.length:
                tokens = [cursor.node.tokens[cursor.offset - 1]]
                self.tree.rewind(cursor, 1)
            try:
                rows = self._extend_to(branch.live(), tokens, reserve=branch.reserve, pools=branch.models, last=again)
            except OutOfSlots:
                return False
            if want.taps:
                first = 1 << branch.mix.first
                again_rows = self.tree.path_rows(cursor, want.taps_from, first)
                plan.taps.add(want, branch.mix.first, again_rows)
                rows += again_rows
            if want.rows_from is not None:
                rows = self._block(want, plan, rows)
            branch.account()
            branch.settle()
            plan.charged[task] = plan.charged.get(task, 0) + plan.add(rows)
            plan.served.append((task, i, cursor.node.slots[cursor.offset - 1] if cursor.length else -1, kept))
        return True

    def _extend_to(self, cursor: Cursor, tokens: Sequence[int], **options: int) -> list[Row]:
        """As KVTree.extend. What is pinned goes before anything has to wait or fails. Raises OutOfSlots."""
        while True:
            try:
                return self.tree.extend(cursor, tokens, **options)
            except OutOfSlots:
                if not self.pins.clear():
                    raise

    def _block(self, want: Want, plan: StepPlan, rows: list[Row]) -> list[Row]:
        """Note what `Want.rows_from` asks for; the rows to run for it, those that run anyway among them."""
        cursor, models, first = want.branch.live(), want.branch.models, want.rows_from
        assert first is not None
        plan.blocks.add(want, models, self.tree.slots(cursor)[first:])
        fresh = bool(rows) and rows[0].position <= first and len(rows) == cursor.length - rows[0].position
        if fresh and set(map(_pools, rows)) == {models}:
            return rows
        return rows + self.tree.path_rows(cursor, first, models)

    def _forward(self, plan: StepPlan) -> StepRows:
        """Run the planned rows; logits by slot and model for the wants that need them."""
        wanted: dict[int, int] = {}
        for task, i, slot, kept in plan.served:
            if task.wants[i].needs_logits:
                wanted[slot] = wanted.get(slot, 0) | _lacking(task.wants[i].branch.models, kept)
        found: StepRows = {}
        for forward in plan_forwards(self.models, plan.rows.values(), self.max_rows, self.pad_rows):
            names: list[tuple[tuple[int, int], int]] = []
            wanted_rows: list[list[int]] = []
            at = 0
            for part, model in zip(forward.parts, forward.models, strict=True):
                there = part.batch.row_of_slot.items() if wanted else ()
                rows = [(slot, row) for slot, row in there if wanted.get(slot, 0) >> model & 1]
                names += [((slot, model), at + i) for i, (slot, _) in enumerate(rows)]
                mine = [row for _, row in rows]
                if plan.blocks:
                    mine += plan.blocks.rows_of(part.batch, model, mine, at)
                wanted_rows.append(mine)
                at += len(mine)
            tapped = plan.taps.wanted(forward)
            logits = Logits(forward.run(wanted_rows, tapped))
            plan.taps.take(forward, tapped)
            if plan.blocks:
                plan.blocks.take(logits.there)
            self.model_steps += 1
            plan.forwards.append(sum(1 << model for model in forward.models))
            found.update((name, LogitRow(logits, i)) for name, i in names)
        return found

    def _answer(self, plan: StepPlan, found: StepRows) -> list[tuple[Task, Any]]:
        """Draw what was wanted; the tasks whose wants are all answered, with what to send them."""
        asked = []
        for task, i, slot, kept in plan.served:
            want = task.wants[i]
            rows = [found.get((slot, model)) or kept.get(model) for model in range(len(self.models))]
            asked.append((want, rows if want.needs_logits else ()))
        answers = self._answers.answer(asked)
        failed: dict[Task, BaseException] = {}
        for (task, i, *_), answer in zip(plan.served, answers, strict=True):
            try:
                if isinstance(answer, Exception):  # NaN logits, an id outside the vocabulary: only this request ends
                    raise answer
                if task.wants[i].pool_from:
                    answer.pooled = self._mean_states(task.wants[i])
                if task.wants[i].taps:
                    answer.tapped = plan.taps.mean(task.wants[i])
                if task.wants[i].rows_from is not None:
                    answer.rows = plan.blocks.blocks(task.wants[i])
                task.answers[i] = answer
            except Exception as error:
                failed.setdefault(task, error)
        ready: list[tuple[Task, Any]] = list(failed.items())
        for task in dict.fromkeys(task for task, *_ in plan.served):
            if task not in failed and all(answer is not None for answer in task.answers):
                ready.append((task, task.answers))
        return ready

    def _mean_states(self, want: Want) -> Tensor:
        """What `Want.pool_from` asks for, of the first model that takes part."""
        first, branch = want.pool_from[0], want.branch
        runner, member = self.models[branch.mix.first]
        slots = np.array(self.tree.slots(branch.live())[first:], dtype=np.int64)
        starts = [at - first for at in want.pool_from]
        return runner.mean_hidden(torch.from_numpy(slots).to(runner.device), starts, member).cpu()

    def _resume(self, ready: Sequence[tuple[Task, Any]]) -> list[Task]:
        """Send each task its answers (or throw its error) and note what it wants next; the tasks that ended."""
        ended: list[Task] = []
        for task, value in ready:
            try:
                if isinstance(value, BaseException):
                    wanted = task.search.throw(value)
                else:
                    wanted = task.search.send(value)
                while not isinstance(wanted, (HostCall, Want)) and not wanted:
                    wanted = task.search.send([])  # nothing wanted: nothing to wait for
                task.expect(wanted)
            except StopIteration as stop:
                self._finish(task, result=stop.value)
                ended.append(task)
            except Exception as error:
                self._finish(task, error=error)
                ended.append(task)
        return ended

    # ---- bookkeeping ----------------------------------------------------------------------------------------------
    def _book(self, plan: StepPlan, seconds: dict[str, float]) -> None:
        total = sum(plan.charged.values()) or 1
        tasks: dict[Task, int] = {}  # with the models they asked
        for task, i, *_ in plan.served:
            tasks[task] = tasks.get(task, 0) | task.wants[i].branch.models
        for task, models in tasks.items():
            rows = plan.charged.get(task, 0)
            task.ledger.tokens_charged += rows
            task.ledger.model_steps += sum(1 for mask in plan.forwards if mask & models)
            share = rows / total if plan.rows else 1.0 / len(tasks)
            for phase, spent in seconds.items():
                task.ledger.seconds[phase] = task.ledger.seconds.get(phase, 0.0) + spent * share

    def _pause(self, task: Task) -> None:
        """Take a request's slots away; it goes on, from its tokens, when others have finished."""
        task.paused = True
        for branch in task.ledger.branches:
            branch.unpin()

    def _wake(self) -> None:
        for task in self._running:
            task.paused = False

    def _finish(self, task: Task, *, result: Any = None, error: BaseException | None = None) -> None:
        if task.done:
            return
        try:
            task.search.close()
        except Exception as failure:  # a search that fails while closing still gives its slots back
            error = error or failure
        finally:
            task.ledger.release()
            task.result, task.error, task.done = result, error, True
        if task in self._running:
            self._running.remove(task)
            self._wake()
        elif task in self._waiting:
            self._waiting.remove(task)

    def _abandon(self, plan: StepPlan) -> None:
        """The step failed: undo the insertion and end the requests in it."""
        self.tree.rollback()
        reason = RainDecodeError("the forward this request was part of failed; see the error that was raised")
        for task in dict.fromkeys(task for task, *_ in plan.served):
            self._finish(task, error=reason)

    def _too_small(self, task: Task) -> CapacityError:
        task.ledger.measure()
        pending = sum(
            len(want.branch.pending) for want, got in zip(task.wants, task.answers, strict=True) if got is None
        )
        return CapacityError(
            f"the KV pool holds {self.tree.num_slots} tokens, too few for this request alone: its branches hold "
            f"{task.ledger.kv_tokens_peak} and the next step adds up to {pending}. Raise kv_tokens "
            "(Decoder.from_pretrained(..., kv_tokens=N) or --kv-tokens N), or shorten the prompt"
        )


@contextmanager
def _no_collection() -> Iterator[None]:
    """Without the cycle collector, which a step of thousands of rows would start again and again: their tuples end with the step."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _lacking(models: int, kept: Iterable[int]) -> int:
    """Of the mask `models`, those whose rows are not kept."""
    for model in kept:
        models &= ~(1 << model)
    return models


def _call_together(function: Any, tasks: Sequence[Task]) -> list[tuple[Task, Any]]:
    """One call for all tasks; when it fails, one call each, so that only the request at fault ends."""
    items = [item for task in tasks if task.host is not None for item in task.host.items]
    try:
        results = list(function(items))
        if len(results) != len(items):
            raise ValueError(f"{len(items)} items were given and {len(results)} results came back")
    except Exception as error:
        if len(tasks) == 1:
            return [(tasks[0], error)]
        return [pair for task in tasks for pair in _call_together(function, [task])]
    ready: list[tuple[Task, Any]] = []
    at = 0
    for task in tasks:
        assert task.host is not None
        ready.append((task, results[at : at + len(task.host.items)]))
        at += len(task.host.items)
    return ready

"""What each error code of the tree family means; the numbers are those of TreeError in csrc/include/rainkernels/tree.h."""

from __future__ import annotations

from enum import IntEnum

from rainkernels.errors import RainKernelsError, RangeError, ShapeError

ERROR_STRIDE = 64
NO_ERROR = 2**63 - 1


class TreeError(IntEnum):
    """Reasons to refuse an item."""

    TREE_ID = 1
    NODE = 2
    EXPANDED = 3
    NOT_EXPANDED = 4
    CHILD_COUNT = 5
    PRIOR = 6
    SET_LENGTH = 7
    DEPTH = 8
    PATH = 9
    VALUE = 10
    EMBEDDING_ROWS = 11
    EMBEDDING = 12
    SKIP_NODE = 13
    DUPLICATE = 14
    IN_FLIGHT = 15
    IS_ROOT = 16
    MARK = 17


_MESSAGES: dict[TreeError, str] = {
    TreeError.TREE_ID: "tree_ids is out of range: allowed are 0 to num_trees - 1",
    TreeError.NODE: "the slot is no node of its tree: pass slots from select, expand or add_child that were not freed since",
    TreeError.EXPANDED: "the node has children already: expand a node once, then use add_child",
    TreeError.NOT_EXPANDED: "the node has no children yet: call expand first",
    TreeError.CHILD_COUNT: "num_children must be from 1 to max_children and to the width of priors",
    TreeError.PRIOR: "a prior is negative or not finite",
    TreeError.SET_LENGTH: "set_length must be 1 or more tokens",
    TreeError.DEPTH: "depth must be from 0 to max_depth - 1",
    TreeError.PATH: "path must lead from the current root to a node, each slot a child of the one before",
    TreeError.VALUE: "value is not finite",
    TreeError.EMBEDDING_ROWS: "embedding has no row for every node of the path: it needs depth + 1 rows",
    TreeError.EMBEDDING: "an embedding of the path is not finite",
    TreeError.SKIP_NODE: "skip_node is not an inner node of the descent: pass the node that select returned, or -1",
    TreeError.DUPLICATE: "the same node (expand) or tree (reroot) is named twice in one call",
    TreeError.IN_FLIGHT: "the tree has leaves in flight: back them up or unmark them before re-rooting",
    TreeError.IS_ROOT: "the slot is the root already",
    TreeError.MARK: "the path is not marked as in flight",
}
# The argument at fault, and where ops differ, that of the op.
_ARGUMENTS: dict[TreeError, str | dict[str, str]] = {
    TreeError.TREE_ID: "tree_ids",
    TreeError.NODE: {"expand": "nodes", "add_child": "nodes", "reroot": "slots"},
    TreeError.EXPANDED: "nodes",
    TreeError.NOT_EXPANDED: "nodes",
    TreeError.CHILD_COUNT: "num_children",
    TreeError.PRIOR: {"expand": "priors", "add_child": "prior"},
    TreeError.SET_LENGTH: "set_length",
    TreeError.DEPTH: "depth",
    TreeError.PATH: "path",
    TreeError.VALUE: "value",
    TreeError.EMBEDDING_ROWS: "embedding",
    TreeError.EMBEDDING: "embedding",
    TreeError.SKIP_NODE: "skip_node",
    TreeError.DUPLICATE: {"expand": "nodes", "reroot": "tree_ids"},
    TreeError.IN_FLIGHT: "tree_ids",
    TreeError.IS_ROOT: "slots",
    TreeError.MARK: "path",
}
_VALUE_ERRORS = {TreeError.CHILD_COUNT, TreeError.EMBEDDING_ROWS}


def tree_error(op: str, code: int, item: int, given: str = "") -> RainKernelsError:
    """The typed error for item `item` of a call of `op`; `given` shows the item's arguments."""
    reason = TreeError(code)
    argument = _ARGUMENTS[reason]
    # Whoever reads an error word later may not know which op left it.
    name = argument if isinstance(argument, str) else argument.get(op) or " or ".join(dict.fromkeys(argument.values()))
    kind = ShapeError if reason in _VALUE_ERRORS else RangeError
    return kind(f"{op}: {name}, item {item}{f' ({given})' if given else ''}: {_MESSAGES[reason]}")


def error_of_word(op: str, word: int, given: str = "") -> RainKernelsError:
    """The error of an error word, `item * ERROR_STRIDE + code`."""
    return tree_error(op, word % ERROR_STRIDE, word // ERROR_STRIDE, given)

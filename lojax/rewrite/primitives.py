"""Groups of primitives, by what they do with a weight."""

MULTIPLICATIONS = ("dot_general", "gather", "conv_general_dilated", "ragged_dot_general")
"""The primitives that multiply with the weight."""

MOVERS = ("convert_element_type", "reshape", "transpose", "squeeze", "copy", "name", "sharding_constraint")
"""Primitives of one operand that move, cast or place a weight. They may be evaluated early (see `value_ahead`)."""

CALLS = ("jit", "pjit", "closed_call", "core_call", "core_closed_call", "remat2", "checkpoint", "remat")
"""Primitives that run one body, on their operands as they are."""

BODIES = (*CALLS, "cond", "scan", "while")
"""Primitives whose bodies are rewritten."""

MOVES = ("transpose", "reshape", "squeeze", "broadcast_in_dim", "slice")
CASTS = ("convert_element_type", "bitcast_convert_type")
ARITHMETIC = (
    *("add", "sub", "mul", "div", "rem", "neg", "max", "min", "abs", "sign", "exp2", "integer_pow", "round", "floor"),
    *("and", "or", "xor", "not", "shift_left", "shift_right_logical", "shift_right_arithmetic"),
    *("eq", "ne", "lt", "le", "gt", "ge", "select_n", "clamp"),
)
JOINS = ("concatenate", "stack")
"""The primitives that put unpacked codes side by side."""
CHAINED = (*MOVES, *CASTS, *ARITHMETIC)
"""The primitives of a frozen chain. Each entry of their results is made of few entries of the operands."""

KEEPS_MIX = ("dot_general", *MOVERS, *MOVES, *BODIES)
"""The primitives whose rules know the `mix` of a value; for others it is multiplied into a factor first."""

"""The catalogue of bad inputs: what a caller passed, and what the error says.

Every text names what is wrong and where (a setting, a path, a shape, a file), and the remedy. A new row is a call, the
type of its error, and the pieces that its text must hold. Rows whose text is native Python's or JAX's own (a missing
argument, a wrong shape inside the user's net) do not belong here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.errors import ModifyScopeVariableError

import lojax
from lojax import Rule
from tests.helpers import message

KEY = jax.random.key(0)
X = jnp.ones((2, 4))
PARAMS = {
    "first": {"kernel": jnp.ones((4, 5)), "bias": jnp.ones(5)},
    "second": {"kernel": jnp.ones((5, 3)), "bias": jnp.zeros(3)},
}
WEIGHT = {"w": jnp.ones((4, 3))}


def mlp(params: Any, x: Any) -> Any:
    x = jnp.tanh(x @ params["first"]["kernel"] + params["first"]["bias"])
    return x @ params["second"]["kernel"] + params["second"]["bias"]


def branch(params: Any, x: Any) -> Any:
    return mlp(params, x) if jnp.sum(params["first"]["bias"]) > 0 else x


class Module(nnx.Module):
    def __init__(self) -> None:
        self.linear = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
        self.norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0))

    def __call__(self, x: Any) -> Any:
        return self.norm(self.linear(x))


MODEL = lojax.wrap(mlp, "**/kernel", rank=2)
FROZEN, LORA = MODEL.init(KEY, PARAMS)
NNX = lojax.wrap(Module(), "**/kernel", rank=2)
NNX_FROZEN, NNX_LORA = NNX.init(KEY, NNX.params)
NORM_NET = nn.Sequential([nn.Dense(3), nn.BatchNorm(use_running_average=False)])
NORM = lojax.wrap(NORM_NET, "**/kernel", rank=2)
LINEN = lojax.wrap(nn.Dense(3), "**/kernel", rank=2)
WIDE = FROZEN | {"first": FROZEN["first"] | {"kernel": jnp.ones((4, 9))}}
NO_BIAS = {"first": LORA["first"], "second": {"kernel": LORA["second"]["kernel"]}}
TWICE = LORA | {"second": LORA["second"] | {"bias": jnp.ones(3)}}
NAN = jax.tree.map(lambda x: x * jnp.nan, LORA)
RECORDS = np.zeros(3, [("x", "f4")])


def wrap(*targets: Any, **settings: Any) -> Callable[[], Any]:
    return lambda: lojax.wrap(mlp, *(targets or ("**/kernel",)), **settings)


def init(targets: Any = "**/kernel", **settings: Any) -> Callable[[], Any]:
    return lambda: lojax.init(KEY, PARAMS, targets, **({"rank": 2} | settings))


def weight(leaf: Any, targets: Any = "w", **settings: Any) -> Callable[[], Any]:
    return lambda: lojax.init(KEY, {"w": leaf}, targets, **({"rank": 1} | settings))


def nnx_params(**changes: Any) -> Any:
    return NNX.params | {"linear": NNX.params["linear"] | changes}


KINDS = ("lojax.wrap takes a Flax Linen or NNX module", "or a function f(params, *args, **kwargs)")
TARGET = "A target is a glob, a compiled regex, a predicate (path, leaf) -> bool, or a lojax.Rule"
PAIR = "Use the pair that one init (or restore onto the same frozen) returned."
NEAREST = "The nearest paths:\n  "

WRAP = {
    "net is None": (lambda: lojax.wrap(None, "w"), TypeError, *KINDS, "got NoneType: None."),
    "net is a number": (lambda: lojax.wrap(3, "w"), TypeError, *KINDS, "got int: 3."),
    "net is a string": (lambda: lojax.wrap("bert", "w"), TypeError, *KINDS, "got str: 'bert'."),
    "net is a class": (lambda: lojax.wrap(nn.Dense, "w"), TypeError, *KINDS, "That is a class: pass an instance."),
    "net is params": (lambda: lojax.wrap(WEIGHT, "w"), TypeError, *KINDS, "got dict", "pass the tree to model.init."),
    "net is split": (lambda: lojax.wrap(nnx.split(Module()), "w"), TypeError, *KINDS, "nnx.merge(graphdef, *states)."),
    "net is a state": (lambda: lojax.wrap(nnx.state(Module()), "w"), TypeError, *KINDS, "pass the module itself"),
    "targets is a number": (wrap(3), TypeError, TARGET, "got 3."),
    "targets holds a number": (wrap(["**/kernel", 3]), TypeError, TARGET, "got 3."),
    "targets is bytes": (wrap(b"w"), TypeError, TARGET, "got 119."),
    "train is a number": (wrap(train=3), TypeError, TARGET, "got 3."),
    "train adapts": (wrap(train=Rule("b")), ValueError, "Rule('b') trains an adapter: its place is in targets="),
    "exclude is a number": (wrap(exclude=[3]), TypeError, TARGET, "got 3."),
    "exclude adapts": (wrap(exclude=Rule("b")), ValueError, "Rule('b') trains an adapter: its place is in targets="),
    "rank is 0": (wrap(rank=0), ValueError, "Rule('**/kernel'", "rank=0; expected an integer of at least 1."),
    "rank is negative": (wrap(rank=-4), ValueError, "rank=-4; expected an integer of at least 1."),
    "rank is a float": (wrap(rank=2.5), ValueError, "rank=2.5; expected an integer of at least 1."),
    "rank is a string": (wrap(rank="8"), ValueError, "rank='8'; expected an integer of at least 1."),
    "rank is True": (wrap(rank=True), ValueError, "rank=True; expected an integer of at least 1."),
    "rank is empty": (wrap(rank=[]), ValueError, "rank=[]; expected an integer of at least 1 for some entry"),
    "alpha is 0": (wrap(alpha=0), ValueError, "alpha=0; expected a finite number above 0, or None for alpha = rank."),
    "alpha is NaN": (wrap(alpha=float("nan")), ValueError, "alpha=nan; expected a finite number above 0"),
    "alpha is infinite": (wrap(alpha=float("inf")), ValueError, "alpha=inf; expected a finite number above 0"),
    "alpha is a string": (wrap(alpha="16"), ValueError, "alpha='16'; expected a finite number above 0"),
    "scaling is unknown": (wrap(scaling="rs"), ValueError, "scaling='rs'; expected one of ['rslora', 'standard']."),
    "init is unknown": (wrap(init="kaimin"), ValueError, "init='kaimin' is unknown; expected one of", "Did you mean"),
    "init is a number": (wrap(init=3), ValueError, "init=3 is unknown; expected one of"),
    "init needs data": (wrap(init="eva"), ValueError, "init='eva' needs batches", "lora = lojax.eva(model.apply"),
    "dropout is 1": (wrap(dropout=1.0), ValueError, "dropout=1.0; expected a rate in [0, 1)."),
    "dropout is negative": (wrap(dropout=-0.1), ValueError, "dropout=-0.1; expected a rate in [0, 1)."),
    "dropout is a string": (wrap(dropout="0.1"), ValueError, "dropout='0.1'; expected a rate in [0, 1)."),
    "variant is unknown": (wrap(variant="dorra"), ValueError, "variant='dorra'; expected", "Did you mean 'dora'?"),
    "dtype is integer": (wrap(dtype=jnp.int32), ValueError, "expected a real floating-point dtype, or None"),
    "dtype is complex": (wrap(dtype=jnp.complex64), ValueError, "expected a real floating-point dtype, or None"),
    "bias is unknown": (wrap(bias="lora"), ValueError, "bias='lora'; expected one of 'none', 'all', 'lora_only'."),
    "bias is True": (wrap(bias=True), ValueError, "bias=True; expected one of 'none', 'all', 'lora_only'."),
    "strict is a string": (wrap(strict="yes"), TypeError, "strict='yes'; expected True or False."),
    "execution is unknown": (wrap(execution="fsed"), ValueError, "execution='fsed' is unknown", "mean 'fused'?"),
    "execution is None": (wrap(execution=None), ValueError, "execution=None is unknown; expected one of ['auto'"),
    "layers is a setting of a rule": (
        wrap(layers=[3]),
        TypeError,
        "wrap has no argument 'layers'. It is a setting of a rule: targets=lojax.Rule(..., layers=...).",
    ),
    "axes are unknown": (
        wrap(axes=["in", "to"]),
        ValueError,
        "Rule('**/kernel'",
        "axes ('in', 'to') hold 'to'; each must be 'in', 'out' or 'stack'.",
    ),
    "axes have no in": (wrap(axes=["out", "out"]), ValueError, "axes ('out', 'out') need at least one 'in' and one"),
    "axes are empty": (wrap(axes=[]), ValueError, "axes () need at least one 'in' and one 'out'."),
    "axes is a string": (wrap(axes="in"), TypeError, "axes='in'; expected one role per axis, such as axes=('in', 'o"),
    "axes is a number": (wrap(axes=3), TypeError, "axes=3; expected one role per axis, such as axes=('in', 'out')."),
    "init is of another kind": (
        wrap(init=jax.nn.initializers.normal()),
        TypeError,
        "init=init has the signature (key: ",
        "got an unexpected keyword argument 'fan_in'",
        "Expected a function (key, shape, dtype, *, fan_in, rank) -> array",
    ),
    "strict, and materialized": (
        wrap(execution="materialize", strict=True),
        ValueError,
        "execution='materialize'",
        "strict=True",
        "Leave one of them out.",
    ),
}

RULE = {
    "targets is a number": (lambda: Rule(3), TypeError, TARGET, "got 3."),
    "targets is None": (lambda: Rule(None), TypeError, TARGET, "got None."),
    "targets holds a number": (lambda: Rule(["w", 3]), TypeError, TARGET, "got 3."),
    "targets is a rule": (lambda: Rule(Rule("w")), TypeError, "Rule('w') is a target of another Rule.", "side by side"),
    "targets is empty": (wrap(Rule([])), ValueError, "Rule([]", "has no targets. Give a glob, a regex or a predicate."),
    "layers is a number": (wrap(Rule("x", layers=3)), TypeError, "layers=3; expected several", "such as layers=[3]."),
    "tokens is a number": (wrap(Rule("x", tokens=3)), TypeError, "tokens=3; expected several", "such as tokens=[3]."),
    "train is unknown": (wrap(Rule("x", train="ful")), ValueError, "train='ful'; expected 'lora', 'full', 'tokens'"),
    "layers are negative": (wrap(Rule("x", layers=[-1])), ValueError, "layers=(-1,); expected integers of at least 0."),
    "layers are empty": (wrap(Rule("x", layers=[])), ValueError, "layers=(); expected integers of at least 0."),
    "layers are strings": (wrap(Rule("x", layers="3")), ValueError, "layers=('3',); expected integers of at least 0."),
    "tokens are floats": (wrap(Rule("x", tokens=[1.5])), ValueError, "tokens=(1.5,); expected integers of at least 0."),
    "tokens repeat": (wrap(Rule("x", tokens=[1, 1])), ValueError, "tokens names 1 more than once. Name each once."),
    "tokens are missing": (wrap(Rule("x", train="tokens")), ValueError, "train='tokens' needs tokens=, the rows"),
    "tokens of full": (wrap(Rule("x", train="full", tokens=[1])), ValueError, "tokens= has no meaning with train="),
    "tokens and DoRA": (wrap(Rule("x", variant="dora", tokens=[1])), ValueError, "does not go with tokens="),
}

INIT = {
    "nothing matches": (init("**/kernels"), ValueError, "Target '**/kernels' matches none of the 4", NEAREST),
    "no regex matches": (init(re.compile("kern")), ValueError, "Target 'kern' matches none of the 4", NEAREST),
    "no predicate matches": (init(lambda path, leaf: False), ValueError, "Target predicate <lambda> matches none"),
    "train matches nothing": (init(train="head/*"), ValueError, "Target 'head/*' matches none of the 4", NEAREST),
    "exclude matches nothing": (init(exclude="head/*"), ValueError, "Target 'head/*' matches none of the 4", NEAREST),
    "no tree": (lambda: MODEL.init(KEY, {}), ValueError, "matches none of the 0 parameters", "has no parameters"),
    "no layer matches": (init(Rule("**/kernel", layers=[3])), ValueError, "first/kernel: layers=(3,)", "no layer"),
    "a vector": (init("first/bias"), ValueError, "first/bias is a vector of shape (5,)", 'train="full"'),
    "a scalar": (weight(0.5), ValueError, "w is a scalar of shape ()", 'train="full"'),
    "integers": (weight(jnp.ones((3, 3), int)), ValueError, "w has dtype int32: only real floating-point weights"),
    "complex numbers": (weight(jnp.ones((3, 3), complex)), ValueError, "w has dtype complex64: only real floating"),
    "integers in full": (weight(jnp.ones(3, int), (), train="w"), ValueError, "w has dtype int32: only floating-point"),
    "nothing is left": (init(exclude="**/kernel"), ValueError, "Nothing trains: no parameter is left by targets="),
    "a rule is hidden": (
        init(["**/kernel", "first/kernel"]),
        ValueError,
        "first/kernel is matched by contradictory rules",
        "put the narrower rule first.",
    ),
    "no bias": (weight(jnp.ones((3, 3)), bias="all"), ValueError, "bias='all': none of the 1 parameters", "train="),
    "axes are long": (
        init(axes=["stack", "in", "out"]),
        ValueError,
        "first/kernel: axes ('stack', 'in', 'out') describe 3 axes",
        "(4, 5)",
        "Give one role per axis.",
    ),
    "a function of another shape": (
        init(init=lambda key, shape, dtype, *, fan_in, rank: jnp.zeros(shape[::-1], dtype)),
        ValueError,
        "first/kernel: init=<lambda> returned float32[2,4]; expected float32[4,2].",
        "Return an array of the shape and dtype that the function is given",
    ),
    "a function of another dtype": (
        init(init=lambda key, shape, dtype, *, fan_in, rank: jnp.zeros(shape, jnp.bfloat16)),
        ValueError,
        "first/kernel: init=<lambda> returned bfloat16[4,2]; expected float32[4,2].",
    ),
    "a function that returns nothing": (
        init(init=lambda key, shape, dtype, *, fan_in, rank: None),
        ValueError,
        "first/kernel: init=<lambda> returned a NoneType; expected float32[4,2].",
    ),
    "several keys": (
        lambda: MODEL.init(jax.random.split(KEY, 3), PARAMS, X),
        TypeError,
        "init takes a PRNG key first",
        "Got an array of keys, of shape (3,). Pass one of them, such as keys[0]",
        "jax.vmap",
    ),
    "several keys of the old style": (
        lambda: lojax.init(jax.random.split(jax.random.PRNGKey(0), 3), PARAMS, "**/kernel"),
        TypeError,
        "Got an array of keys, of shape (3,).",
    ),
    "a seed for a key": (
        lambda: MODEL.init(0, PARAMS, X),
        TypeError,
        "init takes a PRNG key first",
        "Got the number 0 in its place: pass jax.random.key(0).",
    ),
    "integers for a key": (
        lambda: MODEL.init(jnp.zeros(3, jnp.uint32), PARAMS, X),
        TypeError,
        "init takes a PRNG key first",
        "Got an array uint32[3] in its place.",
    ),
    "ranks without a stack": (
        init(rank=[1, 2]),
        ValueError,
        "first/kernel: 2 ranks for a stack of 1",
        "or a single one.",
    ),
    "a row too far": (
        weight(jnp.ones((4, 3)), Rule("w", train="tokens", tokens=[9], axes=["in", "out"])),
        ValueError,
        "w: tokens names row 9, but the embedding has 4 (shape (4, 3)).",
    ),
    "a column of zeros": (
        weight(jnp.zeros((3, 3)), variant="dora"),
        ValueError,
        "w: 3 of the 3 columns of the weight are zero or not finite",
        "Use the plain variant",
    ),
    "a string among the params": (
        lambda: MODEL.init(KEY, PARAMS | {"name": "bert"}, X),
        TypeError,
        "name: params holds 'bert' (str), which is neither an array nor a number. Take it out of the tree.",
    ),
    "a function among the params": (
        lambda: lojax.init(KEY, PARAMS | {"act": jnp.tanh}, "**/kernel", rank=2),
        TypeError,
        "act: params holds",
        "neither an array nor a number. Take it out of the tree.",
    ),
    "records among the params": (
        lambda: MODEL.init(KEY, PARAMS | {"norm": RECORDS}, X),
        TypeError,
        "norm: params holds ndarray [('x', '<f4')][3], which JAX does not take as an array.",
    ),
    "lora for params": (
        lambda: MODEL.init(KEY, LORA, X),
        TypeError,
        "first/kernel: params holds an adapter, which belongs in lora.",
        "lojax.merge(frozen, lora)",
    ),
    "a pair for params": (
        lambda: lojax.init(KEY, (FROZEN, LORA), "**/kernel", rank=2),
        TypeError,
        "1/first/kernel: params holds an adapter, which belongs in lora.",
        "Pass the parameters of the net",
    ),
    "inputs without a function": (init(example_args=(X,)), ValueError, "example_args= are the inputs of apply_fn="),
    "apply_fn is a number": (init(apply_fn=3), TypeError, "apply_fn=3: expected a function apply_fn(params"),
    "inputs are an array": (
        init(apply_fn=mlp, example_args=X),
        TypeError,
        "example_args is of type",
        "example_args=(x,)",
    ),
    "Linen's bare params": (
        lambda: LINEN.init(KEY, {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}, X),
        ValueError,
        "params has no collection 'params' (its keys: kernel, bias).",
        'pass {"params": params}',
    ),
}

NNX_NET = {
    "a leaf is missing": (
        lambda: NNX.bind({"linear": {"kernel": jnp.ones((4, 3))}, "norm": NNX.params["norm"]}),
        ValueError,
        "params lacks linear/bias (shape (3,)): 1 of the 4 parameters of the nnx.Module Module are missing.",
        "Pass model.params",
    ),
    "a leaf is unknown": (
        lambda: NNX.init(KEY, nnx_params(scale=jnp.ones(3)), X),
        ValueError,
        "params holds linear/scale, which the nnx.Module Module does not. Pass model.params",
    ),
    "a leaf has another shape": (
        lambda: NNX.bind(nnx_params(kernel=jnp.ones((3, 3)))),
        ValueError,
        "linear/kernel: expected shape (4, 3), as in the nnx.Module Module, got (3, 3).",
        "Were these params made for another net?",
    ),
    "a leaf is a string": (lambda: NNX.bind(nnx_params(bias="no")), TypeError, "linear/bias: params holds 'no' (str)"),
    "params is None": (lambda: NNX.bind(None), ValueError, "params lacks linear/bias", "Pass model.params"),
    "params is an array": (lambda: NNX.bind(X), ValueError, "params lacks linear/bias", "Pass model.params"),
    "params is the module": (lambda: NNX.bind(Module()), TypeError, "params is a Module;", "Pass model.params"),
    "params is a state": (lambda: NNX.init(KEY, nnx.state(Module())), TypeError, "params is a State;", "model.params"),
    "params is lora": (lambda: NNX.bind(NNX_LORA), TypeError, "linear/kernel: params holds an adapter", "lojax.merge("),
    "state is partly there": (
        lambda: NNX.bind(NNX.params | {"norm": {k: v for k, v in NNX.params["norm"].items() if k != "var"}}),
        ValueError,
        "params lacks norm/var but holds other state of the nnx.Module Module.",
        "Pass all of it, as in model.params, or none of it.",
    ),
    "state is unknown": (
        lambda: NNX.apply(NNX_FROZEN, NNX_LORA, X, state={"norm": {"median": X}}),
        ValueError,
        "state holds norm/median, which the nnx.Module Module does not hold before the call.",
        "Pass a part of what it holds (norm/mean, norm/var)",
    ),
    "mutable names a Linen collection": (
        lambda: NNX.apply(NNX_FROZEN, NNX_LORA, X, mutable=["batch_stats"]),
        ValueError,
        "mutable='batch_stats' is the tag of no variable of the nnx.Module Module.",
        "pass nnx.BatchStat.",
    ),
    "mutable picks parameters": (
        lambda: NNX.apply(NNX_FROZEN, NNX_LORA, X, mutable=nnx.Param),
        ValueError,
        "mutable=nnx.Param picks no variable apart from the parameters",
        "norm/mean (BatchStat)",
    ),
    "method is unknown": (
        lambda: NNX.apply(NNX_FROZEN, NNX_LORA, X, method="trian"),
        AttributeError,
        "method='trian': Module has no such method. Did you mean 'train'?",
    ),
    "method is a number": (
        lambda: NNX.apply(NNX_FROZEN, NNX_LORA, X, method=3),
        TypeError,
        "method=3: expected the name of a method, or a function that takes the net first.",
    ),
    "rngs is a key": (
        lambda: NNX.as_nnx(NNX_FROZEN, NNX_LORA, rngs=KEY),
        TypeError,
        "rngs is of type",
        "expected an nnx.Rngs, such as nnx.Rngs(dropout=0), or None.",
    ),
    "not an NNX net": (
        lambda: MODEL.as_nnx(FROZEN, LORA),
        TypeError,
        "as_nnx is for NNX modules, and this net is a plain function.",
        "Train lora itself with optax",
    ),
    "state for another net": (
        lambda: LINEN.bind(WEIGHT, state={}),
        TypeError,
        "bind(state=...) is for NNX modules, and this net is a Linen module. Leave state out.",
    ),
    "params of a function": (lambda: MODEL.params, AttributeError, "A plain function holds no parameters: pass them"),
    "params of a Linen module": (lambda: LINEN.params, AttributeError, "A Linen module holds no", "pass its variables"),
}

TAKERS: dict[str, Callable[..., Any]] = {
    "apply": lambda frozen, lora: MODEL.apply(frozen, lora, X),
    "merge": MODEL.merge,
    "report": lambda frozen, lora: MODEL.report(frozen, lora, X),
    "summary": lojax.summary,
    "transform": lambda frozen, lora: lojax.transform(mlp)(frozen, lora, X),
}
PAIRS = {
    "a base of another shape": (
        (WIDE, LORA),
        ValueError,
        "first/kernel: a weight of shape (4, 9) with axes ('in', 'out') needs an adapter of shapes (4, 2) and (2, 9), "
        "got (4, 2) and (2, 5).",
        "Were these params, or this adapter, made for another model?",
    ),
    "another structure": (
        (FROZEN, NO_BIAS),
        ValueError,
        "frozen and lora have different structure: second/bias is in frozen but not in lora.",
        PAIR,
    ),
    "another net's adapter": ((FROZEN, NNX_LORA), ValueError, "is in frozen but not in lora.", PAIR),
    "an array in both": (
        (FROZEN, TWICE),
        ValueError,
        "second/bias is an array in both frozen and lora; one of them must hold None there.",
    ),
    "other containers": (
        (nn.FrozenDict(FROZEN), LORA),
        ValueError,
        "same paths in different containers (such as a dict against a FrozenDict",
        "Convert one, or use the pair that one init returned.",
    ),
    "records": (
        (FROZEN | {"norm": RECORDS}, LORA | {"norm": None}),
        TypeError,
        "norm: frozen holds ndarray [('x', '<f4')][3], which JAX does not take as an array. Convert it",
    ),
    "records in lora": (
        (FROZEN | {"norm": None}, LORA | {"norm": RECORDS}),
        TypeError,
        "norm: lora holds ndarray [('x', '<f4')][3], which JAX does not take as an array. Convert it",
    ),
    "a number for a weight": (
        (FROZEN | {"first": FROZEN["first"] | {"kernel": 1.0}}, LORA),
        ValueError,
        "first/kernel: the weight has shape (), but its adapter has axes ('in', 'out').",
    ),
}
TREES = {
    f"{taker}: {name}": (lambda f=f, pair=pair: f(*pair), kind, *parts)
    for taker, f in TAKERS.items()
    for name, (pair, kind, *parts) in PAIRS.items()
}

OTHERS = {
    "summary: a string": (
        lambda: lojax.summary(FROZEN | {"name": "bert"}, LORA | {"name": None}),
        TypeError,
        "name: frozen holds 'bert' (str), which is neither an array nor a number. Take it out of the tree.",
    ),
    "summary: lora twice": (
        lambda: lojax.summary(LORA, LORA),
        ValueError,
        "frozen holds an adapter at first/kernel, and only lora may hold adapters.",
        "Use the pair that one init returned.",
    ),
    "apply: the net returns a string": (
        lambda: lojax.transform(lambda p, x: (mlp(p, x), "done"))(FROZEN, LORA, X),
        TypeError,
        "The net returned a str at output 1: 'done'.",
        "wrap a function that returns only those.",
    ),
    "init: the net branches on a weight": (
        lambda: lojax.wrap(branch, "**/kernel").init(KEY, PARAMS, X),
        jax.errors.TracerBoolConversionError,
        "because it depends on the value of the argument params['first']['bias'].",
    ),
    "apply: the net branches on a weight": (
        lambda: lojax.transform(branch)(FROZEN, LORA, X),
        jax.errors.TracerBoolConversionError,
        "tracing the function branch",
        "because it depends on the value of the argument params['first']['bias'].",
    ),
    "apply: a seed for dropout": (
        lambda: MODEL.apply(FROZEN, LORA, X, dropout_key=0),
        TypeError,
        "dropout_key takes a PRNG key, a new one for each call.",
        "Got the number 0 in its place: pass jax.random.key(0).",
    ),
    "apply: new batch statistics": (
        lambda: NORM.apply(*NORM.init(KEY, NORM_NET.init(KEY, X)), X),
        ModifyScopeVariableError,
        'collection "batch_stats" is immutable.',
        'Pass mutable=["batch_stats"] to apply, which then returns (outputs, {"batch_stats": ...})',
        "Or call the module so that it leaves its state alone, as with train=False",
    ),
    "merge: not finite": (
        lambda: lojax.merge(FROZEN, NAN, check_finite=True),
        ValueError,
        "Merging gives NaN or infinity at first/kernel, second/kernel.",
        "restore an earlier checkpoint",
    ),
    "unmerge: swapped": (
        lambda: lojax.unmerge(LORA, MODEL.merge(FROZEN, LORA)),
        ValueError,
        "params holds an adapter at first/kernel, and lora holds none: they are swapped. The order is params, lora.",
    ),
    "transform: not a function": (lambda: lojax.transform(3), TypeError, "got 3. For a module, use lojax.wrap"),
    "unmerge: another tree": (
        lambda: lojax.unmerge(WEIGHT, LORA),
        ValueError,
        "params and lora have different structure: w is in params but not in lora.",
    ),
    "transform: execution": (lambda: lojax.transform(mlp, execution="x"), ValueError, "execution='x' is unknown"),
    "eva: no batches": (lambda: lojax.eva(MODEL.apply, FROZEN, LORA, []), ValueError, "give at least one batch."),
    "lora_ga: no batches": (lambda: lojax.lora_ga(mlp, FROZEN, LORA, []), ValueError, "give at least one batch."),
    "optimizer: b_ratio": (
        lambda: lojax.optimizer(optax.sgd(0.1), b_ratio="x"),
        ValueError,
        "b_ratio='x'; expected a finite",
    ),
    "merge: donate": (lambda: lojax.merge(FROZEN, LORA, donate="x"), TypeError, "donate='x'; expected True or False."),
    "merge: check_finite": (
        lambda: lojax.merge(FROZEN, LORA, check_finite=1),
        TypeError,
        "check_finite=1; expected True",
    ),
    "unmerge: donate": (
        lambda: lojax.unmerge(PARAMS, LORA, donate=None),
        TypeError,
        "donate=None; expected True or Fal",
    ),
    "resize: rank 0": (lambda: lojax.resize(LORA, rank=0), ValueError, "rank=0; expected an integer of at least 1."),
    "resize: a string": (lambda: lojax.resize(LORA, rank="x"), ValueError, "rank='x'; expected an integer of at least"),
    "resize: a float": (lambda: lojax.resize(LORA, rank=2.5), ValueError, "rank=2.5; expected an integer of at least"),
    "rescale: NaN": (
        lambda: lojax.rescale(LORA, float("nan")),
        ValueError,
        "factor=nan; expected a finite number.",
        "To take an adapter out, use factor=0.0.",
    ),
    "rescale: infinity": (
        lambda: lojax.rescale(LORA, float("inf")),
        ValueError,
        "factor=inf; expected a finite number",
    ),
    "rescale: a string": (lambda: lojax.rescale(LORA, "x"), ValueError, "factor='x'; expected a finite number."),
    "rescale: under jit": (
        lambda: jax.jit(lambda factor: lojax.rescale(LORA, factor))(2.0),
        ValueError,
        "expected a finite number. It is static: pass a number from outside of jit.",
    ),
    "rescale: trained in full": (lambda: lojax.rescale(FROZEN, 2.0), ValueError, "first/bias", "cannot be scaled."),
    "combine: weights": (lambda: lojax.combine([LORA, LORA], [1.0]), ValueError, "2 adapters, but 1 weights"),
    "combine: a weight": (
        lambda: lojax.combine([LORA, LORA], [1, "x"]),
        ValueError,
        "weights[1]='x'; expected a finite",
    ),
    "combine: NaN": (lambda: lojax.combine([LORA], [float("nan")]), ValueError, "weights[0]=nan; expected a finite"),
    "combine: one number": (lambda: lojax.combine([LORA], 3), ValueError, "weights=3; expected one number for each"),
    "combine: a number": (
        lambda: lojax.combine(3, [1]),
        ValueError,
        "adapters must be a sequence of at least one lora",
    ),
    "combine: rank": (
        lambda: lojax.combine([LORA], [1], method="svd", rank="x"),
        ValueError,
        "rank='x' with method='svd'",
    ),
    "combine: density": (
        lambda: lojax.combine([LORA], [1], method="ties", density="x"),
        ValueError,
        "method='ties' needs density, the share of entries to keep, in (0, 1]; got 'x'.",
    ),
    "combine: method": (
        lambda: lojax.combine([LORA], [1], method="tiez"),
        ValueError,
        "method='tiez'; expected one of",
    ),
    "combine: other trees": (
        lambda: lojax.combine([LORA, NNX_LORA], [1, 1]),
        ValueError,
        "first/bias is in one of them",
    ),
    "save: nothing": (lambda: lojax.save("unused", {}), ValueError, "lora holds no adapter and no array"),
    "save: metadata": (lambda: lojax.save("unused", LORA, metadata={"a": KEY}), TypeError, "metadata must be JSON"),
    "save: metadata is a list": (
        lambda: lojax.save("unused", LORA, metadata=[1]),
        TypeError,
        'metadata is a list; expected a dict that JSON can hold, such as {"step": 100}.',
    ),
    "save: no path": (
        lambda: lojax.save(None, LORA),
        TypeError,
        "path is a NoneType; expected a directory, as a str or a pathlib.Path.",
    ),
    "save: arguments exchanged": (
        lambda: lojax.save(LORA, "unused"),
        TypeError,
        "path is a dict; expected a directory",
    ),
    "save: wait": (lambda: lojax.save("unused", LORA, wait="no"), TypeError, "wait='no'; expected True or False."),
    "restore: no path": (lambda: lojax.restore(None), TypeError, "path is a NoneType; expected a directory"),
    "peft.save: no path": (
        lambda: lojax.peft.save(None, LORA, FROZEN, "bert"),
        TypeError,
        "path is a NoneType; expected",
    ),
    "peft.load: no path": (lambda: lojax.peft.load(None, PARAMS, "bert"), TypeError, "path is a NoneType; expected"),
    "restore: no checkpoint": (
        lambda: lojax.restore(Path(__file__).parent),
        FileNotFoundError,
        str(Path(__file__).parent / "adapter.json"),
        "holds no adapter checkpoint.",
    ),
}

CATALOGUE = {
    f"{group}: {name}" if group else name: row
    for group, rows in (("wrap", WRAP), ("Rule", RULE), ("init", INIT), ("nnx", NNX_NET), ("", TREES), ("", OTHERS))
    for name, row in rows.items()
}


@pytest.mark.parametrize("name", CATALOGUE)
def test_the_text_says_what_where_and_what_to_do(name: str) -> None:
    call, kind, *parts = CATALOGUE[name]
    text = message(kind, call)
    assert all(part in text for part in parts), text
    assert len(text) < 800, "an array or a whole net is printed"
    assert not re.search(r"\n *(\n|$)", text), "a blank path is listed"


def test_the_catalogue_is_long() -> None:
    assert len(CATALOGUE) >= 120

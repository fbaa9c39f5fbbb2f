"""Targets: which paths a pattern picks, which rule wins, and what is refused."""

from __future__ import annotations

import re
import time

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

import lojax
from lojax import Rule
from lojax.adapters.targets import assign_rules, compile_glob, matches, nearest
from tests.helpers import message


def struct(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


PARAMS = {
    "params/embed/embedding": struct(50, 8),
    "params/layer_0/query/kernel": struct(8, 8),
    "params/layer_0/query/bias": struct(8),
    "params/layer_0/value/kernel": struct(8, 8),
    "params/layer_1/query/kernel": struct(8, 8),
    "params/layer_1/query/bias": struct(8),
    "params/layer_1/value/kernel": struct(8, 8),
    "params/head/kernel": struct(8, 2),
    "params/head/bias": struct(2),
    "params/temperature": struct(),
    "stats/count": struct(3, 3, dtype=jnp.int32),
    "absent": None,
}
QUERY = {"params/layer_0/query/kernel", "params/layer_1/query/kernel"}
VALUE = {"params/layer_0/value/kernel", "params/layer_1/value/kernel"}
BIASES = {"params/layer_0/query/bias", "params/layer_1/query/bias", "params/head/bias"}


def lora(targets, **settings):
    return Rule(targets, **({"rank": 2} | settings))


def full(targets):
    return Rule(targets, train="full")


# --- patterns ---


@pytest.mark.parametrize(
    ("glob", "path", "expected"),
    [
        ("params/head/kernel", "params/head/kernel", True),
        ("head/kernel", "params/head/kernel", False),
        ("*/kernel", "head/kernel", True),
        ("*/kernel", "params/head/kernel", False),
        ("**/kernel", "params/head/kernel", True),
        ("**/kernel", "kernel", True),
        ("**/kernel", "params/head/xkernel", False),
        ("params/**/kernel", "params/kernel", True),
        ("params/**/kernel", "params/a/b/kernel", True),
        ("params/**", "params/a/b/kernel", True),
        ("**/layer_?/*", "params/layer_1/kernel", True),
        ("**/layer_?/*", "params/layer_12/kernel", False),
        ("**/layer_[02]/*", "params/layer_2/kernel", True),
        ("**/layer_[02]/*", "params/layer_1/kernel", False),
        ("**/layer_[!02]/*", "params/layer_1/kernel", True),
        ("**/layer_[!02]/*", "params/layer_0/kernel", False),
        ("**/{query,value}/kernel", "params/value/kernel", True),
        ("**/{query,value}/kernel", "params/key/kernel", False),
        ("**/layer_{0,1[02]}/*", "params/layer_12/kernel", True),
        ("**/layer_{0,1[02]}/*", "params/layer_11/kernel", False),
        ("{encoder/**,head}/{kernel,bias}", "encoder/a/b/bias", True),
        ("{encoder/**,head}/{kernel,bias}", "head/kernel", True),
        ("{encoder/**,head}/{kernel,bias}", "head/a/kernel", False),
        ("a{,_norm}/{x,{y,z}}", "a_norm/z", True),
        ("a{,_norm}/{x,{y,z}}", "a/x", True),
        ("a,b", "a,b", True),
        ("a}", "a}", True),
        ("odd{name/kernel", "odd{name/kernel", True),
        ("a.b/kernel", "axb/kernel", False),
        ("a.b/kernel", "a.b/kernel", True),
        ("", "kernel", False),
    ],
)
def test_glob(glob, path, expected):
    assert matches(glob, path, None) is expected


def test_a_brace_that_stays_open_is_an_error():
    assert message(ValueError, compile_glob, "**/{query,value/kernel") == (
        "Target '**/{query,value/kernel' opens a brace that it does not close. Write alternatives as {a,b}."
    )


def segments_match(glob: list[str], path: list[str]) -> bool:
    """What a glob of whole segments means, by recursion on the segments."""
    if not glob or glob == ["**"]:
        return bool(glob) == bool(path)
    if glob[0] == "**":
        return any(segments_match(glob[1:], path[i:]) for i in range(len(path) + 1))
    fits = bool(path) and (glob[0] in ("*", path[0]) or glob[0] == "?" * len(path[0]))
    return fits and segments_match(glob[1:], path[1:])


@hypothesis.settings(max_examples=300, deadline=None, derandomize=True)
@hypothesis.given(
    st.lists(st.sampled_from(["**", "*", "?", "??", "a", "b", "ab"]), min_size=1, max_size=4),
    st.lists(st.sampled_from(["a", "b", "ab", "ba"]), min_size=1, max_size=4),
)
def test_globs_mean_what_recursion_on_segments_says(glob, path):
    got = compile_glob("/".join(glob)).fullmatch("/".join(path)) is not None
    assert got == segments_match(glob, path)


def test_a_regex_matches_the_whole_path():
    assert matches(re.compile(r"params/layer_\d/.*"), "params/layer_0/kernel", None)
    assert not matches(re.compile(r"layer_\d"), "params/layer_0/kernel", None)
    assert not matches(re.compile(r"params/layer"), "params/layer_0/kernel", None)


def test_a_predicate_sees_path_and_leaf_without_its_box():
    seen = {}

    def wide(path, leaf):
        seen[path] = leaf
        return leaf.shape == (4, 9)

    params = {"a": nn.Partitioned(struct(4, 9), names=("x", "y")), "b": struct(4, 4)}
    assert set(assign_rules(params, [lora(wide)])) == {"a"}
    assert seen == {"a": struct(4, 9), "b": struct(4, 4)}


# --- the plan ---


def test_each_kind_of_target_picks_its_paths():
    assert set(assign_rules(PARAMS, [lora("**/query/kernel")])) == QUERY
    assert set(assign_rules(PARAMS, [lora(re.compile(r".*/(query|value)/kernel"))])) == QUERY | VALUE
    assert set(assign_rules(PARAMS, [lora(lambda path, leaf: leaf.shape == (8, 2))])) == {"params/head/kernel"}
    assert set(assign_rules(PARAMS, [lora(["**/query/kernel", re.compile(".*/value/kernel")])])) == QUERY | VALUE


def test_the_first_match_wins():
    first, rest = lora("params/layer_0/**/kernel", rank=1), lora("**/kernel", rank=2)
    chosen = assign_rules(PARAMS, [first, rest])
    assert chosen["params/layer_0/query/kernel"] is chosen["params/layer_0/value/kernel"] is first
    assert chosen["params/layer_1/query/kernel"] is chosen["params/head/kernel"] is rest


def test_train_none_protects_from_later_rules():
    assert set(assign_rules(PARAMS, [Rule("params/layer_1/**", train="none"), lora(["**/query/kernel"])])) == {
        "params/layer_0/query/kernel"
    }


def test_excluded_paths_stay_frozen_whatever_matches_them():
    excluded = Rule(["params/layer_0/**", "**/head/bias"], train="none")
    chosen = assign_rules(PARAMS, [lora("**/query/kernel")], full=[full("**/bias")], exclude=[excluded])
    assert set(chosen) == {"params/layer_1/query/kernel", "params/layer_1/query/bias"}


def test_parameters_trained_in_full_may_have_any_shape():
    chosen = assign_rules(PARAMS, [lora("**/query/kernel")], full=[full(["**/bias", "**/temperature"])])
    assert {path for path, rule in chosen.items() if rule.train == "full"} == BIASES | {"params/temperature"}
    assert {path for path, rule in chosen.items() if rule.train == "lora"} == QUERY


def test_rules_of_full_training_may_overlap_one_another():
    assert set(assign_rules(PARAMS, [], full=[full("**/bias"), full("params/head/bias")])) == BIASES


# --- biases ---


@pytest.mark.parametrize(
    ("bias", "expected"),
    [
        ("none", set()),
        ("all", BIASES),
        ("lora_only", {"params/layer_0/query/bias", "params/layer_1/query/bias"}),
    ],
)
def test_biases_by_the_words_of_peft(bias, expected):
    chosen = assign_rules(PARAMS, [lora("**/query/kernel")], bias=bias)
    assert {path for path, rule in chosen.items() if rule.train == "full"} == expected
    assert {path for path, rule in chosen.items() if rule.train == "lora"} == QUERY


def test_an_excluded_bias_stays_frozen():
    chosen = assign_rules(
        PARAMS, [lora("**/query/kernel")], bias="all", exclude=[Rule("params/head/bias", train="none")]
    )
    assert set(chosen) == QUERY | BIASES - {"params/head/bias"}


def test_haiku_calls_a_bias_b():
    params = {"linear/w": struct(3, 3), "linear/b": struct(3), "other/b": struct(3)}
    assert set(assign_rules(params, [lora("linear/w")], bias="lora_only")) == {"linear/w", "linear/b"}


def test_no_such_bias_is_an_error():
    with pytest.raises(ValueError, match="none of the 11 parameters beside a weight with an adapter is called 'bias'"):
        assign_rules(PARAMS, [lora("**/value/kernel")], bias="lora_only")


# --- what is refused ---


def test_a_target_that_matches_nothing_shows_the_nearest_paths():
    assert message(ValueError, assign_rules, PARAMS, [lora("**/qurey/kernel")]) == (
        "Target '**/qurey/kernel' matches none of the 11 parameters. The nearest paths:\n"
        "  params/layer_0/query/kernel\n"
        "  params/layer_1/query/kernel\n"
        "  params/layer_0/value/kernel\n"
        "  params/layer_1/value/kernel\n"
        "  params/head/kernel"
    )


def test_each_target_of_a_rule_must_match():
    assert "'**/key/kernel' matches none" in message(
        ValueError, assign_rules, PARAMS, [lora(["**/query/kernel", "**/key/kernel"])]
    )


@pytest.mark.parametrize("where", ["full", "exclude"])
def test_train_and_exclude_must_match_too(where):
    rules = {where: [Rule("**/bais", train="none" if where == "exclude" else "full")]}
    assert "Target '**/bais' matches none" in message(
        ValueError, assign_rules, PARAMS, [lora("**/query/kernel")], **rules
    )


def test_a_regex_and_a_predicate_that_match_nothing():
    def tall(path, leaf):
        return False

    assert message(ValueError, assign_rules, PARAMS, [lora(re.compile("head/kernel"))]).startswith(
        "Target 'head/kernel' matches none of the 11 parameters. The nearest paths:\n  params/head/kernel\n"
    )
    assert message(ValueError, assign_rules, PARAMS, [lora(tall)]).startswith(
        "Target predicate tall matches none of the 11 parameters. The nearest paths:\n  params/embed/embedding\n"
    )


def test_an_empty_tree_says_so():
    assert message(ValueError, assign_rules, {}, [lora("**/kernel")]) == (
        "Target '**/kernel' matches none of the 0 parameters. The nearest paths:\n  (the tree has no parameters)"
    )


@pytest.mark.parametrize(
    ("target", "globs"),
    [
        ("query", "'**/query/kernel'"),
        ("query/kernel", "'**/query/kernel'"),
        ("kernel", "'**/kernel'"),
        ("layer_1", "'**/layer_1/query/kernel' or '**/layer_1/value/kernel'"),
        ("params", "'**/params/**/embedding' or '**/params/**/kernel'"),
    ],
)
def test_a_bare_name_suggests_the_globs_that_it_means(target, globs):
    text = message(ValueError, assign_rules, PARAMS, [lora(target)])
    assert text.startswith(f"Target {target!r} matches none of the 11 parameters. Did you mean {globs}? The nearest")


def test_a_bare_name_in_train_means_vectors_too():
    text = message(ValueError, assign_rules, PARAMS, [lora("**/query/kernel")], full=[full("head")])
    assert "Did you mean '**/head/kernel' or '**/head/bias'?" in text


def test_a_tree_that_is_one_array_says_so():
    text = message(ValueError, assign_rules, {"": struct(3, 3)}, [lora("**/kernel")])
    assert text.endswith("The nearest paths:\n  (the tree is a single array)")


@pytest.mark.parametrize("leaf", ["bert", b"x", object(), len])
def test_a_leaf_that_is_not_an_array_is_named(leaf):
    text = message(TypeError, assign_rules, PARAMS | {"params/name": leaf}, [lora("**/query/kernel")])
    assert text == (
        f"params/name: params holds {leaf!r} ({type(leaf).__name__}), which is neither an array nor a number. Take it "
        "out of the tree."
    )


def test_a_number_is_a_leaf():
    assert set(assign_rules(PARAMS | {"params/factor": 0.5}, [], full=[full("**/factor")])) == {"params/factor"}


def test_nearest_is_quick_in_a_large_tree():
    """Compared one by one, this took a minute."""
    paths = [f"layer_{i}/{name}/kernel" for i in range(50_000) for name in ("query", "value")]
    start = time.process_time()
    assert nearest("**/qurey/kernel", paths)[0] == "layer_0/query/kernel"
    assert nearest("layer_37/qurey/kernel", paths, 2) == ["layer_37/query/kernel", "layer_37/value/kernel"]
    nearest("/".join(["a" * 400] * 30), paths)
    assert time.process_time() - start < 4


def test_nearest_compares_words_and_not_lengths():
    paths = ["params/head/kernel", "params/encoder/layer_0/attention/self/query/kernel"]
    assert nearest("**/qurey/kernel", paths, 1) == paths[1:]


@pytest.mark.parametrize(
    ("target", "kind", "shape"),
    [("params/head/bias", "a vector", "(2,)"), ("params/temperature", "a scalar", "()")],
)
def test_a_vector_or_a_scalar_takes_no_adapter(target, kind, shape):
    assert message(ValueError, assign_rules, PARAMS, [lora(target)]) == (
        f"{target} is {kind} of shape {shape}: a low-rank update needs at least two axes. "
        f"Train it in full with lojax.Rule('{target}', train=\"full\"), or narrow '{target}'."
    )


def test_an_integer_takes_no_adapter_and_no_gradient():
    text = message(ValueError, lojax.init, jax.random.key(0), {"count": jnp.ones((4, 4), jnp.int32)}, "count", rank=2)
    assert text.startswith("count has dtype int32: only real floating-point weights take an adapter, and codes that")
    assert message(ValueError, assign_rules, {"z": jnp.ones((4, 4), bool)}, [lora("z")]) == (
        "z has dtype bool: only real floating-point weights take an adapter."
    )
    assert message(ValueError, assign_rules, PARAMS, [], full=[full("stats/count")]) == (
        "stats/count has dtype int32: only floating-point parameters can be trained in full."
    )


def test_a_wholly_hidden_rule_is_a_contradiction():
    assert message(ValueError, assign_rules, PARAMS, [lora("**/kernel", rank=1), full("**/query/kernel")]) == (
        "params/layer_0/query/kernel is matched by contradictory rules: Rule('**/kernel', rank=1) comes first, so "
        "Rule('**/query/kernel', train='full') never applies to anything. Remove one, narrow its targets, or put the "
        "narrower rule first."
    )


@pytest.mark.parametrize("target", ["**/kernel", re.compile(".*/kernel"), lambda path, leaf: path.endswith("kernel")])
def test_train_wins_over_a_pattern_in_targets(target):
    """As PEFT's modules_to_save win over its target_modules."""
    chosen = assign_rules(PARAMS, [lora(target)], full=[full("params/head/*")])
    assert chosen["params/head/kernel"].train == chosen["params/head/bias"].train == "full"
    assert {path for path, rule in chosen.items() if rule.train == "lora"} == QUERY | VALUE


def test_train_against_the_very_path_in_targets_is_a_contradiction():
    rules = [lora(["params/head/kernel", "**/query/kernel"])]
    assert message(ValueError, assign_rules, PARAMS, rules, full=[full("params/head/*")]) == (
        "params/head/kernel is matched by contradictory rules: targets= adapts it (Rule(['params/head/kernel', "
        "'**/query/kernel'], rank=2)), train= trains it in full (Rule('params/head/*', train='full')). Take it out of "
        "one of them."
    )


def test_a_target_that_train_takes_wholly_is_a_contradiction():
    rules = [lora("**/query/kernel"), lora("**/head/kernel")]
    assert message(ValueError, assign_rules, PARAMS, rules, full=[full("params/head/*")]) == (
        "params/head/kernel is matched by contradictory rules: targets= adapts it (Rule('**/head/kernel', rank=2)), "
        "train= trains it in full (Rule('params/head/*', train='full')). Take it out of one of them."
    )


@pytest.mark.parametrize("where", ["full", "rules"])
def test_a_rule_whose_every_match_is_excluded_is_an_error(where):
    rules, trained = [lora("**/query/kernel")], []
    (trained if where == "full" else rules).append((full if where == "full" else lora)("**/head/kernel"))
    excluded = Rule(["**/layer_0/**", "**/head/*"], train="none")
    assert message(ValueError, assign_rules, PARAMS, rules, full=trained, exclude=[excluded]) == (
        f"{(trained or rules)[-1]} trains nothing: exclude= or an earlier rule freezes all that it matches, such as "
        "params/head/kernel. Remove it, or narrow the other."
    )


def test_a_full_rule_that_an_earlier_rule_freezes_wholly_is_an_error():
    rules = [Rule("**/head/*", train="none"), lora("**/query/kernel")]
    text = message(ValueError, assign_rules, PARAMS, rules, full=[full("params/head/*")])
    assert text.startswith("Rule('params/head/*', train='full') trains nothing: exclude= or an earlier rule freezes")


# --- collections ---


BATCH_NORM = {
    "batch_stats/BatchNorm_0/mean": struct(4),
    "batch_stats/BatchNorm_0/var": struct(4),
    "params/BatchNorm_0/scale": struct(4),
    "params/BatchNorm_0/bias": struct(4),
    "params/Dense_0/kernel": struct(4, 4),
}
NORM = {"params/BatchNorm_0/scale", "params/BatchNorm_0/bias"}
STATS = {"batch_stats/BatchNorm_0/mean", "batch_stats/BatchNorm_0/var"}


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("**/BatchNorm_0/*", NORM),
        ("*/BatchNorm_0/*", NORM),
        (re.compile(r".*/BatchNorm_0/\w+"), NORM),
        ("batch_stats/**", STATS),
        ("**batch_stats/*/mean", {"batch_stats/BatchNorm_0/mean"}),
        ("batch_stats/*/mean", {"batch_stats/BatchNorm_0/mean"}),
        ("{params,batch_stats}/BatchNorm_0/*", NORM | STATS),
        (re.compile("batch_stats/.*"), STATS),
        (lambda path, leaf: "BatchNorm" in path, NORM | STATS),
    ],
)
def test_patterns_stay_in_params_unless_they_name_another_collection(target, expected):
    chosen = assign_rules(BATCH_NORM, [lora("**/kernel")], full=[full(target)])
    assert {path for path, rule in chosen.items() if rule.train == "full"} == expected


def test_a_pattern_that_matches_only_in_another_collection_says_how_to_name_it():
    text = message(ValueError, assign_rules, BATCH_NORM, [lora("**/kernel")], full=[full("**/mean")])
    assert text == (
        "Target '**/mean' matches nothing in params, where patterns stay. It matches batch_stats/BatchNorm_0/mean: to "
        "mean that collection, name it, as in 'batch_stats/**/mean'."
    )


def test_a_tree_without_collections_has_no_such_borders():
    params = {"params": struct(3), "head/mean": struct(4), "other/mean": struct(3)}
    assert set(assign_rules(params, [], full=[full("**/mean")])) == {"head/mean", "other/mean"}


def test_an_explicit_rule_in_targets_settles_an_overlap_with_train():
    for train, trained in (("full", {"params/head/kernel", "params/head/bias"}), ("none", {"params/head/bias"})):
        rules = [Rule("params/head/kernel", train=train), lora("**/kernel")]
        chosen = assign_rules(PARAMS, rules, full=[full("params/head/*")])
        assert {path for path, rule in chosen.items() if rule.train == "full"} == trained


def test_an_excluded_overlap_is_none():
    chosen = assign_rules(
        PARAMS, [lora("**/kernel")], full=[full("params/head/*")], exclude=[Rule("params/head/kernel", train="none")]
    )
    assert "params/head/kernel" not in chosen
    assert chosen["params/head/bias"].train == "full"


def test_a_rule_without_targets_is_refused():
    assert message(ValueError, assign_rules, PARAMS, [lora(())]) == (
        "Rule((), rank=2) has no targets. Give a glob, a regex or a predicate."
    )


@pytest.mark.parametrize("rules", [[], [lora("**/query/kernel")], [Rule("**/kernel", train="none")]])
def test_nothing_left_to_train_is_refused(rules):
    text = "Nothing trains: no parameter is left by targets=, train= and exclude=."
    assert message(ValueError, assign_rules, PARAMS, rules, exclude=[Rule("**/kernel", train="none")]) == text

"""The serving example answers as each adapter alone does, with one compilation, and would say so if it did not."""

import jax
import jax.numpy as jnp
import many_adapters
import numpy as np
import pytest

SIZES = many_adapters.SMOKE


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    with jax.numpy_dtype_promotion("standard"):  # before the fixture that says so for each test
        return folder, many_adapters.main(["--smoke", "--adapters", "3", "--out", str(folder)])


def test_serves_and_swaps_with_one_compilation(run):
    _, results = run
    assert results["compilations"] == 1
    assert results["gap"] < 1e-3
    assert all(results[name] > 0 for name in ("one batch of mixed adapters", "one adapter at a time", "merged copies"))


def test_half_of_the_adapters_are_those_of_peft(run):
    folder, _ = run
    layouts = [(path / "adapter_config.json").exists() for path in sorted((folder / "first").iterdir())]
    assert layouts == [True, False, True]


def test_files_give_back_what_was_written(run):
    folder, _ = run
    frozen = many_adapters.make_base(SIZES)
    for number in (0, 1):  # PEFT, and a checkpoint
        written = many_adapters.make_adapter(many_adapters.make_decoder(SIZES), frozen, number)
        read = many_adapters.read_adapter(folder / "first" / f"task-{number:02d}", frozen)
        for x, y in zip(jax.tree.leaves(written), jax.tree.leaves(read), strict=True):
            np.testing.assert_array_equal(x, y)


def test_the_answer_of_another_adapter_is_found(run):
    """The check is no tautology: answers of one adapter fail it for the next, and those of the base for each."""
    folder, _ = run
    frozen = many_adapters.make_base(SIZES)
    loras = [many_adapters.read_adapter(folder / "first" / f"task-{i:02d}", frozen) for i in range(2)]
    server = many_adapters.Server(SIZES, frozen, dict(zip("ab", loras, strict=True)))
    prompts = np.arange(3 * SIZES.prompt, dtype=np.int32).reshape(3, SIZES.prompt)
    answers = server.answer([many_adapters.Request(name, p) for name, p in zip(["a", "b", None], prompts, strict=True)])
    for row, own in enumerate([*loras, None]):
        for lora in (*loras, None):
            gap = many_adapters.largest_gap(SIZES, frozen, lora, prompts[row : row + 1], answers[row : row + 1])
            assert (gap < 1e-4) == (lora is own), (row, gap)


def test_the_cache_changes_no_answer():
    """Token by token with the cache, and each time the whole text again."""
    frozen, decode = many_adapters.make_base(SIZES), many_adapters.make_decoder(SIZES)
    text = prompts = jnp.arange(2 * SIZES.prompt).reshape(2, SIZES.prompt)
    whole = jax.jit(lambda text: decode(frozen, text, many_adapters.empty_cache(SIZES, 2), 0)[0][:, -1])
    for _ in range(SIZES.answer):
        text = jnp.concatenate([text, jnp.argmax(whole(text), axis=-1)[:, None]], axis=1)
    found = many_adapters.generate(lambda *args: decode(frozen, *args), SIZES, prompts)
    np.testing.assert_array_equal(found, text[:, SIZES.prompt :])

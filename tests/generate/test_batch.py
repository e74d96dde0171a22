"""Prompts of different lengths side by side give what the full forward pass says of each alone."""

import jax
import numpy as np
import pytest
from flax import nnx
from generation_models import likeliest, make_model, prompts

from swr_jax.generate import GREEDY, Sampling, generate_batch, generate_tokens
from swr_jax.generate.streams import new_streams, read_prompts
from swr_jax.nn.blocks import MIXERS

PATTERNS = [
    ("phalanx", "attention"),
    *(pytest.param((name,), marks=pytest.mark.slow) for name in sorted(MIXERS)),
    *(
        pytest.param(pattern, marks=pytest.mark.slow)
        for pattern in (("swa", "attention"), ("swa", "mlstm"), ("swa", "gated_delta"))
    ),
]
# Nothing but a token, blocks' and windows' edges, more than a chunk, and what needs all pieces.
LENGTHS = (1, 16, 7, 59, 33)


def columns(rows) -> list[list[int]]:
    return [list(column) for column in zip(*rows, strict=True)]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_greedy_rows_are_the_argmax_of_the_full_forward_pass(pattern):
    model, asked = make_model(*pattern), prompts(*LENGTHS)
    rows = generate_batch(model, asked, max_tokens=21, sampling=GREEDY, chunk_size=16)
    answers = columns(rows)
    assert {len(answer) for answer in answers} == {21}
    assert answers == likeliest(model, list(zip(asked, answers, strict=True)))
    assert len({tuple(answer) for answer in answers}) > 1


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_ragged_row_stands_where_it_stands_alone(pattern):
    model, asked = make_model(*pattern), prompts(*LENGTHS)
    graphdef, params = nnx.split(model)

    def read(rows):
        streams = new_streams(model, len(rows), max_length=64)
        return read_prompts(graphdef, params, streams, rows, chunk_size=16)

    together = read(asked)
    for row, prompt in enumerate(asked):
        alone = read([prompt])
        np.testing.assert_allclose(together.logits[row], alone.logits[0], rtol=1e-5, atol=1e-6)
        for ours, theirs in zip(
            jax.tree.leaves(together.state), jax.tree.leaves(alone.state), strict=True
        ):
            np.testing.assert_allclose(ours[:, row], theirs[:, 0], rtol=1e-5, atol=1e-5)


def test_samples_are_those_of_the_stream_alone():
    model, asked = make_model("phalanx", "attention"), prompts(5, 30, 12)
    options = [
        Sampling(seed=5),
        Sampling(temperature=0.7, top_k=9, seed=2**40 + 1),
        Sampling(temperature=1.3, top_p=0.8, min_p=0.01, seed=7),
    ]
    together = columns(generate_batch(model, asked, max_tokens=20, sampling=options, chunk_size=16))
    for prompt, sampling, answer in zip(asked, options, together, strict=True):
        rows = generate_batch(model, [prompt], max_tokens=20, sampling=sampling, chunk_size=16)
        assert columns(rows) == [answer]
    key = jax.random.key(5)
    assert list(generate_tokens(model, asked[0], max_tokens=20, key=key)) == together[0]


def test_rows_end_by_themselves():
    model, asked = make_model("phalanx", "attention"), prompts(5, 9, 13)
    full = columns(generate_batch(model, asked, max_tokens=20, sampling=GREEDY))
    end = full[1][3]
    rows = list(generate_batch(model, asked, max_tokens=20, sampling=GREEDY, eos_id=end))
    for expected, answer in zip(full, columns(rows), strict=True):
        length = expected.index(end) + 1 if end in expected else 20
        assert answer == expected[:length] + [None] * (len(rows) - length)
    assert list(generate_batch(model, asked, max_tokens=0)) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": []}, "prompts is empty"),
        ({"prompts": [[1], []]}, "prompt is empty"),
        ({"max_tokens": -1}, "max_tokens=-1"),
        ({"chunk_size": 24}, "chunk_size=24; it must be a power of two"),
        ({"sampling": [GREEDY] * 2}, "2 entries for 1 prompts"),
        ({"sampling": Sampling(top_k=300)}, "top_k=300; it must be between 1 and .* 259"),
    ],
)
def test_errors_name_argument_and_rule(arguments, message):
    model = make_model("phalanx", "attention")
    with pytest.raises(ValueError, match=message):
        generate_batch(model, **({"prompts": [[1]], "max_tokens": 1} | arguments))

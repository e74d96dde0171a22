"""xLSTM checkpoints here and in transformers: the same logits, states and text, in float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xlstm_checkpoint as checkpoint
from flax import nnx

from swr_jax.generate import generate_tokens
from swr_jax.nn.convert import load_xlstm

pytestmark = pytest.mark.slow
WHY = "compares with transformers and torch: pip install 'swr_jax[parity]', or make test-parity"
torch = pytest.importorskip("torch", reason=WHY)
transformers = pytest.importorskip("transformers", reason=WHY)

CHUNK = 64  # of transformers; ours are of 128 tokens
LENGTHS = [1, CHUNK - 1, CHUNK + 1, 2 * CHUNK - 1, 2 * CHUNK + 1, 300]
CASES = {
    "single": {},
    "fused": {"weight_mode": "fused"},
    "tied": {"tie_word_embeddings": True},
    "without add_out_norm": {"add_out_norm": False},  # which transformers does not look at
    "five heads": {"num_heads": 5, "hidden_size": 160, "embedding_dim": 160},
    "wide values": {"qk_dim_factor": 0.345, "v_dim_factor": 1.5, "num_blocks": 3},
    "other caps": {"gate_soft_cap": 3.0, "output_logit_soft_cap": 5.0, "norm_eps": 1e-3},
}


def relative_error(got, wanted):
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    return np.sqrt(np.mean((got - wanted) ** 2) / np.mean(wanted**2))


@pytest.fixture
def load_both(tmp_path, monkeypatch):
    """Write a checkpoint of random numbers and load it twice: transformers' model, and ours."""
    # Of no use to weights that are all loaded, and it fails on fused ones.
    monkeypatch.setattr(transformers.xLSTMPreTrainedModel, "_init_weights", lambda *_: None)

    def load(**options):
        depth = options.get("num_blocks", 2)
        fields = checkpoint.configuration(num_hidden_layers=depth, **options)
        folder = checkpoint.write(tmp_path, fields, checkpoint.random_tensors(fields), shards=2)
        theirs, report = transformers.xLSTMForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True
        )
        tied = fields["tie_word_embeddings"]
        assert set(report["missing_keys"]) == ({"lm_head.weight"} if tied else set())
        assert not report["unexpected_keys"]
        if tied:  # transformers knows the field, but no tied xLSTM
            theirs.lm_head.weight = theirs.backbone.embeddings.weight
        return theirs.eval(), load_xlstm(folder)[1]

    return load


def sample(length, vocab_size=61):
    return np.random.default_rng(length).integers(0, vocab_size, (2, length))


def their_cache(model, batch):
    """A cache of the sizes that its layers have; its own are rounded up to multiples of 64."""
    cache = transformers.models.xlstm.modeling_xlstm.xLSTMCache(
        model.config, batch, dtype=torch.float32
    )
    layer = model.backbone.blocks[0].mlstm_layer
    heads = model.config.num_heads
    qk, v = layer.qk_dim // heads, layer.v_dim // heads
    for number in cache.rnn_state:
        shapes = (batch, heads, qk, v), (batch, heads, qk), (batch, heads, 1)
        cache.rnn_state[number] = tuple(torch.zeros(shape) for shape in shapes)
    return cache


def run_theirs(model, tokens, **options):
    with torch.no_grad():
        return model(torch.tensor(tokens), **({"use_cache": False} | options)).logits.numpy()


@functools.partial(jax.jit, static_argnums=0)
def run(definition, variables, tokens, state=None):
    return nnx.merge(definition, variables)(tokens, state=state)


def run_ours(model, tokens, **options):
    return run(*nnx.split(model), jnp.asarray(tokens, jnp.int32), **options)


@pytest.mark.parametrize("case", CASES)
def test_logits_agree(case, load_both):
    theirs, ours = load_both(**CASES[case])
    for length in LENGTHS:
        tokens = sample(length)
        assert relative_error(run_ours(ours, tokens), run_theirs(theirs, tokens)) <= 1e-4, length


@pytest.mark.parametrize("case", ["single", "fused", "five heads", "wide values"])
def test_streams_agree_and_so_do_their_states(case, load_both):
    theirs, ours = load_both(**CASES[case])
    tokens, start = sample(300), 0
    cache, state = their_cache(theirs, 2), ours.init_state(2, max_length=300)
    for length in (CHUNK + 1, 1, 1, CHUNK - 1, 2 * CHUNK):
        part = tokens[:, start : start + length]
        wanted = run_theirs(theirs, part, cache_params=cache, use_cache=True)
        got, state = run_ours(ours, part, state=state)
        assert relative_error(got, wanted) <= 1e-4, start
        start += length
        # Both scale what they keep by a stabiliser, each by its own.
        cells = state[0].cells
        for number, (memory, normalizer, stabilizer) in cache.rnn_state.items():
            theirs_unit = np.exp(stabilizer.double().numpy())
            ours_unit = np.exp(np.asarray(cells.stabilizer[number], np.float64))[..., None]
            normalizer = theirs_unit * normalizer.numpy()
            assert relative_error(ours_unit * cells.normalizer[number], normalizer) <= 1e-4
            memory = theirs_unit[..., None] * memory.numpy()
            assert relative_error(ours_unit[..., None] * cells.memory[number], memory) <= 1e-4


def test_text_agrees(load_both):
    """Widths that are multiples of 64, so that transformers' own cache fits."""
    theirs, ours = load_both(hidden_size=128, embedding_dim=128, num_heads=4)
    prompt = sample(CHUNK + 5)[:1]
    wanted = theirs.generate(
        torch.tensor(prompt), max_new_tokens=24, do_sample=False, eos_token_id=None
    )
    got = generate_tokens(ours, prompt[0].tolist(), max_tokens=24, temperature=0)
    assert list(got) == wanted[0, prompt.shape[1] :].tolist()

"""Small xLSTM checkpoints of random numbers, as files, and their logits from NumPy in float64."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file


def configuration(**options):
    """Fields of config.json of a model with three heads: widths 96, keys 48, values 96."""
    defaults = {
        "model_type": "xlstm",
        "vocab_size": 61,
        "hidden_size": 96,
        "embedding_dim": 96,
        "num_hidden_layers": 2,
        "num_blocks": 2,
        "num_heads": 3,
        "use_bias": False,
        "tie_word_embeddings": False,
        "add_out_norm": True,
        "norm_eps": 1e-6,
        "norm_reduction_force_float32": True,
        "qk_dim_factor": 0.5,
        "v_dim_factor": 1.0,
        "eps": 1e-6,
        "ffn_proj_factor": 2.667,
        "ffn_round_up_to_multiple_of": 64,
        "gate_soft_cap": 15.0,
        "output_logit_soft_cap": 30.0,
        "weight_mode": "single",
        "chunk_size": 64,
    }
    return defaults | options


def _sizes(fields):
    width = fields["hidden_size"]
    step = fields["ffn_round_up_to_multiple_of"]
    return {
        "qk": int(width * fields["qk_dim_factor"]),
        "v": int(width * fields["v_dim_factor"]),
        # Not quite rounded up, as in the original: 96 * 2.667 = 256.03 stays 256.
        "mlp": step * int((width * fields["ffn_proj_factor"] + step - 1) // step),
    }


def random_tensors(fields, seed=0, dtype=np.float32):
    """Tensors by name; none is left at a value, such as 0 or 1, that would hide a mistake."""
    rng = np.random.default_rng(seed)
    width, heads, sizes = fields["hidden_size"], fields["num_heads"], _sizes(fields)
    fused = fields["weight_mode"] == "fused"
    tensors = {}

    def normal(name, *shape, mean=0.0, deviation=1.0):
        tensors[name] = (mean + deviation * rng.standard_normal(shape)).astype(dtype)

    def linear(name, out_features, in_features, gain=1.0):
        normal(f"{name}.weight", out_features, in_features, deviation=gain * in_features**-0.5)

    def norm(name, features):
        normal(f"{name}.weight", features, mean=1.0, deviation=0.3)

    normal("backbone.embeddings.weight", fields["vocab_size"], width)
    for number in range(fields["num_hidden_layers"]):
        block = f"backbone.blocks.{number}"
        layer, ffn = f"{block}.mlstm_layer", f"{block}.ffn"
        norm(f"{block}.norm_mlstm", width)
        norm(f"{block}.norm_ffn", width)
        norm(f"{layer}.multihead_norm", sizes["v"])
        linear(f"{layer}.out_proj", width, sizes["v"])
        linear(f"{ffn}.proj_down", width, sizes["mlp"])
        parts = {"q": sizes["qk"], "k": sizes["qk"], "v": sizes["v"], "ogate_preact": sizes["v"]}
        for name, features in parts.items():
            linear(f"{layer}.{name}", features, width)
        for name, bias in (("igate_preact", -2.0), ("fgate_preact", 3.0)):
            linear(f"{layer}.{name}", heads, width, gain=3.0)
            normal(f"{layer}.{name}.bias", heads, mean=bias, deviation=2.0)
        for name in ("proj_up_gate", "proj_up"):
            linear(f"{ffn}.{name}", sizes["mlp"], width)
        if fused:
            _fuse(tensors, f"{layer}.qkv_opreact.weight", [f"{layer}.{x}.weight" for x in parts])
            for kind in ("weight", "bias"):
                gates = [f"{layer}.{x}gate_preact.{kind}" for x in "if"]
                _fuse(tensors, f"{layer}.ifgate_preact.{kind}", gates)
            ups = [f"{ffn}.{x}.weight" for x in ("proj_up_gate", "proj_up")]
            _fuse(tensors, f"{ffn}.proj_up_gate_z.weight", ups)
    norm("backbone.out_norm", width)
    if not fields["tie_word_embeddings"]:
        linear("lm_head", fields["vocab_size"], width, gain=8.0)
    return tensors


def _fuse(tensors, name, parts):
    tensors[name] = np.concatenate([tensors.pop(part) for part in parts])


def write(folder, fields, tensors, shards=1):
    """Write a checkpoint folder: config.json, and safetensors in one file or several."""
    folder = Path(folder)
    (folder / "config.json").write_text(json.dumps(fields))
    names = sorted(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[shard::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def logits(fields, tensors, tokens):
    """Logits [B, T, V] of tokens [B, T], token by token, in float64."""
    tensors = {name: np.asarray(x, np.float64) for name, x in tensors.items()}
    heads, sizes = fields["num_heads"], _sizes(fields)
    epsilon = fields["norm_eps"]

    def cap(x, limit):
        return x if limit is None else limit * np.tanh(x / limit)

    def rms(x, name):
        scale = tensors[f"{name}.weight"]
        return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + epsilon) * scale

    def parts(x, fused, names, features):
        """The projections of x, from one matrix or from one each."""
        prefix = fused.rpartition(".")[0]
        if f"{fused}.weight" in tensors:
            weight, bias = tensors[f"{fused}.weight"], tensors.get(f"{fused}.bias", 0)
            return np.split(x @ weight.T + bias, np.cumsum(features)[:-1], axis=-1)
        return [
            x @ tensors[f"{prefix}.{name}.weight"].T + tensors.get(f"{prefix}.{name}.bias", 0)
            for name in names
        ]

    def mlstm(x, layer):
        q, k, v, o = parts(
            x,
            f"{layer}.qkv_opreact",
            ("q", "k", "v", "ogate_preact"),
            (sizes["qk"], sizes["qk"], sizes["v"], sizes["v"]),
        )
        gates = parts(x, f"{layer}.ifgate_preact", ("igate_preact", "fgate_preact"), (heads, heads))
        i, f = (cap(gate, fields["gate_soft_cap"]) for gate in gates)
        q, k, v = (y.reshape(*y.shape[:2], heads, -1) for y in (q, k, v))
        q = q * q.shape[-1] ** -0.5
        memory = np.zeros((len(x), heads, k.shape[-1], v.shape[-1]))
        norm = np.zeros((len(x), heads, k.shape[-1]))
        out = np.empty_like(v)
        # In float64 the gates' range, e**15 each way, needs no stabiliser.
        for t in range(x.shape[1]):
            forget = 1 / (1 + np.exp(-f[:, t]))[..., None]
            key = np.exp(i[:, t])[..., None] * k[:, t]
            memory = forget[..., None] * memory + key[..., None] * v[:, t, :, None, :]
            norm = forget * norm + key
            total = np.abs(np.sum(norm * q[:, t], axis=-1))
            out[:, t] = (
                np.einsum("bhk,bhkv->bhv", q[:, t], memory) / np.maximum(total, 1)[..., None]
            )
        out = out - out.mean(axis=-1, keepdims=True)
        out = out / np.sqrt(np.mean(out**2, axis=-1, keepdims=True) + epsilon)
        out = out.reshape(o.shape) * tensors[f"{layer}.multihead_norm.weight"]
        return (out / (1 + np.exp(-o))) @ tensors[f"{layer}.out_proj.weight"].T

    def feed_forward(x, ffn):
        gate, up = parts(
            x, f"{ffn}.proj_up_gate_z", ("proj_up_gate", "proj_up"), (sizes["mlp"], sizes["mlp"])
        )
        return (gate / (1 + np.exp(-gate)) * up) @ tensors[f"{ffn}.proj_down.weight"].T

    x = tensors["backbone.embeddings.weight"][tokens]
    for number in range(fields["num_hidden_layers"]):
        block = f"backbone.blocks.{number}"
        x = x + mlstm(rms(x, f"{block}.norm_mlstm"), f"{block}.mlstm_layer")
        x = x + feed_forward(rms(x, f"{block}.norm_ffn"), f"{block}.ffn")
    head = tensors.get("lm_head.weight", tensors["backbone.embeddings.weight"])
    return cap(rms(x, "backbone.out_norm") @ head.T, fields["output_logit_soft_cap"])

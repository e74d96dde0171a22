"""What a training run would take on chips that are not here: memory, time, money's worth.

    make plan ARGS='--config=experiments/configs/phalanx_1b.py --topology=v5e:16x16'

Compiles the very step that experiments/pretrain.py runs, with the chips' own compiler, on this
machine's CPU. --mesh=fsdp=64,sequence=4 names the sizes of mesh axes (others 1; -1 takes what is
left), --config.data.batch_size=512 and the like change the run. --sweep tries meshes and batch
sizes and ranks them. --mode=decode plans the step of generation that gives each of --streams
streams its next token after --context tokens, --mode=prefill the one that reads --chunk tokens of
each prompt. Writes a JSON file, and a picture where several were planned. Predictions, not
measurements: swr_jax/train/plan.py says what they are made of.
"""

import itertools
import json
import os
import sys
from pathlib import Path

# The compilers of chips that are not here; no device of this machine's.
os.environ["JAX_PLATFORMS"] = "cpu"

import plan_report
from absl import app, flags
from ml_collections import config_flags

from swr_jax.benchmark import report
from swr_jax.train.config import TrainConfig, make_train_config
from swr_jax.train.inference_plan import make_inference_plan
from swr_jax.train.plan import make_plan, parse_topology

AXES = ("data", "fsdp", "tensor", "sequence")
# Of a tokenizer that is not there: that of the published models.
VOCABULARY = 50_304

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Configuration file; --config.NAME=VALUE overrides a value in it."
)
flags.mark_flag_as_required("config")
TOPOLOGY = flags.DEFINE_list("topology", None, "Such as v5e:16x16; several with commas.")
flags.mark_flag_as_required("topology")
MESH = flags.DEFINE_string("mesh", "", "Such as fsdp=64,tensor=4; none: the configuration's.")
TOKENS = flags.DEFINE_float("tokens", 100e9, "Tokens to train on, to say how long it would take.")
SWEEP = flags.DEFINE_bool("sweep", False, "Try meshes and batch sizes, and rank them.")
MODE = flags.DEFINE_enum("mode", "train", ["train", "decode", "prefill"], "Which step to plan.")
STREAMS = flags.DEFINE_integer("streams", 16, "Streams side by side, of decode and prefill.", 1)
CONTEXT = flags.DEFINE_integer("context", 8192, "Tokens that full attention has room for.", 1)
CHUNK = flags.DEFINE_integer("chunk", 512, "Tokens of each prompt that prefill reads at once.", 1)
OUT = flags.DEFINE_string("out", "", "JSON file to write; a picture goes beside it.")


def main(argv: list[str]) -> None:
    """Parses, compiles, reports."""
    if len(argv) > 1:
        sys.exit(f"error: unexpected argument {argv[1]!r}: options begin with --")
    values = CONFIG.value.to_dict()
    if values["model"].get("vocab_size") is None:
        values["model"]["vocab_size"] = VOCABULARY
        print(f"vocabulary: {VOCABULARY:,}; --config.model.vocab_size=N for another")
    name = Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem
    plans = []
    try:
        for topology in TOPOLOGY.value:
            parse_topology(topology)
            for changed in candidates(values):
                plan = plan_of(make_train_config(changed), topology)
                plans.append({"config": name} | plan)
                print(plan_report.text(plans[-1], TOKENS.value), flush=True)
    except ValueError as error:
        sys.exit(f"error: {error}")
    compared = MODE.value == "train" and len(plans) > 1
    if compared:
        print(f"\n{plan_report.ranking(plans)}")
    if OUT.value:
        path = Path(OUT.value)
        path.parent.mkdir(parents=True, exist_ok=True)
        record = {"environment": report.environment(sys.argv[1:]), "plans": plans}
        path.write_text(json.dumps(record, indent=1) + "\n")
        print(f"wrote {path}")
        if compared:
            plan_report.draw(record, path.with_suffix(".png"))
            print(f"wrote {path.with_suffix('.png')}")


def plan_of(config: TrainConfig, topology: str) -> dict:
    """Returns what the step of the chosen mode would take."""
    if MODE.value == "train":
        return make_plan(config, topology)
    return make_inference_plan(
        config,
        topology,
        mode=MODE.value,
        streams=STREAMS.value,
        context=CONTEXT.value,
        chunk=CHUNK.value,
    )


def candidates(values: dict) -> list[dict]:
    """Returns the configuration with the mesh asked for; with --sweep, with several."""
    if MESH.value:
        values = with_mesh(values, parse_mesh(MESH.value))
    if not SWEEP.value or MODE.value != "train":
        return [values]
    rows = values["data"]["batch_size"]
    return [
        with_mesh(values, {"fsdp": -1, "tensor": tensor, "sequence": sequence}, times * rows)
        for tensor, sequence, times in itertools.product((1, 4), (1, 4), (1, 2))
    ]


def parse_mesh(text: str) -> dict[str, int]:
    """Returns the sizes of "fsdp=64,tensor=4"."""
    sizes = {}
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis not in AXES or not size.lstrip("-").isdigit():
            raise ValueError(f"--mesh={text}: must be AXIS=SIZE,... with axes of {', '.join(AXES)}")
        sizes[axis] = int(size)
    return sizes


def with_mesh(values: dict, sizes: dict[str, int], rows: int | None = None) -> dict:
    """Returns the configuration with other mesh axes, and rows per update."""
    mesh = dict.fromkeys(AXES, 1) | sizes
    data = values["data"] | ({} if rows is None else {"batch_size": rows})
    return values | {"mesh": mesh, "data": data}


if __name__ == "__main__":
    app.run(main)

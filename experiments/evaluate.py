"""Tests a trained model: perplexity by position, needles, passkey, BABILong, MQAR, the harness.

    python experiments/evaluate.py --checkpoint=runs/phalanx_tiny

Prints tables; writes OUT/NAME.json after every case and pictures at the end. The same command goes
on where it stopped, and does only what is new when tasks, lengths or samples are added.
"""

import signal
import sys
from pathlib import Path

from absl import app, flags, logging
from tqdm import tqdm

from swr_jax.benchmark.report import environment
from swr_jax.data import DataConfig, load_tokenizer, open_corpus
from swr_jax.eval import plots, records, report
from swr_jax.eval.errors import TaskError
from swr_jax.eval.streaming import Streamer, bounded_attention
from swr_jax.eval.suite import TASKS, Settings, Suite
from swr_jax.train.checkpoint import load_model

DEFAULTS = Settings()
CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "Folder of a training run (its --workdir).", required=True
)
OUT = flags.DEFINE_string("out", None, "Folder of the results; the checkpoint's own if not given.")
NAME = flags.DEFINE_string("name", "evaluation", "Name of the results: NAME.json, NAME_*.png.")
BESIDE = flags.DEFINE_string("beside", None, "Another NAME.json for the picture of perplexity.")
FRESH = flags.DEFINE_bool("fresh", False, "Begin anew rather than go on.")
TASK = flags.DEFINE_list("tasks", list(DEFAULTS.tasks), f"Among {', '.join(TASKS)}; may be empty.")
LENGTHS = flags.DEFINE_list(
    "lengths", [str(n) for n in DEFAULTS.lengths], "Contexts in tokens, as 512,131072."
)
TEXT_LENGTHS = flags.DEFINE_list("text_lengths", [], "Of perplexity; as --lengths if not given.")
VARIANTS = flags.DEFINE_list("variants", list(DEFAULTS.variants), "Of RULER's needles.")
DEPTHS = flags.DEFINE_integer("depths", DEFAULTS.depths, "Depths of needles.", lower_bound=2)
SAMPLES = flags.DEFINE_integer(
    "samples", DEFAULTS.samples, "Samples at each length, depth and variant.", lower_bound=1
)
TEXT_TOKENS = flags.DEFINE_integer(
    "text_tokens", DEFAULTS.text_tokens, "Tokens of perplexity at each length.", lower_bound=1
)
TEXT = flags.DEFINE_string(
    "text", None, "Text of perplexity: file, folder or pattern; the run's held-out text if not set."
)
PROSE = flags.DEFINE_string("prose", DEFAULTS.prose, "Text of haystacks: file, folder or pattern.")
SEED = flags.DEFINE_integer("seed", DEFAULTS.seed, "Other samples.", lower_bound=0)
ATTENTION_WINDOW = flags.DEFINE_integer(
    "attention_window", None, "Full attention sees so many tokens only: memory stays constant."
)
CHUNK_SIZE = flags.DEFINE_integer("chunk_size", 512, "Tokens read at once.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Streams side by side.")
HARNESS = flags.DEFINE_list("harness", [], "Tasks of lm-evaluation-harness; needs [harness].")
INCLUDE_PATH = flags.DEFINE_string("include_path", None, "Folder of the harness's further tasks.")
LIMIT = flags.DEFINE_integer("limit", None, "Examples of each task of the harness.", lower_bound=1)
ALLOW_CODE = flags.DEFINE_bool(
    "allow_code", False, "Let the harness run the programs that the model writes."
)


def prepare() -> tuple[dict, list]:
    """Loads the model; the record so far, and all cases."""
    model, config, step = load_model(Path(CHECKPOINT.value))
    if ATTENTION_WINDOW.value is not None:
        model = bounded_attention(model, ATTENTION_WINDOW.value)
    data, split = config.data, "validation"
    if TEXT.value is not None:
        data = DataConfig(source=TEXT.value, tokenizer=data.tokenizer, validation_fraction=0.0)
        split = "train"  # all of it
    settings = Settings(
        tasks=tuple(TASK.value),
        lengths=tuple(map(int, LENGTHS.value)),
        text_lengths=tuple(map(int, TEXT_LENGTHS.value)),
        text_tokens=TEXT_TOKENS.value,
        variants=tuple(VARIANTS.value),
        depths=DEPTHS.value,
        samples=SAMPLES.value,
        prose=PROSE.value,
        seed=SEED.value,
    )
    streamer = Streamer(model, chunk_size=CHUNK_SIZE.value, batch_size=BATCH_SIZE.value)
    tokenizer = load_tokenizer(data.tokenizer)
    suite = Suite(streamer, tokenizer, corpus=open_corpus(data), split=split, settings=settings)
    cases = list(suite.cases())
    if HARNESS.value:
        from swr_jax.eval import harness  # its package is an extra

        cases += harness.cases(
            harness.HarnessModel(streamer, tokenizer),
            HARNESS.value,
            include_path=INCLUDE_PATH.value,
            limit=LIMIT.value,
            allow_code=ALLOW_CODE.value,
        )
    record = records.open_record(
        results_path(),
        model=records.describe(model, step=step, trained_length=config.data.sequence_length),
        fresh=FRESH.value,
    )
    return record, cases


def results_path() -> Path:
    """Where the results are."""
    return Path(OUT.value or Path(CHECKPOINT.value) / "evaluation") / f"{NAME.value}.json"


def main(argv: list[str]) -> None:
    """Parses, evaluates, reports."""
    logging.set_verbosity(logging.ERROR)  # orbax warns that it only reads
    if len(argv) > 1:
        sys.exit(f"error: unexpected argument {argv[1]!r}: options begin with --")
    try:
        record, cases = prepare()
        beside = None if BESIDE.value is None else records.read_record(Path(BESIDE.value))
    except (FileNotFoundError, ImportError, ValueError, records.RecordError) as error:
        sys.exit(f"error: {error}")
    path = results_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    left_out, here = [], environment(sys.argv[1:])
    left = [case for case in cases if not records.is_done(record, case.name, case.settings)]
    try:
        with tqdm(total=sum(case.tokens for case in left), unit="tok", unit_scale=True) as bar:
            for case in left:
                bar.set_description(case.name)
                before = bar.n
                try:
                    result = case.run(bar.update)
                except TaskError as error:
                    left_out.append(f"left out: {case.name}: {error}")
                else:
                    result = {"settings": case.settings, **result}
                    records.add_case(record, case.name, result, environment=here)
                    records.write_record(record, path)
                bar.update(before + case.tokens - bar.n)
    except KeyboardInterrupt:
        print(f"\n{path} has what is done; the same command goes on from there", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)  # the shell's convention
    if not record["cases"]:
        sys.exit("\n".join(["error: nothing could be tested", *left_out]))
    print(report.table(record), *left_out, sep="\n")
    pictures = plots.draw(record, path.with_suffix(""), beside=beside)
    print(f"\nwrote {', '.join(map(str, [path, *pictures]))}")


if __name__ == "__main__":
    app.run(main)

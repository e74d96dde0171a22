#!/usr/bin/env bash
# A training run on all workers of a TPU VM pod. From the repository, on your own machine:
#
#     TPU=my-pod ZONE=us-east5-a BUCKET=my-bucket CONFIG=phalanx_1b RUN=first \
#         experiments/launch/tpu_pod.sh --config.data.source=/mnt/bucket/tokens --config.mesh.fsdp=16
#
# Arguments override options of the configuration. BUCKET is mounted on every worker as /mnt/bucket
# and keeps the run in runs/RUN. The same command goes on where a run has stopped.
set -euo pipefail

: "${TPU:?name the TPU VM, as TPU=my-pod}"
: "${ZONE:?name its zone, as ZONE=us-east5-a}"
: "${BUCKET:?name the bucket that keeps the run, as BUCKET=my-bucket}"
: "${CONFIG:?name a file of experiments/configs, as CONFIG=phalanx_1b}"
: "${RUN:?name the run, as RUN=first}"
MOUNT=${MOUNT:-/mnt/bucket}
cd "$(dirname "$0")/../.."

on_all_workers() {
    gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="$1"
}

# What is committed, and nothing else: every worker must have the same code.
archive=$(mktemp --suffix=.tar.gz)
trap 'rm -f "$archive"' EXIT
git archive --format=tar.gz --output="$archive" HEAD
gcloud compute tpus tpu-vm scp "$archive" "$TPU:swr_jax.tar.gz" --zone="$ZONE" --worker=all

on_all_workers "set -e
mkdir -p swr_jax && tar -xzf swr_jax.tar.gz -C swr_jax
command -v python3.12 >/dev/null || {
    sudo add-apt-repository -y ppa:deadsnakes/ppa
    sudo apt-get install -y python3.12 python3.12-venv
}
make --silent -C swr_jax .venv/.test EXTRAS=tpu,text
mountpoint -q $MOUNT || { sudo mkdir -p $MOUNT && sudo chown \$(id -un) $MOUNT && gcsfuse --implicit-dirs $BUCKET $MOUNT; }"

overrides=""
[ $# -eq 0 ] || overrides=$(printf ' %q' "$@")
on_all_workers "cd swr_jax && .venv/bin/python experiments/pretrain.py \
--config=experiments/configs/$CONFIG.py --workdir=$MOUNT/runs/$RUN --distributed$overrides"

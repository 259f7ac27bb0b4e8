#!/usr/bin/env bash
# One round of `amici-eval watch`: judges every version of a model that has no verdict yet, promotes what passes.
#
# crontab -e:
#   MODEL_NAME=breast
#   MLFLOW_TRACKING_URI=https://mlflow.example.org
#   DATA=/data/tissue.h5ad
#   */10 * * * * /opt/amici/cron.sh
#
# DATA (an absolute path or a URI) may be left out: then the tissue is the one that the champion was registered with.
# Silent if all is well, so that cron sends no mail; else the end of the log goes to stderr. Exit codes: those of watch.
set -euo pipefail

: "${MODEL_NAME:?name of the registered model}"
: "${MLFLOW_TRACKING_URI:?tracking server or database}"
GATE=${GATE:-better}
ALIAS=${ALIAS:-champion}
STATE=${STATE:-$HOME/.local/state/amici-eval}   # log, lock and scratch files
LIMIT=${LIMIT:-6h}                              # then the round is ended, and its lease given back
# cron's PATH is short: where amici-eval is installed
PATH=${AMICI_EVAL_BIN:+$AMICI_EVAL_BIN:}$PATH
# nothing phones home
export MLFLOW_DISABLE_TELEMETRY=true DO_NOT_TRACK=1 WANDB_MODE=disabled

mkdir -p "$STATE"
cd "$STATE"
log=$STATE/$MODEL_NAME.log
exec 9>"$STATE/$MODEL_NAME.lock"
# the round before is still at work
flock --nonblock 9 || exit 0

if [ -f "$log" ] && [ "$(wc -c <"$log")" -gt 5000000 ]; then mv -f "$log" "$log.1"; fi
before=$(wc -c 2>/dev/null <"$log" || echo 0)
date -u +"== %Y-%m-%dT%H:%M:%SZ" >>"$log"

code=0
timeout --kill-after=60 "$LIMIT" amici-eval watch --once model="$MODEL_NAME" ${DATA:+data.uri="$DATA"} \
  baseline="@$ALIAS" gate="$GATE" gate.promote="$ALIAS" ${GATE_OPTIONS:-} >>"$log" 2>&1 || code=$?

case $code in
  0) ;;
  2) echo "amici-eval watch of $MODEL_NAME: a version could not be judged, or bad settings; $log:" >&2 ;;
  124 | 137) echo "amici-eval watch of $MODEL_NAME: not done after $LIMIT; $log:" >&2 ;;
  *) echo "amici-eval watch of $MODEL_NAME: exit code $code; $log:" >&2 ;;
esac
if [ "$code" -ne 0 ]; then tail -c +"$((before + 1))" "$log" | tail -n 30 >&2; fi
exit "$code"

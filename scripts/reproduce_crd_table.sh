#!/usr/bin/env bash
# The CRD table: every published figure of scripts/crd_table.yaml, three seeds each, and which of them hold. Resumable:
# finished runs and trained teachers are kept, unfinished runs go on.
#
#   scripts/reproduce_crd_table.sh                       all 13 pairs (513 figures; two GPU-weeks and more)
#   scripts/reproduce_crd_table.sh resnet56_resnet20     some pairs
#   METHODS=KD,DKD,CRD scripts/reproduce_crd_table.sh resnet56_resnet20             some methods
#   WORDS='schedule.epochs=30' scripts/reproduce_crd_table.sh resnet56_resnet20     further words for every run
#
# OUTPUTS names another folder than outputs/reproduce. `python scripts/crd_table.py table FOLDER` shows what is there so far.
set -euo pipefail
here=$(dirname "$0")
outputs=${OUTPUTS:-outputs/reproduce}/crd_table
read -ra more <<<"${WORDS:-}"
failed=0
commands=$(python "$here/crd_table.py" commands "$@" --methods "${METHODS:-}")

while read -r pair method words; do
  read -ra typed <<<"$words"
  kdbench train -m "experiment=tian2020_$pair" "paths.outputs=$outputs" "paths.runs=$outputs/tian2020_$pair/$method" \
    seed=0,1,2 "${typed[@]}" "${more[@]}" </dev/null || failed=1
done <<<"$commands"
python "$here/crd_table.py" table "$outputs" || failed=1
exit $failed

#!/usr/bin/env bash
# The CRD table: every published figure of scripts/crd_table.yaml, three seeds each, and which of them hold. Resumable:
# finished runs and trained teachers are kept, unfinished runs go on.
#
#   kdbench reproduce crd_table full                                            all 13 pairs (513 figures; two GPU-weeks and more)
#   kdbench reproduce crd_table full pair=resnet56_resnet20,vgg13_vgg8          some pairs
#   kdbench reproduce crd_table full pair=resnet56_resnet20 method=KD,DKD,CRD   some methods
#   kdbench reproduce crd_table full schedule.epochs=30                         further words for every run
#
# OUTPUTS names another folder than outputs/reproduce. `python scripts/crd_table.py table FOLDER` shows what is there so far.
set -euo pipefail
here=$(dirname "$0")
outputs=${OUTPUTS:-outputs/reproduce}/crd_table
if [ "${1:-full}" = small ]; then
  echo "crd_table small: the table's figures are of CIFAR-100, so there is no small one. kdbench reproduce tian2020 trains the" \
    "methods of a pair on embedded digits, in minutes; kdbench reproduce crd_table full: the whole table" >&2
  exit 2
fi
pairs='' methods='' more=()
for word in "${@:2}"; do
  case $word in
    pair=*) pairs=${word#*=} ;;
    method=*) methods=${word#*=} ;;
    *) more+=("$word") ;;
  esac
done
failed=0
commands=$(python "$here/crd_table.py" commands ${pairs//,/ } --methods "$methods")

while read -r pair method words; do
  read -ra typed <<<"$words"
  kdbench train -m "experiment=tian2020_$pair" "paths.outputs=$outputs" "paths.runs=$outputs/tian2020_$pair/$method" \
    seed=0,1,2 "${typed[@]}" ${more[@]+"${more[@]}"} </dev/null || failed=1
done <<<"$commands"
python "$here/crd_table.py" table "$outputs" || failed=1
exit $failed

# What the reproduce_<paper>.sh share; they source it. Each runs a paper's set of experiments and ends in one table:
#
#   scripts/reproduce_<paper>.sh small             embedded digits, minutes on a CPU (the default)
#   scripts/reproduce_<paper>.sh full              the paper's own data, networks and lengths
#   scripts/reproduce_<paper>.sh small seed=0      further words go to every run (here: one seed, other images)
#   scripts/reproduce_<paper>.sh small dataset=cifar10 dataset.subset=4000 schedule.epochs=30 teacher.schedule.epochs=30
#   scripts/reproduce_<paper>.sh small seed=0 debug=smoke   every run in seconds, in a folder of their own: does it go through?
#
# OUTPUTS names another folder than outputs/reproduce. Started again it goes on where it was stopped: finished runs,
# finished stages of a run, and trained teachers are kept.
set -euo pipefail

size=${1:-small}
shift || true
case $size in
  small) suffix=_small ;;
  full) suffix= ;;
  *) echo "usage: $0 [small|full] [key=value ...]" >&2; exit 2 ;;
esac
words=("$@")
outputs=${OUTPUTS:-outputs/reproduce}/$(basename "$0" .sh | sed 's/^reproduce_//')-$size
seeds=seed=0,1,2
failed=0

# Whether these are runs of a few steps, in which numbers of epochs and images that a script itself types must be small.
smoking() { [[ " ${words[*]-} " == *" debug="* ]]; }

# own run ...: with its own data and networks in such runs too, where debug=smoke would put images and others.
own() {
  local words=("${words[@]/%debug=smoke/debug=short}")
  "$@"
}
if smoking; then outputs+=-debug; fi

# run <experiment without _small> [key=value ...]: three seeds of it; a run that fails stops no other. An experiment without
# a small sibling is small itself.
run() {
  local experiment=$1
  local chosen=$experiment$suffix
  shift
  [ -e "$(dirname "$0")/../configs/experiment/$chosen.yaml" ] || chosen=$experiment
  kdbench train -m "experiment=$chosen" "paths.outputs=$outputs" "paths.runs=$outputs/$experiment" \
    "$seeds" "$@" "${words[@]}" || failed=1
}

# Each run's teacher has its own seed too.
own_teachers='teacher.seed=${seed}'

# What the table of an experiment shows; a script whose procedures find more says so.
metrics_of() { echo last; }

# A table for each experiment; figures that further words have left none of (debug=smoke, another procedure) are left out.
finish() {
  local folder name metrics
  for folder in "$outputs"/*/; do
    name=$(basename "$folder")
    case $name in teachers | sweeps) continue ;; esac
    echo
    echo "== $name, $size"
    metrics=$(metrics_of "$name")
    kdbench compare "$folder" --metric "${metrics//,/?,}?" || failed=1
  done
  exit $failed
}

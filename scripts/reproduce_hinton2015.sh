#!/usr/bin/env bash
# Hinton, Vinyals and Dean 2015: hard and soft targets, classes never seen, 3 % of the data, temperature and width,
# ensembles, specialists. Usage: scripts/reproduce.sh
source "$(dirname "$0")/reproduce.sh"

metrics_of() {
  case $1 in
    *_few_hard) echo last,best,train/top1 ;;
    *_few_soft) echo last,best,train/top1 ;;
    *_omit3 | *_only78) echo before/test/top1,before/missing/test/top1,last,after/missing/test/top1,offset ;;
    *_ensemble | *_ensemble_gaussian) echo last,recovered/test/top1 ;;
    *_specialists)
      echo generalist/test/top1,last,conditional/generalist/test/top1,conditional/fused/test/top1,changed_uncovered/test ;;
    *) echo last ;;
  esac
}

run hinton2015_hard
run hinton2015_soft "$own_teachers"
run hinton2015_omit3 "$own_teachers"
run hinton2015_omit3 teacher=none loss=ce
run hinton2015_only78 "$own_teachers"
run hinton2015_few_hard
run hinton2015_few_soft "$own_teachers"
if [ "$size" = small ]; then narrow='[6,6]'; else narrow='[30,30]'; fi
own run hinton2015_narrow "student.hidden=$narrow,[300,300]" loss.tau=1,2.5,4,8,20
run hinton2015_ensemble
run hinton2015_ensemble_gaussian
run hinton2015_specialists "$own_teachers"
finish

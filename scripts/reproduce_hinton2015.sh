#!/usr/bin/env bash
# Hinton, Vinyals and Dean 2015: hard and soft targets, classes never seen, 3 % of the data, temperature and width,
# ensembles, specialists. Usage: scripts/reproduce.sh
source "$(dirname "$0")/reproduce.sh"

run hinton2015_hard
run hinton2015_soft "$own_teachers"
run hinton2015_omit3 "$own_teachers"
run hinton2015_only78 "$own_teachers"
run hinton2015_few_hard
run hinton2015_few_soft "$own_teachers"
if [ "$size" = small ]; then narrow='[6,6]'; else narrow='[30,30]'; fi
run hinton2015_narrow "student.hidden=$narrow,[300,300]" loss.tau=1,2.5,4,8,20
run hinton2015_ensemble
run hinton2015_specialists "$own_teachers"
finish

#!/usr/bin/env bash
# Ren et al. 2022: supervision by p*, by an ensemble, by one teacher, by labels. Usage: scripts/reproduce.sh
source "$(dirname "$0")/reproduce.sh"

metrics_of() { echo last,best,test/posterior_l2,test/nll; }

run ren2022_supervision
run ren2022_supervision teacher=ensemble teacher.network=mlp_128 'teacher.members=[mlp_128,mlp_128,mlp_128,mlp_128,mlp_128]' \
  'teacher.seed=${seed}'
run ren2022_supervision teacher=mlp_128 'teacher.seed=${seed}'
run ren2022_supervision teacher=none loss=ce
finish

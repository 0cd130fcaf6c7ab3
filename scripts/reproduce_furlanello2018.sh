#!/usr/bin/env bash
# Furlanello et al. 2018, born-again networks: generations and their ensembles, the controls, strong students of weak
# teachers, shared layers, language models (full: of ptb.*.txt in data/ptb). Usage: scripts/reproduce.sh
source "$(dirname "$0")/reproduce.sh"

metrics_of() {
  case $1 in
    *_generations) echo ensemble/1/test/top1,last,ensemble/2/test/top1,ensemble/3/test/top1,ensemble_with_teacher/3/test/top1 ;;
    *_lm) echo last,best,test/nll ;;
    *) echo last ;;
  esac
}

run furlanello2018_generations "$own_teachers"
run furlanello2018_generations "$own_teachers" loss=ban_l,cwtm,dkpp procedure.generations=1
if [ "$size" = full ]; then
  run furlanello2018_generations_cifar10 "$own_teachers" teacher=wrn_28_1,wrn_28_2,wrn_28_5,wrn_28_10
fi
run furlanello2018_wrn_to_densenet "$own_teachers"
run furlanello2018_shared_layers "$own_teachers" 'procedure.share=[],[first,last]'
lm_data=()
[ "$size" = small ] || lm_data=(dataset.root=data/ptb)
own run furlanello2018_lm "$own_teachers" loss=ban,ban_l,ce "${lm_data[@]}"
finish

#!/usr/bin/env bash
# Zhang et al. 2024, PTLoss: its synthetic experiment, beside KL at four temperatures, KL as weak as PTLoss pulls, label
# smoothing and labels alone; on text; and on images.
# Usage: scripts/reproduce.sh
source "$(dirname "$0")/reproduce.sh"

metrics_of() {
  case $1 in
    *_gaussian) echo last,best,test/posterior_l2,test/nll ;;
    *) echo last ;;
  esac
}

run zhang2024_ptloss_gaussian loss.order=1,3,5
run zhang2024_ptloss_gaussian loss=kl loss.tau=1,2,4,8 loss.weights.task=0 loss.weights.distill=1
run zhang2024_ptloss_gaussian loss=kl loss.tau=1 loss.weights.task=0 loss.weights.distill=0.1
run zhang2024_ptloss_gaussian loss=ce,label_smoothing teacher=none
run zhang2024_ptloss_udhr loss.order=1,5
run zhang2024_ptloss_udhr loss=kl loss.tau=1 loss.weights.task=0 loss.weights.distill=1
run zhang2024_ptloss_udhr loss=ce teacher=none
run zhang2024_ptloss
run zhang2024_ptloss loss.epsilon=search,gradient
run zhang2024_ptloss loss=kl loss.tau=1,2,4,8
run zhang2024_ptloss teacher=none loss=ce,label_smoothing,focal
finish

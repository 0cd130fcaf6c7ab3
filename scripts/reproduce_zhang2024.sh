#!/usr/bin/env bash
# Zhang et al. 2024, PTLoss, beside KL, temperature, label smoothing and focal loss; on images, where the paper has text.
# Usage: scripts/reproduce.sh
source "$(dirname "$0")/reproduce.sh"

run zhang2024_ptloss
run zhang2024_ptloss loss.epsilon=search,gradient
run zhang2024_ptloss loss=kl loss.tau=1,2,4,8
run zhang2024_ptloss teacher=none loss=ce,label_smoothing,focal
finish

#!/usr/bin/env bash
# The CRD protocol (Tian et al. 2020): 13 pairs of teacher and student on CIFAR-100, every loss with a published row.
# Small: one pair on embedded digits. Usage: scripts/reproduce.sh
source "$(dirname "$0")/reproduce.sh"

losses=kl,fitnet,at,sp,cc,vid,rkd,pkt,fsp,nst,ab,ft,crd,dkd
if [ "$size" = small ]; then
  run tian2020 "loss=$losses"
else
  for pair in wrn_40_2_wrn_16_2 wrn_40_2_wrn_40_1 resnet56_resnet20 resnet110_resnet20 resnet110_resnet32 \
    resnet32x4_resnet8x4 vgg13_vgg8 vgg13_mobilenetv2_half resnet50_mobilenetv2_half resnet50_vgg8 \
    resnet32x4_shufflenetv1 resnet32x4_shufflenetv2 wrn_40_2_shufflenetv1; do
    run "tian2020_$pair" "loss=$losses"
    run "tian2020_$pair" teacher=none loss=ce
  done
fi
finish

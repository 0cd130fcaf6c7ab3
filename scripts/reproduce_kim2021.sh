#!/usr/bin/env bash
# Kim et al. 2021, KL against MSE: temperature and weights, label noise, sequential distillation, few images, few classes,
# teachers stopped early; and PS-KD, self-distillation by other authors of that name. Usage: scripts/reproduce.sh
source "$(dirname "$0")/reproduce.sh"

metrics_of() {
  case $1 in
    *_kl | *_mse | *_noise) echo last,train/top1 ;;
    *_sequential) echo last,direct/test/top1,gain/test/top1 ;;
    *) echo last ;;
  esac
}

weights='loss.weights={task:0.9,distill:0.1},{task:0.6,distill:0.4},{task:0.3,distill:0.7},{task:0,distill:1}'
run kim2021_kl loss.tau=1,3,5,20 "$weights"
run kim2021_kl loss.tau=inf
run kim2021_mse
run kim2021_noise loss.tau=0.5,1,5,20,inf
run kim2021_noise loss=kim_mse
run kim2021_sequential
run kim2021_sequential 'procedure.losses=[kl,kim_mse],[kim_mse,kl]' procedure.direct=false
if [ "$size" = small ]; then teachers=resnet20,resnet8; else teachers=wrn_28_4,wrn_16_4,wrn_16_2; fi
run kim2021_few_images "teacher=$teachers"
run kim2021_few_images teacher=none loss=ce
run kim2021_few_classes "teacher=$teachers"
run kim2021_few_classes teacher=none loss=ce
if [ "$size" = small ]; then stops=9,60; else stops=10,200; fi
if smoking; then stops=1,2; fi
run kim2021_undertrained loss.tau=1,5,20,inf "teacher.stop_epoch=$stops"
run kim2021_pskd
finish

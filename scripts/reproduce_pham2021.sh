#!/usr/bin/env bash
# Pham et al. 2021, meta pseudo labels. Usage: scripts/reproduce.sh
source "$(dirname "$0")/reproduce.sh"

metrics_of() { echo last,teacher_before/test/top1,teacher_after/test/top1; }

run pham2021_meta_pseudo_labels "$own_teachers"
finish

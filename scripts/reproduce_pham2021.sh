#!/usr/bin/env bash
# Pham et al. 2021, meta pseudo labels. Usage: scripts/reproduce.sh
source "$(dirname "$0")/reproduce.sh"

run pham2021_meta_pseudo_labels "$own_teachers"
finish

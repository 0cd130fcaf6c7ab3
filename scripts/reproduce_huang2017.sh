#!/usr/bin/env bash
# Huang et al. 2017, snapshot ensembles, distilled. Usage: scripts/reproduce.sh
source "$(dirname "$0")/reproduce.sh"

metrics_of() { echo last,recovered/test/top1; }

run huang2017_snapshot "$own_teachers"
finish

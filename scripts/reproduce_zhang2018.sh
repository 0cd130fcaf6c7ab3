#!/usr/bin/env bash
# Zhang et al. 2018, deep mutual learning, and the same network alone. Usage: scripts/reproduce.sh
source "$(dirname "$0")/reproduce.sh"

metrics_of() { echo last,peer2/test/top1,ensemble/test/top1; }

run zhang2018_mutual
run zhang2018_mutual procedure=single loss=ce
finish
